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
    """y, x̂ and the L1 penalty of weight 0.4, one latent of one row at a time."""
    all_latents, recons, l1 = [], [], torch.zeros((), dtype=torch.float64)
    for row in acts:
        latents, recon = [], p["b_dec"]
        for i in range(len(p["W_dec"])):
            z = torch.dot(s * row - p["b_dec"], p["W_enc"][:, i]) + p["b_enc"][i]
            y = z if z > 0 else z * 0
            latents.append(y)
            recon = recon + y * p["W_dec"][i]
            l1 = l1 + y * p["W_dec"][i].square().sum().sqrt()
        all_latents.append(torch.stack(latents))
        recons.append(recon / s)
    return torch.stack(all_latents), torch.stack(recons), 0.4 * l1 / len(acts)


def test_values_and_gradients_are_those_of_loops_over_rows_and_latents() -> None:
    sae, acts = make_random("relu"), draw()
    parameters = clone_parameters(sae)
    latents, recon, penalty = run_slowly(parameters, acts, s=0.7)
    loss = (recon - acts).square().sum() / len(acts) + penalty

    passed, grads = differentiate_training(sae, acts)

    torch.testing.assert_close(passed.latents.values, latents)
    torch.testing.assert_close(passed.recon, recon)
    torch.testing.assert_close(passed.penalty, penalty)
    torch.testing.assert_close(sae(acts).recon, recon)
    compare(grads, differentiate(loss, parameters))
    assert 0 < (latents > 0).double().mean() < 1


def test_longer_decoder_rows_with_smaller_latents_do_not_lower_the_penalty() -> None:
    sae, acts = make_random("relu"), draw()
    before = sae.train_forward(acts)
    with torch.no_grad():
        sae.W_dec *= 3
        sae.W_enc /= 3
        sae.b_enc /= 3
    after = sae.train_forward(acts)
    torch.testing.assert_close(after.recon, before.recon)
    torch.testing.assert_close(after.penalty, before.penalty)


def test_it_recovers_known_sparse_features_at_the_l0_wanted() -> None:
    found = recover("relu", n_steps=500)
    assert found.before < 0.6
    assert found.after >= 0.9
    assert found.l0 == pytest.approx(3, rel=0.05)
