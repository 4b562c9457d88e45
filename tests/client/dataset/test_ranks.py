"""Which rank a process is: as given, torch.distributed's, the environment's, or the only one."""

import pytest
import torch.distributed

from forebay.dataset.ranks import find_rank
from forebay_wire.errors import InvalidRequest


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_alone_it_is_the_only_rank():
    assert find_rank() == (0, 1)


def test_the_environment_of_torchrun_counts(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert find_rank() == (2, 4)
    assert find_rank(1, 3) == (1, 3)


def test_a_process_group_counts_more_than_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert find_rank() == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("given", [(0, None), (None, 2), (2, 2), (-1, 2), (0, 0)])
def test_impossible_ranks_are_refused(given):
    with pytest.raises(InvalidRequest, match="rank"):
        find_rank(*given)


def test_an_environment_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InvalidRequest, match="RANK='zero'"):
        find_rank()
