"""What a user writes, checked once."""
