"""Steps that are computed many at a time are the ones that would be computed one by one."""

import pickle
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forebay.dataset import steps
from forebay.dataset.steps import StepPages
from forebay_wire.order import Cut, Order


@dataclass(frozen=True)
class Epoch:
    order: Order

    @property
    def num_samples(self):
        return self.order.num_samples

    def rows(self, positions):
        return self.order.at(positions)


@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from(["keep", "pad", "drop"]),
    st.integers(1, 5),
    st.integers(1, 50),
    st.data(),
)
def test_the_same_parts_and_rows(count, size, last_batch, ranks, page, data):
    cut = Cut(count, size, last_batch, data.draw(st.integers(0, count)))
    epochs = [Epoch(Order(count, "full", 1, epoch, "m/")) for epoch in range(2)]
    pages = StepPages()
    before, steps.PAGE_SAMPLES = steps.PAGE_SAMPLES, page
    try:
        for step in data.draw(st.permutations(range(cut.num_steps))):
            for epoch in epochs:
                rank = data.draw(st.integers(0, ranks - 1))
                part, rows = pages.at(epoch, cut, step, rank, ranks)
                assert part == cut.part(step, rank, ranks)
                assert np.array_equal(rows, epoch.rows(part.positions(count)))
    finally:
        steps.PAGE_SAMPLES = before


def test_a_padded_part_is_not_taken_for_the_whole_batch():
    cut, epoch = Cut(5, 10, "pad"), Epoch(Order(5, "full", 1, 0, "m/"))
    part, rows = StepPages().at(epoch, cut, 0, 1, 2)
    assert (part.num_rows, part.num_samples) == (5, 2)
    assert np.array_equal(rows, epoch.rows(part.positions(5)))


def test_pages_are_not_pickled():
    pages = StepPages()
    pages.at(Epoch(Order(10_000, "full", 0, 0, "m/")), Cut(10_000, 256), 3, 0, 1)
    assert len(pickle.dumps(pages)) < 200
