"""``forebay checkpoint show``."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

from forebay.cli.output import moment, print_fields, print_table, record, size
from forebay.cli.progress import progress_of
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay.checkpoint.contents import Contents
    from forebay.checkpoint.diff import Fingerprints
    from forebay.checkpoint.find import Found
    from forebay.client import Client

TENSORS_SHOWN = 20
WAIT_SECONDS = 600.0


@click.command("show")
@click.argument("run")
@click.argument("generation", required=False)
@click.option(
    "--all", "show_all", is_flag=True, help=f"All tensors, not the first {TENSORS_SHOWN}."
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Levels of the tree of modules by size.",
)
@click.option(
    "--fingerprints",
    "computes",
    is_flag=True,
    help="Norm, extremes and NaN of each tensor; waits if they are not known yet.",
)
@with_session
def show_checkpoint(
    session: Session, run: str, generation: str | None, show_all: bool, depth: int, computes: bool
) -> None:
    """One generation of RUN: where it stands and what is in it.

    GENERATION is "latest" (on the current lineage; the default), STEP, ATTEMPT/STEP or a tag.
    RUN@GENERATION in one word works, too.
    """
    from forebay.checkpoint.find import find, split

    with session.connect() as client:
        found = find(client, *split(run, generation))
        known = _fingerprints(client, found, computes) if found.contents else None
    value = {**record(found.info), "packs": [], "tensors": [], "modules": []}
    value["metrics"] = json.loads(value.pop("metrics_json") or "{}")
    if found.contents is not None:
        value.update(_contents(found.contents, known, depth))
    session.show(value, lambda: _print(value, show_all=show_all, shows_figures=computes))


def _fingerprints(client: Client, found: Found, computes: bool) -> Fingerprints | None:
    from forebay.checkpoint.find import fingerprints_of

    with progress_of("fingerprints") as progress:
        return fingerprints_of(client, found, WAIT_SECONDS if computes else 0.0, progress)


def _contents(contents: Contents, known: Fingerprints | None, depth: int) -> dict[str, Any]:
    from forebay.checkpoint.contents import module_tree

    manifest = contents.manifest
    tensors = [
        {
            "name": one.name,
            "dtype": one.dtype,
            "shape": list(one.shape),
            "num_bytes": one.num_bytes,
            "ranks": one.ranks,
            **_figures(contents, one.name, known),
        }
        for one in contents.tensors.values()
    ]
    return {
        "packs": [
            {"rank": pack.rank, "blob": pack.blob, "num_bytes": pack.num_bytes}
            for pack in manifest.packs
        ],
        "tensors": tensors,
        "modules": [
            {
                "name": one.name,
                "level": level,
                "num_tensors": one.num_tensors,
                "num_elements": one.num_elements,
                "num_bytes": one.num_bytes,
            }
            for level, one in module_tree(contents).walk(depth)
        ]
        if depth
        else [],
        "dataset": manifest.dataset,
        "has_fingerprints": known is not None,
    }


def _figures(contents: Contents, name: str, known: Fingerprints | None) -> dict[str, Any]:
    if known is None:
        return {}
    from forebay_wire.fingerprint import combine

    info = contents.tensors[name]
    whole = combine(known[part.rank][part.index] for part in info.parts)
    if not whole.has_figures:
        return {}
    return {
        "num_nan": whole.num_nan,
        "num_inf": whole.num_inf,
        "norm": whole.norm if math.isfinite(whole.norm) else None,
        "min": None if math.isnan(whole.min) else whole.min,
        "max": None if math.isnan(whole.max) else whole.max,
    }


def _print(value: dict[str, Any], *, show_all: bool, shows_figures: bool) -> None:
    fields = [
        ("generation", f"{value['run']}@{value['attempt']}/{value['step']}"),
        ("state", value["state"] + (f": {value['error']}" if value["error"] else "")),
        ("durability", value["durability"] or "–"),
        ("created", moment(value["created_unix"])),
        ("bytes", size(value["num_bytes"])),
        ("metrics", json.dumps(value["metrics"])),
        ("manifest", value["manifest"] or "–"),
    ]
    if value["shared_bytes"]:
        written = value["num_bytes"] - value["shared_bytes"]
        fields.append(("written", f"{size(written)}; the run had the rest already"))
    if value["stall_seconds"]:
        fields.append(("held up by the save", f"{value['stall_seconds']:.3f} s"))
    if value["tags"]:
        fields.append(("tags", ", ".join(value["tags"])))
    if value["has_parent"]:
        parent = f"{value['parent_attempt']}/{value['parent_step']}"
        if value["parent_run"]:
            parent = f"{value['parent_run']}@{parent}"
        fields.append(("began from", parent))
    if value.get("dataset"):
        fields.append(("dataset", json.dumps(value["dataset"])))
    print_fields(fields)
    packs = [(str(one["rank"]), one["blob"][:12], size(one["num_bytes"])) for one in value["packs"]]
    print_table((">rank", "blob of its pack", ">bytes"), packs)
    if value["modules"]:
        _print_modules(value["modules"])
    _print_tensors(value["tensors"], show_all=show_all, shows_figures=shows_figures)
    bad = [one for one in value["tensors"] if one.get("num_nan") or one.get("num_inf")]
    for one in bad:
        print(f"Beware: {one['name']} has {one['num_nan']} NaN and {one['num_inf']} infinities.")


def _print_modules(modules: list[dict[str, Any]]) -> None:
    rows = [
        (
            "  " * one["level"] + one["name"].split(".")[-1],
            f"{one['num_tensors']:,}",
            f"{one['num_elements']:,}",
            size(one["num_bytes"]),
        )
        for one in modules
    ]
    print_table(("module", ">tensors", ">elements", ">bytes"), rows)


def _print_tensors(tensors: list[dict[str, Any]], *, show_all: bool, shows_figures: bool) -> None:
    shown = tensors if show_all else tensors[:TENSORS_SHOWN]
    columns: tuple[str, ...] = ("tensor", "type", "shape", ">bytes", "in the packs of ranks")
    if shows_figures:
        columns = (*columns, ">norm", ">min", ">max", ">NaN")
    rows = []
    for one in shown:
        row = (
            one["name"],
            one["dtype"],
            "×".join(map(str, one["shape"])) or "scalar",
            size(one["num_bytes"]),
            ", ".join(map(str, one["ranks"])),
        )
        figures = [one.get(name) for name in ("norm", "min", "max", "num_nan")]
        cells = ["" if figure is None else f"{figure:.6g}" for figure in figures]
        rows.append((*row, *cells) if shows_figures else row)
    print_table(columns, rows)
    if len(shown) < len(tensors):
        print(f"and {len(tensors) - len(shown)} more: --all shows them")
