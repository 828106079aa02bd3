"""A checkpoint as files."""
