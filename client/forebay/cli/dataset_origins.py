"""``forebay dataset register`` and ``pin``: files that stay where they are, and no longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from forebay.cli.output import size
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay.dataset.dataset import Dataset


@click.command("register")
@click.argument("name")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("--append", is_flag=True, help="Add a version to a dataset that exists.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["arrow", "parquet", "mds", "webdataset", "zarr"]),
    help="Default: by the ends of the files' names.",
)
@with_session
def register_dataset(
    session: Session, name: str, urls: tuple[str, ...], append: bool, kind: str | None
) -> None:
    """Make dataset NAME of files that stay where they are.

    Arrow IPC, Parquet, uncompressed WebDataset tar files, folders of uncompressed MDS shards, and
    the root folder of a zarr store.

    URLs and paths have to lie below one of the daemon's origin-prefixes. Nothing is copied: each
    file is trusted when it is first read, and refused once it changes.
    """
    with session.connect() as client:
        dataset = client.register_dataset(name, urls, append=append, format=kind)
        num_origins = len(client.origins(name, dataset.version))
    session.show(
        _value(dataset, num_origins),
        lambda: print(f"{_described(dataset)}, {num_origins} files in place."),
    )


@click.command("pin")
@click.argument("name")
@with_session
def pin_dataset(session: Session, name: str) -> None:
    """Read all origins of dataset NAME, and keep them: a new version without origins.

    Once that is remote, the originals may go.
    """
    with session.connect() as client:
        dataset = client.pin_origins(name)
    session.show(_value(dataset, 0), lambda: print(f"{_described(dataset)}, none in place."))


def _value(dataset: Dataset, num_origins: int) -> dict[str, object]:
    return {
        "name": dataset.name,
        "version": dataset.version,
        "num_rows": len(dataset),
        "num_bytes": dataset.num_bytes,
        "num_origins": num_origins,
    }


def _described(dataset: Dataset) -> str:
    return (
        f"Dataset {dataset.name!r} version {dataset.version}: {len(dataset):,} rows, "
        f"{size(dataset.num_bytes)}"
    )
