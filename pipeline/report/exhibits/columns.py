"""What the page reads of each table, so that a damaged cell is an error and never a dash."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import PipelineError
from pipeline.report.exhibits.exhibit import Rows, Tables


class Columns(NamedTuple):
    """The columns that a table must have."""

    words: tuple[str, ...]  # with something in every row
    figures: tuple[str, ...]  # with a finite number in every row
    may_lack: tuple[str, ...] = ()  # with such a number, or empty where evaluation had too little


def _ends(*figures: str) -> tuple[str, ...]:
    """The columns of their intervals, of which there are none of few units."""
    return tuple(f"{figure}_{end}" for figure in figures for end in ("low", "high"))


def _with_ends(*figures: str) -> tuple[str, ...]:
    return (*figures, *_ends(*figures))


_PATCHED = ("loss_added", "nmse", "kl")  # with intervals
_PATCHED_MAY_LACK = (*_ends(*_PATCHED), "nmse")  # a row of zeros has none
_FAITHFULNESS = ("loss_added", "kl", "ce_recovered_mean", "ce_recovered_zero")
_SENSITIVITY = ("mean", "gradient_norm", "ratio_to_isotropic", "ratio_to_covariance")
_STEERED = (
    *("alpha", "alpha_absolute", "n_latents"),
    *("n_sequences", "context", "n_positions", "n_tokens"),
)
_RHO = ("rho_gradient", "rho_norm", "rho_difference", "rho_steepness")

COLUMNS: Mapping[str, Columns] = {
    "claims": Columns(
        ("id", "statement", "comparison", "measure", "sees_label", "verdict"),
        (),
        ("value", "low", "high", "n_seeds", "seeds_low", "seeds_high"),
    ),
    "saes": Columns(
        ("sae", "architecture", "mode"), ("k", "beta", "d_sae", *_FAITHFULNESS), _PATCHED_MAY_LACK
    ),
    "controls": Columns(
        ("control", "kind", "mode", "sees_label"), ("k", *_FAITHFULNESS), _PATCHED_MAY_LACK
    ),
    "fronts": Columns(
        ("panel", "sae", "architecture", "mode", "on_front"),
        ("fixed_value", "beta", "x", "y"),
        _ends("y"),
    ),
    "dead": Columns(
        ("sae", "mode"),
        ("k", "dead_held_out"),
        # The paper's count is of 20,480 rows.
        (*_with_ends("dead_paper"), *_ends("dead_held_out")),
    ),
    "firing": Columns(("sae", "mode"), ("fraction_of_latents", "firing_frequency")),
    "density_medians": Columns(
        ("sae", "mode"),
        ("k", "live", "median_all"),
        (*_with_ends("median_live"), *_ends("median_all")),  # of live latents, if any
    ),
    "sensitivity": Columns(
        ("direction",), ("layer", "n_rows", "n_blocks", *_SENSITIVITY), _ends(*_SENSITIVITY)
    ),
    "perturbation": Columns(
        ("site",),
        ("layer", "size", "norm", "n", "context", "change"),
        # A single sequence has no rank correlation, and equal effects have none and no spread.
        (*_with_ends(*_RHO), "spread"),
    ),
    "steering": Columns(
        ("sae",),
        (*_STEERED, "associated", "others_absolute"),
        _ends("associated", "others_absolute"),
    ),
    "steering_latents": Columns(("sae",), ("alpha", "associated", "others_absolute")),
    "splitting": Columns(("sae",), ("bin_low", "bin_high", "fraction")),
    "splitting_summary": Columns(
        ("sae",),
        ("d_sae", "live"),
        # Of fewer than two live latents there is no cosine, of fewer than three no gradient.
        ("cosine_q05", "cosine_median", "cosine_q95", *_with_ends("ratio", "ratio_active")),
    ),
    "splitting_gradients": Columns(
        ("sae", "group"),
        ("n", "blocks", "rows", "loss_tokens", "gradient"),
        # A latent may fire on none of the few blocks that are looked at.
        (*_ends("gradient"), *_with_ends("gradient_active")),
    ),
}
_DECIDED = Columns(("verdict",), ("value", "low", "high"))  # of a claim by its interval


def check_tables(tables: Tables, where: Path | str | None = None) -> None:
    """Raise PipelineError for the first cell that evaluation does not write so.

    It names the table, which lies in `where`, its column and its row, the first being 1. Tables
    that COLUMNS does not have are not looked at.
    """
    for name, columns in COLUMNS.items():
        rows = tables.get(name) or ()
        fault = next(_list_faults(enumerate(rows, 1), columns), None)
        if name == "claims" and not fault:
            fault = next(_list_faults(_list_decided(rows), _DECIDED), None)
        if fault:
            place = Path(where or "") / f"{name}.csv"
            raise PipelineError(f"table at {place}: {fault}. Run `pipeline evaluate`.")


def _list_decided(rows: Rows) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for i, row in enumerate(rows, 1):
        if row["verdict"] in ("holds", "does not hold"):
            yield i, row


def _list_faults(rows: Iterable[tuple[int, Mapping[str, Any]]], columns: Columns) -> Iterator[str]:
    """What is expected and what is there, from numbered rows."""
    for i, row in rows:
        for column in (*columns.words, *columns.figures, *columns.may_lack):
            value = row.get(column)
            if column not in row:
                yield f"expected a column {column}, got none"
            elif value is None and column not in columns.may_lack:
                wanted = "something" if column in columns.words else "a finite number"
                yield f"expected {wanted} in column {column}, got none in row {i}"
            elif value is not None and column not in columns.words and not _is_finite(value):
                yield f"expected a finite number in column {column}, got {value!r} in row {i}"


def _is_finite(value: Any) -> bool:
    """Whether a cell is a finite number; one cell of text makes text of its whole column."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
