"""Batches of a Forebay dataset as the model takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import forebay
from forebay_trainer.config import setting
from forebay_trainer.parallel import Parallel
from forebay_wire.errors import InvalidRequest
from forebay_wire.order import Cut


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    dataset: str = setting("mnist", "name of the dataset")
    version: int | Literal["latest"] = setting("latest", "which version of it")
    train_split: str | None = setting("train", "split to train on; none: all rows")
    test_split: str | None = setting("test", "split to validate on; none: no validation")
    image_column: str = setting("image", "column of the images")
    label_column: str = setting("label", "column of the labels")
    global_batch_size: int = setting(
        128, "samples of one step, all ranks together: other ranks change nothing in the order"
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
    num_threads: int = setting(1, "threads of each rank that make batches ahead")
    mean: float = setting(0.0, "subtracted from the pixels, which lie in 0 to 1")
    std: float = setting(1.0, "the pixels are divided by it")

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise InvalidRequest(
                f"global_batch_size must be at least 1, not {self.global_batch_size}"
            )
        if self.shuffle != "block" and (self.window_blocks, self.block_rows) != (None, None):
            raise InvalidRequest(
                f"window_blocks and block_rows belong to shuffle=block, not to {self.shuffle}"
            )
        for name in ("window_blocks", "block_rows"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {number}")
        if self.std <= 0:
            raise InvalidRequest(f"std must be above 0, not {self.std}")

    def build(self, client: forebay.Client, parallel: Parallel, seed: int) -> Data:
        """Opens the splits; NotFound names a dataset, version or split that is not there."""
        train = client.dataset(self.dataset, version=self.version, split=self.train_split)
        if len(train) == 0:
            raise InvalidRequest(
                f"split {self.train_split!r} of dataset {self.dataset!r} has no samples; "
                "train on another split"
            )
        train_loader = forebay.DataLoader(
            train,
            global_batch_size=self.global_batch_size,
            shuffle=self.shuffle,
            window_blocks=self.window_blocks,
            block_rows=self.block_rows,
            seed=seed,
            last_batch=self.last_batch,
            num_threads=self.num_threads,
            device=parallel.device,
            include_ids=True,
        )
        test_loader = None
        if self.test_split is not None:
            test_loader = forebay.DataLoader(
                client.dataset(self.dataset, version=self.version, split=self.test_split),
                global_batch_size=self.global_batch_size,
                shuffle="none",
                num_threads=self.num_threads,
                device=parallel.device,
            )
        return Data(self, train_loader, test_loader, num_samples=len(train))


@dataclass(frozen=True)
class Examples:
    """This rank's part of a global batch, on its device. Shape letters: B samples, C, H, W.

    Never empty: a rank whose part is empty gets one row of zeros with weight 0, so that every rank
    runs forward and backward and no collective waits for ever.
    """

    images: Tensor
    """Float32 (B, H, W) or (B, C, H, W), normalised."""
    labels: Tensor
    """Int64 (B,)."""
    weights: Tensor
    """Float32 (B,): 1 for a sample, 0 for padding."""
    ids: list[int]
    """Row numbers of the samples in the dataset version, padding left out; empty if unknown."""

    @property
    def num_samples(self) -> float:
        return float(self.weights.sum())


class Data:
    """The loaders of one run: one to train, one to validate."""

    def __init__(
        self,
        config: DataConfig,
        train_loader: forebay.DataLoader,
        test_loader: forebay.DataLoader | None,
        *,
        num_samples: int,
    ) -> None:
        self.train_loader = train_loader
        self.num_samples = num_samples
        self._test_loader = test_loader
        self._config = config

    @property
    def steps_per_epoch(self) -> int:
        config = self._config
        return Cut(self.num_samples, config.global_batch_size, config.last_batch).num_steps

    @property
    def position(self) -> int:
        """Samples of the current epoch that all ranks together have got so far."""
        return int(self.train_loader.state_dict()["position"])

    def test_batches(self) -> Iterator[Examples]:
        """This rank's parts of one pass over the test split, in order."""
        if self._test_loader is None:
            return
        for batch in self._test_loader:
            yield self.prepare(batch)

    def close(self) -> None:
        self.train_loader.close()
        if self._test_loader is not None:
            self._test_loader.close()

    @property
    def has_test(self) -> bool:
        return self._test_loader is not None

    def prepare(self, batch: Mapping[str, Any]) -> Examples:
        """A loader's batch as the model takes it."""
        config = self._config
        pixels, labels = batch[config.image_column], batch[config.label_column].long()
        mask = batch.get("_mask")
        weights = torch.ones(len(labels), device=labels.device) if mask is None else mask.float()
        ids = batch.get("_ids")
        real_ids = [] if ids is None else (ids if mask is None else ids[mask]).tolist()
        if len(labels) == 0:
            pixels, labels, weights = (_one_row(each) for each in (pixels, labels, weights))
        scale = 255.0 if pixels.dtype == torch.uint8 else 1.0
        images = pixels.float().div_(scale) if scale != 1.0 else pixels.float()
        images = (images - config.mean) / config.std
        return Examples(images, labels, weights, real_ids)


def _one_row(empty: Tensor) -> Tensor:
    return empty.new_zeros((1, *empty.shape[1:]))
