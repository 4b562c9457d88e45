"""Clients of the stores where origins lie: those of the object tier, for reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forebay_server.tier.file_systems import client_of, open_file_system
from forebay_server.tier.remote import ObjectClientName
from forebay_server.tier.s3_options import S3Options
from forebay_server.tier.store_client import StoreClient
from forebay_wire.errors import InvalidRequest


def make_client(prefix: str, client: ObjectClientName, options: Mapping[str, Any]) -> StoreClient:
    """A client of what lies below the URL *prefix*, not open yet. :class:`InvalidRequest`."""
    if prefix.startswith("s3://"):
        return _make_s3(prefix, client, options)
    try:
        files, root = open_file_system(prefix, options)
    except (ValueError, ImportError, TypeError) as error:
        raise InvalidRequest(
            f"origins below {prefix} cannot be read: {error}; use a URL that fsspec knows, and "
            "install what it needs"
        ) from error
    return client_of(files, root)


def _make_s3(prefix: str, client: ObjectClientName, options: Mapping[str, Any]) -> StoreClient:
    bucket, _, folder = prefix.removeprefix("s3://").partition("/")
    arguments = bucket, f"{folder}/" if folder else "", S3Options.of(options)
    try:
        # Only who uses S3 has to have these.
        if client == "obstore":
            from forebay_server.tier.s3_obstore import ObstoreClient

            return ObstoreClient(*arguments)
        from forebay_server.tier.s3 import S3Client

        return S3Client(*arguments)
    except ImportError as error:
        extra = "s3" if client == "s3fs" else "obstore"
        raise InvalidRequest(
            f"origins below {prefix} need a library that is missing ({error}): install "
            f"forebay[{extra}]"
        ) from error
