"""What the catalog needs of the database below it, so that its writer knows no engine by name."""

from __future__ import annotations

from typing import Final, Protocol

from sqlalchemy import Connection, Engine, Transaction

AWAY_SECONDS: Final = 20.0
"""How long a request waits for a database that does not answer, before it fails."""


class Database(Protocol):
    """One open database: engines for the writer and for readers, and how it fails."""

    writer: Engine
    """For the one connection of the writer thread."""
    readers: Engine
    """Connections that cannot write; each transaction on them sees one snapshot."""
    where: str
    """Names it in messages; never holds a password."""
    max_writes_per_commit: int
    """Requests that may share one transaction."""
    has_other_writers: bool
    """Whether other processes commit too."""

    def enter(self, connection: Connection) -> object:
        """Called first in every writing transaction, before anything is read: from here to its
        end no other writer changes anything. What :meth:`commit` needs to know of it."""
        ...

    def commit(self, transaction: Transaction, entered: object) -> None:
        """Make it durable, or raise; :class:`OutcomeUnknown` where it may have become so."""
        ...

    def lost_transaction(self, connection: Connection) -> bool:
        """Whether the database has rolled everything back by itself."""
        ...

    def is_passing(self, error: BaseException) -> bool:
        """Whether *error* ended a transaction without a trace that may well succeed again soon: a
        server that restarts, a lock that was not given in time."""
        ...

    def is_fatal(self, error: BaseException) -> bool:
        """Whether nobody can know what the database holds after *error*."""
        ...

    def moment(self, connection: Connection) -> str:
        """Something that differs after each commit of any process."""
        ...

    def back_up(self, connection: Connection, version: int) -> None:
        """Keep a copy of the catalog as it is, of schema *version*, before a migration."""
        ...

    def finish_schema(self, connection: Connection) -> None:
        """Inside the transaction that made or migrated the tables: add what only this engine
        has."""
        ...

    def close(self) -> None:
        """Close all connections; blocks."""
        ...
