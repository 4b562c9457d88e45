"""Ranks agree on a name for their start, whatever earlier starts left in the store."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from forebay_wire.errors import DeadlineExceeded
from forebay_wire.meeting import meet

TIMEOUT = timedelta(seconds=30)


class Store:
    """A store that outlives the ranks, as torchrun's does."""

    def __init__(self):
        self.values = {}
        self.lock = threading.Lock()

    def set(self, key, value):
        with self.lock:
            self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


def start(store, num_ranks, late=()):
    """The name that each rank of one start found; those of *late* come last."""
    order = sorted(range(num_ranks), key=lambda rank: rank in late)
    with ThreadPoolExecutor(num_ranks) as pool:
        found = {}
        for rank in order:
            found[rank] = pool.submit(meet, store, rank, num_ranks, TIMEOUT)
        return [found[rank].result() for rank in range(num_ranks)]


def test_every_start_has_a_name_of_its_own_however_ranks_come_and_go():
    store, names, chance = Store(), [], random.Random(0)
    for _ in range(30):
        num_ranks = chance.randrange(2, 5)
        late = chance.sample(range(num_ranks), chance.randrange(num_ranks))
        found = start(store, num_ranks, late)
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == len(names)


def test_ranks_that_died_while_they_met_are_no_part_of_the_next_start():
    store = Store()
    with pytest.raises(DeadlineExceeded, match="not all 3 ranks"):  # rank 2 never came
        meet(store, 0, 3, timedelta(seconds=0.05))
    with pytest.raises(DeadlineExceeded):
        meet(store, 1, 3, timedelta(seconds=0.05))
    left = dict(store.values)
    names = start(store, 3, late=[0])  # the others meet the old offer first
    assert len(set(names)) == 1
    assert store.values["offered"] != left["offered"]
