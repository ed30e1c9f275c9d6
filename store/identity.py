"""A store's identity: the settings and inputs that decide its bytes, as JSON."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from store.errors import StoreMismatch

_ABSENT = object()  # in the place of a field that is not there


class Difference(NamedTuple):
    """A field in which two identities differ."""

    field: str  # nested ones by dotted names
    ours: Any  # None where it is not there
    theirs: Any


def fingerprint_of(identity: dict[str, Any]) -> str:
    """sha256, in hex, of the identity as canonical JSON: sorted keys, no spaces, ASCII, no NaN."""
    return hashlib.sha256(_canonical(identity)).hexdigest()


def list_differences(ours: Any, theirs: Any) -> list[Difference]:
    """Every field in which two identities differ."""
    return [
        Difference(field, *(None if value is _ABSENT else value for value in pair))
        for field, *pair in _compare(ours, theirs)
    ]


def diff_identities(expected: Any, found: Any) -> list[str]:
    """One line for every field in which two identities differ; nested ones by dotted names."""

    def show(value: Any) -> str:
        return "nothing" if value is _ABSENT else repr(value)

    return [
        f"{field}: expected {show(ours)}, got {show(theirs)}"
        for field, ours, theirs in _compare(expected, found)
    ]


def check_identity(
    expected: dict[str, Any], found: dict[str, Any], where: str | Path, advice: str
) -> None:
    """Raise StoreMismatch with the field-by-field difference, followed by the next step to take."""
    if lines := diff_identities(expected, found):
        raise StoreMismatch(
            f"store at {where} is not the one asked for: {'; '.join(lines)}. {advice}"
        )


def _compare(ours: Any, theirs: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields that differ, and what each side has there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() | theirs.keys()):
            nested = f"{key}.{name}" if key else name
            yield from _compare(ours.get(name, _ABSENT), theirs.get(name, _ABSENT), nested)
    elif ours is _ABSENT or theirs is _ABSENT or _canonical(ours) != _canonical(theirs):
        yield key or "identity", ours, theirs


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
