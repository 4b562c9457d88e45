"""``forebay checkpoint tag``, ``pin`` and ``prune``: what is kept of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from forebay.cli.duration import Duration
from forebay.cli.output import print_table, size
from forebay.cli.selector import split_run
from forebay.cli.session import Session, with_session
from forebay_wire.ids import GenerationId
from forebay_wire.keep import Keep

if TYPE_CHECKING:
    from forebay.runs import PruneVerdict


@click.command("tag")
@click.argument("run")
@click.argument("tag")
@click.argument("generation", required=False, default="latest")
@click.option("--remove", is_flag=True, help="Take the tag away from whatever has it.")
@with_session
def tag_checkpoint(session: Session, run: str, tag: str, generation: str, remove: bool) -> None:
    """Give a generation of RUN the tag TAG, or take it away.

    GENERATION is a step, ATTEMPT/STEP, another tag, best or latest (which is the default). Another
    generation of the run that has the tag loses it. A tag is kept by retention, and names a
    generation wherever one is asked for: forebay checkpoint show RUN TAG, restore("TAG").
    """
    with session.connect() as client:
        found = client.run(run)
        if remove:
            found.untag(tag)
        else:
            found.tag(tag, generation)
        tags = {name: str(one) for name, one in found.tags().items()}
    said = f"Tag {tag!r} is gone." if remove else f"{tags.get(tag)} has the tag {tag!r}."
    session.show({"run": run, "tags": tags}, lambda: print(said))


@click.command("pin")
@click.argument("run")
@click.argument("generation", required=False)
@click.option("--reason", default="", help="Why, for whoever wonders later.")
@click.option("--hold", type=Duration(), default=0.0, help="2h, 30m, …; default: for good.")
@click.option("--remove", is_flag=True, help="Let retention decide about it again.")
@with_session
def pin_checkpoint(
    session: Session, run: str, generation: str | None, reason: str, hold: float, remove: bool
) -> None:
    """Keep a generation of RUN (a step, ATTEMPT/STEP or a tag) from retention and deletion.

    To keep its bytes in a fast tier as well: forebay pin RUN@ATTEMPT/STEP.
    """
    run, generation = split_run(run, generation)
    which = generation or "latest"
    with session.connect() as client:
        found = client.run(run)
        made = found.unpin(which) if remove else found.pin(which, reason, hold=hold)
    said = f"{made.id} is {'no longer pinned' if remove else 'pinned'}."
    value = {"generation": str(made.id), "pinned": made.pinned}
    session.show(value, lambda: print(said))


@click.command("prune")
@click.argument("run")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why.")
@click.option("--last", type=int, default=0, help="Keep the newest so many.")
@click.option("--every-steps", type=int, default=0, help="Keep one in so many steps.")
@click.option("--every", type=Duration(), default=0.0, help="Keep one in so much time: 2h, 1d.")
@click.option("--best", default="", help="Keep the best by this metric.")
@click.option("--best-k", type=int, default=1, show_default=True, help="So many of them.")
@click.option("--mode", type=click.Choice(["max", "min"]), default="max", show_default=True)
@click.option("--ttl", type=Duration(), default=0.0, help="Keep what is younger: 12h, 7d.")
@click.option("--always", is_flag=True, help="From now on, after each commit.")
@with_session
def prune_checkpoints(
    session: Session,
    run: str,
    dry_run: bool,
    always: bool,
    every: float,
    **rules: int | str | float,
) -> None:
    """Delete what the policy of RUN does not keep, for good; or what these rules do not keep.

    Whatever any of the rules keeps stays. So do the newest good generation, what has a tag or a
    pin, what somebody reads, and what a fork still needs.
    """
    is_given = every or any(rules[name] for name in ("last", "every_steps", "best", "ttl"))
    keep = Keep(every_seconds=every, **rules) if is_given else None  # type: ignore[arg-type]
    with session.connect() as client:
        found = client.run(run)
        if always and keep is not None and not dry_run:
            found.set_keep(keep)
        verdicts = found.prune(keep, dry_run=dry_run)
    value = {
        "run": run,
        "dry_run": dry_run,
        "verdicts": [
            {
                "attempt": one.id.attempt,
                "step": one.id.step,
                "is_kept": one.is_kept,
                "reasons": list(one.reasons),
                "num_bytes": one.num_bytes,
            }
            for one in verdicts
        ],
    }
    session.show(value, lambda: _print(run, verdicts, dry_run))


def _print(run: str, verdicts: list[PruneVerdict], dry_run: bool) -> None:
    goes = "would go" if dry_run else "deleted"
    rows = [
        (
            str(one.id.attempt),
            str(one.id.step),
            "kept" if one.is_kept else goes,
            size(one.num_bytes),
            "; ".join(one.reasons),
        )
        for one in verdicts
    ]
    print_table((">attempt", ">step", "", ">bytes", "because"), rows, title=f"Run {run}")
    gone = [one for one in verdicts if not one.is_kept]
    print(f"{len(gone)} of {len(verdicts)} {goes}: {size(sum(one.num_bytes for one in gone))}.")


def generation_text(generation: GenerationId, run: str) -> str:
    """Without the run's name where it is this one."""
    point = f"{generation.attempt}/{generation.step}"
    return point if generation.run == run else str(generation)
