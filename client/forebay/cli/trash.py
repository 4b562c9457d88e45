"""``forebay trash``: what was deleted and can come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from forebay.cli.confirm import confirm
from forebay.cli.output import moment, print_table, record
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay.client import Client
    from forebay_wire.v1.movement_pb2 import TrashEntry


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
    """Bring back WHICH: what was deleted last under that name (NAME, or "dataset NAME", "run NAME"
    where both were), or a deletion's own name."""
    with session.connect() as client:
        found = client.restore_trash(which)
        older = [one for one in client.trash() if one.target == found.target]

    def people() -> None:
        print(f"Restored {found.target}, deleted {moment(found.deleted_unix)}.")
        if older:
            print(
                f"Older ones of that name in the trash: {', '.join(one.deletion for one in older)}."
            )

    session.show(record(found), people)


@contextmanager
def telling(client: Client, target: str) -> Iterator[list[TrashEntry]]:
    """Around what deletes *target*: afterwards the list has what that put into the trash."""
    before = {one.deletion for one in client.trash()}
    made: list[TrashEntry] = []
    yield made
    made.extend(
        one for one in client.trash() if one.target == target and one.deletion not in before
    )


def way_back(made: Sequence[TrashEntry]) -> str:
    """How to undo a deletion, as a sentence; of one for good that it cannot be."""
    if not made:
        return "It is gone for good."
    entry = made[0]
    return (
        f"It is in the trash until {moment(entry.expires_unix)}; forebay trash restore "
        f'"{entry.target}" brings it back.'
    )


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
