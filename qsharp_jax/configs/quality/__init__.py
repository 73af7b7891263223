"""The rows of the paper's tables on QuALITY."""
