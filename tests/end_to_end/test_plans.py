"""Plans against a real daemon: told by loaders, followed by the cache, gone with their readers."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import forebay
from forebay.dataset import heartbeat, read_plan, row_runs
from forebay.testing.forks import in_fork
from forebay_server.testing.daemon import DaemonProcess, run_server
from forebay_server.testing.rpc import rpc_client
from forebay_wire.errors import InvalidRequest, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.limits import MIB
from forebay_wire.v1 import plans_pb2 as messages

NUM_BLOBS = 18
SAMPLE_BYTES = MIB // 4

READER = """
import sys, time, forebay
with forebay.connect(sys.argv[1]) as client:
    loader = forebay.DataLoader(client.dataset("d"), global_batch_size=1)
    batches = iter(loader)
    next(batches)
    print("reading", flush=True)
    time.sleep(600)
"""

PLANNING = """
import sys, time, forebay
with forebay.connect(sys.argv[1]) as client:
    plan = client.dataset("d").plan(range(18), name="to be killed")
    print("planned", flush=True)
    time.sleep(600)
"""


def eventually(condition, seconds: float = 60.0, told=lambda: "it did not come true"):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, told()
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def cold(tmp_path_factory) -> Path:
    """An object tier of one dataset, one sample a blob, and a catalog of just that."""
    folder = tmp_path_factory.mktemp("plans")
    arguments = ("--object-url", f"file://{folder}/objects", "--reserve-bytes", "0")
    with (
        DaemonProcess(folder / "writer", *arguments),
        forebay.connect(str(folder / "writer")) as client,
    ):
        schema = {"x": forebay.Array("uint8", (SAMPLE_BYTES,)), "number": "int64"}
        random = np.random.default_rng(0)
        with client.create_dataset("d", schema, shard_bytes=SAMPLE_BYTES + 8192) as writer:
            for number in range(NUM_BLOBS):
                writer.write(x=random.integers(0, 255, SAMPLE_BYTES, np.uint8), number=number)
        client.dataset("d").wait("remote", timeout=60)
    url = f"file://{folder}/objects"
    run_server("recover", "--data", folder / "node", url).check_returncode()
    return folder


@pytest.fixture
def node(cold, tmp_path):
    """A daemon that has only the object tier's copies, and room for a third of them."""
    shutil.copytree(cold / "node", tmp_path / "node")
    ssd_bytes = NUM_BLOBS // 3 * (SAMPLE_BYTES + 16384)
    with DaemonProcess(
        tmp_path / "node",
        *("--object-url", f"file://{cold}/objects", "--hdd-path", "none"),
        *("--reserve-bytes", "0", "--ssd-bytes", str(ssd_bytes)),
    ) as daemon:
        yield daemon


def plans_of(rpc) -> list[messages.PlanSummary]:
    return list(rpc.call(rpc.plans.ListPlans, messages.ListPlansRequest()).plans)


def used_bytes(client, tier: str) -> int:
    return next(one.used_bytes for one in client.status().tiers if one.name == tier)


def order(dataset, **changes) -> messages.OrderParameters:
    given = {
        "manifest": dataset.manifest_id,
        "shuffle": "full",
        "seed": 1,
        "global_batch_size": 1,
        "last_batch": "keep",
        "num_ranks": 1,
    }
    return messages.OrderParameters(**(given | changes))


@pytest.mark.parametrize("no_local", ["", "1"])
def test_a_loader_plans_by_itself_and_reads_more_than_the_cache_holds(node, no_local, monkeypatch):
    monkeypatch.setenv("FOREBAY_NO_LOCAL", no_local)
    limit = NUM_BLOBS // 3 * (SAMPLE_BYTES + 16384)
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        dataset = client.dataset("d")
        with forebay.DataLoader(dataset, global_batch_size=1, shuffle="full", seed=5) as loader:
            for epoch in loader.epochs(2):
                seen = []
                for batch in epoch:
                    seen.append(int(batch["number"][0]))
                    assert len(seen) % 6 or used_bytes(client, "ssd") <= limit
                assert sorted(seen) == list(range(NUM_BLOBS))
            [plan] = eventually(
                lambda: [one for one in plans_of(rpc) if (one.epoch, one.position) == (2, 0)],
                told=lambda: f"{plans_of(rpc)}, {loader.report()}",
            )
            assert plan.dataset == "d@1"
            assert plan.num_samples == NUM_BLOBS
            assert f"pid {os.getpid()}" in plan.loader
            assert loader.report().plan_problem == ""
        eventually(lambda: not plans_of(rpc))


