"""``forebay policy``: where the bytes of datasets and runs land, are copied, and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from forebay.cli.output import print_fields, print_table, record
from forebay.cli.session import Session, with_session
from forebay_wire.errors import InvalidRequest

if TYPE_CHECKING:
    from forebay.client import Client


@click.group()
def policy() -> None:
    """List, show and assign policies."""


@policy.command("set")
@click.argument("owner")
@click.argument("name")
@with_session
def set_policy(session: Session, owner: str, name: str) -> None:
    """Assign policy NAME to OWNER: "dataset NAME", "run NAME", or a dataset's name alone.

    The name "default" takes an assignment back.
    """
    with session.connect() as client:
        now = client.set_policy(owner, "" if name == "default" else name)
        exists = _exists(client, owner)
    later = "" if exists else " It does not exist yet: that holds once it is made."
    shown = {"owner": owner, "policy": now, "exists": exists}
    session.show(shown, lambda: print(f"{owner}: policy {now}.{later}"))


@policy.command("show")
@click.argument("name")
@with_session
def show_policy(session: Session, name: str) -> None:
    """What one policy says, and what it is assigned to."""
    with session.connect() as client:
        found = client.policies()
    chosen = next((one for one in found.policies if one.name == name), None)
    if chosen is None:
        names = ", ".join(one.name for one in found.policies)
        raise InvalidRequest(f"there is no policy {name!r}; the daemon has {names}")
    owners = [one.owner for one in found.assignments if one.policy == name]
    value = {**record(chosen), "owners": owners}
    lines = [("policy", name), ("says", chosen.text), ("assigned to", ", ".join(owners) or "–")]
    session.show(value, lambda: print_fields(lines))


@policy.command("list")
@with_session
def list_policies(session: Session) -> None:
    """All policies and assignments."""
    with session.connect() as client:
        found = client.policies()

    def people() -> None:
        rows = [(one.name, "yes" if one.is_default else "", one.text) for one in found.policies]
        print_table(("policy", "default", "says"), rows)
        if found.assignments:
            print_table(("of", "policy"), [(one.owner, one.policy) for one in found.assignments])

    session.show(record(found), people)


def _exists(client: Client, owner: str) -> bool:
    """Whether the dataset or run that *owner* names is there."""
    kind, _, name = owner.rpartition(" ")
    if kind == "run":
        return any(run.run == name for run in client.runs())
    return name in client.datasets()
