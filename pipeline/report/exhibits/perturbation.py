"""What predicts the effect of a perturbation on the loss (Fig. 3)."""

from collections.abc import Mapping

from pipeline.report.axes import plan_linear
from pipeline.report.charts import Chart
from pipeline.report.exhibits.exhibit import Exhibit, Figures, Rows, Tables
from pipeline.report.exhibits.layers import plan_layers
from pipeline.report.exhibits.series import format_interval, group_rows, list_band, list_keys
from pipeline.report.figures import Line, draw_lines, series_style
from pipeline.report.tables import format_count, format_short, minus, show

_FIGURES = (
    ("rho_gradient", "|∇L · δ|", "dot"),
    ("rho_norm", "‖δ‖", "ring"),
    ("rho_difference", "their difference", ""),
    ("rho_steepness", "‖∇L‖ ‖δ‖", ""),
)
_ENDS = ("", "_low", "_high")


def show_perturbation(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:  # noqa: ARG001
    rows = tables.get("perturbation")
    if not rows:
        return None
    n, context = (format_count(max(row[key] for row in rows)) for key in ("n", "context"))
    sites = group_rows(rows, lambda row: row["site"])
    return Exhibit(
        id="perturbation",
        title="What a perturbation does to the loss",
        source="Fig. 3",
        reading=(
            "A perturbation δ of one activation changes the loss by ΔL; each point is how well the "
            "order of |ΔL| over perturbations is that of the gradient’s estimate |∇L · δ| (filled) "
            "or that of the norm ‖δ‖ (hollow), as Spearman’s rho, 1 being the same order. Where "
            "filled points are far above hollow ones, equal errors of a reconstruction are not "
            "equally harmful, and the gradient says which are."
        ),
        protocol=(
            f"{n} held-out sequences of {context} tokens, each perturbed once per site, layer and "
            "size at one random position that training did not leave out; L is summed over the "
            "sequence. δ is uniform in direction, and in norm on m(1 ± √3/2), m being the size "
            "times the mean norm at the site; intervals are over sequences. Spread: |ΔL|’s 95th "
            "over its 5th percentile, in orders of magnitude, over all that differs between "
            "sequences; direction alone gives about 1.5 where the gradient’s estimate is exact. "
            "The gradient also knows how steep the loss is at that token, which ‖δ‖ cannot: "
            "‖∇L‖ ‖δ‖ knows it too, and what |∇L · δ| adds to that is δ’s direction."
        ),
        label_seen=(
            "|∇L · δ| and ‖∇L‖ ‖δ‖ see the label, for ∇L is the gradient of the loss that then "
            "changes; ‖δ‖ does not. No SAE is involved."
        ),
        paper=(
            "On GPT-2 the paper finds strong correlations with |∇L · δ|, weak ones with ‖δ‖, and "
            "effects that vary by up to 3 orders of magnitude. It shows its numbers as colours, "
            "for norms in units of the activations and for samples it does not describe, so "
            "compare which is higher, not values."
        ),
        charts=tuple(_chart(site, group) for site, group in sites.items()),
        figures=tuple(_tabulate(site, group) for site, group in sites.items()),
        data=("perturbation",),
    )


def _chart(site: str, rows: Rows) -> Chart:
    sizes = group_rows(rows, lambda row: row["size"])
    lines = [
        Line(
            f"{words}, size {size:g}",
            series_style(i),
            [(float(row["layer"]), row[figure]) for row in group],
            marker,
            band=list_band(group, "layer", figure),
        )
        for figure, words, marker in _FIGURES[:2]
        for i, (size, group) in enumerate(sizes.items())
    ]
    x = plan_layers(row["layer"] for row in rows)
    heights = [
        row[f"{figure}{end}"] for row in rows for figure, *_ in _FIGURES[:2] for end in _ENDS
    ]
    y = plan_linear([*heights, 1.0], label=_rho, zero=True)
    describe = f"Rank correlations with the change of loss over layers, perturbing {site}"
    svg = draw_lines(lines, x=x, y=y, describe=describe)
    return Chart(f"Perturbing {site}", "Spearman’s rho with |ΔL|", "layer", svg, list_keys(lines))


def _tabulate(site: str, rows: Rows) -> Figures:
    columns = ("mean ‖δ‖", *(words for _, words, _ in _FIGURES), "median |ΔL|", "spread")
    lines = [
        (
            f"layer {row['layer']}, {row['size']:g}",
            show(row["norm"], format_short),
            *(format_interval(row, figure, _rho) for figure, *_ in _FIGURES),
            show(row["change"], format_short),
            show(row["spread"], _rho),
        )
        for row in rows
    ]
    return Figures((f"{site}: layer, size", *columns), tuple(lines))


def _rho(value: float) -> str:
    return minus(f"{value:.2f}")
