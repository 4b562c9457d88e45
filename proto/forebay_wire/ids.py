"""Names of things, checked once at the border."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Final

from forebay_wire.errors import InvalidRequest
from forebay_wire.limits import MAX_NAME_BYTES

ID_BYTES: Final = 32
"""Length of blob and manifest ids: a BLAKE3 digest."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_HEX_ID: Final = re.compile(r"[0-9a-f]{64}\Z")
_RANDOM: Final = re.compile(r"[0-9a-f]{32}\Z")


def check_name(kind: str, name: str) -> str:
    """*name* unchanged if it may name a *kind* (dataset, run, split, tier).

    Letters, digits, ``.``, ``_`` and ``-``, starting with a letter or digit, at most 128 bytes.
    """
    if not isinstance(name, str) or not _NAME.match(name) or len(name) > MAX_NAME_BYTES:
        raise InvalidRequest(
            f"{kind} name {name!r} is not allowed: use 1 to {MAX_NAME_BYTES} letters, digits, "
            "'.', '_' or '-', starting with a letter or a digit"
        )
    return name


def check_id(kind: str, text: str) -> str:
    """*text* unchanged if it is a blob or manifest id in hex (64 lower-case digits)."""
    if not _HEX_ID.match(text):
        raise InvalidRequest(f"{kind} id {text!r} is not 64 lower-case hexadecimal digits")
    return text


def check_random_name(kind: str, text: str) -> str:
    """*text* unchanged if it is a never-reused random name (32 lower-case hex digits)."""
    if not _RANDOM.match(text):
        raise InvalidRequest(f"{kind} {text!r} is not 32 lower-case hexadecimal digits")
    return text


def new_random_name() -> str:
    """A never-reused random name: for files, sessions, nodes, incarnations (128 bits)."""
    return secrets.token_hex(16)


@dataclass(frozen=True, order=True)
class GenerationId:
    """One saved state of a run: (run, attempt, step)."""

    run: str
    attempt: int
    step: int

    def __str__(self) -> str:
        return f"{self.run}@{self.attempt}/{self.step}"

    @classmethod
    def parse(cls, text: str) -> GenerationId:
        """The inverse of ``str()``: ``run@attempt/step``."""
        found = re.fullmatch(r"([^@/]+)@(\d+)/(\d+)", text)
        if found is None:
            raise InvalidRequest(f"generation {text!r} is not of the form RUN@ATTEMPT/STEP")
        return cls(check_name("run", found[1]), int(found[2]), int(found[3]))
