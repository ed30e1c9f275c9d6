import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.sae import TopKSAE, init_weights, reconstruction_loss


def make_sae(*, scale: float = 1.0, beta: float = 3.0, seed: int = 0) -> TopKSAE:
    sae = TopKSAE(d_model=6, d_sae=20, k=4, beta=beta, loss_tokens=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.input_scale.fill_(scale)
    return sae


def draw(n: int = 50, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator) * 7, torch.randn(n, 6, generator=generator)


def test_it_computes_the_paper_s_equations_row_by_row() -> None:
    sae, (acts, grads) = make_sae(), draw()

    recon, latents = sae(acts, grads)

    for row in range(len(acts)):
        z = sae.W_enc.T @ (acts[row] - sae.b_dec) + sae.b_enc
        a = sae.W_dec @ grads[row]
        kept = (z + 3.0 / 2 * z * a.abs()).argsort(descending=True)[:4]
        y = torch.zeros(20)
        y[kept] = z[kept].clamp(min=0)
        assert set(latents.indices[row].tolist()) == set(kept.tolist())
        torch.testing.assert_close(recon[row], sae.W_dec.T @ y + sae.b_dec, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.01, 0.37, 1.0, 250.0])
def test_input_scaling_changes_neither_selection_nor_units(scale: float) -> None:
    scaled, (acts, grads) = make_sae(scale=scale), draw()
    folded = make_sae()
    with torch.no_grad():
        folded.b_enc.copy_(scaled.b_enc / scale)
        folded.b_dec.copy_(scaled.b_dec / scale)

    got, expected = scaled(acts, grads), folded(acts, grads)

    indices = got.latents.indices.sort(dim=1).values
    assert torch.equal(indices, expected.latents.indices.sort(dim=1).values)
    torch.testing.assert_close(got.recon, expected.recon, rtol=1e-4, atol=1e-3)


def test_the_gradient_steers_the_selection_and_without_it_beta_does_nothing() -> None:
    acts, grads = draw()
    steered, plain = make_sae(beta=1e3), make_sae(beta=0.0)

    assert not torch.equal(steered.encode(acts, grads).indices, plain.encode(acts).indices)
    assert torch.equal(steered(acts).recon, plain(acts).recon)
    assert torch.equal(plain(acts, grads).recon, plain(acts).recon)


def test_half_precision_input_is_read_in_float32() -> None:
    sae, (acts, grads) = make_sae(), draw()
    half = sae(acts.half(), grads.half()).recon
    assert half.dtype == torch.float32
    assert torch.equal(half, sae(acts.half().float(), grads.half().float()).recon)


def test_reconstruction_loss_is_summed_over_d_model_and_averaged_over_the_batch() -> None:
    acts, recon = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 1.0]])
    loss = reconstruction_loss(acts, recon, input_scale=torch.tensor(3.0))
    assert loss.item() == pytest.approx(9 * (9 + 1) / 2)


def test_init_weights() -> None:
    sae, (acts, _) = make_sae(), draw()
    acts = acts + 5

    init_weights(sae, acts, seed=3, scale_input=True)

    scale = math.sqrt(6) / acts.norm(dim=1).mean()
    torch.testing.assert_close(sae.input_scale, scale)
    torch.testing.assert_close(sae.b_dec, acts.mean(dim=0) * scale)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()


def test_init_weights_is_decided_by_its_seed() -> None:
    acts, _ = draw()
    saes = [make_sae(seed=9), make_sae(), make_sae()]
    for sae, seed in zip(saes, (0, 0, 1), strict=True):
        init_weights(sae, acts, seed=seed, scale_input=False)

    assert torch.equal(saes[0].W_dec, saes[1].W_dec)
    assert not torch.equal(saes[1].W_dec, saes[2].W_dec)
    assert saes[0].input_scale == 1


@pytest.mark.parametrize("k", [0, 21])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=f"1 to d_sae = 20, got {k}"):
        TopKSAE(d_model=6, d_sae=20, k=k)


@pytest.mark.parametrize(
    "weights", [{"beta": -1.0}, {"beta": math.nan}, {"beta": math.inf}, {"loss_tokens": 0}]
)
def test_weights_that_weigh_nothing_are_refused(weights: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="beta and loss_tokens at TopKSAE: expected a finite"):
        TopKSAE(d_model=6, d_sae=20, k=4, **weights)
