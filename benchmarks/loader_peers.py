"""LitData, Mosaic Streaming and WebDataset as contenders, each in its strongest shuffle.

Warm, they read local files: what is compared then is the loader, not the network.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import tarfile
import warnings
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch
from loader_child import Child
from loader_data import BATCH, Case, Place, decode, samples

warnings.filterwarnings("ignore")

SHARD_BYTES = 16 << 20
"""Several of them, so that there is something to shuffle and to share out among workers."""


def declare_vision_operators() -> None:
    """torchvision's wheel is built for CUDA: beside torch for the CPU its operators are missing,
    and without their declarations it cannot be imported, which Mosaic Streaming does."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


_kept: list[Any] = []


class Peer:
    """What the three have in common."""

    package = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.published: Place | None = None

    def place(self, case: Case) -> Path:
        return self.folder / case.name

    def publish(self, case: Case, place: Place) -> None:
        """The same files, in the bucket."""
        os.environ.update(place.environment, S3_ENDPOINT_URL=place.endpoint)
        self.published = place
        client = boto3.client("s3")
        root = self.place(case)
        for path in root.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), place.bucket, path.relative_to(root).as_posix())

    def rows(self, batch: Any) -> int:
        return len(batch["y"])

    def labels(self, batch: Any) -> np.ndarray:
        return np.asarray(batch["y"])

    def facts(self) -> dict[str, Any]:
        return {"version": importlib.metadata.version(self.package), "also": []}


def bucket_of(peer: Peer) -> str:
    """Where it was published."""
    assert peer.published is not None, "publish first"
    return peer.published.bucket


