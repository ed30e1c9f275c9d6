"""Controls against what they stand for: equal SAEs, exhaustive search, and one another."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.baselines import LinearPCA, fit_pca
from pipeline.evaluate.controls import (
    list_controls,
    make_controls,
    make_pca_sae,
    make_random_sae,
    with_beta,
)
from pipeline.evaluate.measure import Measured, evaluate_saes
from pipeline.model import LanguageModel, load_model
from pipeline.report.exhibits.controls import show_controls
from pipeline.report.figures import series_style
from pipeline.sae import (
    ARCHITECTURES,
    SparseAutoencoder,
    TopKSAE,
    init_weights,
    start_learning,
    take_step,
)
from tests.checkpoints import save_gpt2
from tests.evaluate.few_blocks import CONTEXT, VOCAB, FewBlocks

D_MODEL, D_SAE, K, BETA = 16, 48, 4, 3e3
HOOK = "blocks.1.hook_resid_post"
LENGTHS = (12, 7, 12, 5, 9, 12, 8, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("gpt2")
    return load_model(save_gpt2(folder, n_layers=3, context=CONTEXT, vocab=VOCAB))


@pytest.fixture(scope="module")
def pca() -> LinearPCA:
    return fit_pca([draw_acts()])


def draw_acts(n: int = 300, d_model: int = D_MODEL) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d_model, generator=generator) * torch.linspace(2, 0.5, d_model) + 1


def make_sae(beta: float = 0.0, architecture: str = "topk", **shape: Any) -> SparseAutoencoder:
    """A few steps from its start."""
    sae = ARCHITECTURES[architecture](
        d_model=D_MODEL, d_sae=D_SAE, k=K, beta=beta, loss_tokens=255, **shape
    )
    acts, grads = draw_acts(), draw_acts().flip(0) * 0.05
    init_weights(sae, acts, seed=0, scale_input=True)
    learner = start_learning(sae)
    for _ in range(3):
        take_step(learner, acts, grads, torch.zeros(300).long(), lr=3e-3)
    return sae


def evaluate(model: LanguageModel, saes: Any, **changes: Any) -> Measured:
    arguments = {
        "hook": HOOK,
        "mean_act": torch.ones(D_MODEL),
        "exclude_positions": (0,),
        "n_tokens": None,
        "batch_blocks": 4,
        "loss_tokens": (255,),
        "bootstrap_draws": 50,
    }
    return evaluate_saes(model, FewBlocks(LENGTHS), saes, **arguments | changes)


def test_another_beta_shares_the_parameters_and_leaves_the_sae_as_it_was():
    plain = make_sae()
    steered = with_beta(plain, BETA, 100)
    assert steered.W_dec is plain.W_dec
    assert (plain.beta, plain.loss_tokens) == (0, 255)
    assert (steered.beta, steered.loss_tokens) == (BETA, 100)
    same = TopKSAE(d_model=D_MODEL, d_sae=D_SAE, k=K, beta=BETA, loss_tokens=100)
    same.load_state_dict(plain.state_dict())
    acts, grads = draw_acts(20), draw_acts(20).flip(0)
    assert torch.equal(steered(acts, grads).recon, same(acts, grads).recon)
    assert not torch.equal(steered(acts, grads).recon, plain(acts, grads).recon)


def test_which_controls_a_run_has(pca):
    saes = {
        "plain": make_sae(),
        "g": make_sae(BETA),
        "stronger": make_sae(2 * BETA),
        "end to end": make_sae(),
        "batch": make_sae(architecture="batch_topk"),
        "batch g": make_sae(BETA, architecture="batch_topk"),
        "relu": make_sae(architecture="relu"),
    }
    architectures = {name: sae.architecture for name, sae in saes.items()}
    controls = make_controls(
        saes, architectures=architectures | {"end to end": "end_to_end"}, pca=pca
    )
    both, steered, plain = (
        ("with_gradient", "without_gradient"),
        ("with_gradient",),
        ("without_gradient",),
    )
    assert {name: control.modes for name, control in controls.items()} == {
        "plain + gradient at beta 3000": steered,
        "plain + gradient at beta 6000": steered,
        "random-k4-d48": both,
        "pca-k4": plain,
        "pca-topk-k4": both,
    }
    facts = controls["plain + gradient at beta 6000"].facts
    assert facts == {
        "kind": "gradient at inference only",
        "k": K,
        "d_sae": D_SAE,
        "beta": 2 * BETA,
        "of": "plain",
        "loss_tokens": 255,
    }
    assert controls["random-k4-d48"].facts["beta"] == 2 * BETA
    saes["longer"] = with_beta(make_sae(BETA), BETA, 100)
    names = make_controls(saes, architectures=architectures | {"longer": "topk"}, pca=pca)
    assert [name for name in names if name.startswith("plain + gradient at beta 3000")] == [
        "plain + gradient at beta 3000 over 100 tokens",
        "plain + gradient at beta 3000 over 255 tokens",
    ]
    alone = make_controls({"plain": make_sae()}, architectures={"plain": "topk"}, pca=pca)
    assert {control.modes for control in alone.values()} == {plain}


def test_components_of_each_row_are_the_best_choice():
    acts = draw_acts(40, 6)
    pca = fit_pca([acts])
    recon = make_pca_sae(pca, k=2)(acts).recon
    centred = acts - pca.mean
    errors = [
        (centred - centred @ v @ v.T).square().sum(1)
        for v in (pca.components[:, list(chosen)] for chosen in combinations(range(6), 2))
    ]
    torch.testing.assert_close(
        (recon - acts).square().sum(1), torch.stack(errors).amin(0), rtol=1e-4, atol=1e-4
    )
    assert (torch.stack(errors).argmin(0) > 0).any()  # rows choose, linear PCA does not


def test_as_many_components_as_there_are_reconstruct_everything(pca):
    acts = draw_acts()
    for k in (D_MODEL, 3 * D_MODEL):
        torch.testing.assert_close(make_pca_sae(pca, k=k)(acts).recon, acts, rtol=1e-4, atol=1e-4)


def test_a_random_decoder_is_an_sae_that_was_never_trained(pca):
    sae = make_random_sae(pca.mean, d_sae=D_SAE, k=K, seed=0)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert torch.equal(sae.b_dec, pca.mean)
    again, other = (make_random_sae(pca.mean, d_sae=D_SAE, k=K, seed=seed) for seed in (0, 1))
    assert torch.equal(sae.W_dec, again.W_dec)
    assert not torch.equal(sae.W_dec, other.W_dec)


@pytest.fixture(scope="module")
def measured(model, pca) -> Measured:
    saes = {"plain": make_sae(), "g": make_sae(BETA)}
    architectures = dict.fromkeys(saes, "topk")
    return evaluate(model, saes, controls=make_controls(saes, architectures=architectures, pca=pca))


def test_topk_given_the_gradient_is_the_sae_of_its_weights_with_beta(model, measured):
    same = TopKSAE(d_model=D_MODEL, d_sae=D_SAE, k=K, beta=BETA, loss_tokens=255)
    same.load_state_dict(make_sae().state_dict())
    expected = evaluate(model, {"same": same}).metrics["saes"]["same"]["with_gradient"]
    found = dict(measured.metrics["controls"]["plain + gradient at beta 3000"]["with_gradient"])
    assert found.pop("loss_added_all_positions") is None
    assert found == pytest.approx({key: expected[key] for key in found})
    plain = measured.metrics["saes"]["plain"]["with_gradient"]
    assert abs(found["loss_added"] - plain["loss_added"]) > 1e-4


def test_a_random_sae_changes_every_figure(model, measured, pca):
    random = make_random_sae(pca.mean, d_sae=D_SAE, k=K, seed=0)
    figures = evaluate(model, {"plain": random}).metrics["saes"]["plain"]["without_gradient"]
    trained = measured.metrics["saes"]["plain"]["without_gradient"]
    for name in ("loss_added", "nmse", "kl", "ce_recovered_mean", "loss_added_all_positions"):
        assert abs(figures[name] - trained[name]) > 1e-5 * abs(trained[name])
    as_control = measured.metrics["controls"]["random-k4-d48"]["without_gradient"]
    assert as_control["kl"] == pytest.approx(figures["kl"])
    assert as_control["l0"] == figures["l0"] == K


def make_tables(measured: Measured) -> dict[str, list[dict[str, Any]]]:
    saes = [
        {"sae": name, "mode": mode, **{key: sae[key] for key in ("architecture", "k", "beta")}}
        | sae[mode]
        for name, sae in measured.metrics["saes"].items()
        for mode in ("with_gradient", "without_gradient")
    ]
    return {"saes": saes, "controls": list_controls(measured.metrics["controls"])}


def test_rows_have_the_same_columns_and_finite_figures(measured):
    rows = make_tables(measured)["controls"]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    modes = {
        name: len(c.keys() & {"with_gradient", "without_gradient"})
        for name, c in (measured.metrics["controls"].items())
    }
    assert len(rows) == sum(modes.values()) == 6
    for row in rows:
        for name in ("loss_added", "nmse", "kl"):
            low, value, high = (row[f"{name}{end}"] for end in ("_low", "", "_high"))
            assert -1e9 < low <= value <= high < 1e9
        assert row["sees_label"] == (row["mode"] == "with_gradient")


def test_the_exhibit_says_who_sees_the_label(model, measured, pca):
    tables = make_tables(measured)
    names = ["plain", "g", *measured.metrics["controls"]]
    styles = {name: series_style(i) for i, name in enumerate(names)}
    exhibit = show_controls(tables, styles)
    assert exhibit is not None
    (table,) = exhibit.figures
    seen = {row[0]: row[2] for row in table.rows}
    assert seen == {
        "plain, without ∇": "no",
        "g, with ∇": "yes",
        "g, without ∇": "no",
        "plain + gradient at beta 3000, with ∇": "yes",
        "random-k4-d48, with ∇": "yes",
        "random-k4-d48, without ∇": "no",
        "pca-k4, without ∇": "no",
        "pca-topk-k4, with ∇": "yes",
        "pca-topk-k4, without ∇": "no",
    }
    assert all("–" not in cell for row in table.rows for cell in row)
    trained, others = (chart.svg for chart in exhibit.charts)
    assert "plain + gradient" in trained
    assert "pca-topk" in others
    random = make_random_sae(pca.mean, d_sae=D_SAE, k=K, seed=0)
    replaced = evaluate(model, {"plain": random, "g": make_sae(BETA)})
    changed = show_controls(make_tables(replaced) | {"controls": tables["controls"]}, styles)
    assert changed is not None
    assert changed.charts[0].svg != trained
    assert show_controls({"saes": tables["saes"]}, styles) is None
