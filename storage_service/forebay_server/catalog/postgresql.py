"""How the catalog lies in a PostgreSQL database that several processes may share.

Writers take one advisory lock first in each transaction, so their transactions are serial, as they
are with SQLite, and the queries need no second way of thinking. A commit whose answer is lost is
looked up by its transaction number once the server answers again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, Transaction, create_engine, event, exc, make_url

from forebay_server.catalog.database import AWAY_SECONDS
from forebay_server.catalog.failures import (
    PASSING_STATES,
    OutcomeUnknown,
    is_disconnect,
    sqlstate,
)
from forebay_wire.errors import AlreadyRunning, InvalidRequest

DRIVER: Final = "postgresql+psycopg"
SCHEMES: Final = ("postgresql://", "postgres://")

LOCK_CLASS: Final = 0x466F7265
"""First half of our advisory locks' keys, "Fore"; the second half says which one it is."""
WRITE_LOCK: Final = 1
OWNER_LOCK: Final = 2

MAX_WRITES_PER_COMMIT: Final = 60
"""More than 64 savepoints overflow the server's table of them, which slows down every reader."""

SERVER_SETTINGS: Final = {
    "lock_timeout": "10s",
    # A paused process must not hold the writers' lock for ever: the server ends its transaction.
    "idle_in_transaction_session_timeout": "15s",
    # The other side of a cut network: without these the server keeps a dead client's locks.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "synchronous_commit": "on",
    "timezone": "UTC",
}
CONNECTION: Final = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
NO_SUCH_TRANSACTION: Final = "22023"
"""What pg_xact_status says of a number that the server has not given out."""

ASK_SECONDS: Final = 0.1


def parse_url(text: str) -> URL:
    """The URL of a PostgreSQL catalog; :class:`InvalidRequest` for one that names a password."""
    try:
        url = make_url(text)
    except (exc.ArgumentError, ValueError) as error:
        raise InvalidRequest(
            "the catalog's URL cannot be read: write postgresql://USER@HOST:PORT/DATABASE"
        ) from error
    if url.password is not None or "password" in url.query:
        raise InvalidRequest(
            "the catalog's URL names a password, which ps and --show-config would show: leave it "
            "out, and give PGPASSWORD, or a file named by PGPASSFILE (one line: "
            "host:port:database:user:password)"
        )
    if not url.database:
        raise InvalidRequest(
            f"catalog URL {text!r} names no database: write postgresql://USER@HOST:PORT/DATABASE"
        )
    return url.set(drivername=DRIVER)


def dump_advice(text: str, target: Path) -> str:
    """How to save the catalog at the URL *text*, for people."""
    url = parse_url(text).set(drivername="postgresql").render_as_string()
    return (
        "a catalog in PostgreSQL is saved by PostgreSQL's own program, which may run at any time: "
        f"pg_dump --format=custom --file {target} '{url}'; restore it into an empty database with "
        f"pg_restore --no-owner --dbname URL {target}"
    )


