"""The schema of samples: what a column may hold, and how it lies in Arrow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa

from forebay_wire.errors import InvalidRequest, SchemaMismatch
from forebay_wire.lazy import lazy

METADATA_KEY: Final = b"forebay.schema"
"""Schema metadata: JSON, column name to type as the user gave it."""

Kind = Literal["scalar", "array", "string", "binary", "list", "arrow", "bounds"]
"""The last one is never of a schema: where in memory the lists of a column lie (see ``lists``)."""

SCALARS: Final = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
"""Element types of numbers and arrays."""

ADVICE: Final = (
    f"use forebay.Array(dtype, shape), {', '.join(SCALARS)}, string, binary, image, "
    "list[NUMBER] or a pyarrow.DataType"
)


@dataclass(frozen=True)
class Array:
    """A column of arrays (or tensors) of one element type and one shape.

    ``shape`` is that of one sample, without the batch dimension.
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _scalar_name(self.dtype))
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if min(self.shape, default=1) < 1:
            raise InvalidRequest(
                f"forebay.Array of shape {self.shape}: every dimension is at least 1; for samples "
                'of different lengths use "list[NUMBER]"'
            )

    def __str__(self) -> str:
        return f"{self.dtype} array of shape {self.shape}"


@dataclass(frozen=True)
class Column:
    """One column: how it is called, what it holds, how it lies in Arrow."""

    name: str
    kind: Kind
    text: str
    """The type in words, as errors and listings show it."""
    arrow_type: pa.DataType
    dtype: np.dtype[Any] | None = None
    """Element type of numbers, arrays and lists."""
    shape: tuple[int, ...] = ()
    nullable: bool = False

    @lazy
    def field(self) -> pa.Field:
        return pa.field(self.name, self.arrow_type, nullable=self.nullable)

    @lazy
    def fixed_bytes(self) -> int:
        """Bytes of one sample's value; 0 where they vary."""
        if self.kind not in ("scalar", "array", "bounds") or self.dtype is None:
            return 0
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def spec(self) -> Any:
        """What stands for this column in the schema metadata (JSON)."""
        if self.kind == "array":
            return {"array": str(self.dtype), "shape": list(self.shape)}
        return self.text


@dataclass(frozen=True)
class Schema:
    """The columns of a dataset, in order."""

    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise InvalidRequest(f"no column {name!r}; the dataset has {', '.join(self.names)}")

    def of_kind(self, kind: Kind) -> frozenset[str]:
        """The names of the columns of one kind."""
        return frozenset(column.name for column in self.columns if column.kind == kind)

    def __str__(self) -> str:
        return ", ".join(f"{column.name}: {column.text}" for column in self.columns)

    @lazy
    def arrow(self) -> pa.Schema:
        """The Arrow schema, with the sample schema as metadata."""
        specs = {column.name: column.spec() for column in self.columns}
        text = json.dumps(specs, separators=(",", ":"))
        return pa.schema(
            [column.field for column in self.columns], metadata={METADATA_KEY: text.encode()}
        )

    def accepts(self, other: Schema) -> bool:
        """Whether samples of *other* may be appended to a dataset of this schema."""
        return {c.name: c.spec() for c in self.columns} == {c.name: c.spec() for c in other.columns}

    @classmethod
    def of(cls, given: Mapping[str, Any] | pa.Schema | Schema) -> Schema:
        """The schema that a user wrote: name to type, an Arrow schema, or one of ours."""
        if isinstance(given, Schema):
            return given
        if isinstance(given, pa.Schema):
            return cls.from_arrow(given)
        return cls(_checked([_column(name, spec) for name, spec in given.items()]))

    @classmethod
    def from_arrow(cls, schema: pa.Schema) -> Schema:
        """The schema of an Arrow table or shard; our own metadata wins over the bare types."""
        specs = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
        return cls(_checked([_arrow_column(field, specs.get(field.name)) for field in schema]))

    @classmethod
    def infer(cls, sample: Mapping[str, Any]) -> Schema:
        """The schema that fits the first sample."""
        return cls(_checked([_column(name, infer(name, value)) for name, value in sample.items()]))


def infer(name: str, value: Any) -> Any:
    """The type that fits one *value*: numbers, numpy and torch arrays, text, bytes, flat lists."""
    value = as_numpy(value)
    if isinstance(value, (bool, np.bool_)):
        return "bool"
    if isinstance(value, int):
        return "int64"
    if isinstance(value, float) and not isinstance(value, np.floating):
        return "float64"
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.name in SCALARS:
        return Array(value.dtype.name, value.shape) if value.ndim else value.dtype.name
    if isinstance(value, str):
        return "string"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "binary"
    if isinstance(value, list) and value:
        inner = infer(name, value[0])
        if isinstance(inner, str) and inner in SCALARS:
            return f"list[{inner}]"
    raise SchemaMismatch(
        f"column {name!r}: no type can be inferred from {describe(value)}; give schema=: {ADVICE}"
    )


