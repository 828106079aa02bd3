"""Checkpoints in an S3 store."""
