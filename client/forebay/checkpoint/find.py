"""Which generation somebody means, what is in it, and its fingerprints; needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forebay.checkpoint.contents import Contents
from forebay.checkpoint.diff import Fingerprints
from forebay.methods import Checkpoints
from forebay_wire.errors import (
    DeadlineExceeded,
    IntegrityError,
    InvalidRequest,
    NotFound,
    StorageError,
)
from forebay_wire.fingerprint import Fingerprint, decode_fingerprints
from forebay_wire.ids import GenerationId
from forebay_wire.manifest import GenerationManifest, parse
from forebay_wire.v1 import checkpoints_pb2 as pb

if TYPE_CHECKING:
    from forebay.client import Client

LATEST: Final = "latest"
LOOK_SECONDS: Final = 0.1
"""How often one who waits for fingerprints looks."""


@dataclass(frozen=True)
class Found:
    """A generation: where it stands, and what is in it."""

    info: pb.Generation
    contents: Contents | None
    """None unless it is committed."""

    @property
    def id(self) -> GenerationId:
        return GenerationId(self.info.run, self.info.attempt, self.info.step)

    def committed(self) -> Contents:
        """:class:`NotFound` for one that is not."""
        if self.contents is None:
            error = f": {self.info.error}" if self.info.error else ""
            raise NotFound(f"generation {self.id} is {self.info.state}, not committed{error}")
        return self.contents


def split(text: str, selector: str | None = None) -> tuple[str, str]:
    """Run and selector of ``RUN``, ``RUN@STEP``, ``RUN@ATTEMPT/STEP`` or ``RUN@TAG``."""
    if selector is not None:
        return text, selector
    run, _, after = text.partition("@")
    return run, after or LATEST


def find(client: Client, run: str, selector: str = LATEST) -> Found:
    """The generation that *selector* means: ``latest`` (on the current lineage), a step (of the
    newest attempt that has it), ``ATTEMPT/STEP`` (in whatever state), or a tag.

    :class:`NotFound`; :class:`IntegrityError` if its manifest is damaged.
    """
    info = _look(client, run, selector)
    if not info.manifest:
        return Found(info, None)
    where = f"generation {GenerationId(info.run, info.attempt, info.step)}"
    manifest = parse(client.read_manifest(info.manifest), where, info.manifest)
    if not isinstance(manifest, GenerationManifest):
        raise IntegrityError(f"manifest {info.manifest} is not that of {where}")
    return Found(info, Contents.of(manifest))


def _look(client: Client, run: str, selector: str) -> pb.Generation:
    attempt, slash, step = selector.rpartition("/")
    if step.isdigit() and (attempt.isdigit() or not slash):
        wanted = [
            one
            for one in client.checkpoints(run)
            if one.step == int(step) and (not slash or one.attempt == int(attempt))
        ]
        if not wanted:
            raise NotFound(
                f"run {run!r} has no generation {selector}: forebay checkpoint list {run} "
                "shows them"
            )
        return max(wanted, key=lambda one: (one.state == "committed" or bool(slash), one.attempt))
    if slash:
        raise InvalidRequest(
            f"generation {selector!r} is not of the form STEP, ATTEMPT/STEP or TAG"
        )
    request = pb.ResolveGenerationRequest(run=run, selector=selector, durability="local")
    return client.channel.call(Checkpoints.ResolveGeneration, request)


def fingerprints_of(
    client: Client,
    found: Found,
    wait_seconds: float = 0.0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Fingerprints | None:
    """Those of all packs. With *wait_seconds* they are computed if they are not kept, which is
    waited for (*progress* is told bytes); None if they are not kept without that.

    :class:`DeadlineExceeded` if it takes longer, :class:`StorageError` if it failed.
    """
    packs = found.committed().packs
    deadline = time.monotonic() + wait_seconds
    answer = _ask(client, found, 0, 0, compute=wait_seconds > 0)
    while answer.num_packs < len(packs):
        if not wait_seconds:
            return None
        if answer.job_state == "failed":
            raise StorageError(f"no fingerprints of generation {found.id}: {answer.error}")
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"the fingerprints of generation {found.id} are still being computed "
                f"({answer.done_bytes} of {answer.job_bytes} bytes): ask again, or wait longer"
            )
        progress(answer.done_bytes, answer.job_bytes)
        time.sleep(LOOK_SECONDS)
        # A job that ended between two looks without all packs is asked for again.
        answer = _ask(client, found, 0, 0, compute=answer.job_state in ("", "done"))
    return {rank: _read(client, found, rank) for rank in packs}


def _read(client: Client, found: Found, rank: int) -> list[Fingerprint]:
    data = b""
    while True:
        answer = _ask(client, found, rank, len(data))
        data += answer.data
        if len(data) >= answer.total_bytes or not answer.data:
            return decode_fingerprints(data, f"pack of rank {rank} of generation {found.id}")


def _ask(
    client: Client, found: Found, rank: int, offset: int, *, compute: bool = False
) -> pb.ReadFingerprintsResponse:
    request = pb.ReadFingerprintsRequest(
        run=found.info.run,
        attempt=found.info.attempt,
        step=found.info.step,
        rank=rank,
        offset=offset,
        compute=compute,
    )
    return client.channel.call(Checkpoints.ReadFingerprints, request)
