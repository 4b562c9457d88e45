"""``forebay dataset split`` and ``forebay dataset select``: selections of a version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from forebay.cli.dataset_import import parse_shares
from forebay.cli.progress import progress_display
from forebay.cli.session import Session, with_session
from forebay_wire.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from forebay.client import Client
    from forebay.dataset.dataset import Dataset
    from forebay.dataset.selections import Progress

_CONDITION: Final = re.compile(r"\s*(\w[\w.-]*)\s*(<=|>=|==|!=|=|<|>|\bnot in\b|\bin\b)\s*(.+)\Z")


@click.command("split")
@click.argument("name")
@click.argument("shares", required=False, metavar="[NAME=SHARE,…]")
@click.option("--folds", type=int, metavar="K", help="K folds for cross-validation instead.")
@click.option("--buckets", metavar="COLUMN=BOUND,…", help="Buckets of a numeric column instead.")
@click.option("--seed", default=0, show_default=True, help="Of the random choice.")
@click.option("--prefix", help="Of the names of folds or buckets (fold, bucket).")
@click.option("--of", "within", metavar="SPLIT", help="Of this split's rows instead of all.")
@click.option("--version", default="latest", show_default=True, help="Of the dataset.")
@with_session
def split_dataset(
    session: Session,
    name: str,
    shares: str | None,
    folds: int | None,
    buckets: str | None,
    seed: int,
    prefix: str | None,
    within: str | None,
    version: str,
) -> None:
    """Share dataset NAME out: train=0.8,test=0.2 at random, in folds, or by a column's value.

    A repeat with the same arguments changes nothing.
    """
    if sum(way is not None for way in (shares, folds, buckets)) != 1:
        raise click.UsageError("give exactly one of NAME=SHARE,…, --folds and --buckets")
    if prefix is not None and shares is not None:
        raise click.UsageError("--prefix names folds or buckets")
    if within is not None and shares is not None:
        raise click.UsageError("--of goes with --folds and --buckets; shares are of all rows")
    with session.connect() as client:
        dataset = client.dataset(name, version, within)
        if shares is not None:
            fractions = parse_shares(shares)
            dataset.define_splits(fractions, seed=seed)
            names = list(fractions)
        elif folds is not None:
            both = dataset.define_folds(folds, seed=seed, prefix=prefix)
            names = [part for pair in both for part in pair]
        else:
            assert buckets is not None, "counted above"
            column, boundaries = _parse_buckets(buckets)
            with _progress(f"buckets of {name}") as progress:
                made = dataset.define_buckets(column, boundaries, prefix=prefix, progress=progress)
            names = list(made)
        _show(session, client, dataset, names)


@click.command("select")
@click.argument("name")
@click.argument("selection")
@click.option(
    "--where",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="COLUMN OPERATOR VALUE, as in 'length >= 512' or 'label in [1, 2]'; all have to hold.",
)
@click.option("--rows", metavar="FILE", help="Row numbers: a .npy file, or one number a line.")
@click.option("--of", "within", metavar="SPLIT", help="Of this split's rows instead of all.")
@click.option("--version", default="latest", show_default=True, help="Of the dataset.")
@with_session
def select_rows(
    session: Session,
    name: str,
    selection: str,
    conditions: tuple[str, ...],
    rows: str | None,
    within: str | None,
    version: str,
) -> None:
    """Choose rows of dataset NAME for ever, as its SELECTION, to be read like a split.

    A repeat with the same arguments changes nothing.
    """
    if bool(conditions) == (rows is not None):
        raise click.UsageError("give either --where or --rows")
    with session.connect() as client:
        dataset = client.dataset(name, version, within)
        if rows is not None:
            dataset.define_selection(selection, rows=_read_rows(rows))
        else:
            filter = [_parse_condition(one) for one in conditions]
            with _progress(f"{selection} of {name}") as progress:
                dataset.define_selection(selection, filter=filter, progress=progress)
        _show(session, client, dataset, [selection])


def _show(session: Session, client: Client, dataset: Dataset, names: Sequence[str]) -> None:
    counts = {
        one.name: one.num_rows
        for one in client.describe_dataset(dataset.name).selections
        if one.version == dataset.version
    }
    found = {name: counts[name] for name in names}
    value = {"name": dataset.name, "version": dataset.version, "selections": found}
    shown = ", ".join(f"{name} {count:,}" for name, count in found.items())
    session.show(
        value, lambda: print(f"Dataset {dataset.name!r} version {dataset.version}: {shown} rows.")
    )


@contextmanager
def _progress(what: str) -> Iterator[Progress | None]:
    """What shows progress on standard error, if that is a terminal."""
    with progress_display() as display:
        if display is None:
            yield None
            return
        bar = display.add_task(what, total=None)
        yield lambda done, total: display.update(bar, completed=done, total=total)


def _parse_condition(text: str) -> tuple[str, str, Any]:
    found = _CONDITION.match(text)
    if found is None:
        raise click.BadParameter(
            f"{text!r} is not COLUMN OPERATOR VALUE, with one of = != < <= > >= in 'not in'",
            param_hint="--where",
        )
    column, operator, value = found.groups()
    try:
        return column, operator, json.loads(value)
    except ValueError:
        return column, operator, value.strip()


def _parse_buckets(text: str) -> tuple[str, list[float]]:
    column, separator, bounds = text.rpartition("=")
    try:
        boundaries = [json.loads(bound) for bound in bounds.split(",")]
    except ValueError:
        boundaries = []
    if not separator or not boundaries:
        raise click.BadParameter(f"{text!r} is not COLUMN=BOUND,…", param_hint="--buckets")
    return column, boundaries


def _read_rows(path: str) -> Any:
    import numpy as np

    try:
        if path.endswith(".npy"):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return np.loadtxt(path, dtype=np.int64, ndmin=1)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} holds no row numbers: {error}") from error
