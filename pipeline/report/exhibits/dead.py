"""Dead latents (Table 1)."""

from collections.abc import Mapping
from typing import Any

from pipeline.report.axes import plan_linear, plan_positive
from pipeline.report.charts import Chart
from pipeline.report.exhibits.exhibit import Exhibit, Figures, Rows, Tables
from pipeline.report.exhibits.series import (
    MODES,
    format_interval,
    group_rows,
    index_rows,
    list_band,
    list_keys,
    list_names,
    name_apart,
    name_kind,
)
from pipeline.report.figures import (
    Estimate,
    Line,
    draw_estimates,
    draw_lines,
    series_style,
)
from pipeline.report.markers import MARKERS
from pipeline.report.tables import format_count, format_share

PAPER = Figures(
    ("The paper, L0", "3", "5", "10", "32", "64"),
    (
        ("g-SAE", "95%", "88%", "71%", "34%", "19%"),
        ("TopK", "98%", "92%", "81%", "43%", "26%"),
        ("end to end", "95%", "87%", "68%", "29%", "16%"),
    ),
)
_FIGURES = (("dead_paper", "the paper’s"), ("dead_held_out", "never"))
_ENDS = ("", "_low", "_high")


def show_dead(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:
    """The fraction of latents that are dead, with intervals; None where it was not measured."""
    rows = tables.get("dead")
    if not rows:
        return None
    measured = any(row["dead_paper"] is not None for row in rows)
    key, words = _FIGURES[0] if measured else _FIGURES[1]
    several = len({row["k"] for row in rows}) > 1
    chart = _chart_ks(rows, tables, key) if several else _chart_saes(rows, styles, key)
    return Exhibit(
        id="dead",
        title="Dead latents",
        source="Table 1",
        reading=(
            "Lower is better: a dead latent is memory and time spent on nothing. The chart has the "
            f"count “{words}” with the gradient at inference, the table both counts in both modes, "
            "with 95% intervals over latents."
        ),
        protocol=(
            "“The paper’s” count: no activation within 20,480 consecutive held-out rows, averaged "
            "over the ends of batches; a dash where fewer rows were read. “Never”: no activation "
            "on any held-out row, so the more text there is, the lower it gets. Positions that "
            "training left out do not count."
        ),
        label_seen=(
            "Counts with ∇ see the label, for the gradient of the loss has a say in which latents "
            "fire; those without ∇ do not."
        ),
        paper=(
            "The paper’s numbers are of GPT-2 small, layer 7, with 15,360 latents after about 14M "
            "tokens of training, and compare with ours in that setting alone. Elsewhere compare "
            "the order of the three at one L0."
        ),
        charts=(chart,),
        figures=(_tabulate(rows), PAPER),
        data=("dead",),
    )


def _tabulate(rows: Rows) -> Figures:
    found = index_rows(rows, "sae", "mode")
    columns = [(f"{words}, {mode}", key, m) for key, words in _FIGURES for m, mode in MODES.items()]
    lines = []
    for name in list_names(rows):
        modes = {mode: found.get((name, mode), {}) for mode in MODES}
        k = format_count(modes["with_gradient"]["k"])
        cells = (format_interval(modes[mode], key, format_share) for _, key, mode in columns)
        lines.append((name, k, *cells))
    return Figures(("SAE", "k", *(title for title, _, _ in columns)), tuple(lines))


def _chart_saes(rows: Rows, styles: Mapping[str, str], key: str) -> Chart:
    estimates = [
        Estimate(row["sae"], styles[row["sae"]], *(row[f"{key}{end}"] for end in _ENDS))
        for row in rows
        if row["mode"] == "with_gradient"
    ]
    describe = "Fraction of dead latents of each SAE, with intervals"
    svg = draw_estimates(estimates, label=format_share, tick=format_share, describe=describe)
    return Chart("Dead latents, with ∇", "", "of all latents", svg)


def _chart_ks(rows: Rows, tables: Tables, key: str) -> Chart:
    """A line per kind, size and seed over k."""
    about = index_rows(tables.get("saes") or (), "sae", "mode")

    def kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
        sae = about.get((row["sae"], row["mode"]), {})
        return name_kind(sae), sae.get("d_sae"), sae.get("seed")

    groups = group_rows([row for row in rows if row["mode"] == "with_gradient"], kind)
    names = name_apart(list(groups), ("{} latents", "seed {}"))
    lines = [
        Line(
            name,
            series_style(i),
            [(float(row["k"]), row[key]) for row in group],
            MARKERS[i % len(MARKERS)],
            band=list_band(group, "k", key),
        )
        for i, (name, group) in enumerate(zip(names, groups.values(), strict=True))
    ]
    x = plan_positive((row["k"] for row in rows), label=format_count)
    heights = (row[f"{key}{end}"] for row in rows for end in _ENDS)
    y = plan_linear(heights, label=format_share, zero=True)
    svg = draw_lines(lines, x=x, y=y, describe="Fraction of dead latents over k, a line per kind")
    return Chart("Dead latents over L0, with ∇", "of all latents", "k", svg, list_keys(lines))
