"""``forebay dataset show``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from forebay.cli.dataset_head import first_rows, plain, print_rows
from forebay.cli.output import moment, print_fields, print_table, record, size
from forebay.cli.session import Session, with_session
from forebay_wire.manifest import SelectionManifest, ShardRef, parse
from forebay_wire.selection import describe_rule

if TYPE_CHECKING:
    from forebay.client import Client
    from forebay.dataset.dataset import Dataset
    from forebay_wire.v1 import datasets_pb2


@click.command("show")
@click.argument("name")
@click.option("--version", default="latest", show_default=True, help="Which version to show.")
@click.option("--preview", default=0, metavar="ROWS", help="Show so many rows as well.")
@with_session
def show_dataset(session: Session, name: str, version: str, preview: int) -> None:
    """A dataset's versions and splits, and the columns, copies and shards of one version."""
    with session.connect() as client:
        found = client.describe_dataset(name)
        dataset = client.dataset(name, version)
        rows = first_rows(dataset, preview) if preview else []
        value: dict[str, Any] = {
            **record(found),
            "selections": [
                {**record(one), "definition": _definition(client, one, dataset.version)}
                for one in found.selections
            ],
            "shown_version": dataset.version,
            "columns": {column.name: column.text for column in dataset.schema.columns},
            "metadata": dataset.manifest.metadata,
            "copies": [
                {
                    "tier": one.tier,
                    "encoding": one.encoding,
                    "num_blobs": one.num_blobs,
                    "num_bytes": one.num_bytes,
                    "stored_bytes": one.stored_bytes,
                }
                for one in client.why(f"dataset {name}@{dataset.version}", 1).copies
                if one.state == "live"
            ],
            "shards": _shards(dataset.manifest.shards),
            "layers": [
                {"columns": list(layer.columns), "shards": _shards(layer.shards)}
                for layer in dataset.manifest.layers
            ],
            "origins": [
                {**asdict(one), "trust": one.trust}
                for one in (client.origins(name, dataset.version) if _has_origins(dataset) else ())
            ],
            "preview": [{key: plain(one) for key, one in row.items()} for row in rows],
        }

    def people() -> None:
        _print(value, dataset)
        if rows:
            print_rows(rows)

    session.show(value, people)


def _shards(shards: Sequence[ShardRef]) -> list[dict[str, Any]]:
    return [
        {"blob": shard.blob, "num_bytes": shard.num_bytes, "num_rows": shard.num_rows}
        for shard in shards
    ]


def _has_origins(dataset: Dataset) -> bool:
    return any(shard.origin is not None for shard in dataset.manifest.shards)


def _definition(client: Client, one: datasets_pb2.Selection, version: int) -> str | None:
    """How the rows of a selection of the shown version were chosen; of others nobody looks."""
    if one.version != version:
        return None
    where = f"selection {one.name} of version {version}"
    manifest = parse(client.read_manifest(one.manifest), where, one.manifest)
    return describe_rule(manifest.rule) if isinstance(manifest, SelectionManifest) else None


def _print(value: dict[str, Any], dataset: Dataset) -> None:
    versions = [
        (
            str(one["version"]),
            f"{one['num_rows']:,}",
            size(one["num_bytes"]),
            str(one["num_shards"]),
            one["durability"],
            moment(one["created_unix"]),
            one["manifest"][:12],
        )
        for one in value["versions"]
    ]
    columns = (">version", ">rows", ">bytes", ">shards", "durability", "created", "manifest")
    print_table(columns, versions, title=f"Dataset {value['name']}")
    if value["selections"]:
        splits = [
            (one["name"], str(one["version"]), f"{one['num_rows']:,}", one["definition"] or "")
            for one in value["selections"]
        ]
        print_table(("split", ">of version", ">rows", "chosen by"), splits)
    print_fields(
        [
            (f"Version {dataset.version}", f"{len(dataset):,} rows"),
            *((f"  {name}", text) for name, text in value["columns"].items()),
        ]
    )
    copies = [
        (
            one["tier"],
            one["encoding"],
            str(one["num_blobs"]),
            size(one["num_bytes"]),
            size(one["stored_bytes"]),
        )
        for one in value["copies"]
    ]
    if copies:
        print_table(("copies in", "encoding", ">blobs", ">plain", ">stored"), copies)
    lists = [
        ("", value["shards"]),
        *((", ".join(a["columns"]), a["shards"]) for a in value["layers"]),
    ]
    for names, found in lists:
        shards = [
            (str(number), one["blob"][:12], f"{one['num_rows']:,}", size(one["num_bytes"]))
            for number, one in enumerate(found)
        ]
        title = f"Columns written later: {names}" if names else ""
        print_table((">shard", "blob", ">rows", ">bytes"), shards, title=title)
    if value["origins"]:
        origins = [(one["url"], size(one["num_bytes"]), one["trust"]) for one in value["origins"]]
        print_table(("read in place", ">bytes", "trust"), origins)
