"""Which rank saves what several of them have: once, and about as many bytes on each. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Offer:
    """Something that a rank could save."""

    key: Hashable
    """Equal for what other ranks have, too."""
    num_bytes: int
    memory: Hashable = None
    """Equal for names of the same memory on this rank; they are saved by one rank, as once."""
    is_lowest: bool = False
    """Whether it has to come from the lowest rank that has it."""


def share(offers: Sequence[Sequence[Offer]]) -> list[list[int]]:
    """For each rank the indices of its offers that it saves: every key once.

    The largest are given away first, each to the rank that has least so far.
    """
    bundles, owners = _bundles(offers)
    loads = [0] * len(offers)
    chosen: dict[Hashable, int] = {}
    by_size = sorted(bundles, key=lambda keys: -_bytes(bundles[keys]))
    fixed_first = sorted(by_size, key=lambda keys: not _must(bundles[keys], owners[keys]))
    for keys in fixed_first:
        ranks = owners[keys]
        lowest = any(offer.is_lowest for offer in bundles[keys])
        rank = min(ranks) if lowest else min(ranks, key=lambda one: (loads[one], one))
        loads[rank] += _bytes(bundles[keys])
        chosen.update(dict.fromkeys(keys, rank))
    return [
        [index for index, offer in enumerate(mine) if chosen[offer.key] == rank]
        for rank, mine in enumerate(offers)
    ]


_Keys = tuple[Hashable, ...]


def _bundles(
    offers: Sequence[Sequence[Offer]],
) -> tuple[Mapping[_Keys, Sequence[Offer]], Mapping[_Keys, Sequence[int]]]:
    """Keys that go together, with an offer each, and the ranks that have all of them."""
    partner: dict[Hashable, dict[Hashable, None]] = {}
    having: dict[Hashable, set[int]] = {}
    known: dict[Hashable, Offer] = {}
    for rank, mine in enumerate(offers):
        tied: dict[Hashable, set[Hashable]] = {}
        for offer in mine:
            known.setdefault(offer.key, offer)
            having.setdefault(offer.key, set()).add(rank)
            group = {offer.key} if offer.memory is None else tied.setdefault(offer.memory, set())
            group.add(offer.key)
        for group in tied.values():
            for key in group:
                partner.setdefault(key, {}).update(dict.fromkeys(sorted(group, key=repr)))
    bundles: dict[_Keys, list[Offer]] = {}
    owners: dict[_Keys, list[int]] = {}
    done: set[Hashable] = set()
    for key in known:
        if key in done:
            continue
        members = tuple(one for one in partner.get(key, {key: None}) if one not in done)
        ranks = set.intersection(*(having[one] for one in members))
        # Tied here and not there: whoever has all saves all; else each name goes by itself.
        for keys in [members] if ranks else [(one,) for one in members]:
            bundles[keys] = [known[one] for one in keys]
            owners[keys] = sorted(ranks or having[keys[0]])
        done.update(members)
    return bundles, owners


def _must(bundle: Sequence[Offer], ranks: Sequence[int]) -> bool:
    return len(ranks) == 1 or any(offer.is_lowest for offer in bundle)


def _bytes(bundle: Sequence[Offer]) -> int:
    """Names of one memory are stored once."""
    return max(offer.num_bytes for offer in bundle)
