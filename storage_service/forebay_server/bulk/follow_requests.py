"""What readers without gRPC ask of datasets, alike on both byte endpoints."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any, Final

from forebay_server.catalog.queries_decisions import Choice, Question
from forebay_server.publish.following import Following
from forebay_wire.errors import InvalidRequest

DECIDE: Final = "decide_version"
MANIFEST: Final = "manifest"
FOLLOW_OPERATIONS: Final = frozenset({DECIDE, MANIFEST})


async def answer_decision(following: Following, body: dict[str, Any]) -> dict[str, Any]:
    """{reader, dataset, selection, epoch, base, proposed} -> {version, manifest, selection,
    newest, is_decided}"""
    epoch = body.get("epoch")
    if type(epoch) is not int:
        raise InvalidRequest("a decision needs a number 'epoch'")
    texts = {key: asked_text(body, key) for key in ("reader", "dataset", "selection", "base")}
    asked = Question(epoch=epoch, **texts)
    proposed = body.get("proposed")
    if proposed is None:
        return asdict(await following.look(asked))
    if not isinstance(proposed, dict):
        raise InvalidRequest("what is proposed has a 'manifest' and a 'selection'")
    choice = Choice(asked_text(proposed, "manifest"), asked_text(proposed, "selection"))
    return asdict(await following.decide(asked, choice))


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
