"""``forebay checkpoint export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from forebay.cli.output import size
from forebay.cli.progress import progress_of
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay.checkpoint.export import Exported
    from forebay.client import Client


@click.command("export")
@click.argument("generation")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "dcp"]),
    default="safetensors",
    show_default=True,
    help="Of Hugging Face's libraries, or of torch.distributed.checkpoint.",
)
@click.option("--only", multiple=True, help="Only tensors like this, as in 'model.*'; repeatable.")
@click.option("--strip-prefix", default="", help="Taken off the names, as in 'model.'.")
@click.option(
    "--max-shard-size",
    default=5 * 10**9,
    show_default=True,
    type=click.IntRange(min=1),
    help="Bytes of tensors in one safetensors file.",
)
@click.option(
    "--tied",
    type=click.Choice(["once", "copies"]),
    default="once",
    show_default=True,
    help="What becomes of tensors that have several names, in safetensors.",
)
@with_session
def export_checkpoint(
    session: Session,
    generation: str,
    output: Path,
    form: str,
    only: tuple[str, ...],
    strip_prefix: str,
    max_shard_size: int,
    tied: str,
) -> None:
    """Write GENERATION (RUN, RUN@STEP, RUN@ATTEMPT/STEP or RUN@TAG) as the new folder OUTPUT.

    An OUTPUT that ends with .safetensors becomes one file. It appears as a whole or not at all.
    """
    with session.connect() as client, progress_of(f"export {generation}") as progress:
        if form == "dcp":
            done = _dcp(client, generation, output, only, strip_prefix, progress)
        else:
            from forebay.checkpoint.export import export_safetensors

            done = export_safetensors(
                client,
                generation,
                output,
                only=only,
                strip_prefix=strip_prefix,
                max_shard_bytes=max_shard_size,
                tied=tied,
                progress=progress,
            )
    value = {
        "generation": done.generation.removeprefix("generation "),
        "files": [str(file) for file in done.files],
        "num_tensors": done.num_tensors,
        "num_bytes": done.num_bytes,
        "tied": dict(done.tied),
        "left_out": list(done.left_out),
    }
    session.show(value, lambda: _print(done, output))


def _dcp(
    client: Client,
    generation: str,
    output: Path,
    only: tuple[str, ...],
    strip_prefix: str,
    progress: Callable[[int, int], None],
) -> Exported:
    from forebay.checkpoint.dcp_folder import export_dcp

    return export_dcp(
        client, generation, output, only=only, strip_prefix=strip_prefix, progress=progress
    )


def _print(done: Exported, output: Path) -> None:
    print(
        f"{done.generation}: {done.num_tensors} tensors, {size(done.num_bytes)}, in "
        f"{len(done.files)} files of {output}"
    )
    for name, holder in done.tied.items():
        print(f"  left out, being the same tensor as {holder}: {name}")
    if done.left_out:
        print(f"  left out, being no tensors: {', '.join(done.left_out)}")
