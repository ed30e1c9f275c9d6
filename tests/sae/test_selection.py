import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.sae.selection import measure_gradient_weight, measure_overlap, select

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


def test_select_refuses_k_above_d_sae() -> None:
    with pytest.raises(ConfigError, match="at most d_sae = 3, got 4"):
        select(torch.ones(1, 3), None, EYE, k=4, beta_per_token=0.0)


def test_overlap_is_counted_within_rows() -> None:
    selected = torch.tensor([[0, 1, 2], [3, 4, 5]])
    plain = torch.tensor([[2, 0, 7], [0, 1, 2]])  # row 1 shares nothing, though row 0 holds these

    assert measure_overlap(selected, plain, d_sae=8) == pytest.approx(2 / 6)


def test_gradient_weight_is_the_mean_over_selected_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    selected = torch.randint(0, 7, (1100, 3), generator=generator)  # more than two row blocks
    grads = torch.randn(1100, 4, generator=generator)
    W_dec = torch.randn(7, 4, generator=generator)

    terms = [abs(0.5 * grads[r] @ W_dec[i]).item() for r in range(1100) for i in selected[r]]

    weight = measure_gradient_weight(selected, grads, W_dec, beta_per_token=0.5)
    assert weight == pytest.approx(sum(terms) / len(terms), rel=1e-5)
