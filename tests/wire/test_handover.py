"""Frames of the descriptor socket over a real socket pair, whole, in pieces, and broken."""

import os
import resource
import socket
import threading

import pytest

from forebay_wire.errors import DaemonUnavailable, InvalidRequest, NotFound
from forebay_wire.handover import (
    HEADER,
    MAGIC,
    VERSION,
    decode_body,
    decode_header,
    encode_frame,
    raise_if_error,
    receive_frame,
    send_frame,
)
from forebay_wire.limits import MAX_DESCRIPTORS_PER_MESSAGE


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    left.settimeout(20)
    right.settimeout(20)
    with left, right:
        yield left, right


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_body_and_its_descriptors_arrive(pair, pipe):
    left, right = pair
    send_frame(left, {"blobs": ["a"]}, [pipe[1]])
    body, descriptors = receive_frame(right)
    assert body == {"blobs": ["a"]}
    assert not os.get_inheritable(descriptors[0])
    os.write(descriptors[0], b"x")
    os.close(descriptors[0])
    assert os.read(pipe[0], 1) == b"x"


def test_frames_keep_their_order_and_borders(pair):
    left, right = pair
    for number in range(20):
        send_frame(left, {"number": number}, [])
    assert [receive_frame(right)[0]["number"] for _ in range(20)] == list(range(20))


def test_a_frame_that_comes_in_pieces_is_put_together(pair):
    left, right = pair
    frame = encode_frame({"text": "x" * 1000})

    def drip():
        for byte in frame:
            left.send(bytes([byte]))

    sender = threading.Thread(target=drip)
    sender.start()
    assert receive_frame(right)[0] == {"text": "x" * 1000}
    sender.join()


def test_as_many_descriptors_as_a_message_may_carry_arrive(pair, pipe):
    left, right = pair
    send_frame(left, {}, [pipe[0]] * MAX_DESCRIPTORS_PER_MESSAGE)
    _, descriptors = receive_frame(right)
    for descriptor in descriptors:
        os.close(descriptor)
    assert len(descriptors) == MAX_DESCRIPTORS_PER_MESSAGE


def test_a_closed_connection_is_an_absent_daemon(pair):
    left, right = pair
    left.send(encode_frame({"a": 1})[:-1])
    left.close()
    with pytest.raises(DaemonUnavailable, match="closed"):
        receive_frame(right)


def test_missing_descriptors_are_named_and_those_that_came_are_closed(pair, pipe):
    left, right = pair
    before = open_files()
    socket.send_fds(left, [encode_frame({}, 2)], [pipe[0]])
    with pytest.raises(InvalidRequest, match="ulimit -n"):
        receive_frame(right)
    assert open_files() == before


def test_descriptors_beyond_the_limit_of_open_files_are_an_error(pair, pipe):
    left, right = pair
    send_frame(left, {}, [pipe[0]] * 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_files()
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    third_free = [number for number in range(max(used) + 4) if number not in used][2]
    resource.setrlimit(resource.RLIMIT_NOFILE, (third_free, hard))
    try:
        with pytest.raises(InvalidRequest, match="ulimit -n"):
            receive_frame(right)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_files() == before


@pytest.mark.parametrize("magic", [b"HTTP", b"FBDX"])
def test_something_else_than_a_frame_is_refused(magic):
    with pytest.raises(InvalidRequest, match="not a Forebay"):
        decode_header(HEADER.pack(magic, VERSION, 0, 0))


def test_a_frame_of_another_version_is_refused():
    with pytest.raises(InvalidRequest, match="version 1"):
        decode_header(HEADER.pack(MAGIC, VERSION + 1, 0, 0))


@pytest.mark.parametrize("payload", [b"", b"{", b"[1]", b'"text"', b"\xff"])
def test_a_body_that_is_no_json_object_is_refused(payload):
    with pytest.raises(InvalidRequest, match="JSON"):
        decode_body(payload)


def test_an_error_crosses_as_the_exception_it_was():
    with pytest.raises(NotFound, match="no such blob"):
        raise_if_error({"error": "NotFound", "message": "no such blob"})
    assert raise_if_error({"blobs": []}) == {"blobs": []}
