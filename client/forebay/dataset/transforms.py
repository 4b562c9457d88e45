"""What is done to batches on their way to the trainer, seeded to be the same on any topology."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from forebay.dataset.holes import Hole
from forebay_wire.errors import InvalidRequest

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
"""Column name to tensor ``(rows, *shape)``, or to a list for text, bytes and ragged columns."""

Sample = dict[str, Any]
"""Column name to one row's tensor, number, text or the like."""

MAX_WARNINGS: Final = 16
"""Samples that failed and are logged one by one."""


def per_sample(function: Callable[..., Mapping[str, Any]]) -> PerSample:
    """A ``transform=`` for loaders that calls ``function(sample, rng)``, or ``function(sample)``,
    for each sample and makes a batch of what it returns.

        def augment(sample, rng):                    # rng: a numpy.random.Generator
            sample["image"] = sample["image"].roll(int(rng.integers(-4, 5)), dims=-1)
            return sample

        forebay.DataLoader(dataset, transform=forebay.per_sample(augment), ...)

    *rng* is seeded by the loader's seed, the epoch and the sample's row in the version: the same
    sample is treated alike whatever the ranks, workers, threads and batch size. Tensors, arrays and
    numbers of equal shape are stacked, anything else comes as a list.

    A batch without samples (an empty part of a rank, or holes only) has the columns that the
    function makes, too: those of the samples before, or else of a few samples from all over what is
    read, for which it is called.
    """
    return PerSample(function)


@dataclass(frozen=True)
class Rows:
    """The samples of one batch, and what seeds their treatment."""

    seed: int
    epoch: int
    ids: NDArray[np.int64]
    """Row in the version of each sample."""
    where: str
    """Whose rows, for messages."""
    are_examples: bool = False
    """Nobody gets them."""

    def generator(self, position: int) -> np.random.Generator:
        """For the sample at *position* of the batch."""
        # 2^128 numbers before they meet those of the next row.
        counter = [0, 0, int(self.ids[position]), 0]
        return np.random.Generator(np.random.Philox(key=self._key(b""), counter=counter))

    def batch_generator(self) -> np.random.Generator:
        """For the batch as a whole: another set of rows has another one."""
        rows = np.ascontiguousarray(self.ids, dtype="<i8").tobytes()
        return np.random.Generator(np.random.Philox(key=self._key(rows)))

    def draws(self, step: int) -> Draws:
        """For all samples at once: what the transform number *step* draws."""
        return Draws(self.ids, self._key(b"step %d" % step))

    def _key(self, rows: bytes) -> int:
        seed = f"{self.seed}/{self.epoch}/".encode()
        return int.from_bytes(blake2b(seed + rows, digest_size=16).digest(), "little")


Draw = Callable[[int], NDArray[np.float64]]
"""``draw(count)``: *count* numbers from [0, 1) for each sample, ``(samples, count)``; each call
gives further ones."""


