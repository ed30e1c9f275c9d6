"""How often latents fire (section 4.3 and Fig. 8, top)."""

from collections.abc import Mapping

from pipeline.report.axes import plan_linear, plan_positive
from pipeline.report.charts import Chart
from pipeline.report.exhibits.exhibit import Exhibit, Figures, Rows, Tables
from pipeline.report.exhibits.series import (
    MODES,
    format_interval,
    group_rows,
    index_rows,
    list_keys,
    list_names,
)
from pipeline.report.figures import Line, draw_lines
from pipeline.report.groups import split_rows
from pipeline.report.tables import format_count, format_share, format_short, minus

PAPER = Figures(
    ("The paper, L0 = 32", "median"),
    (("g-SAE", "0.24%"), ("TopK", "0.43%"), ("end to end", "1.10%")),
)


def show_density(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:
    """The distribution of firing frequencies and its medians; None where not measured."""
    curves, medians = tables.get("firing"), tables.get("density_medians")
    if not curves or not medians:
        return None
    return Exhibit(
        id="density",
        title="How often latents fire",
        source="section 4.3 and Fig. 8, top",
        reading=(
            "Each curve is a cumulative distribution: the height is the fraction of the SAE’s "
            "latents that fire at most as often as the place on the axis says, so that a curve "
            "further to the left has rarer latents, and one that starts higher more dead ones. "
            "The table’s medians have 95% intervals over latents."
        ),
        protocol=(
            "A latent’s firing frequency is the fraction of held-out rows on which its value is "
            "above zero, without positions that training left out. Dead latents, which fire on no "
            "row, count in the curves and in the medians over all latents."
        ),
        label_seen=(
            "Frequencies with ∇ see the label, for the gradient of the loss has a say in which "
            "latents fire; those without ∇ do not."
        ),
        paper=(
            "The paper’s medians are of GPT-2 small, layer 7, with 15,360 latents, and do not say "
            "whether dead latents count; a mean frequency is L0 / d_sae, so other sizes have other "
            "medians and only their order compares. With the paper’s Table 1, half of the "
            "end-to-end SAE’s live latents firing on 1.10% of the rows or more would already make "
            "an L0 of 60, not 32, so that median must be of something else than these frequencies."
        ),
        charts=tuple(
            _chart(rows, styles, mode, words)
            for words, rows in split_rows(curves, tables)
            for mode in MODES
        ),
        figures=(_tabulate(medians), PAPER),
        data=("firing", "density_medians"),
    )


def _tabulate(rows: Rows) -> Figures:
    found = index_rows(rows, "sae", "mode")
    columns = [
        (f"median of {words}, {with_or_without}", key, mode)
        for key, words in (("median_live", "live"), ("median_all", "all"))
        for mode, with_or_without in MODES.items()
    ]
    lines = []
    for name in list_names(rows):
        modes = {mode: found.get((name, mode), {}) for mode in MODES}
        first = modes["with_gradient"]
        cells = (format_interval(modes[mode], key, _rate) for _, key, mode in columns)
        lines.append((name, format_count(first["k"]), format_count(first["live"]), *cells))
    titles = (title for title, _, _ in columns)
    return Figures(("SAE", "k", "live, with ∇", *titles), tuple(lines))


def _chart(rows: Rows, styles: Mapping[str, str], mode: str, words: str) -> Chart:
    """The CDF of each SAE from where it leaves zero on."""
    live = [row for row in rows if row["mode"] == mode and row["firing_frequency"] > 0]
    lines = [
        Line(
            name,
            styles[name],
            [(row["firing_frequency"], row["fraction_of_latents"]) for row in curve],
        )
        for name, curve in group_rows(live, lambda row: row["sae"]).items()
    ]
    x = plan_positive((row["firing_frequency"] for row in live), label=_tick)
    y = plan_linear((0.0, 1.0), label=format_share)
    svg = draw_lines(lines, x=x, y=y, describe="Cumulative distribution of firing frequencies")
    title = ", ".join(filter(None, ["Firing frequency", words, MODES[mode]]))
    return Chart(title, "of all latents", "of the rows", svg, list_keys(lines))


def _tick(value: float) -> str:
    return f"{100 * value:g}%"


def _rate(value: float) -> str:
    """A fraction as a percentage with three significant digits: 0.243%."""
    return minus(f"{format_short(100 * value)}%")
