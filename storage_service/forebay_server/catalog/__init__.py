"""The catalog: what exists, in which version, where its bytes lie and who works on it."""
