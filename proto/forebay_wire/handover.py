"""The framed protocol of the descriptor socket: small JSON frames, descriptors beside them.

One request, one answer, in order, on each connection. A frame is a header and a JSON object; up to
64 descriptors ride on the answer's first byte (SCM_RIGHTS). Both sides use this module; the byte
table and the operations are in ``docs/formats/descriptor-socket.md``.

Operations (request -> answer):
``hello``    {protocol, pid, name} -> {protocol, node, incarnation, token, http_url}
``open``     {blobs: [id]} -> {blobs: [entry], waits: {reason: seconds}}; no ``waits`` if all was
             open already; an entry is
             {blob, length, tier, table: [fd, offset, length],
              extents: [[blob_offset, fd, file_offset, length]]}
             where fd is the index of a descriptor of this answer, or
             {blob, length, by_http: true} for one that cannot be mapped now, as it lies in a slow
             tier: open it at the byte endpoint, where it comes as it arrives; or
             {blob, error, message} for one that could not be opened
``release``  {blobs: [id]} -> {}       each open is released once; a closed connection releases all
``report``   {blob, tier, segment, message} -> {blob, healthy}   the client found damage: the daemon
             reads that replica again, quarantines it if it is bad, and says so
``slot``     {session} -> {capacity} and one writable descriptor of the upload session's slot
``plan``     {plan, loader, order: {manifest, selection, shuffle, seed, global_batch_size,
             last_batch, rank, num_ranks, num_epochs}, epoch, position} -> standing
             or {plan, loader, manifest, plan_bytes, epoch: 0, position}, told in turns
``turns``    {plan, page, turns: [[samples, [shard number]]]} -> standing
``position`` {plan, epoch, position} -> standing: {plan, lease_seconds, waits, fit}; what it means
             is in ``plans.proto``. A plan ends with the connection that registered it
``end_plan`` {plan} -> {existed}; this, ``plan`` and ``position`` may carry {times}, the sums of
             the loader
``decide_version`` {reader, epoch, datasets: [{dataset, selection, base}], proposed} ->
             {is_decided, datasets: [{version, manifest, selection, newest}]}: what the *reader*
             (all its ranks and workers) reads of its datasets in an epoch. As long as nobody
             decided, it is the newest version of each that has the selection of that name (empty:
             the whole version), for the reader to propose these or others, of all datasets
             together: {proposed: [{manifest, selection}]}, of which the first one counts. *base*:
             manifest of the version that it read before
``manifest`` {manifest} -> {num_bytes} and one descriptor of a file with the manifest's bytes
The answers to ``open`` and to the operations of plans may also carry {wanted_back: [id]}: blobs
that this connection has open and whose room the daemon needs for what is read sooner.
An answer {error, message} stands for an exception of ``forebay_wire.errors``.
"""

from __future__ import annotations

import array
import json
import socket
import struct
from typing import Any, Final

from forebay_wire.errors import DaemonUnavailable, InvalidRequest, rebuild
from forebay_wire.limits import MAX_DESCRIPTORS_PER_MESSAGE, MAX_FRAME_BYTES

HEADER: Final = struct.Struct("<4sHHI")
"""magic, version u16, number of descriptors u16, body length u32."""

MAGIC: Final = b"FBDS"
VERSION: Final = 1


def encode_frame(body: dict[str, Any], num_descriptors: int = 0) -> bytes:
    """The bytes of one frame."""
    payload = json.dumps(body, separators=(",", ":")).encode()
    if len(payload) > MAX_FRAME_BYTES:
        raise InvalidRequest(f"frame of {len(payload)} bytes; the limit is {MAX_FRAME_BYTES}")
    return HEADER.pack(MAGIC, VERSION, num_descriptors, len(payload)) + payload


def decode_header(data: bytes) -> tuple[int, int]:
    """``(number of descriptors, body length)`` of a frame's first 12 bytes."""
    magic, version, num_descriptors, length = HEADER.unpack(data)
    if magic != MAGIC or version != VERSION:
        raise InvalidRequest("not a Forebay descriptor socket frame of version 1")
    if length > MAX_FRAME_BYTES or num_descriptors > MAX_DESCRIPTORS_PER_MESSAGE:
        raise InvalidRequest(f"frame of {length} bytes, {num_descriptors} descriptors: too large")
    return num_descriptors, length


def decode_body(payload: bytes) -> dict[str, Any]:
    """The JSON object of a frame."""
    try:
        body = json.loads(payload)
    except ValueError as error:
        raise InvalidRequest("frame body is no JSON") from error
    if not isinstance(body, dict):
        raise InvalidRequest("frame body is no JSON object")
    return body


def send_frame(sock: socket.socket, body: dict[str, Any], descriptors: list[int]) -> None:
    """Send one frame, blocking; *descriptors* stay open here."""
    frame = encode_frame(body, len(descriptors))
    sent = socket.send_fds(sock, [frame], descriptors) if descriptors else sock.send(frame)
    if sent < len(frame):
        sock.sendall(frame[sent:])


def receive_frame(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive one frame, blocking: ``(body, descriptors)``; the caller closes the descriptors.

    Raises :class:`DaemonUnavailable` if the other side closed the connection.
    """
    head, descriptors = _receive_descriptors(sock, HEADER.size)
    try:
        if len(head) < HEADER.size:
            head += _receive_exactly(sock, HEADER.size - len(head))
        num_descriptors, length = decode_header(head)
        if num_descriptors != len(descriptors):
            raise InvalidRequest(
                f"frame announced {num_descriptors} descriptors and carried {len(descriptors)}: "
                "raise the limit of open files (ulimit -n)"
            )
        return decode_body(_receive_exactly(sock, length)), descriptors
    except BaseException:
        _close_all(descriptors)
        raise


def raise_if_error(body: dict[str, Any]) -> dict[str, Any]:
    """*body*, unless it stands for an exception: then that one."""
    if "error" in body:
        raise rebuild(str(body["error"]), "UNKNOWN", str(body.get("message", "")))
    return body


def _receive_descriptors(sock: socket.socket, num_bytes: int) -> tuple[bytes, list[int]]:
    """Up to *num_bytes* and the descriptors on them, none of which a child program inherits.

    Not ``socket.recv_fds``: it ignores its flags (CPython 3.11), so every program started later
    would inherit the descriptors.
    """
    found = array.array("i")
    room = socket.CMSG_LEN(MAX_DESCRIPTORS_PER_MESSAGE * found.itemsize)
    data, messages, _, _ = sock.recvmsg(num_bytes, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    return data, found.tolist()


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = sock.recv(count)
        if not part:
            raise DaemonUnavailable("the daemon closed the descriptor socket")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        socket.close(descriptor)
