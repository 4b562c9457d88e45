"""A whole daemon without its edges, in a process of its own: driven call by call, and killed."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import traceback
from collections.abc import Mapping
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Final, Self

from forebay_server.background import Background
from forebay_server.config import load_config
from forebay_server.daemon import Daemon
from forebay_server.folder import FolderLock, load_node
from forebay_server.testing.engine_calls import EngineCalls
from forebay_wire.errors import ForebayError

CALL_SECONDS: Final = 90.0
STOP_SECONDS: Final = 40.0


class EngineDied(Exception):
    """The engine's process is dead: nobody knows what became of the call."""


class EngineFailed(Exception):
    """A call raised something that is not for its caller; carries the traceback."""


class EngineProcess:
    """Storage, serving and movement of one daemon on one data folder, wired as the daemon does it.

    It has no sockets: :meth:`call` runs a method of :class:`EngineCalls` in it. Not thread-safe.
    The processes are forked from a small one that has imported everything, so that a start takes
    milliseconds.
    """

    def __init__(self, data: Path, settings: Mapping[str, Any]) -> None:
        self.data = data
        self._settings = dict(settings)
        self._process: Any = None

    def start(self) -> Self:
        """Start it, and wait until it has recovered and works."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, str(self.data), self._settings), daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive()
        return self

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of that method of :class:`EngineCalls`, or what it raised."""
        self.send(name, *arguments)
        return self._receive()

    def send(self, name: str, *arguments: Any) -> None:
        """Have a call begun and do not wait: for an engine that is killed next."""
        try:
            self._pipe.send((name, arguments))
        except OSError:
            raise self._died() from None

    def kill(self) -> None:
        """End it with SIGKILL. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None
            self._pipe.close()

    def stop(self) -> None:
        """End it as a daemon ends. Idempotent."""
        if self._process is None:
            return
        self.send("")
        self._process.join(STOP_SECONDS)
        code = self._process.exitcode
        self.kill()
        if code:
            raise EngineFailed(f"the engine ended with {code}")

    def _receive(self) -> Any:
        try:
            if not self._pipe.poll(CALL_SECONDS):
                raise EngineFailed(f"no answer in {CALL_SECONDS} s")
            has_worked, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if has_worked:
            return value
        raise value

    def _died(self) -> EngineDied:
        self._process.join()
        code = self._process.exitcode
        self.kill()
        if code != -signal.SIGKILL:
            raise EngineFailed(f"the engine ended by itself, with {code}")
        return EngineDied("killed")


def _serve(pipe: Pipe, data: str, settings: dict[str, Any]) -> None:
    Path(data).mkdir(parents=True, exist_ok=True)
    asyncio.run(_run(pipe, Path(data), settings))


async def _run(pipe: Pipe, data: Path, settings: dict[str, Any]) -> None:
    """The engine's life: until the parent says so, or is gone."""
    daemon = Daemon(load_config({"data": data, **settings}, {}).config, started=lambda lines: None)
    with FolderLock(data):
        async with AsyncExitStack() as stack:
            await _start(daemon, data, stack)
            calls = EngineCalls(daemon)
            pipe.send((True, None))
            while (asked := await asyncio.to_thread(_next, pipe)) is not None:
                pipe.send(await _answer(calls, *asked))
            await calls.close()
            daemon._jobs.stop()
            await asyncio.wait([daemon._jobs_task], timeout=STOP_SECONDS / 2)


async def _start(daemon: Daemon, data: Path, stack: AsyncExitStack) -> None:
    """As :meth:`Daemon._start`, without what others could connect to."""
    daemon._node = load_node(data)
    daemon._background = Background(daemon._crash)
    await daemon._open_storage(stack)
    await daemon._open_use_cases(stack)
    await daemon._recover()
    await daemon._start_background(stack)


def _next(pipe: Pipe) -> tuple[str, tuple[Any, ...]] | None:
    try:
        name, arguments = pipe.recv()
    except EOFError:
        return None
    return (name, arguments) if name else None


async def _answer(calls: EngineCalls, name: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, await getattr(calls, name)(*arguments)
    except ForebayError as error:
        return False, type(error)(error.message)
    except Exception:  # noqa: BLE001 - goes to the caller, who fails with it
        return False, EngineFailed(traceback.format_exc())
