"""Intervals whose coverage, width or ends are known in advance."""

import math

import numpy as np
import pytest
import torch

from pipeline.evaluate.bootstrap import (
    Interval,
    draw_weights,
    find_interval,
    resample_mean,
    resample_ratio,
)
from pipeline.evaluate.comparisons import (
    average_intervals,
    compare,
    compare_ratios,
    find_side,
    subtract_intervals,
)


def test_weights_are_counts_of_draws_with_replacement():
    weights = draw_weights(30, draws=500)
    assert weights.shape == (501, 30)
    assert torch.equal(weights[0], torch.ones(30).double())
    assert torch.equal(weights.sum(1), torch.full((501,), 30).double())
    # A unit stays out of a resampling with probability (1 - 1/n)^n.
    assert (weights[1:] == 0).double().mean().item() == pytest.approx((29 / 30) ** 30, abs=0.01)
    assert torch.equal(weights, draw_weights(30, draws=500))
    assert not torch.equal(weights, draw_weights(30, draws=500, seed=1))


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    weights = draw_weights(80, draws=400)
    covered = 0
    for _ in range(400):
        rows = torch.randint(5, 20, (80,), generator=generator).double()
        sums = rows * 2 + rows * torch.randn(80, generator=generator).double()
        interval = find_interval(resample_ratio(sums, rows, weights))
        covered += interval.low < 2 < interval.high
    assert 0.91 < covered / 400 < 0.975


def test_a_mean_per_token_weighs_blocks_by_their_tokens():
    weights = draw_weights(2, draws=100)
    resampled = resample_ratio(torch.tensor([10.0, 90.0]), torch.tensor([10.0, 30.0]), weights)
    assert resampled[0].item() == pytest.approx(2.5)
    assert {round(value, 6) for value in resampled.tolist()} == {1.0, 2.5, 3.0}


def test_constant_values_have_an_interval_of_no_width():
    weights = draw_weights(20, draws=100)
    assert find_interval(resample_mean(torch.full((20,), 3.0), weights)) == (3, 3, 3)


def test_ends_are_quantiles_and_nan_stays_out():
    values = torch.cat([torch.tensor([7.0]), torch.arange(1000.0), torch.tensor([torch.nan])])
    interval = find_interval(values)
    assert interval == pytest.approx((7.0, *np.quantile(np.arange(1000), [0.025, 0.975])))
    assert math.isnan(find_interval(torch.tensor([1.0, torch.nan])).low)


def test_what_blocks_share_cancels_in_a_paired_difference():
    generator = torch.Generator().manual_seed(0)
    shared, own = torch.randn(2, 100, generator=generator).double()
    weights = draw_weights(100, draws=400)
    ours = resample_mean(shared + 0.05 * own - 0.1, weights)
    theirs = resample_mean(shared, weights)
    paired = compare([ours], [theirs])
    apart = subtract_intervals(find_interval(ours), find_interval(theirs))
    assert paired.side == -1
    assert find_side(apart) == 0
    assert apart.high - apart.low > 10 * (paired.high - paired.low)
    assert paired.value == pytest.approx(apart.value)


def test_independent_normal_intervals_add_in_quadrature():
    found = subtract_intervals(Interval(5, 2, 8), Interval(1, -3, 5))
    assert found == pytest.approx((4, -1, 9))
    skew = subtract_intervals(Interval(5, 4, 8), Interval(1, 1, 5))
    assert skew == pytest.approx((4, 4 - math.hypot(1, 4), 7))
    assert average_intervals([Interval(5, 2, 8), Interval(1, -3, 5)]) == pytest.approx(
        (3, 0.5, 5.5)
    )


def test_the_difference_of_independent_means_is_covered_as_often_as_said():
    generator = torch.Generator().manual_seed(1)
    weights = draw_weights(60, draws=300)
    covered = 0
    for _ in range(300):
        a, b = torch.randn(2, 60, generator=generator).double().exp()
        found = subtract_intervals(
            find_interval(resample_mean(a, weights)), find_interval(resample_mean(2 * b, weights))
        )
        covered += found.low < -(math.exp(0.5)) < found.high
    assert 0.88 < covered / 300 < 0.985


def test_ratios_are_compared_by_their_logarithms():
    twice = Interval(2.0, 1.5, 8 / 3)
    alone = compare_ratios([twice])
    assert alone[:4] == ("ratio", pytest.approx(2), pytest.approx(1.5), pytest.approx(8 / 3))
    assert alone.side == 1
    same = compare_ratios([twice], [twice])
    assert (same.value, same.side) == (pytest.approx(1), 0)
    width = math.sqrt(2) * math.log(4 / 3)
    assert (same.low, same.high) == pytest.approx((math.exp(-width), math.exp(width)))
    seeds = compare_ratios([twice, Interval(0.5, 0.4, 0.6)])
    assert (seeds.value, seeds.by_seed) == (pytest.approx(1), pytest.approx((2, 0.5)))


def test_a_ratio_is_given_only_over_what_is_surely_positive():
    weights = draw_weights(50, draws=200)
    near, far = (torch.linspace(start, start + 1, 50).double() for start in (-0.5, 4.5))
    ours = [resample_mean(2 * far, weights)]
    assert compare(ours, [resample_mean(far, weights)], as_ratio=True)[:2] == (
        "ratio",
        pytest.approx(2),
    )
    against_none = compare(ours, [resample_mean(near, weights)], as_ratio=True)
    assert against_none[:2] == ("difference", pytest.approx(10))
    assert against_none.side == 1
