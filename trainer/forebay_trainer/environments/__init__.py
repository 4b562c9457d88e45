"""What an agent acts in: states of many at once, as tensors."""
