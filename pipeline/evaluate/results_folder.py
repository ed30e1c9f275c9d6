"""A folder of measurements: all of one evaluation, or not there."""

import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

Rows = Sequence[Mapping[str, Any]]


@contextmanager
def replace_results(out: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `out` when all is written to it.

    Where anything fails, `out` stays as it was. Raises PipelineError, before anything is measured,
    if `out` is neither measurements nor empty nor missing, or cannot be written.
    """
    _check_results(out)
    part, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("part", "old"))
    try:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise PipelineError(
            f"results at {out}: expected a place where a folder can be made, got {error.strerror}. "
            "Choose another --out."
        ) from None
    try:
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
    finally:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_tables(folder: Path, tables: Mapping[str, Rows]) -> None:
    """A CSV file each; a table without rows has none."""
    for name, rows in tables.items():
        if rows:
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def _check_results(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not _has_measurements(out):
        raise PipelineError(
            f"results at {out}: expected measurements, an empty folder or nothing, got something "
            "else. Choose another --out."
        )


def _has_measurements(folder: Path) -> bool:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(metrics, dict) and {"saes", "model", "hook"} <= metrics.keys()
