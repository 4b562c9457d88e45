"""``forebay dataset delete``."""

from __future__ import annotations

import click

from forebay.cli.confirm import confirm
from forebay.cli.session import Session, with_session
from forebay_wire.errors import NotFound


@click.command("delete")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--now", is_flag=True, help="For good, not into the trash.")
@click.option("--missing-ok", is_flag=True, help="A dataset that does not exist is no failure.")
@with_session
def delete_dataset(session: Session, name: str, yes: bool, now: bool, missing_ok: bool) -> None:
    """Put a dataset with all its versions and splits into the trash (see forebay trash)."""
    with session.connect() as client:
        confirm(
            f"Delete dataset {name!r} with all its versions{' for good' if now else ''}?",
            is_sure=yes,
        )
        existed = client.delete_dataset(name, now=now)
    if not existed and not missing_ok:
        raise NotFound(f"there is no dataset {name!r}: forebay dataset list shows what there is")
    said = f"Deleted dataset {name!r}." if existed else f"There was no dataset {name!r}."
    session.show({"name": name, "existed": existed}, lambda: print(said))
