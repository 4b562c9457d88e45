"""``forebay checkpoint verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from forebay.cli.exit_codes import ExitCode
from forebay.cli.output import size
from forebay.cli.progress import progress_of
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay.checkpoint.tensor_bytes import TensorReader


@click.command("verify")
@click.argument("run")
@click.argument("generation", required=False)
@with_session
def verify_checkpoint(session: Session, run: str, generation: str | None) -> ExitCode:
    """Read every byte of a generation of RUN and compare it with its BLAKE3 digests.

    GENERATION is as in show. Names the tensors that damage has hit; where the bytes lie in several
    tiers the copy that a restore gets is read (forebay scrub reads all). Ends with status 6 if
    something is damaged.
    """
    from forebay.checkpoint.find import find, split
    from forebay.checkpoint.tensor_bytes import TensorReader

    with session.connect() as client:
        found = find(client, *split(run, generation))
        contents = found.committed()
        with (
            TensorReader(client.transfer, contents) as reader,
            progress_of(f"verify {found.id}") as progress,
        ):
            damaged = _verify(reader, progress)
    value: dict[str, Any] = {
        "generation": str(found.id),
        "num_packs": len(contents.packs),
        "num_bytes": sum(pack.num_bytes for pack in contents.packs.values()),
        "num_tensors": len(contents.tensors),
        "damaged": damaged,
        "damaged_tensors": sorted({name for one in damaged for name in one["tensors"]}),
    }

    def people() -> None:
        print(
            f"Generation {value['generation']}: {size(value['num_bytes'])} in "
            f"{value['num_packs']} packs read, {len(value['damaged_tensors'])} of "
            f"{value['num_tensors']} tensors are damaged."
        )
        for one in damaged:
            print(f"  rank {one['rank']}: {', '.join(one['tensors']) or 'no tensor'}")
            print(f"    {one['message']}")

    session.show(value, people)
    return ExitCode.DAMAGED if damaged else ExitCode.OK


def _verify(reader: TensorReader, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """What is damaged: rank, segment (-1: the pack as a whole), names of tensors, message."""
    from forebay_wire.errors import DaemonUnavailable, ForebayError

    contents = reader.contents
    total = sum(pack.num_bytes for pack in contents.packs.values())
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    damaged: list[dict[str, Any]] = []
    for rank, pack in contents.packs.items():
        try:
            bad = reader.verify(rank, advance)
            borders = reader.borders(rank) if bad else []
        except DaemonUnavailable:
            raise
        except ForebayError as error:
            bad, borders = {-1: error.message}, [0, pack.num_bytes]
        for segment, message in bad.items():
            start, stop = (0, pack.num_bytes) if segment < 0 else borders[segment : segment + 2]
            names = contents.at(rank, start, stop)
            damaged.append({"rank": rank, "segment": segment, "tensors": names, "message": message})
    return damaged
