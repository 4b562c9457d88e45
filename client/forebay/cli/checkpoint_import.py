"""``forebay checkpoint import``."""

from __future__ import annotations

from pathlib import Path

import click

from forebay.cli.output import size
from forebay.cli.progress import progress_of
from forebay.cli.session import Session, with_session


@click.command("import")
@click.argument("run")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--step", type=click.IntRange(min=0), default=0, show_default=True, help="Its step.")
@click.option("--add-prefix", default="", help="Put before every name, as in 'model.'.")
@with_session
def import_checkpoint(session: Session, run: str, path: Path, step: int, add_prefix: str) -> None:
    """Save the checkpoint at PATH as a generation of RUN, in a new attempt; names are kept.

    PATH is a folder of torch.distributed.checkpoint, a folder or file of safetensors, or a file of
    torch.save. With --add-prefix model. a plain model.state_dict() becomes what
    Checkpointer(model=...) restores. Nothing in it is run: what only its own code could read is
    refused by name.
    """
    from forebay.checkpoint import importing

    with session.connect() as client, progress_of(f"import {path.name}") as progress:
        done = importing.import_checkpoint(
            client, run, path, step=step, add_prefix=add_prefix, progress=progress
        )
    value = {
        "generation": str(done.generation),
        "num_tensors": done.num_tensors,
        "num_objects": done.num_objects,
        "num_bytes": done.num_bytes,
    }
    session.show(
        value,
        lambda: print(
            f"Generation {done.generation}: {done.num_tensors} tensors and {done.num_objects} "
            f"other values, {size(done.num_bytes)}"
        ),
    )
