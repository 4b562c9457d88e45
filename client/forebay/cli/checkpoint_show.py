"""``forebay checkpoint show``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from forebay.cli.output import moment, print_fields, print_table, record, size
from forebay.cli.selector import parse_generation, split_run
from forebay.cli.session import Session, with_session
from forebay_wire.errors import IntegrityError, NotFound
from forebay_wire.ids import GenerationId

if TYPE_CHECKING:
    from forebay.client import Client
    from forebay_wire.manifest import GenerationManifest
    from forebay_wire.v1.checkpoints_pb2 import Generation

TENSORS_SHOWN = 20


@click.command("show")
@click.argument("run")
@click.argument("generation", required=False)
@click.option(
    "--all", "show_all", is_flag=True, help=f"All tensors, not the first {TENSORS_SHOWN}."
)
@with_session
def show_checkpoint(session: Session, run: str, generation: str | None, show_all: bool) -> None:
    """One generation of RUN: where it stands and what is in it.

    GENERATION is "latest" (on the current lineage; the default), STEP, or ATTEMPT/STEP.
    RUN@ATTEMPT/STEP in one word works, too.
    """
    run, generation = split_run(run, generation)
    with session.connect() as client:
        found = _resolve(client, run, generation or "latest")
        manifest = _manifest(client, found) if found.manifest else None
    value = {**record(found), "packs": [], "tensors": []}
    value["metrics"] = json.loads(value.pop("metrics_json") or "{}")
    if manifest is not None:
        value["packs"] = [
            {"rank": pack.rank, "blob": pack.blob, "num_bytes": pack.num_bytes}
            for pack in manifest.packs
        ]
        value["tensors"] = tensors(manifest)
        value["dataset"] = manifest.dataset
    session.show(value, lambda: _print(value, show_all=show_all))


def _resolve(client: Client, run: str, selector: str) -> Generation:
    from forebay.methods import Checkpoints
    from forebay_wire.v1.checkpoints_pb2 import ResolveGenerationRequest

    if selector == "latest":
        request = ResolveGenerationRequest(run=run, selector="latest", durability="local")
        return client.channel.call(Checkpoints.ResolveGeneration, request)
    attempt, step = parse_generation(selector)
    wanted = [
        one
        for one in client.checkpoints(run)
        if one.step == step and attempt in (None, one.attempt)
    ]
    if not wanted:
        raise NotFound(
            f"run {run!r} has no generation {selector}: forebay checkpoint list {run} shows them"
        )
    return max(wanted, key=lambda one: one.attempt)


def _manifest(client: Client, found: Generation) -> GenerationManifest:
    from forebay_wire.manifest import GenerationManifest, parse

    where = f"generation {GenerationId(found.run, found.attempt, found.step)}"
    manifest = parse(client.read_manifest(found.manifest), where, found.manifest)
    if not isinstance(manifest, GenerationManifest):
        raise IntegrityError(f"manifest {found.manifest} is not that of {where}")
    return manifest


def tensors(manifest: GenerationManifest) -> list[dict[str, Any]]:
    """Name, dtype, shape and stored bytes of each tensor, over all ranks; needs no torch."""
    found: dict[str, dict[str, Any]] = {}
    for pack in manifest.packs:
        for entry in pack.description.get("tensors", []):
            tensor = found.setdefault(
                entry["name"],
                {
                    "name": entry["name"],
                    "dtype": entry["dtype"],
                    "shape": entry["shape"],
                    "num_bytes": 0,
                    "ranks": [],
                },
            )
            tensor["num_bytes"] += entry["at"][1]
            if pack.rank not in tensor["ranks"]:
                tensor["ranks"].append(pack.rank)
    return list(found.values())


def _print(value: dict[str, Any], *, show_all: bool) -> None:
    fields = [
        ("generation", f"{value['run']}@{value['attempt']}/{value['step']}"),
        ("state", value["state"] + (f": {value['error']}" if value["error"] else "")),
        ("durability", value["durability"] or "–"),
        ("created", moment(value["created_unix"])),
        ("bytes", size(value["num_bytes"])),
        ("metrics", json.dumps(value["metrics"])),
        ("manifest", value["manifest"] or "–"),
    ]
    if value["has_parent"]:
        fields.append(("began from", f"{value['parent_attempt']}/{value['parent_step']}"))
    if value.get("dataset"):
        fields.append(("dataset", json.dumps(value["dataset"])))
    print_fields(fields)
    packs = [(str(one["rank"]), one["blob"][:12], size(one["num_bytes"])) for one in value["packs"]]
    print_table((">rank", "blob of its pack", ">bytes"), packs)
    shown = value["tensors"] if show_all else value["tensors"][:TENSORS_SHOWN]
    rows = [
        (
            one["name"],
            one["dtype"],
            "×".join(map(str, one["shape"])) or "scalar",
            size(one["num_bytes"]),
            ", ".join(map(str, one["ranks"])),
        )
        for one in shown
    ]
    print_table(("tensor", "type", "shape", ">bytes", "in the packs of ranks"), rows)
    if len(shown) < len(value["tensors"]):
        print(f"and {len(value['tensors']) - len(shown)} more: --all shows them")
