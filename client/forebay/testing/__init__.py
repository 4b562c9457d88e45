"""Helpers for tests of code that talks to a daemon."""
