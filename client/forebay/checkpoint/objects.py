"""Values that are no tensors, as JSON: what is not listed here is refused by name, not pickled.

A JSON null, boolean, string, number below 2^53 or list stands for itself. So does a JSON object
whose keys are sorted and do not begin with ``$``; everything else is an object with exactly one
key, the tag. Byte values above :data:`INLINE_BYTES` leave only a reference here and lie among the
tensors of the pack. The table of tags is in ``docs/formats/generation.md``.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from forebay_wire.errors import IntegrityError, UnsupportedObject

INLINE_BYTES: Final = 1024
"""Bytes of a value that still travel inside the JSON, base64-encoded."""

EXACT_INTEGER: Final = 1 << 53
"""Integers of this size and above are written as text: other JSON readers round them."""

MAX_DEPTH: Final = 100
"""Levels of nesting; deeper ones are a cycle or a mistake."""

ARRAY_KINDS: Final = "biufcSUMm"
"""numpy kinds that are nothing but bytes: no objects, no records."""

_PLAIN_NAN: Final = struct.pack(">d", math.nan)

Json = Any
Path = tuple[str | int, ...]
TensorSink = Callable[[torch.Tensor, Path], str]
"""Takes a tensor found at a path inside an object; answers the name it is stored under."""


@dataclass
class Attachment:
    """Bytes that lie in the pack; ``reference`` is the JSON list ``[offset, num_bytes]``."""

    reference: list[int]
    data: memoryview


@dataclass
class EncodedObject:
    """One value as JSON, with the bytes that did not fit into it."""

    json: Json
    attachments: list[Attachment] = field(default_factory=list)


def encode(
    value: Any, path: Sequence[str | int], tensors: TensorSink | None = None
) -> EncodedObject:
    """*value* as JSON.

    Tensors inside go to *tensors*; without it they become attachments. Raises
    :class:`UnsupportedObject` with the path of the first value that has no safe encoding.
    """
    encoder = _Encoder(tensors)
    json = encoder.encode(value, tuple(path))
    return EncodedObject(json, encoder.attachments)


def decode(
    json: Json,
    read_bytes: Callable[[int, int], bytes],
    tensors: Mapping[str, torch.Tensor],
) -> Any:
    """The value that *json* stands for.

    *read_bytes* (offset, num_bytes) reads from the pack; *tensors* are looked up by name.
    """
    return _Decoder(read_bytes, tensors).decode(json)


def dotted(path: Sequence[str | int]) -> str:
    """A path as people write it: ``optimizer.state.0.foo``."""
    return ".".join(map(str, path))


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, in a row.

    A dimension of one element may have any stride: ``view`` alone would refuse it.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def unsupported(value: Any, path: Sequence[str | int], why: str = "") -> UnsupportedObject:
    """The error for a *value* that cannot be saved; names its path and its type."""
    reason = why or "it would need pickle, which can run code when it is read"
    return UnsupportedObject(
        f"{dotted(path)}: {type(value)} cannot be saved: {reason}; let state_dict() return "
        "numbers, strings, bytes, lists, tuples, dicts, numpy arrays and tensors"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of :func:`dtype_name`; :class:`IntegrityError` for a name torch does not know."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise IntegrityError(
            f"torch {torch.__version__} knows no dtype {name!r}; load it with the version that "
            "saved it"
        )
    return found


class _Encoder:
    def __init__(self, tensors: TensorSink | None) -> None:
        self._tensors = tensors
        self.attachments: list[Attachment] = []

    def encode(self, value: Any, path: Path) -> Json:
        if len(path) > MAX_DEPTH:
            raise unsupported(value, path[:8], f"it is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._tensor(value, path)}
        if isinstance(value, np.generic):
            self._check_kind(value.dtype, value, path)
            return {"$scalar": [value.dtype.str, _base64(value.tobytes())]}
        method = _ENCODERS.get(type(value))
        if method is None:
            raise unsupported(value, path)
        return method(self, value, path)

    def put_itself(self, value: Any, path: Path) -> Json:
        return value

    def put_integer(self, value: int, path: Path) -> Json:
        return value if abs(value) < EXACT_INTEGER else {"$int": hex(value)}

    def put_real(self, value: float, path: Path) -> Json:
        if math.isfinite(value):
            return value
        bits = struct.pack(">d", value)
        plain = value == value or bits == _PLAIN_NAN  # NaN differs from itself
        return {"$float": repr(value) if plain else f"nan:{bits.hex()}"}

    def put_complex(self, value: complex, path: Path) -> Json:
        return {"$complex": [self.put_real(value.real, path), self.put_real(value.imag, path)]}

    def put_text(self, value: str, path: Path) -> Json:
        try:
            value.encode()
        except UnicodeEncodeError:  # lone surrogates have no UTF-8
            return {"$str": _base64(value.encode("utf-8", "surrogatepass"))}
        return value

    def put_bytes(self, value: bytes, path: Path) -> Json:
        return {"$bytes": self._bytes(memoryview(value))}

    def put_bytearray(self, value: bytearray, path: Path) -> Json:
        return {"$bytearray": self._bytes(memoryview(bytes(value)))}

    def put_list(self, value: Sequence[Any], path: Path) -> Json:
        return [self.encode(item, (*path, index)) for index, item in enumerate(value)]

    def put_tuple(self, value: Sequence[Any], path: Path) -> Json:
        return {"$tuple": self.put_list(value, path)}

    def put_size(self, value: torch.Size, path: Path) -> Json:
        return {"$size": list(value)}

    def put_set(self, value: set[Any], path: Path) -> Json:
        tag = "$set" if type(value) is set else "$frozenset"
        return {tag: sorted((self.encode(item, path) for item in value), key=repr)}

    def put_dict(self, value: Mapping[Any, Any], path: Path) -> Json:
        keys = list(value)
        plain = all(type(key) is str and not key.startswith("$") for key in keys)
        if type(value) is dict and plain and keys == sorted(keys):
            return {self._key(key, path): self.encode(value[key], (*path, key)) for key in keys}
        tag = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}[type(value)]
        return {
            tag: [
                [self.encode(key, path), self.encode(item, (*path, str(key)))]
                for key, item in value.items()
            ]
        }

    def put_array(self, value: np.ndarray[Any, Any], path: Path) -> Json:
        self._check_kind(value.dtype, value, path)
        data = np.ascontiguousarray(value)
        raw = data.reshape(-1).view(np.uint8).data if data.size else memoryview(b"")
        return {"$array": [value.dtype.str, list(value.shape), self._bytes(raw)]}

    def put_dtype(self, value: torch.dtype, path: Path) -> Json:
        return {"$dtype": dtype_name(value)}

    def put_device(self, value: torch.device, path: Path) -> Json:
        return {"$device": str(value)}

    def _key(self, key: str, path: Path) -> str:
        if not isinstance(self.put_text(key, path), str):
            raise unsupported(key, path, "a key is not valid Unicode")
        return key

    def _tensor(self, value: torch.Tensor, path: Path) -> Json:
        if self._tensors is not None:
            return self._tensors(value, path)
        flat = value.detach().cpu().contiguous()
        raw = byte_view(flat).numpy() if flat.numel() else np.empty(0, np.uint8)
        return [dtype_name(value.dtype), list(value.shape), self._bytes(raw.data)]

    def _bytes(self, data: memoryview) -> Json:
        if data.nbytes <= INLINE_BYTES:
            return _base64(data)
        attachment = Attachment([0, data.nbytes], data)
        self.attachments.append(attachment)
        return attachment.reference

    def _check_kind(self, dtype: np.dtype[Any], value: Any, path: Path) -> None:
        if dtype.kind not in ARRAY_KINDS:
            raise unsupported(value, path, f"arrays of dtype {dtype} hold objects or records")


_ENCODERS: Final[dict[type, Callable[[_Encoder, Any, Path], Json]]] = {
    type(None): _Encoder.put_itself,
    bool: _Encoder.put_itself,
    int: _Encoder.put_integer,
    float: _Encoder.put_real,
    complex: _Encoder.put_complex,
    str: _Encoder.put_text,
    bytes: _Encoder.put_bytes,
    bytearray: _Encoder.put_bytearray,
    list: _Encoder.put_list,
    tuple: _Encoder.put_tuple,
    dict: _Encoder.put_dict,
    OrderedDict: _Encoder.put_dict,
    Counter: _Encoder.put_dict,
    set: _Encoder.put_set,
    frozenset: _Encoder.put_set,
    np.ndarray: _Encoder.put_array,
    torch.Size: _Encoder.put_size,
    torch.dtype: _Encoder.put_dtype,
    torch.device: _Encoder.put_device,
}
"""Exact types only: a subclass may carry more than its base shows."""


class _Decoder:
    def __init__(
        self, read_bytes: Callable[[int, int], bytes], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self._read_bytes = read_bytes
        self._tensors = tensors

    def decode(self, json: Json) -> Any:
        if isinstance(json, list):
            return [self.decode(item) for item in json]
        if not isinstance(json, dict):
            return json
        tag = next(iter(json), "")
        if not tag.startswith("$"):
            return {key: self.decode(item) for key, item in json.items()}
        method = _DECODERS.get(tag)
        if method is None or len(json) != 1:
            raise IntegrityError(f"a saved object carries the unknown tag {tag!r}; upgrade Forebay")
        return method(self, json[tag])

    def pairs(self, value: Json) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(item)) for key, item in value]

    def raw(self, value: Json) -> bytes:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
        offset, num_bytes = value
        return self._read_bytes(offset, num_bytes)

    def scalar(self, value: Json) -> Any:
        dtype, data = value
        return np.frombuffer(self.raw(data), dtype=_numpy_dtype(dtype))[0]

    def array(self, value: Json) -> Any:
        dtype, shape, data = value
        return np.frombuffer(self.raw(data), dtype=_numpy_dtype(dtype)).reshape(shape).copy()

    def tensor(self, value: Json) -> torch.Tensor:
        if isinstance(value, str):
            return self._tensors[value]
        dtype, shape, data = value
        raw = self.raw(data)
        if not raw:
            return torch.empty(shape, dtype=dtype_of(dtype))
        return torch.frombuffer(bytearray(raw), dtype=dtype_of(dtype)).reshape(shape)


_DECODERS: Final[dict[str, Callable[[_Decoder, Json], Any]]] = {
    "$int": lambda _, value: int(value, 16),
    "$float": lambda _, value: _float(value),
    "$complex": lambda decoder, value: complex(*decoder.decode(value)),
    "$str": lambda decoder, value: decoder.raw(value).decode("utf-8", "surrogatepass"),
    "$bytes": _Decoder.raw,
    "$bytearray": lambda decoder, value: bytearray(decoder.raw(value)),
    "$tuple": lambda decoder, value: tuple(decoder.decode(value)),
    "$size": lambda _, value: torch.Size(value),
    "$set": lambda decoder, value: set(decoder.decode(value)),
    "$frozenset": lambda decoder, value: frozenset(decoder.decode(value)),
    "$dict": lambda decoder, value: dict(decoder.pairs(value)),
    "$ordered": lambda decoder, value: OrderedDict(decoder.pairs(value)),
    "$counter": lambda decoder, value: Counter(dict(decoder.pairs(value))),
    "$scalar": _Decoder.scalar,
    "$array": _Decoder.array,
    "$tensor": _Decoder.tensor,
    "$dtype": lambda _, value: dtype_of(value),
    "$device": lambda _, value: torch.device(value),
}


def _float(text: str) -> float:
    kind, _, bits = text.partition(":")
    if not bits:
        return float(kind)
    value: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return value


def _numpy_dtype(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if dtype.kind not in ARRAY_KINDS:
        raise IntegrityError(f"a saved array has the dtype {text!r}, which Forebay never writes")
    return dtype


def _base64(data: bytes | memoryview) -> str:
    return base64.b64encode(data).decode()
