"""Any box of a saved part lands where it belongs, also if it is read in several pieces."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from forebay.checkpoint import read
from forebay.checkpoint.manifest import StoredTensor, TensorEntry
from forebay.checkpoint.read import PackReader
from forebay_wire.manifest import PackRef

INDEX = MetadataIndex("weight")


class Packs:
    """A transfer with one pack in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.table = SimpleNamespace(offsets=np.array([0, len(data)]))

    def will_read(self, offset: int, length: int) -> None:
        assert offset >= 0
        assert offset + length <= len(self._data)

    def open(self, blobs: Sequence[str], context: str) -> list[Any]:
        return [self for _ in blobs]

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self._data[offset : offset + target.nbytes]

    def close(self) -> None:
        pass


class Planner:
    """Has one tensor to be filled."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return self._target

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        pass


@st.composite
def boxes(draw: Any) -> tuple[list[int], list[int], list[int]]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    offsets = [draw(st.integers(0, size - 1)) for size in sizes]
    pairs = zip(sizes, offsets, strict=True)
    lengths = [draw(st.integers(1, size - offset)) for size, offset in pairs]
    return sizes, offsets, lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(box=boxes(), pack_offset=st.sampled_from([0, 64]))
def test_a_box_is_read_bit_exact(
    dtype: torch.dtype,
    box: tuple[list[int], list[int], list[int]],
    pack_offset: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So small that most boxes with gaps are read in pieces.
    monkeypatch.setattr(read, "WINDOW_BYTES", 64)
    monkeypatch.setattr(read, "MAX_SEGMENT_BYTES", 8)
    sizes, offsets, lengths = box
    part = torch.randn(sizes)
    pack = PackRef(0, "ab" * 32, pack_offset + part.nbytes, {})
    entry = TensorEntry(
        "weight", torch.float32, tuple(sizes), (0,) * len(sizes), tuple(sizes), pack_offset
    )
    item = ReadItem(
        LoadItemType.TENSOR,
        INDEX,
        torch.Size([0] * len(sizes)),
        INDEX,
        torch.Size(offsets),
        torch.Size(lengths),
    )
    saved: Any = SimpleNamespace(
        parts={INDEX: StoredTensor(entry, pack)},
        manifest=SimpleNamespace(run="r", attempt=1, step=1),
    )
    transfer: Any = Packs(b"?" * pack_offset + part.numpy().tobytes())
    target = torch.full(lengths, torch.nan, dtype=dtype)
    planner: Any = Planner(target)
    with PackReader(transfer, saved) as reader:
        reader.read([item], planner)
    wanted = part[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
    assert torch.equal(target, wanted.to(dtype))
