"""An HDFS for tests: the one that the environment names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from forebay_server.tier.remote import RemoteTier

URL_VARIABLE: Final = "FOREBAY_TEST_HDFS_URL"
"""Like ``hdfs://namenode:8020/tmp/forebay``: tests make folders below it, and remove them."""


def missing_hdfs(environment: Mapping[str, str] = os.environ) -> str | None:
    """What is missing for :func:`hdfs_tier`, None if nothing is."""
    if URL_VARIABLE not in environment:
        return f"needs {URL_VARIABLE}, the URL of a folder in an HDFS"
    return None


def hdfs_tier(place: str, **arguments: Any) -> RemoteTier:
    """A tier, not open yet, in the folder *place*."""
    return RemoteTier("object", f"{os.environ[URL_VARIABLE]}/{place}", **arguments)
