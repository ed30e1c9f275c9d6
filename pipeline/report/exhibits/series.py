"""Names of kinds of SAEs and of modes in the exhibits, and figures with their intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.paths import format_number
from pipeline.report.axes import as_number
from pipeline.report.charts import Key
from pipeline.report.exhibits.exhibit import Rows
from pipeline.report.figures import N_STYLES, Line
from pipeline.report.tables import Format, show

MODES = {"with_gradient": "with ∇", "without_gradient": "without ∇"}

_SHAPES = ("dot", "square", "diamond", "triangle")
_OWN_GRADIENT = (None, "full", "cached")  # the usual one, which needs no word


def name_kind(row: Mapping[str, Any]) -> str:
    """What an SAE is but for its sizes and seed: "topk, β = 3e4, shuffled ∇"."""
    parts = [str(row.get("architecture", "SAE")).replace("_", " ")]
    if row.get("beta"):
        parts.append(f"β = {format_number(row['beta'])}")
    if row.get("gradient") not in _OWN_GRADIENT:
        parts.append(f"{row['gradient']} ∇")
    return ", ".join(parts)


def mark_kind(index: int, mode: str) -> tuple[str, str]:
    """Style and marker of the index-th kind: filled with the gradient at inference, dashed and an
    outline without it.
    """
    shape = _SHAPES[index % len(_SHAPES)]
    if mode == "with_gradient":
        return f"c{index % N_STYLES} d0", shape
    return f"c{index % N_STYLES} d1", "ring" if shape == "dot" else f"open-{shape}"


def name_apart(keys: Sequence[tuple[Any, ...]], words: Sequence[str]) -> list[str]:
    """Each key's first part, a name, and those of the others that are not equal in all keys.

    `words` says what the others are: "seed {}".
    """
    varies = [len(set(column)) > 1 for column in zip(*keys, strict=True)][1:]
    return [
        ", ".join(
            [name, *(w.format(part) for w, part, v in zip(words, rest, varies, strict=True) if v)]
        )
        for name, *rest in keys
    ]


def format_interval(row: Mapping[str, Any], key: str, form: Format) -> str:
    """A figure with its interval: "0.24% (0.20% to 0.28%)"."""
    value, low, high = (show(row.get(name), form) for name in (key, f"{key}_low", f"{key}_high"))
    return value if "–" in (low, high) else f"{value} ({low} to {high})"


def index_rows(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Rows by the values of these columns."""
    return {tuple(row.get(key) for key in keys): row for row in rows}


def list_names(rows: Rows) -> list[str]:
    """SAEs in the order in which the rows name them, each once."""
    return list(dict.fromkeys(row["sae"] for row in rows))


def group_rows(
    rows: Rows, key: Callable[[Mapping[str, Any]], Any]
) -> dict[Any, list[Mapping[str, Any]]]:
    """Rows of each key, both in the order in which they come."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def list_keys(lines: Iterable[Line]) -> tuple[Key, ...]:
    """The chart's key: an entry for each line."""
    return tuple(Key(line.label, line.style, line.marker, line.joined) for line in lines)


def list_band(rows: Rows, x: str, y: str) -> list[tuple[float, float, float]]:
    """(x, low, high) of each row whose interval is known."""
    band = []
    for row in rows:
        place, low, high = (as_number(row.get(key)) for key in (x, f"{y}_low", f"{y}_high"))
        if place is not None and low is not None and high is not None:
            band.append((place, low, high))
    return band
