"""The bytes' edge: descriptors over a Unix socket, ranges over HTTP."""
