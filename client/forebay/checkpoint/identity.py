"""What torch's ``checkpoint_id`` means here: a run, and for a reader which of its generations."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from blake3 import blake3

from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import check_name

_SELECTOR = re.compile(r"[0-9]+(/[0-9]+)?\Z|[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_READABLE_BYTES = 64


@dataclass(frozen=True)
class CheckpointName:
    """A run, and what stands behind the ``@`` of ``RUN@SELECTOR`` (empty: nothing)."""

    run: str
    selector: str = ""

    @classmethod
    def of(cls, checkpoint_id: str | os.PathLike[str]) -> CheckpointName:
        """``RUN``, ``RUN@STEP``, ``RUN@ATTEMPT/STEP`` or ``RUN@latest``.

        What is no name of a run, such as a path, becomes one: readable, and with a digest, so that
        two paths are never one run.
        """
        text = os.fspath(checkpoint_id)
        if not isinstance(text, str) or not text:
            raise InvalidRequest(f"checkpoint_id {checkpoint_id!r} is no text: name the run")
        run, at, selector = text.partition("@")
        if at and _is_name(run) and _SELECTOR.match(selector):
            return cls(run, selector)
        return cls(text if _is_name(text) else _named_like(text))


def _is_name(text: str) -> bool:
    try:
        check_name("run", text)
    except InvalidRequest:
        return False
    return True


def _named_like(path: str) -> str:
    readable = _NOT_IN_NAMES.sub("-", path).strip("-._")[-_READABLE_BYTES:].lstrip("-._")
    digest = blake3(path.encode(errors="surrogatepass")).hexdigest()[:16]
    return check_name("run", f"{readable}-{digest}" if readable else digest)
