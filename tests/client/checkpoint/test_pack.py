"""A pack's bytes and its description, without a daemon: built, copied, described, read back."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from forebay.checkpoint.flatten import flatten, nest
from forebay.checkpoint.layout import pieces
from forebay.checkpoint.manifest import Description, SavedState, TensorEntry
from forebay.checkpoint.objects import encode
from forebay.checkpoint.read import spans
from forebay.checkpoint.snapshot import Pack, PackTemplate, Part, build_pack
from forebay_wire.errors import IntegrityError, UnsupportedObject
from forebay_wire.manifest import GenerationManifest, PackRef, canonical_json

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def part(name: str, tensor: torch.Tensor) -> Part:
    return Part(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)


def copied(pack: Pack, capacity: int | None = None) -> bytes:
    """The pack's bytes, through slots of dirty memory."""
    found = b""
    for piece in pieces(pack.layout.cuts, capacity or max(pack.num_bytes, 1)):
        slot = bytearray(b"\xaa" * piece.num_bytes)
        pack.copy_into(memoryview(slot), piece.start, piece.stop)
        found += slot
    return found


def entries(pack: Pack) -> dict[str, TensorEntry]:
    ref = PackRef(0, "0" * 64, pack.num_bytes, json.loads(pack.description))
    return {entry.name: entry for entry in Description.decode(ref).tensors}


def stored_bytes(pack: Pack, data: bytes, name: str) -> bytes:
    entry = entries(pack)[name]
    return data[entry.pack_offset : entry.pack_offset + entry.num_bytes]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_stride_is_copied_exactly(dtype: torch.dtype) -> None:
    base = random_tensor(dtype, 6, 10)
    tensors = {
        "plain": base,
        "transposed": random_tensor(dtype, 4, 5).t(),
        "strided": base[::2, 1::3],
        "scalar": random_tensor(dtype, 1)[0],
        "empty": random_tensor(dtype, 0, 3),
        "expanded": random_tensor(dtype, 1, 3).expand(4, 3),
    }
    if dtype.is_complex:
        tensors["conjugate"] = random_tensor(dtype, 3, 4).conj()
    pack = build_pack([part(name, tensor) for name, tensor in tensors.items()], {}, {})
    data = copied(pack)
    for name, tensor in tensors.items():
        assert stored_bytes(pack, data, name) == raw_bytes(tensor), name
        assert entries(pack)[name].dtype == dtype


def test_padding_is_zero_whatever_the_slot_held() -> None:
    pack = build_pack([part("a", torch.ones(3)), part("b", torch.ones(5))], {}, {})
    data = copied(pack)
    assert data.count(0xAA) == 0
    assert data[12:64] == bytes(52)
    assert len(data) == pack.num_bytes == 128


def test_piecewise_copy_gives_the_same_bytes() -> None:
    tensors = [
        part("large", torch.randn(3 << 20)),
        part("bent", torch.randn(1500, 2000).t()),
        *[part(f"small{n}", torch.randn(1000 + n)) for n in range(300)],
    ]
    pack = build_pack(tensors, {"o": encode(b"y" * 5000, ("o",))}, {})
    assert copied(pack, capacity=5 << 20) == copied(pack)


def test_tied_weights_are_stored_once() -> None:
    weight = torch.randn(1000)
    pack = build_pack([part("head", weight), part("embedding", weight)], {}, {})
    assert pack.num_bytes == 4032
    found = entries(pack)
    assert found["head"].pack_offset == found["embedding"].pack_offset


