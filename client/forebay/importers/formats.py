"""Which format something is in, and its pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from forebay.importers import arrays, csv_files, images, litdata, mds, tables, tar
from forebay.importers.files import (
    File,
    exists,
    expand,
    is_folder,
    join,
    list_files,
    look,
    read_file,
)
from forebay.importers.piece import Piece, Source
from forebay_wire.errors import InvalidRequest

SUFFIXES: Final = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".npz": "npz",
    ".npy": "npy",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
}
"""End of a file's name to its format."""

FOLDERS: Final = ("mds", "litdata", "huggingface", "zarr", "images")
"""Formats whose data are folders."""

FORMATS: Final = (*dict.fromkeys(SUFFIXES.values()), *FOLDERS)

_FILES: Final[dict[str, Callable[[File], Sequence[Piece]]]] = {
    "parquet": tables.parquet_pieces,
    "csv": lambda file: [csv_files.CsvPiece(file)],
    "jsonl": tables.json_lines_pieces,
    "npz": lambda file: [arrays.NpzPiece(file)],
    "npy": arrays.npy_pieces,
    "arrow": lambda file: [tables.ArrowPiece(file)],
    "webdataset": lambda file: [tar.TarPiece(file)],
}


def find_source(paths: Sequence[str], kind: str | None = None) -> Source:
    """What lies at *paths*: files, folders, patterns; all of them in one format.

    InvalidRequest for a format that is not known or not the same everywhere, NotFound.
    """
    if kind is not None and kind not in FORMATS:
        raise InvalidRequest(f"format {kind!r} is not known: use {', '.join(FORMATS)}")
    found = [_source_at(path, kind) for path in expand(paths)]
    kinds = sorted({one.kind for one in found})
    if len(kinds) > 1 and kind is None:
        raise InvalidRequest(f"the paths are in several formats ({', '.join(kinds)}): import each")
    metadata: dict[str, Any] = {}
    for one in found:
        if any(metadata.get(key, value) != value for key, value in one.metadata.items()):
            raise InvalidRequest(
                f"the folders have different classes: {metadata} and {dict(one.metadata)}; import "
                "the folder above them"
            )
        metadata.update(one.metadata)
    pieces = tuple(piece for one in found for piece in one.pieces)
    return Source(found[0].kind, pieces, metadata)


def format_of(name: str) -> str:
    """The format that the end of *name* stands for."""
    found = _by_suffix(name)
    if found is None:
        raise InvalidRequest(
            f"the format of {name} is not known: it should end in {', '.join(SUFFIXES)}, or pass "
            "--format"
        )
    return found


def _by_suffix(name: str) -> str | None:
    for suffix, found in SUFFIXES.items():
        if name.lower().endswith(suffix):
            return found
    return None


def _source_at(path: str, kind: str | None) -> Source:
    if not is_folder(path):
        if kind in FOLDERS:
            raise InvalidRequest(f"{path} is no folder, and {kind} is a format of folders")
        chosen = kind or format_of(path)
        return Source.of(chosen, _FILES[chosen](look(path)))
    chosen = kind or _format_of_folder(path)
    if chosen == "mds":
        return Source.of(chosen, mds.mds_pieces(look(join(path, mds.INDEX)), path))
    if chosen == "litdata":
        return Source.of(chosen, litdata.litdata_pieces(look(join(path, litdata.INDEX)), path))
    if chosen == "huggingface":
        return _huggingface(path)
    if chosen == "zarr":
        return Source.of(chosen, arrays.zarr_pieces(path, _stamp_of(path)))
    files = list_files(path)
    if chosen == "images":
        pieces, classes = images.image_pieces(files, path)
        return _not_empty(
            Source.of(chosen, pieces, **({"classes": classes} if classes else {})), path
        )
    fitting = [file for file in files if _by_suffix(file.path) == chosen]
    pieces_of = _FILES[chosen]
    return _not_empty(Source.of(chosen, [one for file in fitting for one in pieces_of(file)]), path)


def _not_empty(source: Source, path: str) -> Source:
    if not source.pieces:
        raise InvalidRequest(f"{path} has nothing in the format {source.kind}")
    return source


def _format_of_folder(path: str) -> str:
    if exists(path, mds.INDEX):
        index = json.loads(read_file(join(path, mds.INDEX)))
        return "litdata" if "chunks" in index else "mds"
    if exists(path, "state.json") or exists(path, "dataset_dict.json"):
        return "huggingface"
    if any(exists(path, name) for name in ("zarr.json", ".zarray", ".zgroup")):
        return "zarr"
    files = list_files(path)
    kinds = {kind for file in files if (kind := _by_suffix(file.path)) is not None}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds:
        raise InvalidRequest(
            f"{path} holds files in several formats ({', '.join(sorted(kinds))}): name one with "
            "--format"
        )
    if any(images.is_image(file) for file in files):
        return "images"
    raise InvalidRequest(
        f"nothing below {path} is in a format that can be read: {', '.join(FORMATS)}"
    )


def _huggingface(path: str) -> Source:
    """A folder that ``datasets`` wrote with ``save_to_disk``."""
    if not exists(path, "state.json"):
        splits = json.loads(read_file(join(path, "dataset_dict.json")))["splits"]
        raise InvalidRequest(
            f"{path} holds the splits {', '.join(splits)}: import one of them "
            f"({join(path, splits[0])}), each as a dataset, or as a version with --append"
        )
    try:
        state = json.loads(read_file(join(path, "state.json")))
        names = [one["filename"] for one in state["_data_files"]]
        features = json.loads(read_file(join(path, "dataset_info.json"))).get("features") or {}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} is not what `datasets` saves: {error!r}") from error
    if state.get("_indices_data_files"):
        raise InvalidRequest(
            f"{path} keeps an order beside its rows: save it after flatten_indices()"
        )
    media, classes = features_of(features)
    pieces = [tables.ArrowPiece(look(join(path, name)), media) for name in names]
    return Source.of("huggingface", pieces, **({"classes": classes} if classes else {}))


def features_of(features: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Columns of images and sounds, and the names of classes by column."""
    kinds = {name: one for name, one in features.items() if isinstance(one, dict)}
    media = tuple(name for name, one in kinds.items() if one.get("_type") in ("Image", "Audio"))
    classes = {
        name: list(one["names"])
        for name, one in kinds.items()
        if one.get("_type") == "ClassLabel" and one.get("names")
    }
    return media, classes


def _stamp_of(folder: str) -> str:
    """Of all files of a folder: the newest, and how many bytes there are."""
    files = list_files(folder) or []
    hidden = [join(folder, name) for name in (".zarray", ".zgroup") if exists(folder, name)]
    every = [*files, *(look(path) for path in hidden)]
    if not all(file.stamp for file in every):
        return ""
    newest = max((file.stamp for file in every), default="")
    return f"{newest}/{sum(file.num_bytes for file in every)}/{len(every)}"
