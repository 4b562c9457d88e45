"""What a loader holds is bounded by its budget, whatever a transform makes of its batches."""

import threading

import pytest
import torch

import forebay
from forebay.dataset.cache import shard_cache
from forebay_wire.limits import MIB

BATCH_BYTES = 8 * MIB


class Enlarges:
    """Makes each batch 8 MiB, and counts them."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.num_made = 0

    def __call__(self, batch):
        with self.changed:
            self.num_made += 1
            self.changed.notify_all()
        return {"number": batch["number"], "large": torch.empty(BATCH_BYTES, dtype=torch.uint8)}


@pytest.mark.parametrize(("budget", "ahead"), [(64 * MIB, 2), (128 * MIB, 6), (16 * MIB, 1)])
def test_large_batches_are_not_read_far_ahead(numbered, budget, ahead):
    transform = Enlarges()
    loader = forebay.DataLoader(
        numbered, batch_size=1, transform=transform, prefetch_batches=16, memory_budget=budget
    )
    with loader:
        for number, batch in enumerate(loader):
            most = max(2, number + (ahead if number else 0))  # two were begun blindly
            with transform.changed:
                reached = transform.changed.wait_for(lambda: transform.num_made >= most, timeout=20)  # noqa: B023
                assert reached
                assert transform.num_made == most
            del batch
            if number == 40:
                break


def test_a_budget_that_is_too_small_is_refused(numbered):
    with pytest.raises(forebay.InvalidRequest, match="memory_budget"):
        forebay.DataLoader(numbered, batch_size=1, memory_budget=1000)


def test_the_smallest_budget_bounds_what_came_over_http(numbered, monkeypatch, way):
    if way == "local":
        pytest.skip("what is mapped is the page cache's")
    monkeypatch.setattr("forebay.dataset.cache._fetched_bytes", 512 * MIB)
    monkeypatch.setattr("forebay.dataset.cache._has_decoded", False)  # nor has it decoded anything
    numbered.take(range(len(numbered)))
    cache = shard_cache(numbered.endpoint)
    cache.limit(512 * MIB)  # other tests of this process may have given it less
    numbered.take(range(len(numbered)))
    before = cache.held_bytes
    forebay.DataLoader(numbered, batch_size=1, memory_budget=16 * MIB)
    assert cache._batch_bytes == 8 * MIB
    cache.limit(before // 2)
    assert cache.held_bytes <= before // 2
    numbered.take(range(len(numbered)))
    assert cache.held_bytes <= before // 2
