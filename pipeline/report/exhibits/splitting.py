"""Near-duplicates among decoder rows and the gradients along them (Fig. 8 bottom, Table 2)."""

from collections.abc import Iterator, Mapping

from pipeline.report.axes import Axis, plan_linear
from pipeline.report.charts import Chart
from pipeline.report.exhibits.exhibit import Exhibit, Figures, Rows, Tables
from pipeline.report.exhibits.series import (
    format_interval,
    group_rows,
    index_rows,
    list_band,
    list_keys,
)
from pipeline.report.figures import Estimate, Line, draw_estimates, draw_lines
from pipeline.report.groups import split_rows
from pipeline.report.markers import MARKERS
from pipeline.report.tables import (
    format_count,
    format_ratio,
    format_share,
    format_short,
    minus,
    show,
)

GROUPS = ("left", "middle", "right")
PAPER = Figures(
    ("The paper, × 1e−5", "left tail", "middle", "right tail", "right / left"),
    (
        ("g-SAE", "2.070", "2.538", "2.861", "1.38"),
        ("TopK", "2.187", "2.313", "2.366", "1.08"),
        ("end to end", "2.221", "2.502", "3.428", "1.54"),
    ),
)


def show_splitting(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:
    """Cosines of near-duplicates and gradients along them; None where not measured."""
    bins, summary = tables.get("splitting"), tables.get("splitting_summary")
    if not bins or not summary:
        return None
    gradients = tables.get("splitting_gradients") or ()
    return Exhibit(
        id="splitting",
        title="Near-duplicates, and the gradient along them",
        source="Fig. 8, bottom, and Table 2",
        reading=(
            "The histogram shows how close each live latent’s decoder row is to its nearest other, "
            "with split features on the right. The paper’s claim is that the loss changes most "
            "along those: the gradient rises from the left tail to the right, so that right / left "
            "is above 1, and further above it in a g-SAE than in TopK."
        ),
        protocol=_describe(gradients),
        label_seen=(
            "Latents are live that fire without the gradient at inference. The gradients along "
            "them are the label’s: they are of the loss of the very tokens that they are averaged "
            "over; rows where a latent fires are found without them."
        ),
        paper=(
            "The paper’s numbers are of GPT-2 small, layer 7, with 15,360 latents. Theirs are of a "
            "mean loss over a number of tokens that it does not give, ours of the summed loss over "
            "loss_tokens, so that sizes compare in that setting alone and at the right "
            "loss_tokens; ratios compare anywhere."
        ),
        charts=tuple(_chart(tables, styles)),
        figures=(*_tabulate(gradients, summary), PAPER),
        data=("splitting", "splitting_summary", *(("splitting_gradients",) * bool(gradients))),
    )


def _describe(gradients: Rows) -> str:
    histogram = (
        "Cosines are among decoder rows at unit norm, of latents that fire on held-out text; dead "
        "ones are in no bin and nobody’s nearest."
    )
    if not gradients:
        return f"{histogram} No gradients were measured (evidence.splitting_latents)."
    n, blocks, rows = (format_count(gradients[0][key]) for key in ("n", "blocks", "rows"))
    loss_tokens = " or ".join(sorted({format_count(row["loss_tokens"]) for row in gradients}))
    return (
        f"{histogram} Of the {n} latents with the lowest cosines, the {n} around the median and "
        f"the {n} with the highest: mean of |d · ∇L| / {loss_tokens} at unit norm of d, over "
        f"{rows} rows of {blocks} held-out blocks without positions that training left out, or "
        "over those rows alone on which the latent fires. 95% intervals over blocks, and over the "
        "latents of each group."
    )


def _tabulate(gradients: Rows, summary: Rows) -> Iterator[Figures]:
    yield Figures(
        ("SAE", "live latents", "cosine, 5%", "median", "95%"),
        tuple(
            (
                row["sae"],
                f"{format_count(row['live'])} of {format_count(row['d_sae'])}",
                *(show(row[f"cosine_{q}"], format_ratio) for q in ("q05", "median", "q95")),
            )
            for row in summary
        ),
    )
    found = index_rows(gradients, "sae", "group")
    for key, ratio, words in (
        ("gradient", "ratio", "All rows, × 1e−5"),
        ("gradient_active", "ratio_active", "Rows where the latent fires, × 1e−5"),
    ):
        if gradients:
            yield Figures(
                (words, *(title for title in PAPER.columns[1:])),
                tuple(
                    (
                        row["sae"],
                        *(
                            format_interval(found.get((row["sae"], g), {}), key, _fine)
                            for g in GROUPS
                        ),
                        format_interval(row, ratio, format_short),
                    )
                    for row in summary
                ),
            )


def _chart(tables: Tables, styles: Mapping[str, str]) -> Iterator[Chart]:
    gradients = tables.get("splitting_gradients") or ()
    shown = (tables["splitting"], gradients, tables["splitting_summary"])
    groups = (split_rows(rows, tables) for rows in shown)
    for (words, bins), (_, along), (_, summary) in zip(*groups, strict=True):
        ending = f", {words}" if words else ""
        yield _chart_bins(bins, styles, ending)
        if along:
            yield _chart_gradients(along, styles, ending)
            yield _chart_ratios(summary, styles, ending)


def _chart_bins(bins: Rows, styles: Mapping[str, str], ending: str) -> Chart:
    lines = [
        Line(name, styles[name], list(_outline(rows)))
        for name, rows in group_rows(bins, lambda row: row["sae"]).items()
    ]
    x = plan_linear(
        (row[end] for row in bins for end in ("bin_low", "bin_high")),
        label=lambda x: minus(f"{x:g}"),
    )
    y = plan_linear((row["fraction"] for row in bins), label=format_share, zero=True)
    svg = draw_lines(lines, x=x, y=y, describe="Histogram of cosines with the nearest decoder row")
    title = f"Cosine with the nearest other decoder row{ending}"
    return Chart(title, "of the live latents", "cosine", svg, list_keys(lines))


def _outline(rows: Rows) -> Iterator[tuple[float, float]]:
    """The histogram's steps, from zero to zero."""
    yield rows[0]["bin_low"], 0.0
    for row in rows:
        yield row["bin_low"], row["fraction"]
        yield row["bin_high"], row["fraction"]
    yield rows[-1]["bin_high"], 0.0


def _chart_gradients(gradients: Rows, styles: Mapping[str, str], ending: str) -> Chart:
    placed = [{**row, "place": float(GROUPS.index(row["group"]))} for row in gradients]
    lines = [
        Line(
            name,
            styles[name],
            [(row["place"], row["gradient"]) for row in rows],
            MARKERS[i % len(MARKERS)],
            band=list_band(rows, "place", "gradient"),
        )
        for i, (name, rows) in enumerate(group_rows(placed, lambda row: row["sae"]).items())
    ]
    ticks = ((0.04, "left tail"), (0.5, "middle"), (0.96, "right tail"))
    x = Axis(lambda place: ticks[round(place)][0], ticks)
    heights = (row[f"gradient{end}"] for row in gradients for end in ("", "_low", "_high"))
    y = plan_linear(heights, label=_fine)
    describe = "Mean gradient along the latents of each part of the histogram"
    svg = draw_lines(lines, x=x, y=y, describe=describe)
    title, unit = f"Gradient along latents{ending}", "× 1e−5 nats per unit of activation"
    return Chart(title, unit, "part of the histogram", svg, list_keys(lines))


def _chart_ratios(summary: Rows, styles: Mapping[str, str], ending: str) -> Chart:
    estimates = [
        Estimate(row["sae"], styles[row["sae"]], row["ratio"], row["ratio_low"], row["ratio_high"])
        for row in summary
        if row["ratio"] is not None
    ]
    describe = "Gradient of the right tail over that of the left, of each SAE, with intervals"
    svg = draw_estimates(
        estimates, label=format_short, tick=format_short, describe=describe, zero=False
    )
    return Chart(f"Right tail over left{ending}", "", "1: no difference", svg)


def _fine(value: float) -> str:
    return format_short(1e5 * value)
