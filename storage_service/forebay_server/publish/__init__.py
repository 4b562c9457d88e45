"""Landed pieces become one visible version, or nothing."""
