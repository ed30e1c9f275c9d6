"""Rank correlations against their definition, list by list."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluate.bootstrap import MIN_UNITS, draw_weights
from pipeline.evaluate.perturbation import rank_correlations


def slow_ranks(values: list[float]) -> list[float]:
    """Places from 1 in the sorted list; equal values share the mean of theirs."""
    places = [[i + 1 for i, v in enumerate(sorted(values)) if v == value] for value in values]
    return [sum(place) / len(place) for place in places]


def slow_rho(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(slow_ranks(a), slow_ranks(b))[0, 1])


pairs = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=MIN_UNITS, max_size=14
).filter(lambda drawn: all(len(set(column)) > 1 for column in zip(*drawn, strict=True)))


@given(pairs, st.integers(0, 1000))
def test_rank_correlations_equal_the_definition_in_every_resampling(drawn, seed):
    a, b = (list(map(float, column)) for column in zip(*drawn, strict=True))
    weights = draw_weights(len(a), draws=3, seed=seed)
    found = rank_correlations(as_tensor(a), as_tensor(b), weights)
    for counts, rho in zip(weights.long().tolist(), found.tolist(), strict=True):
        resampled = [
            [value for value, count in zip(column, counts, strict=True) for _ in range(count)]
            for column in (a, b)
        ]
        if any(len(set(column)) == 1 for column in resampled):
            assert math.isnan(rho)
        else:
            assert rho == pytest.approx(slow_rho(*resampled), abs=1e-9)


@pytest.mark.parametrize(
    ("b", "rho"),
    [
        ([1.0, 10, 100, 1e6], 1),  # the order alone counts
        ([4.0, 3, 2, 1], -1),
        ([1.0, 1, 2, 2], 4 / math.sqrt(20)),
    ],
)
def test_known_rank_correlations(b, rho):
    found = rank_correlations(as_tensor([1.0, 2, 3, 4]), as_tensor(b), torch.ones(1, 4).double())
    assert found.item() == pytest.approx(rho)


def as_tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