def test_views_that_overlap_are_stored_as_the_bytes_of_both() -> None:
    base = torch.randn(1000)
    tensors = {
        "all": base[:600].view(20, 30),
        "end": base[500:900],
        "bits": base[890:900].view(torch.int32),
        "apart": base[900:],
        "strided": base[:600:2],
    }
    pack = build_pack([part(name, tensor) for name, tensor in tensors.items()], {}, {})
    data, found = copied(pack), entries(pack)
    for name, tensor in tensors.items():
        assert stored_bytes(pack, data, name) == raw_bytes(tensor), name
    assert found["end"].pack_offset - found["all"].pack_offset == 2000
    assert found["bits"].pack_offset - found["all"].pack_offset == 3560
    assert pack.num_bytes == 3648 + 448 + 1216  # [0, 900), [900, 1000), and every second one


def test_a_template_describes_other_values_alike() -> None:
    first = {"o": encode({"a": 1, "long": b"y" * 2000}, ("o",)), "p": encode(0, ("p",))}
    tensors = [torch.ones(30), torch.ones(20)]
    names = ('"objects":{}', "b")
    parts = [part(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
    template = PackTemplate(parts, {"o": ("o",), "p": ("p", 3)})
    assert template.pack(tensors, first).num_bytes == 2304
    for size, num_layouts in ((2000, 1), (2001, 2), (3000, 3), (3000, 3)):
        objects = {"o": encode({"long": b"x" * size}, ("o",)), "p": encode("é", ("p",))}
        pack = template.pack([torch.zeros(30), torch.arange(20.0)], objects)
        assert template.num_layouts == num_layouts
        body = Description.decode(
            PackRef(0, "0" * 64, pack.num_bytes, json.loads(pack.description))
        )
        assert body.encode() == pack.description
        assert stored_bytes(pack, copied(pack), "b") == raw_bytes(torch.arange(20.0))


def manifest_of(*packs: Pack) -> GenerationManifest:
    refs = tuple(
        PackRef(rank, f"{rank:064x}", pack.num_bytes, json.loads(pack.description))
        for rank, pack in enumerate(packs)
    )
    return GenerationManifest("run", 1, 5, None, len(refs), {}, None, refs, 0.0)


def test_shards_of_two_ranks_become_one_tensor_for_the_planner() -> None:
    whole = torch.arange(20.0).reshape(5, 4)
    first = build_pack([Part("w", (5, 4), (0, 0), whole[:3])], {}, {"w": ("m", "w")})
    second = build_pack([Part("w", (5, 4), (3, 0), whole[3:])], {}, {})
    saved = SavedState.of(manifest_of(first, second))
    metadata = saved.metadata.state_dict_metadata["w"]
    assert metadata.size == torch.Size([5, 4])
    assert [chunk.offsets for chunk in metadata.chunks] == [torch.Size([0, 0]), torch.Size([3, 0])]
    assert saved.parts[MetadataIndex("w", [3, 0])].pack.rank == 1
    assert saved.structure == {"w": ("m", "w")}


def test_a_missing_shard_is_an_integrity_error() -> None:
    pack = build_pack([Part("w", (5, 4), (0, 0), torch.ones(3, 4))], {}, {})
    with pytest.raises(IntegrityError, match="w has 20 elements and the packs hold 12"):
        SavedState.of(manifest_of(pack))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(format=2),
        lambda body: body["tensors"][0].update(at=[0, 10**9]),
        lambda body: body["tensors"][0].update(at=[-64, 48]),
        lambda body: body["tensors"][0].update(dtype="float99"),
        lambda body: body["tensors"][0].pop("shape"),
        lambda body: body.pop("objects"),
    ],
)
def test_a_damaged_description_is_an_integrity_error(change: Any) -> None:
    pack = build_pack([part("w", torch.ones(12))], {}, {})
    body = json.loads(pack.description)
    change(body)
    with pytest.raises(IntegrityError):
        Description.decode(PackRef(0, "0" * 64, pack.num_bytes, body))


def test_description_survives_canonical_json() -> None:
    objects = {"o": encode({"z": 1.0, "a": (2, float("nan"))}, ("o",))}
    pack = build_pack([part("w", torch.ones(12))], objects, {"w": ("w",), "o": ("o", 3)})
    body = json.loads(canonical_json(json.loads(pack.description)))
    found = Description.decode(PackRef(0, "0" * 64, pack.num_bytes, body))
    assert found.structure == {"w": ("w",), "o": ("o", 3)}
    assert found.objects["o"] == objects["o"].json


