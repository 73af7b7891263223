"""The rows of the paper's tables on GSM8K."""
