"""bfloat16 products with float32 weights: how far they may be from float32, and what stays exact.

A number rounded to bfloat16 is off by at most U = 2^-8 of itself. A product of two rounded rows
sums terms that are each off by at most 2 U + U^2, and is rounded once more.
"""

import pytest
import torch
from torch import Tensor

from pipeline.sae import Latents, TopKSAE, init_weights, start_learning, take_step
from pipeline.sae.sparse import decode_rows, encode_rows

U = 2.0**-8
D_MODEL, D_SAE, K = 32, 1280, 6  # large enough for the two stages of the search
NAMES = ("acts", "W_enc", "b_enc", "W_dec", "b_dec")


def draw(batch: int = 70) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, D_MODEL), (D_MODEL, D_SAE), (D_SAE,), (D_SAE, D_MODEL), (D_MODEL,)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = torch.randn(batch, D_MODEL, generator=generator)
    return {n: t.requires_grad_() for n, t in zip(NAMES, drawn, strict=True)}, grads


def encode(
    p: dict[str, Tensor], grads: Tensor | None, dtype: torch.dtype | None, *, beta: float = 0.3
) -> Latents:
    return encode_rows(
        *(p["acts"], grads, p["W_enc"], p["b_enc"], p["W_dec"], p["b_dec"]),
        k=K,
        beta_per_token=beta,
        product_dtype=dtype,
    )


def bound_products(rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """How far a bfloat16 product may be from the exact one, whatever the order of its sum."""
    exact = rows @ weights + (0 if bias is None else bias)
    terms = rows.abs() @ weights.abs() + (0 if bias is None else bias.abs())
    return (2 * U + U**2) * terms + 2 * U * (exact.abs() + 3 * U * terms)


def exact_parts(p: dict[str, Tensor], grads: Tensor) -> tuple[Tensor, ...]:
    """z and grads @ W_dec^T in float64, and how far the bfloat16 ones may be from them."""
    q = {name: tensor.detach().double() for name, tensor in p.items()}
    centred, g = q["acts"] - q["b_dec"], grads.double()
    z, a = centred @ q["W_enc"] + q["b_enc"], g @ q["W_dec"].T
    z_off = bound_products(centred, q["W_enc"], q["b_enc"])
    return z, a, z_off, bound_products(g, q["W_dec"].T)


def test_values_are_float32_and_within_the_bound_of_the_exact_ones() -> None:
    p, grads = draw()
    latents = encode(p, grads, torch.bfloat16)

    z, _, z_off, _ = exact_parts(p, grads)
    off = (latents.values - z.gather(1, latents.indices).relu()).abs()
    assert latents.values.dtype == torch.float32
    assert (off <= z_off.gather(1, latents.indices)).all()
    assert off.max() > 1e-4  # they are bfloat16's indeed


@pytest.mark.parametrize("beta", [0.0, 0.3, 30.0])
def test_no_latent_is_left_out_whose_score_is_larger_by_more_than_the_bound(beta: float) -> None:
    p, grads = draw()
    latents = encode(p, grads, torch.bfloat16, beta=beta)

    z, a, z_off, a_off = exact_parts(p, grads)
    scores = z * (1 + beta * a.abs())
    weight = 1 + beta * (a.abs() + a_off)
    scores_off = z_off * weight + z.abs() * beta * a_off
    scores_off += 2 * U * (scores.abs() + scores_off)  # the score itself is rounded
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, latents.indices, True)
    least_kept = (scores + scores_off).masked_fill(~kept, torch.inf).amin(1)
    most_left = (scores - scores_off).masked_fill(kept, -torch.inf).amax(1)
    assert (kept.sum(dim=1) == K).all()
    assert (least_kept >= most_left).all()


def test_gradients_are_the_float32_ones_of_the_kept_latents() -> None:
    p, grads = draw()
    latents = encode(p, grads, torch.bfloat16)
    recon = decode_rows(latents, p["W_dec"]) + p["b_dec"]
    target = torch.randn(recon.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((recon * target).sum(), list(p.values()))

    kept = (latents.values > 0).float()
    z = (p["acts"] - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    # The float32 values' derivative at the values that the bfloat16 products gave.
    values = z.gather(1, latents.indices) * kept
    values = values + (latents.values - values).detach()
    dense = torch.zeros_like(z).scatter(1, latents.indices, values)
    wanted = torch.autograd.grad(
        ((dense @ p["W_dec"] + p["b_dec"]) * target).sum(), list(p.values())
    )
    for name, one, other in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: n + m)


def test_the_same_call_gives_the_same_bits() -> None:
    p, grads = draw()
    first, second = (encode(p, grads, torch.bfloat16) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.indices, second.indices)


def test_without_gradient_weight_the_gradients_are_not_read() -> None:
    p, grads = draw()
    plain, steered = encode(p, None, torch.bfloat16), encode(p, grads * torch.nan, None, beta=0.0)
    exact = encode(p, None, None)
    assert torch.equal(steered.indices, exact.indices)
    assert torch.equal(steered.values, exact.values)
    assert not torch.equal(plain.values, exact.values)


def test_training_in_bfloat16_learns_as_float32_does() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, D_MODEL, generator=generator)
    codes = torch.rand(4000, 64, generator=generator) * (
        torch.rand(4000, 64, generator=generator) < 0.05
    )
    acts, last = codes @ directions, {}
    grads = torch.randn(acts.shape, generator=generator) / 100
    for dtype in (None, torch.bfloat16):
        sae = TopKSAE(d_model=D_MODEL, d_sae=256, k=4, beta=10.0, loss_tokens=1)
        init_weights(sae, acts, seed=0, scale_input=True)
        sae.product_dtype = dtype
        learner = start_learning(sae)
        losses = [
            take_step(learner, acts[here], grads[here], lr=3e-3).loss
            for epoch in range(12)
            for here in (slice(0, 2000), slice(2000, 4000))
        ]
        assert all(p.dtype == torch.float32 for p in sae.parameters())
        assert losses[-1] < 0.5 * losses[0]
        last[dtype] = losses[-1]
    assert last[torch.bfloat16] == pytest.approx(last[None], rel=0.05)
    assert last[torch.bfloat16] != last[None]
