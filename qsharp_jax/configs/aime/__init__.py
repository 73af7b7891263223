"""The rows of the paper's tables on AIME."""