def test_what_is_planned_is_fetched_before_anybody_asks(node):
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        assert used_bytes(client, "ssd") == 0
        request = messages.RegisterPlanRequest(
            plan=new_random_name(), loader="a test", order=order(client.dataset("d"))
        )
        assert rpc.call(rpc.plans.RegisterPlan, request).lease_seconds > 1
        eventually(lambda: used_bytes(client, "ssd") >= 4 * SAMPLE_BYTES)


def test_ranges_of_a_foreign_reader_are_fetched_in_their_order(node):
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        blobs = [shard.blob for shard in client.dataset("d").manifest.shards]
        plan = new_random_name()
        rpc.call(rpc.plans.RegisterPlan, messages.RegisterPlanRequest(plan=plan, loader="foreign"))
        ranges = [messages.BlobRange(blob=blob, length=100) for blob in blobs[:3]]
        rpc.call(rpc.plans.AddRanges, messages.AddRangesRequest(plan=plan, page=0, ranges=ranges))
        eventually(lambda: used_bytes(client, "ssd") >= 3 * SAMPLE_BYTES)
        advance = messages.AdvancePlanRequest(plan=plan, position=3)
        assert rpc.call(rpc.plans.AdvancePlan, advance).plan == plan
        assert rpc.call(rpc.plans.EndPlan, messages.EndPlanRequest(plan=plan)).existed
        assert not rpc.call(rpc.plans.EndPlan, messages.EndPlanRequest(plan=plan)).existed


def test_a_position_that_goes_back_is_refused_and_changes_nothing(node):
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        plan = new_random_name()
        request = messages.RegisterPlanRequest(
            plan=plan, loader="x", order=order(client.dataset("d")), epoch=1, position=7
        )
        rpc.call(rpc.plans.RegisterPlan, request)
        for epoch, position in ((1, 6), (0, 20)):
            with pytest.raises(InvalidRequest, match="position 7 of epoch 1 and cannot go back"):
                rpc.call(
                    rpc.plans.AdvancePlan,
                    messages.AdvancePlanRequest(plan=plan, epoch=epoch, position=position),
                )
        [found] = plans_of(rpc)
        assert (found.epoch, found.position) == (1, 7)


def test_a_plan_for_what_is_not_there_is_one_clear_error(node):
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        dataset = client.dataset("d")
        client.delete_dataset("d")
        request = messages.RegisterPlanRequest(
            plan=new_random_name(), loader="x", order=order(dataset)
        )
        with pytest.raises(NotFound, match="there is no dataset version with manifest"):
            rpc.call(rpc.plans.RegisterPlan, request)
        request.order.shuffle = "sideways"
        request.order.manifest = "ab"
        with pytest.raises(InvalidRequest):
            rpc.call(rpc.plans.RegisterPlan, request)
        with pytest.raises(NotFound, match="register it again"):
            rpc.call(rpc.plans.AdvancePlan, messages.AdvancePlanRequest(plan=new_random_name()))
        assert plans_of(rpc) == []


def test_the_plan_of_a_killed_reader_ends(node):
    command = [sys.executable, "-c", READER, str(node.data)]
    with (
        rpc_client(node) as rpc,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader,
    ):
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        eventually(lambda: len(plans_of(rpc)) == 1)
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        eventually(lambda: not plans_of(rpc))


