"""An object store that is slow, overloaded, cut off, or lies about what it did."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forebay_server.testing.http_proxy import Fault, FaultyProxy
from forebay_server.testing.s3 import S3Bucket, make_bucket, missing_s3
from forebay_server.testing.seaweed import KEY, SECRET, SeaweedFS, seaweed_program
from forebay_server.testing.tier_contract import publish_at_once, random_bytes
from forebay_server.tier import s3 as s3_module
from forebay_server.tier.parts import PART_BYTES
from forebay_server.tier.remote import ObjectClientName, RemoteTier
from forebay_server.tier.retry import CannotGiveRemote
from forebay_server.tier.s3 import S3Client
from forebay_server.tier.s3_options import S3Options
from forebay_wire.errors import (
    AlreadyExists,
    IntegrityError,
    InvalidRequest,
    NotFound,
    StorageError,
)
from forebay_wire.ids import new_random_name

CLIENTS: tuple[ObjectClientName, ...] = ("s3fs", "obstore")
LARGE_BYTES = 2 * PART_BYTES + 12345
"""Three parts."""


@pytest.fixture(scope="module")
def proxy(s3: S3Bucket) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint) as made:
        yield made


@pytest.fixture(scope="module", params=CLIENTS)
def opened(
    s3: S3Bucket, proxy: FaultyProxy, request: pytest.FixtureRequest
) -> Iterator[RemoteTier]:
    if request.param == "obstore":
        pytest.importorskip("obstore")
    proxy.heal()
    behind = replace(s3, endpoint=proxy.endpoint)
    tier = behind.tier(f"faults-{request.param}", request.param)
    tier.open()
    yield tier
    tier.close()


@pytest.fixture
def tier(opened: RemoteTier, proxy: FaultyProxy) -> Iterator[RemoteTier]:
    """A tier on the other side of a proxy that has no faults yet."""
    proxy.heal()
    yield opened
    proxy.heal()


@pytest.fixture
def name(tier: RemoteTier) -> str:
    return tier.blob_name(new_random_name())


def test_what_is_overloaded_for_a_while_is_asked_again(
    tier: RemoteTier, proxy: FaultyProxy, name: str
) -> None:
    for method in ("PUT", "HEAD", "GET"):
        proxy.fail(Fault("answer", method, name, times=2))
    tier.put(name, b"12345")
    assert tier.get(name) == b"12345"
    assert proxy.count("GET", name) == 3


def test_an_error_after_a_put_that_succeeded_is_recognised_as_ours(
    tier: RemoteTier, proxy: FaultyProxy, name: str
) -> None:
    before = tier.space()
    proxy.fail(Fault("answer after", "PUT", name, status=500, code="InternalError"))
    tier.put(name, b"12345")
    assert tier.get(name) == b"12345"
    assert tier.space().num_files == before.num_files + 1


def test_a_name_that_another_writer_took_meanwhile_stays_theirs(
    tier: RemoteTier, proxy: FaultyProxy, name: str
) -> None:
    tier.put(name, b"theirs")
    proxy.fail(Fault("answer", "PUT", name))
    with pytest.raises(AlreadyExists):
        tier.put(name, b"theirs")  # equal bytes, but another call's
    assert tier.get(name) == b"theirs"


def test_a_completion_whose_answer_was_lost_is_recognised_as_ours(
    tier: RemoteTier, proxy: FaultyProxy, name: str
) -> None:
    data = random_bytes(LARGE_BYTES, 1)
    proxy.fail(Fault("answer after", "POST", "uploadId", status=503))
    proxy.fail(Fault("cut request", "PUT", "partNumber=2", num_bytes=1_000_000))
    proxy.fail(Fault("answer", "PUT", "partNumber=3"))
    tier.put(name, data)
    assert tier.get(name) == data
    assert proxy.count("PUT", "partNumber=2") >= 2


def test_a_taken_name_refuses_a_large_object_and_leaves_no_parts(
    s3: S3Bucket, tier: RemoteTier, name: str
) -> None:
    tier.put(name, b"first")
    with pytest.raises(AlreadyExists):
        tier.put(name, random_bytes(LARGE_BYTES, 2))
    assert tier.get(name) == b"first"
    assert uploads_of(s3, name) == []


def test_a_connection_that_breaks_within_an_answer_is_read_on_from_there(
    tier: RemoteTier, proxy: FaultyProxy, name: str
) -> None:
    data = random_bytes(3 << 20, 3)
    tier.put(name, data)
    for num_bytes in (0, 1, 1_000_000):
        proxy.fail(Fault("cut answer", "GET", name, num_bytes=num_bytes))
    assert tier.get(name) == data


@pytest.fixture
def readers(s3: S3Bucket, proxy: FaultyProxy) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """An object, and a read of it that tells who asked the store."""
    proxy.heal()
    tier = replace(s3, endpoint=proxy.endpoint).tier("sockets")
    with closing(tier):
        tier.open()
        name, data = tier.blob_name(new_random_name()), random_bytes(100_000, 5)
        tier.put(name, data)

        def read() -> list[str]:
            before = len(proxy.agents)
            assert tier.get(name) == data
            return [agent.split("/")[0] for agent in proxy.agents[before:]]

        yield name, read
    proxy.heal()


def test_what_only_the_client_understands_it_reads_for_a_while(
    proxy: FaultyProxy,
    readers: tuple[str, Callable[[], list[str]]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "forebay_server.tier.s3")
    name, read = readers

    def told() -> int:
        return sum("are read by the S3 client" in line for line in caplog.messages)

    assert read() == ["forebay"] * 2
    monkeypatch.setattr(s3_module, "CLIENT_SECONDS", 3.0)
    proxy.fail(Fault("answer", "GET", name, status=301, code="PermanentRedirect"))
    assert read() == ["forebay", "aiobotocore", "aiobotocore"]
    assert told() == 1
    deadline = time.monotonic() + 30
    while read() != ["forebay"] * 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.undo()
    proxy.fail(Fault("answer", "GET", name, status=301, code="PermanentRedirect"))
    assert read() == ["forebay", "aiobotocore", "aiobotocore"]
    assert read() == ["aiobotocore"] * 2
    assert told() == 2


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (400, "RequestTimeout")])
def test_a_refusal_that_passes_leaves_reads_to_the_sockets(
    proxy: FaultyProxy,
    readers: tuple[str, Callable[[], list[str]]],
    status: int,
    code: str,
) -> None:
    name, read = readers
    proxy.fail(Fault("answer", "GET", name, status=status, code=code))
    assert read()[0] == "forebay"
    assert read() == ["forebay"] * 2


def test_what_stays_denied_is_left_to_the_client(
    proxy: FaultyProxy, readers: tuple[str, Callable[[], list[str]]]
) -> None:
    name, read = readers
    proxy.fail(Fault("answer", "GET", name, times=2, status=403, code="AccessDenied"))
    assert read() == ["forebay"] * 2 + ["aiobotocore"] * 2


@pytest.mark.parametrize("key", ["plain", "a b/c+d", "ü/~x_y-z.0", "%41=&?#", "'(!)*,:;@"])
def test_any_key_is_read(s3: S3Bucket, proxy: FaultyProxy, key: str) -> None:
    proxy.heal()
    options = S3Options(endpoint_url=proxy.endpoint, key=s3.key, secret=s3.secret)
    client = S3Client(s3.bucket, f"odd-{new_random_name()}/", options)
    client.open()
    with closing(client):
        client.put(key, memoryview(b"0123456789"), "mark")
        found = bytearray(4)
        before = len(proxy.agents)
        assert client.read_into(key, "", 3, memoryview(found)) == 4
        assert found == b"3456"
        assert proxy.agents[before:] == ["forebay"]
        client.delete(key)


def test_a_slow_store_is_waited_for(tier: RemoteTier, proxy: FaultyProxy, name: str) -> None:
    proxy.latency_seconds = 0.3
    tier.put(name, b"12345")
    assert tier.get(name) == b"12345"


def test_a_store_that_stays_overloaded_ends_in_an_error_that_says_what_was_tried(
    tier: RemoteTier, proxy: FaultyProxy, name: str
) -> None:
    before = tier.space()
    proxy.fail(Fault("answer", "PUT", name, times=1000))
    with pytest.raises(
        StorageError, match=rf"publishing file {name}: 6 tries in .* 503 .*SlowDown"
    ):
        tier.put(name, b"12345")
    proxy.heal()
    assert tier.head(name) is None
    assert tier.space() == before


def test_an_upload_that_fails_leaves_no_parts(
    s3: S3Bucket, tier: RemoteTier, proxy: FaultyProxy, name: str
) -> None:
    proxy.fail(Fault("answer", "PUT", "partNumber=2", times=6, status=500, code="InternalError"))
    with pytest.raises(StorageError, match=r"uploading part 2 .* 6 tries"):
        tier.put(name, random_bytes(LARGE_BYTES, 4))
    assert tier.head(name) is None
    assert uploads_of(s3, name) == []


def test_an_object_that_somebody_replaced_is_not_read_on(
    s3: S3Bucket, tier: RemoteTier, name: str
) -> None:
    """More than its end, which is read as it is opened."""
    tier.put(name, random_bytes(8192, 1))
    place = tier.location.removeprefix("s3://")
    with tier.read(name) as reader:
        s3.file_system().pipe_file(f"{place}/{name}", random_bytes(8192, 2))
        with pytest.raises(IntegrityError, match="somebody else writes there"):
            reader.read_into(0, bytearray(5))


# ------------------------------------------------------------------------------ what is not there


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_wrong_credentials_are_one_clear_line_without_the_secret(
    s3: S3Bucket,
    client: ObjectClientName,
    wrong: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bad = s3.tier("denied", client, options={wrong: "dontshowthis"})
    with pytest.raises(InvalidRequest, match="check the credentials") as caught:
        bad.open()
    told = caught.value.message + caplog.text
    assert s3.secret not in told
    assert wrong == "key" or "dontshowthis" not in told
    assert "\n" not in caught.value.message


def test_no_credentials_are_one_clear_line(s3: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    options = {"endpoint_url": s3.endpoint, "region": "us-east-1"}
    with pytest.raises(InvalidRequest, match="credentials"):
        RemoteTier("object", s3.url("x"), options=options).open()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_missing_bucket_is_one_clear_line_and_is_not_made(
    s3: S3Bucket, client: ObjectClientName
) -> None:
    missing = replace(s3, bucket="forebay-no-such-bucket")
    with pytest.raises(InvalidRequest, match=r"NoSuchBucket.* make the bucket"):
        missing.tier("x", client).open()
    assert not s3.file_system().exists("forebay-no-such-bucket")


def test_an_empty_place_to_recover_from_is_refused_and_nothing_is_made(s3: S3Bucket) -> None:
    with pytest.raises(NotFound, match="holds no manifests/"):
        s3.tier("nothing", must_have="manifests/").open()
    assert s3.file_system().find(s3.url("nothing")) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"endpoint": "http://x"}, "did you mean 'endpoint_url'"),
        ({"key": "only"}, "belong together"),
        ({"addressing_style": "odd"}, "auto, path or virtual"),
        ({"region": 5}, "has to be a text"),
    ],
)
def test_unknown_options_are_explained(options: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        RemoteTier("object", "s3://bucket/x", options=options).open()


def test_a_url_without_bucket_is_explained() -> None:
    with pytest.raises(InvalidRequest, match="write s3://BUCKET/PREFIX"):
        RemoteTier("object", "s3://").open()


# ------------------------------------------------------------------------------ left-over parts


def uploads_of(s3: S3Bucket, name: str) -> list[str]:
    files = s3.file_system()
    found = files.call_s3("list_multipart_uploads", Bucket=s3.bucket)
    return [one["Key"] for one in found.get("Uploads", []) if one["Key"].endswith(name)]


def leave_parts(s3: S3Bucket, place: str, name: str) -> None:
    """As a writer that was killed leaves them."""
    key = f"{s3.prefix}/{place}/{name}"
    files = s3.file_system()
    upload = files.call_s3("create_multipart_upload", Bucket=s3.bucket, Key=key)["UploadId"]
    files.call_s3(
        "upload_part",
        Bucket=s3.bucket,
        Key=key,
        UploadId=upload,
        PartNumber=1,
        Body=b"x" * (5 << 20),
    )


def test_left_over_parts_are_swept_once_they_are_old(s3: S3Bucket) -> None:
    name = f"data/{new_random_name()}"
    leave_parts(s3, "sweep", name)
    young = s3.tier("sweep")
    young.open()
    assert uploads_of(s3, name), "a day has not passed: they may be another writer's"
    young.close()
    old = s3.tier("sweep", left_over_seconds=-1)
    old.open()
    assert uploads_of(s3, name) == []
    leave_parts(s3, "elsewhere", name)
    old.sweep()
    assert uploads_of(s3, name), "not below this tier's prefix"
    old.close()


def test_a_sweep_spares_what_is_being_written(s3: S3Bucket) -> None:
    tier = s3.tier("spare", left_over_seconds=-1)
    tier.open()
    name, data = f"data/{new_random_name()}", random_bytes(LARGE_BYTES, 5)
    with tier.create(name, len(data)) as writer:
        writer.write(data)
        assert uploads_of(s3, name)
        tier.sweep()
        writer.publish()
    assert tier.get(name) == data
    tier.close()


# ------------------------------------------------------------------------------ the server dies


def test_a_server_that_is_killed_and_comes_back_has_what_it_acknowledged(tmp_path: Path) -> None:
    if seaweed_program() is None:
        pytest.skip(missing_s3({}) or "")
    data = random_bytes(LARGE_BYTES, 6)
    with SeaweedFS(tmp_path / "s3") as server:
        tier = make_bucket(server.endpoint, KEY, SECRET).tier("x")
        tier.open()
        tier.put("data/small", b"12345")
        tier.put("data/large", data)
        server.kill()
        with pytest.raises(StorageError, match=r"6 tries .* is the store up"):
            tier.head("data/small")
        server.start()
        assert tier.get("data/small") == b"12345"
        assert tier.get("data/large") == data
        tier.put("data/after", b"again")
        assert tier.get("data/after") == b"again"
        tier.close()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_store_that_ignores_conditions_can_only_cache(
    s3: S3Bucket, client: ObjectClientName
) -> None:
    if client == "obstore":
        pytest.importorskip("obstore")
    with FaultyProxy(s3.endpoint) as careless:
        careless.ignores_conditions = (s3.key, s3.secret)
        behind = replace(s3, endpoint=careless.endpoint)
        with pytest.raises(CannotGiveRemote, match="only if it does not exist"):
            behind.tier(f"careless-{client}", client).open()
        tier = behind.tier(f"careless-{client}", client, caches_only=True)
        tier.open()
        try:
            assert list(tier.list()) == []
            for num_bytes in (5, LARGE_BYTES):
                name, data = tier.blob_name(new_random_name()), random_bytes(num_bytes, 1)
                tier.put(name, data)
                with pytest.raises(AlreadyExists):
                    tier.put(name, data)
                assert tier.get(name) == data
        finally:
            tier.close()


OpenTier = Callable[..., RemoteTier]


@pytest.fixture(params=["s3fs", pytest.param("obstore", marks=pytest.mark.slow)])
def half_careless(s3: S3Bucket, request: pytest.FixtureRequest) -> Iterator[OpenTier]:
    """Opens tiers in one place of a store that creates exclusively in one call, and replaces by
    uploads in parts."""
    if request.param == "obstore":
        pytest.importorskip("obstore")
    with FaultyProxy(s3.endpoint) as proxy, ExitStack() as opened:
        proxy.ignores_conditions, proxy.ignores_in = (s3.key, s3.secret), ("POST",)
        behind = replace(s3, endpoint=proxy.endpoint)

        def open_tier(**arguments: Any) -> RemoteTier:
            tier = behind.tier(f"half-{request.param}", request.param, **arguments)
            tier.open()
            opened.callback(tier.close)
            return tier

        yield open_tier


def claims_of(s3: S3Bucket, tier: RemoteTier) -> list[str]:
    """Without the folder, which SeaweedFS shows."""
    place = f"{tier.location.removeprefix('s3://')}/tmp"
    return [found for found in s3.file_system().find(place) if found != place]


def test_a_large_object_replaces_none_though_the_store_would_let_it(
    s3: S3Bucket, half_careless: OpenTier
) -> None:
    tiers = [half_careless() for _ in range(3)]  # as three daemons have them
    name = tiers[0].blob_name(new_random_name())
    data = [random_bytes(LARGE_BYTES, seed) for seed in range(3)]
    won = publish_at_once(
        tiers, name, LARGE_BYTES, lambda writer, number: writer.write(data[number])
    )
    assert len(won) == 1
    with pytest.raises(AlreadyExists):
        tiers[0].put(name, data[won[0] - 1])
    assert tiers[0].get(name) == data[won[0]]
    assert claims_of(s3, tiers[0]) == []


def test_a_claim_keeps_others_out_until_it_is_old(s3: S3Bucket, half_careless: OpenTier) -> None:
    """As a writer that was killed between its claim and its object leaves it."""
    tier = half_careless()
    name, data = tier.blob_name(new_random_name()), random_bytes(LARGE_BYTES, 1)
    place = tier.location.removeprefix("s3://")
    s3.file_system().pipe_file(f"{place}/tmp/{name}", b"another's")
    with pytest.raises(AlreadyExists):
        tier.put(name, data)
    assert tier.head(name) is None
    assert name not in {info.name.removeprefix("tmp/") for info in tier.list()}
    tier.sweep()
    assert claims_of(s3, tier) != [], "a day has not passed"
    half_careless(left_over_seconds=-60)
    assert claims_of(s3, tier) == []
    tier.put(name, data)
    assert tier.get(name) == data
