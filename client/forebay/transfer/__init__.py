"""Bytes between this process and a daemon: local by descriptors, elsewhere by HTTP ranges."""

from __future__ import annotations

from forebay.transfer.blob import Blob, Transfer, UploadSlot
from forebay.transfer.endpoint import current_endpoint, local_path_is_on, make_transfer

__all__ = [
    "Blob",
    "Transfer",
    "UploadSlot",
    "current_endpoint",
    "local_path_is_on",
    "make_transfer",
]