def in_ssd(client, dataset) -> list[int]:
    """The shards that the ssd tier has."""
    shards = enumerate(dataset.manifest.shards)
    places = {number: client.why(f"blob {shard.blob}").copies for number, shard in shards}
    return [number for number, found in places.items() if any(one.tier == "ssd" for one in found)]


def test_rows_that_a_reader_plans_are_fetched_before_it_asks(node):
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        dataset = client.dataset("d")
        indices = [7, 3, 3, 11, -1]
        with dataset.plan(indices, name="hard samples") as plan:
            eventually(lambda: in_ssd(client, dataset) == [3, 7, 11, 17])
            assert [int(dataset[index]["number"]) for index in indices] == [7, 3, 3, 11, 17]
            assert int(dataset[0]["number"]) == 0
            plan.advance(3)
            [found] = eventually(lambda: [one for one in plans_of(rpc) if one.position == 3])
            assert (found.loader, found.dataset) == ("hard samples", "d@1")
            assert found.waits.num_waits > 0  # what the block reads counts for its plan
            assert plan.problem == ""
        eventually(lambda: not plans_of(rpc))
        with pytest.raises(InvalidRequest, match="is closed"):
            plan.advance(4)


def test_rows_of_a_split_are_those_of_its_shards(node):
    with forebay.connect(str(node.data)) as client:
        client.dataset("d").define_splits({"a": 0.5, "b": 0.5}, seed=1)
        dataset = client.dataset("d", split="a")
        with dataset.plan([4, 0]):
            rows = sorted(int(row) for row in dataset.rows_at(np.array([0, 4])))
            eventually(lambda: in_ssd(client, dataset) == rows)


def test_an_endless_order_is_told_as_reading_advances(node, monkeypatch):
    monkeypatch.setattr(row_runs, "AHEAD_RUNS", 4)
    monkeypatch.setattr(row_runs, "CHUNK_ROWS", 2)
    monkeypatch.setattr(read_plan, "PAGE_RUNS", 1)
    taken = []

    def backwards():
        for number in count():
            taken.append(number)
            yield -1 - number % NUM_BLOBS

    with forebay.connect(str(node.data)) as client:
        dataset = client.dataset("d")
        with dataset.plan(backwards()) as plan:
            eventually(lambda: in_ssd(client, dataset) == [14, 15, 16, 17])
            read = []
            for row in plan:
                read.append(row)
                assert len(taken) <= plan.position + 6
                if plan.position == 5:
                    break
            assert read == [-1, -2, -3, -4, -5, -6]
            eventually(lambda: {11, 12} <= set(in_ssd(client, dataset)))
            plan.advance(1000)
            assert 1000 % NUM_BLOBS == 10
            eventually(lambda: 7 in in_ssd(client, dataset))
            assert plan.problem == ""


def test_a_reader_that_makes_no_sense_is_told_so(node):
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        dataset = client.dataset("d")
        with pytest.raises(IndexError, match="row 18, at position 2 of the plan, is outside"):
            dataset.plan([0, 1, 18])
        with dataset.plan(range(10)) as plan:
            plan.advance(7)
            with pytest.raises(InvalidRequest, match="at position 7 and cannot go back to 6"):
                plan.advance(6)
            with pytest.raises(InvalidRequest, match="position 11 is beyond the end"):
                plan.advance(11)
            eventually(lambda: plans_of(rpc)[0].position == 7)
            assert plan.position == 7
        with pytest.raises(InvalidRequest, match="came by pickle and has no connection"):
            pickle.loads(pickle.dumps(dataset)).plan([0])  # noqa: S301 - our own
        client.delete_dataset("d")
        with pytest.raises(NotFound, match="there is no dataset version with manifest"):
            dataset.plan([0])
        eventually(lambda: not plans_of(rpc))


def test_a_child_of_fork_is_told_whose_the_plan_is_and_reads_for_it(node):
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        dataset = client.dataset("d")
        with dataset.plan([1, 2]) as plan:

            def read() -> None:
                assert int(dataset[9]["number"]) == 9
                with pytest.raises(InvalidRequest, match=f"belongs to process {os.getppid()}"):
                    plan.advance(1)
                plan.close()

            assert in_fork(read) == 0
            assert eventually(lambda: plans_of(rpc)[0].waits.num_waits) > 0
            plan.advance(1)
            eventually(lambda: plans_of(rpc)[0].position == 1)


