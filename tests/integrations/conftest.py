from helpers import quick_compilation  # noqa: F401
