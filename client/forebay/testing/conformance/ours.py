"""Adapters for Forebay's loaders, alone and inside other loaders; and a data set for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch.utils.data

from forebay.client import Client
from forebay.dataset.loader import DataLoader
from forebay.dataset.schema import Array
from forebay.dataset.stream import StreamingDataset
from forebay.testing.conformance.subject import (
    Environment,
    LoaderAdapter,
    Sample,
    Setting,
    payload,
)
from forebay_wire.limits import KIB

SCHEMA: Final = {"number": "int64", "payload": Array("uint8", (32,))}


def write_samples(client: Client, name: str, num_samples: int) -> None:
    """Create data set *name* of the samples that the kit expects."""
    with client.create_dataset(
        name, schema=SCHEMA, shard_bytes=64 * KIB, batch_bytes=1 * KIB
    ) as writer:  # several record batches even of few samples
        for number in range(num_samples):
            writer.write(number=number, payload=np.frombuffer(payload(number), np.uint8))


class ForebayEnvironment(Environment):
    """A data set kept by a daemon: it can be appended to and deleted."""

    def __init__(self, client: Client, name: str, num_samples: int) -> None:
        self.client = client
        self.name = name
        self.num_samples = num_samples

    @contextmanager
    def fresh(self) -> Iterator[None]:
        self._write_again()
        yield

    def _write_again(self) -> None:
        if self.name in self.client.datasets():
            self.client.delete_dataset(self.name, now=True)
        write_samples(self.client, self.name, self.num_samples)

    @contextmanager
    def appended(self) -> Iterator[None]:
        with self.client.append_dataset(self.name) as writer:
            for number in range(self.num_samples, self.num_samples + 50):
                writer.write(number=number, payload=np.frombuffer(payload(number), np.uint8))
        yield
        self._write_again()

    @contextmanager
    def deleted(self) -> Iterator[None]:
        self.client.delete_dataset(self.name, now=True)
        yield
        self._write_again()


class _Ours:
    """What all of them share."""

    def __init__(self, client: Client, name: str, options: Mapping[str, Any]) -> None:
        self._client = client
        self._name = name
        self._options = {"shuffle": "full", "seed": 7, **options}
        self.shuffles = self._options["shuffle"] != "none"

    def _arguments(self, setting: Setting, version: int | None) -> dict[str, Any]:
        wanted = "latest" if version is None else version
        self._opened = self._client.dataset(self._name, version=wanted)
        return {
            "dataset": self._opened,
            "global_batch_size": setting.shape.global_batch_size,
            "rank": setting.rank,
            "world_size": setting.shape.world_size,
            **self._options,
        }


class OfDataLoader(_Ours):
    """``forebay.DataLoader``; its workers are threads."""

    def open(self, setting: Setting) -> None:
        state = None if setting.states is None else setting.states[0]
        arguments = self._arguments(setting, None if state is None else state["version"])
        self._loader = DataLoader(**arguments, num_threads=setting.shape.num_workers)
        if state is not None:
            self._loader.load_state_dict(state)
        self._batches: Iterator[dict[str, Any]] | None = None

    def next(self) -> Sequence[Sample] | None:
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches, None)
        if batch is None:
            self._batches = None
            return None
        return samples_of(batch)

    def state(self) -> Any:
        return self._loader.state_dict()

    def workers(self) -> Sequence[int]:
        return []

    def close(self) -> None:
        self._loader.close()


class OfStream(_Ours):
    """``forebay.StreamingDataset`` in ``torch.utils.data.DataLoader``, with its workers."""

    def __init__(
        self,
        client: Client,
        name: str,
        options: Mapping[str, Any],
        *,
        method: str = "fork",
        is_persistent: bool = False,
    ) -> None:
        """*method* starts the workers: fork, forkserver or spawn."""
        super().__init__(client, name, options)
        self._method = method
        self._is_persistent = is_persistent
        self._batches: Any = None
        self._last: dict[str, Any] | None = None

    def open(self, setting: Setting) -> None:
        state = None if setting.states is None else setting.states[0]
        self._dataset = StreamingDataset(
            **self._arguments(setting, None if state is None else state["version"])
        )
        if state is not None:
            self._dataset.load_state_dict(state)
        self._first = self._dataset.state_dict()
        self._loader = self._make_loader(setting.shape.num_workers)

    def _make_loader(self, num_workers: int) -> Any:
        return torch.utils.data.DataLoader(self._dataset, **self._loader_options(num_workers))

    def _loader_options(self, num_workers: int) -> dict[str, Any]:
        return {
            "batch_size": None,
            "num_workers": num_workers,
            "multiprocessing_context": self._method if num_workers else None,
            "persistent_workers": self._is_persistent and num_workers > 0,
        }

    def next(self) -> Sequence[Sample] | None:
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches, None)
        if batch is None:
            self._batches = None
            return None
        self._last = batch
        return samples_of(batch)

    def state(self) -> Any:
        return self._first if self._last is None else self._dataset.state_dict(after=self._last)

    def workers(self) -> Sequence[int]:
        return [worker.pid for worker in getattr(self._batches, "_workers", ())]

    def close(self) -> None:
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        self._batches = self._loader = None
        if shutdown is not None:
            shutdown()


class OfStatefulLoader(OfStream):
    """The same in torchdata's StatefulDataLoader, by that loader's own state.

    The loader takes its state back on as many workers and with the same batch; the data set
    takes it on others.
    """

    def open(self, setting: Setting) -> None:
        found = None if setting.states is None else setting.states[0]
        version = None if found is None else found["version"]
        self._dataset = StreamingDataset(**self._arguments(setting, version))
        shape = [setting.shape.num_workers, setting.shape.global_batch_size]
        self._shape = shape
        is_same = found is not None and found["shape"] == shape
        if found is not None and not is_same:
            self._dataset.load_state_dict(found["loader"])
        self._loader = self._make_loader(setting.shape.num_workers)
        if found is not None and is_same:
            self._loader.load_state_dict(found["loader"])

    def _make_loader(self, num_workers: int) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(self._dataset, **self._loader_options(num_workers))

    def state(self) -> Any:
        state = self._loader.state_dict()
        return {"loader": state, "shape": self._shape, "version": self._opened.version}


def samples_of(batch: Mapping[str, Any]) -> list[Sample]:
    """Number and payload of each sample of a batch, without padding."""
    numbers, payloads = batch["number"].tolist(), batch["payload"].numpy()
    real = batch["_mask"].tolist() if "_mask" in batch else [True] * len(numbers)
    rows = zip(numbers, payloads, real, strict=True)
    return [(number, data.tobytes()) for number, data, is_real in rows if is_real]


def our_adapters(
    client: Client, name: str, **options: Any
) -> dict[str, Callable[[], LoaderAdapter]]:
    """Makers of adapters by what they are, for the data set *name*."""
    made: dict[str, Callable[[], LoaderAdapter]] = {
        "DataLoader": lambda: OfDataLoader(client, name, options)
    }
    for method in ("fork", "forkserver", "spawn"):
        for is_persistent in (False, True):
            key = f"torch {method}{' persistent' if is_persistent else ''}"
            arguments: dict[str, Any] = {"method": method, "is_persistent": is_persistent}
            made[key] = lambda arguments=arguments: OfStream(client, name, options, **arguments)  # type: ignore[misc]
            made[f"torchdata {key.removeprefix('torch ')}"] = (
                lambda arguments=arguments: OfStatefulLoader(client, name, options, **arguments)  # type: ignore[misc]
            )
    return made
