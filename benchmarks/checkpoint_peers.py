"""torch.save, torch.distributed.checkpoint and torch_checkpointing as contenders.

Each has its state dict made beforehand, which its users pay for, and its files and folders synced,
which its users mostly do not do.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from checkpoint_child import Child
from checkpoint_state import Training
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

NUM_THREADS = 2
"""That write, for those who can be told."""


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Peer:
    """What they have in common: a folder of its own for each step."""

    def __init__(self, training: Training, folder: Path, address: str) -> None:
        del address
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.state = training.state_dict()

    def place(self, step: int) -> Path:
        return self.folder / str(step)

    def forget(self, step: int) -> None:
        shutil.rmtree(self.place(step))


class TorchSave(Peer):
    """One file, written by the caller."""

    def begin(self, step: int) -> None:
        place = self.place(step)
        place.mkdir()
        with (place / "state.pt").open("wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        sync(place)
        sync(self.folder)

    def finish(self, begun: None) -> None:
        """It is durable."""


class Dcp(Peer):
    """Those who need a process group."""

    def __init__(self, training: Training, folder: Path, address: str) -> None:
        super().__init__(training, folder, address)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
        torch.distributed.init_process_group("gloo")

    def planner(self) -> DefaultSavePlanner:
        """Whose plans are kept by the class, from the first save on."""
        return DefaultSavePlanner(enable_plan_caching=True)

    def writer(self, step: int) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(
            self.place(step), sync_files=True, thread_count=NUM_THREADS, overwrite=False
        )


class DcpSave(Dcp):
    """Blocking."""

    def begin(self, step: int) -> int:
        dcp.save(self.state, storage_writer=self.writer(step), planner=self.planner())
        sync(self.place(step))
        sync(self.folder)
        return step

    def finish(self, begun: int) -> None:
        """It is durable."""


class DcpThread(Dcp):
    """``async_save`` with a stager that is kept, so that its memory is warm."""

    kind = AsyncCheckpointerType.THREAD

    def __init__(self, training: Training, folder: Path, address: str) -> None:
        super().__init__(training, folder, address)
        cuda = training.device.type == "cuda"
        shared = self.kind is AsyncCheckpointerType.PROCESS
        options = StagingOptions(
            use_pinned_memory=cuda,
            use_shared_memory=shared,
            use_async_staging=cuda,  # without CUDA torch refuses these two
            use_non_blocking_copy=cuda,
        )
        self.stager = DefaultStager(options)

    def begin(self, step: int) -> tuple[int, Any]:
        answer = dcp.async_save(
            self.state,
            storage_writer=self.writer(step),
            planner=self.planner(),
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )
        if hasattr(answer, "staging_completion"):
            answer.staging_completion.result()
            answer = answer.upload_completion
        return step, answer

    def finish(self, begun: tuple[int, Any]) -> None:
        step, upload = begun
        upload.result()
        sync(self.place(step))
        sync(self.folder)


class DcpProcess(DcpThread):
    """The same, written by a process that is kept."""

    kind = AsyncCheckpointerType.PROCESS


class TorchCheckpointing(Peer):
    """``CheckpointManager.save``: a process that is kept.

    Without its O_DIRECT, which fails with EINVAL where a file system wants aligned memory.
    """

    def __init__(self, training: Training, folder: Path, address: str) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().__init__(training, folder, address)
        cuda = training.device.type == "cuda"
        staging = CheckpointStagerConfig(
            use_pinned_memory=cuda,
            use_shared_memory=True,
            use_async_staging=cuda,
            use_non_blocking_copy=cuda,
        )
        saving = AsyncCheckpointSaverConfig(staging_config=staging)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = CheckpointManager(
            CheckpointManager.Config(save=saving, storage_config=storage)
        )

    def begin(self, step: int) -> tuple[int, Any]:
        written = self.manager.save(str(self.place(step)), self.state)
        with self.manager.lock():  # held while it stages
            return step, written

    def finish(self, begun: tuple[int, Any]) -> None:
        step, written = begun
        if written is not None:
            written.result()
        place = self.place(step)
        for path in [*place.rglob("*"), place, self.folder]:
            sync(path)


PEERS = {
    "torch": TorchSave,
    "dcp": DcpSave,
    "dcp_thread": DcpThread,
    "dcp_process": DcpProcess,
    "tcp": TorchCheckpointing,
}


def make(name: str) -> Child:
    return Child(PEERS[name])
