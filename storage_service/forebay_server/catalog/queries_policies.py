"""Which named policy a dataset or run has."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from forebay_server.catalog.queries_history import record
from forebay_server.catalog.tables import assigned_policies


def policy_of(connection: Connection, owner: str) -> str | None:
    """The policy assigned to *owner* (``dataset NAME``, ``run NAME``), None: the default one."""
    name: str | None = connection.scalar(
        select(assigned_policies.c.policy).where(assigned_policies.c.owner == owner)
    )
    return name


def assign_policy(connection: Connection, owner: str, policy: str) -> None:
    """Give *owner* a policy, empty: the default one."""
    if (policy_of(connection, owner) or "") == policy:
        return
    connection.execute(delete(assigned_policies).where(assigned_policies.c.owner == owner))
    if policy:
        connection.execute(insert(assigned_policies).values(owner=owner, policy=policy))
    record(connection, owner, "policy", policy or "the default one")


def list_assigned(connection: Connection) -> dict[str, str]:
    """Owner to policy, those with the default one left out."""
    rows = connection.execute(select(assigned_policies).order_by(assigned_policies.c.owner))
    return {row.owner: row.policy for row in rows}
