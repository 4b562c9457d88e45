"""What a pack may be a difference from, and what its list says of that."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.deltas import LARGEST_SHARE, MAX_LAYERS, base_of, on_base, pays
from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectBlob
from forebay_server.model.sharing import (
    MAX_SHARERS,
    MAX_SOURCES,
    Division,
    Placed,
    Source,
    known_segments,
    merged,
)
from forebay_wire.segments import table_of

FILES = [f"{number:032x}" for number in range(40)]


def of_chains(chains: list[list[tuple[int, int]]], length: int = 10) -> list[Placed]:
    """Segments whose layers lie in ``(number of the file, place there)`` each."""
    placed = []
    for chain in chains:
        lies = [Placed(FILES[file], length * place, length, 10**6) for file, place in chain]
        placed.append(Placed(lies[0].file, lies[0].offset, length, 10**6, below=tuple(lies[1:])))
    return placed


def source_of(placed: list[Placed], first: int = 0, **options: bool) -> Source:
    """Of a pack of which no two segments are equal."""
    table = table_of([bytes([first + index]) * 10 for index in range(len(placed))])
    found = ObjectBlob(table, tuple(merged(placed, "", 0)), PIECES)
    back = ObjectBlob.decode(found.encode(), "here", table.blob_id)
    return Source.of(back, **options)


chains = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=5),
    min_size=1,
    max_size=12,
)


@given(chains)
def test_a_list_says_of_each_segment_where_all_its_layers_lie(
    found: list[list[tuple[int, int]]],
) -> None:
    placed = of_chains(found)
    segments = list(source_of(placed).segments())
    assert [one for _, _, one in segments] == placed
    assert [offset for offset, _, _ in segments] == [10 * one for one in range(len(placed))]


def test_consecutive_differences_are_one_piece_in_each_layer() -> None:
    placed = of_chains([[(0, index), (1, index + 5)] for index in range(6)])
    assert [(one.layer, one.num_bytes) for one in merged(placed, "", 0)] == [(0, 60), (1, 60)]


def test_no_chain_becomes_longer_than_it_may() -> None:
    placed = of_chains([[(0, 0)] * length for length in range(1, MAX_LAYERS + 2)])
    base = base_of("b", source_of(placed), set(FILES))
    lengths = [len(one.layers) for one in base.places.values()]
    assert lengths == list(range(1, MAX_LAYERS))
    assert base.place(0, 10) == placed[0]
    assert base.place(0, 9) is base.place(5, 10) is None


def test_a_base_has_only_what_may_be_referred_to_in_all_its_layers() -> None:
    placed = of_chains([[(0, 0)], [(0, 1), (1, 0)], [(2, 0), (0, 2)]])
    base = base_of("b", source_of(placed), {FILES[0], FILES[2]})
    assert list(base.places.values()) == [placed[0], placed[2]]


def test_differences_lie_on_the_segment_of_their_place() -> None:
    table = table_of([b"a" * 10, b"b" * 10, b"a" * 10, b"d" * 10])
    known = Placed(FILES[9], 0, 10, 100)
    division = Division.of(table, {table.entries["blake3"][3].tobytes(): known})
    base = base_of("b", source_of(of_chains([[(0, 0)], [(1, 0), (2, 0)]])), set(FILES))
    placed = on_base(division, base, table, [False, True])
    own = Placed("", 0, 10, 0)
    below = of_chains([[(1, 0)], [(2, 0)]])
    assert placed == (own, Placed("", 10, 10, 0, below=tuple(below)), own, known)


def test_the_files_of_the_base_come_first_where_there_are_too_many() -> None:
    """Those of all other ranks have more bytes."""
    mine = source_of(of_chains([[(30, 0), (31, 0)]]), first=99)
    others = source_of(of_chains([[(file, 0)] for file in range(20) for _ in range(3)]))
    known = known_segments([others, mine], {}, mine.files)
    files = {one.file for placed in known.values() for one in placed.layers}
    assert len(files) == MAX_SOURCES
    assert mine.files <= files
    assert not mine.files & {
        one.file for placed in known_segments([others], {}).values() for one in placed.layers
    }


def test_what_many_share_is_not_shared_further_through_any_layer() -> None:
    placed = of_chains([[(0, 0)], [(1, 0), (2, 0)], [(1, 1)]])
    many = {FILES[2]: MAX_SHARERS}
    assert set(known_segments([source_of(placed)], many).values()) == {placed[0], placed[2]}
    assert len(known_segments([source_of(placed, is_remote=True)], many)) == 3


def test_a_difference_has_to_pay() -> None:
    assert pays(int(1000 * LARGEST_SHARE), 1000)
    assert not pays(int(1000 * LARGEST_SHARE) + 1, 1000)
