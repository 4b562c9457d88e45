"""``forebay dataset verify`` and ``stats``: all of a dataset is read."""

from __future__ import annotations

import click

from forebay.cli.exit_codes import ExitCode
from forebay.cli.output import print_table, size
from forebay.cli.progress import progress_of
from forebay.cli.session import Session, with_session


@click.command("verify")
@click.argument("name")
@click.option("--version", default="latest", show_default=True, help="Which version.")
@with_session
def verify_dataset(session: Session, name: str, version: str) -> ExitCode:
    """Read every byte of a version of dataset NAME and compare it with its digests.

    Files in place are read and compared as well. Ends with status 6 if something is damaged.
    """
    with session.connect() as client:
        dataset = client.dataset(name, version)
        with progress_of(f"verify {name}") as progress:
            found = dataset.verify(progress)
    value = {
        "name": name,
        "version": dataset.version,
        "num_shards": found.num_shards,
        "num_bytes": found.num_bytes,
        "num_rows": found.num_rows,
        "damaged": [{"shard": shard, "message": text} for shard, text in found.damaged.items()],
    }

    def people() -> None:
        print(
            f"Dataset {name!r} version {dataset.version}: {size(found.num_bytes)} in "
            f"{found.num_shards} shards read, {found.num_rows:,} rows are good, "
            f"{len(found.damaged)} shards are damaged."
        )
        for text in found.damaged.values():
            print(f"  {text}")

    session.show(value, people)
    return ExitCode.DAMAGED if found.damaged else ExitCode.OK


@click.command("stats")
@click.argument("name")
@click.option("--version", default="latest", show_default=True, help="Of which version.")
@click.option("--split", help="Of which split.")
@click.option("--columns", help="Which, separated by commas. Default: all.")
@click.option("--recompute", is_flag=True, help="Read all rows again, and keep what is found then.")
@with_session
def show_statistics(
    session: Session,
    name: str,
    version: str,
    split: str | None,
    columns: str | None,
    recompute: bool,
) -> None:
    """Counts, extremes, mean and standard deviation of each column of dataset NAME.

    Of text, bytes and lists those of their lengths. The first time all rows are read; the figures
    are kept with the version and shown at once from then on.
    """
    with session.connect() as client:
        dataset = client.dataset(name, version, split)
        take = dataset.recompute_statistics if recompute else dataset.statistics
        with progress_of(f"stats {name}") as progress:
            found = take(columns.split(",") if columns else None, progress)

    def people() -> None:
        rows = [
            (
                column,
                one.of,
                f"{one.num_rows:,}",
                f"{one.num_nulls:,}",
                f"{one.num_nan:,}",
                *("" if value is None else f"{value:.6g}" for value in (one.min, one.max)),
                *("" if value is None else f"{value:.6g}" for value in (one.mean, one.std)),
            )
            for column, one in found.items()
        ]
        titles = ("column", "of", ">rows", ">nulls", ">NaN", ">min", ">max", ">mean", ">std")
        print_table(titles, rows)

    session.show({column: one.record() for column, one in found.items()}, people)
