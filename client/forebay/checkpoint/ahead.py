"""The memory of the next save, asked for while there is nothing to save.

A new slot is faulted in at about 1 GB/s, by the daemon and then here: too slow for the save itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from forebay.checkpoint.components import Component, ModuleComponent, OptimizerComponent
from forebay.checkpoint.layout import padded
from forebay.checkpoint.lease import Prepared, slot_size
from forebay.checkpoint.service import CheckpointService
from forebay_wire.errors import ForebayError
from forebay_wire.limits import MAX_UPLOAD_SLOT_BYTES

_log = logging.getLogger(__name__)

GIVE_UP_SECONDS: Final = 5.0

DESCRIPTION_BYTES: Final = 512
"""Of one tensor in a pack's description, at most: its name counts most."""

OBJECT_BYTES: Final = 64 << 10
"""For what is no tensor of model and optimizer: positions, random states, schedules."""


class Ahead:
    """At most one session that is for no pack yet. Thread-safe."""

    def __init__(self, service: CheckpointService, rank: int) -> None:
        self._service = service
        self._rank = rank
        self._lock = threading.Lock()
        self._attempt = 0
        """In which one was asked for that may be there still."""
        self._asking: threading.Thread | None = None
        self._mapping: threading.Thread | None = None
        self._ready: Prepared | None = None
        self._is_closed = False

    def prepare(self, attempt: int, num_bytes: int) -> None:
        """Ask in the background for a slot that a pack of *num_bytes* fits, unless there is one.

        Whether it comes, and what stands in the way, nobody is told: the save asks again.
        """
        if not 0 < slot_size(num_bytes) <= MAX_UPLOAD_SLOT_BYTES:
            return
        with self._lock:
            if self._ready is not None and self._ready.is_lost:
                self._ready.let_go()
                self._ready = None
            if self._is_closed or self._ready is not None or self._asking is not None:
                return
            self._attempt = attempt
            self._asking = threading.Thread(
                target=self._ask,
                args=(attempt, slot_size(num_bytes)),
                name="forebay-ahead",
                daemon=True,
            )
            self._asking.start()

    def take(self) -> Prepared | None:
        """What is there; what is still asked for the daemon gives to the save by itself."""
        with self._lock:
            mapping, self._asking = self._mapping, None
        if mapping is not None:  # it is this process' own work, which the save would have to do
            mapping.join()
        with self._lock:
            ready, self._ready = self._ready, None
        return ready

    def put_back(self, prepared: Prepared | None) -> None:
        """It was not used, for nothing was saved."""
        if prepared is None or prepared.is_over:
            return
        with self._lock:
            if self._ready is None and not self._is_closed:
                self._ready = prepared
                return
        prepared.let_go()

    def forget(self) -> int:
        """Let go of what there is, which the daemon ends by itself when a newer attempt begins; the
        attempt that it was for, 0 without."""
        prepared = self.take()
        with self._lock:
            attempt, self._attempt = self._attempt, 0
        if prepared is not None:
            prepared.let_go()
        return attempt

    def close(self) -> None:
        """Give back what there is; nothing is asked for any more. Idempotent."""
        with self._lock:
            self._is_closed = True
        if attempt := self.forget():
            self._give_up(attempt)

    def _give_up(self, attempt: int) -> None:
        try:
            self._service.prepare_pack(attempt, self._rank, 0, GIVE_UP_SECONDS)
        except ForebayError as error:  # its lease ends it
            _log.debug("a slot asked for ahead is not given back: %s", error)

    def _ask(self, attempt: int, num_bytes: int) -> None:
        """In a thread of its own."""
        me = threading.current_thread()
        try:
            answer = self._service.prepare_pack(attempt, self._rank, num_bytes)
            if not answer.session:
                return
            with self._lock:
                is_late = self._is_closed or self._attempt != attempt
                if self._asking is me:
                    self._mapping = me
            if is_late:
                self._give_up(attempt)
            elif self._mapping is me:  # else a save began meanwhile, and was given the session
                prepared = Prepared(self._service, answer)
                with self._lock:
                    self._ready = prepared
        except ForebayError as error:
            _log.debug("no slot ahead: %s", error)
        finally:
            with self._lock:
                if self._asking is me:
                    self._asking = None
                if self._mapping is me:
                    self._mapping = None


def estimate(components: Iterable[Component], num_ranks: int) -> int:
    """About how many bytes this rank's next pack has: its shards, and its part of what all ranks
    have. An optimizer that has not stepped yet is taken for one that has."""
    whole, shards = 0, OBJECT_BYTES
    for component in components:
        for tensor, factor in _tensors(component):
            if isinstance(tensor, DTensor):
                shards += (padded(tensor.to_local().nbytes) + DESCRIPTION_BYTES) * factor
            else:
                whole += (padded(tensor.nbytes) + DESCRIPTION_BYTES) * factor
    return shards + whole // max(1, num_ranks)


def _tensors(component: Component) -> Iterable[tuple[torch.Tensor, int]]:
    """Tensors that are saved, with how many of their kind."""
    if isinstance(component, ModuleComponent):
        for tensor in (*component.module.parameters(), *component.module.buffers()):
            yield tensor, 1
    elif isinstance(component, OptimizerComponent):
        optimizer = component.optimizer
        held = [value for state in optimizer.state.values() for value in state.values()]
        if held:
            yield from ((value, 1) for value in held if isinstance(value, torch.Tensor))
            return
        for group in optimizer.param_groups:
            factor = _moments(group)
            yield from ((p.detach(), factor) for p in group["params"] if p.requires_grad)


def _moments(group: dict[str, Any]) -> int:
    """How many tensors like the parameter torch's optimizers hold with such settings."""
    if "betas" in group:
        return 3 if group.get("amsgrad") else 2
    if "centered" in group:  # RMSprop
        return 1 + bool(group["centered"]) + bool(group.get("momentum"))
    return 1 if group.get("momentum") or "momentum" not in group else 0
