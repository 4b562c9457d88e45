"""The newest figures as text for Prometheus, on a port of this machine alone."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any, Final, Self

from forebay_trainer.metrics import Event, MetricsConfig, scalars
from forebay_wire.errors import InvalidRequest

ADDRESS: Final = "127.0.0.1"

PREFIX: Final = "forebay_train"

COUNTED: Final = ("samples", "tokens", "step_seconds", "data_wait_seconds", "stall_seconds")
"""Of steps: added up since the attempt began, besides the newest value."""


class Prometheus:
    """Gauges ``forebay_train_EVENT_FIELD``, and counters ``forebay_train_FIELD_total``."""

    def __init__(self, registry: Any, server: Any, thread: Thread) -> None:
        self._registry = registry
        self._server = server
        self._thread = thread
        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}

    @classmethod
    def open(cls, config: MetricsConfig, folder: Path, attempt: int) -> Self:
        """InvalidRequest if the port is taken."""
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        try:
            server, thread = start_http_server(config.port, addr=ADDRESS, registry=registry)
        except OSError as error:
            raise InvalidRequest(
                f"metrics.port: nothing can listen on {ADDRESS}:{config.port} ({error.strerror}); "
                "give another port, or 0 for any free one"
            ) from error
        sink = cls(registry, server, thread)
        print(f"metrics for Prometheus: {sink.url}", flush=True)
        return sink

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self._server.server_port}/metrics"

    def write(self, event: Event) -> None:
        from prometheus_client import Counter, Gauge

        for name, value in {"step": event["step"], **scalars(event)}.items():
            key = name.replace("/", "_")
            if key not in self._gauges:
                meaning = f"{name.replace('_', ' ').replace('/', ': ')}, the newest"
                self._gauges[key] = Gauge(f"{PREFIX}_{key}", meaning, registry=self._registry)
            self._gauges[key].set(value)
        if event["event"] != "step":
            return
        for name in ("steps", *COUNTED):
            if name not in self._counters:
                meaning = f"{name.replace('_', ' ')} of this attempt"
                self._counters[name] = Counter(f"{PREFIX}_{name}", meaning, registry=self._registry)
            self._counters[name].inc(1 if name == "steps" else event[name])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
