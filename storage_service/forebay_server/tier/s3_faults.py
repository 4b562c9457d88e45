"""What the errors of S3 clients mean."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from forebay_server.tier.store_client import FaultKind, StoreFault

_BUSY: Final = frozenset(
    {
        "BadDigest",  # bytes changed on their way
        "ConditionalRequestConflict",
        "IncompleteBody",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
_DENIED: Final = frozenset(
    {
        "AccessDenied",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "Unauthorized",
    }
)


def fault_of(error: BaseException) -> StoreFault:
    """Our fault for what botocore, aiohttp or asyncio raised."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, ClientError):
        return _of_answer(error)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        return StoreFault("denied", text)
    if isinstance(error, ProfileNotFound | NoRegionError):
        return StoreFault("misconfigured", text)
    if isinstance(
        error,
        BotoConnectionError
        | HTTPClientError
        | aiohttp.ClientError
        | asyncio.TimeoutError
        | ConnectionError,
    ):
        return StoreFault("busy", text)
    if isinstance(error, BotoCoreError | ValueError):
        return StoreFault("misconfigured", text)
    return StoreFault("refused", text)


def _of_answer(error: ClientError) -> StoreFault:
    """What an answer of the store says."""
    told = error.response.get("Error", {})
    code = str(told.get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    message = told.get("Message") or "no reason given"
    text = f"{error.operation_name} was answered {status} {code}: {message}".rstrip(": ")
    return StoreFault(kind_of(code, status), text)


def kind_of(code: str, status: int) -> FaultKind:
    """What an HTTP *status* with S3's *code* ("" where there is no body) means."""
    if code == "NoSuchBucket":
        return "no place"
    if code == "NoSuchUpload":
        return "no upload"
    if status == 501:  # also how a store says that it knows no conditional writes
        return "misconfigured"
    if status >= 500 or status in (408, 409, 429) or code in _BUSY:
        return "busy"
    if code in _DENIED or status in (401, 403):
        return "denied"
    if status == 404:
        return "missing"
    if status == 412:
        return "taken"
    return "refused"
