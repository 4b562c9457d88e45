"""What the kit knows of a loader and of the place where its samples lie: two small protocols."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

Sample = tuple[int, bytes]
"""Number of a sample, and its payload as it came out of the loader."""


def payload(number: int) -> bytes:
    """The 32 bytes that sample *number* carries, so that a wrong one is seen."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


@dataclass(frozen=True)
class Shape:
    """How many read, in how many processes, how much at once."""

    world_size: int = 1
    num_workers: int = 0
    """Of each rank: processes or threads that read ahead; 0: none."""
    global_batch_size: int = 12
    """Samples of one step of all ranks together; every world size that is used divides it."""

    @property
    def batch_size(self) -> int:
        """Samples of one step of one rank."""
        return self.global_batch_size // self.world_size

    def __str__(self) -> str:
        return (
            f"{self.world_size} ranks, {self.num_workers} workers each, "
            f"global batch {self.global_batch_size}"
        )


@dataclass(frozen=True)
class Setting:
    """What one rank's loader is opened with."""

    rank: int
    shape: Shape
    states: Sequence[Any] | None = None
    """The states of all ranks (of maybe another shape) to go on from; None: start anew."""


class LoaderAdapter(Protocol):
    """One rank of a loader. The kit makes one for each rank, all in one process.

    Whatever shuffling the loader does must be seeded alike in every adapter. One of a loader that
    reads all epochs in the same order has an attribute ``shuffles = False``. The samples of global
    batch k are those at positions [k·B, (k+1)·B) of the epoch's order, with any number of ranks and
    workers; after a resume with another B, they are counted from the position on.
    """

    def open(self, setting: Setting) -> None:
        """Make the loader. Called once, first."""

    def next(self) -> Sequence[Sample] | None:
        """This rank's next batch without padding; None at the end of an epoch, once: whoever asks
        again gets the first batch of the next epoch."""

    def state(self) -> Any:
        """JSON that says: go on after what :meth:`next` returned last."""

    def workers(self) -> Sequence[int]:
        """Process ids of the workers that run now, for the kit to kill."""

    def close(self) -> None:
        """End it, in the middle of an epoch too. Nothing of it may stay."""


class NotSupported(Exception):
    """The environment cannot do that; promises that need it are not tested, and reported so."""


class Environment:
    """Where the samples lie, and what can happen to it. Override what yours can do.

    The samples are ``(number, payload(number))`` for the numbers 0 … num_samples - 1. Each method
    is a context manager that undoes, as far as possible, what it did.
    """

    num_samples: int

    def fresh(self) -> AbstractContextManager[None]:
        """A data set as described is there when it is entered, untouched by what was before."""
        return _nothing()

    def damaged(self) -> AbstractContextManager[None]:
        """Stored bytes of many samples, none of which was read before, are flipped."""
        raise NotSupported("the environment cannot damage stored bytes")

    def slow(self) -> AbstractContextManager[None]:
        """The store answers late."""
        raise NotSupported("the environment cannot slow the store down")

    def full(self) -> AbstractContextManager[None]:
        """The store, or its cache, has no room left."""
        raise NotSupported("the environment cannot fill the store")

    def restarted(self) -> AbstractContextManager[None]:
        """What serves the samples was killed, and runs again."""
        raise NotSupported("the environment has nothing to restart")

    def appended(self) -> AbstractContextManager[None]:
        """There is a newer version with more samples."""
        raise NotSupported("the environment cannot append to the data set")

    def deleted(self) -> AbstractContextManager[None]:
        """The data set is deleted."""
        raise NotSupported("the environment cannot delete the data set")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Subject:
    """A loader under test."""

    make_adapter: Callable[[], LoaderAdapter]
    environment: Environment
    deadline_seconds: float = 60.0
    """No call of the adapter may take longer."""
    world_sizes: Sequence[int] = (1, 2, 3)
    """Among these, and the next two, the kit chooses."""
    num_workers: Sequence[int] = (0, 1, 2)
    batch_sizes: Sequence[int] = (12, 6, 18)

    def __post_init__(self) -> None:
        uneven = [
            (size, ranks) for size in self.batch_sizes for ranks in self.world_sizes if size % ranks
        ]
        if uneven:
            raise ValueError(f"world sizes must divide batch sizes, and do not: {uneven}")
