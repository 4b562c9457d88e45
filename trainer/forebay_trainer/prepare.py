"""``forebay_trainer prepare RECIPE``: makes the dataset that a recipe trains on.

Exit status: 0 the dataset is there, 1 it could not be made, 2 a mistake in the recipe or the
arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from forebay_trainer import recipe as recipes
from forebay_trainer.data import connect, define_splits, metadata, new_version, values_of
from forebay_trainer.preparation import SPLIT, Preparation
from forebay_trainer.preparation.run import Prepared, Runner
from forebay_trainer.preparation.run import Progress as Told
from forebay_trainer.preparation.worker import make
from forebay_wire.errors import AlreadyExists, ForebayError, InvalidRequest, NotFound

PREPARATION: Final = "preparation"
SPLITS: Final = "splits"
APPENDED: Final = "appended"
"""Keys of the dataset's metadata, beside those of what was learnt."""


@dataclass(frozen=True)
class Outcome:
    """What ``--json`` prints."""

    dataset: str
    version: int
    num_rows: int
    splits: Mapping[str, int]
    """Rows of each, of the whole version."""
    stages: Mapping[str, Any]
    """Step to rows before, rows after, and seconds of all processes; none if nothing was to do."""
    seconds: float
    num_processes: int


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    try:
        data = recipes.load_data(options.recipe, options.override, size=options.size)
    except (InvalidRequest, NotFound) as error:
        print(f"forebay_trainer prepare: {error.message}", file=sys.stderr)
        return 2
    try:
        signal.signal(signal.SIGTERM, end)
        if options.fetch:
            for source in make(data.file, data.settings).sources:
                print(f"{source.name}: {source.fetch()}", file=sys.stderr)
        outcome = prepare(data, num_processes=options.num_processes, appends=options.append)
    except KeyboardInterrupt:
        print("forebay_trainer prepare: ended; nothing is written", file=sys.stderr)
        return 1
    except ForebayError as error:
        print(f"forebay_trainer prepare: {type(error).__name__}: {error.message}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(asdict(outcome)))
    else:
        show(outcome)
    return 0


def end(signum: int, frame: object) -> None:
    """Ends as Ctrl-C does: its processes end, and nothing is written."""
    raise KeyboardInterrupt


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="forebay_trainer prepare", description="Make the dataset that a recipe trains on."
    )
    parser.add_argument("recipe", help="TOML file, or the name of a bundled recipe")
    parser.add_argument(
        "override", nargs="*", help="prepare.key=value, data.dataset=NAME, address=ADDRESS"
    )
    parser.add_argument("--size", metavar="NAME", help="a size that the recipe has, as gpu")
    parser.add_argument(
        "--num-processes",
        type=int,
        default=os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
        metavar="N",
        help="that work side by side (default: one a core)",
    )
    parser.add_argument("--append", action="store_true", help="add to a dataset that is there")
    parser.add_argument("--fetch", action="store_true", help="get the packages of the data first")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    options = parser.parse_intermixed_args(arguments)
    if options.num_processes < 1:
        parser.error(f"--num-processes must be at least 1, not {options.num_processes}")
    return options


def prepare(data: recipes.DataRecipe, *, num_processes: int, appends: bool) -> Outcome:
    """Writes one version of the dataset, all of it or nothing, and defines its splits; on return it
    is committed and on disk.

    A dataset that was prepared with the same settings is left as it is. With *appends* the rows are
    added as a new version, by what was learnt for the first one. Raises AlreadyExists for a dataset
    that was made otherwise, NotFound for data that are not here, and PreparationFailed.
    """
    config, started = data.recipe.config, time.perf_counter()
    name = config.data.dataset
    preparation = make(data.file, data.settings)
    # The folder: variants of a recipe may share a dataset.
    recipe = data.file.parent.name
    settings = {"recipe": recipe, "seed": config.seed, **asdict(data.settings)}
    with connect(config.address) as client, telling() as told:
        known = metadata(client, name)
        runner = Runner(
            file=data.file,
            settings=data.settings,
            seed=config.seed,
            num_processes=num_processes,
            learnt=learnt_of(name, known) if appends else None,
            before=lambda column: values_of(client, name, column) if appends else (),
            progress=told,
        )
        is_there = known is not None and not appends
        if appends:
            assert known is not None, "what was learnt is known"
            is_there = check_appended(name, known, settings, preparation)
        if not is_there:
            with runner.prepared() as prepared:
                names = list(preparation.splits) if known is None else known[SPLITS]
                if known is None:
                    about = {**prepared.learnt, SPLITS: names, PREPARATION: settings}
                else:
                    about = {**known, APPENDED: [*known.get(APPENDED, ()), settings]}
                schema = {**preparation.schema, SPLIT: "int8"}
                with new_version(client, name, schema, about) as writer:
                    for rows in finished(prepared, schema, names, needs_all=not appends):
                        writer.write_table(rows)
        else:
            assert known is not None
            if not appends:
                check_same(name, known, settings)
            names = known[SPLITS]
        splits = define_splits(client, name, names)
        newest = client.dataset(name)
        return Outcome(
            name,
            newest.version,
            newest.num_rows,
            splits,
            runner.stages.as_dict(),
            time.perf_counter() - started,
            num_processes,
        )


