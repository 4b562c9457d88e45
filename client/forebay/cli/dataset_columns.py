"""``forebay dataset columns``: columns of files beside those that are there, and fewer of them."""

from __future__ import annotations

from typing import Any

import click

from forebay.cli.dataset_import import FORMATS, JOBS_HELP, default_jobs, parse_types
from forebay.cli.output import size
from forebay.cli.progress import progress_of
from forebay.cli.session import Session, with_session


@click.command("columns")
@click.argument("name")
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@click.option("--replace", is_flag=True, help="Also in the place of columns that are there.")
@click.option("--drop", metavar="COLUMN,…", help="Make a version without these; takes no PATH.")
@click.option("--format", "kind", type=click.Choice(FORMATS), help="Default: as import.")
@click.option("--delimiter", default=",", show_default=True, help="Between the fields of a CSV.")
@click.option("--no-header", is_flag=True, help="CSV without a first line of names: f0, f1, …")
@click.option("--type", "types", multiple=True, metavar="COLUMN=TYPE", help="As import.")
@click.option("--jobs", type=click.IntRange(min=0), default=0, help=JOBS_HELP)
@with_session
def write_columns(session: Session, name: str, paths: tuple[str, ...], **options: Any) -> None:
    """Give dataset NAME the columns that lie at PATHs, one value for each of its rows in order.

    Files and folders as import takes them. The next version has these columns and the others,
    which are neither read nor written again; splits keep their rows.
    """
    dropped = [one.strip() for one in (options["drop"] or "").split(",") if one.strip()]
    if bool(dropped) == bool(paths):
        raise click.UsageError("give PATHs of columns to write, or --drop: one of the two")
    with session.connect() as client:
        if dropped:
            dataset = client.dataset(name, client.drop_columns(name, dropped))
        else:
            with progress_of(name) as progress:
                dataset = client.import_dataset(
                    name,
                    list(paths),
                    columns=True,
                    replace=options["replace"],
                    format=options["kind"],
                    types=parse_types(options["types"]),
                    delimiter=options["delimiter"],
                    has_header=not options["no_header"],
                    jobs=options["jobs"] or default_jobs,
                    progress=progress,
                )
    columns = {column.name: column.text for column in dataset.schema.columns}
    value = {
        "name": name,
        "version": dataset.version,
        "columns": columns,
        "num_rows": len(dataset),
        "num_bytes": dataset.num_bytes,
    }
    session.show(
        value,
        lambda: print(
            f"Dataset {name!r} version {dataset.version}: {len(dataset):,} rows of "
            f"{', '.join(columns)}; {size(dataset.num_bytes)}."
        ),
    )
