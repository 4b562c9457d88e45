"""What a generation's descriptions mean, for any shape and any cut of a tensor."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.tree.content import state_tree
from forebay.tree.nodes import Boxes, File, Piece, Pieces, file_name
from forebay_wire.errors import IntegrityError
from forebay_wire.manifest import GenerationManifest, PackRef


def generation(*descriptions: dict[str, Any], num_bytes: int = 1 << 20) -> GenerationManifest:
    packs = tuple(
        PackRef(rank, f"blob{rank}", num_bytes, {"format": 1, "tensors": [], "objects": {}, **one})
        for rank, one in enumerate(descriptions)
    )
    return GenerationManifest("run", 1, 1, None, len(packs), {}, None, packs, 0.0)


@given(st.data())
def test_parts_are_put_together_in_order(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    whole = np.arange(np.prod(shape, dtype=int), dtype=np.int16).reshape(shape)
    cuts = [sorted({0, size, *data.draw(st.sets(st.integers(0, size)))}) for size in shape]
    cells = [
        tuple(slice(c[i], c[i + 1]) for c, i in zip(cuts, index, strict=True))
        for index in np.ndindex(*(len(c) - 1 for c in cuts))
    ]
    packs: list[bytes] = [b"", b""]
    entries: list[list[dict[str, Any]]] = [[], []]
    for cell in data.draw(st.permutations(cells)):
        rank = data.draw(st.integers(0, 1))
        part = whole[cell]
        entries[rank].append(
            {
                "name": "t",
                "dtype": "int16",
                "shape": list(shape),
                "offsets": [one.start for one in cell],
                "sizes": list(part.shape),
                "at": [len(packs[rank]), part.nbytes],
            }
        )
        packs[rank] += part.tobytes()
    file = state_tree(generation({"tensors": entries[0]}, {"tensors": entries[1]}))["t"]
    assert isinstance(file, File)
    assert file.num_bytes == whole.nbytes
    by_blob = {"blob0": packs[0], "blob1": packs[1]}

    def read(piece: Piece) -> bytes:
        return by_blob[piece.blob][piece.offset : piece.offset + piece.num_bytes]

    if isinstance(file.content, Pieces):
        assert b"".join(map(read, file.content.pieces)) == whole.tobytes()
    else:
        assert isinstance(file.content, Boxes)
        assert max(map(len, cuts[1:])) > 2  # only then parts interleave
        for box in file.content.boxes:
            place = tuple(
                slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True)
            )
            assert read(box.piece) == whole[place].tobytes()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"format": 2}, "upgrade Forebay"),
        ({"tensors": [{"name": "t"}]}, "lacks or bends"),
        (
            {"tensors": [{"name": "t", "dtype": "int8", "shape": [4], "at": [1 << 20, 4]}]},
            "does not fit",
        ),
        (
            {"tensors": [{"name": "t", "dtype": "int8", "shape": [4], "sizes": [2], "at": [0, 2]}]},
            "the packs hold 2",
        ),
        ({"objects": {"x": {"$bytes": [0, -1]}}}, "does not fit"),
        ({"objects": {"x": {"$bytes": "?"}}}, "lacks or bends"),
    ],
)
def test_a_description_that_cannot_be_is_damage(description: dict[str, Any], message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        state_tree(generation(description))


@given(st.sets(st.text(), max_size=20))
def test_every_key_is_one_name_of_a_file(keys: set[str]) -> None:
    names = [file_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    for name in names:
        assert name not in ("", ".", "..")
        assert not set(name) & set("/\\*?[]:#\0")


def test_things_of_one_name_all_have_a_place() -> None:
    paths = [["a", 1], ["a", "1"], ["a", "1", "b"], ["a"]]
    structure = [{"name": f"n{number}", "path": path} for number, path in enumerate(paths)]
    objects = {f"n{number}": number for number in range(4)}
    tree = state_tree(generation({"structure": structure, "objects": objects}))
    assert sorted(tree) == ["a", "a~2"]
    assert sorted(tree["a"]) == ["1", "1~2", "1~3"]
    assert sorted(tree["a"]["1~3"]) == ["b"]
