"""Slots: where an upload's bytes are laid down, locally and by HTTP."""

import random

import numpy as np
import pytest

import forebay
from forebay.dataset import write
from forebay.methods import Blobs
from forebay.testing.blobs import store_blob
from forebay.transfer import local
from forebay_wire.limits import MIB
from forebay_wire.segments import even_cuts
from forebay_wire.v1 import blobs_pb2


def begin(client: forebay.Client, num_bytes: int) -> blobs_pb2.UploadSession:
    request = blobs_pb2.BeginUploadRequest(
        total_bytes=num_bytes, slot_bytes=num_bytes, owner="test"
    )
    return client.channel.call(Blobs.BeginUpload, request)


def seal(client: forebay.Client, session: str, num_bytes: int, sequence: int = 0) -> str:
    request = blobs_pb2.SealRequest(
        session=session, sequence=sequence, num_bytes=num_bytes, cuts=even_cuts(num_bytes)
    )
    return client.channel.call(Blobs.Seal, request).blob


@pytest.mark.parametrize("num_bytes", [1, 4095, 70 * MIB + 3])
def test_what_was_written_is_read(client: forebay.Client, num_bytes: int) -> None:
    content = random.Random(num_bytes).randbytes(num_bytes)
    [blob] = client.transfer.open([store_blob(client, content)])
    buffer = bytearray(num_bytes)
    blob.read_into(0, buffer)
    assert buffer == content


def test_slot_is_used_again_after_an_append(client: forebay.Client) -> None:
    session = begin(client, 1000)
    with client.transfer.upload_slot(session.session, 1000, session.put_ticket) as slot:
        slot.buffer[:600] = b"a" * 600
        slot.flush(600)
        client.channel.call(
            Blobs.Append,
            blobs_pb2.AppendRequest(session=session.session, sequence=0, num_bytes=600, cuts=[600]),
        )
        slot.buffer[:400] = b"b" * 400
        slot.flush(400)
        stored = seal(client, session.session, 400, sequence=1)
    [blob] = client.transfer.open([stored])
    assert blob.map() == b"a" * 600 + b"b" * 400


def test_a_writer_maps_each_slot_once(
    client: forebay.Client, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots take turns; mapping one anew would fault in all its pages."""
    if way == "http":
        pytest.skip("over HTTP nothing is mapped")
    mapped = []

    class CountedMemory(local._SlotMemory):
        def __init__(self, descriptor: int, capacity: int) -> None:
            mapped.append(capacity)
            super().__init__(descriptor, capacity)

    monkeypatch.setattr(local, "_SlotMemory", CountedMemory)
    with client.create_dataset("turns", shard_bytes=MIB) as writer:
        for number in range(24):
            writer.write(x=np.full(MIB // 2, number, np.uint8))
    assert len(client.dataset("turns").manifest.shards) > 10
    assert len(mapped) <= 1 + write.NUM_SEALING


def test_ticket_that_is_over_is_renewed(client: forebay.Client) -> None:
    session = begin(client, 10)

    def renew() -> str:
        request = blobs_pb2.RenewRequest(session=session.session)
        return client.channel.call(Blobs.Renew, request).put_ticket

    with client.transfer.upload_slot(session.session, 10, "no-ticket", renew) as slot:
        slot.buffer[:10] = b"0123456789"
        slot.flush(10)
        stored = seal(client, session.session, 10)
    [blob] = client.transfer.open([stored])
    assert blob.map() == b"0123456789"


def test_slot_of_an_unknown_session(client: forebay.Client) -> None:
    with (
        pytest.raises(forebay.ForebayError, match=r"session|ticket"),
        client.transfer.upload_slot("0" * 32, 10, "no-ticket") as slot,
    ):
        slot.flush(10)
