"""Slots that ranks have asked for before they know what goes there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from forebay_server.publish.lease import Grant, Uploads
from forebay_server.publish.session import slot_owner
from forebay_wire.errors import ForebayError


@dataclass(frozen=True)
class _Begun:
    grant: asyncio.Task[Grant]
    total_bytes: int


class Ahead:
    """At most one upload session of each owner that is for no pack yet. Belongs to the event loop.

    Such a session holds a slot and room like any other, lives by its client's renewals, and becomes
    that of the owner's next pack if that fits it.
    """

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._begun: dict[str, _Begun] = {}
        uploads.listen(self._ended)

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
            begun = self._begun[name] = _Begun(asyncio.create_task(work), total_bytes)
        try:
            return await asyncio.shield(begun.grant)
        except ForebayError:
            self._forget(name, begun)
            raise

    async def take(self, uid: int, owner: str, total_bytes: int, slot_bytes: int) -> Grant | None:
        """The owner's session, for a pack of so many bytes; None if it has none that fits. It is
        the caller's from here on; one that does not fit ends, and its slot stays warm."""
        begun = self._begun.pop(slot_owner(uid, owner), None)
        if begun is None:
            return None
        try:
            grant = await asyncio.shield(begun.grant)
            if grant.slot_bytes >= slot_bytes and begun.total_bytes >= total_bytes:
                return grant
            await self._uploads.abort(grant.session, uid)
        except ForebayError:
            return None
        return None

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

    async def _ended(self, session: str) -> None:
        for name, begun in list(self._begun.items()):
            task = begun.grant
            if not task.done() or task.cancelled() or task.exception() is not None:
                continue
            if task.result().session == session:
                self._forget(name, begun)

    def _forget(self, name: str, begun: _Begun) -> None:
        if self._begun.get(name) is begun:
            del self._begun[name]