def finished(
    prepared: Prepared, schema: Mapping[str, Any], names: Sequence[str], *, needs_all: bool
) -> Iterator[pa.Table]:
    """The columns that are stored, the splits as numbers. InvalidRequest at the end if one of the
    splits has no rows: then nothing is written."""
    seen: set[int] = set()
    for rows in prepared.rows:
        missing = [name for name in schema if name not in rows.column_names]
        if missing:
            raise InvalidRequest(
                f"the prepared rows have no column {', '.join(missing)}, which the schema names; "
                f"they have {', '.join(rows.column_names)}"
            )
        numbers = pc.index_in(rows[SPLIT], value_set=pa.array(names, pa.string()))
        if numbers.null_count:
            found = sorted({str(each) for each in rows[SPLIT].to_pylist()} - set(names))
            raise InvalidRequest(
                f"rows belong to the splits {', '.join(found)}, which the preparation does not "
                f"have; name them in splits: {', '.join(names)}"
            )
        seen.update(numbers.unique().to_pylist())
        place = rows.column_names.index(SPLIT)
        yield rows.set_column(place, SPLIT, numbers.cast(pa.int8())).select(list(schema))
    empty = [name for number, name in enumerate(names) if number not in seen]
    if empty and needs_all:
        raise InvalidRequest(
            f"no rows fall to the split {' and '.join(empty)}: nothing is written; prepare more "
            "rows, or give it a larger share"
        )


def learnt_of(name: str, known: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if known is None:
        raise NotFound(f"--append: there is no dataset {name!r}; prepare it first")
    if PREPARATION not in known:
        raise AlreadyExists(f"--append: dataset {name!r} was not made by a recipe's preparation")
    own = (PREPARATION, SPLITS, APPENDED)
    return {key: value for key, value in known.items() if key not in own}


def check_appended(
    name: str, known: Mapping[str, Any], settings: Mapping[str, Any], preparation: Preparation
) -> bool:
    """Whether these rows were appended before. InvalidRequest for settings by which they would not
    go with the others: a row could be in another split, or cut in another way.
    """
    plain = json.loads(json.dumps(settings))
    if plain in known.get(APPENDED, ()):
        return True
    before = known[PREPARATION]
    changed = [key for key in sorted({*before, *plain}) if before.get(key) != plain.get(key)]
    wrong = [key for key in changed if key not in preparation.grows_by]
    if wrong:
        said = ", ".join(f"{key} was {before.get(key)!r}, not {plain.get(key)!r}" for key in wrong)
        raise InvalidRequest(
            f"--append: dataset {name!r} was prepared by other settings: {said}; only "
            f"{' and '.join(preparation.grows_by)} may differ"
        )
    if not changed:
        raise InvalidRequest(
            f"--append: these rows are in dataset {name!r} already; name others by "
            f"{' or '.join(f'prepare.{key}' for key in preparation.grows_by)}"
        )
    if preparation.unique is not None and preparation.unique not in preparation.schema:
        raise InvalidRequest(
            f"--append: duplicates are told by the column {preparation.unique!r}, which is not "
            "stored in the dataset: prepare all of it anew, under another name"
        )
    return False


def check_same(name: str, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """AlreadyExists, naming the settings that differ, unless the dataset was made by these."""
    before = known.get(PREPARATION)
    plain = json.loads(json.dumps(settings))
    if before == plain:
        return
    if before is None:
        said = "was not made by a recipe's preparation"
    else:
        keys = sorted({*before, *plain})
        changed = [key for key in keys if before.get(key) != plain.get(key)]
        said = "was prepared otherwise: " + ", ".join(
            f"{key} was {before.get(key)!r}, not {plain.get(key)!r}" for key in changed
        )
    raise AlreadyExists(
        f"dataset {name!r} {said}; choose another name by data.dataset=…, or remove it: "
        f"forebay dataset delete {name}"
    )


@contextmanager
def telling() -> Iterator[Told]:
    """Progress on standard error, if that is a terminal: rows of each stage."""
    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        yield lambda stage, num_rows: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,} rows"),
    )
    with Progress(*columns, console=terminal) as progress:
        bars: dict[str, Any] = {}

        def tell(stage: str, num_rows: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=None)
            progress.update(bars[stage], completed=num_rows)

        yield tell


def show(outcome: Outcome) -> None:
    what = f"dataset {outcome.dataset}, version {outcome.version}: {outcome.num_rows:,} rows"
    splits = ", ".join(f"{name} {rows:,}" for name, rows in outcome.splits.items())
    print(f"{what} ({splits})")
    if not outcome.stages:
        print("it was prepared so before; nothing was done")
        return
    table = Table("step", "rows before", "rows after", "seconds", title_justify="left")
    for name, stage in outcome.stages.items():
        table.add_row(
            name, f"{stage['rows_in']:,}", f"{stage['rows_out']:,}", f"{stage['seconds']:.2f}"
        )
    Console().print(table)
    print(f"{outcome.seconds:.1f} s, {outcome.num_processes} process(es)")
