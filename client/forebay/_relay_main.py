"""The process that makes the control calls of a forked child. See :mod:`forebay._relay`."""

from __future__ import annotations

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Final

from forebay import methods
from forebay._channel import RpcChannel
from forebay._relay import address_of, pack, unpack
from forebay.methods import Method
from forebay_wire.errors import ForebayError

MAX_CALLS: Final = 32
"""At a time; more wait for their turn."""


def main(descriptor: int) -> None:
    """Make the calls that come over *descriptor* until its other end is closed; then end at once,
    whatever still goes on: nobody wants the answers."""
    connection = Connection(descriptor)
    sending = threading.Lock()
    channel: RpcChannel | None = None

    def answer(channel: RpcChannel, header: dict[str, Any], request: bytes) -> None:
        answered = _answer(channel, header, request)
        try:
            with sending:
                connection.send_bytes(answered)
        except OSError:
            os._exit(0)

    with ThreadPoolExecutor(MAX_CALLS) as calls:
        try:
            while True:
                header, [request] = unpack(connection.recv_bytes())
                if channel is None:
                    channel = RpcChannel(address_of(header["address"]))
                calls.submit(answer, channel, header, request)
        except (EOFError, OSError):
            os._exit(0)


def _answer(channel: RpcChannel, header: dict[str, Any], request: bytes) -> bytes:
    found: list[bytes] = []
    error: tuple[str, str] | None = None
    try:
        if "address" in header:
            channel.connect(header["seconds"], may_start=header["may_start"])
            channel.attach()
        else:
            found = _call(channel, header, request)
    except ForebayError as failure:
        error = type(failure).__name__, str(failure)
    except Exception as failure:  # noqa: BLE001 - whoever called has to hear of it
        error = ForebayError.__name__, f"{type(failure).__name__}: {failure}"
    endpoint = None if channel.endpoint is None else dataclasses.asdict(channel.endpoint)
    return pack({"number": header["number"], "error": error, "endpoint": endpoint}, found)


def _call(channel: RpcChannel, header: dict[str, Any], request: bytes) -> list[bytes]:
    method = _method(header["path"])
    make = channel.collect if header["is_stream"] else channel.call
    parsed = method.request.FromString(request)
    made = make(method, parsed, timeout=header["seconds"], wait_for_daemon=False)
    return [one.SerializeToString() for one in (made if isinstance(made, list) else [made])]


def _method(path: str) -> Method[Any, Any]:
    services = (one for one in vars(methods).values() if isinstance(one, type))
    known = (one for service in services for one in vars(service).values())
    return next(one for one in known if isinstance(one, Method) and one.path == path)
