"""``forebay checkpoint diff``."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from forebay.cli.exit_codes import ExitCode
from forebay.cli.output import print_table
from forebay.cli.progress import progress_of
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay.checkpoint.diff import Diff, TensorChange
    from forebay.checkpoint.find import Found
    from forebay.client import Client

SHOWN = 30


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option("--exact", is_flag=True, help="Read both, instead of comparing fingerprints.")
@click.option("--all", "show_all", is_flag=True, help="Also what is unchanged, and all lines.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    help="Seconds for fingerprints that have to be computed first; 0: compare names only then.",
)
@with_session
def diff_checkpoints(
    session: Session, a: str, b: str, exact: bool, show_all: bool, wait: float
) -> ExitCode:
    """What changed from generation A to B, tensor by tensor, the largest relative change first.

    A and B are RUN (the latest), RUN@STEP, RUN@ATTEMPT/STEP or RUN@TAG. Without --exact no data is
    read: changes marked ~ are estimates (8.8 % off, one standard deviation). Ends with status 0
    if all is equal, 1 if not.
    """
    from forebay.checkpoint.find import find, split

    with session.connect() as client:
        found_a, found_b = find(client, *split(a)), find(client, *split(b))
        compared = (
            _exactly(client, found_a, found_b)
            if exact
            else _quickly(client, found_a, found_b, wait)
        )
    value = {
        "a": str(found_a.id),
        "b": str(found_b.id),
        "is_exact": exact,
        "is_equal": compared.is_equal,
        "tensors": [_plain(asdict(one)) for one in compared.tensors],
        "objects": compared.objects,
    }
    session.show(value, lambda: _print(value, compared, show_all=show_all))
    return ExitCode.OK if compared.is_equal else ExitCode.FAILURE


def _quickly(client: Client, a: Found, b: Found, wait: float) -> Diff:
    from forebay.checkpoint.diff import compare
    from forebay.checkpoint.find import fingerprints_of

    known = []
    for name, found in (("A", a), ("B", b)):
        with progress_of(f"fingerprints of {name}") as progress:
            known.append(fingerprints_of(client, found, wait, progress))
    return compare(a.committed(), b.committed(), *known)


def _exactly(client: Client, a: Found, b: Found) -> Diff:
    from forebay.checkpoint.diff import compare_exactly
    from forebay.checkpoint.tensor_bytes import TensorReader

    with (
        TensorReader(client.transfer, a.committed()) as reader_a,
        TensorReader(client.transfer, b.committed()) as reader_b,
        progress_of("diff") as progress,
    ):
        return compare_exactly(reader_a, reader_b, progress)


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN: as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _print(value: dict[str, Any], compared: Diff, *, show_all: bool) -> None:
    from forebay.checkpoint.diff import UNCHANGED

    print(f"A = {value['a']}, B = {value['b']}")
    unchanged = sum(one.status == UNCHANGED for one in compared.tensors)
    listed = [one for one in compared.tensors if show_all or one.status != UNCHANGED]
    shown = listed if show_all else listed[:SHOWN]
    if shown:
        columns = ("tensor", "what", ">change", ">largest", ">norm A", ">norm B", "A", "B", "")
        print_table(columns, [_row(one) for one in shown])
    if len(shown) < len(listed):
        print(f"and {len(listed) - len(shown)} more: --all shows them")
    for name, status in compared.objects.items():
        print(f"{name} (no tensor): {status}")
    print(f"{len(compared.tensors)} tensors, {unchanged} of them unchanged")


def _row(one: TensorChange) -> tuple[str, ...]:
    return (
        one.name,
        one.status,
        _change(one),
        "" if one.max_abs is None else f"{one.max_abs:.3g}",
        *(
            "" if side is None or side.norm is None else f"{side.norm:.6g}"
            for side in (one.a, one.b)
        ),
        *(_side(one, number) for number in (0, 1)),
        one.note,
    )


def _change(one: TensorChange) -> str:
    if one.relative_change is None:
        return ""
    return ("" if one.is_exact else "~") + f"{one.relative_change:.3g}"


def _side(one: TensorChange, number: int) -> str:
    """What is worth a look of one side: dtype and shape where they differ, what is not finite."""
    side, other = ((one.a, one.b), (one.b, one.a))[number]
    if side is None:
        return ""
    words = []
    if other is None or (side.dtype, side.shape) != (other.dtype, other.shape):
        words.append(f"{side.dtype} {'×'.join(map(str, side.shape)) or 'scalar'}")
    if side.num_nan:
        words.append(f"{side.num_nan} NaN")
    if side.num_inf:
        words.append(f"{side.num_inf} infinite")
    return ", ".join(words)
