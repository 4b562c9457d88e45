"""``forebay checkpoint cat``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forebay.cli.session import Session, with_session
from forebay_wire.errors import InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from forebay.checkpoint.contents import TensorInfo
    from forebay.checkpoint.tensor_bytes import TensorReader

Index = int | slice


@click.command("cat")
@click.argument("generation")
@click.argument("tensor")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write an .npy file instead of printing; must not exist.",
)
@with_session
def cat_tensor(session: Session, generation: str, tensor: str, output: Path | None) -> None:
    """Values of a TENSOR of GENERATION (RUN, RUN@STEP, RUN@ATTEMPT/STEP or RUN@TAG).

    TENSOR may end with a slice, as in 'model.layer.weight[0:4, :, -1]'. Only the rows that it needs
    are read. bfloat16 and float8 are printed and written as float32, which holds them exactly.
    """
    from forebay.checkpoint.find import find, split
    from forebay.checkpoint.tensor_bytes import TensorReader

    name, index = parse_slice(tensor)
    if output is not None and output.exists():
        raise InvalidRequest(f"{output} exists: name a new file")
    with session.connect() as client:
        contents = find(client, *split(generation)).committed()
        if name not in contents.tensors and tensor in contents.tensors:
            name, index = tensor, ()  # a name with brackets
        info = contents.tensor(name)
        with TensorReader(client.transfer, contents) as reader:
            values = _read(reader, info, index)
    if output is not None:
        _save(output, values)
    value = {
        "tensor": name,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "values_shape": list(values.shape),
        "values": None if output is not None else _plain(values),
        "output": str(output) if output is not None else None,
    }
    session.show(value, lambda: _print(value, values, output))


def parse_slice(text: str) -> tuple[str, tuple[Index, ...]]:
    """Name and indices of ``NAME[1, 2:8, ::2]``."""
    name, bracket, rest = text.rpartition("[")
    if not bracket or not rest.endswith("]"):
        return text, ()
    try:
        parts = [part.strip() for part in rest[:-1].split(",")]
        return name, tuple(_index(part) for part in parts)
    except ValueError:
        raise InvalidRequest(
            f"{text!r}: a slice is numbers and ranges with commas between, as in [0, 2:8, ::2]"
        ) from None


def _index(text: str) -> Index:
    if ":" not in text:
        return int(text)
    bounds = [int(part) if part.strip() else None for part in text.split(":")]
    if len(bounds) > 3:
        raise ValueError(text)
    return slice(*bounds)


def _read(reader: TensorReader, info: TensorInfo, index: tuple[Index, ...]) -> NDArray[Any]:
    """The values that are wanted; the first index says which rows are read."""
    import numpy as np

    from forebay.checkpoint.tensor_bytes import BLOCK_BYTES, blocks

    _check(info, index)
    if not info.shape:
        (block,) = blocks((), info.item_bytes)
        return _values(reader.read(info, block), info.dtype)
    first: Index = index[0] if index else slice(None)
    if isinstance(first, int):
        first %= info.shape[0]
        row: NDArray[Any] = _read(reader, info, (slice(first, first + 1), *index[1:]))[0]
        return row
    rows = range(info.shape[0])[first]
    low, high = (min(rows), max(rows) + 1) if len(rows) else (0, 0)
    row_bytes = info.num_bytes // max(1, info.shape[0])
    inner = (slice(None), *index[1:])
    nothing = np.empty((0, *info.shape[1:]), np.dtype((np.void, max(1, info.item_bytes))))
    # The rest of each block is let go at once, so that a column costs a column.
    read = (
        _values(reader.read(info, block), info.dtype)[inner].copy()
        for block in blocks(info.shape, info.item_bytes, max(BLOCK_BYTES, row_bytes), (low, high))
    )
    chosen = np.concatenate([_values(nothing, info.dtype)[inner], *read])
    return chosen[np.arange(rows.start, rows.stop, rows.step) - low]


def _check(info: TensorInfo, index: tuple[Index, ...]) -> None:
    if len(index) > len(info.shape):
        raise InvalidRequest(
            f"{info.name} has {len(info.shape)} dimensions, the slice has {len(index)}"
        )
    for number, (one, length) in enumerate(zip(index, info.shape, strict=False)):
        if isinstance(one, int) and not -length <= one < length:
            raise InvalidRequest(f"{info.name} has no {one} in dimension {number}: {length} long")
        if isinstance(one, slice) and one.step == 0:
            raise InvalidRequest("the step of a slice is not 0")


def _values(data: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Elements as numbers; each byte of two 4-bit numbers as two, in the last dimension."""
    import numpy as np

    from forebay_wire.dtypes import to_numpy

    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    found = to_numpy(raw, dtype)
    if found is None:
        raise InvalidRequest(f"values of dtype {dtype} are not known here: export the tensor")
    if found.size == data.size:
        return found.reshape(data.shape)
    return found.reshape(*data.shape[:-1], -1)


def _save(output: Path, values: NDArray[Any]) -> None:
    import numpy as np

    from forebay.publish_file import publish

    with publish(output) as file:
        np.save(file, values, allow_pickle=False)


def _plain(values: NDArray[Any]) -> Any:
    """As JSON: complex numbers as pairs, what is not finite as text."""
    import numpy as np

    if values.dtype.kind == "c":
        return _plain(np.stack([values.real, values.imag], axis=-1))
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        plain = values.astype(object)
        plain[~np.isfinite(values)] = [str(one) for one in values[~np.isfinite(values)]]
        return plain.tolist()
    return values.tolist()


def _print(value: dict[str, Any], values: NDArray[Any], output: Path | None) -> None:
    import numpy as np

    shape = "×".join(map(str, values.shape)) or "scalar"
    if output is not None:
        print(f"{value['tensor']}: {shape} written to {output}")
        return
    print(f"{value['tensor']}: {value['dtype']} {shape}")
    print(np.array2string(values, threshold=1000, precision=8))
