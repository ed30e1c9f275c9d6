"""AuxK against a version that goes row by row, for every architecture, and what it is for."""

import pytest
import torch
from torch import Tensor

import pipeline.sae.learning
from pipeline.sae import (
    ARCHITECTURES,
    SparseAutoencoder,
    TopKSAE,
    auxk_loss,
    init_weights,
    start_learning,
    take_step,
)
from tests.sae.features import D_MODEL, N_ACTIVE, OPTIONS, draw_rows

DEAD = torch.tensor([1, 4, 5, 11, 17])


def make_sae(architecture: str) -> SparseAutoencoder:
    cls = ARCHITECTURES[architecture]
    options = {name: OPTIONS[name] for name in cls.options}
    sae = cls(d_model=6, d_sae=20, k=3, **options).double()
    generator = torch.Generator().manual_seed(0)
    init_weights(sae, torch.randn(50, 6, generator=generator).double(), seed=0, scale_input=False)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec, sae.b_dec, sae.encoder_bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.input_scale.fill_(0.6)
    return sae


def draw(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    acts = torch.randn(n, 6, generator=generator).double() * 3
    return acts, torch.randint(0, OPTIONS["n_tokens"], (n,), generator=generator)


def compute_slowly(sae: SparseAutoencoder, acts: Tensor, recon: Tensor, aux_k: int) -> Tensor:
    losses = []
    for x, x_hat in zip(acts, recon.detach(), strict=True):
        centred = x * 0.6 - sae.b_dec.detach()
        z = {i: centred @ sae.W_enc[:, i] + sae.encoder_bias[i] for i in DEAD.tolist()}
        kept = sorted(z, key=lambda i: z[i].item(), reverse=True)[:aux_k]
        error = (x - x_hat) * 0.6
        for i in kept:
            if z[i] > 0:
                error = error - z[i] * sae.W_dec[i]
        losses.append((error * error).sum())
    return torch.stack(losses).mean()


# fewer than the dead, as many, and more
@pytest.mark.parametrize("aux_k", [2, 5, 9])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_value_and_gradients_reach_the_dead_and_nothing_else(architecture: str, aux_k: int) -> None:
    sae, (acts, tokens) = make_sae(architecture), draw()
    dead = torch.zeros(20, dtype=torch.bool)
    dead[DEAD] = True
    recon = sae.train_forward(acts, None, tokens).recon
    parameters = dict(sae.named_parameters())

    got = auxk_loss(sae, acts, recon, dead, aux_k=aux_k)
    expected = compute_slowly(sae, acts, recon, aux_k)

    torch.testing.assert_close(got, expected)
    gradients = [
        dict(
            zip(
                parameters,
                torch.autograd.grad(loss, list(parameters.values()), allow_unused=True),
                strict=True,
            )
        )
        for loss in (got, expected)
    ]
    bias = next(name for name, p in parameters.items() if p is sae.encoder_bias)
    for name in parameters:
        a, b = (g[name] for g in gradients)
        if name not in ("W_enc", "W_dec", bias):
            assert a is None, name
            continue
        assert a is not None
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
        rows = a.T if name == "W_enc" else a.view(20, -1)
        reached = rows.any(dim=1)
        assert reached.any(), name
        assert not reached[~dead].any(), name
        assert aux_k < len(DEAD) or torch.equal(reached, dead), name


def test_without_dead_latents_it_is_zero() -> None:
    sae, (acts, _) = make_sae("topk"), draw()
    none = torch.zeros(20, dtype=torch.bool)
    assert auxk_loss(sae, acts, sae(acts).recon, none, aux_k=3) == 0


def test_it_weighs_in_a_step_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.sae.learning, "DEAD_AFTER_TOKENS", 100)
    sae, (acts, _) = make_sae("topk"), draw()
    learner = start_learning(sae)
    learner.idle_tokens[DEAD] = 100
    dead = learner.idle_tokens >= 100
    expected = auxk_loss(sae, acts, sae(acts).recon, dead, aux_k=3)  # d_model / 2

    metrics = take_step(learner, acts, lr=1e-3, aux_weight=0.25)

    assert metrics.penalty == pytest.approx(0.25 * expected.item())


def train(aux_weight: float) -> tuple[int, float]:
    """Dead latents and loss after training from a start where most latents never win."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(d_model=D_MODEL, d_sae=96, k=N_ACTIVE)
    init_weights(sae, draw_rows(512, generator), seed=0, scale_input=True)
    with torch.no_grad():
        sae.W_enc[:, 16:] *= 0.05
    learner = start_learning(sae)
    for _ in range(200):
        metrics = take_step(learner, draw_rows(256, generator), lr=3e-3, aux_weight=aux_weight)
    return metrics.dead_latents, metrics.loss


def test_auxk_revives_latents_that_topk_leaves_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.sae.learning, "DEAD_AFTER_TOKENS", 10 * 256)
    (alone, loss_alone), (revived, loss_revived) = train(0.0), train(1 / 32)
    assert alone > 70
    assert revived < 0.6 * alone
    assert loss_revived < loss_alone
