"""Datasets and generations as one tree of folders and files, which nobody can change."""

from __future__ import annotations

from forebay.tree.lookup import Found, Tree
from forebay.tree.nodes import File
from forebay.tree.source import Source, open_source

__all__ = ["File", "Found", "Source", "Tree", "open_source"]
