"""Steps, learning rates and k as tables."""

import math

import pytest

from pipeline.errors import TrainError
from pipeline.schedules import find_k, find_lr, plan_k, plan_lr, plan_steps
from tests.test_member import make_config

# n_rows, epochs, tokens, steps -> steps of 64 rows
STEPS = [
    (640, 1, None, None, 10),  # all rows
    (650, 1, None, None, 10),  # the last 10 rows make no batch
    (650, 2, None, None, 20),  # batches run on across epochs
    (650, 1, 200, None, 3),
    (650, 1, 650, None, 10),
    (650, 2, 651, None, 10),
    (650, 1, None, 3, 3),
    (650, 1, None, 10, 10),
    (650, 2, None, 20, 20),  # more than an epoch has
]


@pytest.mark.parametrize(("n_rows", "epochs", "tokens", "steps", "n_steps"), STEPS)
def test_plan_steps(
    n_rows: int, epochs: int, tokens: int | None, steps: int | None, n_steps: int
) -> None:
    config = make_config(epochs=epochs, tokens=tokens, steps=steps)
    assert plan_steps(config, n_rows) == n_steps


def test_more_than_there_is_is_an_error_with_both_counts() -> None:
    with pytest.raises(TrainError, match=r"at most 1300 \(2 epochs of 650 rows\), got 1301"):
        plan_steps(make_config(epochs=2, tokens=1301), 650)
    with pytest.raises(TrainError, match=r"steps: expected at most 20 \(2 epochs.*got 21.*--steps"):
        plan_steps(make_config(epochs=2, steps=21), 650)


@pytest.mark.parametrize(
    ("tokens", "steps", "n_rows", "words"),
    [
        (63, None, 650, "train.tokens: expected at least one batch of 64 rows, got 63. Raise"),
        (None, None, 63, "train.batch_size: expected at most the 63 rows to train on, got 64"),
        (None, 3, 63, "train.batch_size: expected at most the 63 rows to train on, got 64"),
        (None, None, 0, "train.exclude_positions: expected to leave rows to train on, got none"),
    ],
)
def test_less_than_a_batch_is_an_error_that_names_its_cause(
    tokens: int | None, steps: int | None, n_rows: int, words: str
) -> None:
    with pytest.raises(TrainError, match=words):
        plan_steps(make_config(tokens=tokens, steps=steps), n_rows)


def test_linear_lr_is_a_trapezium() -> None:
    rates = [plan_lr(step, 20, lr=4.0, warmup=0.15, decay=0.2) for step in range(20)]
    assert rates == pytest.approx([1, 2, 3, *[4] * 13, 3.2, 2.4, 1.6, 0.8])


def test_linear_decay_ends_at_a_fraction_of_lr_one_step_after_the_last() -> None:
    rates = [plan_lr(step, 8, lr=1.0, warmup=0.0, decay=0.5, end=0.5) for step in range(8)]
    assert rates == pytest.approx([1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6])


def test_cosine_decay_is_half_a_wave() -> None:
    """smol-sae's: from 1e-4 at the start to 1e-5 one step after the last."""
    rates = [
        plan_lr(step, 99, lr=1e-4, warmup=0.0, decay=1.0, shape="cosine", end=0.1)
        for step in range(99)
    ]
    wanted = [
        1e-5 + (1e-4 - 1e-5) * (1 + math.cos(math.pi * (step + 1) / 100)) / 2 for step in range(99)
    ]
    assert rates == pytest.approx(wanted, rel=1e-12)
    assert rates[49] == pytest.approx(5.5e-5)  # the middle


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (0.5, 0.5), (0.9, 0.0), (0.0, 0.9)])
@pytest.mark.parametrize("n_steps", [1, 2, 7, 100])
def test_lr_is_positive_and_at_most_lr(
    n_steps: int, warmup: float, decay: float, shape: str
) -> None:
    rates = [
        plan_lr(step, n_steps, lr=1.0, warmup=warmup, decay=decay, shape=shape)
        for step in range(n_steps)
    ]
    assert all(0 < rate <= 1 for rate in rates)


def test_find_lr_takes_every_setting() -> None:
    """Two steps of warm-up, four of decay, of eight."""
    config = make_config(
        lr=6.0, lr_warmup_fraction=0.25, lr_decay_fraction=0.5, lr_decay="cosine",
        lr_end_fraction=0.5,
    )  # fmt: skip
    rates = [find_lr(config, step, 8) for step in range(8)]
    cosines = [3 + 3 * (1 + math.cos(math.pi * i / 5)) / 2 for i in (1, 2, 3, 4)]
    assert rates == pytest.approx([2, 4, 6, 6, *cosines])


# n_steps, k, k_start, fraction -> k of each step
KS = [
    (4, 3, None, 0.0, [3, 3, 3, 3]),
    (6, 2, 8, 0.5, [8, 6, 4, 2, 2, 2]),
    (4, 2, 8, 1.0, [8, 6, 4, 2]),  # the last step has k itself, whatever the fraction
    (3, 5, 5, 1.0, [5, 5, 5]),
    (1, 2, 8, 1.0, [2]),
    (5, 2, 4, 0.8, [4, 4, 3, 2, 2]),  # 3.5 is rounded to the even 4, 2.5 to 2
]


@pytest.mark.parametrize(("n_steps", "k", "k_start", "fraction", "wanted"), KS)
def test_plan_k(
    n_steps: int, k: int, k_start: int | None, fraction: float, wanted: list[int]
) -> None:
    assert [
        plan_k(step, n_steps, k=k, k_start=k_start, fraction=fraction) for step in range(n_steps)
    ] == wanted
    config = make_config(ks=(k,), k_start=k_start, k_anneal_fraction=fraction)
    assert [find_k(config, step, n_steps, k=k) for step in range(n_steps)] == wanted
