"""Intervals by resampling (Efron 1979): what varies is drawn anew with replacement, as a whole.

What is resampled are blocks of text where a figure is a mean over tokens, for tokens of a block
depend on each other; and latents, where it is one over latents. Claims resample whole documents
in place of blocks. Two figures of the same units are compared draw by draw, so that what the units
share cancels.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

COVERAGE = 0.95  # of every interval
MIN_UNITS = 8  # that anything can be said from; a single one would never vary


class Interval(NamedTuple):
    """A figure and its percentile interval."""

    value: float  # of the sample as it is
    low: float
    high: float


def draw_weights(n: int, *, draws: int, seed: int = 0) -> Float[Tensor, "draws_and_one n"]:
    """How often each of n units is in each resampling, float64; the first row, all 1, is the sample
    itself. The others are NaN where n is below MIN_UNITS, and so are the ends of the interval.
    """
    if n < MIN_UNITS:
        weights = torch.full((draws + 1, n), torch.nan, dtype=torch.float64)
        weights[0] = 1
        return weights
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(n, (draws, n), generator=generator)
    counts = torch.zeros(draws, n, dtype=torch.float64)
    counts.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))
    return torch.cat([torch.ones(1, n, dtype=torch.float64), counts])


def sum_by(labels: Int[Tensor, " n"], values: Float[Tensor, "n ..."]) -> Float[Tensor, "units ..."]:
    """Sums of the values that have a label in common, in the order of the labels, on the CPU."""
    found, places = labels.cpu().unique(return_inverse=True)
    values = values.cpu()
    return values.new_zeros(len(found), *values.shape[1:]).index_add_(0, places, values)


def resample_ratio(
    numerators: Float[Tensor, " n"],
    denominators: Float[Tensor, " n"],
    weights: Float[Tensor, "draws_and_one n"],
) -> Float[Tensor, " draws_and_one"]:
    """Sum of numerators over sum of denominators, in each resampling: a mean per token of sums per
    block.
    """
    return (weights @ numerators.double()) / (weights @ denominators.double())


def resample_mean(
    values: Float[Tensor, " n"], weights: Float[Tensor, "draws_and_one n"]
) -> Float[Tensor, " draws_and_one"]:
    """Mean of the values in each resampling."""
    return resample_ratio(values, torch.ones_like(values), weights)


def find_interval(resampled: Float[Tensor, " draws_and_one"]) -> Interval:
    """The percentile interval of what the resamplings give; NaN among them stays out, and where all
    are NaN, so are low and high.
    """
    value, draws = resampled[0].item(), resampled[1:]
    draws = draws[draws.isfinite()]
    if len(draws) == 0:
        return Interval(value, float("nan"), float("nan"))
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail]).double()).tolist()
    return Interval(value, low, high)


def spread_interval(name: str, interval: Interval | None) -> dict[str, float | None]:
    """The columns `name`, `name`_low and `name`_high; None for what is missing or not finite."""
    keys = (name, f"{name}_low", f"{name}_high")
    values = interval or (None, None, None)
    return {
        key: value if value is not None and math.isfinite(value) else None
        for key, value in zip(keys, values, strict=True)
    }
