"""The optimizer step beside plain Adam on the same gradients, and moments that come from a file."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.member import plan_members, start_member, step_member
from pipeline.member_state import collect_state
from pipeline.sae import ARCHITECTURES, TopKSAE, init_weights, start_learning, take_step
from pipeline.sae.learning import Learner, LossNotFinite
from tests.test_member import draw as draw_rows
from tests.test_member import make_config


def start(acts: Tensor) -> Learner:
    sae = TopKSAE(d_model=acts.shape[1], d_sae=20, k=3)
    init_weights(sae, acts, seed=0, scale_input=True)
    return start_learning(sae)


def draw() -> Tensor:
    return torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) + 1


def test_three_steps_are_those_of_adam_that_is_not_fused() -> None:
    acts = draw()
    learner = start(acts)
    plain = copy.deepcopy(learner.sae)
    # row by row, so that nothing depends on how a parameter lies in memory
    held = {
        n: p.detach().clone(memory_format=torch.contiguous_format)
        for n, p in plain.named_parameters()
    }
    adam = torch.optim.Adam(held.values(), betas=(0.9, 0.999), foreach=False)
    for _ in range(3):
        take_step(learner, acts, lr=0.01)

        recon = plain(acts).recon
        loss = ((recon - acts) * plain.input_scale).square().sum(dim=1).mean()
        plain.zero_grad()
        loss.backward()
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            held[name].grad = parameter.grad.contiguous()
        rows, grad = held["W_dec"], held["W_dec"].grad
        assert grad is not None
        held["W_dec"].grad = grad - (grad * rows).sum(dim=1, keepdim=True) * rows
        for group in adam.param_groups:
            group["lr"] = 0.01
        adam.step()
        rows /= rows.norm(dim=1, keepdim=True)
        plain.load_state_dict(held, strict=False)

    for name, parameter in learner.sae.named_parameters():
        torch.testing.assert_close(parameter.detach(), held[name], rtol=1e-4, atol=1e-5)


def test_loaded_moments_go_on_to_the_same_bits() -> None:
    acts = draw()
    learner, resumed = start(acts), start(acts)
    take_step(learner, acts, lr=0.01)
    resumed.sae.load_state_dict(
        {
            name: t.clone(memory_format=torch.contiguous_format)
            for name, t in learner.sae.state_dict().items()
        }
    )
    saved = copy.deepcopy(learner.optimizer.state_dict())
    for moments in saved["state"].values():  # as a file gives them
        for name, moment in moments.items():
            moments[name] = moment.clone(memory_format=torch.contiguous_format)
    resumed.optimizer.load_state_dict(saved)
    for _ in range(2):
        take_step(learner, acts, lr=0.01)
        take_step(resumed, acts, lr=0.01)
    for left, right in zip(learner.sae.parameters(), resumed.sae.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("full", [True, False])
def test_a_loss_that_is_not_finite_changes_nothing(architecture: str, full: bool) -> None:
    config = make_config(
        architectures=(architecture,), betas=(20.0,), average_decay=0.9, aux_weight=0.1
    )
    (spec,) = plan_members(config)
    acts, grads = draw_rows(seed=0)
    member = start_member(spec, config, acts, n_tokens=5)
    tokens = torch.arange(len(acts)) % 5
    step_member(member, acts, grads, tokens, config=config, lr=0.01, full=True)
    member.learner.idle_tokens.fill_(7)  # which neither a latent that fires keeps nor another
    before = {name: tensor.clone() for name, tensor in collect_state([member]).items()}

    acts, grads = draw_rows(seed=1)
    acts[3, 2] = torch.nan
    with pytest.raises(LossNotFinite, match="expected a finite loss, got nan"):
        step_member(member, acts, grads, tokens, config=config, lr=0.01, full=full)

    after = collect_state([member])
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_a_batch_without_rows_has_no_finite_loss():
    config = make_config()
    (spec,) = plan_members(config)
    acts, grads = draw_rows(seed=0)
    member = start_member(spec, config, acts)
    with pytest.raises(LossNotFinite):
        step_member(member, acts[:0], grads[:0], config=config, lr=0.01, full=False)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -1.0])
def test_a_rate_of_no_sense_is_refused_and_changes_nothing(lr: float) -> None:
    acts = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    sae = TopKSAE(d_model=6, d_sae=20, k=4)
    init_weights(sae, acts, seed=0, scale_input=True)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    with pytest.raises(ConfigError, match="at take_step: expected unit or free and a finite rate"):
        take_step(start_learning(sae), acts, lr=lr)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())


def test_names_of_no_sense_are_refused_where_no_types_are_checked() -> None:
    """As in a user's process; in this one beartype is first."""
    script = """
import torch
from pipeline.sae import TopKSAE, init_weights, start_learning, take_step
acts, sae = torch.ones(5, 6), TopKSAE(d_model=6, d_sae=20, k=4)
for call in (
    lambda: init_weights(sae, acts, seed=0, scale_input=True, b_dec="median"),
    lambda: take_step(start_learning(sae), acts, lr=0.1, decoder_norm="units"),
):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    first, second = found.stdout.splitlines()
    assert first.startswith("ConfigError b_dec at init_weights: expected one of mean, geometric_")
    assert second.startswith("ConfigError decoder_norm and lr at take_step: expected unit or free")
