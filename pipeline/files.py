"""Files that are either whole or not there."""

import json
import os
from pathlib import Path
from typing import Any


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
