"""Does the cache keep what will be needed: with plans, without, against other policies?

The replay (``tiering_replay.py``) runs traces of blob names through the daemon's decisions and its
peers'; ``tiering_real.py`` runs the daemon with its object tier behind a throttled link,
``tiering_cold.py`` with a real S3 server, against its bare client. With
``--json FILE`` a plot is written beside it where matplotlib is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tiering_cold
import tiering_real
import tiering_replay
from harness import Report, parse_options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(__doc__ or "", argv)
    report = Report("Tiering: what is kept, and what that saves")
    tiering_replay.add_to(report, options)
    tiering_real.add_to(report, options)
    tiering_cold.add_to(report, options)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
