"""The report's tables: what each column reads, how it is printed, and which value is best.

Pure functions from the results of the other stages to text; missing and non-finite values are
shown as a dash.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from pipeline.paths import format_number
from pipeline.report.figures import as_number

Format = Callable[[float], str]
OWN_N = ""  # stands for an SAE's own loss_tokens in a column's keys
Better = Literal["low", "high"]


class Column(NamedTuple):
    """One column of figures."""

    group: str  # heading over neighbouring columns
    name: str
    keys: tuple[str, ...]  # where the value stands in an SAE's metrics
    format: Format
    better: Better | None  # None: neither is better
    meaning: str  # id of its explanation on the page


class Cell(NamedTuple):
    text: str
    best: bool


class Row(NamedTuple):
    """One SAE of a table."""

    name: str
    style: str  # CSS classes of its colour and dash
    k: str
    beta: str
    starts_k: bool  # the first row of another k or d_sae
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    groups: tuple[tuple[str, int], ...]  # heading and number of columns under it
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def format_ratio(value: float) -> str:
    """Four decimals: 0.1234."""
    return minus(f"{value:.4f}")


def format_percent(value: float) -> str:
    """A fraction as a percentage with two decimals, or none from 1000% on."""
    return minus(f"{100 * value:,.{0 if abs(value) >= 10 else 2}f}%")


def format_share(value: float) -> str:
    """A fraction between 0 and 1 as a percentage with one decimal."""
    return minus(f"{100 * value:.1f}%")


def format_one(value: float) -> str:
    """One decimal: 31.9."""
    return minus(f"{value:,.1f}")


def format_short(value: float) -> str:
    """Three significant digits: 0.0213, 12.4, 3.10e-7."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        decimals = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return minus(f"{value:,.{decimals}f}")
    mantissa, exponent = f"{value:.2e}".split("e")
    return minus(f"{mantissa}e{int(exponent)}")


def format_count(value: int | float) -> str:
    """A whole number with separators: 1,234,567."""
    return minus(f"{value:,.0f}")


def format_bytes(value: int | float) -> str:
    """A size in powers of 1000: 1.2 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} bytes"


def minus(text: str) -> str:
    """The text with a true minus sign before its number."""
    return text.replace("-", "−", 1) if text.startswith("-") else text


def show(value: Any, form: Format) -> str:
    """A value in a format; a dash for what is missing or not finite."""
    number = as_number(value)
    return "–" if number is None else form(number)


def _both(
    group: str, key: str, form: Format, better: Better | None, meaning: str
) -> tuple[Column, ...]:
    return tuple(
        Column(group, name, (mode, key), form, better, meaning)
        for name, mode in (("with ∇", "with_gradient"), ("without", "without_gradient"))
    )


def _activity(groups: tuple[str, ...], names: tuple[str, ...], mode: str) -> Iterator[Column]:
    for group, name, key, form, better, meaning in zip(
        groups,
        names,
        ("l0", "dead_fraction", "dead_fraction_held_out"),
        (format_one, format_share, format_share),
        (None, "low", "low"),
        ("l0", "dead", "dead"),
        strict=True,
    ):
        yield Column(group, name, (mode, key), form, better, meaning)


HEADLINE = (
    *_both("NMSE", "nmse", format_ratio, "low", "nmse"),
    *_both("Loss added", "loss_added", format_percent, "low", "loss-added"),
    *_both("CE recovered, zero", "ce_recovered_zero", format_percent, "high", "ce-recovered"),
    *_both("CE recovered, mean", "ce_recovered_mean", format_percent, "high", "ce-recovered"),
    *_activity(("", "Dead", "Dead"), ("L0", "paper", "held-out"), "with_gradient"),
    Column("Selection", "overlap", ("selection_overlap",), format_share, None, "overlap"),
    Column("Selection", "β|a|/N", ("gradient_weight", OWN_N), format_short, None, "weight"),
)
MORE = (
    *_both(
        "Loss added, all positions",
        "loss_added_all_positions",
        format_percent,
        "low",
        "all-positions",
    ),
    *_both("Loss, patched", "loss", format_ratio, "low", "loss-added"),
    *_both("KL", "kl", format_ratio, "low", "kl"),
    *_both("NMSE, squared", "nmse_squared", format_ratio, "low", "nmse-squared"),
    *_activity(("Without ∇",) * 3, ("L0", "dead, paper", "dead, held-out"), "without_gradient"),
)
CONTROLS = (
    *_both("NMSE", "nmse", format_ratio, None, "nmse"),
    *_both("Loss added", "loss_added", format_percent, None, "loss-added"),
    *_both("CE recovered, zero", "ce_recovered_zero", format_percent, None, "ce-recovered"),
    *_both("CE recovered, mean", "ce_recovered_mean", format_percent, None, "ce-recovered"),
)
MODEL = (  # key in metrics["model"], label, unit, format
    ("loss", "Model’s own loss", "nats per token", format_ratio),
    ("loss_mean_ablation", "Mean ablation", "nats per token", format_ratio),
    ("loss_zero_ablation", "Zero ablation", "nats per token", format_ratio),
    ("bits_per_byte", "Bits per byte", "of held-out text", format_ratio),
    ("tokens", "Held-out tokens", "evaluated", format_count),
)
_SCALES = (  # key in an SAE's metrics, heading, format, meaning
    ("gradient_weight", "β|a|/N, by N", format_short, "weight"),
    ("selection_overlap_at", "Overlap, by N", format_share, "overlap"),
    ("latent_gradient", "|a|/N, by N", format_short, "weight"),
)


def scale_columns(saes: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """A column for each loss_tokens N at which beta's scale was measured."""
    return tuple(
        Column(group, f"N = {n}", (key, n), form, None, meaning)
        for key, group, form, meaning in _SCALES
        for n in sorted({n for sae in saes for n in sae.get(key) or {}}, key=int)
    )


