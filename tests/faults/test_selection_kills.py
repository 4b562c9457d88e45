"""SIGKILL at every named step of naming sealed rows: a selection is there with its rows, or not."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.failpoints import SELECTION_COMMIT, VARIABLE

Rows = Callable[[forebay.Client, str, int], None]


SLOW = [SELECTION_COMMIT[0], SELECTION_COMMIT[-1]]


@pytest.mark.parametrize(
    "point",
    [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in SELECTION_COMMIT],
)
def test_daemon_killed_while_it_names_rows_leaves_all_or_nothing(
    point: str,
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    write_rows: Rows,
    in_background: Callable[[Callable[[], Any]], Callable[[], Any]],
    files_of: Callable[[], list[Path]],
    wait_until: Callable[[Callable[[], bool], str], None],
) -> None:
    daemon.start(environment={VARIABLE: point}).wait_ready()
    with connect() as client:
        write_rows(client, "d", 1)
        outcome = in_background(lambda: define(client))
        assert daemon.wait_exit() == -9, "the failpoint was not passed"
        daemon.start().wait_ready()
        outcome()  # the call was made again, or failed
        del outcome
        gc.collect()  # the frames of an exception hold shards open
        there = {one.name for one in client.describe_dataset("d").selections}
        assert there in (set(), set(EXPECTED))
        for name in there:
            assert rows_of(client, name) == EXPECTED[name]
        define(client)
        assert {name: rows_of(client, name) for name in EXPECTED} == EXPECTED
        client.delete_dataset("d", now=True)
    # The connection that had them open has ended.
    wait_until(lambda: files_of() == [], "the bytes of selections go with their dataset")


EXPECTED = {"low0": list(range(100)), "low1": list(range(100, 300))}


def define(client: forebay.Client) -> None:
    client.dataset("d").define_buckets(pc.field("row"), [100], prefix="low")


def rows_of(client: forebay.Client, split: str) -> list[int]:
    chosen = client.dataset("d", split=split)
    return chosen.take(np.arange(len(chosen)), ["row"])["row"].tolist()
