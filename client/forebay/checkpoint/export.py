"""A generation's tensors as safetensors files, as Hugging Face's libraries read them.

Written block by block straight from the packs, whatever the sharding: memory is a few blocks. A
folder (or file) appears under its name when it is whole and durable, or not at all. Needs no torch.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from forebay.checkpoint.contents import Contents, TensorInfo
from forebay.checkpoint.find import find, split
from forebay.checkpoint.safetensors_format import DTYPES, INDEX_FILE, encode_header
from forebay.checkpoint.tensor_bytes import TensorReader, raw_bytes
from forebay.publish_file import publish, sync_folder
from forebay_wire.errors import AlreadyExists, InvalidRequest, NotFound
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import new_random_name

if TYPE_CHECKING:
    from forebay.client import Client

Progress = Callable[[int, int], object]

MAX_SHARD_BYTES: Final = 5 * 10**9
"""Hugging Face's own default."""
SUFFIX: Final = ".safetensors"
_PARTIAL: Final = ".partial"


@dataclass(frozen=True)
class Choice:
    """Which tensors of a generation are exported, and under which names."""

    tensors: Mapping[str, TensorInfo]
    """New name to tensor."""
    tied: Mapping[str, str]
    """Names that are left out to the one that holds the same tensor."""
    objects: Sequence[str]
    """What was chosen and is no tensor."""


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    generation: str
    files: list[Path]
    num_tensors: int
    num_bytes: int
    tied: Mapping[str, str] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    """What is no tensor, so that the format cannot hold it."""


