"""What the status page counts, and what a drain finishes, on a real daemon."""

import os
import secrets
import shutil
import signal
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay_server.exit_codes import ExitCode
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.rpc import RpcClient, rpc_client
from forebay_wire.errors import DaemonUnavailable
from forebay_wire.ids import new_random_name
from forebay_wire.limits import MIB
from forebay_wire.segments import even_cuts
from forebay_wire.v1 import admin_pb2, blobs_pb2, checkpoints_pb2, datasets_pb2

DESCRIPTION = b'{"tensors":[]}'
WAIT_SECONDS = 30.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    ticking = threading.Event()
    for _ in range(int(WAIT_SECONDS / 0.05)):
        if condition():
            return
        ticking.wait(0.05)
    pytest.fail(f"not within {WAIT_SECONDS} s: {what}")


def read_status(client: RpcClient) -> Any:
    return client.call(client.admin.Status, admin_pb2.StatusRequest())


def tier_of(client: RpcClient, name: str) -> Any:
    return next(tier for tier in read_status(client).tiers if tier.name == name)


def put(daemon: DaemonProcess, session: Any, data: bytes) -> None:
    """Write *data* to the start of an upload session's slot."""
    url = f"{daemon.address()['http_url']}/v1/uploads/{session.session}"
    request = urllib.request.Request(
        f"{url}?ticket={session.put_ticket}&offset=0", data=data, method="PUT"
    )
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
        assert answer.status == 200


def begin_upload(client: RpcClient, num_bytes: int) -> Any:
    request = blobs_pb2.BeginUploadRequest(
        total_bytes=num_bytes, slot_bytes=num_bytes, owner="dataset d"
    )
    return client.call(client.blobs.BeginUpload, request)


def commit_dataset(daemon: DaemonProcess, client: RpcClient, data: bytes) -> Any:
    """Make dataset ``d`` of one shard that holds *data*."""
    session = begin_upload(client, len(data))
    put(daemon, session, data)
    cuts = even_cuts(len(data), MIB)
    sealed = client.call(
        client.blobs.Seal,
        blobs_pb2.SealRequest(session=session.session, num_bytes=len(data), cuts=cuts),
    )
    shard = datasets_pb2.ShardCommit(
        session=session.session,
        blob=sealed.blob,
        num_bytes=sealed.num_bytes,
        num_rows=1,
        batch_rows=[1],
    )
    commit = datasets_pb2.CommitVersionRequest(
        dataset="d", schema=b"schema", shards=[shard], request=new_random_name()
    )
    return client.call(client.datasets.CommitVersion, commit)


def begin_pack(client: RpcClient, num_bytes: int) -> Any:
    """Open a run's first attempt and plan its only rank's pack of step 1."""
    client.call(
        client.checkpoints.BeginAttempt,
        checkpoints_pb2.BeginAttemptRequest(run="r", num_ranks=1, request=new_random_name()),
    )
    plan = checkpoints_pb2.BeginPackRequest(
        run="r",
        attempt=1,
        step=1,
        num_ranks=1,
        total_bytes=num_bytes,
        slot_bytes=num_bytes + len(DESCRIPTION),
    )
    return client.call(client.checkpoints.BeginPack, plan)


def seal_pack(client: RpcClient, session: Any, num_bytes: int) -> None:
    seal = checkpoints_pb2.SealPackRequest(
        session=session.session,
        num_bytes=num_bytes,
        cuts=even_cuts(num_bytes, 4 * MIB),
        description_bytes=len(DESCRIPTION),
    )
    assert client.call(client.checkpoints.SealPack, seal).all_sealed


def is_refused(client: RpcClient) -> bool:
    """Whether the daemon takes no new upload, for a reason that passes."""
    try:
        begin_upload(client, 4096)
    except DaemonUnavailable as error:
        return error.retryable
    return False


def resolve_latest(client: RpcClient) -> Any:
    request = checkpoints_pb2.ResolveGenerationRequest(
        run="r", selector="latest", timeout_seconds=10
    )
    return client.call(client.checkpoints.ResolveGeneration, request)


# --------------------------------------------------------------------------------------- status


def test_bytes_are_dirty_until_the_object_tier_has_them(
    daemon: DaemonProcess, client: RpcClient
) -> None:
    data = secrets.token_bytes(3 * MIB)
    commit_dataset(daemon, client, data)
    assert tier_of(client, "ssd").used_bytes >= len(data)
    wait = datasets_pb2.WaitVersionRequest(dataset="d", durability="remote", timeout_seconds=20)
    client.call(client.datasets.WaitVersion, wait)
    assert tier_of(client, "ssd").dirty_bytes == 0
    assert tier_of(client, "object").used_bytes >= len(data)
    assert read_status(client).num_datasets == 1


