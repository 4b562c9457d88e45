"""The files of one version or generation, from its manifest; pure, and without torch.

What a generation's description says is in ``docs/formats/generation.md``.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from forebay.tree.nodes import (
    Box,
    File,
    Folder,
    Piece,
    blob_file,
    boxes_file,
    file_name,
    manifest_file,
    pieces_file,
    put,
    text_file,
)
from forebay_wire.errors import IntegrityError
from forebay_wire.manifest import (
    FRAME_BYTES,
    DatasetManifest,
    GenerationManifest,
    PackRef,
    SelectionManifest,
    ShardRef,
    StatisticsManifest,
    canonical_json,
    parse,
)

MANIFEST_NAME: Final = "manifest.json"
PACKS_NAME: Final = "packs"
STATE_NAME: Final = "state"

DESCRIPTION_FORMAT: Final = 1
"""The version of a pack's description that is understood here."""


def build_tree(manifest_id: str, data: bytes, context: str) -> Folder:
    """The files of the version or generation whose manifest *data* is; verified against the id."""
    manifest = parse(data, context, manifest_id)
    text = manifest_file(manifest_id, len(data) - FRAME_BYTES)
    if isinstance(manifest, SelectionManifest | StatisticsManifest):
        raise IntegrityError(f"manifest {manifest_id} is not that of {context}")
    if isinstance(manifest, DatasetManifest):
        return {MANIFEST_NAME: text, **_version(manifest)}
    return {MANIFEST_NAME: text, PACKS_NAME: _packs(manifest), STATE_NAME: state_tree(manifest)}


def _suffix(format: str) -> str:
    return {"": "arrow", "webdataset": "tar"}.get(name := format.partition(":")[0], name)


def _version(manifest: DatasetManifest) -> Folder:
    """The shards, and a folder for the columns of each layer."""
    files = _shards(manifest.shards)
    for number, layer in enumerate(manifest.layers):
        files[f"columns-{number:02d}"] = _shards(layer.shards)
    return files


def _shards(shards: Sequence[ShardRef]) -> Folder:
    files: Folder = {}
    for number, shard in enumerate(shards):
        notes: dict[str, Any] = {"rows": shard.num_rows}
        if shard.origin is not None:
            notes["origin"] = shard.origin.url
        files[f"shard-{number:05d}.{_suffix(shard.format)}"] = blob_file(
            shard.blob, shard.num_bytes, notes
        )
    return files


def _packs(manifest: GenerationManifest) -> Folder:
    return {
        f"rank-{pack.rank:05d}.pack": blob_file(pack.blob, pack.num_bytes, {"rank": pack.rank})
        for pack in manifest.packs
    }


def state_tree(manifest: GenerationManifest) -> Folder:
    """What was saved, as its nested dicts are: each value a file.

    Tensors, arrays and bytes are files of their bytes; any other value is JSON, as it stands in
    the manifest. A tensor inside a list or tuple lies at the top, under its whole name.
    """
    parts: dict[str, list[tuple[Mapping[str, Any], PackRef]]] = {}
    objects: dict[str, tuple[Any, PackRef]] = {}
    paths: dict[str, Sequence[str | int]] = {}
    root: Folder = {}
    try:
        for pack in manifest.packs:
            body = pack.description
            if body["format"] != DESCRIPTION_FORMAT:
                raise IntegrityError(
                    f"pack of rank {pack.rank} has description format {body['format']!r}, this "
                    f"client reads {DESCRIPTION_FORMAT}: upgrade Forebay (pip install -U forebay)"
                )
            paths.update(_place(place) for place in body.get("structure", []))
            for entry in body["tensors"]:
                parts.setdefault(entry["name"], []).append((entry, pack))
            for name, value in body["objects"].items():
                objects.setdefault(name, (value, pack))
        files = {name: _tensor(name, found) for name, found in parts.items()}
        files.update((name, _object(*found)) for name, found in objects.items())
        in_order = dict.fromkeys([name for name in paths if name in files])
        for name in [*in_order, *(name for name in files if name not in in_order)]:
            put(root, [file_name(key) for key in paths.get(name, (name,))], files[name])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise IntegrityError(
            f"a description of generation {manifest.run}@{manifest.attempt}/{manifest.step} "
            f"lacks or bends a field: {error!r}"
        ) from error
    return root


def _place(place: Any) -> tuple[str, Sequence[str | int]]:
    if isinstance(place, list):
        return ".".join(map(str, place)), place
    return place["name"], place["path"]


def _tensor(name: str, found: Sequence[tuple[Mapping[str, Any], PackRef]]) -> File:
    shape = tuple(found[0][0]["shape"])
    dtype = found[0][0]["dtype"]
    notes = {"dtype": dtype, "shape": list(shape)}
    boxes: list[Box] = []
    for entry, pack in found:
        offset, num_bytes = entry["at"]
        if (tuple(entry["shape"]), entry["dtype"]) != (shape, dtype):
            raise IntegrityError(f"ranks disagree about shape or dtype of {name}")
        sizes = tuple(entry.get("sizes", shape))
        offsets = tuple(entry.get("offsets", [0] * len(shape)))
        _check_inside(name, pack, offset, num_bytes)
        if num_bytes:
            boxes.append(Box(Piece(pack.blob, offset, num_bytes), offsets, sizes))
    if not boxes:
        return pieces_file([], notes)
    item_bytes = boxes[0].piece.num_bytes // math.prod(boxes[0].sizes)
    covered = sum(box.piece.num_bytes for box in boxes)
    if covered != math.prod(shape) * item_bytes:
        raise IntegrityError(
            f"{name} has {math.prod(shape) * item_bytes} bytes and the packs hold {covered} of them"
        )
    if all(_is_run(box, shape) for box in boxes):
        boxes.sort(key=lambda box: box.offsets)
        return pieces_file([box.piece for box in boxes], notes)
    return boxes_file(shape, item_bytes, boxes, notes)


def _is_run(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether the elements of *box* follow each other in the whole tensor, row-major."""
    is_whole = True  # of all dimensions behind
    for size, of in zip(reversed(box.sizes), reversed(shape), strict=True):
        if not is_whole and size != 1:
            return False
        is_whole = is_whole and size == of
    return True


def _object(value: Any, pack: PackRef) -> File:
    if isinstance(value, dict) and len(value) == 1:
        ((tag, body),) = value.items()
        if tag in ("$bytes", "$bytearray"):
            return _raw(body, pack, {})
        if tag == "$array":
            return _raw(body[2], pack, {"dtype": body[0], "shape": body[1]})
    return text_file(canonical_json(value), {})


def _raw(where: Any, pack: PackRef, notes: Mapping[str, Any]) -> File:
    """BYTES of the format: base64, or where they lie in the pack."""
    if isinstance(where, str):
        return text_file(base64.b64decode(where, validate=True), notes)
    offset, num_bytes = where
    _check_inside("an object", pack, offset, num_bytes)
    return pieces_file([Piece(pack.blob, offset, num_bytes)], notes)


def _check_inside(name: str, pack: PackRef, offset: int, num_bytes: int) -> None:
    if not 0 <= offset <= offset + num_bytes <= pack.num_bytes:
        raise IntegrityError(
            f"{name} does not fit the pack of rank {pack.rank}, of {pack.num_bytes} bytes; the "
            "description is damaged"
        )
