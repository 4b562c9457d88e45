"""Figures as people read them."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """A number of bytes as people read it: 3.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
