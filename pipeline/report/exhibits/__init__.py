"""The paper's figures and tables, measured here: one module each, from the CSV files of evaluation.

Pure functions from tables to what the page shows; only `read_tables` reads files.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

# What a wrong column or value makes of code that expects the right one.
_DAMAGE = (
    *(TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, StopIteration),
)
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


def show_exhibits(
    tables: Tables, styles: Mapping[str, str], folder: Path | None = None
) -> list[Exhibit]:
    """What was measured, in the paper's order; `styles` are the SAEs' CSS classes by name.

    Raises PipelineError, naming the tables' `folder`, where a table cannot be shown.
    """
    shown = []
    for show in EXHIBITS:
        with refuse_damage(show.__name__.removeprefix("show_"), folder):
            shown.append(show(tables, styles))
    return [exhibit for exhibit in shown if exhibit is not None]


@contextmanager
def refuse_damage(what: str, where: Path | str | None) -> Iterator[None]:
    """Raise PipelineError for what a damaged table makes fail; its cause is the failure."""
    try:
        yield
    except _DAMAGE as error:
        raise PipelineError(
            f"measurements at {where or 'the results'}: expected what `pipeline evaluate` writes, "
            f"got something else for {what} ({_tell(error)}). Run `pipeline evaluate`."
        ) from error


def _tell(error: Exception) -> str:
    """What failed, on one line."""
    return ": ".join(filter(None, [type(error).__name__, str(error).partition("\n")[0]]))


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
