"""``forebay trash``: what was deleted and can come back."""

from __future__ import annotations

import click

from forebay.cli.confirm import confirm
from forebay.cli.output import moment, print_table, record
from forebay.cli.session import Session, with_session


@click.group()
def trash() -> None:
    """List, restore and empty what was deleted."""


@trash.command("list")
@with_session
def list_trash(session: Session) -> None:
    """All deletions that can be undone, newest first."""
    with session.connect() as client:
        found = client.trash()

    def people() -> None:
        rows = [
            (
                one.deletion,
                one.target,
                str(one.num_manifests),
                moment(one.deleted_unix),
                moment(one.expires_unix),
            )
            for one in found
        ]
        print_table(("deletion", "of", ">manifests", "deleted", "kept until"), rows)

    session.show([record(one) for one in found], people)


@trash.command("restore")
@click.argument("which")
@with_session
def restore_trash(session: Session, which: str) -> None:
    """Bring back WHICH: a deletion's name, or what it took ("dataset NAME", "run NAME")."""
    with session.connect() as client:
        found = client.restore_trash(which)
    session.show(record(found), lambda: print(f"Restored {found.target}."))


@trash.command("empty")
@click.argument("which", required=False, default="")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_session
def empty_trash(session: Session, which: str, yes: bool) -> None:
    """Let go for good what one deletion took, or everything."""
    with session.connect() as client:
        confirm(f"Empty the trash{f' of {which}' if which else ''} for good?", is_sure=yes)
        number = client.empty_trash(which)
    session.show(
        {"num_deletions": number},
        lambda: print(f"{number} deletion{'' if number == 1 else 's'} can no longer be undone."),
    )