# ------------------------------------------------------------------------------------- flattening


def test_nested_state_comes_apart_and_together() -> None:
    state = {
        "m": {"a.b": torch.ones(1), "a": {"b": torch.zeros(2)}},
        "o": {"state": {0: {"step": 3}, "0": {"step": 4}}, "empty": {}},
    }
    flat = flatten(state)
    assert set(flat.items) == {"m.a.b", "m.a.b~2", "o.state.0.step", "o.state.0.step~2", "o.empty"}
    back = nest((path, flat.items[name]) for name, path in flat.paths.items())
    assert back["m"]["a"]["b"] is state["m"]["a"]["b"]
    assert back["o"]["state"][0]["step"].json == 3
    assert back["o"]["state"]["0"]["step"].json == 4


def test_tensors_inside_lists_are_items_without_a_place() -> None:
    flat = flatten({"o": {"groups": [{"lr": torch.tensor(0.1)}]}})
    assert set(flat.items) == {"o.groups", "o.groups.0.lr"}
    assert flat.paths == {"o.groups": ("o", "groups")}


class Hollow(torch.Tensor):
    """A wrapper subclass with a storage of nothing."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Hollow":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None


class Labelled(torch.Tensor):
    """A subclass whose label would be lost."""


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Hollow(torch.ones(3)),
        lambda: torch.ones(3).as_subclass(Labelled),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.nn.parameter.UninitializedParameter(),
    ],
    ids=["wrapper", "subclass", "meta", "sparse", "quantized", "uninitialised"],
)
def test_tensors_that_are_not_their_bytes_are_refused_by_name(make: Any) -> None:
    with pytest.raises(UnsupportedObject, match=r"^model\.layer\.weight: <class "):
        flatten({"model": {"layer.weight": make()}})


# ----------------------------------------------------------------------------------------- reading


@st.composite
def boxes(draw: Any) -> tuple[list[int], tuple[tuple[int, ...], tuple[int, ...]]]:
    sizes = draw(st.lists(st.integers(0, 9), max_size=4))
    offsets, lengths = [], []
    for size in sizes:
        offset = draw(st.integers(0, size))
        offsets.append(offset)
        lengths.append(draw(st.integers(0, size - offset)))
    return sizes, (tuple(offsets), tuple(lengths))


@given(boxes())
def test_spans_cover_the_box_and_stay_inside_the_part(found: Any) -> None:
    sizes, (offsets, lengths) = found
    part = np.arange(int(np.prod(sizes)), dtype=np.int32).reshape(sizes)
    box = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
    target = np.full(lengths, -1, dtype=np.int32)
    data = part.tobytes()
    for span in spans(sizes, (offsets, lengths), 4):
        assert span.start + span.num_bytes <= len(data)
        raw = np.frombuffer(data[span.start : span.start + span.num_bytes], np.int32)
        strides = part.strides if part.ndim else ()
        values = np.lib.stride_tricks.as_strided(raw, span.lengths, strides)
        where = tuple(
            slice(o - base, o - base + n)
            for o, base, n in zip(span.offsets, offsets, span.lengths, strict=True)
        )
        target[where] = values
    np.testing.assert_array_equal(target, part[box])


def test_a_dense_box_is_read_in_one_go_however_large() -> None:
    (span,) = spans([1 << 20, 1 << 10], ((5, 0), (1 << 19, 1 << 10)), 4)
    assert span.num_bytes == 1 << 31


def test_wide_gaps_are_not_read() -> None:
    rows = list(spans([16, 64 << 20], ((0, 0), (16, 1 << 10)), 4))
    assert len(rows) == 16
    assert sum(span.num_bytes for span in rows) == 16 << 12
