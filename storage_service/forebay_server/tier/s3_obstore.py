"""S3 through obstore: its reads and its writes of small objects.

obstore cannot complete parts on a condition, nor list or abort what a dead writer left: large
objects go the way of :class:`S3Client`, whose credentials it shares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from forebay_server.tier.s3 import CALL_SECONDS, MARK, S3Client, run_on
from forebay_server.tier.s3_faults import kind_of
from forebay_server.tier.s3_options import CONNECT_SECONDS
from forebay_server.tier.store_client import FaultKind, ObjectInfo, StoreFault

T = TypeVar("T")

CREDENTIALS_LIVE: Final = timedelta(minutes=5)

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE: Final = re.compile(r"<Message>([^<]*)</Message>")


class ObstoreClient(S3Client):
    """Objects below ``s3://bucket/prefix``. Thread-safe."""

    _store: Any = None

    def open(self) -> None:
        super().open()
        if self._store is None:
            self._store = self._make_store()

    def close(self) -> None:
        self._store = None
        super().close()

    def refuses_damage(self, key: str) -> bool:
        return False  # obstore sends no checksum that we could have it get wrong

    def put(self, key: str, data: memoryview, mark: str) -> None:
        _translated(
            obstore.put,
            self._store,
            self._prefix + key,
            bytes(data),
            attributes={MARK: mark},
            mode="create" if self.is_exclusive else "overwrite",
            use_multipart=False,
        )

    def read_into(self, key: str, etag: str, offset: int, view: memoryview) -> int:
        options: Any = {"range": (offset, offset + view.nbytes)}
        if etag:
            options["if_match"] = etag
        received = 0

        def fetch() -> None:
            nonlocal received
            for chunk in obstore.get(self._store, self._prefix + key, options=options).stream():
                piece = memoryview(chunk)
                view[received : received + piece.nbytes] = piece
                received += piece.nbytes

        try:
            _translated(fetch)
        except StoreFault as fault:
            if "InvalidRange" in fault.text:
                return 0
            kind: FaultKind = "changed" if fault.kind == "taken" else fault.kind
            raise StoreFault(kind, fault.text, received) from None
        return received

    def head(self, key: str) -> ObjectInfo | None:
        try:
            found = _translated(obstore.head, self._store, self._prefix + key)
        except StoreFault as fault:
            if fault.kind in ("missing", "no place"):
                return None
            raise
        modified = found["last_modified"].timestamp()
        return ObjectInfo(key, found["size"], found["e_tag"] or "", modified)

    def delete(self, key: str) -> None:
        _translated(obstore.delete, self._store, self._prefix + key)

    def _make_store(self) -> Any:
        client = run_on(self._files.loop, self._files.set_session())
        endpoint, region = client.meta.endpoint_url, client.meta.region_name
        style = self._options.addressing_style
        is_amazon = "amazonaws.com" in endpoint
        is_virtual = style == "virtual" or (style == "auto" and is_amazon)
        client_options: Any = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "timeout": timedelta(seconds=CALL_SECONDS),
        }
        if self._options.ca_file is not None:
            client_options["root_certificate"] = Path(self._options.ca_file).read_bytes()
        return S3Store(
            self._bucket,
            region=region or "us-east-1",
            virtual_hosted_style_request=is_virtual,
            client_options=client_options,
            retry_config={"max_retries": 0},  # the tier tries again
            credential_provider=self._credentials,
            **({} if is_amazon else {"endpoint": endpoint}),
        )

    def _credentials(self) -> Any:
        """What the other client uses, refreshed by it; obstore asks again when they run out."""
        try:
            found = self._find_credentials()
        except StoreFault as fault:
            raise PermissionError(fault.text) from None
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_LIVE,
        }


def _translated(call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """What *call* answers; faults for obstore's errors."""
    try:
        return call(*arguments, **named)
    except (BaseError, FileNotFoundError) as error:
        raise _fault(str(error)) from None
    except PermissionError as error:
        raise StoreFault("denied", str(error)) from None


def _fault(text: str) -> StoreFault:
    """The fault in a message of obstore, which carries the store's whole answer."""
    first = " ".join(text.partition("\n\nDebug source")[0].partition("<?xml")[0].split())
    code = match[1] if (match := _CODE.search(text)) else ""
    reason = match[1] if (match := _MESSAGE.search(text)) else ""
    told = " ".join(part for part in (first.rstrip(": "), code, reason) if part)
    status = _STATUS.search(text)
    return StoreFault(kind_of(code, int(status[1])) if status else "busy", told)
