"""torch's distributed checkpoint (DCP) over Forebay: the writing half.

A generation commits when the last rank's pack lands, so one pack is held back: that of the
coordinator is sealed in ``finish()``, after the results of all ranks were compared with the plan.
"""

from __future__ import annotations

import datetime
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter as TorchStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.distributed_c10d import _get_default_store
from torch.futures import Future

from forebay.checkpoint.identity import CheckpointName
from forebay.checkpoint.manifest import extra_of, with_extra
from forebay.checkpoint.objects import Path, encode
from forebay.checkpoint.planning import pack_of
from forebay.checkpoint.service import CheckpointService, Client, PackTerms, to_json
from forebay.checkpoint.upload import PackUpload
from forebay.waiting import Deadline
from forebay_wire.errors import (
    DeadlineExceeded,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
)
from forebay_wire.ids import GenerationId

_log = logging.getLogger(__name__)

MEET_SECONDS: Final = 60.0
"""How long a rank that gets no plan from the coordinator waits to hear of its attempt."""


@dataclass
class _Save:
    """One save as one rank sees it."""

    name: CheckpointName
    is_coordinator: bool
    number: int
    """How many saves of this run this process has begun: all ranks count alike."""
    rank: int = 0
    is_separate: bool = False
    """Whether the ranks save without each other, each a state of its own."""
    attempt: int = 0
    expected: set[MetadataIndex] = field(default_factory=set)
    upload: PackUpload | None = None
    """Copied and not sealed: the generation cannot commit before it is."""


@dataclass(frozen=True)
class _Place:
    """What the coordinator tells a rank along with its plan."""

    attempt: int
    rank: int
    num_ranks: int
    structure: Mapping[str, Path]
    planner_data: Any
    """What is no structure of names and paths."""


_begun: Counter[str] = Counter()
"""Saves by run that this process has begun while it had peers."""

_last_attempt: dict[str, int] = {}
"""By run, the newest attempt that this process has written to."""


