"""Checks any loader for what a training run relies on: each sample exactly once, come what may."""

from __future__ import annotations

import random
import time
from collections.abc import Collection

from forebay.testing.conformance.promises import PROMISES, Promise
from forebay.testing.conformance.report import Outcome, Report, Verdict
from forebay.testing.conformance.subject import (
    Environment,
    LoaderAdapter,
    NotSupported,
    Sample,
    Setting,
    Shape,
    Subject,
    payload,
)
from forebay.testing.conformance.team import Broken

__all__ = [
    "Environment",
    "LoaderAdapter",
    "NotSupported",
    "Outcome",
    "Report",
    "Sample",
    "Setting",
    "Shape",
    "Subject",
    "check_loader",
    "payload",
    "promise_names",
]


def promise_names() -> list[str]:
    """The names of all promises, in the order in which they are tested."""
    return [promise.__name__ for promise in PROMISES]


def check_loader(subject: Subject, *, seed: int = 0, only: Collection[str] = ()) -> Report:
    """Test every promise (or *only* these) of *subject*.

    What happens at random follows from *seed* and the promise's name, so a report can be had again.
    An error that the loader raises where it may not counts as a broken promise, too.
    """
    unknown = set(only) - set(promise_names())
    if unknown:
        raise ValueError(f"no such promise: {sorted(unknown)}; there are {promise_names()}")
    wanted = [promise for promise in PROMISES if not only or promise.__name__ in only]
    return Report([_outcome(subject, promise, seed) for promise in wanted], seed)


def _outcome(subject: Subject, promise: Promise, seed: int) -> Outcome:
    began = time.monotonic()
    verdict: Verdict = "kept"
    detail = ""
    try:
        promise(subject, random.Random(f"{seed} {promise.__name__}"))
    except NotSupported as reason:
        verdict, detail = "not tested", str(reason)
    except Broken as error:
        verdict, detail = "broken", str(error)
    except Exception as error:  # noqa: BLE001 - whatever the loader raises is the finding
        verdict, detail = "broken", f"it raised {type(error).__name__}: {_short(error)}"
    meaning = " ".join((promise.__doc__ or "").split())
    return Outcome(promise.__name__, verdict, meaning, detail, time.monotonic() - began)


def _short(error: Exception) -> str:
    """The first and the last line: torch puts a worker's whole traceback between them."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
