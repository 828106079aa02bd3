"""Light training after each pruning."""
