"""``forebay dataset import`` and ``append``: data in other formats into a dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from forebay.cli.output import size
from forebay.cli.progress import progress_of
from forebay.cli.session import Session, with_session
from forebay_wire.errors import NotFound
from forebay_wire.limits import MIB

FORMATS: Final = (
    *("parquet", "csv", "jsonl", "npz", "npy", "arrow", "webdataset"),
    *("mds", "litdata", "huggingface", "zarr", "images"),
)

BYTES_OF_A_JOB: Final = 256 * MIB
"""A process takes a second to start: less than this is not worth another."""
MAX_JOBS: Final = 8


@dataclass(frozen=True)
class _Task:
    """What to import into what."""

    name: str
    paths: Sequence[str]
    append: bool
    again: bool
    kind: str | None
    delimiter: str
    has_header: bool
    types: dict[str, str]
    shard_bytes: int
    batch_bytes: int
    jobs: int
    split: str | None
    seed: int


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What both commands take beside NAME and PATH."""
    options = (
        click.argument("name"),
        click.argument("paths", nargs=-1, required=True, metavar="PATH..."),
        click.option(
            "--format",
            "kind",
            type=click.Choice(FORMATS),
            help="Default: by names, and by what a folder holds.",
        ),
        click.option("--split", metavar="NAME=SHARE,…", help="Define splits: train=0.8,test=0.2."),
        click.option("--seed", default=0, show_default=True, help="Of the splits' random choice."),
        click.option(
            "--delimiter", default=",", show_default=True, help="Between the fields of a CSV."
        ),
        click.option(
            "--no-header", is_flag=True, help="CSV without a first line of names: f0, f1, …"
        ),
        click.option(
            "--type",
            "--column",
            "types",
            multiple=True,
            metavar="COLUMN=TYPE",
            help="Of a column, instead of the inferred one: float32, string, binary, …",
        ),
        click.option("--jobs", type=click.IntRange(min=0), default=0, help=JOBS_HELP),
        click.option("--shard-bytes", default=64 * MIB, show_default=True, help="Largest shard."),
        click.option(
            "--batch-bytes", default=2 * MIB, show_default=True, help="Record batch, about."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


_again = click.option(
    "--again", is_flag=True, help="Append also what the same command has appended before."
)
JOBS_HELP: Final = "Processes that read side by side. Default 0: by the size of the data."


@click.command("import")
@_with_options
@click.option("--append", is_flag=True, help="Add a version to a dataset that exists.")
@_again
@with_session
def import_dataset(session: Session, append: bool, **options: Any) -> None:
    """Make dataset NAME of what lies at PATHs: files, folders, patterns, fsspec URLs.

    Files: Parquet, CSV, JSON lines, npz, npy, Arrow, WebDataset tar. Folders: of such files, MDS,
    LitData, what Hugging Face datasets saved, zarr, images in a folder for each class.

    Rows keep their order. All becomes one version, or nothing does. If it is killed, the same
    command goes on where it was.
    """
    _run(session, _task(options, append=append))


@click.command("append")
@_with_options
@_again
@with_session
def append_dataset(session: Session, **options: Any) -> None:
    """Add what lies at PATHs to dataset NAME, as its next version.

    As import, but the dataset has to exist, and the data have to fit its columns. The same command
    run again adds nothing, unless --again says so.
    """
    _run(session, _task(options, append=True))


def _task(given: dict[str, Any], *, append: bool) -> _Task:
    types = parse_types(given.pop("types"))
    return _Task(append=append, has_header=not given.pop("no_header"), types=types, **given)


def _run(session: Session, task: _Task) -> None:
    shares = parse_shares(task.split)
    with session.connect() as client:
        if task.append and task.name not in client.datasets():
            raise NotFound(f"there is no dataset {task.name!r} to append to: import it first")
        base = client.dataset(task.name) if task.append else None
        with progress_of(task.name) as progress:
            dataset = client.import_dataset(
                task.name,
                list(task.paths),
                format=task.kind,
                append=task.append,
                again=task.again,
                types=task.types,
                delimiter=task.delimiter,
                has_header=task.has_header,
                shard_bytes=task.shard_bytes,
                batch_bytes=task.batch_bytes,
                jobs=task.jobs or default_jobs,
                progress=progress,
            )
        if shares:
            dataset.define_splits(shares, seed=task.seed)
        parts = {
            part: len(client.dataset(task.name, dataset.version, split=part)) for part in shares
        }
    is_new = base is None or dataset.version > base.version
    before = 0 if base is None else len(base)
    value = {
        "name": task.name,
        "version": dataset.version,
        "num_rows_added": len(dataset) - before if is_new else 0,
        "num_rows": len(dataset),
        "num_bytes": dataset.num_bytes,
        "splits": parts,
    }
    shown = "".join(f", {part} {count:,}" for part, count in parts.items())
    nothing = "" if is_new else "Nothing added, it was before (--again: once more). "
    session.show(
        value,
        lambda: print(
            f"{nothing}Dataset {task.name!r} version {dataset.version}: {len(dataset):,} rows"
            f"{shown}, {size(dataset.num_bytes)}."
        ),
    )


def default_jobs(num_bytes: int) -> int:
    """How many processes read so many bytes."""
    return max(1, min(len(os.sched_getaffinity(0)), num_bytes // BYTES_OF_A_JOB, MAX_JOBS))


def parse_shares(text: str | None) -> dict[str, float]:
    """Split name to fraction, of ``train=0.8,test=0.2``."""
    shares: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            raise click.BadParameter(f"{part!r} is not NAME=SHARE", param_hint="--split") from None
    return shares


def parse_types(given: Sequence[str]) -> dict[str, str]:
    types: dict[str, str] = {}
    for one in given:
        column, separator, kind = one.rpartition("=")
        if not separator:
            raise click.BadParameter(f"{one!r} is not COLUMN=TYPE", param_hint="--type")
        types[column] = kind
    return types
