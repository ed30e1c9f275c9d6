"""The sources of Python's standard library, as the demo's text.

They are present wherever this package runs, so the demo needs no network and no copied text. A file
is named by its path relative to the library, and every split hashes that name, never the content: a
fifth of the files differ between two builds of one Python version, and an edited file must not
cross from one side of a split to the other.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

UNSEEN_FRACTION = (
    0.2  # of the library's files, kept from the embedded model so that the demo can cache them
)

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_LEFT_OUT_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
}  # encodings/: generated code tables


def list_library(root: Path | None = None) -> list[str]:
    """Names of the library's sources in sorted order; no tests, code tables or platform files."""
    return [name for name in _list_sources(root) if not _TEST_FOLDERS & set(Path(name).parts)]


def list_library_tests(root: Path | None = None) -> list[str]:
    """Names of the library's own test files, which only the embedded model's training reads."""
    return [name for name in _list_sources(root) if _TEST_FOLDERS & set(Path(name).parts)]


def read_library(names: list[str], root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each file that is UTF-8; a few test fixtures deliberately are not."""
    for name in names:
        try:
            yield name, (_library_root(root) / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def is_unseen(name: str) -> bool:
    """True for the files that the embedded model was not trained on."""
    return hash_fraction(name, salt="embedded-model") < UNSEEN_FRACTION


def hash_fraction(name: str, *, salt: str) -> float:
    """A uniform number in [0, 1) that depends on nothing but the name and the salt."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _list_sources(root: Path | None) -> list[str]:
    library = _library_root(root)
    names = (path.relative_to(library) for path in library.rglob("*.py"))
    return sorted(
        name.as_posix()
        for name in names
        if not _LEFT_OUT_FOLDERS & set(name.parts) and not name.name.startswith("_sysconfigdata")
    )


def _library_root(root: Path | None) -> Path:
    return root or Path(sysconfig.get_paths()["stdlib"])
