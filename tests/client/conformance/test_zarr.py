"""Samples of zarr arrays keep every promise of the kit, alone and with workers of torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import zarr
from environment import DaemonEnvironment, daemon_environment

from forebay.testing.conformance import Setting, Subject, check_loader, payload
from forebay.testing.conformance.ours import OfDataLoader, OfStream
from forebay.zarr import ForebayStore, samples

pytestmark = [
    # Workers are forked beside threads on purpose, and more of them than there are cores.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

NEEDS_PROCESSES = "a_killed_worker_is_not_silent"


class ZarrEnvironment(DaemonEnvironment):
    """The samples lie in two arrays, whose chunks are of different lengths."""

    def _write_again(self) -> None:
        if self.name in self.client.datasets():
            self.client.delete_dataset(self.name, now=True)
        self._write(0, self.num_samples)
        if self._is_remote:
            self.client.dataset(self.name).wait("remote", timeout=60)

    @contextmanager
    def appended(self) -> Iterator[None]:
        self._write(self.num_samples, self.num_samples + 50)
        yield
        self._write_again()

    @property
    def _address(self) -> str:
        return str(self._daemon.address()["rpc"])

    def _write(self, start: int, stop: int) -> None:
        rows = np.array([np.frombuffer(payload(n), np.uint8) for n in range(start, stop)])
        with tempfile.TemporaryDirectory() as session:
            store = ForebayStore(self.name, address=self._address, session=session)
            root = zarr.open_group(store, mode="a")
            for name, values, chunk in (
                ("number", np.arange(start, stop), 7),
                ("payload", rows, 4),
            ):
                shape = (stop, *values.shape[1:])
                if start:
                    array: Any = root[name]
                    array.resize(shape)
                else:
                    chunks = (chunk, *values.shape[1:])
                    array = root.create_array(name, shape=shape, chunks=chunks, dtype=values.dtype)
                array[start:stop] = values
            store.commit()


class OfSamples:
    """What the adapters share: they read the same through :func:`samples`."""

    _opened: Any

    def _arguments(self, setting: Setting, version: int | None) -> dict[str, Any]:
        found: dict[str, Any] = super()._arguments(setting, version)  # type: ignore[misc]
        return {**found, "dataset": samples(found["dataset"], ["number", "payload"])}


class OfZarrLoader(OfSamples, OfDataLoader):
    pass


class OfZarrStream(OfSamples, OfStream):
    pass


LOADERS = {"DataLoader": OfZarrLoader, "torch fork": OfZarrStream}


def check(environment: ZarrEnvironment, loader: str, seed: int = 0, **options: Any) -> set[str]:
    adapter = LOADERS[loader]
    subject = Subject(lambda: adapter(environment.client, environment.name, options), environment)
    report = check_loader(subject, seed=seed)
    report.check()
    return {one.promise for one in report.outcomes if one.verdict == "not tested"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", ["local", "http"])
@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize("loader", LOADERS)
def test_samples_of_arrays_keep_every_promise(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, way: str, shuffle: str, loader: str
) -> None:
    if way == "http":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    blocks = {"block_rows": 28, "window_blocks": 2} if shuffle == "block" else {}
    with daemon_environment(tmp_path, 83, kind=ZarrEnvironment) as environment:
        untested = check(environment, loader, shuffle=shuffle, **blocks)
        assert untested == ({NEEDS_PROCESSES} if loader == "DataLoader" else set())
