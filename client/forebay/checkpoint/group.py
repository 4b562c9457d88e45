"""The ranks that save and restore together: they agree, and they fail together.

All collectives run on a gloo group of their own, so they never interleave with those of the
training. What travels is JSON, not pickle.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from forebay_wire.errors import DeadlineExceeded, ForebayError, rebuild

_log = logging.getLogger(__name__)

T = TypeVar("T")
Json = Any


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of something that every rank tried."""

    what: str
    num_ranks: int
    result: T | None
    """This rank's; None if it failed."""
    notes: list[Json]
    failures: dict[int, list[str]]
    """Rank to (error name, message); the same on every rank."""
    error: Exception | None
    """This rank's own."""

    def failed_only_with(self, kind: type[ForebayError]) -> bool:
        """Whether every rank that failed did so with an error of *kind*."""
        return all(
            isinstance(rebuild(name, "INTERNAL", ""), kind) for name, _ in self.failures.values()
        )

    def raise_first(self, unless: type[ForebayError] | None = None) -> None:
        """Raise the lowest failed rank's error, one that is no *unless* before the others."""
        if not self.failures:
            return
        if self.num_ranks == 1 and self.error is not None:
            raise self.error
        errors = [
            rebuild(name, "INTERNAL", f"rank {rank} failed to {self.what}: {message}")
            for rank, (name, message) in sorted(self.failures.items())
        ]
        others = [error for error in errors if unless is None or not isinstance(error, unless)]
        raise (others or errors)[0] from self.error


class Ranks:
    """This rank among its peers. Not thread-safe: collectives run in one order on all ranks.

    ``close`` is a collective as well.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.size = size
        self._group = group

    @classmethod
    def join(cls, process_group: dist.ProcessGroup | None, timeout: float) -> Ranks:
        """All ranks of *process_group* (default: all) call this; without torch.distributed, one.

        *timeout* in seconds bounds every later collective.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, None)
        members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        if len(members) == 1:
            return cls(0, 1, None)
        group = dist.new_group(
            members,
            timeout=datetime.timedelta(seconds=timeout),
            backend="gloo",
            # Only the members take part, so that a checkpointer of some ranks is possible.
            use_local_synchronization=process_group is not None,
        )
        return cls(dist.get_rank(group), len(members), group)

    def exchange(self, what: str, value: Json) -> list[Json]:
        """Every rank's *value*, in rank order, on every rank."""
        if self._group is None:
            return [value]
        group, mine = self._group, _pack(value)
        with _LostRank(what):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(mine)]), group=group)
            sizes = [int(length) for length in lengths]
            parts = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
            dist.all_gather(parts, _pad(mine, max(sizes)), group=group)
        return [_unpack(part[:size]) for part, size in zip(parts, sizes, strict=True)]

    def gather(self, what: str, value: Json) -> list[Json] | None:
        """Every rank's *value* on rank 0; None elsewhere."""
        if self._group is None:
            return [value]
        group, mine = self._group, _pack(value)
        with _LostRank(what):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(mine)]), group=group)
            sizes = [int(length) for length in lengths]
            parts = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
            dist.gather(
                _pad(mine, max(sizes)), parts if self.rank == 0 else None, self._root(), group
            )
        if self.rank:
            return None
        return [_unpack(part[:size]) for part, size in zip(parts, sizes, strict=True)]

    def scatter(self, what: str, values: Sequence[Json] | None) -> Json:
        """This rank's element of the list that rank 0 gives."""
        if self._group is None:
            assert values is not None
            return values[0]
        group = self._group
        with _LostRank(what):
            packed = [_pack(value) for value in values] if values is not None else []
            sizes = torch.tensor([len(one) for one in packed] or [0] * self.size)
            dist.broadcast(sizes, self._root(), group)
            longest = int(sizes.max())
            mine = torch.empty(longest, dtype=torch.uint8)
            parts = [_pad(one, longest) for one in packed] if self.rank == 0 else None
            dist.scatter(mine, parts, self._root(), group)
        return _unpack(mine[: int(sizes[self.rank])])

    def broadcast(self, what: str, value: Json) -> Json:
        """Rank 0's *value* on every rank."""
        return self.scatter(what, [value] * self.size if self.rank == 0 else None)

    def together(
        self, what: str, act: Callable[[], T], note: Callable[[T], Json] | None = None
    ) -> tuple[T, list[Json]]:
        """Run *act* on every rank, then raise the first rank's error on all, if there is one.

        Answers this rank's result, and what *note* says of every rank's.
        """
        outcome = self.attempt(what, act, note)
        outcome.raise_first()
        return outcome.result, outcome.notes  # type: ignore[return-value]

    def attempt(
        self, what: str, act: Callable[[], T], note: Callable[[T], Json] | None = None
    ) -> Outcome[T]:
        """Like :meth:`together`, but leaves it to the caller what to do about errors."""
        result, failure, error = _attempt(act)
        told = note(result) if note is not None and failure is None else None  # type: ignore[arg-type]
        answers = self.exchange(what, [failure, told])
        failures = {rank: failed for rank, (failed, _) in enumerate(answers) if failed}
        return Outcome(what, self.size, result, [told for _, told in answers], failures, error)

    def decide(self, what: str, act: Callable[[], Json]) -> Json:
        """Run *act* on rank 0 alone; its JSON-able result, or its error, reaches all ranks."""
        result, failure, error = _attempt(act) if self.rank == 0 else (None, None, None)
        failed, value = self.broadcast(what, [failure, result])
        failures = {0: failed} if failed else {}
        Outcome(what, self.size, None, [], failures, error).raise_first()
        return value

    def close(self) -> None:
        """Leave the group; forgiving, for the training may have ended torch.distributed before."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            try:
                dist.destroy_process_group(group)
            except (RuntimeError, ValueError) as error:
                _log.debug("the checkpoint group was gone already: %s", error)

    def _root(self) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, 0)


def _attempt(act: Callable[[], T]) -> tuple[T | None, list[str] | None, Exception | None]:
    try:
        return act(), None, None
    except ForebayError as error:
        return None, [type(error).__name__, error.message], error
    except Exception as error:  # noqa: BLE001 - a user's state_dict() may raise anything
        return None, ["", f"{type(error).__name__}: {error}"], error


class _LostRank:
    """Turns a collective's failure into ours: a rank died, or did not come in time."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise DeadlineExceeded(
                f"another rank did not answer while all were to {self._what}: it died, hangs, or "
                "does not call this function; what was committed before is untouched: restart the "
                f"job ({str(error).splitlines()[0]})"
            ) from error


def _pack(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _unpack(data: torch.Tensor) -> Json:
    return json.loads(data.numpy().tobytes())


def _pad(data: bytes, length: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.ljust(length, b" ")), dtype=torch.uint8)
