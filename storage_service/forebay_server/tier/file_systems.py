"""Which file system of fsspec a URL names, opened as the tiers need it, and who speaks with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec

from forebay_server.tier.fsspec_client import FsspecClient
from forebay_server.tier.hdfs import SCHEMES as HDFS_SCHEMES
from forebay_server.tier.hdfs import HdfsClient, hdfs_options, is_hdfs


def open_file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of *url* and the path there; raises whatever the file system does.

    An own instance without a listing cache: others' caches must not answer for us.
    """
    given = dict(options)
    if url.startswith(HDFS_SCHEMES):  # which has no such cache, and takes Hadoop's settings only
        given = dict(hdfs_options(options))
    else:
        given.setdefault("use_listings_cache", False)
    files, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **given)
    return files, str(root)


def client_of(files: Any, root: str) -> FsspecClient:
    """A client of what lies below *root*, not open yet."""
    return HdfsClient(files, root) if is_hdfs(files) else FsspecClient(files, root)
