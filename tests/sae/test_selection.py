import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.sae.selection import (
    Latents,
    count_shared,
    find_largest,
    select,
    sum_gradient_weight,
)

EYE = torch.eye(3)

# pre-activations, gradient, beta per token, k -> kept values by latent, for W_dec = identity
CASES = [
    # plain TopK keeps the largest
    ([1.0, 2.0, 3.0], [10.0, 1.0, 0.0], 0.0, 1, {2: 3.0}),
    # scores 11, 4, 3: the gradient brings the smallest in, with its own value
    ([1.0, 2.0, 3.0], [10.0, 1.0, 0.0], 1.0, 1, {0: 1.0}),
    # the gradient's sign does not matter
    ([1.0, 2.0, 3.0], [-10.0, 1.0, 0.0], 1.0, 1, {0: 1.0}),
    # scores 11, 4, 3 again, two of them
    ([1.0, 2.0, 3.0], [10.0, 1.0, 0.0], 1.0, 2, {0: 1.0, 1: 2.0}),
    # scores are signed: a strong gradient pushes a negative latent further down
    ([-1.0, 0.5, 0.2], [10.0, 0.0, 0.0], 1.0, 2, {1: 0.5, 2: 0.2}),
    # where k reaches negative latents, the ReLU leaves them zero
    ([-1.0, -2.0, 3.0], [0.0, 0.0, 0.0], 1.0, 2, {2: 3.0, 0: 0.0}),
]


@pytest.mark.parametrize(("pre_acts", "grad", "beta", "k", "expected"), CASES)
def test_select(
    pre_acts: list[float], grad: list[float], beta: float, k: int, expected: dict[int, float]
) -> None:
    latents = select(torch.tensor([pre_acts]), torch.tensor([grad]), EYE, k=k, beta_per_token=beta)

    kept = dict(zip(latents.indices[0].tolist(), latents.values[0].tolist(), strict=True))
    assert kept == pytest.approx(expected)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), d_sae=st.integers(1, 30), share=st.floats(0, 1))
def test_no_latent_left_out_scores_higher(seed: int, d_sae: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(share * d_sae))
    pre_acts = torch.randn(3, d_sae, generator=generator, dtype=torch.float64)
    grads = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    W_dec = torch.randn(d_sae, 4, generator=generator, dtype=torch.float64)

    latents = select(pre_acts, grads, W_dec, k=k, beta_per_token=0.7)

    for row in range(3):
        scores = {
            i: (pre_acts[row, i] * (1 + 0.7 * (W_dec[i] @ grads[row]).abs())).item()
            for i in range(d_sae)
        }
        kept = latents.indices[row].tolist()
        assert len(set(kept)) == k
        assert min(scores[i] for i in kept) >= max(
            (score for i, score in scores.items() if i not in kept), default=-torch.inf
        )
        assert latents.values[row].tolist() == [max(pre_acts[row, i].item(), 0.0) for i in kept]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32))
def test_beta_zero_is_plain_topk_bit_for_bit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # few distinct values, so that there are ties
    pre_acts = torch.randint(-3, 4, (6, 12), generator=generator).float() / 3
    grads = 1e20 * torch.randn(6, 4, generator=generator)
    W_dec = torch.randn(12, 4, generator=generator)

    weighted = select(pre_acts, grads, W_dec, k=5, beta_per_token=0.0)
    plain = select(pre_acts, None, W_dec, k=5, beta_per_token=0.0)

    assert torch.equal(weighted.indices, plain.indices)
    assert torch.equal(weighted.values, plain.values)
    largest = pre_acts.sort(dim=1, descending=True).values[:, :5].relu()
    assert torch.equal(weighted.values.sort(dim=1, descending=True).values, largest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("d_sae", "k", "shift"),
    [
        (1280, 5, 0.0),  # 160 groups of 8, and 20 groups of these
        (1280, 2, 0.0),  # 20 groups are no whole groups themselves
        (1280, 40, 0.0),  # as many groups as two stages need
        (1280, 41, 0.0),  # one less
        (1285, 5, 0.0),  # no whole groups
        (1280, 5, -10.0),  # no score above zero
        (1280, 5, -2.6),  # fewer than k above zero in some rows
    ],
)
def test_search_by_groups_finds_what_a_sort_finds(
    dtype: torch.dtype, d_sae: int, k: int, shift: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(40, d_sae, generator=generator) + shift).to(dtype)
    scores[3] = 0.5  # all equal

    indices = find_largest(scores, k=k)

    assert all(len(set(row)) == k for row in indices.tolist())
    found = scores.gather(1, indices).sort(dim=1, descending=True).values
    assert torch.equal(found, scores.sort(dim=1, descending=True).values[:, :k])


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_kept_and_so_seen(bad: float) -> None:
    scores = torch.randn(8, 1280, generator=torch.Generator().manual_seed(0))
    scores[5] = bad
    kept = scores.gather(1, find_largest(scores, k=5))
    assert not kept[5].isfinite().any()
    assert kept[:5].isfinite().all()


def test_select_refuses_k_above_d_sae() -> None:
    with pytest.raises(ConfigError, match="at most d_sae = 3, got 4"):
        select(torch.ones(1, 3), None, EYE, k=4, beta_per_token=0.0)


def test_overlap_is_counted_within_rows() -> None:
    selected = torch.tensor([[0, 1, 2], [3, 4, 5]])
    plain = torch.tensor([[2, 0, 7], [0, 1, 2]])  # row 1 shares nothing, though row 0 holds these

    ones = torch.ones(2, 3)
    assert count_shared(Latents(ones, selected), Latents(ones, plain), d_sae=8) == 2


def test_overlap_leaves_out_what_only_fills_a_row_up() -> None:
    selected = Latents(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[3, 0], [0, 1]]))
    values = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    plain = Latents(values, torch.tensor([[0, 3, 1], [0, 1, 2]]))

    assert count_shared(selected, plain, d_sae=4) == 2  # 3 in row 0, 1 in row 1


def test_gradient_weight_is_summed_over_latents_in_use() -> None:
    generator = torch.Generator().manual_seed(0)
    selected = torch.randint(0, 7, (1100, 3), generator=generator)  # more than two row blocks
    grads = torch.randn(1100, 4, generator=generator)
    W_dec = torch.randn(7, 4, generator=generator)

    values = torch.randint(0, 2, (1100, 3), generator=generator).float()

    terms = [
        abs(0.5 * grads[r] @ W_dec[selected[r, i]]).item() for r, i in values.nonzero().tolist()
    ]

    weight = sum_gradient_weight(Latents(values, selected), grads, W_dec, beta_per_token=0.5)
    assert weight.item() == pytest.approx(sum(terms), rel=1e-5)
