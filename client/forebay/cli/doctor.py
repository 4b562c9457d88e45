"""``forebay doctor``: is this machine fit to run a daemon and its clients?"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

from forebay.cli.exit_codes import ExitCode
from forebay.cli.output import print_json

_MARKS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Data folder, existing or planned. Default: $FOREBAY_DATA, else data.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(data: Path | None, as_json: bool) -> int:
    """Check disk, memory, limits, sockets and packages; each line ok, warn or fail, with advice.

    Writes and removes a small file beside the data. Exit status 1 if anything fails.
    """
    from forebay.address import DATA_VARIABLE, DEFAULT_DATA_FOLDER
    from forebay.cli.checks import run_checks

    folder = data or Path(os.environ.get(DATA_VARIABLE) or DEFAULT_DATA_FOLDER)
    findings = list(run_checks(folder.absolute()))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        from rich.markup import escape

        from forebay.cli.output import console

        out = console()
        for one in findings:
            mark = f"[{_MARKS[one.verdict]}]{one.verdict:<4}[/]"
            advice = f"\n      → {one.advice}" if one.advice else ""
            out.print(f"{mark}  {one.check}: {escape(one.found + advice)}", soft_wrap=True)
    failed = any(finding.verdict == "fail" for finding in findings)
    return ExitCode.FAILURE if failed else ExitCode.OK
