"""Which SAEs are compared with which, and by how much they differ.

Everything is resampled before it is compared: figures over text in the same resamplings of blocks
for all SAEs, so that what the blocks share cancels; figures over latents independently, for two
dictionaries share no latent.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.evaluate.activity import Activity
from pipeline.evaluate.bootstrap import Interval, draw_weights, find_interval, resample_mean
from pipeline.evaluate.faithfulness import RESAMPLE, Sums
from pipeline.paths import format_number

Rows = Sequence[Mapping[str, Any]]
Key = tuple[str, str, str]  # figure, SAE or control, mode

_STEERING = {"associated": "associated", "others": "others_absolute"}  # figure: column


class Evidence(NamedTuple):
    """All that claims are decided from."""

    saes: Mapping[str, Mapping[str, Any]]  # metrics["saes"], with seed and gradient
    controls: Mapping[str, Mapping[str, Any]]  # metrics["controls"]
    sums: Mapping[tuple[str, str], Sums]  # by SAE or control, and mode
    activities: Mapping[str, Mapping[str, Activity]]  # by SAE and mode
    tables: Mapping[str, Rows]  # the other measurements', by name; those not made are not there
    alpha: float  # length at which steering is compared, as in the table
    draws: int  # resamplings


class Spec(NamedTuple):
    """What SAEs of several seeds have in common."""

    architecture: str
    k: int
    d_sae: int
    beta: float
    gradient: str  # that it was trained with: full | shuffled | own; of beta 0: ""

    def describe(self) -> str:
        """What sets it apart from others of its kind: "k = 32, β = 3e4"."""
        kind = "" if self.architecture == "topk" else f"{self.architecture}, "
        return f"{kind}k = {self.k}, d_sae = {self.d_sae}, β = {format_number(self.beta)}"


class Pair(NamedTuple):
    """SAEs to compare, seed by seed."""

    spec: Spec  # of ours
    ours: tuple[str, ...]
    theirs: tuple[str, ...]  # one for each of ours, of the same seed


class Comparison(NamedTuple):
    """How far two figures lie apart."""

    measure: str  # "difference", ours less theirs; "ratio", ours over theirs; "share"
    value: float  # of means over seeds
    low: float
    high: float
    by_seed: tuple[float, ...]
    side: int  # 1: ours is larger, -1: smaller, by the interval and in every seed; 0: undecided


def plan_pairs(evidence: Evidence, rival: str) -> list[Pair]:
    """Each g-SAE (beta > 0, all later losses' gradient) with its rival of the same architecture, k
    and size.

    rival "plain" is trained with beta 0, "label" the same given the gradient at inference,
    "shuffled" and "own" with another gradient and the same beta. Only seeds that both have count.
    """
    groups: dict[Spec, dict[Any, str]] = {}
    for name, facts in evidence.saes.items():
        groups.setdefault(_specify(facts), {})[facts.get("seed")] = name
    steered = {
        (control["of"], control["beta"]): name
        for name, control in evidence.controls.items()
        if control["of"]
    }
    pairs = []
    for spec, ours in sorted(groups.items()):
        if spec.gradient != "full":
            continue
        theirs = groups.get(
            spec._replace(gradient=rival)
            if rival in ("shuffled", "own")
            else spec._replace(beta=0.0, gradient=""),
            {},
        )
        if rival == "label":
            found = {seed: steered.get((name, spec.beta)) for seed, name in theirs.items()}
            theirs = {seed: name for seed, name in found.items() if name}
        seeds = [seed for seed in ours if seed in theirs]
        if seeds:
            names = (tuple(side[seed] for seed in seeds) for side in (ours, theirs))
            pairs.append(Pair(spec, *names))
    return pairs


def resample_all(evidence: Evidence) -> dict[Key, Tensor]:
    """Every figure of every SAE in every resampling."""
    found: dict[Key, Tensor] = {}
    n_blocks = {len(sums.rows) for sums in evidence.sums.values()}
    of_blocks = {n: draw_weights(n, draws=evidence.draws) for n in n_blocks}
    for (name, mode), sums in evidence.sums.items():
        weights = of_blocks[len(sums.rows)]
        found |= {(figure, name, mode): at(sums, weights) for figure, at in RESAMPLE.items()}
    for seed, (name, modes) in enumerate(evidence.activities.items(), 1):
        for mode, activity in modes.items():
            weights = draw_weights(len(activity.firings), draws=evidence.draws, seed=seed)
            found["dead", name, mode] = resample_mean(_find_dead(activity), weights)
            found["density", name, mode] = resample_median_live(activity, weights)
    for seed, name in enumerate(evidence.saes, 1):
        for figure, column in _STEERING.items():
            values = _read_steering(evidence, name, column)
            if len(values):
                weights = draw_weights(len(values), draws=evidence.draws, seed=seed)
                found[figure, name, ""] = resample_mean(values, weights)
    return found


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
    return frequencies[places.clamp(max=len(frequencies) - 1)]


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
    if as_ratio and bool((torch.stack([*theirs]) > 0).all()):
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


def compare_ratios(
    ours: Sequence[Interval], theirs: Sequence[Interval] | None = None
) -> Comparison:
    """Ratios known by their intervals, one per seed, with 1; or with those of another.

    Over seeds the geometric mean. The side is that of 1.
    """
    logs = [_log(ratio) for ratio in ours]
    if theirs is not None:
        logs = [subtract_intervals(a, _log(b)) for a, b in zip(logs, theirs, strict=True)]
    interval = Interval(*map(math.exp, average_intervals(logs)))
    by_seed = tuple(math.exp(log.value) for log in logs)
    return Comparison("ratio", *interval, by_seed, find_side(interval, by_seed, at=1.0))


def compare_cells(cells: Sequence[Interval], *, at: float, measure: str) -> Comparison:
    """One figure at many layers (or more finely): the interval of the one in the middle.

    It takes a side if more than half of the cells' intervals lie on that side of `at` and none on
    the other.
    """
    sides = [find_side(cell, at=at) for cell in cells]
    taken = {side for side in sides if side}
    decided = len(taken) == 1 and 2 * sum(map(abs, sides)) > len(cells)
    middle = sorted(cells)[(len(cells) - 1) // 2]
    # Sides against each other: the claim is of all layers, so it fails.
    side = taken.pop() if decided else -1 if len(taken) == 2 else 0
    return Comparison(measure, *middle, (), side)


def subtract_intervals(a: Interval, b: Interval) -> Interval:
    """a - b of independent figures of which the intervals alone are known.

        low  = a - b - sqrt((a - a_low)² + (b_high - b)²)
        high = a - b + sqrt((a_high - a)² + (b - b_low)²)

    Zou and Donner 2008. Wider than need be where a and b rise and fall together.
    """
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    return Interval(value, low, value + math.hypot(a.high - a.value, b.value - b.low))


def average_intervals(intervals: Sequence[Interval]) -> Interval:
    """The mean of independent figures, in the same way."""
    n = len(intervals)
    value = math.fsum(interval.value for interval in intervals) / n
    below = math.hypot(*(interval.value - interval.low for interval in intervals)) / n
    above = math.hypot(*(interval.high - interval.value for interval in intervals)) / n
    return Interval(value, value - below, value + above)


def _share(plain: Tensor, given: Tensor, trained: Tensor) -> Tensor:
    return (plain - given) / (plain - trained)


def _log(interval: Interval) -> Interval:
    return Interval(*map(math.log, interval))


def _specify(facts: Mapping[str, Any]) -> Spec:
    beta = float(facts["beta"] or 0)
    gradient = (facts.get("gradient") or "full") if beta else ""
    return Spec(facts["architecture"], facts["k"], facts["d_sae"], beta, gradient)


def _find_dead(activity: Activity) -> Tensor:
    """By latent: at which part of the ends of batches it was dead, or whether it never fired."""
    if activity.n_ends:
        return activity.dead_ends.double() / activity.n_ends
    return (activity.firings == 0).double()


def _read_steering(evidence: Evidence, name: str, column: str) -> Tensor:
    """One value per latent steered at `alpha`."""
    values = [
        row[column]
        for row in evidence.tables.get("steering_latents", ())
        if row["sae"] == name and math.isclose(row["alpha"], evidence.alpha, rel_tol=1e-6)
    ]
    return torch.tensor([v for v in values if v is not None], dtype=torch.float64)
