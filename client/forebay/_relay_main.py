"""The process that makes the control calls of a forked child. See :mod:`forebay._relay`."""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from typing import Any

from forebay import methods
from forebay._channel import RpcChannel
from forebay._relay import Answer, Call
from forebay.address import Address
from forebay.methods import Method
from forebay_wire.errors import ForebayError


def main() -> None:
    """Make the calls that come over the descriptor in the arguments until its other end is closed.

    The process of a :class:`Relay`.
    """
    connection = Connection(int(sys.argv[1]))
    address: Address = connection.recv()
    channel = RpcChannel(address)
    try:
        while True:
            connection.send(_answer(channel, connection.recv()))
            channel.attach()
    except (EOFError, OSError):
        return  # whom we worked for has ended
    finally:
        channel.close()


def _answer(channel: RpcChannel, call: Call) -> Answer:
    try:
        if not call.path:
            return Answer([], channel.connect(call.seconds, may_start=call.may_start))
        method = _method(call.path)
        request = method.request.FromString(call.request)
        make = channel.collect if call.is_stream else channel.call
        made = make(method, request, timeout=call.seconds, wait_for_daemon=False)
        found = made if isinstance(made, list) else [made]
        return Answer([one.SerializeToString() for one in found], channel.endpoint)
    except ForebayError as error:
        return Answer([], channel.endpoint, (type(error).__name__, str(error)))


def _method(path: str) -> Method[Any, Any]:
    services = (one for one in vars(methods).values() if isinstance(one, type))
    known = (one for service in services for one in vars(service).values())
    return next(one for one in known if isinstance(one, Method) and one.path == path)
