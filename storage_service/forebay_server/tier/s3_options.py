"""Where an S3 is and who asks: one set of options for both clients, defaults as AWS tools have."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from forebay_wire.errors import InvalidRequest

CONNECT_SECONDS = 5
READ_SECONDS = 30
"""Without a byte for so long a call is given up (and tried again)."""
MAX_CONNECTIONS = 32


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """What is not given comes from AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE and the files and services behind them."""

    endpoint_url: str | None = None
    region: str | None = None
    key: str | None = None
    secret: str | None = None
    token: str | None = None
    profile: str | None = None
    addressing_style: str = "auto"
    """``path``, ``virtual``, or ``auto``: path-style where an endpoint is given."""
    ca_file: str | None = None
    """PEM file of the authorities to trust instead of the system's."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> S3Options:
        """:class:`InvalidRequest` for one that is not known, with a suggestion."""
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                advice = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise InvalidRequest(f"unknown option {name!r} in object-options: {advice}")
            if not isinstance(value, str):
                raise InvalidRequest(f"option {name!r} in object-options has to be a text")
        if ("key" in given) != ("secret" in given):
            raise InvalidRequest("object-options: key and secret belong together")
        if given.get("addressing_style", "auto") not in ("auto", "path", "virtual"):
            raise InvalidRequest("object-options: addressing_style is auto, path or virtual")
        return cls(**given)

    def for_s3fs(self) -> dict[str, Any]:
        """Arguments of ``s3fs.S3FileSystem``."""
        client: dict[str, Any] = {}
        if self.region is not None:
            client["region_name"] = self.region
        if self.ca_file is not None:
            client["verify"] = self.ca_file
        arguments: dict[str, Any] = {
            "client_kwargs": client,
            "config_kwargs": {
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "max_pool_connections": MAX_CONNECTIONS,
                "signature_version": "s3v4",  # also of addresses that are signed
                "parameter_validation": False,  # bodies here are neither bytes nor files
                "request_checksum_calculation": "when_required",  # ours are computed already
                "response_checksum_validation": "when_required",  # segments have digests
                "retries": {"total_max_attempts": 1, "mode": "standard"},  # the tier tries again
                # The checksum of each body is in a header, and headers are signed.
                "s3": {
                    "addressing_style": self.addressing_style,
                    "payload_signing_enabled": False,
                },
            },
        }
        for name in ("endpoint_url", "key", "secret", "token"):
            if (value := getattr(self, name)) is not None:
                arguments[name] = value
        return arguments
