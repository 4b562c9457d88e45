"""``forebay dataset list``."""

from __future__ import annotations

import click

from forebay.cli.output import print_table, record, size
from forebay.cli.session import Session, with_session


@click.command("list")
@with_session
def list_datasets(session: Session) -> None:
    """All datasets, with their newest versions."""
    with session.connect() as client:
        found = client.dataset_summaries()

    def people() -> None:
        rows = [
            (
                one.name,
                str(one.num_versions),
                f"{one.num_rows:,}",
                size(one.num_bytes),
                one.durability,
            )
            for one in found
        ]
        print_table(("dataset", ">versions", ">rows", ">bytes", "durability"), rows)

    session.show([record(one) for one in found], people)
