"""What descriptions say, without torch and without a daemon."""

from typing import Any

import pytest

from forebay.checkpoint.contents import Contents, module_tree
from forebay_wire.errors import IntegrityError, NotFound
from forebay_wire.manifest import GenerationManifest, PackRef


def entry(
    name: str,
    shape: list[int],
    at: int,
    box: tuple[list[int], list[int]] | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    sizes = box[1] if box else shape
    num_bytes = 4
    for size in sizes:
        num_bytes *= size
    found: dict[str, Any] = {"name": name, "dtype": dtype, "shape": shape, "at": [at, num_bytes]}
    if box:
        found["offsets"], found["sizes"] = box
    return found


def generation(*descriptions: dict[str, Any]) -> GenerationManifest:
    packs = tuple(
        PackRef(rank, f"{rank:064x}", 1000, {"format": 1, **one})
        for rank, one in enumerate(descriptions)
    )
    return GenerationManifest("run", 1, 7, None, len(packs), {}, None, packs, 0.0)


def test_parts_of_all_ranks_make_a_tensor() -> None:
    found = Contents.of(
        generation(
            {"tensors": [entry("a.w", [4, 3], 64, ([2, 0], [2, 3]))], "objects": {"o": 1}},
            {"tensors": [entry("a.w", [4, 3], 0, ([0, 0], [2, 3])), entry("b", [], 128)]},
        )
    )
    info = found.tensor("a.w")
    assert [part.box for part in info.parts] == [((0, 0), (2, 3)), ((2, 0), (2, 3))]
    assert (info.num_elements, info.num_bytes, info.item_bytes, info.ranks) == (12, 48, 4, [0, 1])
    assert found.tensor("b").item_bytes == 4
    assert found.at(0, 80, 81) == ["a.w"]
    assert found.at(0, 88, 99) == []
    assert found.at(1, 20, 200) == ["a.w", "b"]
    assert found.objects["o"][0] == 1
    assert found.name == "generation run@1/7"


def test_what_several_ranks_saved_alike_counts_once() -> None:
    same = {"tensors": [entry("w", [4], 0)]}
    assert len(Contents.of(generation(same, same)).tensor("w").parts) == 1


def test_states_of_single_ranks_stay_apart() -> None:
    one = {"tensors": [entry("w", [4], 0)], "objects": {"o": 1}, "separate": True}
    other = {"tensors": [entry("w", [9], 0)], "objects": {"o": 2}, "separate": True}
    found = Contents.of(generation(one, other))
    assert {name: info.shape for name, info in found.tensors.items()} == {
        "rank0/w": (4,),
        "rank1/w": (9,),
    }
    assert found.objects.keys() == {"rank0/o", "rank1/o"}


def test_tied_names_have_one_place() -> None:
    tied = [entry("w", [4], 0), entry("v", [4], 0), entry("u", [4], 64)]
    found = Contents.of(generation({"tensors": tied}))
    assert found.tensor("w").places == found.tensor("v").places != found.tensor("u").places
    assert found.unique_bytes == 32


def test_the_tree_adds_up_and_the_largest_comes_first() -> None:
    names = {"m.small.w": 2, "m.large.w": 50, "m.large.b": 1, "x": 3}
    entries = [entry(name, [size], 0) for name, size in names.items()]
    found = module_tree(Contents.of(generation({"tensors": entries})))
    listed = [(level, one.name, one.num_tensors, one.num_elements) for level, one in found.walk(2)]
    assert listed == [
        (0, "m", 3, 53),
        (1, "m.large", 2, 51),
        (1, "m.small", 1, 2),
        (0, "x", 1, 3),
    ]
    assert found.num_bytes == 4 * 56
    assert len(list(found.walk(9))) == 7


@pytest.mark.parametrize(
    "damage",
    [
        {"tensors": [{"name": "w"}]},
        {"tensors": [entry("w", [4], 990)]},
        {"tensors": [entry("w", [4], 0, ([0], [3]))]},
        {"tensors": [entry("w", [4], 0), entry("w", [5], 0)]},
        {"tensors": [entry("w", [4], 0), entry("w", [4], 0, ([0], [4]), "int32")]},
        {"tensors": 5},
        {"tensors": ["w"]},
        {"objects": 7},
    ],
)
def test_descriptions_that_are_none_are_damage(damage: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        Contents.of(generation(damage))


def test_a_wrong_name_is_told_close_ones() -> None:
    found = Contents.of(generation({"tensors": [entry("model.weight", [4], 0)]}))
    with pytest.raises(NotFound, match=r"model\.weight"):
        found.tensor("model.weigth")
