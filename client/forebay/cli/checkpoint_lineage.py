"""``forebay checkpoint lineage``: which attempt stands on what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from forebay.cli.checkpoint_manage import generation_text
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay.runs import Generation, Lineage, LineageAttempt
    from forebay_wire.ids import GenerationId


@click.command("lineage")
@click.argument("run")
@with_session
def show_lineage(session: Session, run: str) -> None:
    """The attempts of RUN as a tree: what each stands on, rollbacks, and the runs that forked it.

    Generations that the newest attempt stands on have a *; the others a rollback left behind.
    """
    with session.connect() as client:
        found = client.run(run).lineage()
    session.show(_value(found), lambda: print("\n".join(lines_of(found))))


def _value(found: Lineage) -> dict[str, Any]:
    return {
        "run": found.run,
        "forked_from": str(found.forked_from) if found.forked_from else None,
        "attempts": [
            {
                "attempt": one.attempt,
                "parent": str(one.parent) if one.parent else None,
                "generations": [
                    {"step": each.step, "tags": list(each.tags), "on_path": each.id in found.path}
                    for each in one.generations
                ],
            }
            for one in found.attempts
        ],
        "path": [str(one) for one in found.path],
        "forks": [{"run": run, "from": str(one)} for run, one in found.forks],
    }


def lines_of(found: Lineage) -> list[str]:
    """The tree: attempts below the generation that they restored."""
    origin = f", forked from {found.forked_from}" if found.forked_from else ""
    lines = [f"run {found.run}{origin}"]
    path = set(found.path)
    roots = [one for one in found.attempts if _is_root(one, found)]
    for number, one in enumerate(roots):
        _add_attempt(found, one, path, "", number == len(roots) - 1, lines)
    return lines


def _is_root(one: LineageAttempt, found: Lineage) -> bool:
    if one.parent is None or one.parent.run != found.run:
        return True
    known = {each.id for attempt in found.attempts for each in attempt.generations}
    return one.parent not in known


def _add_attempt(
    found: Lineage,
    one: LineageAttempt,
    path: set[GenerationId],
    indent: str,
    is_last: bool,
    lines: list[str],
) -> None:
    lines.append(f"{indent}{'└─' if is_last else '├─'} attempt {one.attempt}{_from(found, one)}")
    below = indent + ("   " if is_last else "│  ")
    for place, generation in enumerate(one.generations):
        is_end = place == len(one.generations) - 1
        lines.append(f"{below}{'└─' if is_end else '├─'} {_generation(generation, path)}")
        deeper = below + ("   " if is_end else "│  ")
        forks = [run for run, parent in found.forks if parent == generation.id]
        children = [each for each in found.attempts if each.parent == generation.id]
        for number, child in enumerate(children):
            last = number == len(children) - 1 and not forks
            _add_attempt(found, child, path, deeper, last, lines)
        for number, run in enumerate(dict.fromkeys(forks)):
            last = number == len(set(forks)) - 1
            lines.append(f"{deeper}{'└─' if last else '├─'} run {run} was forked here")


def _from(found: Lineage, one: LineageAttempt) -> str:
    if not _is_root(one, found) or one.parent is None:
        return ""
    gone = "" if one.parent.run != found.run else " (deleted)"
    return f", from {generation_text(one.parent, found.run)}{gone}"


def _generation(one: Generation, path: set[GenerationId]) -> str:
    mark = " *" if one.id in path else ""
    tags = f" [{', '.join(one.tags)}]" if one.tags else ""
    pinned = " pinned" if one.pinned is not None else ""
    return f"step {one.step}{mark}{tags}{pinned}"