def build_table(
    saes: Mapping[str, Mapping[str, Any]], columns: Sequence[Column], styles: Mapping[str, str]
) -> Table:
    """One row per SAE; the best value among SAEs of equal k and d_sae is marked, ties as printed
    with it.
    """
    sizes = [_size(sae) for sae in saes.values()]
    marks = [_find_best(column, saes) for column in columns]
    rows = tuple(
        Row(
            name=name,
            style=styles[name],
            k=show(sae.get("k"), format_count),
            beta=show(_beta(sae), format_number),
            starts_k=i > 0 and sizes[i] != sizes[i - 1],
            cells=tuple(
                Cell(show(_read(sae, column.keys), column.format), name in best)
                for column, best in zip(columns, marks, strict=True)
            ),
        )
        for i, (name, sae) in enumerate(saes.items())
    )
    groups = groupby(column.group for column in columns)
    widths = tuple((group, len(list(members))) for group, members in groups)
    return Table(widths, tuple(columns), rows)


def _beta(sae: Mapping[str, Any]) -> Any:
    """None where the architecture selects nothing, so that there is no overlap."""
    return None if sae.get("selection_overlap", 1) is None else sae.get("beta")


def _size(sae: Mapping[str, Any]) -> tuple[Any, Any]:
    return sae.get("k"), sae.get("d_sae")


def _find_best(column: Column, saes: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The SAEs that print the best value among those of equal size, unless all of them print it."""
    best: set[str] = set()
    if column.better is None:
        return best
    for size in {_size(sae) for sae in saes.values()}:
        read = ((n, as_number(_read(s, column.keys))) for n, s in saes.items() if _size(s) == size)
        values = {name: value for name, value in read if value is not None}
        if not values:
            continue
        top = column.format((min if column.better == "low" else max)(values.values()))
        winners = {name for name, value in values.items() if column.format(value) == top}
        best |= winners if len(winners) < len(values) else set()
    return best


def _read(sae: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = sae
    for key in keys:
        key = str(sae.get("loss_tokens")) if key == OWN_N else key
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def describe_model(model: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and unit of what was measured of the model itself."""
    return [
        (label, show(model[key], form), unit) for key, label, unit, form in MODEL if key in model
    ]
