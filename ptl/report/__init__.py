"""The result of a run as pages, card and pictures."""
