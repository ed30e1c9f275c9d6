"""Shuffled gradients: the same as a set, another row's each, and what an SAE learns from them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.member import plan_members, start_member
from pipeline.rows import shuffle_gradients
from pipeline.sae import load_sae
from pipeline.train import train
from store import Batch
from store.layout import draw_keys
from tests.test_member import make_config
from tests.test_train import opens

N_STEPS = 5
SHUFFLE_SEED = 3


@given(n=st.integers(1, 40), seed=st.integers(0, 2**40), step=st.integers(1, 2**40))
def test_shuffled_gradients_are_the_same_rows_in_an_order_of_seed_and_step(
    n: int, seed: int, step: int
) -> None:
    grads = torch.arange(3.0 * n).view(n, 3)
    shuffled = shuffle_gradients(grads, seed=seed, step=step)
    assert sorted(shuffled.tolist()) == grads.tolist()
    assert torch.equal(shuffled, shuffle_gradients(grads, seed=seed, step=step))


def test_steps_seeds_and_ranks_shuffle_differently_and_few_rows_stay() -> None:
    grads = torch.arange(1000.0)[:, None]
    orders = [
        shuffle_gradients(grads, seed=seed, step=step, rank=rank)
        for seed, step, rank in ((0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1), (1, 0, 0), (0, 0, 1))
    ]
    assert len({tuple(order.flatten().tolist()) for order in orders}) == len(orders)
    for order in orders:
        assert (order == grads).sum() < 10  # one on average


def permute_slowly(grads: Tensor, step: int) -> Tensor:
    keys = draw_keys((SHUFFLE_SEED, step, 0), len(grads)).tolist()
    return torch.stack([grads[i] for i in sorted(range(len(grads)), key=lambda i: keys[i])])


def learn_slowly(batches: Iterator[Batch], *, beta: float, shuffled: bool) -> dict[str, Tensor]:
    """A dense g-SAE, by autograd and Adam, from where `start_member` starts it."""
    config = make_config(betas=(beta,), decoder_norm="free")
    adam, parameters = None, {}
    for step, batch in enumerate(batches, start=1):
        x, g = batch.acts, batch.grads
        if adam is None:
            sae = start_member(plan_members(config)[0], config, x).learner.sae
            parameters = {
                name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()
            }
            adam = torch.optim.Adam(parameters.values(), lr=config.lr)
        if shuffled:
            g = permute_slowly(g, step)
        W_dec, b_dec = parameters["W_dec"], parameters["b_dec"]
        z = (x - b_dec) @ parameters["W_enc"] + parameters["b_enc"]
        score = (z + beta / config.loss_tokens * z * (g @ W_dec.T).abs()).detach()
        kept = score >= score.sort(dim=1, descending=True).values[:, 2:3]  # k = 3
        recon = torch.where(kept, z, 0.0).relu() @ W_dec + b_dec
        adam.zero_grad()
        ((recon - x) ** 2).sum(dim=1).mean().backward()
        adam.step()
    return parameters


@pytest.mark.parametrize("kind", ["cached", "shuffled"])
def test_a_member_learns_as_an_independent_slow_one_on_its_gradients(
    tmp_path: Path, kind: str
) -> None:
    config = make_config(
        betas=(30.0,),
        gradients=("cached", "shuffled"),
        decoder_norm="free",
        shuffle_seed=SHUFFLE_SEED,
    )
    train(config, opens(N_STEPS), d_model=8, n_steps=N_STEPS, out=tmp_path / "run")
    sae = load_sae(tmp_path / "run" / ("k3-beta30" + ("-shuffled" if kind == "shuffled" else "")))
    slow, other = (
        learn_slowly(opens(N_STEPS)(0), beta=30.0, shuffled=shuffled)
        for shuffled in (kind == "shuffled", kind != "shuffled")
    )
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter, slow[name], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(sae.W_dec, other["W_dec"], rtol=1e-3, atol=1e-4)


def test_a_twin_beside_changes_nothing_and_configs_say_which_gradient(tmp_path: Path) -> None:
    both = make_config(betas=(0.0, 30.0), gradients=("cached", "shuffled"))
    for out, config in (("both", both), ("alone", make_config(betas=(0.0, 30.0)))):
        train(config, opens(3), d_model=8, n_steps=3, out=tmp_path / out)
    for name in ("k3-beta0", "k3-beta30"):
        weights = [
            (tmp_path / out / name / "sae.safetensors").read_bytes() for out in ("both", "alone")
        ]
        assert weights[0] == weights[1]
    assert read_gradients(tmp_path / "both") == {
        "k3-beta0": "full",
        "k3-beta30": "full",
        "k3-beta30-shuffled": "shuffled",
    }
    own = {"store_identity": {"loss": "own"}}
    train(both, opens(3), d_model=8, n_steps=3, out=tmp_path / "own", provenance=own)
    assert read_gradients(tmp_path / "own") == {
        "k3-beta0-own": "own",
        "k3-beta30-own": "own",
        "k3-beta30-own-shuffled": "own-shuffled",
    }


def read_gradients(out: Path) -> dict[str, str]:
    run = json.loads((out / "config.json").read_text())
    return {
        name: json.loads((out / name / "config.json").read_text())["training"]["gradient"]
        for name in run["members"]
    }
