"""Gradients that take fewer bytes on their way between ranks."""