def test_a_slow_reader_keeps_its_plan_and_a_daemon_that_forgot_it_is_told_again(node, monkeypatch):
    monkeypatch.setattr(heartbeat, "ALIVE_SECONDS", 0.2)
    with forebay.connect(node.address()["rpc"]) as client:  # which starts no daemon
        dataset = client.dataset("d")
        with dataset.plan(range(NUM_BLOBS), name="slow") as plan:
            plan.advance(9)
            with rpc_client(node) as rpc:
                eventually(lambda: plans_of(rpc)[0].position == 9)
                before = plans_of(rpc)[0].expires_seconds
                eventually(lambda: plans_of(rpc)[0].expires_seconds < before)
                eventually(lambda: plans_of(rpc)[0].expires_seconds > before)
                request = messages.EndPlanRequest(plan=plan.plan)  # as if its lease ran out
                assert rpc.call(rpc.plans.EndPlan, request).existed
                assert [one.position for one in eventually(lambda: plans_of(rpc))] == [9]
            node.kill()
            eventually(lambda: plan.problem)
            node.start().wait_ready()
            with rpc_client(node) as rpc:
                [found] = eventually(lambda: plans_of(rpc))
                assert (found.loader, found.position) == ("slow", 9)
            eventually(lambda: not plan.problem)
            plan.advance(16)
            eventually(lambda: {16, 17} <= set(in_ssd(client, dataset)))


@pytest.mark.slow
def test_the_plan_of_a_killed_process_expires(node):
    command = [sys.executable, "-c", PLANNING, str(node.data)]
    with (
        rpc_client(node) as rpc,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader,
    ):
        assert reader.stdout is not None
        assert reader.stdout.readline() == "planned\n"
        assert [one.loader for one in plans_of(rpc)] == ["to be killed"]
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        eventually(lambda: not plans_of(rpc))


def test_a_block_shuffle_is_planned_and_its_next_blocks_are_fetched(node):
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        dataset = client.dataset("d")
        blocks = {"shuffle": "block", "window_blocks": 4}
        with forebay.DataLoader(dataset, global_batch_size=1, lanes=2, **blocks) as loader:
            batches = iter(loader)
            next(batches)
            eventually(
                lambda: [one for one in plans_of(rpc) if one.ready_bytes > 3 * SAMPLE_BYTES],
                told=lambda: f"{plans_of(rpc)}, {loader.report()}",
            )
            seen = 1 + sum(1 for _ in batches)
            assert seen == NUM_BLOBS
            assert loader.report().plan_problem == ""
            state = loader.state_dict()
        with forebay.DataLoader(dataset, global_batch_size=1, **blocks) as loader:
            next(iter(loader))
            [before] = eventually(lambda: plans_of(rpc))
            loader.load_state_dict(state)  # which has two lanes
            next(iter(loader))
            # The plan of one lane is no more, and there is one of two.
            eventually(lambda: [one for one in plans_of(rpc) if one.plan != before.plan])
            eventually(lambda: len(plans_of(rpc)) == 1)


def test_a_plan_of_blocks_that_cannot_be_is_refused(node):
    with forebay.connect(str(node.data)) as client, rpc_client(node) as rpc:
        for changes, message in (
            ({"shuffle": "block"}, "window_blocks=0"),
            ({"shuffle": "block", "window_blocks": 4}, "lanes=0"),
            ({"shuffle": "full", "window_blocks": 4, "lanes": 1}, 'belong to shuffle="block"'),
        ):
            request = messages.RegisterPlanRequest(
                plan=new_random_name(), loader="x", order=order(client.dataset("d"), **changes)
            )
            with pytest.raises(InvalidRequest, match=message):
                rpc.call(rpc.plans.RegisterPlan, request)
        assert plans_of(rpc) == []
