"""The bundled distributed trainer, run under torchrun."""
