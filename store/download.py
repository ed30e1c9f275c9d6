"""Whole, verified files from a source that may fail, refuse or lie.

A library's exception may quote a URL with its signature, so nothing of its text is ever repeated:
messages have its class and HTTP status alone.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from store.errors import AccessDenied, ShardCorrupt, StoreError, StoreUnreachable
from store.manifest import FileRecord

T = TypeVar("T")

_MISSING = {"FileNotFoundError", "NotADirectoryError", "PathMissingError", "RevError"}
# Beside PermissionError, of which libraries make most refusals.
_DENIED = {
    "CredentialRetrievalError",
    "HostKeyNotVerifiable",
    "KeyImportError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "PermissionDenied",
    "ProfileNotFound",
    "SFTPPermissionDenied",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_DENIED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}  # S3's


class Retry(NamedTuple):
    """How often to try, and how long to wait in between: first_s, doubled each time up to cap_s."""

    attempts: int = 5
    first_s: float = 0.25
    cap_s: float = 8.0
    sleep: Callable[[float], None] = time.sleep


class Place(NamedTuple):
    """What messages say of a source."""

    file: str  # URL of the file, without credentials
    credentials: str  # how they are found there, as advice


class MissingFile(FileNotFoundError):
    """A source has no such file; other FileNotFoundErrors are about this machine's folders."""


def try_often(action: Callable[[], T], retry: Retry) -> T:
    """The action's result, where it fails transiently after some more attempts.

    Raises ShardCorrupt or StoreUnreachable where it stays so, and anything else at once.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except ShardCorrupt as error:
            failure: StoreError = ShardCorrupt(f"{error} It was so {attempt} times.")
        except StoreUnreachable as error:
            failure = error
        if attempt >= retry.attempts:
            raise failure from None
        retry.sleep(min(retry.first_s * 2 ** (attempt - 1), retry.cap_s))


@contextmanager
def source_errors(place: Place, attempts: int, partial: Path | None = None) -> Iterator[None]:
    """Turn what a library raises into MissingFile, AccessDenied or StoreUnreachable.

    Only for what talks to the source, of which `attempts` are made; what goes wrong with this
    machine's `partial`, or its full disk, stays what it is.
    """
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # any of four libraries', at the border to them
        if isinstance(error, OSError) and (
            error.errno in (errno.ENOSPC, errno.EDQUOT)
            or (partial is not None and str(error.filename) == str(partial))
        ):
            raise
        kind, found = classify(error), describe(error)
        if kind == "missing":
            raise MissingFile(errno.ENOENT, "No such file", place.file) from None
        if kind == "denied":
            raise AccessDenied(
                f"file at {place.file}: expected access, got {found}. {place.credentials}"
            ) from None
        raise StoreUnreachable(
            f"file at {place.file}: expected it within {attempts} attempts, got {found}. "
            "Check the network, then run the same command again: what has come is kept."
        ) from None


def classify(error: BaseException) -> Literal["missing", "denied", "transient"]:
    """What a library's exception means. A refusal is never taken for a missing file."""
    status = _find_status(error)
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        if (
            isinstance(cause, PermissionError)
            or type(cause).__name__ in _DENIED
            or code in _DENIED_CODES
        ):
            return "denied"
    if status in (401, 403, 407):
        return "denied"
    names = {name.__name__ for cause in _causes(error) for name in type(cause).__mro__}
    return "missing" if status in (404, 410) or names & _MISSING else "transient"


def describe(error: BaseException) -> str:
    """The exception's class and HTTP status, which hold no secret."""
    status = _find_status(error)
    return type(error).__name__ + (f" (HTTP {status})" if status else "")


def fill_verified(
    partial: Path, file: FileRecord, download: Callable[[Path], object], where: str
) -> None:
    """Download to `partial`, durably. Raises ShardCorrupt unless it is the recorded content."""
    download(partial)
    descriptor = os.open(partial, os.O_RDONLY)
    with open(descriptor, "rb") as opened:
        found = os.fstat(descriptor).st_size
        if found != file.bytes:
            raise ShardCorrupt(
                f"shard file at {where}: expected {file.bytes} bytes, got {found}. {_REPUBLISH}"
            )
        found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != file.sha256:
            raise ShardCorrupt(
                f"shard file at {where}: expected sha256 {file.sha256[:16]}, got {found[:16]}. "
                f"{_REPUBLISH}"
            )
        os.fsync(descriptor)


_REPUBLISH = "Who publishes it should run `pipeline store verify` and upload it again."


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and those that it was raised from; what else was going on tells nothing."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _find_status(error: BaseException) -> int | None:
    """The HTTP status that aiohttp or botocore gave."""
    for cause in _causes(error):
        if isinstance(status := getattr(cause, "status", None), int):
            return status
        if isinstance(response := getattr(cause, "response", None), dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None
