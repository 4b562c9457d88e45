"""A real daemon whose object tier answers late, or sends slowly.

``python -m forebay_server.testing.slow_objects LATENCY_SECONDS BYTES_PER_SECOND serve ...``
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from forebay_server import cli, daemon
from forebay_server.node_tiers import open_tiers
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.tier.registry import Tiers
from forebay_server.tier.wrap import ThrottledTier


class SlowObjects(DaemonProcess):
    """A :class:`DaemonProcess`; each call on its object tier takes *latency_seconds* more, and its
    bytes move at *bytes_per_second*."""

    def __init__(
        self, data: Path, latency_seconds: float, bytes_per_second: float, *arguments: str
    ) -> None:
        super().__init__(data, *arguments)
        self._speed = (str(latency_seconds), str(bytes_per_second))

    def start(self, *, environment: Mapping[str, str] | None = None) -> Self:
        module = "forebay_server.testing.slow_objects"
        command = [sys.executable, "-m", module, *self._speed, "serve", "--data", str(self.data)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )
        return self


def main() -> int:
    """Serve, with the object tier behind the wrapper."""
    latency, rate, *arguments = sys.argv[1:]

    def open_slow(*given: Any) -> Tiers:
        tiers = open_tiers(*given)
        slow = [
            ThrottledTier(one, float(latency), float(rate)) if one.kind == "object" else one
            for one in tiers.all
        ]
        return Tiers(slow, tiers.slots)

    vars(daemon)["open_tiers"] = open_slow
    sys.argv = ["forebay_server", *arguments]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