def test_without_object_tier_everything_stays_dirty_and_queued(start_daemon: Any) -> None:
    daemon = start_daemon("--object-url", "none")
    with rpc_client(daemon) as client:
        commit_dataset(daemon, client, b"x" * MIB)
        status = read_status(client)
        assert [tier.name for tier in status.tiers] == ["ram", "ssd", "hdd"]
        assert tier_of(client, "ssd").dirty_bytes == MIB
        assert [(job.kind, job.state) for job in status.jobs] == [("flush", "queued")]


def test_flushes_queued_without_object_tier_run_once_there_is_one(
    start_daemon: Any, tmp_path: Path
) -> None:
    daemon = start_daemon("--object-url", "none")
    with rpc_client(daemon) as client:
        commit_dataset(daemon, client, b"x" * MIB)
    daemon.terminate()
    with rpc_client(start_daemon("--object-url", f"file://{tmp_path / 'later'}")) as client:
        wait = datasets_pb2.WaitVersionRequest(dataset="d", durability="remote", timeout_seconds=20)
        assert client.call(client.datasets.WaitVersion, wait).durability == "remote"


def test_open_upload_holds_memory_and_reserves_room(
    daemon: DaemonProcess, client: RpcClient
) -> None:
    session = begin_upload(client, 8 * MIB)
    status = read_status(client)
    assert status.num_uploads == 1
    assert tier_of(client, "ram").used_bytes >= 8 * MIB
    assert tier_of(client, "ssd").reserved_bytes >= 8 * MIB
    client.call(client.blobs.Abort, blobs_pb2.AbortRequest(session=session.session))
    assert read_status(client).num_uploads == 0
    assert tier_of(client, "ssd").reserved_bytes == 0


def test_upload_without_sign_of_life_is_reclaimed(start_daemon: Any) -> None:
    daemon = start_daemon("--lease-seconds", "1")
    with rpc_client(daemon) as client:
        begin_upload(client, MIB)
        wait_until(lambda: read_status(client).num_uploads == 0, "the upload ends with its lease")
        assert tier_of(client, "ssd").reserved_bytes == 0


def test_status_answers_while_a_tier_is_gone(daemon: DaemonProcess, client: RpcClient) -> None:
    shutil.rmtree(daemon.data / "object")
    status = read_status(client)
    assert {tier.name for tier in status.tiers} == {"ram", "ssd", "hdd", "object"}
    assert tier_of(client, "ssd").health == "ok"
    assert "object" in tier_of(client, "object").health


# ---------------------------------------------------------------------------------------- drain


def test_drain_lands_what_is_sealed_and_the_next_start_has_it(
    daemon: DaemonProcess, client: RpcClient
) -> None:
    data = secrets.token_bytes(96 * MIB)
    session = begin_pack(client, len(data))
    put(daemon, session, data + DESCRIPTION)
    seal_pack(client, session, len(data))
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait_exit() == ExitCode.OK
    daemon.start().wait_ready()
    with rpc_client(daemon) as again:
        found = resolve_latest(again)
        assert (found.state, found.step, found.num_bytes) == ("committed", 1, len(data))


def test_open_pack_whose_upload_ends_leaves_no_generation(
    daemon: DaemonProcess, client: RpcClient
) -> None:
    session = begin_pack(client, MIB)
    client.call(client.blobs.Abort, blobs_pb2.AbortRequest(session=session.session))
    listed = client.call(
        client.checkpoints.ListGenerations, checkpoints_pb2.ListGenerationsRequest(run="r")
    )
    assert list(listed.generations) == []


def test_draining_daemon_takes_no_new_upload_and_clients_may_try_again(
    start_daemon: Any,
) -> None:
    daemon = start_daemon()
    with rpc_client(daemon) as client:
        data = secrets.token_bytes(192 * MIB)
        session = begin_pack(client, len(data))
        put(daemon, session, data + DESCRIPTION)
        seal_pack(client, session, len(data))
        os.kill(daemon.pid, signal.SIGTERM)
        wait_until(lambda: is_refused(client), "the signal has arrived")
    assert daemon.wait_exit() == ExitCode.OK
