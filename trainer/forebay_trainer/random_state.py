"""The random generators of all ranks, as a part of the checkpoint."""

from __future__ import annotations

import hashlib
import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from forebay_trainer.per_rank import from_rows, to_rows


class RandomState:
    """Of torch (CPU and this rank's GPU), numpy's and Python's global generators.

    On the number of ranks that saved it every rank goes on with its own numbers; on another number
    `is_fresh` turns true and the caller seeds anew.
    """

    def __init__(self, ranks: DeviceMesh | None, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self.is_fresh = True

    def seed(self, *numbers: int) -> None:
        """Seeds all generators with a number made of *numbers*."""
        digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little")
        torch.manual_seed(seed >> 1)  # takes 63 bits, and seeds the GPUs as well
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return {name: to_rows(state, self._ranks) for name, state in self._states().items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        found = {name: from_rows(rows, self._ranks) for name, rows in saved.items()}
        own = {name: row.cpu() for name, row in found.items() if row is not None}
        self.is_fresh = own.keys() != self._states().keys()
        if self.is_fresh:
            return
        torch.set_rng_state(own["torch"])
        if "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self._device)
        _, *rest = np.random.get_state(legacy=True)
        keys, position = own["numpy"][:-1], int(own["numpy"][-1])
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, *rest[2:]))
        random.setstate((3, tuple(own["python"].tolist()), None))

    def _states(self) -> dict[str, Tensor]:
        _, keys, position, *_ = cast(tuple[Any, ...], np.random.get_state(legacy=True))
        states = {
            "torch": torch.get_rng_state(),
            "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
            "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        }
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states
