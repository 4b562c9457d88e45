"""The ranks that save and restore together: they agree, and they fail together.

All collectives run on a gloo group of their own, so they never interleave with those of the
training. What travels is JSON, not pickle.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from forebay_wire.errors import DeadlineExceeded, ForebayError, rebuild
from forebay_wire.meeting import meet

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
    asides: list[Json] = field(default_factory=list)
    """What every rank said, failed or not."""

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
    """This rank among its peers. Not thread-safe: collectives run in one order on all ranks."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroupGloo | None) -> None:
        self.rank = rank
        self.size = size
        self._group: Any = group  # its stubs know no collectives

    @classmethod
    def join(cls, process_group: dist.ProcessGroup | None, timeout: float) -> Ranks:
        """All ranks of *process_group* (default: all) call this; without torch.distributed, one.

        *timeout* in seconds bounds every later collective.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, None)
        members = tuple(dist.get_process_group_ranks(process_group or dist.group.WORLD))
        if len(members) == 1:
            return cls(0, 1, None)
        rank = members.index(dist.get_rank())
        # Not dist.new_group: that one takes all ranks of the world, or (with local
        # synchronization) hangs where members belong to different numbers of other groups.
        number = _joined[members]
        _joined[members] += 1
        name = f"forebay/{'_'.join(map(str, members))}/{number}"
        store, seconds = (
            PrefixStore(name, _get_default_store()),
            datetime.timedelta(seconds=timeout),
        )
        with _LostRank("meet for checkpoints"):
            # torchrun keeps the store over restarts, with what dead ranks of this name left there.
            start = meet(store, rank, len(members), seconds)
            group = dist.ProcessGroupGloo(PrefixStore(start, store), rank, len(members), seconds)
        return cls(rank, len(members), group)

    def exchange(self, what: str, value: Json) -> list[Json]:
        """Every rank's *value*, in rank order, on every rank."""
        if self._group is None:
            return [value]
        mine = _pack(value)
        with _LostRank(what):
            # Nearly all that is exchanged is short: then one collective does.
            frames = self._all(_frame(mine))
            sizes = [int.from_bytes(frame[:_SIZE_BYTES].numpy().tobytes()) for frame in frames]
            longest = max(sizes)
            if longest <= FRAME_BYTES - _SIZE_BYTES:
                parts = [frame[_SIZE_BYTES:] for frame in frames]
            else:
                parts = self._all(_pad(mine, longest))
        return [_unpack(part[:size]) for part, size in zip(parts, sizes, strict=True)]

    def _all(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor of the same size."""
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._group.allgather([parts], [mine]).wait()
        return parts

    def gather(self, what: str, value: Json) -> list[Json] | None:
        """Every rank's *value* on rank 0; None elsewhere."""
        if self._group is None:
            return [value]
        mine = _pack(value)
        with _LostRank(what):
            sizes = self._sizes(len(mine))
            parts = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
            self._group.gather(
                [parts] if self.rank == 0 else [], [_pad(mine, max(sizes))], _TO_ROOT
            ).wait()
        if self.rank:
            return None
        return [_unpack(part[:size]) for part, size in zip(parts, sizes, strict=True)]

    def scatter(self, what: str, values: Sequence[Json] | None) -> Json:
        """This rank's element of the list that rank 0 gives."""
        if self._group is None:
            assert values is not None
            return values[0]
        with _LostRank(what):
            packed = [_pack(value) for value in values] if values is not None else []
            sizes = torch.tensor([len(one) for one in packed] or [0] * self.size)
            self._group.broadcast(sizes, 0).wait()
            longest = int(sizes.max())
            mine = torch.empty(longest, dtype=torch.uint8)
            parts = [[_pad(one, longest) for one in packed]] if self.rank == 0 else []
            self._group.scatter([mine], parts, _FROM_ROOT).wait()
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
        self,
        what: str,
        act: Callable[[], T],
        note: Callable[[T], Json] | None = None,
        aside: Callable[[], Json] = lambda: None,
    ) -> Outcome[T]:
        """Like :meth:`together`, but leaves it to the caller what to do about errors.

        What *aside* says reaches all ranks also if *act* failed.
        """
        result, failure, error = _attempt(act)
        told = note(result) if note is not None and failure is None else None  # type: ignore[arg-type]
        answers = self.exchange(what, [failure, told, aside()])
        failures = {rank: failed for rank, (failed, *_) in enumerate(answers) if failed}
        notes, asides = [told for _, told, _ in answers], [said for *_, said in answers]
        return Outcome(what, self.size, result, notes, failures, error, asides)

    def decide(self, what: str, act: Callable[[], Json]) -> Json:
        """Run *act* on rank 0 alone; its JSON-able result, or its error, reaches all ranks."""
        result, failure, error = _attempt(act) if self.rank == 0 else (None, None, None)
        failed, value = self.broadcast(what, [failure, result])
        failures = {0: failed} if failed else {}
        Outcome(what, self.size, None, [], failures, error).raise_first()
        return value

    def close(self) -> None:
        """Leave the group."""
        self._group = None

    def _sizes(self, mine: int) -> list[int]:
        assert self._group is not None
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._group.allgather([sizes], [torch.tensor([mine])]).wait()
        return [int(size) for size in sizes]


_joined: Counter[tuple[int, ...]] = Counter()
"""How often this process met with the same ranks: all of them count alike, so names agree."""

FRAME_BYTES: Final = 1024
"""What one exchange carries at once, its length included."""

_SIZE_BYTES: Final = 4

_TO_ROOT = dist.GatherOptions()
_TO_ROOT.rootRank = 0
_FROM_ROOT = dist.ScatterOptions()
_FROM_ROOT.rootRank = 0


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


def _frame(data: bytes) -> torch.Tensor:
    """The length of *data* and as much of it as there is room for."""
    frame = len(data).to_bytes(_SIZE_BYTES) + data
    return _pad(frame[:FRAME_BYTES], FRAME_BYTES)


def _unpack(data: torch.Tensor) -> Json:
    return json.loads(data.numpy().tobytes())


def _pad(data: bytes, length: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.ljust(length, b" ")), dtype=torch.uint8)
