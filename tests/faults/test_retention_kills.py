"""SIGKILL of the daemon between the decision what is kept and its end."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.failpoints import RETENTION, VARIABLE


@pytest.mark.slow
@pytest.mark.parametrize("point", RETENTION)
def test_daemon_killed_while_it_prunes_leaves_all_consistent(
    point: str,
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    in_background: Callable[[Callable[[], Any]], Callable[[], Any]],
) -> None:
    daemon.start(environment={VARIABLE: point}).wait_ready()
    with connect() as client:
        with forebay.Checkpointer(client, run="r") as checkpointer:
            for step in (1, 2, 3, 4):
                checkpointer.save(step, state={"x": torch.full((99,), float(step))}).wait("local")
        client.run("r").tag("good", 2)
        answered = in_background(lambda: client.run("r").set_keep(forebay.Keep(last=1)))
        assert daemon.wait_exit() == -9, "the failpoint was not passed"
        daemon.start().wait_ready()
        answered()
        daemon.terminate()
    for _ in range(2):  # each start applies the policy, the second has nothing to do
        daemon.start().wait_ready()
        with connect() as client:
            deadline = time.monotonic() + 60
            while (steps := [one.step for one in client.checkpoints("r")]) != [4, 2]:
                assert set(steps) in ({1, 2, 3, 4}, {2, 4}), "half of what was decided was done"
                assert time.monotonic() < deadline
                time.sleep(0.05)
            with forebay.Checkpointer(client, run="other", fork_from="r") as checkpointer:
                assert checkpointer.restore("latest").state["x"][0] == 4.0  # type: ignore[union-attr]
            client.delete_checkpoints("other")
            report = client.fsck()
            assert report.num_found == 0, report
        daemon.terminate()