class StorageWriter(TorchStorageWriter):
    """For ``dcp.save(state, checkpoint_id="my-run", storage_writer=StorageWriter(client))``.

    Each save opens an attempt of its own, on the newest generation: saving to one id again makes a
    new generation, and the newest wins. It is visible, whole and durable when ``save`` returns, or
    not at all. Every rank makes its own writer; it may be pickled (``async_save`` by a process),
    and connects anew then. Objects are encoded, never pickled.
    """

    def __init__(
        self,
        client: Client,
        run: str | None = None,
        step: int = 0,
        *,
        metrics: Mapping[str, float] | None = None,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 600.0,
    ) -> None:
        """*run* and *step* name the generation, unless a ``checkpoint_id`` does: ``RUN`` or
        ``RUN@STEP``. *process_group* matters only where torch saves without collectives: its
        ranks are those that save (default: all)."""
        self._client: Client | None = client
        self._connect: Callable[[], Any] | None = None
        self._name = CheckpointName(run) if run is not None else None
        self._step = step
        self._metrics = dict(metrics or {})
        self._process_group = process_group
        self._timeout = timeout
        self.saved: GenerationId | None = None
        """What the last save that ended well has made, on the coordinator."""
        self._lock = threading.Lock()
        # A save runs in one thread, and async_save may have two of them under way.
        self._saves = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        connect = self._client.reconnect() if self._client is not None else self._connect
        return {
            key: value
            for key, value in {**self.__dict__, "_client": None, "_connect": connect}.items()
            if key not in ("_lock", "_saves", "_process_group")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _process_group=None)
        self._lock = threading.Lock()
        self._saves = threading.local()

    @property
    def checkpoint_id(self) -> str:
        """``RUN`` or ``RUN@STEP``; empty if nobody has named one."""
        if self._name is None:
            return ""
        return f"{self._name.run}@{self._name.selector}".removesuffix("@")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins; what one that failed has left is dropped."""
        self._drop()
        if checkpoint_id is not None:
            self._name = _checked(CheckpointName.of(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._drop()
        if self._name is None:
            raise InvalidRequest(
                "no run is named: StorageWriter(client, run), or checkpoint_id= of dcp.save"
            )
        save = _Save(self._name, is_coordinator, 0)
        if _has_peers():
            _begun[save.name.run] += 1
            save.number = _begun[save.name.run]
            save.is_separate = not kwargs.get("use_collectives", True)
        if save.is_separate:
            save.rank = dist.get_rank(self._process_group)
            if is_coordinator and save.rank:
                raise InvalidRequest(
                    "no_dist=True with use_collectives=False: leave use_collectives as it is"
                )
        self._saves.current = save

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, or (without collectives) on every rank with its own plan alone."""
        save = self._save()
        num_ranks, first = len(plans), 0
        if save.is_separate:
            num_ranks, first = dist.get_world_size(self._process_group), save.rank
        if save.is_coordinator:
            save.attempt = self._open_attempt(num_ranks)
            if _has_peers():
                _get_default_store().set(_key(save), str(save.attempt))
        else:
            save.attempt = _attempt_of_peers(save)
        structure, other = _structure(plans)
        return [
            replace(
                plan,
                storage_data=_Place(
                    save.attempt,
                    rank,
                    num_ranks,
                    structure if save.is_separate or rank == 0 else {},
                    other if save.is_separate or rank == 0 else None,
                ),
            )
            for rank, plan in enumerate(plans, first)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy this rank's part; sealed at once, but for the pack that makes the commit."""
        save = self._save()
        place = plan.storage_data
        if not isinstance(place, _Place):
            raise InvalidRequest(
                f"{type(planner).__name__} has changed storage_data of the plan, which belongs to "
                "the storage writer"
            )
        self._agree_on_attempt(save, place)
        # With collectives the coordinator sees all results; else every rank sees its own.
        holds_back = save.is_coordinator or save.is_separate
        upload = PackUpload(
            self._service(), self._terms(save, place), self._pack(save, plan, planner)
        )
        try:
            upload.copy(Deadline(self._timeout))
            if not holds_back:
                upload.seal()
        except BaseException:
            upload.abort()
            raise
        if holds_back:
            save.upload = upload
            save.expected = {item.index for item in plan.items}
            generation = upload.terms.generation
            self._saves.end = weakref.finalize(self, _abandon, self._service(), generation, upload)
            self._saves.end.atexit = False
        else:
            upload.close()
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [
                WriteResult(item.index, item.tensor_storage_size() or 0, plan.storage_data.rank)
                for item in plan.items
            ]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Compare what was planned with what was written; only then let it commit. Durable on
        this node on return."""
        save = self._save()
        upload = save.upload
        if upload is None:
            raise IntegrityError(f"{save.name.run}: nothing was written, so nothing is saved")
        generation = upload.terms.generation
        problem = _difference(save, metadata, results)
        if problem:
            self._drop()
            raise IntegrityError(f"generation {generation} is not saved: {problem}")
        upload.seal()
        self._saves.end.detach()
        save.upload = None
        try:
            self._service().wait(generation, "local", self._timeout)
        finally:
            upload.close()
        self.saved = generation

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: torch would have to guess a client, so the writer has to be passed."""
        return False

    # ------------------------------------------------------------------------------------ helpers

    def _save(self) -> _Save:
        save: _Save | None = getattr(self._saves, "current", None)
        if save is None:
            raise InvalidRequest("set_up_storage_writer has not been called in this thread")
        return save

    def _service(self) -> CheckpointService:
        with self._lock:
            if self._client is None:
                assert self._connect is not None
                self._client = self._connect()
        return CheckpointService(self._client, self._run())

    def _run(self) -> str:
        save: _Save | None = getattr(self._saves, "current", None)
        name = save.name if save is not None else self._name
        assert name is not None
        return name.run

    def _open_attempt(self, num_ranks: int) -> int:
        """An attempt on the newest generation: until it commits, that one stays the newest."""
        service = self._service()
        try:
            found = service.resolve("latest", "local", (), self._timeout)
            parent = GenerationId(found.run, found.attempt, found.step)
        except NotFound:
            parent = None
        return service.begin_attempt(parent, num_ranks)

    def _agree_on_attempt(self, save: _Save, place: _Place) -> None:
        """A planner that keeps final plans gives one back with the attempt of an older save."""
        run = save.name.run
        if not save.attempt:
            is_old = place.attempt <= _last_attempt.get(run, 0)
            save.attempt = _attempt_of_peers(save) if is_old and _has_peers() else place.attempt
        _last_attempt[run] = save.attempt

    def _terms(self, save: _Save, place: _Place) -> PackTerms:
        step = int(save.name.selector or self._step)
        generation = GenerationId(save.name.run, save.attempt, step)
        metrics = to_json(self._metrics) if place.rank == 0 else ""
        return PackTerms(generation, place.rank, place.num_ranks, metrics)

    def _pack(self, save: _Save, plan: SavePlan, planner: SavePlanner) -> Any:
        place: _Place = plan.storage_data
        pack = pack_of(plan, planner, dict(place.structure))
        other = place.planner_data
        extra = extra_of(
            plan.items,
            None if other is None else encode(other, ("planner_data",)),
            is_separate=save.is_separate,
        )
        return replace(pack, description=with_extra(pack.description, extra)) if extra else pack

    def _drop(self) -> None:
        """Abandon the save of this thread that did not finish, if there is one."""
        end = getattr(self._saves, "end", None)
        if end is not None:
            end()
        self._saves.__dict__.clear()


def _checked(name: CheckpointName) -> CheckpointName:
    if name.selector and not name.selector.isdecimal():
        raise InvalidRequest(
            f"checkpoint_id {name.run}@{name.selector}: behind the @ goes the step that is saved"
        )
    return name


def _abandon(service: CheckpointService, generation: GenerationId, upload: PackUpload) -> None:
    """Nothing of *generation* stays: the bytes of ranks that have sealed theirs, too."""
    try:
        upload.abort()
        service.delete(generation)
    except ForebayError as error:
        _log.warning("generation %s, which is not saved, is left over: %s", generation, error)


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized()


def _key(save: _Save) -> str:
    return f"forebay/checkpoint/{save.name.run}/{save.number}"


def _attempt_of_peers(save: _Save) -> int:
    """The attempt that rank 0 has opened for this save."""
    store = _get_default_store()
    try:
        store.wait([_key(save)], datetime.timedelta(seconds=MEET_SECONDS))
    except (RuntimeError, ValueError) as error:
        raise DeadlineExceeded(
            f"rank 0 did not begin a save of run {save.name.run} within {MEET_SECONDS:.0f} s: all "
            "ranks have to save together"
        ) from error
    return int(store.get(_key(save)))


def _structure(plans: Sequence[SavePlan]) -> tuple[dict[str, Path], Any]:
    """Names with paths of all ranks' plans; what a planner of one's own has put there instead."""
    structure: dict[str, Path] = {}
    for plan in plans:
        data = plan.planner_data
        if data is None:
            continue
        if not (isinstance(data, dict) and all(map(_is_place, data.items()))):
            return {}, data
        structure.update(data)
    return structure, None


def _is_place(item: tuple[Any, Any]) -> bool:
    name, path = item
    return (
        type(name) is str
        and type(path) is tuple
        and bool(path)
        and all(type(key) in (str, int) for key in path)
    )


def _difference(save: _Save, metadata: Metadata, results: list[list[WriteResult]]) -> str:
    """How plan and results differ; empty if they do not."""
    expected = save.expected if save.is_separate else _planned(metadata) | save.expected
    written = Counter(result.index for rank in results for result in rank)
    problems = []
    for what, indices in (
        ("planned and not written", [one for one in expected if not written[one]]),
        ("written and not planned", [one for one in written if one not in expected]),
        ("written more than once", [one for one, count in written.items() if count > 1]),
    ):
        if indices:
            first = min(indices, key=lambda index: (index.fqn, index.offset or ()))
            at = f" at {list(first.offset)}" if first.offset else ""
            problems.append(f"{len(indices)} parts were {what}, first {first.fqn}{at}")
    return "; ".join(problems)


def _planned(metadata: Metadata) -> set[MetadataIndex]:
    indices = set()
    for name, item in metadata.state_dict_metadata.items():
        if isinstance(item, TensorStorageMetadata):
            indices |= {MetadataIndex(name, chunk.offsets) for chunk in item.chunks}
        else:
            indices.add(MetadataIndex(name))
    return indices
