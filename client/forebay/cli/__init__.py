"""The command line: ``forebay COMMAND``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from forebay.cli.checkpoint_advise import advise_interval
from forebay.cli.checkpoint_cat import cat_tensor
from forebay.cli.checkpoint_delete import delete_checkpoint
from forebay.cli.checkpoint_diff import diff_checkpoints
from forebay.cli.checkpoint_export import export_checkpoint
from forebay.cli.checkpoint_import import import_checkpoint
from forebay.cli.checkpoint_lineage import show_lineage
from forebay.cli.checkpoint_list import list_checkpoints
from forebay.cli.checkpoint_manage import pin_checkpoint, prune_checkpoints, tag_checkpoint
from forebay.cli.checkpoint_show import show_checkpoint
from forebay.cli.checkpoint_verify import verify_checkpoint
from forebay.cli.daemon import backup, recover, serve
from forebay.cli.dataset_columns import write_columns
from forebay.cli.dataset_delete import delete_dataset
from forebay.cli.dataset_head import show_rows
from forebay.cli.dataset_import import append_dataset, import_dataset
from forebay.cli.dataset_list import list_datasets
from forebay.cli.dataset_origins import pin_dataset, register_dataset
from forebay.cli.dataset_select import select_rows, split_dataset
from forebay.cli.dataset_show import show_dataset
from forebay.cli.dataset_verify import show_statistics, verify_dataset
from forebay.cli.doctor import doctor
from forebay.cli.exit_codes import ExitCode, epilog, exit_code
from forebay.cli.integrity import fsck, gc, scrub
from forebay.cli.jobs import jobs
from forebay.cli.pins import pin, pins, unpin, warm
from forebay.cli.policy import policy
from forebay.cli.status import status
from forebay.cli.trash import trash
from forebay.cli.why import why
from forebay_wire.errors import ForebayError

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_SETTINGS, epilog=epilog())
@click.version_option(package_name="forebay")
def commands() -> None:
    """Data and checkpoints for training, kept by a Forebay daemon."""


@commands.group()
def dataset() -> None:
    """List, show, import, append, verify, register, split and delete datasets."""


@commands.group()
def checkpoint() -> None:
    """Look at, compare, verify and manage the checkpoints of training runs."""


for command in (
    list_datasets,
    show_dataset,
    show_rows,
    show_statistics,
    verify_dataset,
    import_dataset,
    append_dataset,
    write_columns,
    register_dataset,
    pin_dataset,
    split_dataset,
    select_rows,
    delete_dataset,
    warm,
):
    dataset.add_command(command)
for command in (
    list_checkpoints,
    show_checkpoint,
    verify_checkpoint,
    diff_checkpoints,
    cat_tensor,
    export_checkpoint,
    import_checkpoint,
    advise_interval,
    tag_checkpoint,
    pin_checkpoint,
    prune_checkpoints,
    show_lineage,
    delete_checkpoint,
):
    checkpoint.add_command(command)
for command in (
    status,
    doctor,
    serve,
    backup,
    recover,
    scrub,
    fsck,
    gc,
    jobs,
    why,
    pin,
    unpin,
    pins,
    policy,
    trash,
):
    commands.add_command(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its status (see ``forebay --help``)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        done = commands.main(given, "forebay", standalone_mode=False)
        sys.exit(int(done or ExitCode.OK))
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        print("forebay: interrupted", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
    except ForebayError as error:
        if "--json" in given:
            failure = {"error": type(error).__name__, "message": error.message}
            print(json.dumps(failure), file=sys.stderr)
        else:
            print(f"forebay: {error.message}", file=sys.stderr)
        sys.exit(exit_code(error))
