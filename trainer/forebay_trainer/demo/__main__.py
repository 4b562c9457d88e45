"""``python -m forebay_trainer.demo``: the whole system on real data, in a few minutes.

Exit status: 0 the proof holds, 1 it does not or something failed, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from forebay_trainer.demo.story import SHORT, Plan, tell
from forebay_wire.errors import ForebayError


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Unwinds the context managers, which end the children.
    signal.signal(signal.SIGTERM, _leave)
    console = Console(stderr=options.json)
    try:
        outcome = tell(plan_of(options), options.data, console)
    except ForebayError:
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(outcome.to_json()))
    return 0 if outcome.proof.holds else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="forebay_trainer.demo", description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("demo-data"),
        metavar="DIR",
        help="folder for everything (default: ./demo-data); emptied if an earlier demo made it",
    )
    parser.add_argument("--epochs", type=positive, metavar="N", help="epochs in all")
    parser.add_argument(
        "--steps-to-kill",
        type=positive,
        metavar="N",
        help="kill the trainer after this step (default: past the half of the second epoch)",
    )
    parser.add_argument("--short", action="store_true", help="fewer digits and epochs, as in tests")
    parser.add_argument("--json", action="store_true", help="the outcome as JSON on stdout")
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    plan = SHORT if options.short else Plan()
    if options.epochs is not None:
        plan = replace(plan, num_epochs=options.epochs)
    if options.steps_to_kill is not None:
        plan = replace(plan, steps_to_kill=options.steps_to_kill)
    return plan


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