class Draws:
    """A :data:`Draw` whose numbers depend on a key and each sample's row alone.

    A number is a hash of row and place: the finalizer of SplitMix (Steele, Lea, Flood, 2014).
    """

    def __init__(self, ids: NDArray[np.int64], key: int) -> None:
        first, self._second = np.array([key & _MASK, key >> 64], dtype=np.uint64)
        self._rows = _mixed(_mixed(ids.astype(np.uint64) + first) + self._second)
        self._count = 0

    def __call__(self, count: int) -> NDArray[np.float64]:
        places = np.arange(self._count + 1, self._count + count + 1, dtype=np.uint64)
        self._count += count
        words = _mixed(self._rows[:, None] + places * _GOLDEN)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class PerRow(ABC):
    """A transform of whole batches that draws numbers for each sample: in a loader the same ones
    for a sample whatever the ranks, workers, threads and batch size. Thread-safe, picklable."""

    @abstractmethod
    def apply(self, batch: Batch, draw: Draw) -> Batch:
        """The changed batch; *batch* itself stays as it is."""

    def __call__(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """Outside of a loader, with any generator."""
        num_rows = len(next(iter(batch.values()), ()))
        return self.apply(batch, lambda count: rng.random((num_rows, count)))


class OfTraining(ABC):
    """A transform that takes figures of what is trained on, from the loader that it is given to."""

    @abstractmethod
    def learn(self, dataset: Any) -> None:
        """Take them of the training part of *dataset*, which the loader reads, or do nothing if
        they are known. InvalidRequest where that is not clear."""


class BySample(ABC):
    """A transform that treats each sample by itself: one that fails is a hole, if it may be."""

    def __init__(self) -> None:
        self._num_warnings = 0

    @abstractmethod
    def apply(
        self, batch: Batch, rows: Rows, present: NDArray[np.bool_], *, masks: bool
    ) -> tuple[Batch, list[Hole]]:
        """The batch of all *present* samples, and those that failed, if *masks*; else the first
        failure is raised. What comes of none is anything."""

    @abstractmethod
    def makes(self, batch: Batch) -> list[str]:
        """The columns of its result *batch* that it made."""

    def _hole(self, position: int, rows: Rows, reason: str) -> Hole:
        hole = Hole(position, int(rows.ids[position]), reason)
        if rows.are_examples:
            return hole
        self._num_warnings += 1
        if self._num_warnings <= MAX_WARNINGS:
            more = "; further ones are counted only" if self._num_warnings == MAX_WARNINGS else ""
            logger.warning("row %d of %s is masked: %s%s", hole.row, rows.where, reason, more)
        return hole


class PerSample(BySample):
    """See :func:`per_sample`. Thread-safe if the function is; picklable if it is."""

    def __init__(self, function: Callable[..., Mapping[str, Any]]) -> None:
        super().__init__()
        self.function = function
        self._is_seeded = _takes_two(function)

    def apply(
        self, batch: Batch, rows: Rows, present: NDArray[np.bool_], *, masks: bool
    ) -> tuple[Batch, list[Hole]]:
        kept = _private(batch)
        columns = {name: _rows_of(batch[name]) for name in batch if name not in kept}
        done: dict[int, Mapping[str, Any]] = {}
        holes: list[Hole] = []
        for position in np.flatnonzero(present).tolist():
            sample = {name: values[position] for name, values in columns.items()}
            try:
                done[position] = self._call(sample, rows, position)
            except Exception as error:
                if not masks:
                    error.add_note(f"in the transform of row {rows.ids[position]} of {rows.where}")
                    raise
                reason = f"its transform failed: {type(error).__name__}: {error}"
                holes.append(self._hole(position, rows, reason))
        return (self._join(done, len(present)) | kept if done else batch), holes

    def makes(self, batch: Batch) -> list[str]:
        return [name for name in batch if not name.startswith("_")]

    def _call(self, sample: Sample, rows: Rows, position: int) -> Mapping[str, Any]:
        if self._is_seeded:
            found = self.function(sample, rows.generator(position))
        else:
            found = self.function(sample)
        if not isinstance(found, Mapping):
            raise InvalidRequest(
                "a per-sample transform returns a dict of columns, not "
                f"{type(found).__name__}: return the sample"
            )
        return found

    def _join(self, done: Mapping[int, Mapping[str, Any]], count: int) -> Batch:
        names = list(next(iter(done.values())))
        for position, sample in done.items():
            if list(sample) != names and set(sample) != set(names):
                raise InvalidRequest(
                    f"a per-sample transform returned the columns {', '.join(sorted(names))} for "
                    f"one sample and {', '.join(sorted(sample))} for the one at {position} of the "
                    "same batch: return the same for all"
                )
        positions = list(done)
        return {
            name: _stack([sample[name] for sample in done.values()], positions, count)
            for name in names
        }


Transform = (
    Callable[[Batch], Batch] | Callable[[Batch, np.random.Generator], Batch] | BySample | PerRow
)
"""A batch to a batch, in place or anew; with a second argument it is given a generator that is
seeded by the loader's seed, the epoch and the rows of the batch."""

Form = dict[str, tuple[tuple[int, ...], torch.dtype] | None]
"""Columns: shape of a row and type of a tensor, None for a list."""


@dataclass(frozen=True)
class Examples:
    """Some samples of what is read, of any rank, that show what a transform makes of samples."""

    batch: Batch
    rows: Rows
    present: NDArray[np.bool_]


class Transforms:
    """A loader's transforms, in their order. Thread-safe as far as they are."""

    def __init__(self, given: Transform | Sequence[Transform] | None) -> None:
        steps: Sequence[Any]
        if given is None:
            steps = ()
        elif isinstance(given, (list, tuple)):
            steps = given
        else:
            steps = (given,)
        self._steps: list[tuple[Any, bool]] = []
        self._forms: dict[int, Form] = {}
        """What the step of that number made of samples before."""
        step: Any
        for step in steps:
            if not callable(step) and not _is_step(step):
                raise InvalidRequest(
                    f"transform={step!r}: expected a function of a batch, "
                    "forebay.per_sample(function), or a list of them"
                )
            self._steps.append((step, not _is_step(step) and _takes_two(step)))

    def __bool__(self) -> bool:
        return bool(self._steps)

    def learn(self, dataset: Any) -> None:
        """Before anything is read of *dataset*: those that need figures of it take them."""
        for step, _ in self._steps:
            if isinstance(step, OfTraining):
                step.learn(dataset)

    def apply(
        self,
        batch: Batch,
        rows: Rows,
        present: NDArray[np.bool_] | None,
        *,
        masks: bool,
        examples: Callable[[], Examples | None] | None = None,
    ) -> tuple[Batch, list[Hole]]:
        """The batch after all steps, and the samples that failed where *masks* lets them.

        *present* is False for holes; None: all are there. A batch without any sample gets the
        columns that samples before it got, or else, if there were none, those of *examples*.
        """
        if present is None:
            present = np.ones(len(rows.ids), dtype=np.bool_)
        holes: list[Hole] = []
        for number, (step, _) in enumerate(self._steps):
            before = _private(batch)
            try:
                batch, failed = self._run(number, batch, rows, present, masks=masks)
            except StopIteration as error:  # a generator on its way out would swallow the reason
                raise _stopped(step, error) from error
            if failed:
                holes += failed
                present = present.copy()
                present[[hole.position for hole in failed]] = False
            batch = _with_private(batch, before)
            if failed:
                batch["_mask"] = _masked(batch["_mask"], present)
            if isinstance(step, BySample):
                if present.any():
                    self._forms[number] = _form(batch, step.makes(batch))
                else:
                    self._learn(number, examples)
                    batch = self._without_samples(number, batch, len(present))
        return batch, holes

    def _run(
        self, number: int, batch: Batch, rows: Rows, present: NDArray[np.bool_], *, masks: bool
    ) -> tuple[Batch, list[Hole]]:
        step, is_seeded = self._steps[number]
        if isinstance(step, BySample):
            return step.apply(batch, rows, present, masks=masks)
        if isinstance(step, PerRow):
            return step.apply(batch, rows.draws(number)), []
        return (step(batch, rows.batch_generator()) if is_seeded else step(batch)), []

    def _learn(self, number: int, examples: Callable[[], Examples | None] | None) -> None:
        """What step *number* makes of samples, if that is not known."""
        found = None if number in self._forms or examples is None else examples()
        if found is not None:  # without examples of their own, these do not ask for more
            try:
                self.apply(found.batch, found.rows, found.present, masks=True)
            except Exception as error:
                error.add_note("on samples that show the columns of a batch without any")
                raise

    def _without_samples(self, number: int, batch: Batch, count: int) -> Batch:
        """*count* holes that look like samples; as they came if there are none to look like."""
        form = self._forms.get(number)
        if form is None:
            return batch
        step, _ = self._steps[number]
        made = {
            name: [None] * count if one is None else torch.zeros((count, *one[0]), dtype=one[1])
            for name, one in form.items()
        }
        replaced = set(step.makes(batch))
        return {name: batch[name] for name in batch if name not in replaced} | made


def _private(batch: Batch) -> Batch:
    """The loader's own columns."""
    return {name: values for name, values in batch.items() if name.startswith("_")}


def _with_private(batch: Batch, before: Batch) -> Batch:
    """*batch* with the loader's columns that a transform left out."""
    if not isinstance(batch, Mapping):
        return batch  # whoever asked for it knows what to do with it
    missing = {name: values for name, values in before.items() if name not in batch}
    return {**batch, **missing} if missing else batch


def _masked(mask: torch.Tensor, present: NDArray[np.bool_]) -> torch.Tensor:
    return mask & torch.from_numpy(present).view(-1, *[1] * (mask.dim() - 1))


def _form(batch: Batch, names: Sequence[str]) -> Form:
    return {
        name: (tuple(values.shape[1:]), values.dtype) if isinstance(values, torch.Tensor) else None
        for name, values in ((name, batch[name]) for name in names)
    }


def _stopped(step: object, error: StopIteration) -> RuntimeError:
    found = RuntimeError("a transform raised StopIteration")
    function = step.function if isinstance(step, PerSample) else step
    found.add_note(f"in the transform {getattr(function, '__qualname__', repr(function))}")
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    return found


def _is_step(value: object) -> bool:
    return isinstance(value, (BySample, PerRow))


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether *function* needs a second positional argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # something built in
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in plain and one.default is one.empty for one in parameters) == 2


def _rows_of(values: Any) -> Sequence[Any]:
    return values.unbind(0) if isinstance(values, torch.Tensor) else values


def _stack(values: list[Any], positions: list[int], count: int) -> Any:
    """*values* at their *positions* of *count* rows; zeros, or None, elsewhere."""
    first = values[0]
    if all(isinstance(one, np.ndarray) for one in values):
        values = [torch.from_numpy(np.ascontiguousarray(one)) for one in values]
    if all(isinstance(one, torch.Tensor) for one in values):
        if all(one.shape == values[0].shape and one.dtype == values[0].dtype for one in values):
            return _spread(torch.stack(values), positions, count)
    elif all(isinstance(one, (bool, int, float, np.generic)) for one in values):
        if isinstance(first, np.generic):
            return _spread(torch.from_numpy(np.array(values)), positions, count)
        return _spread(torch.tensor(values), positions, count)
    found: list[Any] = [None] * count
    for position, value in zip(positions, values, strict=True):
        found[position] = value
    return found


def _spread(stacked: torch.Tensor, positions: list[int], count: int) -> torch.Tensor:
    if len(positions) == count:
        return stacked
    found = stacked.new_zeros((count, *stacked.shape[1:]))
    found[torch.tensor(positions)] = stacked
    return found
