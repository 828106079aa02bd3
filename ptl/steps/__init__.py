"""The steps' bodies, and how any step runs."""
