"""Score, select, cut, repair."""
