"""What readers without gRPC ask of datasets, alike on both byte endpoints."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any, Final

from forebay_server.catalog.queries_decisions import Choice, Followed, Question
from forebay_server.publish.following import Following
from forebay_wire.errors import InvalidRequest

DECIDE: Final = "decide_version"
MANIFEST: Final = "manifest"
FOLLOW_OPERATIONS: Final = frozenset({DECIDE, MANIFEST})


async def answer_decision(following: Following, body: dict[str, Any]) -> dict[str, Any]:
    """{reader, epoch, datasets: [{dataset, selection, base}], proposed: [{manifest, selection}]}
    -> {is_decided, datasets: [{version, manifest, selection, newest}]}"""
    epoch = body.get("epoch")
    if type(epoch) is not int:
        raise InvalidRequest("a decision needs a number 'epoch'")
    followed = [
        Followed(*(asked_text(one, key) for key in ("dataset", "selection", "base")))
        for one in _asked_objects(body, "datasets")
    ]
    asked = Question(asked_text(body, "reader"), epoch, tuple(followed))
    if body.get("proposed") is None:
        return asdict(await following.look(asked))
    proposed = [
        Choice(asked_text(one, "manifest"), asked_text(one, "selection"))
        for one in _asked_objects(body, "proposed")
    ]
    return asdict(await following.decide(asked, proposed))


def _asked_objects(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The list *key* of objects of a request."""
    found = body.get(key)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InvalidRequest(f"a decision needs a list of objects {key!r}")
    return found


def asked_text(body: dict[str, Any], key: str) -> str:
    """The text *key* of a request."""
    value = body.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"the request needs a text {key!r}")
    return value


def as_memory_file(data: bytes) -> int:
    """A descriptor of a file in memory that holds *data*; the caller closes it."""
    descriptor = os.memfd_create("forebay-manifest", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
