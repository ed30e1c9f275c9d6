"""Files that are either whole or not there."""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import TrainError


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, make it durable, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, durably; NaN and Inf are refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def name_beside(out: Path, suffix: str, *, what: str = "run") -> Path:
    """A sibling of `out`; raises TrainError where `out` has no name of its own, such as "."."""
    if out.name in ("", ".."):
        raise TrainError(
            f"{what} folder at {out}: expected a folder's name, got none. Pass one such as --out "
            f"{what}s/demo."
        )
    return out.with_name(f".{out.name}.{suffix}")
