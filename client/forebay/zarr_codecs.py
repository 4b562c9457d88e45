"""Codecs of zarr that run what a chunk's bytes say: found in an array's metadata, and refused.

Of those that numcodecs registers, ``pickle`` is the only one; releases before 0.16.6 unpickle for
whoever reads the array, so nothing is left to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from forebay_wire.errors import InvalidRequest

UNSAFE: Final = frozenset({"pickle"})
"""Names of codecs, without what stands before them (``numcodecs.`` or a folder of a URL)."""

METADATA_NAMES: Final = (".zarray", ".zmetadata", "zarr.json")
"""Keys, without their folders, whose values may tell codecs of arrays."""

_CODECS: Final = ("filters", "compressor", "codecs", "index_codecs")


def check_codecs(described: Any, where: str) -> None:
    """InvalidRequest if the metadata of an array, or those that lie in it, name an unsafe codec.

    *where*: whose they are, for the message. What else is wrong with them is zarr's to tell.
    """
    for path, codec in _unsafe(described, ""):
        named = f"{where} (of {path!r} in it)" if path else where
        raise InvalidRequest(
            f"{named} has the codec {codec!r}, which runs code that its chunks hold: not read. "
            "Write the array again without it: text with zarr's dtype=str, objects with vlen-utf8, "
            "vlen-bytes, json2 or numbers"
        )


def check_metadata(key: str, value: bytes, where: str) -> None:
    """:func:`check_codecs` of the value of a *key* of a store that is *where*."""
    path, _, name = key.rpartition("/")
    if name not in METADATA_NAMES:
        return
    try:
        described = json.loads(value)
    except ValueError:  # nobody reads codecs from it
        return
    of = f"array {path!r} of {where}" if name != ".zmetadata" else f"{key} of {where}"
    check_codecs(described, of)


def _unsafe(described: Any, path: str) -> Iterator[tuple[str, str]]:
    """Where unsafe codecs are named in metadata, and how: consolidated ones hold others'."""
    if not isinstance(described, dict):
        return
    for name in _CODECS:
        for codec in _named(described.get(name)):
            yield path, codec
    held = described.get("metadata")
    consolidated = described.get("consolidated_metadata")
    for part in (held, consolidated.get("metadata") if isinstance(consolidated, dict) else None):
        if isinstance(part, dict):
            for key, value in part.items():
                yield from _unsafe(value, key)


def _named(codecs: Any) -> Iterator[str]:
    """Those unsafe of codecs, and of what they are made of."""
    if isinstance(codecs, list | tuple):
        for one in codecs:
            yield from _named(one)
    elif isinstance(codecs, dict):
        for part in codecs.values():  # format 3 lets a bare name stand for a codec
            yield from _named(part)
    elif isinstance(codecs, str) and codecs.replace("/", ".").rpartition(".")[2] in UNSAFE:
        yield codecs
