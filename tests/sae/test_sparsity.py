import math
from pathlib import Path

import pytest
import torch

from pipeline.sae import init_weights, load_sae, save_sae, start_learning, take_step
from pipeline.sae.sparsity import (
    BOUND,
    LOOK_AHEAD,
    RATE,
    SMOOTHING,
    Steering,
    find_levels,
    steer,
)
from tests.sae.steered import draw, make_sae

NAMES = ("relu", "gated", "jumprelu")
ONE = torch.ones(())


def simulate(*, l0: float, k: int, lag: float, slope: float) -> list[float]:
    """L0 in 1000 steps; it follows k * (weight / 3)^-slope with a lag in steps."""
    start = torch.tensor(0.5)
    state, found = Steering(start, torch.zeros(())), []
    for _ in range(1000):
        wanted = math.log(k) - slope * math.log(float(state.weight) / 3)
        l0 = min(1024.0, math.exp(math.log(l0) + (wanted - math.log(l0)) / lag))
        state = steer(state, l0=l0, k=k, start=start)
        found.append(l0)
    return found


@pytest.mark.parametrize("lag", [5, 20, 100])
@pytest.mark.parametrize("slope", [0.5, 1, 2])
def test_l0_settles_at_k_from_half_of_the_latents(slope: float, lag: int) -> None:
    last = simulate(l0=1024, k=32, lag=lag, slope=slope)[-100:]
    assert max(abs(l0 / 32 - 1) for l0 in last) < 0.05


def test_one_step_of_the_controller() -> None:
    state = Steering(torch.tensor(2.0), torch.tensor(0.1))
    error = SMOOTHING * 0.1 + (1 - SMOOTHING) * math.log(12 / 10)

    weight, found = steer(state, l0=12.0, k=10, start=ONE)

    assert found.item() == pytest.approx(error)
    expected = 2 * math.exp(RATE * (error + LOOK_AHEAD * (error - 0.1)))
    assert weight.item() == pytest.approx(expected)


def test_the_weight_stays_within_its_bounds_and_finite_whatever_l0_is() -> None:
    for l0, bound in ((0.0, 2 / BOUND), (1e6, 2 * BOUND)):
        state = Steering(2 * ONE, torch.zeros(()))
        for _ in range(1000):
            state = steer(state, l0=l0, k=10, start=2 * ONE)
        assert state.weight.item() == pytest.approx(bound)


def test_levels_are_exceeded_on_the_fraction_of_rows_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, W_enc = torch.randn(200, 6, generator=generator), torch.randn(6, 30, generator=generator)
    # fraction, rows of 200 above
    for fraction, n in ((0.1, 20), (0.001, 1), (0.9, 100)):
        levels = find_levels(rows, W_enc, fraction=fraction)
        assert ((rows @ W_enc > levels).sum(dim=0) == n).all()
    assert find_levels(rows[:1], W_enc, fraction=0.1).shape == (30,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_at_the_start_l0_is_a_small_multiple_of_k_in_any_unit(name: str, size: float) -> None:
    acts = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)) * size + size
    sae = make_sae(name, d_model=16, d_sae=256, k=4)
    init_weights(sae, acts, seed=0, scale_input=True)

    values = sae.encode(acts).values
    l0 = (values > 0).sum().item() / 1000
    assert l0 == pytest.approx(sae.start_l0 * 4, rel=0.01)
    assert math.log(l0 / 4) == pytest.approx(sae.l0_error.item(), abs=0.01)
    spread = (acts - acts.mean(dim=0)).square().mean().sqrt() * sae.input_scale
    expected = sae.start_weight * spread**sae.penalty_degree
    torch.testing.assert_close(sae.sparsity_weight, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_batch_gives_a_finite_start(name: str) -> None:
    sae = make_sae(name)
    init_weights(sae, torch.ones(20, 5), seed=0, scale_input=True)
    assert all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_comes_back_from_disk_bit_for_bit(name: str, tmp_path: Path) -> None:
    acts = draw(256, 8).float()
    sae = make_sae(name, d_model=8, d_sae=32, k=4)
    init_weights(sae, acts, seed=0, scale_input=True)
    learner = start_learning(sae)
    losses = [take_step(learner, acts, lr=5e-3).loss for _ in range(150)]
    assert losses[-1] < losses[0] / 2

    save_sae(sae, tmp_path / name)
    loaded = load_sae(tmp_path / name)

    assert type(loaded) is type(sae)
    expected, got = sae.state_dict(), loaded.state_dict()
    assert got.keys() == expected.keys()
    assert {"sparsity_weight", "weight_unit", "l0_error"} <= got.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert torch.equal(loaded(acts).recon, sae(acts).recon)
    former = start_learning(sae), start_learning(loaded)
    assert take_step(former[0], acts, lr=5e-3) == take_step(former[1], acts, lr=5e-3)
    assert torch.equal(sae.sparsity_weight, loaded.sparsity_weight)


@pytest.mark.parametrize("name", NAMES)
def test_products_in_bfloat16_are_near_those_in_float32(name: str) -> None:
    acts = draw(64, 8).float()
    sae = make_sae(name, d_model=8, d_sae=32, k=4)
    init_weights(sae, acts, seed=0, scale_input=True)
    exact = sae.project(acts)
    sae.product_dtype = torch.bfloat16

    rounded = sae.project(acts)

    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_the_dead_are_revived_through_what_makes_them_fire(name: str) -> None:
    acts = draw(64, 8).float()
    sae = make_sae(name, d_model=8, d_sae=32, k=4)
    init_weights(sae, acts, seed=0, scale_input=True)
    learner = start_learning(sae)
    with torch.no_grad():
        sae.encoder_bias[:5] = -50
    before = sae.encoder_bias.detach().clone()
    learner.idle_tokens.fill_(10**6)
    take_step(learner, acts, lr=1e-3, aux_weight=1.0, aux_k=32)
    assert torch.equal(sae.encoder_bias[:5], before[:5])  # out of reach even of AuxK's ReLU
    with torch.no_grad():
        sae.encoder_bias[:5] = -sae.project(acts)[:, :5].max(dim=0).values / 2
    learner.idle_tokens.fill_(10**6)
    before = sae.encoder_bias.detach().clone()
    take_step(learner, acts, lr=1e-3, aux_weight=1.0, aux_k=32)
    assert (sae.encoder_bias[:5] != before[:5]).all()
