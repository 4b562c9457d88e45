"""Lightning's checkpoints in Forebay: ``Trainer(plugins=[ForebayCheckpointIO(client, "my-run")])``.

What Lightning takes for a file is a small pointer to a generation. So its callbacks, ``last`` links
and ``ckpt_path=`` work as always, and the bytes are verified, durable and stored once.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch.distributed.checkpoint.state_dict_saver import save

from forebay.checkpoint.dcp_writer import StorageWriter
from forebay.checkpoint.lazy import open as open_generation
from forebay.checkpoint.planning import StateSavePlanner
from forebay.checkpoint.service import CheckpointService, Client
from forebay.publish_file import publish
from forebay_wire.errors import Conflict, InvalidRequest
from forebay_wire.ids import GenerationId, check_name

_log = logging.getLogger(__name__)

_FORMAT: Final = "forebay-generation-1"


@dataclass(frozen=True)
class _Pointer:
    """What lies where Lightning believes the checkpoint to be."""

    generation: GenerationId

    @classmethod
    def read(cls, path: Path) -> _Pointer:
        try:
            body = json.loads(path.read_bytes())
            if body["format"] != _FORMAT:
                raise ValueError(body["format"])
            return cls(GenerationId(body["run"], int(body["attempt"]), int(body["step"])))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f"{path} points to no generation ({error!r}): it is no checkpoint of "
                "ForebayCheckpointIO; load it without this plugin"
            ) from error

    def encode(self) -> bytes:
        found = self.generation
        body = {
            "format": _FORMAT,
            "run": found.run,
            "attempt": found.attempt,
            "step": found.step,
        }
        return json.dumps(body).encode()


class ForebayCheckpointIO(CheckpointIO):
    """Saves what Lightning hands over as generations of *run*, each an attempt of its own.

    For strategies whose rank 0 saves the whole state (one device, DDP); sharded ones do not ask a
    plugin: use ``forebay.Checkpointer`` beside them. Values that would need pickle are refused by
    name. Durable on this node when ``save_checkpoint`` returns.
    """

    def __init__(self, client: Client, run: str, *, timeout: float = 600.0) -> None:
        self._client = client
        self._run = check_name("run", run)
        self._timeout = timeout

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        """Save; the pointer appears at *path* once the generation is durable."""
        if storage_options is not None:
            raise InvalidRequest("ForebayCheckpointIO takes no storage_options")
        step = int(checkpoint.get("global_step", 0))
        writer = StorageWriter(self._client, self._run, step, timeout=self._timeout)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(
                _plain(checkpoint), storage_writer=writer, planner=StateSavePlanner(), no_dist=True
            )
        assert writer.saved is not None
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        replaced = None
        if target.is_file() and not target.is_symlink():  # a link shows another's generation
            replaced = _Pointer.read(target).generation
        with publish(target) as file:
            file.write(_Pointer(writer.saved).encode())
        if replaced is not None:
            self._delete(replaced)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """What the pointer at *path* names, verified; *path* may be ``RUN@SELECTOR``, too.

        Nothing is unpickled, so *weights_only* makes no difference. Of *map_location* a device is
        respected; a function is not asked.
        """
        with self._opened(path) as opened:
            found = opened.state_dict()
        if isinstance(map_location, str | torch.device):
            found = _moved(found, torch.device(map_location))
        return {str(name): value for name, value in found.items()}

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the pointer and its generation, for good."""
        target = Path(path)
        if not target.exists():
            return
        is_link = target.is_symlink()
        generation = _Pointer.read(target).generation
        target.unlink()
        if not is_link:
            self._delete(generation)

    def _delete(self, generation: GenerationId) -> None:
        try:
            CheckpointService(self._client, generation.run).delete(generation)
        except Conflict as error:  # the newest attempt stands on it: a later pruning takes it
            _log.warning("generation %s stays: %s", generation, error)

    def _opened(self, path: str | os.PathLike[str]) -> Any:
        target = Path(path)
        if target.exists():
            found = _Pointer.read(target).generation
            selector = f"{found.attempt}/{found.step}"
            return open_generation(self._client, found.run, selector, timeout=self._timeout)
        run, at, selector = os.fspath(path).partition("@")
        if not at:
            raise FileNotFoundError(f"there is no checkpoint {path}")
        return open_generation(self._client, run, selector, timeout=self._timeout)


def _plain(value: Any) -> Any:
    """*value* with dicts instead of their subclasses, which Lightning has a few of."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if type(value) is list else value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if type(value) is list else value
