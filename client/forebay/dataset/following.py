"""What a loader reads that follows its dataset: in each new epoch the newest version by then.

An epoch that runs stays on its version, and so does one that is restored. Which version a new epoch
has is decided by the daemon, once for all ranks and workers of a loader (``followed_by``).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from forebay.dataset.dataset import Dataset
from forebay.dataset.followed_by import ReaderName
from forebay.dataset.mixture import Mixture
from forebay.dataset.packing import Packed
from forebay.dataset.ranks import find_rank
from forebay.dataset.reading import (
    OrderOptions,
    PlanParameters,
    Readable,
    Reading,
    Reporter,
    Samples,
    Steps,
    arrange,
)
from forebay.dataset.schema import Column
from forebay.dataset.states import check_is_state
from forebay.transfer import current_endpoint, make_transfer
from forebay_wire.errors import InvalidRequest, NotFound, SchemaMismatch
from forebay_wire.manifest import DatasetManifest, SelectionManifest, parse
from forebay_wire.order import LastBatch

logger = logging.getLogger(__name__)

LATEST: Final = "latest"

KEPT_EPOCHS: Final = 2
"""Whose manifests are kept: iterations of two may run at once."""


class Followable(Readable, Protocol):
    """What a loader can be given that can move on to other versions."""

    def followed(self) -> tuple[Dataset, ...]:
        """The datasets of which it consists. InvalidRequest if it cannot move on."""
        ...

    def moved_to(self, datasets: Sequence[Dataset]) -> Followable:
        """The same of other versions of these datasets."""
        ...


@dataclass(frozen=True, eq=False)
class Versions:
    """What one epoch reads."""

    given: Followable
    reading: Reading

    @property
    def identities(self) -> list[str]:
        return [dataset.identity for dataset in self.given.followed()]


@dataclass(frozen=True)
class _Decided:
    """What an epoch reads, and what was read before it."""

    now: Versions
    before: Versions
    reader: str = ""
    """By whose name; empty: a restored state said so."""


def check_follow(follow: str | None, run: str | None) -> bool:
    """Whether a loader follows its dataset."""
    if follow not in (None, LATEST):
        raise InvalidRequest(f'follow={follow!r}: "latest", or None to stay on the version')
    if run is not None and follow is None:
        raise InvalidRequest('run= belongs to follow="latest"')
    return follow is not None


class FollowingReading:
    """A reading whose epochs are of different versions. Picklable.

    What is asked of an epoch before it began decides it.
    """

    def __init__(
        self,
        given: Any,
        options: OrderOptions,
        run: str | None,
        rank: tuple[int | None, int | None],
    ) -> None:
        """*rank*: and number of ranks, as far as they were given."""
        if not hasattr(given, "followed"):
            raise InvalidRequest(
                f'follow="latest" is for datasets, mixtures and packed windows, not for '
                f"{type(given).__name__}"
            )
        self._options = options
        self._newest = Versions(given, arrange(given, options))
        """What was decided or restored last; at first what was given."""
        self._epochs: dict[int, _Decided] = {}
        self._restored: dict[int, list[str]] = {}
        """Versions of the epochs of which states said so: the daemon was not asked."""
        self._tried: Versions | None = None
        """What was looked at to be proposed."""
        self.check_batches: Callable[[Reading], None] = nothing_to_check
        """Raises InvalidRequest if the loader could not make batches of what might be read."""
        self._told: set[str] = set()
        kind = _kind_of(given.followed(), options)
        self._name = ReaderName(run, kind)
        self._rank = rank
        self._num_ranks = 0
        """0: not bound yet."""
        if rank[1] != 1:  # else it is alone, whatever there is of torch.distributed
            self._name.look_early()

    def bind(self, num_ranks: int) -> None:
        """How many ranks read together. InvalidRequest if they cannot agree."""
        self._num_ranks = num_ranks
        names = ("", self._reader)  # somebody may have asked for an epoch's length before
        self._epochs = {e: one for e, one in self._epochs.items() if one.reader in names}

    @property
    def _reader(self) -> str:
        return self._name.find(self._num_ranks or find_rank(*self._rank)[1])

    # Which version.

    def of(self, epoch: int) -> Versions:
        """What *epoch* reads: decided now, if it was not."""
        found = self._epochs.get(epoch)
        if found is None and epoch in self._restored:
            return self._known(self._restored[epoch])
        if found is None:
            before = self._newest
            found = _Decided(self._moved(before, epoch), before, self._reader)
            self._remember(epoch, found)
        return found.now

    @property
    def num_datasets(self) -> int:
        """That make up what is read."""
        return len(self._newest.given.followed())

    def standing(self, epoch: int) -> Versions:
        """What *epoch* reads if that is decided, else what was read last."""
        found = self._epochs.get(epoch)
        return self._newest if found is None else found.now

    def identities_of(self, epoch: int) -> list[str]:
        """By which :meth:`go_on_with` knows what *epoch* reads."""
        return self.of(epoch).identities

    def title_of(self, identities: Sequence[str]) -> str:
        """What is read of these versions, for people."""
        return self._known(identities).reading.title

    def go_on_with(self, epoch: int, identities: Sequence[str]) -> None:
        """*epoch* has begun, on these versions; on none: it begins anew."""
        if not identities:
            self._forget(epoch)
            return
        found = self._known(identities)
        self._restored[epoch] = list(identities)
        self._remember(epoch, _Decided(found, found))

    def _forget(self, epoch: int) -> None:
        """*epoch* is to be decided, if it was a state that said what it reads."""
        self._epochs.pop(epoch, None)
        self._restored.pop(epoch, None)

    def _remember(self, epoch: int, found: _Decided) -> None:
        self._newest, self._tried = found.now, None
        kept = [one for one in self._epochs if one != epoch][-KEPT_EPOCHS + 1 :]
        self._epochs = {one: self._epochs[one] for one in kept} | {epoch: found}

    def _moved(self, before: Versions, epoch: int) -> Versions:
        """What *epoch* reads: as was decided, or else decided now, as the newest versions if all
        that is read fits, and as what was read before if not."""
        olds = before.given.followed()
        answer = self._ask(olds, epoch)
        if not answer["is_decided"]:
            wanted = self._proposed(before, answer["datasets"], epoch)
            proposed = [{"manifest": one, "selection": selection} for one, selection in wanted]
            answer = self._ask(olds, epoch, proposed=proposed)
        return self._at(before, [(one["manifest"], one["selection"]) for one in answer["datasets"]])

    def _ask(self, olds: Sequence[Dataset], epoch: int, **proposed: Any) -> dict[str, Any]:
        """What the daemon says of all datasets in *epoch*."""
        datasets = [
            {"dataset": old.name, "selection": old.split or "", "base": old.manifest_id}
            for old in olds
        ]
        question = {"reader": self._reader, "epoch": epoch, "datasets": datasets}
        transfer = make_transfer(current_endpoint(olds[0].endpoint))
        return transfer.decide_version({**question, **proposed})

    def _proposed(
        self, before: Versions, answers: Sequence[Mapping[str, Any]], epoch: int
    ) -> list[tuple[str, str]]:
        """Manifests of the versions and selections that this process would have *epoch* read."""
        olds = before.given.followed()
        for old, answer in zip(olds, answers, strict=True):
            if answer["newest"] > answer["version"] and old.split is not None:
                self._warn(
                    epoch,
                    f"dataset {old.name!r} has version {answer['newest']}, its split {old.split!r} "
                    f"is of version {answer['version']} at the newest: define it on the newer ones",
                )
        wanted = [(answer["manifest"], answer["selection"]) for answer in answers]
        try:
            moved = self._at(before, wanted)
            names = _column_names(before.given, self._options)
            for old, new in zip(olds, moved.given.followed(), strict=True):
                _check_columns(old, new, names)
            self.check_batches(moved.reading)
        except (SchemaMismatch, InvalidRequest) as error:
            versions = ", ".join(f"{old.name} version {old.version}" for old in olds)
            self._warn(epoch, f"{versions} is read as before: {error}")
            return [(old.manifest_id, old.selection_id) for old in olds]
        return wanted

    def _at(self, before: Versions, wanted: Sequence[tuple[str, str]]) -> Versions:
        """What *before* reads, of the *wanted* versions and selections."""
        identities = [f"{manifest}/{selection}" for manifest, selection in wanted]
        for known in (before, self._tried):
            if known is not None and known.identities == identities:
                return known
        olds = before.given.followed()
        moved = before.given.moved_to(
            [version_of(old, *one) for old, one in zip(olds, wanted, strict=True)]
        )
        self._tried = Versions(moved, arrange(moved, self._options))
        return self._tried

    def _warn(self, epoch: int, text: str) -> None:
        """Once, not in each epoch."""
        if text not in self._told:
            self._told.add(text)
            logger.warning("epoch %d: %s", epoch, text)

    def _known(self, identities: Sequence[str]) -> Versions:
        """The versions that have these identities."""
        kept = (self._newest, self._tried, *(decided.now for decided in self._epochs.values()))
        for known in kept:
            if known is not None and known.identities == list(identities):
                return known
        num_datasets = len(self._newest.identities)
        if num_datasets != len(identities):
            raise InvalidRequest(
                f"the state is of {len(identities)} datasets, this loader reads {num_datasets}"
            )
        pairs = [identity.partition("/") for identity in identities]
        return self._at(self._newest, [(version, selection) for version, _, selection in pairs])

    def _in_order(self, identities: Mapping[str, str]) -> list[str]:
        """Those of a state, whose JSON may have had its names sorted, as this loader has them."""
        names = _names_in(self._newest.given)
        if set(names) != set(identities):
            raise InvalidRequest(
                f"the state is of {len(identities)} datasets {sorted(identities)}, this loader "
                f"reads {len(names)}, {sorted(names)}"
            )
        return [identities[name] for name in names]

    def reads(self, epoch: int, reading: Reading) -> bool:
        """Whether *epoch* is decided, and read from *reading*."""
        found = self._epochs.get(epoch)
        return found is not None and found.now.reading is reading

    # A reading.

    @property
    def has_lanes(self) -> bool:
        return self._newest.reading.has_lanes

    @property
    def row_bytes(self) -> float:
        return self._newest.reading.row_bytes

    @property
    def title(self) -> str:
        return self._newest.reading.title

    @property
    def name(self) -> str:
        return self._newest.reading.name

    @property
    def columns(self) -> tuple[Column, ...]:
        return self._newest.reading.columns

    @property
    def can_mask(self) -> bool:
        return self._newest.reading.can_mask

    def check(self, global_batch_size: int, last_batch: LastBatch) -> None:
        self._newest.reading.check(global_batch_size, last_batch)

    def epoch(self, epoch: int, lanes: int) -> Samples:
        return self.of(epoch).reading.epoch(epoch, lanes)

    def cut(
        self, epoch: int, position: int, global_batch_size: int, last_batch: LastBatch, lanes: int
    ) -> Steps:
        reading = self.of(epoch).reading
        return reading.cut(epoch, position, global_batch_size, last_batch, lanes)

    def state(self, epoch: int, position: int, lanes: int) -> dict[str, Any]:
        """At the start of an epoch it names what was read before: the epoch is decided where it
        begins."""
        if position:
            return self.state_of_begun(epoch, position, lanes)
        found = self._epochs.get(epoch)
        before = self._newest if found is None else found.before
        return before.reading.state(epoch, position, lanes)

    def state_of_begun(
        self, epoch: int, position: int, lanes: int, identities: Sequence[str] = ()
    ) -> dict[str, Any]:
        """As :meth:`state`, of an epoch that has begun: it names what that reads from its start.

        *identities*: what a batch says that it was read from, whatever is known here.
        """
        versions = self._known(identities) if identities else self.of(epoch)
        return versions.reading.state(epoch, position, lanes)

    def restored(self, state: Mapping[str, Any], lanes: int | None) -> tuple[int, int, int]:
        place = self.resumed(state, lanes)
        if place[1] == 0:  # nothing of it was read: it begins anew
            self._forget(place[0])
        return place

    def resumed(self, state: Mapping[str, Any], lanes: int | None) -> tuple[int, int, int]:
        """As :meth:`restored`, of an epoch that has begun even if it stands at its start."""
        try:
            versions = self._known(self._in_order(_identities_in(state)))
        except NotFound as error:
            raise NotFound(
                f"the state goes on in a version of {self.name!r} that was deleted ({error}): "
                "restore it from the trash, or begin an epoch of what there is with set_epoch()"
            ) from error
        place = versions.reading.restored(state, lanes)
        self._restored[place[0]] = versions.identities
        self._remember(place[0], _Decided(versions, versions))
        return place

    def reporter(self, loader: str, parameters: PlanParameters) -> Reporter:
        return self._newest.reading.reporter(loader, parameters)


def nothing_to_check(_: Reading) -> None:
    """Any batches will do."""


def version_of(old: Dataset, manifest_id: str, selection_id: str) -> Dataset:
    """Another version of the same dataset, and the selection of the same name.

    NotFound if it was deleted; InvalidRequest if these are manifests of something else.
    """
    if (manifest_id, selection_id) == (old.manifest_id, old.selection_id):
        return old
    transfer = make_transfer(current_endpoint(old.endpoint))
    context = f"a version of dataset {old.name}"
    manifest = parse(transfer.manifest(manifest_id), context, manifest_id)
    selection = None
    if selection_id:
        selection = parse(transfer.manifest(selection_id), f"a split of {context}", selection_id)
    is_version = isinstance(manifest, DatasetManifest) and manifest.dataset == old.name
    is_split = selection is None or isinstance(selection, SelectionManifest)
    name = getattr(selection, "name", None)
    if not is_version or not is_split or name != old.split:
        found = getattr(manifest, "dataset", "no dataset") + (f", split {name}" if name else "")
        raise InvalidRequest(
            f"the state was taken on {found}; this loader follows {old.name}"
            + (f", split {old.split}" if old.split else "")
        )
    assert isinstance(manifest, DatasetManifest), "looked at above"
    assert selection is None or isinstance(selection, SelectionManifest), "likewise"
    return old.of_version(manifest, manifest_id, selection, selection_id)


def _identities_in(state: Mapping[str, Any]) -> dict[str, str]:
    """What the *state* of a loader says of the versions that it read: of a mixture by the names
    that its datasets have there."""
    check_is_state(state)
    try:
        if isinstance(state.get("samples"), Mapping):  # of packed windows
            return _identities_in(state["samples"])
        if isinstance(state.get("datasets"), Mapping):  # of a mixture
            return {name: str(entry[2]) for name, entry in state["datasets"].items()}
        return {"": f"{state['manifest']}/{state['selection']}"}
    except (KeyError, IndexError, TypeError) as error:
        raise InvalidRequest(f"loader state lacks {error}: it is not complete") from error


def _names_in(given: Any) -> tuple[str, ...]:
    """What a state calls the datasets of what was *given*; the only one: nothing."""
    samples = given.samples if isinstance(given, Packed) else given
    return tuple(samples.datasets) if isinstance(samples, Mixture) else ("",)


def _column_names(given: Followable, options: OrderOptions) -> tuple[str, ...] | None:
    return given.packed_columns if isinstance(given, Packed) else options.columns


def _check_columns(old: Dataset, new: Dataset, names: Sequence[str] | None) -> None:
    """Raise SchemaMismatch unless *new* has all that is read of *old*, of the same types."""
    if new is old:
        return
    for column in old.columns(names):
        there = f"version {new.version} of dataset {new.name!r}"
        if column.name not in new.schema.names:
            raise SchemaMismatch(f"{there} has no column {column.name!r}, which is read")
        found = new.schema[column.name]
        if found.spec() != column.spec():
            raise SchemaMismatch(
                f"column {column.name!r} is {found.text} in {there}, and {column.text} in version "
                f"{old.version}"
            )


def _kind_of(datasets: Sequence[Dataset], options: OrderOptions) -> str:
    """What tells loaders of one run apart, whatever the versions."""
    parts = [[dataset.name, dataset.split] for dataset in datasets]
    said = [options.shuffle, options.seed, options.window_blocks, options.block_rows]
    text = json.dumps([parts, said, options.columns])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
