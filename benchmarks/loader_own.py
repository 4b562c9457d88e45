"""Forebay as a contender, and yardsticks: torch over a memmap, a bare copy, bare decoding."""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_child import Child
from loader_data import BATCH, Case, Place, decode, samples

import forebay
from forebay_server.testing.daemon import DaemonProcess


def label(batch: Any) -> np.ndarray:
    found: np.ndarray = batch["y"].numpy()
    return found


class Forebay:
    """A daemon of its own, and full shuffles."""

    def __init__(self, folder: Path) -> None:
        self.client = forebay.connect(folder / "data")
        self.folder = folder
        self._also = [daemon_of(folder / "data")]
        self._cold: forebay.Client | None = None

    def prepare(self, case: Case) -> None:
        write(self.client, case)

    def publish(self, case: Case, place: Place) -> None:
        """By a daemon with an object tier; then there is one that has nothing but that."""
        url = f"s3://{place.bucket}/tier"
        tiers = ("--object-url", url, "--hdd-path", "none")
        with (
            DaemonProcess(self.folder / "writer", *tiers, environment=place.environment) as daemon,
            forebay.connect(daemon.data) as client,
        ):
            write(client, case)
            client.dataset(case.name).wait("remote", timeout=300)
        cold = self.folder / "cold"
        subprocess.run(
            [sys.executable, "-m", "forebay_server", "recover", "--data", str(cold), url],
            env={**os.environ, **place.environment},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        daemon = DaemonProcess(cold, *tiers, environment=place.environment)
        atexit.register(daemon.kill)
        daemon.start().wait_ready()
        self._cold = forebay.connect(cold)

    def open_cold(self, case: Case, workers: int) -> Any:
        assert self._cold is not None, "publish first"
        return self._loader(self._cold, case, workers)

    def open(self, case: Case, workers: int) -> Any:
        return self._loader(self.client, case, workers)

    def _loader(self, client: forebay.Client, case: Case, workers: int) -> Any:
        pictures = case.name == "jpeg115k"
        return forebay.DataLoader(
            client.dataset(case.name),
            global_batch_size=BATCH,
            shuffle="full",
            num_threads=workers,
            transform=forebay.decode_images(case.column) if pictures else None,
        )

    def rows(self, batch: Any) -> int:
        return len(batch["y"])

    def labels(self, batch: Any) -> np.ndarray:
        return label(batch)

    def items(self, case: Case) -> Any:
        return self.client.dataset(case.name)

    def facts(self) -> dict[str, Any]:
        return {"version": importlib.metadata.version("forebay"), "also": self._also}


def write(client: forebay.Client, case: Case) -> None:
    kind = "binary" if case.name == "jpeg115k" else forebay.Array(case.dtype, case.shape)
    schema = {case.column: kind, "y": "int64"}
    with client.create_dataset(case.name, schema=schema) as writer:
        for sample in samples(case):
            writer.write(**sample)


def daemon_of(folder: Path) -> int:
    """The process that serves *folder*."""
    pid: int = json.loads((folder / "daemon.json").read_text())["pid"]
    return pid


class Memmap:
    """The fastest that torch's own loader can be: a map-style dataset that answers whole batches
    from one file of equal rows. It has no checks, no versions, and nothing but such rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, case: Case) -> None:
        path = self.folder / f"{case.name}.npy"
        shape = (case.num_samples, *case.shape)
        out = np.lib.format.open_memmap(path, "w+", np.dtype(case.dtype), shape)
        for number, sample in enumerate(samples(case)):
            out[number] = sample[case.column]
        out.flush()

    def open(self, case: Case, workers: int) -> Any:
        return torch.utils.data.DataLoader(
            MemmapRows(self.folder / f"{case.name}.npy", case.column),
            batch_size=BATCH,
            shuffle=True,
            num_workers=workers,
            collate_fn=as_it_is,
            persistent_workers=workers > 0,
        )

    def rows(self, batch: Any) -> int:
        return len(batch["y"])

    def labels(self, batch: Any) -> np.ndarray:
        return label(batch)

    def items(self, case: Case) -> Any:
        return MemmapRows(self.folder / f"{case.name}.npy", case.column)

    def facts(self) -> dict[str, Any]:
        return {"version": importlib.metadata.version("torch"), "also": []}


def as_it_is(batch: Any) -> Any:
    return batch


class MemmapRows(torch.utils.data.Dataset[Any]):
    """Rows of a file, and their numbers."""

    def __init__(self, path: Path, column: str) -> None:
        self._rows = np.load(path, mmap_mode="r")
        self._numbers = np.arange(len(self._rows))
        self._column = column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return {self._column: np.array(self._rows[index]), "y": index}

    def __getitems__(self, indices: list[int]) -> Any:
        rows = torch.from_numpy(self._rows[indices])
        return {self._column: rows, "y": torch.from_numpy(self._numbers[indices])}


class Bare:
    """No loader at all: JPEG files that lie in memory are decoded by as many threads, and batches
    of tokens are copied, in order, into fresh tensors."""

    def __init__(self, folder: Path) -> None:
        self._made: dict[str, Any] = {}

    def prepare(self, case: Case) -> None:
        values = [sample[case.column] for sample in samples(case)]
        self._made[case.name] = values if case.name == "jpeg115k" else np.stack(values)

    def open(self, case: Case, workers: int) -> Any:
        values = self._made[case.name]
        return Decoded(values, workers) if case.name == "jpeg115k" else Copied(values)

    def rows(self, batch: Any) -> int:
        return int(batch)

    def labels(self, batch: Any) -> np.ndarray:
        raise NotImplementedError("it has none")

    def items(self, case: Case) -> Any:
        raise NotImplementedError("it has none")

    def facts(self) -> dict[str, Any]:
        return {"version": "", "also": []}


class Decoded:
    """An epoch decodes all files; the pixels are dropped. A batch is the number of its rows."""

    def __init__(self, files: list[bytes], workers: int) -> None:
        self._files, self._workers = files, workers

    def __iter__(self) -> Any:
        if self._workers == 0:
            for data in self._files:
                decode(data)
        else:
            parts = [self._files[worker :: self._workers] for worker in range(self._workers)]
            threads = [threading.Thread(target=decode_all, args=(part,)) for part in parts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        yield len(self._files)


def decode_all(files: list[bytes]) -> None:
    for data in files:
        decode(data)


class Copied:
    """Batches of consecutive rows, copied into tensors as torch allocates them."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = torch.from_numpy(rows)

    def __iter__(self) -> Any:
        for start in range(0, len(self._rows), BATCH):
            part = self._rows[start : start + BATCH]
            out = torch.empty_like(part)
            out.copy_(part)
            yield len(out)


CONTENDERS = {"forebay": Forebay, "memmap": Memmap, "bare": Bare}


def make(name: str, folder: str, *, quick: bool) -> Child:
    return Child(CONTENDERS[name], Path(folder) / name, quick=quick)
