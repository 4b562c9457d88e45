"""Datasets: written as shards, read as batches in an exact order."""
