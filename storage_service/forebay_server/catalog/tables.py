"""The tables of the catalog, with the rules that the database itself enforces.

Times are Unix seconds by the database's clock, sizes are bytes, ids are lower-case hex, JSON is
canonical text. The schema's number is :data:`SCHEMA_VERSION`; older ones are brought here by
``catalog/migrations``.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

from forebay_server.catalog.clock import now

SCHEMA_VERSION: Final = 9

metadata: Final = MetaData()


def _name(length: int) -> String:
    """Text that is compared byte by byte on every engine: paging goes by its order."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


def _created() -> Column[Any]:
    return Column("created", Double, nullable=False, default=now())


def _one_of(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_is_known")


settings = Table(
    "settings",
    metadata,
    Column("key", _name(128), primary_key=True),
    Column("value", Text, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("node", _name(32), primary_key=True),
    _created(),
)

# ------------------------------------------------------------------------------------ the bytes

files = Table(
    "files",
    metadata,
    Column("file", _name(32), primary_key=True),
    Column("tier", _name(128), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    # 'missing': the row's file was not there at a start; its replicas are quarantined.
    Column("state", _name(16), nullable=False, default="live"),
    _created(),
    _one_of("state", "live", "missing"),
    Index("files_by_tier", "tier"),
)

blobs = Table(
    "blobs",
    metadata,
    Column("blob", _name(64), primary_key=True),
    Column("num_bytes", BigInteger, nullable=False),
    Column("num_segments", BigInteger, nullable=False),
    # When it was opened last, as far as that was stored; 0: not since it was made.
    Column("used", Double, nullable=False, default=0.0, server_default="0"),
    _created(),
)

replicas = Table(
    "replicas",
    metadata,
    Column("replica", _name(32), primary_key=True),
    Column("blob", ForeignKey("blobs.blob"), nullable=False),
    Column("tier", _name(128), nullable=False),
    # '' where the catalog serves one node, and for tiers that all nodes share.
    Column("node", _name(32), nullable=False, default=""),
    Column("encoding", _name(16), nullable=False, default="raw"),
    Column("state", _name(16), nullable=False, default="live"),
    # Why it was quarantined.
    Column("reason", Text, nullable=False, default=""),
    # When the last check of every byte ended; 0: none since it was written.
    Column("verified", Double, nullable=False, default=0.0, server_default="0"),
    _created(),
    _one_of("state", "live", "quarantined"),
    Index("replicas_by_blob", "blob"),
)

Index(
    "one_live_replica",
    replicas.c.blob,
    replicas.c.tier,
    replicas.c.node,
    unique=True,
    sqlite_where=text("state = 'live'"),
    postgresql_where=text("state = 'live'"),
)

extents = Table(
    "extents",
    metadata,
    Column("replica", ForeignKey("replicas.replica", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("blob_offset", BigInteger, nullable=False),
    Column("file", ForeignKey("files.file"), nullable=False),
    Column("file_offset", BigInteger, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Index("extents_by_file", "file"),
)

# ------------------------------------------------------------------------------ what it adds up to

manifests = Table(
    "manifests",
    metadata,
    Column("manifest", _name(64), primary_key=True),
    Column("kind", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    _created(),
)

manifest_blobs = Table(
    "manifest_blobs",
    metadata,
    Column("manifest", ForeignKey("manifests.manifest", ondelete="CASCADE"), primary_key=True),
    # No ON DELETE: a blob that a manifest names cannot be deleted.
    Column("blob", ForeignKey("blobs.blob"), primary_key=True),
    Index("manifest_blobs_by_blob", "blob"),
)

manifest_remote = Table(
    "manifest_remote",
    metadata,
    Column("manifest", ForeignKey("manifests.manifest", ondelete="CASCADE"), primary_key=True),
    Column("at", Double, nullable=False, default=now()),
)

datasets = Table(
    "datasets",
    metadata,
    Column("name", _name(128), primary_key=True),
    _created(),
)

versions = Table(
    "versions",
    metadata,
    Column("dataset", ForeignKey("datasets.name"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("manifest", ForeignKey("manifests.manifest"), nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("num_shards", Integer, nullable=False),
    # The commit's random name: the same request is applied once.
    Column("request", _name(64), nullable=False, unique=True),
    _created(),
)

selections = Table(
    "selections",
    metadata,
    Column("dataset", _name(128), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("name", _name(128), primary_key=True),
    Column("manifest", ForeignKey("manifests.manifest"), nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    _created(),
    ForeignKeyConstraint(["dataset", "version"], ["versions.dataset", "versions.version"]),
)

statistics = Table(
    "statistics",
    metadata,
    Column("manifest", ForeignKey("manifests.manifest"), primary_key=True),
    Column("dataset", _name(128), nullable=False),
    Column("version", Integer, nullable=False),
    # Manifest of the selection; empty: of the whole version.
    Column("selection", _name(64), nullable=False),
    _created(),
    ForeignKeyConstraint(["dataset", "version"], ["versions.dataset", "versions.version"]),
    Index("statistics_by_version", "dataset", "version", "selection"),
)

# ------------------------------------------------------------------------------------ checkpoints

runs = Table(
    "runs",
    metadata,
    Column("run", _name(128), primary_key=True),
    # JSON of what is kept of it (forebay_wire/keep.py); empty: everything.
    Column("keep", Text, nullable=False, default="", server_default=""),
    _created(),
)

attempts = Table(
    "attempts",
    metadata,
    Column("run", ForeignKey("runs.run"), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    # Empty: the parent is a generation of the same run; else this attempt forked another one.
    Column("parent_run", _name(128), nullable=False, default="", server_default=""),
    Column("parent_attempt", Integer),
    Column("parent_step", BigInteger),
    Column("num_ranks", Integer, nullable=False),
    # The highest step that it ever committed, also if that was deleted since; below 0: none.
    Column("newest_step", BigInteger, nullable=False, default=-1, server_default="-1"),
    # The opening call's random name: the same request opens one attempt.
    Column("request", _name(64), nullable=False, unique=True),
    _created(),
    Index("attempts_by_parent", "parent_run"),
)

generations = Table(
    "generations",
    metadata,
    Column("run", _name(128), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("state", _name(16), nullable=False, default="open"),
    Column("num_ranks", Integer, nullable=False),
    Column("manifest", ForeignKey("manifests.manifest")),
    # JSON of rank 0: {"name": number}; dataset, version, selection and position.
    Column("metrics", Text, nullable=False, default=""),
    Column("dataset", Text, nullable=False, default=""),
    # JSON object of the user's own; and a list: the tags that it gets when it is committed.
    Column("note", Text, nullable=False, default="", server_default=""),
    Column("wanted_tags", Text, nullable=False, default="", server_default=""),
    # Why no retention takes it; NULL: it may. Until then; NULL: until it is unpinned.
    Column("pinned", Text),
    Column("pin_expires", Double),
    # When all ranks had sealed it, and when it was committed.
    Column("sealed", Double),
    Column("committed", Double),
    # Longest time that the save held one of its ranks up; 0: not known.
    Column("stall", Double, nullable=False, default=0.0, server_default="0"),
    # Why it was aborted or failed.
    Column("error", Text, nullable=False, default=""),
    _created(),
    _one_of("state", "open", "sealed", "committed", "aborted", "failed"),
    CheckConstraint(
        "(state = 'committed') = (manifest IS NOT NULL)", name="committed_is_a_manifest"
    ),
    ForeignKeyConstraint(["run", "attempt"], ["attempts.run", "attempts.attempt"]),
)

tags = Table(
    "tags",
    metadata,
    Column("run", _name(128), primary_key=True),
    Column("tag", _name(128), primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("step", BigInteger, nullable=False),
    _created(),
    ForeignKeyConstraint(
        ["run", "attempt", "step"],
        ["generations.run", "generations.attempt", "generations.step"],
        ondelete="CASCADE",
    ),
    Index("tags_by_generation", "run", "attempt", "step"),
)

packs = Table(
    "packs",
    metadata,
    Column("run", _name(128), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("state", _name(16), nullable=False, default="open"),
    # No foreign key: the upload session ends when the pack has landed.
    Column("session", _name(32), nullable=False, unique=True),
    Column("blob", ForeignKey("blobs.blob")),
    Column("num_bytes", BigInteger, nullable=False),
    # Of those, what was referenced and not written when it landed.
    Column("shared_bytes", BigInteger, nullable=False, default=0, server_default="0"),
    # Canonical JSON, UTF-8: what the rank wrote where; known from the seal on.
    Column("description", LargeBinary),
    _created(),
    _one_of("state", "open", "sealed", "landed"),
    CheckConstraint("state <> 'landed' OR blob IS NOT NULL", name="landed_is_a_blob"),
    ForeignKeyConstraint(
        ["run", "attempt", "step"],
        ["generations.run", "generations.attempt", "generations.step"],
        ondelete="CASCADE",
    ),
    Index("packs_by_blob", "blob"),
)

fingerprints = Table(
    "fingerprints",
    metadata,
    # They go with their manifest, and are computed anew where they are missing.
    Column("manifest", ForeignKey("manifests.manifest", ondelete="CASCADE"), primary_key=True),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    # Of the tensors of this rank's pack, see docs/formats/fingerprint.md.
    Column("data", LargeBinary, nullable=False),
    _created(),
)

# ----------------------------------------------------------------------------------------- leases

uploads = Table(
    "uploads",
    metadata,
    Column("session", _name(32), primary_key=True),
    Column("owner", _name(512), nullable=False),
    Column("uid", BigInteger, nullable=False),
    Column("tier", _name(128), nullable=False),
    # The file that it will become; not in `files` before it landed.
    Column("file", _name(32), nullable=False, unique=True),
    Column("state", _name(16), nullable=False, default="open"),
    # What landed: no ON DELETE, so a live session keeps its blob.
    Column("blob", ForeignKey("blobs.blob")),
    Column("expires", Double, nullable=False),
    # 1: what landed belongs to a part, and waits for its commit also when the daemon restarts.
    Column("is_held", Integer, nullable=False, default=0, server_default="0"),
    _created(),
    _one_of("state", "open", "sealed", "landed"),
    CheckConstraint("state <> 'landed' OR blob IS NOT NULL", name="landed_is_a_blob"),
    Index("uploads_by_owner", "uid", "owner", "expires"),
    Index("uploads_by_expiry", "expires"),
    Index("uploads_by_blob", "blob"),
)

parts = Table(
    "parts",
    metadata,
    Column("uid", BigInteger, primary_key=True),
    Column("write", _name(128), primary_key=True),
    # Empty: the header of the write.
    Column("part", _name(128), primary_key=True),
    # JSON: the shards with their sessions; of the header what all parts share.
    Column("detail", Text, nullable=False),
    Column("expires", Double, nullable=False),
    _created(),
    Index("parts_by_expiry", "expires"),
)

decisions = Table(
    "decisions",
    metadata,
    # Who follows datasets: all ranks and workers of one loader.
    Column("reader", _name(256), primary_key=True),
    Column("epoch", BigInteger, primary_key=True),
    # JSON: of each dataset its name, that of the selection (empty: whole versions), and both
    # manifests. A decision does not keep what was deleted, and is not taken back by it.
    Column("choices", Text, nullable=False),
    Column("expires", Double, nullable=False),
    _created(),
    Index("decisions_by_expiry", "expires"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("job", _name(32), primary_key=True),
    Column("kind", _name(32), nullable=False),
    Column("target", _name(512), nullable=False),
    Column("state", _name(16), nullable=False, default="queued"),
    # Who runs it, and until when unless renewed; both empty while queued.
    Column("owner", _name(64)),
    Column("expires", Double),
    Column("tries", Integer, nullable=False, default=0),
    Column("done_bytes", BigInteger, nullable=False, default=0),
    Column("total_bytes", BigInteger, nullable=False, default=0),
    Column("error", Text, nullable=False, default=""),
    # Higher ones first, among those whose time has come.
    Column("priority", Integer, nullable=False, default=0, server_default="0"),
    # JSON that only the kind's handler reads: where a journaled sequence stands.
    Column("journal", Text, nullable=False, default="", server_default=""),
    # Not taken before: back-off after a failed try.
    Column("not_before", Double, nullable=False, default=now()),
    _created(),
    _one_of("state", "queued", "running", "done", "failed"),
    CheckConstraint(
        "(state = 'running') = (owner IS NOT NULL AND expires IS NOT NULL)",
        name="running_is_leased",
    ),
    Index("jobs_by_turn", "state", "not_before"),
)

Index(
    "one_live_job",
    jobs.c.kind,
    jobs.c.target,
    unique=True,
    sqlite_where=text("state IN ('queued', 'running')"),
    postgresql_where=text("state IN ('queued', 'running')"),
)

# ---------------------------------------------------------------------- movement, and its story

assigned_policies = Table(
    "assigned_policies",
    metadata,
    # "dataset NAME" or "run NAME"; it may be assigned before that exists.
    Column("owner", _name(160), primary_key=True),
    Column("policy", _name(64), nullable=False),
    _created(),
)

pins = Table(
    "pins",
    metadata,
    Column("pin", _name(32), primary_key=True),
    # What people named: "dataset NAME@VERSION", "generation RUN@ATTEMPT/STEP".
    Column("target", _name(512), nullable=False),
    Column("tier", _name(128), nullable=False),
    # A warm hold ends by itself; NULL: until it is unpinned.
    Column("expires", Double),
    _created(),
    Index("pins_by_target", "target"),
)

pin_blobs = Table(
    "pin_blobs",
    metadata,
    Column("pin", ForeignKey("pins.pin", ondelete="CASCADE"), primary_key=True),
    # No foreign key: a pin does not keep a deleted blob, `deleted` shows in its answer.
    Column("blob", _name(64), primary_key=True),
    Index("pin_blobs_by_blob", "blob"),
)

trash = Table(
    "trash",
    metadata,
    Column("manifest", ForeignKey("manifests.manifest", ondelete="CASCADE"), primary_key=True),
    # The random name of the call that deleted it, with others.
    Column("deletion", _name(32), nullable=False),
    # "dataset NAME", "run NAME", "generation RUN@ATTEMPT/STEP".
    Column("target", _name(512), nullable=False),
    # JSON: the rows that bring it back.
    Column("record", Text, nullable=False),
    Column("expires", Double, nullable=False),
    _created(),
    Index("trash_by_expiry", "expires"),
)

history = Table(
    "history",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", Double, nullable=False, default=now()),
    # "blob ID", "dataset NAME", "generation RUN@ATTEMPT/STEP", "tier NAME".
    Column("subject", _name(512), nullable=False),
    # "copied", "evicted", "quarantined", "repaired", "deleted", ...
    Column("event", _name(32), nullable=False),
    Column("detail", Text, nullable=False, default=""),
    Index("history_by_subject", "subject", "seq"),
)

# ------------------------------------------------------------------------------------------ origins

origins = Table(
    "origins",
    metadata,
    # Digest of (URL, size, validator).
    Column("origin", _name(64), primary_key=True),
    Column("url", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    # JSON: {"version": ..., "etag": ..., "mtime_ns": ..., "inode": ...}, whatever the place has.
    Column("validator", Text, nullable=False),
    # The blob that its bytes make, and that one's segment table, once every byte was read; NULL
    # before.
    Column("blob", _name(64)),
    Column("segments", LargeBinary),
    _created(),
    Index("origins_by_url", "url"),
    Index("origins_by_blob", "blob"),
)

manifest_origins = Table(
    "manifest_origins",
    metadata,
    Column("manifest", ForeignKey("manifests.manifest", ondelete="CASCADE"), primary_key=True),
    Column("origin", ForeignKey("origins.origin"), primary_key=True),
    Index("manifest_origins_by_origin", "origin"),
)
