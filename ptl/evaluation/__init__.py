"""Scores, the gate, speed."""
