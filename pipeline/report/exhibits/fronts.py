"""Pareto fronts (Fig. 4)."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.report.axes import plan_positive
from pipeline.report.charts import Chart
from pipeline.report.exhibits.exhibit import Exhibit, Rows, Tables
from pipeline.report.exhibits.series import (
    MODES,
    group_rows,
    list_band,
    list_keys,
    mark_kind,
    name_kind,
)
from pipeline.report.figures import Estimate, Line, draw_estimates, draw_lines
from pipeline.report.tables import Format, format_count, format_percent, format_ratio, format_short


class Words(NamedTuple):
    """What a panel shows."""

    title: str
    x: str
    y: str
    fixed: str
    x_format: Format
    y_format: Format


PANELS = {
    "latents_loss": Words(
        "Loss added",
        "latents",
        "of the model’s own loss",
        "k = {}",
        format_count,
        format_percent,
    ),
    "l0_nmse": Words("NMSE", "L0", "mean ‖x − x̂‖ / ‖x‖", "{} latents", format_short, format_ratio),
    "l0_loss": Words(
        "Loss added",
        "L0",
        "of the model’s own loss",
        "{} latents",
        format_short,
        format_percent,
    ),
}
_NEEDS_GRID = (
    " Some panels have one value of {} alone, so they show values and no front: the profile "
    "paper-demo trains a grid."
)


def show_fronts(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:
    """A panel each of loss added and NMSE over L0 or latents; None without SAEs."""
    del styles  # a series is a kind of SAE, not one SAE
    # Without beta the modes are one.
    rows = [r for r in tables.get("fronts") or () if r["mode"] == "with_gradient" or r["beta"]]
    if not rows:
        return None
    panels = group_rows(rows, lambda row: (row["panel"], row["fixed_value"]))
    single = {PANELS[panel].x for (panel, _), group in panels.items() if _is_single(group)}
    return Exhibit(
        id="fronts",
        title="Pareto fronts",
        source="Fig. 4",
        reading=(
            "Lower and further to the left is better: every mark is an SAE, and a line joins those "
            "of a kind that none of their kind beats on both axes. A kind whose line lies below "
            "another’s loses less for the same number of latents or the same L0."
        ),
        protocol=(
            "L0 is as measured on held-out rows; a kind is an architecture with its β and its "
            "gradient, over all seeds. Tints and bars are 95% intervals over blocks."
            + (_NEEDS_GRID.format(" and ".join(sorted(single))) if single else "")
        ),
        label_seen="Series with ∇ see the label (filled marks); series without ∇ and TopK do not.",
        paper=(
            "The paper’s fronts, of GPT-2 small at layer 7 (L0 = 32 on the left, 15,360 latents on "
            "the right), are drawn without numbers; its claim is that a g-SAE’s loss added lies "
            "below TopK’s all along, with the gradient at inference."
        ),
        charts=tuple(_charts(panels)),
        figures=(),
        data=("fronts",),
    )


def _charts(panels: Mapping[tuple[Any, Any], Rows]) -> Iterator[Chart]:
    values = []  # that are drawn already: with one size, two panels have the same
    for (panel, fixed), rows in panels.items():
        words = PANELS[panel]
        size = words.fixed.format(format_count(fixed))
        drawn = [(row["sae"], row["mode"], words.title) for row in rows]
        if not _is_single(rows):
            yield _draw_fronts(rows, words, f"{words.title} over {words.x}, {size}")
        elif drawn not in values:
            values.append(drawn)
            yield _draw_values(rows, words, f"{words.title}, {size}")


def _is_single(rows: Rows) -> bool:
    """Whether all stand at about one place: equal ks give L0s that differ a little."""
    return max(row["x"] for row in rows) < 1.1 * min(row["x"] for row in rows)


def _draw_fronts(rows: Rows, words: Words, title: str) -> Chart:
    fronts, others = [], []
    for name, style, marker, series in _list_series(rows):
        front = [row for row in series if row["on_front"]]
        rest = [(float(row["x"]), row["y"]) for row in series if not row["on_front"]]
        points = [(float(row["x"]), row["y"]) for row in front]
        fronts.append(Line(name, style, points, marker, band=list_band(front, "x", "y")))
        others.append(Line(name, style, rest, marker, joined=False))
    x = plan_positive((row["x"] for row in rows), label=words.x_format)
    heights = (row[end] for row in rows for end in ("y", "y_low", "y_high"))
    y = plan_positive(heights, label=words.y_format)
    svg = draw_lines([*fronts, *others], x=x, y=y, describe=f"{title}, a front per kind of SAE")
    return Chart(title, words.y, words.x, svg, list_keys(fronts))


def _draw_values(rows: Rows, words: Words, title: str) -> Chart:
    estimates = [
        Estimate(
            name if len(series) == 1 else f"{name}, seed {row['seed']}",
            style,
            row["y"],
            row["y_low"],
            row["y_high"],
            marker,
        )
        for name, style, marker, series in _list_series(rows)
        for row in series
    ]
    describe = f"{title}, a value with its interval per SAE"
    svg = draw_estimates(estimates, label=words.y_format, tick=words.y_format, describe=describe)
    return Chart(title, "", words.y, svg)


def _list_series(rows: Rows) -> Iterator[tuple[str, str, str, Rows]]:
    """Name, style, marker and rows of each kind and mode."""
    kinds = list(dict.fromkeys(name_kind(row) for row in rows))
    for (kind, mode), series in group_rows(rows, lambda r: (name_kind(r), r["mode"])).items():
        name = f"{kind}, {MODES[mode]}" if series[0]["beta"] else kind
        yield name, *mark_kind(kinds.index(kind), mode), series
