"""Foreign checkpoints as generations of a run: torch's DCP folders, torch.save files, safetensors.

Names are kept. Nothing is unpickled that could run code: classes beyond torch's own are refused by
name.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from forebay.checkpoint.dcp_folder import alone
from forebay.checkpoint.flatten import FlatState, flatten
from forebay.checkpoint.objects import EncodedObject, dtype_of
from forebay.checkpoint.safetensors_format import INDEX_FILE, Entry, read_header
from forebay.checkpoint.service import CheckpointService, PackTerms, to_json
from forebay.checkpoint.snapshot import Pack, Part, build_pack
from forebay.checkpoint.upload import PackUpload
from forebay.waiting import Deadline
from forebay_wire.errors import (
    IntegrityError,
    InvalidRequest,
    NotFound,
    UnsupportedObject,
)
from forebay_wire.ids import GenerationId, check_name

if TYPE_CHECKING:
    from forebay.client import Client

Progress = Callable[[int, int], object]
TIMEOUT_SECONDS: Final = 3600.0
DCP_FILE: Final = ".metadata"
FORMATS: Final = (
    "what is imported is a folder of torch.distributed.checkpoint, a folder or file of safetensors "
    "(NAME.safetensors), or a file of torch.save"
)


@dataclass(frozen=True)
class Imported:
    """What an import has made."""

    generation: GenerationId
    num_tensors: int
    num_objects: int
    num_bytes: int
    """Of the pack: tied tensors are stored once."""


def import_checkpoint(
    client: Client,
    run: str,
    path: str | os.PathLike[str],
    *,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    add_prefix: str = "",
    timeout: float = TIMEOUT_SECONDS,
    progress: Progress = lambda done, total: None,
) -> Imported:
    """Save what *path* holds as a generation of *run*, in an attempt of its own on the newest one.

    *path*: a DCP folder (with ``.metadata``), a folder of safetensors (with an index, or all files
    in it), a ``.safetensors`` file, or a file of ``torch.save``. Durable (``local``) on return, and
    visible as a whole or not at all. safetensors and torch.save files are mapped; a DCP folder is
    read into memory first. *add_prefix* comes before every name: with ``"model."`` a plain
    ``model.state_dict()`` becomes what ``Checkpointer(model=…)`` restores. *progress* is told bytes
    copied.

    :class:`UnsupportedObject` names what cannot be represented, :class:`IntegrityError` a file that
    is cut or no checkpoint, :class:`NotFound`.
    """
    check_name("run", run)
    flat = prefixed(read_foreign(Path(path)), add_prefix)
    return _save(client, run, step, flat, metrics or {}, Deadline(timeout), progress)


def prefixed(flat: FlatState, prefix: str) -> FlatState:
    """*flat* with *prefix* before each name; up to each of its dots it is a level of its own."""
    *levels, start = prefix.split(".")
    if "" in levels:
        raise InvalidRequest(f"add_prefix={prefix!r} has an empty part: use one such as 'model.'")

    def moved(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
        return (*levels, f"{start}{path[0]}" if start else path[0], *path[1:])

    return FlatState(
        {f"{prefix}{name}": item for name, item in flat.items.items()},
        {f"{prefix}{name}": moved(path) for name, path in flat.paths.items()},
        {moved(path): wrapper for path, wrapper in flat.wrappers.items()},
    )


def read_foreign(path: Path) -> FlatState:
    """What *path* holds, under its own names."""
    if not path.exists():
        raise NotFound(f"there is no file or folder {path}")
    if path.is_dir():
        if (path / DCP_FILE).is_file():
            return read_dcp(path)
        if (path / INDEX_FILE).is_file() or list(path.glob("*.safetensors")):
            return read_safetensors(path)
        raise InvalidRequest(
            f"{path} is no checkpoint that is known here: neither {DCP_FILE} nor *.safetensors "
            f"lies in it; {FORMATS}"
        )
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


# ----------------------------------------------------------------------------------- safetensors


def read_safetensors(path: Path) -> FlatState:
    """The tensors of a file, or of a folder's files (those of its index, if there is one), mapped;
    names that an export by Forebay left out as tied are back."""
    flat = FlatState()
    tied: dict[str, str] = {}
    for file in _files(path):
        entries, metadata = read_header(file)
        mapped = np.memmap(file, np.uint8, mode="c") if entries else None
        for entry in entries:
            if entry.name in flat.items:
                raise IntegrityError(f"two files of {path} have a tensor {entry.name}")
            flat.items[entry.name] = _mapped(mapped, entry)
            flat.paths[entry.name] = (entry.name,)
        tied.update(_tied(metadata, file))
    for name, holder in tied.items():
        if name not in flat.items and holder in flat.items:
            flat.items[name] = flat.items[holder]
            flat.paths[name] = (name,)
    return flat


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / INDEX_FILE
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise IntegrityError(f"{index} is no index of safetensors: {error!r}") from error
    for name in names:
        if Path(name).name != name:
            raise IntegrityError(f"{index} names {name!r}, which does not lie beside it")
        if not (path / name).is_file():
            raise NotFound(f"{index} names {name}, which is missing: the checkpoint is incomplete")
    return [path / name for name in names]


def _mapped(mapped: Any, entry: Entry) -> torch.Tensor:
    dtype = dtype_of(entry.dtype)
    if not entry.num_bytes:
        return torch.empty(entry.shape, dtype=dtype)
    raw = torch.from_numpy(mapped[entry.start : entry.start + entry.num_bytes])
    if entry.start % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(entry.shape)


def _tied(metadata: Mapping[str, str], file: Path) -> dict[str, str]:
    if "forebay" not in metadata or "tied" not in metadata:
        return {}
    try:
        return {str(name): str(holder) for name, holder in json.loads(metadata["tied"]).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise IntegrityError(f"the metadata of {file} is damaged: {error!r}") from error


# ------------------------------------------------------------------------------------ torch.save


def read_torch(path: Path) -> FlatState:
    """What ``torch.save`` wrote, without running code of it."""
    try:
        found = torch.load(path, map_location="cpu", mmap=_is_zip(path), weights_only=True)
    except pickle.UnpicklingError as error:
        if (name := _refused(error)) is not None:
            raise UnsupportedObject(
                f"{path} holds {name}, which only running its code could read: save state_dict()s "
                "alone"
            ) from error
        raise IntegrityError(f"{path} is no file of torch.save ({error}); {FORMATS}") from error
    except Exception as error:  # what is junk makes the unpickler fail in any way
        raise IntegrityError(
            f"{path} is no file of torch.save, or cut short ({error!r}); {FORMATS}"
        ) from error
    return flatten(found if isinstance(found, dict) else {"value": found})


def _refused(error: pickle.UnpicklingError) -> str | None:
    """What torch refused to run, by name; None if that is not what failed."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is not None:
        return found[1]
    return "an object" if "Unsupported" in str(error) else None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


