"""What steering along a latent does to the next token (Olmo et al. 2024, Figs. 5 and 6)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.report.axes import as_number, plan_linear, plan_positive
from pipeline.report.charts import Chart
from pipeline.report.exhibits.exhibit import Exhibit, Figures, Rows, Tables
from pipeline.report.exhibits.series import format_interval, group_rows, list_band, list_keys
from pipeline.report.figures import Line, draw_lines
from pipeline.report.groups import split_rows
from pipeline.report.tables import format_short, minus

_CONTROL = "ink d2"  # the style of what is no SAE
_EFFECTS = (
    ("associated", "associated tokens"),
    ("others_absolute", "all other tokens"),
)
_READING = (
    "A latent's decoder direction is added to the residual stream; the curves show how much "
    "probability its associated tokens gain by that, and how much all other tokens gain and lose. "
    "A latent that steers well is high in the first and low in the second; the densities show how "
    "single latents spread around these means."
)
_LABEL = (
    "None of these figures sees the label: latents are picked by what fires without the gradient, "
    "what is added is a decoder direction, and no gradient is taken."
)
_PAPER = (
    "At layer 7 of GPT-2 small, g-SAEs move their associated tokens over 5 times as much as TopK, "
    "and all others less. The paper gives α = 50 in units of the residual stream (here "
    "alpha_absolute), but neither the number of associated tokens nor positions nor lengths: at "
    "best the ratio can be compared, and on that model and layer alone. Ratios of g-SAEs to TopK, "
    "with their intervals, stand among the claims."
)


def show_steering(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:
    """Curves over the push's length and densities over latents at one; None where nothing was
    steered.
    """
    sweep, latents = tables.get("steering") or (), tables.get("steering_latents") or ()
    if not sweep or not latents:
        return None
    alpha = latents[0]["alpha"]
    at_alpha = {row["sae"]: row for row in sweep if row["alpha"] == alpha}
    first = next(iter(at_alpha.values()))
    return Exhibit(
        id="steering",
        title="Steering",
        source="Figs. 5 and 6",
        reading=_READING,
        protocol=_describe(sweep, first),
        label_seen=_LABEL,
        paper=_PAPER,
        charts=tuple(_chart(tables, styles, alpha=alpha)),
        figures=(_list_effects(at_alpha),),
        data=("steering", "steering_latents"),
    )


def estimate_density(values: Sequence[float], *, n_points: int = 160) -> list[tuple[float, float]]:
    """A Gaussian kernel density estimate, as (value, density), at values evenly spaced and at
    quantiles, where the mass is. Only finite values count.

        f(x) = 1/(n h) sum over i of phi((x - x_i) / h)     h = 0.9 min(sd, IQR / 1.34) n^(-1/5)

    h is Silverman's (1986, equation 3.31); by sd alone where the quartiles fall together. No point
    where all values are equal: that has no density.
    """
    x = np.asarray([value for value in values if as_number(value) is not None], np.float64)
    if not len(x):
        return []
    quartiles = np.quantile(x, [0.25, 0.75])
    spread = min(filter(None, (x.std(), (quartiles[1] - quartiles[0]) / 1.34)), default=0.0)
    if not spread:
        return []
    h = 0.9 * spread * len(x) ** -0.2
    grid = np.linspace(x.min() - 4 * h, x.max() + 4 * h, n_points)
    at = np.unique(np.concatenate([grid, np.quantile(x, np.linspace(0, 1, n_points // 4))]))
    kernel = np.exp(-0.5 * ((at[:, None] - x) / h) ** 2).sum(1)
    return list(
        zip(at.tolist(), (kernel / (len(x) * h * math.sqrt(2 * math.pi))).tolist(), strict=True)
    )


def _describe(sweep: Rows, at: Mapping[str, Any]) -> str:
    """The protocol, where `at` is a row at the densities' length."""
    return (
        f"Each length steers up to {max(row['n_latents'] for row in sweep)} latents that fired on "
        f"held-out text without the gradient (Fig. 5's lengths the first "
        f"{min(row['n_latents'] for row in sweep)} of them), on the same {at['n_sequences']} "
        f"held-out sequences of {at['context']} tokens for every SAE; steered and measured are "
        f"{at['n_positions']} positions of each, all at once. A latent's associated tokens are the "
        f"{at['n_tokens']} with the largest value of its direction through the unembedding, with "
        "the final norm folded in and centred. α is in units of the activations' mean norm, "
        f"{at['alpha_absolute'] / at['alpha']:.4g}; the densities are at α = {at['alpha']:g}. "
        "Effects are means over positions, then over latents; bands are 95% intervals from "
        "resampling the latents. Probabilities sum to 1, so all other tokens together lose exactly "
        "what the associated ones gain; shown is the sum of absolute changes over them."
    )


def _chart(tables: Tables, styles: Mapping[str, str], *, alpha: float) -> Iterator[Chart]:
    groups = (split_rows(tables[name], tables) for name in ("steering", "steering_latents"))
    for (of, sweep), (_, latents) in zip(*groups, strict=True):
        ending = f", {of}" if of else ""
        for effect, words in _EFFECTS:
            yield _chart_sweep(sweep, styles, effect, words + ending)
        for effect, words in _EFFECTS:
            yield _chart_density(latents, styles, effect, words + ending, alpha=alpha)


def _chart_sweep(rows: Rows, styles: Mapping[str, str], effect: str, words: str) -> Chart:
    lines = [
        Line(
            name,
            styles.get(name, _CONTROL),
            [(row["alpha"], row[effect]) for row in own],
            marker="dot",
            band=list_band(own, "alpha", effect),
        )
        for name, own in group_rows(rows, lambda row: row["sae"]).items()
    ]
    heights = [row[f"{effect}{end}"] for row in rows for end in ("", "_low", "_high")]
    x = plan_positive([row["alpha"] for row in rows], label=_plain)
    y = plan_linear(heights, label=_plain, zero=True)
    title = f"Effect on {words}"
    describe = f"{title} over the length of the push, one line per SAE"
    svg = draw_lines(lines, x=x, y=y, describe=describe)
    return Chart(title, _unit(effect), "α, in mean norms", svg, list_keys(lines))


def _chart_density(
    rows: Rows, styles: Mapping[str, str], effect: str, words: str, *, alpha: float
) -> Chart:
    lines = [
        Line(name, styles.get(name, _CONTROL), estimate_density([row[effect] for row in own]))
        for name, own in group_rows(rows, lambda row: row["sae"]).items()
    ]
    points = [point for line in lines for point in line.points]
    x = plan_linear([a for a, _ in points], label=_plain)
    y = plan_linear([b for _, b in points], label=_plain, zero=True)
    title = f"Latents by their effect on {words}, α = {alpha:g}"
    svg = draw_lines(lines, x=x, y=y, describe=f"{title}: a density per SAE")
    return Chart(title, "density", _unit(effect), svg, list_keys(lines))


def _list_effects(at_alpha: Mapping[str, Mapping[str, Any]]) -> Figures:
    rows = tuple(
        (
            name,
            str(row["n_latents"]),
            *(format_interval(row, effect, format_short) for effect, _ in _EFFECTS),
        )
        for name, row in at_alpha.items()
    )
    return Figures(("SAE", "latents", *(words for _, words in _EFFECTS)), rows)


def _unit(effect: str) -> str:
    return "change of probability" if effect == "associated" else "absolute changes of probability"


def _plain(value: float) -> str:
    return minus(f"{value:.3g}")
