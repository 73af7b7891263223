"""One file per algorithm, each read like its paper's box; `registry` finds an algorithm's record by its name."""
