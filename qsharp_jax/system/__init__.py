"""Errors, files, locks, several hosts, signals, progress; no package of ours is imported here."""
