"""A folder of measurements: all of one evaluation, or not there."""

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError
from pipeline.files import name_beside, write_json

Rows = Sequence[Mapping[str, Any]]


@contextmanager
def replace_results(out: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `out` when all is written to it.

    Where anything fails, `out` stays as it was; where a run died between the two renames, earlier
    measurements are put back first. Of a link the target is replaced. Raises PipelineError, before
    anything is measured, if `out` is neither measurements nor empty nor missing, has no name of its
    own, such as ".", or cannot be written; afterwards, if it cannot be replaced.
    """
    out = out.resolve() if out.is_symlink() else out
    part, old = (name_beside(out, suffix, what="result") for suffix in ("part", "old"))
    try:
        _put_back(old, out)
        _check_results(out)
        _discard(part, old)
        part.mkdir(parents=True)
    except OSError as error:
        raise PipelineError(
            f"results at {out}: expected a place where a folder can be made, got {error.strerror}. "
            "Choose another --out."
        ) from None
    try:
        yield part
        _replace(out, part, old)
    finally:
        _put_back(old, out)
        _discard(part, old)


def write_results(
    folder: Path, metrics: Mapping[str, Any], blocks: Rows, tables: Mapping[str, Rows]
) -> None:
    """All files of one evaluation; raises PipelineError if they cannot be written, as on a full
    disk.
    """
    try:
        write_json(folder / "metrics.json", metrics)
        pq.write_table(pa.Table.from_pylist(list(blocks)), folder / "blocks.parquet")
        write_tables(folder, tables)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise PipelineError(
            f"results in {folder.parent}: expected room for the measurements, got {reason}. Make "
            "some and run `pipeline evaluate` again; earlier measurements are as they were."
        ) from None


def write_tables(folder: Path, tables: Mapping[str, Rows]) -> None:
    """A CSV file each; a table without rows has none."""
    for name, rows in tables.items():
        if rows:
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def _put_back(old: Path, out: Path) -> None:
    """Earlier measurements whose place the new ones did not take."""
    if _is_free(out) and _has_measurements(old):
        old.rename(out)


def _replace(out: Path, part: Path, old: Path) -> None:
    try:
        if _has_measurements(out):
            out.rename(old)
        part.rename(out)
    except OSError as error:
        raise PipelineError(
            f"results at {out}: expected a folder that the new measurements can replace, got "
            f"{error.strerror}. Run `pipeline evaluate` again with another --out."
        ) from None


def _discard(*folders: Path) -> None:
    """Remove folders, their metrics first: a part that a killed run leaves is no measurements."""
    for folder in folders:
        with suppress(OSError):
            (folder / "metrics.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _check_results(out: Path) -> None:
    if not _is_free(out) and not _has_measurements(out):
        raise PipelineError(
            f"results at {out}: expected measurements, an empty folder or nothing, got something "
            "else. Choose another --out."
        )


def _is_free(out: Path) -> bool:
    """Missing, or an empty folder, whose place a rename takes."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def _has_measurements(folder: Path) -> bool:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(metrics, dict) and {"saes", "model", "hook"} <= metrics.keys()
