"""Switch against a version that goes row by row, and its router's balance."""

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.sae import TopKSAE, init_weights, start_learning, take_step
from pipeline.sae.group import Group
from pipeline.sae.switch import LOAD_BALANCE, SwitchSAE

SIZE, N_EXPERTS = 5, 4
SETTINGS = {"d_model": 6, "d_sae": SIZE * N_EXPERTS, "k": 2, "beta": 3.0, "loss_tokens": 2}


def make_sae(scale: float = 0.5) -> SwitchSAE:
    sae = SwitchSAE(n_experts=N_EXPERTS, **SETTINGS).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.input_scale.fill_(scale)
    return sae


def draw(n: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    acts, grads = torch.randn(2, n, 6, generator=generator).double()
    return acts * 3, grads


def run_slowly(
    sae: SwitchSAE, acts: Tensor, grads: Tensor | None
) -> tuple[Tensor, list[dict[int, Tensor]], Tensor]:
    """Reconstruction, latents by index of each row, and the penalty."""
    recons, latents, chances = [], [], []
    n_sent = [0] * N_EXPERTS
    for row, x in enumerate(acts):
        logits = [(x * sae.input_scale - sae.b_router) @ sae.W_router[:, e] for e in range(4)]
        exps = [logit.exp() for logit in logits]
        chances.append(torch.stack([e / sum(exps) for e in exps]))
        expert = max(range(N_EXPERTS), key=lambda e: logits[e].item())
        n_sent[expert] += 1
        scored = []
        for i in range(expert * SIZE, (expert + 1) * SIZE):
            z = (x * sae.input_scale - sae.b_dec) @ sae.W_enc[:, i] + sae.b_enc[i]
            a = 0.0 if grads is None else (sae.W_dec[i] @ grads[row]).abs().item()
            scored.append(((z * (1 + 1.5 * a)).item(), i, z))
        kept = {
            i: chances[-1][expert] * z.relu() for _, i, z in sorted(scored, key=lambda s: -s[0])[:2]
        }
        recons.append(
            (sum(y * sae.W_dec[i] for i, y in kept.items()) + sae.b_dec) / sae.input_scale
        )
        latents.append(kept)
    mean = torch.stack(chances).mean(dim=0)
    balance = sum(n / len(acts) * p for n, p in zip(n_sent, mean, strict=True))
    return torch.stack(recons), latents, LOAD_BALANCE * 6 * N_EXPERTS * torch.as_tensor(balance)


@pytest.mark.parametrize("steered", [True, False])
def test_values_and_gradients_equal_those_of_a_loop(steered: bool) -> None:
    sae, (acts, grads) = make_sae(), draw()
    weights = grads if steered else None
    acts.requires_grad_()

    passed = sae.train_forward(acts, weights)
    recon, latents, penalty = run_slowly(sae, acts, weights)

    for indices, values, kept in zip(
        passed.latents.indices.tolist(), passed.latents.values, latents, strict=True
    ):
        assert dict(zip(indices, values.tolist(), strict=True)) == pytest.approx(
            {i: y.item() for i, y in kept.items()}
        )
    torch.testing.assert_close(passed.recon, recon)
    torch.testing.assert_close(passed.penalty, penalty)
    torch.testing.assert_close(sae(acts, weights).recon, recon)
    inputs = {"acts": acts, **dict(sae.named_parameters())}
    target = acts.detach()
    got, expected = (
        torch.autograd.grad((r - target).square().sum(dim=1).mean() + p, list(inputs.values()))
        for r, p in ((passed.recon, passed.penalty), (recon, penalty))
    )
    for name, a, b in zip(inputs, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert a.any(), name


def test_experts_without_rows_are_left_out() -> None:
    sae, (acts, grads) = make_sae(), draw()
    with torch.no_grad():
        sae.W_router.zero_()
        sae.W_router[:, 2] = sae.b_router / 100
        sae.b_router.mul_(-1e3)  # so that every row is sent to expert 2, wherever it is
    passed = sae.train_forward(acts, grads)
    passed.recon.sum().backward()

    assert set((passed.latents.indices // SIZE).flatten().tolist()) == {2}
    assert sae.W_dec.grad is not None
    assert sae.W_enc.grad is not None
    used = torch.arange(20) // SIZE == 2
    assert not sae.W_dec.grad[~used].any()
    assert not sae.W_enc.grad[:, ~used].any()
    assert sae.W_enc.grad[:, used].any()


def test_no_rows_give_no_latents() -> None:
    sae, (acts, grads) = make_sae(), draw()
    recon, latents = sae(acts[:0], grads[:0])
    assert recon.shape == (0, sae.d_model)
    assert latents.values.shape == (0, sae.k)


def test_one_expert_is_topk() -> None:
    acts, grads = draw()
    sae, plain = SwitchSAE(n_experts=1, **SETTINGS).double(), TopKSAE(**SETTINGS).double()
    for each in (sae, plain):
        init_weights(each, acts, seed=0, scale_input=True)

    torch.testing.assert_close(sae(acts, grads).recon, plain(acts, grads).recon)
    assert sae.train_forward(acts, grads).penalty.item() == pytest.approx(LOAD_BALANCE * 6)


class OtherCounts(Group):
    """One of two processes; the other one sent its rows to these experts."""

    world_size = 2

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.add_(self.counts)


def test_the_penalties_of_several_processes_average_to_that_of_one() -> None:
    sae, (acts, _) = make_sae(), draw()
    whole = sae.train_forward(acts).penalty.item()
    counts = [
        sae.route(part).argmax(dim=1).bincount(minlength=N_EXPERTS) for part in acts.split([10, 30])
    ]
    assert counts[0].tolist() != (counts[1] / 3).tolist()

    penalties = []
    for part, other in zip(acts.split([10, 30]), reversed(counts), strict=True):
        sae.group = OtherCounts(other)
        penalties.append(sae.train_forward(part).penalty.item())

    assert penalties[0] * 0.25 + penalties[1] * 0.75 == pytest.approx(whole)


def test_the_penalty_balances_a_router_that_favours_one_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = SwitchSAE(n_experts=4, d_model=8, d_sae=32, k=2)
    acts = torch.randn(512, 8, generator=generator)
    init_weights(sae, acts, seed=0, scale_input=True)
    with torch.no_grad():
        sae.W_router[:, 0] *= 4
        sae.b_router.copy_(sae.b_dec - sae.W_router[:, 0])

    def count() -> Tensor:
        return sae.route(acts).argmax(dim=1).bincount(minlength=4) / len(acts)

    assert count().max() > 0.6
    learner = start_learning(sae)
    for _ in range(60):
        take_step(learner, acts, lr=1e-2)
    assert count().max() < 0.4
    assert count().min() > 0.1


def test_the_router_starts_at_its_experts_and_spreads_the_rows() -> None:
    sae, (acts, _) = make_sae(), draw(500)
    init_weights(sae, acts, seed=0, scale_input=True)
    torch.testing.assert_close(sae.W_router.norm(dim=0), torch.ones(4).double())
    assert torch.equal(sae.b_router, sae.b_dec)
    assert sae.route(acts).argmax(dim=1).bincount(minlength=4).min() > 25


# 20 latents among 3; among 20, too few for k = 2 each; and no expert
@pytest.mark.parametrize("n_experts", [3, 20, 0])
def test_experts_that_do_not_fit_are_refused(n_experts: int) -> None:
    with pytest.raises(ConfigError, match=f"a divisor of d_sae = 20 .* k = 2 .*, got {n_experts}"):
        SwitchSAE(n_experts=n_experts, **SETTINGS)
