"""Code that a model wrote."""
