"""By how much SAEs differ.

Everything is resampled before it is compared: figures over text in the same resamplings of whole
documents for all SAEs, so that what the text does to both cancels; figures over latents
independently, for two dictionaries share no latent.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.evaluate.activity import Activity
from pipeline.evaluate.bootstrap import (
    Interval,
    draw_weights,
    find_interval,
    resample_mean,
    sum_by,
)
from pipeline.evaluate.faithfulness import RESAMPLE, Sums
from pipeline.evaluate.pairs import Evidence
from pipeline.evaluate.steering import RANDOM

Key = tuple[str, str, str]  # figure, SAE or control, mode


class Resampled(NamedTuple):
    """A figure in every resampling."""

    draws: Float[Tensor, " draws_and_one"]
    units: str  # what is resampled, and how many there are: "40 documents"


class Comparison(NamedTuple):
    """How far two figures lie apart."""

    measure: str  # "difference", ours less theirs; "ratio", ours over theirs; "share"
    value: float  # of means over seeds
    low: float
    high: float
    by_seed: tuple[float, ...]
    side: int  # 1: ours is larger, -1: smaller, by the interval and in every seed; 0: undecided


def resample_all(evidence: Evidence) -> dict[Key, Resampled]:
    """Every figure of every SAE in every resampling."""
    return _resample_text(evidence) | _resample_activity(evidence) | _resample_steering(evidence)


def _resample_text(evidence: Evidence) -> dict[Key, Resampled]:
    """In the same resamplings of documents for all."""
    found: dict[Key, Resampled] = {}
    weights: dict[int, Tensor] = {}
    for (name, mode), of_blocks in evidence.sums.items():
        documents = evidence.documents
        if documents is None:
            documents = torch.arange(len(of_blocks.rows))
        sums = Sums(*(sum_by(documents, column) for column in of_blocks))
        n = len(sums.rows)
        if n not in weights:
            weights[n] = draw_weights(n, draws=evidence.draws)
        for figure, resample in RESAMPLE.items():
            found[figure, name, mode] = Resampled(resample(sums, weights[n]), f"{n} documents")
    return found


def _resample_activity(evidence: Evidence) -> dict[Key, Resampled]:
    found: dict[Key, Resampled] = {}
    for seed, (name, modes) in enumerate(evidence.activities.items(), 1):
        for mode, activity in modes.items():
            units = f"{len(activity.firings)} latents"
            weights = draw_weights(len(activity.firings), draws=evidence.draws, seed=seed)
            shares = {"dead_held_out": (activity.firings == 0).double()}
            if activity.n_ends:
                shares["dead"] = activity.dead_ends.double() / activity.n_ends
            for figure, values in shares.items():
                found[figure, name, mode] = Resampled(resample_mean(values, weights), units)
            density = resample_median_live(activity, weights)
            found["density", name, mode] = Resampled(density, units)
    return found


def _resample_steering(evidence: Evidence) -> dict[Key, Resampled]:
    found: dict[Key, Resampled] = {}
    for seed, name in enumerate([*evidence.saes, RANDOM], 1):
        effects = _read_steering(evidence, name)
        if len(effects):
            units = f"{len(effects)} latents"
            weights = draw_weights(len(effects), draws=evidence.draws, seed=seed)
            associated, others = (resample_mean(column, weights) for column in effects.T)
            found["associated", name, ""] = Resampled(associated, units)
            found["others", name, ""] = Resampled(divide_gain(others, associated), units)
    return found


def divide_gain(
    others: Float[Tensor, " draws_and_one"], gain: Float[Tensor, " draws_and_one"]
) -> Float[Tensor, " draws_and_one"]:
    """What steering does to other tokens for each unit of gain on the associated ones.

    Of no gain it is nothing, NaN; where a resampling has none, no resampling says anything.
    """
    ratio = (others / gain).where(gain > 0, torch.nan)
    if not bool((gain > 0).all()):
        ratio[1:] = torch.nan
    return ratio


def resample_median_live(
    activity: Activity, weights: Float[Tensor, "draws_and_one d_sae"]
) -> Float[Tensor, " draws_and_one"]:
    """Median fraction of rows on which a live latent fires, in each resampling of the latents.

    The smallest frequency that at least half of the live latents do not exceed; NaN where none is
    live.
    """
    ordered = activity.firings.sort()
    live = ordered.values > 0
    if not live.any():
        return torch.full((len(weights),), torch.nan, dtype=torch.float64)
    below = weights[:, ordered.indices[live]].cumsum(1)
    places = torch.searchsorted(below, below[:, -1:] / 2).squeeze(1)
    frequencies = ordered.values[live].double() / activity.n_rows
    medians = frequencies[places.clamp(max=len(frequencies) - 1)]
    return medians.where(below[:, -1] > 0, torch.nan)


def compare(
    ours: Sequence[Float[Tensor, " draws_and_one"]],
    theirs: Sequence[Float[Tensor, " draws_and_one"]],
    *,
    as_ratio: bool = False,
) -> Comparison:
    """Ours against theirs, one tensor per seed; the interval is that of the mean over seeds.

    A side is taken by the interval of the difference, and only if every seed's own value is on it:
    the interval says how sure the text or the latents make us, the seeds how sure training does. A
    ratio is given only if no resampling of theirs is 0 or below.
    """
    mine, other = torch.stack([*ours]).mean(0), torch.stack([*theirs]).mean(0)
    difference = find_interval(mine - other)
    seeds = [(a[0] - b[0]).item() for a, b in zip(ours, theirs, strict=True)]
    side = find_side(difference, seeds)
    if as_ratio and not bool((torch.stack([*theirs]) <= 0).any()):
        ratios = tuple((a[0] / b[0]).item() for a, b in zip(ours, theirs, strict=True))
        return Comparison("ratio", *find_interval(mine / other), ratios, side)
    return Comparison("difference", *difference, tuple(seeds), side)


def find_side(interval: Interval, by_seed: Sequence[float] = (), *, at: float = 0.0) -> int:
    """1 if the interval and every seed lie above `at`, -1 if below, 0 otherwise."""
    if interval.low > at and all(value > at for value in by_seed):
        return 1
    return -1 if interval.high < at and all(value < at for value in by_seed) else 0


def compare_share(
    plain: Sequence[Float[Tensor, " draws_and_one"]],
    given: Sequence[Float[Tensor, " draws_and_one"]],
    trained: Sequence[Float[Tensor, " draws_and_one"]],
) -> Comparison | None:
    """(plain - given) / (plain - trained): how much of a fall one of its causes has alone.

    The side is that of one half; None where the fall itself is not decided.
    """
    if compare(plain, trained).side != 1:
        return None
    arms = (torch.stack([*side]).mean(0) for side in (plain, given, trained))
    seeds = [
        _share(*(column[0] for column in seed)) for seed in zip(plain, given, trained, strict=True)
    ]
    interval, by_seed = find_interval(_share(*arms)), tuple(seed.item() for seed in seeds)
    return Comparison("share", *interval, by_seed, find_side(interval, by_seed, at=0.5))


def compare_intervals(
    intervals: Sequence[Interval], *, measure: str, at: float, by_seed: bool = False
) -> Comparison:
    """The mean of figures of which the intervals alone are known: of one at several seeds, or at
    many layers. The side is that of `at`.
    """
    interval = average_intervals(intervals)
    seeds = tuple(one.value for one in intervals) if by_seed else ()
    return Comparison(measure, *interval, seeds, find_side(interval, seeds, at=at))


def average_intervals(intervals: Sequence[Interval]) -> Interval:
    """The means of the values and of either end.

    What the figures share (text, sequences) does not average out, so each end is as far from the
    value as the figures' own are: wider than need be where they are independent.
    """
    return Interval(*(math.fsum(column) / len(column) for column in zip(*intervals, strict=True)))


def divide_intervals(a: Interval, b: Interval) -> Interval:
    """a / b of positive figures; its ends are quotients of opposite ends, wider than need be."""
    return Interval(a.value / b.value, a.low / b.high, a.high / b.low)


def _share(plain: Tensor, given: Tensor, trained: Tensor) -> Tensor:
    return (plain - given) / (plain - trained)


def _read_steering(evidence: Evidence, name: str) -> Float[Tensor, "latents 2"]:
    """`associated` and `others_absolute` of each latent steered at `alpha`."""
    effects = [
        (row["associated"], row["others_absolute"])
        for row in evidence.tables.get("steering_latents", ())
        if row["sae"] == name and math.isclose(row["alpha"], evidence.alpha, rel_tol=1e-6)
    ]
    known = [effect for effect in effects if None not in effect]
    return torch.tensor(known, dtype=torch.float64).view(-1, 2)
