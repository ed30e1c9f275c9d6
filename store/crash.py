"""Named points at which a test kills the process as a power cut would, to see what it leaves.

STORE_CRASH_POINT=before-rename:commit   die by SIGKILL at this point
STORE_CRASH_SKIP=3                       after passing it three times in this process
STORE_CRASH_TOKEN=/tmp/token             and only if this process removes that file: one death,
                                         whichever of several processes comes first
"""

import os
import signal
from collections import Counter

_FILES = ("array", "commit", "manifest", "provenance", "zarr.json", "file")
_RENAMED = ("link", "pulled", "cached")  # made elsewhere: put_link, pull, shard cache
_STEPS = ("before-write", "after-write", "before-rename", "after-rename")

CRASH_POINTS = (
    *(f"{step}:{kind}" for kind in _FILES for step in _STEPS),  # of write_durably
    *(f"{step}:{kind}" for kind in _RENAMED for step in _STEPS[2:]),
    "before-forget",  # of a commit record
    "after-forget",
    "before-commit",  # a shard's files are there, its commit record is not
    "after-commit",
    "before-publish",
    "before-link",
    "between-links",  # passed after every file
    "after-link",
    "between-renames",  # the old store is aside, the new one not yet in its place
    "after-publish",
    "before-delete",  # of the old store
    "after-delete",
)

_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here if the environment says so."""
    if os.environ.get("STORE_CRASH_POINT") != name:
        return
    _passed[name] += 1
    if _passed[name] <= int(os.environ.get("STORE_CRASH_SKIP", "0")):
        return
    if token := os.environ.get("STORE_CRASH_TOKEN"):
        try:
            os.unlink(token)
        except FileNotFoundError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
