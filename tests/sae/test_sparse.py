"""The sparse encoder and decoder against slow dense ones, in values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.sae.selection import Latents
from pipeline.sae.sparse import ROW_BLOCK, decode_rows, encode_rows

NAMES = ("acts", "W_enc", "b_enc", "W_dec", "b_dec")


def run_dense(p: dict[str, Tensor], grads: Tensor, *, k: int, beta_per_token: float) -> Tensor:
    z = (p["acts"] - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    scores = z + beta_per_token * z * (grads @ p["W_dec"].T).abs()
    kept = torch.zeros_like(z).scatter(1, scores.topk(k, dim=1).indices, 1.0)
    return (z * kept).relu() @ p["W_dec"] + p["b_dec"]


def run_sparse(p: dict[str, Tensor], grads: Tensor, *, k: int, beta_per_token: float) -> Tensor:
    latents = encode_rows(
        p["acts"],
        grads,
        p["W_enc"],
        p["b_enc"],
        p["W_dec"],
        p["b_dec"],
        k=k,
        beta_per_token=beta_per_token,
    )
    return decode_rows(latents, p["W_dec"]) + p["b_dec"]


def draw(
    batch: int, d_model: int, d_sae: int, *, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, d_model), (d_model, d_sae), (d_sae,), (d_sae, d_model), (d_model,)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    grads = torch.randn(batch, d_model, generator=generator, dtype=torch.float64)
    return {n: t.requires_grad_() for n, t in zip(NAMES, drawn, strict=True)}, grads


def assert_same(p: dict[str, Tensor], grads: Tensor, *, k: int, beta_per_token: float) -> None:
    results = []
    for run in (run_dense, run_sparse):
        recon = run(p, grads, k=k, beta_per_token=beta_per_token)
        loss = (recon - p["acts"].detach()).square().sum(dim=1).mean()
        results.append((recon, *torch.autograd.grad(loss, list(p.values()))))
    for name, dense, sparse in zip(("recon", *NAMES), *results, strict=True):
        torch.testing.assert_close(
            sparse, dense, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: n + m
        )


@settings(deadline=None)
@given(
    batch=st.integers(1, 20),
    d_model=st.integers(1, 8),
    d_sae=st.integers(1, 24),
    share=st.floats(0, 1),
    beta_per_token=st.sampled_from([0.0, 0.3, 100.0]),
    seed=st.integers(0, 2**32),
)
def test_values_and_gradients_equal_the_dense_ones(
    batch: int, d_model: int, d_sae: int, share: float, beta_per_token: float, seed: int
) -> None:
    parameters, grads = draw(batch, d_model, d_sae, seed=seed)
    k = max(1, round(share * d_sae))
    assert_same(parameters, grads, k=k, beta_per_token=beta_per_token)


# rows around the block size: one block, exactly one, one more, a partial third
@pytest.mark.parametrize("batch", [ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK + 7])
def test_row_blocks_do_not_change_the_result(batch: int) -> None:
    parameters, grads = draw(batch, 5, 17)
    assert_same(parameters, grads, k=4, beta_per_token=0.5)


@pytest.mark.parametrize("beta_per_token", [0.0, 0.5])
def test_a_dictionary_that_is_searched_in_two_stages(beta_per_token: float) -> None:
    parameters, grads = draw(300, 6, 2048)  # 256 rows are searched at once
    assert_same(parameters, grads, k=7, beta_per_token=beta_per_token)


def test_encoder_weights_may_lie_in_memory_either_way() -> None:
    parameters, grads = draw(30, 6, 320)
    turned = parameters["W_enc"].detach().T.contiguous().T.requires_grad_()
    assert_same(parameters | {"W_enc": turned}, grads, k=3, beta_per_token=0.5)


def test_gradients_agree_with_finite_differences() -> None:
    parameters, grads = draw(4, 3, 9)

    def run(*tensors: Tensor) -> Tensor:
        named: dict[str, Tensor] = dict(zip(NAMES, tensors, strict=True))
        return run_sparse(named, grads, k=3, beta_per_token=0.5)

    assert torch.autograd.gradcheck(run, tuple(parameters.values()))


def test_frozen_inputs_and_no_grad() -> None:
    parameters, grads = draw(4, 3, 9)
    frozen = {name: tensor.detach() for name, tensor in parameters.items()}

    recon = run_sparse(frozen, grads, k=3, beta_per_token=0.5)

    assert not recon.requires_grad
    torch.testing.assert_close(recon, run_dense(frozen, grads, k=3, beta_per_token=0.5))


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    parameters, grads = draw(4, 3, 9)
    recon = run_sparse(parameters, grads, k=3, beta_per_token=0.5)
    (first,) = torch.autograd.grad(recon.square().sum(), parameters["W_enc"], create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_decode_of_a_latent_that_repeats_in_many_rows() -> None:
    W_dec = torch.arange(6.0).view(3, 2).requires_grad_()
    latents = Latents(torch.tensor([[2.0], [3.0]]), torch.tensor([[1], [1]]))

    recon = decode_rows(latents, W_dec)
    recon.sum().backward()

    assert recon.tolist() == [[4.0, 6.0], [6.0, 9.0]]
    assert W_dec.grad is not None
    assert W_dec.grad.tolist() == [[0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]
