"""One pass over a StreamingDataset: an iterator that can say where it stands and go on there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

from forebay.dataset.batches import BatchSource
from forebay.dataset.transforms import Batch
from forebay_wire.errors import InvalidRequest


class Passed(Protocol):
    """What a pass is over."""

    _source: BatchSource

    def _read(
        self, place: tuple[int, int], first: int, every: int
    ) -> Iterator[tuple[Batch, tuple[int, int]]]: ...

    def _went(self, epoch: int, identities: Sequence[str]) -> None: ...


class Pass(Iterator[Batch]):
    """A worker's batches of one iteration, or all of them without workers. Belongs to one thread.

    It has the two methods by which torchdata's StatefulDataLoader lets an iterator go on.
    """

    def __init__(
        self, passed: Passed, place: tuple[int, int], worker: int, num_workers: int
    ) -> None:
        """*place*: epoch and position where the iteration begins, for all its workers."""
        self._passed = passed
        self._place = place
        self._worker = (worker, num_workers)
        self._num_read = 0
        self._reached = place
        self._identities = passed._source.identities_of(place[0])
        """Of the versions that it reads, whatever becomes of the epoch elsewhere."""
        self._batches: Iterator[tuple[Batch, tuple[int, int]]] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            worker, num_workers = self._worker
            first = worker + self._num_read * num_workers
            if self._identities != self._passed._source.identities_of(self._place[0]):
                raise InvalidRequest(
                    f"epoch {self._place[0]} was begun anew, on another version, before this "
                    "iteration of it read anything: iterate anew"
                )
            self._batches = self._passed._read(self._place, first, num_workers)
        batch, self._reached = next(self._batches)
        self._num_read += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """JSON that says: this worker of as many goes on after what it read."""
        source = self._passed._source
        worker, num_workers = self._worker
        return {
            "began": source.state_of_begun(*self._place, self._identities),
            "reached": source.state_of_begun(*self._reached, self._identities),
            "num_read": self._num_read,
            "worker": worker,
            "num_workers": num_workers,
            "global_batch_size": source.global_batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a pass with as many workers and the same batch size stood."""
        source = self._passed._source
        worker, num_workers = self._worker
        for what, here in (
            ("worker", worker),
            ("num_workers", num_workers),
            ("global_batch_size", source.global_batch_size),
        ):
            if state[what] != here:
                raise InvalidRequest(
                    f"the StatefulDataLoader's state was taken with {what}={state[what]}, here it "
                    f"is {here}: give that state to StreamingDataset.load_state_dict, which goes "
                    "on with other workers and batch sizes, and none to the loader"
                )
        self._place = source.resumed(state["began"])
        self._reached = source.resumed(state["reached"])
        self._num_read = state["num_read"]
        self._batches = None
        self._identities = source.identities_of(self._place[0])
        self._passed._went(self._place[0], self._identities)


def torchdata_state(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dataset's state in the *state* of a StatefulDataLoader; None if it is not one.

    That of the batch which the loader handed out last, whatever its workers had read ahead.
    """
    if "_snapshot" in state:
        snapshot = state["_snapshot"]
        last = f"worker_{snapshot['_last_yielded_worker_id']}"
        found = _in_fetcher(snapshot["_worker_snapshots"][last]["fetcher_state"])
        num_later = state["_steps_since_snapshot"]
    elif "fetcher_state" in state:
        found, num_later = _in_fetcher(state["fetcher_state"]), 0
    else:
        return None
    reached: dict[str, Any] = dict(found["reached"])
    if num_later and "position" not in reached:
        raise InvalidRequest(
            "of packed windows the StatefulDataLoader has to take a snapshot at every step: "
            "snapshot_every_n_steps=1"
        )
    if num_later:
        reached["position"] += num_later * found["global_batch_size"]
    return reached


def _in_fetcher(state: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found = None if state is None else state.get("dataset_iter_state")
    if not isinstance(found, Mapping) or "reached" not in found:
        raise InvalidRequest(
            "this is the state of a StatefulDataLoader, but not of one around a StreamingDataset"
        )
    return found


def refuse_accelerate(dataset: object, modules: Mapping[str, Any]) -> None:
    """Raise if Accelerate is about to iterate a loader over *dataset* that it prepared.

    Its dispatcher reads the loader of rank 0 alone and shares that out, its shards cut again what
    is cut already, and both set an epoch over a restored position: samples would be lost without
    an error. *modules* is ``sys.modules``.
    """
    state = modules.get("accelerate.state")
    if state is None or "accelerate.data_loader" not in modules:
        return
    active = state.GradientState().active_dataloader
    inner: object = getattr(active, "dataset", None)
    inner = getattr(inner, "dataset", inner) if inner is not dataset else inner
    if active is not None and inner is dataset:
        raise InvalidRequest(
            "Accelerate prepared a loader over a StreamingDataset "
            f"({type(active).__name__}: dispatch_batches={_DISPATCHES.get(type(active).__name__)}) "
            "and would lose samples: a StreamingDataset cuts its batches over the ranks itself. Do "
            "not pass its loader to accelerator.prepare(), whatever dispatch_batches, "
            "split_batches and even_batches are; or use forebay.DataLoader, which prepare() leaves "
            "as it is"
        )


_DISPATCHES = {"DataLoaderDispatcher": True, "DataLoaderShard": False}


def refuse_lightning(caller: str, is_over: bool) -> None:
    """Raise if Lightning (module *caller*) asks where a loader without length stands in an epoch.

    It takes a batch more than it trains on from those: that one would be lost.
    """
    if caller.startswith(("lightning.", "pytorch_lightning.")) and not is_over:
        raise InvalidRequest(
            'a checkpoint of Lightning within an epoch, of a loader with follow="latest": it has '
            "no length, so Lightning has taken a batch from it that was not trained on and would "
            "be lost. Save at the end of epochs, or leave follow= out"
        )
