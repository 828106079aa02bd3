"""Rows of text: calibration and training."""
