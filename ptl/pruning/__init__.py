"""Score, select, prune, repair."""
