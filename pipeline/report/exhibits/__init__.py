"""The paper's figures and tables, measured here: one module each, from the CSV files of evaluation.

Pure functions from tables to what the page shows; only `read_tables` reads files.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv

from pipeline.errors import PipelineError
from pipeline.report.exhibits.controls import show_controls
from pipeline.report.exhibits.dead import show_dead
from pipeline.report.exhibits.density import show_density
from pipeline.report.exhibits.exhibit import Exhibit, Rows, Tables
from pipeline.report.exhibits.fronts import show_fronts
from pipeline.report.exhibits.perturbation import show_perturbation
from pipeline.report.exhibits.scaling import show_scaling
from pipeline.report.exhibits.sensitivity import show_sensitivity
from pipeline.report.exhibits.splitting import show_splitting
from pipeline.report.exhibits.steering import show_steering

Show = Callable[[Tables, Mapping[str, str]], Exhibit | None]

EXHIBITS: tuple[Show, ...] = (
    show_sensitivity,
    show_perturbation,
    show_fronts,
    show_dead,
    show_steering,
    show_density,
    show_splitting,
    show_scaling,
    show_controls,
)


def show_exhibits(tables: Tables, styles: Mapping[str, str]) -> list[Exhibit]:
    """What was measured, in the paper's order; `styles` are the SAEs' CSS classes by name."""
    shown = (show(tables, styles) for show in EXHIBITS)
    return [exhibit for exhibit in shown if exhibit is not None]


def read_tables(results_folder: Path) -> Tables:
    """Every CSV file of a results folder, by its name without suffix; see `read_table`."""
    return {path.stem: read_table(path) for path in sorted(results_folder.glob("*.csv"))}


def read_table(path: Path) -> Rows:
    """Rows with typed values: int, float, bool or str as the whole column has it.

    None stands for an empty cell and for a number that is not finite. Raises PipelineError if the
    file is no table.
    """
    whole = csv.ReadOptions(block_size=path.stat().st_size + 1)  # types are inferred from a block
    try:
        table = csv.read_csv(
            path,
            read_options=whole,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(null_values=[""], strings_can_be_null=True),
        )
        if any(pa.types.is_binary(kind) for kind in table.schema.types):
            raise pa.ArrowInvalid("text that is not UTF-8")
    except (OSError, pa.ArrowException) as error:
        raise PipelineError(
            f"table at {path}: expected the CSV file that `pipeline evaluate` writes, got {error}. "
            "Run `pipeline evaluate`."
        ) from None
    return [{key: _clean(value) for key, value in row.items()} for row in table.to_pylist()]


def _clean(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
