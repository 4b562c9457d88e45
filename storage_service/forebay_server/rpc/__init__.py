"""The gRPC edge: converts messages, asks use cases, and decides nothing."""
