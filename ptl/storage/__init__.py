"""Publishing and fetching checkpoints, verified."""
