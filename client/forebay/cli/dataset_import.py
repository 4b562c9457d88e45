"""``forebay dataset import``: Parquet, CSV and npz files into a dataset."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import click

from forebay.cli.output import size
from forebay.cli.session import Session, with_session
from forebay_wire.errors import InvalidRequest, NotFound
from forebay_wire.limits import MIB

if TYPE_CHECKING:
    from rich.progress import Progress

    from forebay.client import Client
    from forebay.dataset.write import DatasetWriter


@dataclass(frozen=True)
class _Task:
    """What to import into what."""

    name: str
    paths: Sequence[str]
    kind: str | None
    delimiter: str
    has_header: bool
    types: dict[str, str]
    shard_bytes: int
    batch_bytes: int


@click.command("import")
@click.argument("name")
@click.argument("paths", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["parquet", "csv", "npz"]),
    help="Default: by the end of each file's name.",
)
@click.option("--append", is_flag=True, help="Add a version to a dataset that exists.")
@click.option("--split", metavar="NAME=SHARE,…", help="Define splits: train=0.8,test=0.2.")
@click.option("--seed", default=0, show_default=True, help="Of the splits' random choice.")
@click.option("--delimiter", default=",", show_default=True, help="Between the fields of a CSV.")
@click.option("--no-header", is_flag=True, help="CSV without a first line of names: f0, f1, …")
@click.option("--type", "types", multiple=True, metavar="COLUMN=TYPE", help="Of a CSV column.")
@click.option("--shard-bytes", default=64 * MIB, show_default=True, help="Largest shard.")
@click.option("--batch-bytes", default=2 * MIB, show_default=True, help="Record batch, about.")
@with_session
def import_dataset(
    session: Session,
    name: str,
    paths: tuple[str, ...],
    kind: str | None,
    append: bool,
    split: str | None,
    seed: int,
    delimiter: str,
    no_header: bool,
    types: tuple[str, ...],
    shard_bytes: int,
    batch_bytes: int,
) -> None:
    """Make dataset NAME of FILEs (Parquet, CSV, .csv.gz, npz; paths or fsspec URLs).

    Rows keep their order. All files become one version, or nothing does.
    """
    shares = parse_shares(split)
    task = _Task(
        name, paths, kind, delimiter, not no_header, _parse_types(types), shard_bytes, batch_bytes
    )
    with session.connect() as client:
        version, num_rows = _import(client, task, append=append)
        dataset = client.dataset(name, version)
        if shares:
            dataset.define_splits(shares, seed=seed)
        parts = {part: len(client.dataset(name, version, split=part)) for part in shares}
    value = {
        "name": name,
        "version": version,
        "num_rows_added": num_rows,
        "num_rows": len(dataset),
        "num_bytes": dataset.num_bytes,
        "splits": parts,
    }
    shown = "".join(f", {part} {count:,}" for part, count in parts.items())
    session.show(
        value,
        lambda: print(
            f"Dataset {name!r} version {version}: {len(dataset):,} rows{shown}, "
            f"{size(dataset.num_bytes)}."
        ),
    )


def _import(client: Client, task: _Task, *, append: bool) -> tuple[int, int]:
    """The new version's number and the rows that were added; all of them or none."""
    if append:
        writer = client.append_dataset(
            task.name, shard_bytes=task.shard_bytes, batch_bytes=task.batch_bytes
        )
    else:
        _refuse_existing(client, task.name)
        writer = client.create_dataset(
            task.name, shard_bytes=task.shard_bytes, batch_bytes=task.batch_bytes
        )
    with writer, progress_display() as progress:
        for path in task.paths:
            _import_file(writer, path, task, progress)
    assert writer.version is not None
    return writer.version, writer.num_rows


def _refuse_existing(client: Client, name: str) -> None:
    """Say so before hours of reading; the commit would find out as well."""
    from forebay_wire.errors import AlreadyExists

    if name in client.datasets():
        raise AlreadyExists(
            f"there is a dataset {name!r} already: choose another name, --append to it, or delete "
            f"it first (forebay dataset delete {name})"
        )


def _import_file(writer: DatasetWriter, path: str, task: _Task, progress: Progress | None) -> None:
    from forebay.cli.sources import CsvOptions, format_of, open_source  # loads pyarrow

    kind = task.kind or format_of(path)
    options = CsvOptions(task.delimiter, task.has_header, task.types)
    with _open(path) as (file, num_bytes):
        source = open_source(file, path, kind, options)
        total = source.num_rows if source.num_rows is not None else num_bytes
        bar: Any = progress.add_task(path, total=total) if progress is not None else None
        for batch in source.batches():
            writer.write_table(batch)
            if progress is not None and source.num_rows is not None:
                progress.advance(bar, batch.num_rows)
            elif progress is not None:
                progress.update(bar, completed=num_bytes if file.closed else file.tell())


@contextmanager
def _open(path: str) -> Iterator[tuple[IO[bytes], int]]:
    """A local file or an fsspec URL, open for reading, and its size in bytes."""
    import fsspec

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        file = filesystem.open(inner, "rb")
        num_bytes = int(filesystem.size(inner) or 0)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except (ImportError, IsADirectoryError, PermissionError) as error:
        raise InvalidRequest(f"{path} cannot be opened: {error}") from error
    with file:
        yield file, num_bytes


@contextmanager
def progress_display() -> Iterator[Progress | None]:
    """A progress display on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        yield progress


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


def _parse_types(given: Sequence[str]) -> dict[str, str]:
    types: dict[str, str] = {}
    for one in given:
        column, separator, kind = one.rpartition("=")
        if not separator:
            raise click.BadParameter(f"{one!r} is not COLUMN=TYPE", param_hint="--type")
        types[column] = kind
    return types
