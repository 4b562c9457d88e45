"""``forebay dataset delete``."""

from __future__ import annotations

import click

from forebay.cli.confirm import confirm
from forebay.cli.output import record
from forebay.cli.session import Session, with_session
from forebay.cli.trash import telling, way_back
from forebay_wire.errors import NotFound


@click.command("delete")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--now", is_flag=True, help="For good, not into the trash.")
@click.option("--force", is_flag=True, help="Also if checkpoints stand on it; names them.")
@click.option("--missing-ok", is_flag=True, help="A dataset that does not exist is no failure.")
@with_session
def delete_dataset(
    session: Session, name: str, yes: bool, now: bool, force: bool, missing_ok: bool
) -> None:
    """Put a dataset with all its versions and splits into the trash (see forebay trash)."""
    with session.connect() as client:
        confirm(
            f"Delete dataset {name!r} with all its versions{' for good' if now else ''}?",
            is_sure=yes,
        )
        with telling(client, f"dataset {name}") as made:
            answer = client.remove_dataset(name, now=now, force=force)
    existed, stranded = answer.existed, list(answer.stranded)
    if not existed and not missing_ok:
        raise NotFound(f"there is no dataset {name!r}: forebay dataset list shows what there is")
    said = f"There was no dataset {name!r}."
    if existed:
        said = f"Deleted dataset {name!r}. {way_back(made)}"
    if stranded:
        said += f" Checkpoints that stood on it: {', '.join(stranded)}."
    value = {
        "name": name,
        "existed": existed,
        "stranded": stranded,
        "trash": [record(one) for one in made],
    }
    session.show(value, lambda: print(said))
