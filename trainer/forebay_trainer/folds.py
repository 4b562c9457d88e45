"""Cross-validation: one run for each fold, one after the other, and what they come to together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forebay_trainer.loop import Reason
from forebay_trainer.parallel import Parallel
from forebay_trainer.recipe import Recipe
from forebay_trainer.train import train


@dataclass(frozen=True)
class Spread:
    """One metric over the folds."""

    mean: float
    deviation: float
    """Standard deviation over the folds."""
    values: tuple[float, ...]


def runs(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe itself, or one for each fold: ``RUN-fold0``, …, each with a folder of its own."""
    config = recipe.config
    if not config.data.num_folds or config.data.fold is not None:
        yield recipe
        return
    for fold in range(config.data.num_folds):
        folder = Path(config.output.folder) / f"fold{fold}"
        yield replace(
            recipe,
            config=replace(
                config,
                run=f"{config.run}-fold{fold}",
                data=replace(config.data, fold=fold),
                output=replace(config.output, folder=str(folder)),
            ),
        )


def train_all(recipe: Recipe) -> Reason:
    """Trains the run, or those of all folds: a fold that is done already takes no step again.

    After the last fold, rank 0 writes ``folds.json``: the spread of each metric of the last
    evaluations.
    """
    reason: Reason = "done"
    folder = Path(recipe.config.output.folder)
    with recipe.config.parallel.build() as parallel:
        found = []
        for one in runs(recipe):
            reason, quality = train(one, parallel)
            if reason in ("terminated", "left"):
                return reason
            found.append(quality)
        if len(found) > 1:
            write(folder, parallel, found)
    return reason


def write(folder: Path, parallel: Parallel, found: Sequence[Mapping[str, float]]) -> None:
    if not parallel.is_main:
        return
    spreads = together(found)
    table = {
        name: {"mean": each.mean, "deviation": each.deviation, "values": each.values}
        for name, each in spreads.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "folds.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for name, each in spreads.items():
        print(f"{name} over {len(found)} folds: {each.mean:.4f} ± {each.deviation:.4f}", flush=True)


def together(found: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """The spread of each metric that all folds have."""
    metrics = found[0].keys() - {"test_samples"}
    names = [name for name in sorted(metrics) if all(name in each for each in found)]
    return {
        name: Spread(statistics.fmean(values), statistics.stdev(values), values)
        for name in names
        if (values := tuple(each[name] for each in found))
    }
