"""Helpers for the tests of Forebay, shipped so that other packages' tests can use them."""
