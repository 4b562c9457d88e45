"""``python -m forebay.testing.conformance``: check a loader, print a report.

    python -m forebay.testing.conformance MODULE:FUNCTION     a loader of yours
    python -m forebay.testing.conformance --data FOLDER        Forebay's own, on a daemon's folder

FUNCTION takes nothing and returns a context manager that gives a Subject.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from forebay.testing.conformance import Subject, check_loader, promise_names


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every promise that could be tested is kept; 1: some are not."""
    parser = argparse.ArgumentParser(prog="python -m forebay.testing.conformance")
    parser.add_argument("subject", nargs="?", metavar="MODULE:FUNCTION", help="what to check")
    parser.add_argument("--data", help="check Forebay's loaders with a data folder or address")
    parser.add_argument(
        "--loader",
        default="DataLoader",
        help='which of them: "DataLoader", "torch fork", "torchdata spawn persistent", …',
    )
    parser.add_argument("--only", action="append", default=[], choices=promise_names())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if (options.subject is None) == (options.data is None):
        parser.error("give either MODULE:FUNCTION or --data")
    if options.data is None:
        subject = _load(options.subject)
    else:
        subject = _ours(options.data, options.loader)
    with subject as loaded:
        report = check_loader(loaded, seed=options.seed, only=options.only)
    sys.stdout.write(f"{report.to_json() if options.json else report}\n")
    return 1 if report.broken else 0


def _load(name: str) -> AbstractContextManager[Subject]:
    module, separator, function = name.partition(":")
    if not separator:
        raise SystemExit(f"{name}: MODULE:FUNCTION is wanted")
    sys.path.insert(0, "")
    made: AbstractContextManager[Subject] = getattr(importlib.import_module(module), function)()
    return made


@contextmanager
def _ours(data: str, loader: str) -> Iterator[Subject]:
    from forebay.client import connect
    from forebay.testing.conformance.ours import ForebayEnvironment, our_adapters

    name = "conformance-of-loaders"
    with connect(data) as client:
        environment = ForebayEnvironment(client, name, num_samples=211)
        adapters = our_adapters(client, name)
        if loader not in adapters:
            raise SystemExit(f"no loader {loader!r}: there are {', '.join(adapters)}")
        with environment.fresh():
            yield Subject(adapters[loader], environment)
        client.delete_dataset(name, now=True)


if __name__ == "__main__":
    raise SystemExit(main())
