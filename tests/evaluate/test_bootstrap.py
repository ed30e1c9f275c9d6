"""Intervals whose coverage, width or ends are known in advance."""

import math

import numpy as np
import pytest
import torch

from pipeline.evaluate.bootstrap import (
    MIN_UNITS,
    Interval,
    draw_weights,
    find_interval,
    resample_mean,
    resample_ratio,
    spread_interval,
    sum_by,
)
from pipeline.evaluate.comparisons import (
    average_intervals,
    compare,
    compare_intervals,
    divide_intervals,
    find_side,
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
    weights = draw_weights(8, draws=100)
    sums, rows = torch.tensor([10.0, 90.0]).repeat(4), torch.tensor([10.0, 30.0]).repeat(4)
    resampled = resample_ratio(sums, rows, weights)
    assert resampled[0].item() == pytest.approx(2.5)
    light = weights[:, ::2].sum(1)
    expected = (10 * light + 90 * (8 - light)) / (10 * light + 30 * (8 - light))
    torch.testing.assert_close(resampled, expected)


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
    apart = find_interval(ours - theirs[torch.cat([torch.tensor([0]), torch.randperm(400) + 1])])
    assert paired.side == -1
    assert find_side(apart) == 0
    assert apart.high - apart.low > 10 * (paired.high - paired.low)
    assert paired.value == pytest.approx(apart.value)


def test_intervals_average_as_if_all_were_of_one_text():
    found = average_intervals([Interval(5, 2, 8), Interval(1, -3, 5)])
    assert found == pytest.approx((3, -0.5, 6.5))


def test_the_mean_of_seeds_of_one_text_is_covered_as_often_as_said():
    """What the text does to every seed alike does not average out."""
    generator = torch.Generator().manual_seed(1)
    weights = draw_weights(60, draws=300)
    covered = 0
    for _ in range(200):
        shared = torch.randn(60, generator=generator).double()
        seeds = [shared + torch.randn(60, generator=generator).double() / 3 for _ in range(4)]
        found = compare_intervals(
            [find_interval(resample_mean(seed, weights)) for seed in seeds],
            measure="difference",
            at=0.0,
            by_seed=True,
        )
        covered += found.low < 0 < found.high
    assert 0.91 < covered / 200 < 0.995


def test_ratios_divide_by_opposite_ends():
    ratio = divide_intervals(Interval(2, 1.5, 3), Interval(1, 0.5, 2))
    assert ratio == pytest.approx((2, 0.75, 6))
    found = compare_intervals([ratio], measure="ratio", at=1.0, by_seed=True)
    assert (found[:4], found.by_seed, found.side) == (("ratio", *ratio), (2,), 0)
    above = compare_intervals([Interval(2, 1.5, 3)] * 2, measure="ratio", at=1.0)
    assert (above.by_seed, above.side) == ((), 1)


def test_ten_units_are_enough_and_few_decide_nothing():
    generator = torch.Generator().manual_seed(0)
    weights = draw_weights(10, draws=400)
    covered = 0
    for _ in range(400):
        interval = find_interval(
            resample_mean(torch.randn(10, generator=generator).double(), weights)
        )
        covered += interval.low < 0 < interval.high
    assert 0.85 < covered / 400 < 0.97
    for n in (1, MIN_UNITS - 1):
        weights = draw_weights(n, draws=50)
        assert torch.equal(weights[0], torch.ones(n).double())
        ours, theirs = (resample_mean(torch.full((n,), x), weights) for x in (3.0, 1.0))
        interval = find_interval(ours)
        assert interval.value == 3
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
        assert spread_interval("it", interval) == {"it": 3, "it_low": None, "it_high": None}
        assert [compare([ours], [theirs], as_ratio=ratio).side for ratio in (True, False)] == [0, 0]
        assert compare([ours], [theirs], as_ratio=True).value == 3
    assert math.isfinite(find_interval(resample_mean(torch.ones(8), draw_weights(8, draws=9))).low)


def test_sums_by_label():
    values = torch.tensor([[1.0, 10], [2, 20], [4, 40]])
    assert sum_by(torch.tensor([7, 3, 7]), values).tolist() == [[2, 20], [5, 50]]


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
