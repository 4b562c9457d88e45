"""Statistics that the daemon keeps with a version or split, computed by whoever asks first."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from forebay.dataset.statistics import (
    ColumnStatistics,
    Found,
    Progress,
    Wanted,
    compute,
    joined,
    wanted_of,
)
from forebay.methods import Datasets
from forebay_wire.errors import (
    Conflict,
    IntegrityError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
)
from forebay_wire.manifest import SelectionManifest, StatisticsManifest, parse
from forebay_wire.selection import SPLIT, STORED
from forebay_wire.v1 import datasets_pb2

if TYPE_CHECKING:
    from forebay.dataset.dataset import Control, Dataset

TRAIN: Final = "train"
"""The split that is trained on."""
TEST: Final = "test"
"""What is held out: the split, and the part of each fold."""

logger = logging.getLogger(__name__)


def statistics(
    dataset: Dataset,
    control: Control | None,
    columns: Sequence[str] | None,
    along: Mapping[str, int],
    progress: Progress,
) -> dict[str, ColumnStatistics]:
    """See :meth:`forebay.Dataset.statistics`. Without *control* they are only computed."""
    wanted = wanted_of(dataset, columns, along)
    found = {} if control is None else _kept(dataset, control)
    missing = [one for one in wanted if not _is_of(one, found.get(one.key))]
    if missing:
        computed = compute(dataset, missing, progress)
        kept = {} if control is None else _store(dataset, control, computed, replaces=False)
        # Of two who computed them at once, the first one's are everybody's.
        found = {
            **found,
            **computed,
            **{one.key: kept[one.key] for one in missing if one.key in kept},
        }
    return joined(wanted, found)


def recompute(
    dataset: Dataset,
    control: Control,
    columns: Sequence[str] | None,
    along: Mapping[str, int],
    progress: Progress,
) -> dict[str, ColumnStatistics]:
    """See :meth:`forebay.Dataset.recompute_statistics`."""
    wanted = wanted_of(dataset, columns, along)
    computed = compute(dataset, wanted, progress)
    _store(dataset, control, computed, replaces=True)
    return joined(wanted, computed)


def training_part(dataset: Dataset) -> Dataset:
    """What of *dataset*'s version is trained on, so that its figures may find their way into
    training: the innermost training part that what is read belongs to.

    Of a fold its training part, of a selection within another one that one's; else the split
    ``train``; of a version without it the whole version, if that is what is read. InvalidRequest
    where none is known, and where that part itself lies in what is held out.
    """
    control, selection = dataset.control, dataset.selection
    there = {
        one.name: one
        for one in control.describe_dataset(dataset.name).selections
        if one.version == dataset.version
    }
    if selection is None:
        return _split(dataset, control, there[TRAIN]) if TRAIN in there else dataset
    rules = {selection.name: selection.rule}

    def rule_of(name: str) -> Mapping[str, Any] | None:
        if name not in rules and name in there:
            rules[name] = _selection(dataset, control, there[name]).rule
        return rules.get(name)

    name = _training_name(selection.name, rule_of)
    if name == dataset.split:
        return dataset
    if name in there:
        return _split(dataset, control, there[name])
    raise InvalidRequest(
        f"split {selection.name!r} of dataset {dataset.name!r} v{dataset.version}: there is no "
        f"split {name or TRAIN!r} {'that it lies in or' if name is None else ''} beside it, whose "
        "statistics are those of what is trained on; give the split to take them of"
    )


def _training_name(name: str, rule_of: Callable[[str], Mapping[str, Any] | None]) -> str | None:
    """The innermost training part that the selection *name* belongs to; None: it is not known."""
    chain: list[tuple[str, Mapping[str, Any]]] = []
    at: str | None = name
    while at is not None:
        rule = rule_of(at)
        if rule is None or any(at == own for own, _ in chain):
            return None
        chain.append((at, rule))
        at = _within(rule)
    train = rule_of(TRAIN)
    for place, (own, rule) in enumerate(chain):
        if "part" in rule:  # of a fold
            found = own.removesuffix(f"-{rule['part']}") + "-train"
        elif train is not None and _within(train) == _within(rule):
            found = TRAIN
        else:
            continue
        around = chain[place + 1 :]
        return None if any(_is_held_out(*one, train is not None) for one in around) else found
    return None


def _within(rule: Mapping[str, Any]) -> str | None:
    """The selection that one of this rule was made of; None: of the whole version."""
    of = rule["definition"] if rule.get("kind") == STORED else rule
    within: str | None = of.get("within")
    return within


def _is_held_out(name: str, rule: Mapping[str, Any], has_train: bool) -> bool:
    is_other_share = has_train and rule.get("kind") == SPLIT and name != TRAIN
    return is_other_share or name == TEST or rule.get("part") == TEST


def _selection(
    dataset: Dataset, control: Control, one: datasets_pb2.Selection
) -> SelectionManifest:
    where = f"split {one.name} of {dataset.name} v{dataset.version}"
    selection = parse(control.read_manifest(one.manifest), where, one.manifest)
    assert isinstance(selection, SelectionManifest), "its row names it"
    return selection


def _split(dataset: Dataset, control: Control, one: datasets_pb2.Selection) -> Dataset:
    return type(dataset)(
        dataset.manifest,
        dataset.manifest_id,
        dataset.endpoint,
        selection=_selection(dataset, control, one),
        selection_id=one.manifest,
        control=control,
    )


def _is_of(wanted: Wanted, found: Found | None) -> bool:
    count = 1 if wanted.axis is None else wanted.column.shape[wanted.axis]
    return found is not None and len(found.figures) == count


def _subject(dataset: Dataset) -> datasets_pb2.StatisticsSubject:
    return datasets_pb2.StatisticsSubject(
        dataset=dataset.name,
        version=dataset.version,
        manifest=dataset.manifest_id,
        selection=dataset.selection_id,
    )


def _kept(dataset: Dataset, control: Control) -> dict[str, Found]:
    request = datasets_pb2.GetStatisticsRequest(of=_subject(dataset))
    try:
        answer = control.channel.call(Datasets.GetStatistics, request)
    except NotFound:  # deleted since: what is mapped can still be read
        return {}
    return _read(dataset, answer.records)


def _store(
    dataset: Dataset, control: Control, computed: Mapping[str, Found], *, replaces: bool
) -> dict[str, Found]:
    """What is kept then. Figures that cannot be kept are right all the same."""
    columns = {key: found.payload() for key, found in computed.items()}
    request = datasets_pb2.StoreStatisticsRequest(
        of=_subject(dataset), columns_json=json.dumps(columns), replaces=replaces
    )
    try:
        answer = control.channel.call(Datasets.StoreStatistics, request)
    except (NotFound, Conflict, LimitExceeded) as error:
        logger.warning("statistics of %r are not kept: %s", dataset, error)
        return {}
    return _read(dataset, answer.records)


def _read(dataset: Dataset, records: Iterable[datasets_pb2.StatisticsRecord]) -> dict[str, Found]:
    """What the records say, the later ones before the earlier; damaged ones say nothing."""
    found: dict[str, Found] = {}
    for record in records:
        where = f"statistics of {dataset.name} v{dataset.version}, manifest {record.manifest}"
        try:
            manifest = parse(record.data, where, record.manifest)
        except IntegrityError as error:
            logger.warning("%s: they are computed anew", error)
            continue
        mine = (dataset.manifest_id, dataset.selection_id)
        if (
            not isinstance(manifest, StatisticsManifest)
            or (manifest.dataset_manifest, manifest.selection_manifest) != mine
        ):
            raise IntegrityError(f"{where}: it is not that of this version and split")
        for key, payload in manifest.columns.items():
            try:
                found[key] = Found.from_payload(payload)
            except (KeyError, TypeError, ValueError) as error:
                logger.warning("%s: %r is none (%s): it is computed anew", where, key, error)
    return found
