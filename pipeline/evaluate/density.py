"""How often latents fire, and which never do (Olmo et al. 2024, section 4.3, Fig. 8 top, Table 1).

A latent's firing frequency is the fraction of the held-out rows that were reconstructed (those
whose position training did not leave out) on which its value is above zero.

The intervals resample latents (there is none of fewer than bootstrap.MIN_UNITS): they say how far
a figure depends on which latents this SAE happened to learn, and nothing about the text, which all
SAEs share, or about other seeds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.evaluate.activity import Activity
from pipeline.evaluate.bootstrap import (
    Interval,
    draw_weights,
    find_interval,
    resample_mean,
    spread_interval,
)

CURVE_POINTS = 101  # of each firing-frequency curve

Activities = Mapping[str, Mapping[str, Activity]]  # by SAE and mode


def find_frequencies(activity: Activity) -> Float[Tensor, " d_sae"]:
    """Firings over rows, of each latent; 0 of no rows."""
    return activity.firings.double() / max(activity.n_rows, 1)


def list_firing_curves(activities: Activities) -> list[dict[str, Any]]:
    """Quantiles of each SAE's firing frequencies over all latents, dead ones too (Fig. 8 top).

    Columns: sae, mode, fraction_of_latents, firing_frequency. The CDF is the same curve with its
    axes exchanged: that fraction of the latents fires at most so often.
    """
    fractions = torch.linspace(0, 1, CURVE_POINTS, dtype=torch.float64)
    return [
        {"sae": name, "mode": mode, "fraction_of_latents": q, "firing_frequency": frequency}
        for name, mode, activity in _walk(activities)
        for q, frequency in zip(
            fractions.tolist(),
            torch.quantile(find_frequencies(activity), fractions).tolist(),
            strict=True,
        )
    ]


def measure_medians(
    activities: Activities, ks: Mapping[str, int], *, draws: int
) -> list[dict[str, Any]]:
    """Median firing frequency of each SAE, over its live latents and over all (section 4.3).

    Columns: sae, mode, k, live (latents that fired at all), median_live and median_all with their
    intervals. The median is the smallest frequency that at least half of the latents do not exceed.
    None where no latent is live.

    Differs: the paper does not say whether its medians count dead latents.
    """
    rows = []
    for name, mode, activity in _walk(activities):
        frequencies = find_frequencies(activity)
        live = frequencies[frequencies > 0]
        rows.append(
            {"sae": name, "mode": mode, "k": ks[name], "live": len(live)}
            | spread_interval("median_live", find_median(live, draws=draws))
            | spread_interval("median_all", find_median(frequencies, draws=draws))
        )
    return rows


def measure_dead(
    activities: Activities, ks: Mapping[str, int], *, draws: int
) -> list[dict[str, Any]]:
    """Fraction of dead latents of each SAE (Table 1).

    Columns: sae, mode, k, dead_paper and dead_held_out with their intervals. dead_paper counts the
    latents that did not fire in the last 5 * 4096 rows, averaged over the ends of batches (see
    `Activity`; None where there are too few rows); dead_held_out those that fired on no row.

    Differs: the paper's batches are those of training, ours consecutive held-out rows.
    """
    rows = []
    for name, mode, activity in _walk(activities):
        weights = draw_weights(len(activity.firings), draws=draws)
        at_ends = None
        if activity.n_ends:
            shares = activity.dead_ends.double() / activity.n_ends
            at_ends = find_interval(resample_mean(shares, weights))
        never = find_interval(resample_mean((activity.firings == 0).double(), weights))
        rows.append(
            {"sae": name, "mode": mode, "k": ks[name]}
            | spread_interval("dead_paper", at_ends)
            | spread_interval("dead_held_out", never)
        )
    return rows


def find_median(values: Float[Tensor, " n"], *, draws: int) -> Interval | None:
    """The lower median and its interval over resamplings of the values; None of no values."""
    if len(values) == 0:
        return None
    ordered = values.sort().values
    # Units are exchangeable, so weights drawn for the values in any order serve the sorted ones.
    below = draw_weights(len(values), draws=draws).cumsum(1)
    half = torch.full((len(below), 1), len(values) / 2, dtype=below.dtype)
    medians = ordered[torch.searchsorted(below, half).squeeze(1).clamp(max=len(values) - 1)]
    return find_interval(medians.double().where(below[:, -1].isfinite(), torch.nan))


def _walk(activities: Activities) -> Iterator[tuple[str, str, Activity]]:
    for name, modes in activities.items():
        for mode, activity in modes.items():
            yield name, mode, activity