# ------------------------------------------------------------------------------------------- DCP


def read_dcp(path: Path) -> FlatState:
    """What torch's FileSystemWriter wrote, read into memory."""
    reader = _SafeReader(path)
    metadata = reader.read_metadata()
    state: dict[str, Any] = {}
    for name, item in metadata.state_dict_metadata.items():
        if isinstance(item, TensorStorageMetadata):
            state[name] = torch.empty(item.size, dtype=item.properties.dtype)
        elif isinstance(item, BytesStorageMetadata):
            state[name] = _NOT_READ
    planner = _SafePlanner()
    try:
        with alone():
            load(state, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise _cause(error, path) from error
    # Torch takes lists apart; ours stay what they were.
    places = metadata.planner_data
    is_known = isinstance(places, dict) and places.keys() >= state.keys()
    return flatten(unflatten_state_dict(state, places) if is_known else state)


_NOT_READ: Final = "not read"


def _cause(error: Any, path: Path) -> Exception:
    for _, failure in sorted(error.failures.items()):
        found = failure[0] if isinstance(failure, tuple) else failure
        if isinstance(found, UnsupportedObject | IntegrityError | NotFound):
            return found
    return IntegrityError(f"{path} cannot be read: {error}")


class _SafePlanner(DefaultLoadPlanner):
    """Reads objects as ``weights_only``."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.state_dict[name] = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if (refused := _refused(error)) is None:
                raise IntegrityError(f"{name} is damaged: {error}") from error
            raise UnsupportedObject(
                f"{name} holds {refused}, which only running its code could read"
            ) from error


class _SafeReader(FileSystemReader):
    """Reads ``.metadata``, a pickle, as nothing but torch's own descriptions."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / DCP_FILE
        try:
            with file.open("rb") as stream:
                found = _SafeUnpickler(stream).load()
        except UnsupportedObject:
            raise
        except (EOFError, AttributeError, IndexError, ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{file} is damaged or cut short: {error!r}") from error
        except pickle.UnpicklingError as error:
            raise IntegrityError(f"{file} is damaged, or not of torch: {error}") from error
        if not isinstance(found, Metadata):
            raise IntegrityError(f"{file} holds a {type(found).__name__} and no Metadata")
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = StorageMeta()
        return found


_SAFE_MODULES: Final = frozenset({"torch.distributed.checkpoint.metadata"})
_SAFE_NAMES: Final = frozenset(
    {
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("builtins", "frozenset"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
    }
)


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _SAFE_MODULES:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if (module, name) in _SAFE_NAMES:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _unsafe(f"{module}.{name}")


def _member(kind: Any, name: str) -> Enum:
    """Of an enumeration of torch's descriptions: so Python before 3.11.4 writes one down."""
    is_enum = isinstance(kind, type) and issubclass(kind, Enum)
    if is_enum and kind.__module__ in _SAFE_MODULES and name in kind.__members__:
        return kind[name]
    raise _unsafe(f"{name} of {kind!r}")


def _unsafe(what: str) -> UnsupportedObject:
    return UnsupportedObject(
        f"{DCP_FILE} names {what}, which is nothing of torch's own descriptions: it is not "
        "unpickled, as that could run code"
    )


# ----------------------------------------------------------------------------------------- saving


@dataclass(frozen=True)
class _ToldPack(Pack):
    """A pack that tells how much of it was copied."""

    progress: Progress = lambda done, total: None

    def copy_into(self, target: memoryview, start: int, stop: int) -> None:
        super().copy_into(target, start, stop)
        self.progress(stop, self.num_bytes)


def _save(
    client: Client,
    run: str,
    step: int,
    flat: FlatState,
    metrics: Mapping[str, float],
    deadline: Deadline,
    progress: Progress,
) -> Imported:
    tensors = flat.tensors()
    if not flat.items:
        raise InvalidRequest("there is nothing in it to import")
    objects = {k: item for k, item in flat.items.items() if isinstance(item, EncodedObject)}
    parts = [
        Part(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach())
        for name, tensor in tensors.items()
    ]
    built = build_pack(parts, objects, flat.paths)
    pack = _ToldPack(built.layout, built.sources, built.description, progress)
    service = CheckpointService(client, run)
    try:
        newest = service.resolve("latest", "local", (), deadline.remaining)
        parent: GenerationId | None = GenerationId(newest.run, newest.attempt, newest.step)
    except NotFound:
        parent = None
    attempt = service.begin_attempt(parent, 1)
    generation = GenerationId(run, attempt, step)
    upload = PackUpload(service, PackTerms(generation, 0, 1, to_json(dict(metrics))), pack)
    try:
        upload.copy(deadline)
        upload.seal()
    except BaseException:
        upload.abort()
        raise
    try:
        service.wait(generation, "local", deadline.remaining)
    finally:
        upload.close()
    return Imported(generation, len(tensors), len(objects), built.num_bytes)
