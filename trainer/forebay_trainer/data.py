"""Batches of a Forebay dataset as a task takes them. One of the two files that know the service."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import forebay
from forebay_trainer.config import setting
from forebay_trainer.parallel import Parallel
from forebay_trainer.preparation import SPLIT, Type
from forebay_trainer.task import Batch, Task
from forebay_wire.errors import InvalidRequest
from forebay_wire.order import Cut

RENEWED: Final = "renewed"
"""Key in the metadata of a version that `Data.renew` made."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    dataset: str = setting("mnist", "name of the dataset")
    version: int | Literal["latest"] = setting("latest", "which version of it")
    follow: bool = setting(False, "each epoch reads the dataset's newest version, as it grows")
    train_split: str | None = setting("train", "split to train on; none: all rows")
    test_dataset: str | None = setting(None, "dataset to evaluate on; none: the same one")
    test_split: str | None = setting(
        "test", "split to evaluate on; none: all rows of test_dataset, or no evaluation without one"
    )
    num_folds: int = setting(0, "of cross-validation, within train_split; 0: none")
    fold: int | None = setting(
        None, "which fold to train on, from 0; none: one run a fold, one after the other"
    )
    global_batch_size: int = setting(
        128, "samples of one step, all ranks together: other ranks change nothing in the order"
    )
    micro_batch_size: int | None = setting(
        None, "samples of one forward and backward; none: all that a rank has of a batch"
    )
    shuffle: Literal["none", "full", "block"] = setting(
        "full", "order of the training samples; block: few shards are read at a time"
    )
    window_blocks: int | None = setting(
        None, "of shuffle=block: blocks that are mixed with one another; none: 16"
    )
    block_rows: int | None = setting(
        None, "of shuffle=block: rows of a block; none: the shards, which a random split has not"
    )
    last_batch: Literal["keep", "pad", "drop"] = setting("keep", "what a short last batch becomes")
    ragged: Literal["list", "pad", "nested"] = setting(
        "list", "what columns of lists become: lists of tensors, padded, or nested tensors"
    )
    num_threads: int = setting(1, "threads of each rank that make batches ahead")

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "window_blocks", "block_rows"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {number}")
        if self.shuffle != "block" and (self.window_blocks, self.block_rows) != (None, None):
            raise InvalidRequest(
                f"window_blocks and block_rows belong to shuffle=block, not to {self.shuffle}"
            )
        if self.num_folds < 0 or self.num_folds == 1:
            raise InvalidRequest(f"num_folds must be 0, or at least 2, not {self.num_folds}")
        if self.fold is not None and not 0 <= self.fold < self.num_folds:
            raise InvalidRequest(
                f"fold must be one of the {self.num_folds} of num_folds, from 0, not {self.fold}"
            )

    def build(
        self, client: forebay.Client, parallel: Parallel, task: Task, *, seed: int, run: str
    ) -> Data:
        """Opens the splits; NotFound names a dataset, version or split that is not there."""
        train, test = self._open(client, seed)
        if len(train) == 0:
            raise InvalidRequest(
                f"split {train.split!r} of dataset {self.dataset!r} has no samples; "
                "train on another split"
            )
        common: dict[str, Any] = {
            "global_batch_size": self.global_batch_size,
            "num_threads": self.num_threads,
            "device": parallel.device,
            "ragged": self.ragged,
            "include_ids": True,
            "rank": parallel.data_rank,
            "world_size": parallel.shape.num_data,
        }
        train_loader = forebay.DataLoader(
            train,
            shuffle=self.shuffle,
            window_blocks=self.window_blocks,
            block_rows=self.block_rows,
            seed=seed,
            last_batch=self.last_batch,
            follow="latest" if self.follow else None,
            run=run if self.follow else None,
            **common,
        )
        test_loader = None if test is None else forebay.DataLoader(test, shuffle="none", **common)
        num_parts, largest = 1, -(-self.global_batch_size // parallel.shape.num_data)
        if self.micro_batch_size is not None:
            num_parts = -(-largest // self.micro_batch_size)
        return Data(
            self,
            client,
            task,
            train_loader,
            test_loader,
            num_samples=len(train),
            num_bytes=train.manifest.num_bytes,
            num_parts=num_parts,
            part_rows=-(-largest // num_parts),
            seed=seed,
            run=run,
            parallel=parallel,
        )

    def about(self, client: forebay.Client) -> dict[str, Any]:
        """The metadata of the dataset version: what its preparation learnt."""
        return dict(client.dataset(self.dataset, version=self.version).manifest.metadata)

    def _open(
        self, client: forebay.Client, seed: int
    ) -> tuple[forebay.Dataset, forebay.Dataset | None]:
        train = client.dataset(self.dataset, version=self.version, split=self.train_split)
        if self.num_folds:
            folds = train.define_folds(self.num_folds, seed, prefix=f"s{seed}k{self.num_folds}fold")
            train_name, test_name = folds[self.fold or 0]
            version = train.version
            train = client.dataset(self.dataset, version=version, split=train_name)
            return train, client.dataset(self.dataset, version=version, split=test_name)
        if self.test_dataset is not None:
            return train, client.dataset(self.test_dataset, split=self.test_split)
        if self.test_split is None:
            return train, None
        return train, client.dataset(self.dataset, version=self.version, split=self.test_split)


def connect(address: str | None) -> forebay.Client:
    """The service at an address as ``forebay.connect`` takes it; a context manager."""
    return forebay.connect(address)


def metadata(client: forebay.Client, dataset: str) -> dict[str, Any] | None:
    """That of the newest version; None if there is no such dataset."""
    if dataset not in client.datasets():
        return None
    return dict(client.dataset(dataset).manifest.metadata)


def new_version(
    client: forebay.Client, dataset: str, schema: Mapping[str, Type], metadata: Mapping[str, Any]
) -> AbstractContextManager[forebay.DatasetWriter]:
    """A writer of the first version of a dataset, or of the next one, which has the same schema
    and more rows; leaving its ``with`` block commits it, an exception leaves nothing."""
    if dataset in client.datasets():
        return client.append_dataset(dataset, metadata=metadata)
    types = {
        name: each if isinstance(each, str) else forebay.Array(*each)
        for name, each in schema.items()
    }
    return client.create_dataset(dataset, schema=types, metadata=metadata)


def values_of(client: forebay.Client, dataset: str, column: str) -> Iterator[list[Any]]:
    """All values of a column of the newest version, some at a time; none if it is not stored."""
    newest = client.dataset(dataset)
    if column in newest.schema.names:
        for batch in newest.iter_batches([column]):
            yield batch.column(0).to_pylist()


def define_splits(client: forebay.Client, dataset: str, names: Sequence[str]) -> dict[str, int]:
    """Selections of the newest version by its column ``split``, the number of the name; how many
    rows each one has. Repeating it changes nothing."""
    newest = client.dataset(dataset)
    return {
        name: newest.define_selection(name, filter=[(SPLIT, "==", number)])
        for number, name in enumerate(names)
    }


class Epoch:
    """One pass over the training data: iterating it answers batches of this rank."""

    def __init__(self, number: int, batches: Iterator[Batch]) -> None:
        self.number = number
        self.wait_seconds = 0.0
        """How long the batch handed out last was waited for."""
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self._batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.wait_seconds = time.perf_counter() - start
            yield batch


class Data:
    """The loaders of one run: one to train, one to evaluate."""

    def __init__(
        self,
        config: DataConfig,
        client: forebay.Client,
        task: Task,
        train_loader: forebay.DataLoader,
        test_loader: forebay.DataLoader | None,
        *,
        num_samples: int,
        num_bytes: int,
        num_parts: int,
        part_rows: int,
        seed: int,
        run: str,
        parallel: Parallel,
    ) -> None:
        self.config = config
        self.train_loader = train_loader
        self.num_samples = num_samples
        """Of an epoch; of a dataset that grows, as it was at the start."""
        self.num_bytes = num_bytes
        """Of the whole dataset version, as it is stored."""
        self.num_parts = num_parts
        """Micro-batches of a step: as many on every rank, whatever its part of the batch."""
        self.part_rows = part_rows
        """Of the largest micro-batch."""
        self.seed = seed
        """Of the run, for tasks that draw something of their own."""
        self._run = run
        self._parallel = parallel
        self._client = client
        self._task = task
        self._test_loader = test_loader

    @property
    def steps_per_epoch(self) -> int:
        config = self.config
        return Cut(self.num_samples, config.global_batch_size, config.last_batch).num_steps

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0."""
        return self.train_loader.epoch

    @property
    def position(self) -> int:
        """Samples of the current epoch that all ranks together have got so far."""
        return int(self.train_loader.state_dict()["position"])

    @property
    def is_epoch_over(self) -> bool:
        """Whether the batch handed out last was the epoch's last."""
        return self.train_loader.remaining_steps() == 0

    def epochs(self, num_epochs: int) -> Iterator[Epoch]:
        """What is left of so many epochs in all; the first one goes on where it stood."""
        for epoch in self.train_loader.epochs(num_epochs):
            yield Epoch(epoch.number, map(whole, epoch))

    def parts(self, batch: Batch, seed: int, step: int) -> list[Batch]:
        """The micro-batches of a batch, prepared by the task for one step of training."""
        prepared = [self._task.prepare(part) for part in cut(batch, self.num_parts)]
        return [self._task.augment(part, seed, step) for part in prepared]

    def test_batches(self) -> Iterator[Batch]:
        """This rank's parts of one pass over the test data, in order, prepared: as many on every
        rank."""
        if self._test_loader is None:
            return
        for batch in self._test_loader:
            for part in cut(whole(batch), self.num_parts):
                yield self._task.prepare(part)

    def append(self, columns: Mapping[str, Any]) -> int:
        """Writes rows as a new version of the dataset; its number. One rank calls this."""
        with self._client.append_dataset(self.config.dataset) as writer:
            writer.write_table(pa.table(dict(columns)))
        return self._client.dataset(self.config.dataset).version

    def renew(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Makes rows, and appends them as a new version whose training split they are, alone; the
        test split keeps its rows. With ``data.follow`` the epoch that begins now reads them.

        For `Task.before_epoch`; a collective. All ranks make rows, for *make* may need sharded
        weights, and the first one's are written; all return once they are there. Nothing is made
        in an epoch that an attempt goes on in, nor in one for which an earlier attempt of the run
        has made rows: so a run that was killed has the versions of one that was left alone.
        Conflict if somebody else appended meanwhile.
        """
        config = self.config
        if not config.follow or config.train_split is None:
            raise InvalidRequest("a task that renews its data needs data.follow and train_split")
        if self.position:
            return
        made = self._made_before() if self._parallel.is_main else None
        (is_made,) = self._parallel.sum([float(made is not None)])
        columns = {} if is_made else make()
        if self._parallel.is_main:
            version = made or self._append(pa.table(dict(columns)))
            self._define_renewed(version, config.train_split)
        self._parallel.sum([0.0])

    @property
    def _mark(self) -> dict[str, Any]:
        """In the metadata of a version: for whom its rows were made."""
        return {"run": self._run, "epoch": self.epoch}

    def _made_before(self) -> int | None:
        """The version that was made for this epoch of the run, by an attempt that was killed."""
        name = self.config.dataset
        for version in range(self._client.dataset(name).version, 0, -1):
            mark = self._client.dataset(name, version=version).manifest.metadata.get(RENEWED)
            if mark == self._mark:
                return version
            if mark is None or mark["run"] != self._run or mark["epoch"] < self.epoch:
                return None
        return None

    def _append(self, rows: pa.Table) -> int:
        config, client = self.config, self._client
        before = client.dataset(config.dataset)
        if SPLIT in before.schema.names and SPLIT not in rows.column_names:
            number = dict(before.manifest.metadata)["splits"].index(config.train_split)
            rows = rows.append_column(SPLIT, pa.array([number] * len(rows), pa.int8()))
        about = {**before.manifest.metadata, RENEWED: self._mark}
        with client.append_dataset(config.dataset, base=before, metadata=about) as writer:
            writer.write_table(rows)
        return before.version + 1

    def _define_renewed(self, version: int, split: str) -> None:
        """Repeating it changes nothing: a kill may have come between the rows and their split."""
        config, client = self.config, self._client
        before = client.dataset(config.dataset, version=version - 1)
        after = client.dataset(config.dataset, version=version)
        if config.test_split is not None and config.test_dataset is None:
            kept = client.dataset(config.dataset, version=version - 1, split=config.test_split)
            ids = kept.rows_at(np.arange(len(kept)))
            after.define_selection(config.test_split, rows=ids)
        # Last, for it is by this split that the version is followed.
        after.define_selection(split, rows=np.arange(len(before), len(after)))

    def close(self) -> None:
        self.train_loader.close()
        if self._test_loader is not None:
            self._test_loader.close()


def whole(batch: Mapping[str, Any]) -> Batch:
    """A loader's batch with ``weight`` and ``id`` in place of the loader's own columns, and one
    row of zeros, which weighs nothing, if it was empty: every rank runs forward and backward, and
    no collective waits for ever."""
    columns = {name: values for name, values in batch.items() if not name.startswith("_")}
    ids, mask = batch["_ids"], batch.get("_mask")
    columns["weight"] = torch.ones(len(ids), device=ids.device) if mask is None else mask.float()
    columns["id"] = ids if mask is None else torch.where(mask, ids, -1)
    return columns if len(ids) else _one_row(columns)


def real_ids(batch: Batch) -> tuple[int, ...]:
    """The rows of the dataset version that a batch holds, padding left out."""
    ids_B: Tensor = batch["id"]
    return tuple(each for each in ids_B.tolist() if each >= 0)


def cut(batch: Batch, num_parts: int) -> list[Batch]:
    """The rows of a batch in so many consecutive parts, as even as can be; none is empty."""
    if num_parts == 1:
        return [batch]
    num_rows = len(batch["id"])
    bounds = [num_rows * number // num_parts for number in range(num_parts + 1)]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        part = {name: values[start:stop] for name, values in batch.items()}
        parts.append(part if stop > start else _one_row(part))
    return parts


def padded(batch: Batch, num_rows: int) -> Batch:
    """The batch with rows of zeros, which weigh nothing, to make up *num_rows*."""
    missing = num_rows - len(batch["id"])
    if missing == 0:
        return batch
    row = _one_row({name: values[:0] for name, values in batch.items()})
    return {
        name: torch.cat([values, *[row[name]] * missing])
        if isinstance(values, Tensor)
        else [*values, *[*row[name]] * missing]
        for name, values in batch.items()
    }


def _one_row(empty: Batch) -> Batch:
    row = {name: _zeros_like(values) for name, values in empty.items()}
    row["id"] = torch.full_like(row["id"], -1)
    return row


def _zeros_like(empty: Tensor | Sequence[Any]) -> Any:
    if isinstance(empty, Tensor):
        return empty.new_zeros((1, *empty.shape[1:]))
    return [torch.zeros(0, dtype=torch.int64)]
