"""Sends stretches of files, and memory, into HTTP connections as fast as the kernel moves them.

Files go by sendfile. Threads do it: so streams run on several cores, and the event loop never waits
for a disk (1.0 to 1.5 times the rate of asyncio's own sendfile). A reader that is slower than a
thread's patience is left to asyncio, so that slow readers hold no threads.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

from aiohttp import web

from forebay_wire.limits import MIB

WINDOW_BYTES: Final = 16 * MIB
"""A stretch is sent in pieces of this size: after each one other connections get a turn."""

NUM_THREADS: Final = 16

PATIENCE_SECONDS: Final = 0.1
"""How long a thread waits for a reader to take more."""

SEND_SECONDS: Final = 60.0
"""Longest time for one window: a client that reads slower than 280 KB/s is cut off."""


ENCRYPTED_BYTES: Final = 1 * MIB
"""Read and encrypted at a time."""


@dataclass(frozen=True)
class FilePiece:
    """*count* bytes from *offset* of an open file, whose owner closes it."""

    descriptor: int
    offset: int
    count: int


class Sender:
    """Sends for all connections. Belongs to the event loop; ``close`` ends its threads."""

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="range-send")

    def close(self) -> None:
        """Wait for running windows. Idempotent."""
        self._threads.shutdown()

    async def send(
        self, response: web.StreamResponse, transport: asyncio.Transport, piece: FilePiece
    ) -> None:
        """Send *piece* as a body of *response*, which was prepared on *transport*.

        The descriptor is not used any more after the end, also after an error: ConnectionError (the
        client went, or the file is shorter), TimeoutError (the client is too slow), OSError.
        """
        descriptor, offset, count = piece.descriptor, piece.offset, piece.count
        if transport.get_extra_info("sslcontext") is not None:
            await self._send_encrypted(response, descriptor, offset, count)
            return
        while count:
            window = min(count, WINDOW_BYTES)
            sent = await self._send_by_thread(
                transport, partial(_send_file, descriptor=descriptor, offset=offset, count=window)
            )
            if sent < window:
                await _send_by_loop(transport, descriptor, offset + sent, window - sent)
            offset, count = offset + window, count - window

    async def send_memory(self, transport: asyncio.Transport, view: memoryview) -> int:
        """Send *view*, a window at most, as far as the client takes it without letting us wait; how
        many bytes. It may be overwritten afterwards."""
        if transport.get_extra_info("sslcontext") is not None:
            return 0
        return await self._send_by_thread(transport, partial(_send_view, view=view))

    async def send_rest(
        self, response: web.StreamResponse, transport: asyncio.Transport, data: bytes
    ) -> None:
        """Send *data*, as fast as the client takes it."""
        if transport.is_closing():
            raise ConnectionResetError("the client went away")
        async with asyncio.timeout(SEND_SECONDS):
            if transport.get_extra_info("sslcontext") or transport.get_write_buffer_size():
                await response.write(data)
                return
            with _own_socket(transport) as sock:  # none of it waits in the transport's buffer
                sock.setblocking(False)
                await asyncio.get_running_loop().sock_sendall(sock, data)

    async def _send_by_thread(
        self, transport: asyncio.Transport, send: Callable[[int], int]
    ) -> int:
        """How many bytes the client took without letting us wait; *send* sends them, given the
        descriptor of a socket."""
        if transport.is_closing():
            raise ConnectionResetError("the client went away")
        if transport.get_write_buffer_size():
            return 0
        with _own_socket(transport) as sock:
            sending = asyncio.get_running_loop().run_in_executor(self._threads, send, sock.fileno())
            try:
                return await asyncio.shield(sending)
            except asyncio.CancelledError:
                sock.shutdown(socket.SHUT_RDWR)
                await asyncio.wait([sending])
                raise

    async def _send_encrypted(
        self, response: web.StreamResponse, descriptor: int, offset: int, count: int
    ) -> None:
        """Through this process: TLS has to see the bytes."""
        loop = asyncio.get_running_loop()
        while count:
            size = min(count, ENCRYPTED_BYTES)
            data = await loop.run_in_executor(self._threads, os.pread, descriptor, size, offset)
            if not data:
                raise ConnectionResetError(f"the file ended at byte {offset}")
            async with asyncio.timeout(SEND_SECONDS):
                await response.write(data)
            offset, count = offset + len(data), count - len(data)


def _own_socket(transport: asyncio.Transport) -> socket.socket:
    """A descriptor of its own: the transport may close its one while others send."""
    return socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))


def _send_view(sock: int, view: memoryview) -> int:
    """Send until all is sent or the reader takes nothing for a while; how many bytes."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    sent = 0
    while sent < len(view):
        try:
            sent += os.write(sock, view[sent:])
        except BlockingIOError:
            if not poller.poll(PATIENCE_SECONDS * 1000):
                break
    return sent


def _send_file(sock: int, descriptor: int, offset: int, count: int) -> int:
    """The same of a stretch of a file."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    sent = 0
    while sent < count:
        try:
            done = os.sendfile(sock, descriptor, offset + sent, count - sent)
        except BlockingIOError:
            if not poller.poll(PATIENCE_SECONDS * 1000):
                os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_WILLNEED)
                return sent
            continue
        if done == 0:
            raise ConnectionResetError(f"the file ended at byte {offset + sent}")
        sent += done
    return sent


async def _send_by_loop(
    transport: asyncio.Transport, descriptor: int, offset: int, count: int
) -> None:
    file = cast("Any", _Descriptor(descriptor))
    async with asyncio.timeout(SEND_SECONDS):
        sent = await asyncio.get_running_loop().sendfile(transport, file, offset, count)
    if sent != count:
        raise ConnectionResetError(f"the file ended at byte {offset + sent}")


class _Descriptor:
    """What asyncio's sendfile wants of a file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor
