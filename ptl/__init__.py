"""ptl: the Prune-Tune Loop."""

__version__ = "0.1.0"
