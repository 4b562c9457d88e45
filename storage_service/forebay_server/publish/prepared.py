"""Slots that ranks have asked for before they know what goes there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from forebay_server.catalog.engine import Connection
from forebay_server.publish.lease import Grant, Uploads
from forebay_server.publish.session import slot_owner
from forebay_wire.errors import ForebayError, NotFound

T = TypeVar("T")


@dataclass(frozen=True)
class _Begun:
    grant: asyncio.Task[Grant]
    total_bytes: int


class PreparedSessions:
    """At most one upload session of each owner that is for no pack yet. Belongs to the event loop.

    Such a session holds a slot and room, lives by its client's renewals, and becomes that of the
    owner's next pack if that fits it. It ends when somebody needs what it holds.
    """

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._begun: dict[str, _Begun] = {}
        uploads.listen(self._ended)
        uploads.slots.may_take_from(self)

    def __len__(self) -> int:
        return len(self._begun)

    def has(self, owner: str) -> bool:
        """Whether *owner* (:func:`~forebay_server.publish.session.slot_owner`) has one."""
        return owner in self._begun

    async def begin(
        self, uid: int, owner: str, total_bytes: int, slot_bytes: int, new_bytes: int
    ) -> Grant:
        """The owner's session, begun if there is none; as :meth:`Uploads.begin`, without waiting
        for anybody's memory."""
        name = slot_owner(uid, owner)
        begun = self._begun.get(name)
        if begun is None:
            work = self._uploads.begin(
                uid, owner, total_bytes, slot_bytes, new_bytes=new_bytes, is_ahead=True
            )
            task = asyncio.create_task(work)
            begun = self._begun[name] = made = _Begun(task, total_bytes)
            task.add_done_callback(lambda done: self._forget_failed(name, made))
        return await asyncio.shield(begun.grant)

    async def use(
        self,
        uid: int,
        owner: str,
        total_bytes: int,
        slot_bytes: int,
        bind: Callable[[Connection, str], T],
    ) -> tuple[Grant, T] | None:
        """The owner's session, bound to a pack of so many bytes as by :meth:`Uploads.bind`; None if
        there is none that fits. One that does not ends, and its slot stays warm. If *bind* raises
        it is still for no pack."""
        name = slot_owner(uid, owner)
        begun = self._begun.pop(name, None)
        if begun is None:
            return None
        try:
            grant = await asyncio.shield(begun.grant)
        except ForebayError:
            return None
        if grant.slot_bytes < slot_bytes or begun.total_bytes < total_bytes:
            await self._uploads.abort(grant.session, uid)
            return None
        try:
            return grant, await self._uploads.bind(grant.session, uid, bind)
        except (
            NotFound
        ):  # the session has expired; or what it is bound to, which is found out again
            return None
        except ForebayError:
            self._begun.setdefault(name, begun)
            raise

    async def give_up(self, uid: int, owner: str) -> None:
        """End the owner's session, which its client does not use; the slot stays warm."""
        begun = self._begun.pop(slot_owner(uid, owner), None)
        if begun is None:
            return
        try:
            grant = await asyncio.shield(begun.grant)
            await self._uploads.abort(grant.session, uid)
        except ForebayError:
            return

    async def drop(self, owner: str) -> None:
        """End the owner's session, whose client does not know: its slot is not used again."""
        begun = self._begun.pop(owner, None)
        if begun is None:
            return
        try:
            grant = await asyncio.shield(begun.grant)
        except ForebayError:
            return
        await self._uploads.end([grant.session])

    async def free_one(self) -> bool:
        """End the session that has been there longest, for somebody who needs what it holds;
        whether there was one."""
        for owner in self._begun:
            await self.drop(owner)
            return True
        return False

    async def _ended(self, session: str) -> None:
        for name, begun in list(self._begun.items()):
            task = begun.grant
            if not task.done() or task.cancelled() or task.exception() is not None:
                continue
            if task.result().session == session:
                self._forget(name, begun)

    def _forget_failed(self, name: str, begun: _Begun) -> None:
        if begun.grant.cancelled() or begun.grant.exception() is not None:
            self._forget(name, begun)

    def _forget(self, name: str, begun: _Begun) -> None:
        if self._begun.get(name) is begun:
            del self._begun[name]