def as_numpy(value: Any) -> Any:
    """*value*, a torch tensor as the numpy array that shares its memory (torch is not imported)."""
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        try:
            return value.detach().cpu().numpy()
        except TypeError as error:  # bfloat16 and other types that numpy does not have
            raise SchemaMismatch(
                f"a tensor of {value.dtype} has no numpy type: store .view(torch.uint8) or float32"
            ) from error
    return value


def describe(value: Any) -> str:
    """*value* in a few words, for an error message."""
    value = as_numpy(value)
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _checked(columns: list[Column]) -> tuple[Column, ...]:
    names = [column.name for column in columns]
    if not columns:
        raise InvalidRequest("a schema needs at least one column")
    for name in names:
        if not isinstance(name, str) or not name or name.startswith("_"):
            raise InvalidRequest(
                f"column name {name!r} is not allowed: not empty, and not starting with '_' "
                "(those names are the loader's own, like _ids and _mask)"
            )
    if len(set(names)) != len(names):
        raise InvalidRequest(f"column names repeat: {', '.join(sorted(names))}")
    return tuple(columns)


def _scalar_name(dtype: Any) -> str:
    text = str(dtype).removeprefix("torch.")
    try:
        name = text if text in SCALARS or dtype is None else np.dtype(dtype).name
    except (TypeError, ValueError):
        name = text
    if name not in SCALARS:
        raise InvalidRequest(f"element type {text!r} is unknown: use {', '.join(SCALARS)}")
    return name


def _column(name: str, spec: Any) -> Column:
    """The column of a type as the user gave it, or as it stands in the metadata."""
    if isinstance(spec, Mapping) and set(spec) == {"array", "shape"}:
        spec = Array(spec["array"], tuple(spec["shape"]))
    if isinstance(spec, Array):
        return _array_column(name, spec)
    if isinstance(spec, pa.DataType):
        return _arrow_column(pa.field(name, spec), None)
    if not isinstance(spec, str):
        try:
            spec = _scalar_name(spec)
        except InvalidRequest as error:
            raise InvalidRequest(f"column {name!r}: unknown type {spec!r}; {ADVICE}") from error
    if spec in SCALARS:
        return Column(name, "scalar", spec, _element(spec), np.dtype(spec))
    if spec == "string":
        return Column(name, "string", spec, pa.string())
    if spec in ("binary", "image"):
        return Column(name, "binary", spec, pa.binary())
    if spec.startswith("list[") and spec.endswith("]") and spec[5:-1] in SCALARS:
        return Column(name, "list", spec, pa.list_(_element(spec[5:-1])), np.dtype(spec[5:-1]))
    raise InvalidRequest(f"column {name!r}: unknown type {spec!r}; {ADVICE}")


def _array_column(name: str, spec: Array) -> Column:
    if not spec.shape:
        return _column(name, spec.dtype)
    arrow_type = pa.fixed_shape_tensor(_element(spec.dtype), spec.shape)
    return Column(name, "array", str(spec), arrow_type, np.dtype(spec.dtype), spec.shape)


def _arrow_column(field: pa.Field, spec: Any) -> Column:
    """The column of an Arrow field; *spec* is what our metadata says of it, if anything."""
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if spec is not None and not (isinstance(spec, str) and spec.startswith("arrow:")):
        column = _column(field.name, spec)
    elif isinstance(kind, pa.FixedShapeTensorType):
        column = _array_column(field.name, Array(_element_name(kind.value_type), tuple(kind.shape)))
    elif pa.types.is_fixed_size_list(kind) and _is_scalar(kind.value_type):
        column = _array_column(field.name, Array(_element_name(kind.value_type), (kind.list_size,)))
    elif _is_scalar(kind):
        return _column(field.name, _element_name(kind))
    elif _is_any(kind, "string", "large_string", "string_view"):
        column = _column(field.name, "string")
    elif _is_any(kind, "binary", "large_binary", "binary_view", "fixed_size_binary"):
        column = _column(field.name, "binary")
    elif _is_any(kind, "list", "large_list") and _is_scalar(kind.value_type):
        column = _column(field.name, f"list[{_element_name(kind.value_type)}]")
    else:
        column = Column(field.name, "arrow", f"arrow:{kind}", kind)
    nullable = field.nullable and column.kind not in ("scalar", "array")
    return Column(**{**_fields(column), "nullable": nullable})


def _fields(column: Column) -> dict[str, Any]:
    return {name: getattr(column, name) for name in Column.__dataclass_fields__}


def _is_any(kind: pa.DataType, *names: str) -> bool:
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


def _is_scalar(kind: pa.DataType) -> bool:
    return _is_any(kind, "boolean", "integer", "floating")


def _element(name: str) -> pa.DataType:
    return pa.bool_() if name == "bool" else pa.from_numpy_dtype(np.dtype(name))


def _element_name(kind: pa.DataType) -> str:
    return str(np.dtype(kind.to_pandas_dtype()).name)