class PostgresqlDatabase:
    """The database at *url*; *owner* names the only daemon that may write, None: anybody may."""

    max_writes_per_commit = MAX_WRITES_PER_COMMIT
    has_other_writers = True

    def __init__(self, url: URL, num_readers: int, owner: str | None) -> None:
        self.where = url.set(drivername="postgresql").render_as_string()
        self._owner = owner
        settings = " ".join(f"-c {name}={value}" for name, value in SERVER_SETTINGS.items())
        arguments = CONNECTION | {
            "options": settings,
            "application_name": f"forebay {owner or 'catalog'}",
        }
        self.writer = _engine(url, arguments, pool_size=1, isolation="READ COMMITTED")
        self.readers = _engine(
            url, arguments, pool_size=num_readers, isolation="REPEATABLE READ", readonly=True
        )
        if owner is not None:
            event.listen(self.writer, "connect", self._claim)

    # ------------------------------------------------------------------------------ one owner

    def _claim(self, connection: Any, record: Any) -> None:
        """Every connection that writes holds the owner's lock: without one there is no write."""
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_lock(%s, %s)", (LOCK_CLASS, OWNER_LOCK))
            (is_ours,) = cursor.fetchone()
            cursor.execute(
                "SELECT application_name, coalesce(host(client_addr), 'the same machine')"
                " FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory'"
                " AND classid = %s AND objid = %s AND granted",
                (LOCK_CLASS, OWNER_LOCK),
            )
            who, place = cursor.fetchone() or ("another process", "an unknown place")
        connection.commit()
        if not is_ours:
            connection.close()
            raise AlreadyRunning(
                f"another daemon has the catalog {self.where} ({who}, from {place}): stop it "
                "first, or give each its own database"
            )

    # ---------------------------------------------------------------------------- transactions

    def enter(self, connection: Connection) -> object:
        """Wait for the writers' lock; the transaction's number.

        What follows sees all that was committed meanwhile: each statement has its own snapshot.
        """
        row = connection.exec_driver_sql(
            f"SELECT pg_current_xact_id()::text, pg_advisory_xact_lock({LOCK_CLASS}, {WRITE_LOCK})"
        ).one()
        return row[0]

    def commit(self, transaction: Transaction, entered: object) -> None:
        """Commit; where the connection breaks meanwhile, ask the server what became of it."""
        try:
            transaction.commit()
        except exc.DBAPIError as error:
            if not is_disconnect(error) and sqlstate(error) not in PASSING_STATES:
                raise
            if not self._was_committed(str(entered), error):
                raise

    def _was_committed(self, number: str, lost: Exception) -> bool:
        deadline = time.monotonic() + AWAY_SECONDS
        answer = None
        while time.monotonic() < deadline:
            try:
                with self.readers.connect() as connection:
                    answer = connection.exec_driver_sql(
                        "SELECT pg_xact_status(%s::xid8)", (number,)
                    ).scalar_one_or_none()
            except exc.DBAPIError as error:
                if sqlstate(error) == NO_SUCH_TRANSACTION:
                    return False  # the server crashed before its log had anything of it
            if answer in ("committed", "aborted"):
                return bool(answer == "committed")
            time.sleep(ASK_SECONDS)
        raise OutcomeUnknown(
            f"the connection to the catalog {self.where} broke inside a commit, and the server "
            f"could not say in {AWAY_SECONDS:.0f} s what became of it ({answer or lost}): the "
            "change is stored as a whole or not at all; look, or repeat it with the same request id"
        ) from lost

    def lost_transaction(self, connection: Connection) -> bool:
        return connection.invalidated or bool(
            getattr(connection.connection.dbapi_connection, "closed", True)
        )

    def is_passing(self, error: BaseException) -> bool:
        return (
            isinstance(error, AlreadyRunning)  # our own last connection, not yet given up
            or sqlstate(error) in PASSING_STATES
            or is_disconnect(error)
        )

    def is_fatal(self, error: BaseException) -> bool:
        return isinstance(error, OutcomeUnknown | AlreadyRunning)

    def moment(self, connection: Connection) -> str:
        asked = connection.exec_driver_sql("SELECT pg_current_snapshot()::text")
        return str(asked.scalar_one())

    # ----------------------------------------------------------------------------- its schema

    def back_up(self, connection: Connection, version: int) -> None:
        """Copies of all tables in a schema of their own, ``forebay_backup_v<version>``."""
        copies = f"forebay_backup_v{version}"
        with connection.begin():
            self.enter(connection)
            connection.exec_driver_sql(f"DROP SCHEMA IF EXISTS {copies} CASCADE")
            connection.exec_driver_sql(f"CREATE SCHEMA {copies}")
            names = connection.exec_driver_sql(
                "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
            )
            for name in names.scalars().all():
                connection.exec_driver_sql(f'CREATE TABLE {copies}."{name}" AS TABLE "{name}"')

    def finish_schema(self, connection: Connection) -> None:
        """Nothing: pages carry the server's own checksums."""

    def close(self) -> None:
        self.readers.dispose()
        self.writer.dispose()


def _engine(
    url: URL, arguments: dict[str, Any], pool_size: int, isolation: Any, *, readonly: bool = False
) -> Engine:
    try:
        return create_engine(
            url,
            connect_args=arguments,
            pool_size=pool_size,
            max_overflow=0,
            isolation_level=isolation,
            execution_options={"postgresql_readonly": True} if readonly else {},
            hide_parameters=True,  # an error's text goes to logs
        )
    except ImportError as error:
        raise InvalidRequest(
            "a catalog in PostgreSQL needs its driver: pip install 'forebay[postgres]'"
        ) from error
