"""What several ranks have is saved once, by one that has it, and evenly."""

from hypothesis import given
from hypothesis import strategies as st

from forebay.checkpoint.balance import Offer, share


def loads(offers: list[list[Offer]]) -> list[int]:
    kept = share(offers)
    found = []
    for mine, keep in zip(offers, kept, strict=True):
        memories = {
            offer.memory or offer.key: offer.num_bytes for offer in map(mine.__getitem__, keep)
        }
        found.append(sum(memories.values()))
    return found


def test_copies_are_spread_by_bytes_and_not_by_number() -> None:
    everybody = [Offer("large", 800), *[Offer(f"small{n}", 100) for n in range(24)]]
    assert loads([everybody] * 4) == [800] * 4


def test_what_only_one_rank_has_counts_for_the_others_too() -> None:
    shared = [Offer("a", 300), Offer("b", 300)]
    assert loads([[Offer("mine", 500), *shared], shared, shared]) == [500, 300, 300]


def test_names_of_one_memory_are_saved_by_one_rank() -> None:
    tied = [Offer("head", 500, memory=1), Offer("body", 400), Offer("embedding", 500, memory=1)]
    kept = share([tied, tied])
    assert sorted(kept, key=len) == [[1], [0, 2]]


def test_names_that_are_tied_on_one_rank_alone_are_still_saved_once_each() -> None:
    kept = share(
        [[Offer("a", 5, memory=1), Offer("b", 5, memory=1)], [Offer("a", 5), Offer("c", 5)]]
    )
    assert sorted(
        name
        for keep, names in zip(kept, ("ab", "ac"), strict=True)
        for name in map(names.__getitem__, keep)
    ) == ["a", "b", "c"]


def test_what_belongs_together_comes_from_the_lowest_rank() -> None:
    buffers = [Offer(f"buffer{n}", 100, is_lowest=True) for n in range(5)]
    assert loads([[], buffers, buffers]) == [0, 500, 0]


@given(
    st.lists(
        st.lists(
            st.builds(
                Offer,
                st.integers(0, 9),
                st.integers(0, 100),
                st.none() | st.integers(0, 3),
                st.booleans(),
            ),
            unique_by=lambda offer: offer.key,
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_key_is_saved_exactly_once_by_a_rank_that_has_it(offers: list[list[Offer]]) -> None:
    kept = [
        mine[index].key for mine, keep in zip(offers, share(offers), strict=True) for index in keep
    ]
    assert sorted(kept) == sorted({offer.key for mine in offers for offer in mine})
