import math

import pytest
import torch
from torch import Tensor

from tests.sae.steered import (
    clone_parameters,
    compare,
    differentiate,
    differentiate_training,
    draw,
    make_random,
    recover,
)


def run_slowly(p: dict[str, Tensor], acts: Tensor, *, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x̂ and the penalty (L1 of weight 0.4, auxiliary error), one latent of one row at a time."""
    frozen = {name: tensor.detach() for name, tensor in p.items()}
    all_latents, recons, penalty = [], [], torch.zeros((), dtype=torch.float64)
    for row in acts:
        latents, recon, from_gate = [], p["b_dec"], frozen["b_dec"]
        for i in range(len(p["W_dec"])):
            projected = torch.dot(s * row - p["b_dec"], p["W_enc"][:, i])
            gate = projected + p["b_gate"][i]
            magnitude = projected * torch.exp(p["r_mag"][i]) + p["b_mag"][i]
            y = magnitude if gate > 0 and magnitude > 0 else magnitude * 0
            latents.append(y)
            recon = recon + y * p["W_dec"][i]
            if gate > 0:
                from_gate = from_gate + gate * frozen["W_dec"][i]
                penalty = penalty + 0.4 * gate * math.hypot(*frozen["W_dec"][i].tolist())
        penalty = penalty + (s * row - from_gate).square().sum()
        all_latents.append(torch.stack(latents))
        recons.append(recon / s)
    return torch.stack(all_latents), torch.stack(recons), penalty / len(acts)


def test_values_and_gradients_are_those_of_loops_over_rows_and_latents() -> None:
    sae, acts = make_random("gated"), draw()
    parameters = clone_parameters(sae)
    latents, recon, penalty = run_slowly(parameters, acts, s=0.7)
    loss = (recon - acts).square().sum() / len(acts) + penalty

    passed, grads = differentiate_training(sae, acts)

    torch.testing.assert_close(passed.latents.values, latents)
    torch.testing.assert_close(passed.recon, recon)
    torch.testing.assert_close(passed.penalty, penalty)
    torch.testing.assert_close(sae(acts).recon, recon)
    compare(grads, differentiate(loss, parameters))
    assert grads["b_gate"].any()
    assert grads["r_mag"].any()


def test_the_penalty_has_no_gradient_for_the_decoder() -> None:
    sae = make_random("gated")
    grads = differentiate(sae.train_forward(draw()).penalty, dict(sae.named_parameters()))
    assert not grads["W_dec"].any()
    assert grads["W_enc"].any()


def test_longer_decoder_rows_with_a_smaller_gate_do_not_lower_the_penalty() -> None:
    sae, acts = make_random("gated"), draw()
    before = sae.train_forward(acts).penalty
    with torch.no_grad():
        sae.W_dec *= 3
        sae.W_enc /= 3
        sae.b_gate /= 3
    torch.testing.assert_close(sae.train_forward(acts).penalty, before)


def test_its_parameters_are_those_of_the_format_that_it_is_exported_to() -> None:
    names = {name for name, _ in make_random("gated").named_parameters()}
    assert names == {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}


def test_it_recovers_known_sparse_features_at_the_l0_wanted() -> None:
    found = recover("gated", n_steps=700)
    assert found.before < 0.6
    assert found.after >= 0.9
    assert found.l0 == pytest.approx(3, rel=0.05)
