"""What is checked before money is spent."""