def choose(
    contents: Contents, only: Sequence[str] = (), strip_prefix: str = "", *, tied: str = "once"
) -> Choice:
    """The tensors whose names match one of the patterns *only* (as in a shell; none: all), without
    *strip_prefix* where they begin with it.

    *tied*: ``once`` leaves out all but the first name of a tensor that has several, ``copies``
    writes each. :class:`NotFound` if nothing matches, :class:`InvalidRequest` if two names become
    one.
    """
    if tied not in ("once", "copies"):
        raise InvalidRequest(f"tied is 'once' or 'copies', not {tied!r}")
    tensors: dict[str, TensorInfo] = {}
    places: dict[object, str] = {}
    left: dict[str, str] = {}
    for name in sorted(contents.tensors):
        if not _matches(name, only):
            continue
        info, new = contents.tensors[name], name.removeprefix(strip_prefix)
        key = (info.dtype, info.shape, info.places)
        if tied == "once" and info.num_bytes and key in places:
            left[new] = places[key]
            continue
        places[key] = new
        if new in tensors:
            raise InvalidRequest(f"without {strip_prefix!r} two tensors are called {new!r}")
        if not new:
            raise InvalidRequest(f"without {strip_prefix!r} the tensor {name!r} has no name")
        tensors[new] = info
    if not tensors:
        wanted = f" that matches {', '.join(only)}" if only else ""
        raise NotFound(f"{contents.name} has no tensor{wanted}")
    objects = [name for name in contents.objects if _matches(name, only)]
    return Choice(tensors, left, objects)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def export_safetensors(
    client: Client,
    generation: str,
    output: str | os.PathLike[str],
    *,
    only: Sequence[str] = (),
    strip_prefix: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tied: str = "once",
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write *generation* (``RUN``, ``RUN@STEP``, ``RUN@ATTEMPT/STEP``, ``RUN@TAG``) as safetensors.

    *output* is a new folder: ``model.safetensors``, or several files of at most *max_shard_bytes*
    of tensors with ``model.safetensors.index.json``; or, if it ends with ``.safetensors``, a new
    file. Durable on return; a killed export leaves at most a hidden ``.NAME.….partial``. *only*,
    *strip_prefix* and *tied* as in :func:`choose`: Hugging Face's models tie by themselves what is
    left out. Objects that are no tensors are left out and named in the answer. Every byte is
    checked. *progress* is told bytes.

    :class:`AlreadyExists`, :class:`NotFound`; :class:`InvalidRequest` for dtypes that the format
    does not have; :class:`IntegrityError` for damage.
    """
    contents = find(client, *split(generation)).committed()
    choice = choose(contents, only, strip_prefix, tied=tied)
    named = [(name, info.dtype) for name, info in choice.tensors.items()]
    if unknown := [f"{name} ({dtype})" for name, dtype in named if dtype not in DTYPES]:
        raise InvalidRequest(
            f"safetensors has no dtype for {', '.join(unknown[:5])}: leave them out (only=) or "
            "export to DCP"
        )
    shards = _shards(choice.tensors, max_shard_bytes)
    path = Path(output)
    total = sum(one.num_bytes for one in choice.tensors.values())
    with TensorReader(client.transfer, contents) as reader:
        writer = _Writer(reader, choice, contents, progress, total)
        if path.suffix == SUFFIX:
            if len(shards) > 1:
                raise InvalidRequest(
                    f"{total} bytes are more than max_shard_bytes {max_shard_bytes}: name a folder"
                )
            check_new(path)
            with publish(path) as file:
                writer.write(file, shards[0])
            files = [path]
        else:
            with new_folder(path) as folder:
                names = writer.write_all(folder, shards)
            files = [path / name for name in names]
    left_out = list(choice.objects)
    return Exported(contents.name, files, len(choice.tensors), total, choice.tied, left_out)


class _Writer:
    """Writes files of one export."""

    def __init__(
        self,
        reader: TensorReader,
        choice: Choice,
        contents: Contents,
        progress: Progress,
        total: int,
    ) -> None:
        self._reader = reader
        self._choice = choice
        self._metadata = {"format": "pt", "forebay": contents.name}
        if choice.tied:
            self._metadata["tied"] = json.dumps(dict(choice.tied), sort_keys=True)
        self._progress = progress
        self._done, self._total = 0, total

    def write_all(self, folder: Path, shards: Sequence[Sequence[str]]) -> list[str]:
        """All files, durable; their names."""
        if len(shards) == 1:
            names = ["model" + SUFFIX]
        else:
            names = [
                f"model-{number:05d}-of-{len(shards):05d}{SUFFIX}"
                for number in range(1, len(shards) + 1)
            ]
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("xb") as file:
                self.write(file, shard)
                file.flush()
                os.fsync(file.fileno())
            failpoint("client.export.after_file")
        if len(shards) == 1:
            return names
        where = {one: name for name, shard in zip(names, shards, strict=True) for one in shard}
        index = {"metadata": {"total_size": self._total, **self._metadata}, "weight_map": where}
        with (folder / INDEX_FILE).open("xb") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True).encode())
            file.flush()
            os.fsync(file.fileno())
        return [*names, INDEX_FILE]

    def write(self, file: BinaryIO, names: Sequence[str]) -> None:
        """One file with the tensors *names*."""
        infos = [(name, self._choice.tensors[name]) for name in names]
        file.write(
            encode_header(
                [(name, one.dtype, one.shape, one.num_bytes) for name, one in infos], self._metadata
            )
        )
        for _, info in infos:
            for _, data in self._reader.stream(info):
                file.write(raw_bytes(data))
                self._done += data.nbytes
                self._progress(self._done, self._total)


def _shards(tensors: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    """Names by file, each in the order of its bytes: large items first, so that all lie aligned."""
    if limit <= 0:
        raise InvalidRequest(f"max_shard_bytes {limit}: at least 1")
    shards: list[list[str]] = [[]]
    held = 0
    for name, info in tensors.items():
        if shards[-1] and held + info.num_bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += info.num_bytes
    return [sorted(one, key=lambda name: (-tensors[name].item_bytes, name)) for one in shards]


def check_new(path: Path) -> None:
    """:class:`AlreadyExists` unless *path* can be made; :class:`NotFound` without its parent."""
    if path.exists():
        raise AlreadyExists(f"{path} exists: name a new one, or remove it first")
    if not path.resolve().parent.is_dir():
        raise NotFound(f"there is no folder {path.resolve().parent}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Inside, a folder to fill with durable files; at the end it is *path*, durable, or gone."""
    path = path.resolve()
    check_new(path)
    partial = path.with_name(f".{path.name}.{new_random_name()[:8]}{_PARTIAL}")
    partial.mkdir()
    try:
        yield partial
        sync_folder(partial)
        failpoint("client.export.before_rename")
        check_new(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(path.parent)