def decoded(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample, with its JPEG file made pixels."""
    if "jpeg" in sample:
        return {"jpeg": torch.from_numpy(decode(sample["jpeg"])), "y": sample["y"]}
    return sample


class Mosaic(Peer):
    """MDS shards and ``StreamingDataset``; its shuffle over all samples of all shards."""

    package = "mosaicml-streaming"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        declare_vision_operators()
        import streaming

        streaming.base.util.clean_stale_shared_memory()
        logging.getLogger("streaming").setLevel(logging.ERROR)

        class Pictures(streaming.StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                return decoded(super().__getitem__(at))

        self._streaming, self._pictures = streaming, Pictures

    def prepare(self, case: Case) -> None:
        kind = "bytes" if case.name == "jpeg115k" else f"ndarray:{case.dtype}:{case.shape[0]}"
        columns = {case.column: kind, "y": "int"}
        with self._streaming.MDSWriter(
            out=str(self.place(case)), columns=columns, size_limit=SHARD_BYTES
        ) as out:
            for sample in samples(case):
                out.write(sample)

    def open(self, case: Case, workers: int) -> Any:
        return self._loader(case, workers, local=str(self.place(case)))

    def open_cold(self, case: Case, workers: int) -> Any:
        remote = f"s3://{bucket_of(self)}"
        return self._loader(case, workers, local=str(self.folder / "near"), remote=remote)

    def _loader(self, case: Case, workers: int, **where: str) -> Any:
        kind = self._pictures if case.name == "jpeg115k" else self._streaming.StreamingDataset
        dataset = kind(**where, shuffle=True, shuffle_algo="py1s", batch_size=BATCH)
        return torch.utils.data.DataLoader(
            dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
        )

    def items(self, case: Case) -> Any:
        return self._streaming.StreamingDataset(local=str(self.place(case)), batch_size=1)


class LitData(Peer):
    """Chunks by ``optimize`` and ``StreamingDataset``; tokens by its loader for tokens."""

    package = "litdata"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(folder / "cache")
        os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
        import litdata

        logging.getLogger("litdata").setLevel(logging.ERROR)

        class Pictures(litdata.StreamingDataset):
            def __getitem__(self, index: Any) -> Any:
                return decoded(super().__getitem__(index))

        self._litdata, self._pictures = litdata, Pictures

    def prepare(self, case: Case) -> None:
        from litdata.streaming.cache import Cache
        from litdata.streaming.item_loader import TokensLoader

        loader = TokensLoader(block_size=case.shape[0]) if case.column == "tokens" else None
        place = self.place(case)
        place.mkdir(parents=True)
        cache = Cache(str(place), chunk_bytes=SHARD_BYTES, item_loader=loader)
        for number, sample in enumerate(samples(case)):
            if case.column == "tokens":
                cache._add_item(number, torch.from_numpy(sample["tokens"]))
            elif case.column == "x":
                cache._add_item(number, {"x": torch.from_numpy(sample["x"]), "y": sample["y"]})
            else:
                cache._add_item(number, sample)
        cache.done()
        cache.merge(1)

    def open(self, case: Case, workers: int) -> Any:
        return self._loader(case, workers, str(self.place(case)))

    def open_cold(self, case: Case, workers: int) -> Any:
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # the server has no TLS
        near, url = str(self.folder / "near"), f"s3://{bucket_of(self)}"
        options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
        return self._loader(case, workers, url, cache_dir=near, storage_options=options)

    def _loader(self, case: Case, workers: int, place: str, **more: Any) -> Any:
        from litdata.streaming.item_loader import TokensLoader

        loader = TokensLoader(block_size=case.shape[0]) if case.column == "tokens" else None
        kind = self._pictures if case.name == "jpeg115k" else self._litdata.StreamingDataset
        dataset = kind(place, shuffle=True, item_loader=loader, **more)
        return self._litdata.StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
        )

    def rows(self, batch: Any) -> int:
        return len(batch) if isinstance(batch, torch.Tensor) else len(batch["y"])

    def items(self, case: Case) -> Any:
        return self._litdata.StreamingDataset(str(self.place(case)), shuffle=False)


class WebDataset(Peer):
    """tar shards; a buffer of 1,000 samples over shuffled shards."""

    package = "webdataset"

    def prepare(self, case: Case) -> None:
        place = self.place(case)
        place.mkdir(parents=True)
        archive, used = None, SHARD_BYTES
        for number, sample in enumerate(samples(case)):
            if used >= SHARD_BYTES:
                if archive is not None:
                    archive.close()
                archive = tarfile.open(place / f"{number:09}.tar", "w")  # noqa: SIM115
                used = 0
            value = sample[case.column]
            data = value if isinstance(value, bytes) else value.tobytes()
            assert archive is not None
            for end, content in (("bin", data), ("y", number.to_bytes(8, "little"))):
                member = tarfile.TarInfo(f"{number:09}.{end}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            used += len(data)
        if archive is not None:
            archive.close()

    def open(self, case: Case, workers: int) -> Any:
        return self._loader(case, workers, sorted(map(str, self.place(case).glob("*.tar"))))

    def open_cold(self, case: Case, workers: int) -> Any:
        """Through the program that it reads from the web with; it keeps nothing."""
        client, bucket = boto3.client("s3"), bucket_of(self)
        names = [one["Key"] for one in client.list_objects_v2(Bucket=bucket)["Contents"]]
        urls = [
            client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": name})
            for name in sorted(names)
        ]
        return self._loader(case, workers, [f"pipe:curl -s -f '{url}'" for url in urls])

    def _loader(self, case: Case, workers: int, urls: list[str]) -> Any:
        import webdataset

        def parse(sample: dict[str, Any]) -> dict[str, Any]:
            data, y = sample["bin"], int.from_bytes(sample["y"], "little")
            if case.name == "jpeg115k":
                return {"jpeg": torch.from_numpy(decode(data)), "y": y}
            return {case.column: torch.from_numpy(np.frombuffer(data, case.dtype).copy()), "y": y}

        while len(urls) < 2:  # each worker wants a shard
            urls *= 2
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        dataset = dataset.shuffle(1000).map(parse).batched(BATCH, collation_fn=stacked)
        return torch.utils.data.DataLoader(
            dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )

    def items(self, case: Case) -> Any:
        raise NotImplementedError("a tar is read from its start")


def stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: torch.stack([row[name] for row in rows])
        if isinstance(rows[0][name], torch.Tensor)
        else torch.tensor([row[name] for row in rows])
        for name in rows[0]
        if not name.startswith("__")  # names of samples and shards, which are added by themselves
    }


CONTENDERS = {"mosaic": Mosaic, "litdata": LitData, "webdataset": WebDataset}


def make(name: str, folder: str, *, quick: bool) -> Child:
    return Child(CONTENDERS[name], Path(folder) / name, quick=quick)
