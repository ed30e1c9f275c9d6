"""Every architecture's figures against whole runs of the model."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.capture import capture, patched_loss
from pipeline.evaluate.bootstrap import draw_weights
from pipeline.evaluate.controls import Control
from pipeline.evaluate.faithfulness import Sums
from pipeline.evaluate.held_out import draw_blocks
from pipeline.evaluate.measure import list_blocks
from pipeline.model import LanguageModel, load_model
from pipeline.report import facts
from pipeline.sae import ARCHITECTURES
from tests.checkpoints import save_gpt2
from tests.evaluate.few_blocks import CONTEXT, VOCAB, FewBlocks
from tests.evaluate.small_saes import (
    D_MODEL,
    D_SAE,
    EXCLUDE,
    HOOK,
    LENGTHS,
    LOSS_TOKENS,
    K,
    evaluate,
    make_sae,
)
from tests.evaluate.whole_runs import Block, slow_figures, slow_recon, split_blocks

MEMBERS = [
    (name, beta) for name, cls in ARCHITECTURES.items() for beta in (0.0, 3e3)[: 1 + cls.selects]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("gpt2")
    return load_model(save_gpt2(folder, n_layers=3, context=CONTEXT, vocab=VOCAB))


@pytest.fixture(scope="module")
def blocks(model) -> list[Block]:
    return split_blocks(model, HOOK)


def without_intervals(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures alone, each of which lay inside its interval if it has one."""
    figures = dict(figures)
    for name in ("loss_added", "nmse", "kl"):
        assert figures.pop(f"{name}_low") <= figures[name] <= figures.pop(f"{name}_high")
    return figures


def flatten(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers alone, by dotted key."""
    return {key: value for key, value in facts.flatten(metrics) if isinstance(value, int | float)}


@pytest.mark.parametrize(("architecture", "beta"), MEMBERS)
def test_figures_equal_whole_runs_row_by_row(model, blocks, architecture, beta):
    sae = make_sae(architecture, beta)
    metrics, activities, *_ = evaluate(model, {"it": sae})
    n_rows = sum(len(block.rows) for block in blocks)
    assert metrics["model"]["loss"] == pytest.approx(
        sum(block.loss for block in blocks) / sum(LENGTHS), rel=1e-5
    )
    figures = metrics["saes"]["it"]
    assert (figures["architecture"], figures["k"], figures["beta"]) == (architecture, K, beta)
    for mode, steered in (("with_gradient", True), ("without_gradient", False)):
        slow = [slow_recon(sae, block, steered=steered and beta > 0) for block in blocks]
        fired = [
            fires[i] for block, (_, fires) in zip(blocks, slow, strict=True) for i in block.rows
        ]
        expected = slow_figures(blocks, [recon for recon, _ in slow])
        expected["l0"] = sum(map(len, fired)) / n_rows
        expected["dead_fraction_held_out"] = 1 - len(set().union(*fired)) / D_SAE
        got = without_intervals(figures[mode])
        assert got.pop("dead_fraction") is None  # of too few rows
        assert got == pytest.approx(expected, rel=1e-4)
        assert 0 < expected["l0"] < D_SAE
        counts = torch.zeros(D_SAE, dtype=torch.int64)
        for latents in fired:
            counts[list(latents)] += 1
        assert torch.equal(activities["it"][mode].firings, counts)


@pytest.mark.parametrize(("architecture", "beta"), [m for m in MEMBERS if m[1]])
def test_what_beta_does_equals_sets_of_latents(model, blocks, architecture, beta):
    sae = make_sae(architecture, beta)
    figures = evaluate(model, {"it": sae})[0]["saes"]["it"]
    shared, weights = [], []
    for block in blocks:
        _, steered = slow_recon(sae, block, steered=True)
        _, plain = slow_recon(sae, block, steered=False)
        for i in block.rows:
            shared += [latent in plain[i] for latent in steered[i]]
            weights += [(sae.W_dec[j] @ block.grads[i]).abs().item() for j in steered[i]]
    overlap, weight = sum(shared) / len(shared), sum(weights) / len(weights)
    assert figures["selection_overlap"] == pytest.approx(overlap)
    assert overlap < 1
    own = str(LOSS_TOKENS)
    assert figures["selection_overlap_at"][own] == figures["selection_overlap"]
    assert figures["latent_gradient"][own] == pytest.approx(weight / LOSS_TOKENS, rel=1e-4)
    assert figures["gradient_weight"][own] == pytest.approx(beta * weight / LOSS_TOKENS, rel=1e-4)
    assert figures["selection_overlap_at"]["8160"] > overlap  # a weaker gradient


def test_what_selects_nothing_has_one_figure_and_no_overlap(model):
    names = [name for name, cls in ARCHITECTURES.items() if not cls.selects]
    assert names
    for name in names:
        figures = evaluate(model, {name: make_sae(name)})[0]["saes"][name]
        assert figures["with_gradient"] == figures["without_gradient"]
        for key in ("selection_overlap", "selection_overlap_at", "gradient_weight"):
            assert figures[key] is None
        json.dumps(figures)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_rows_in_small_pieces_give_the_same_figures(model, name, monkeypatch):
    sae = make_sae(name, 3e3 if ARCHITECTURES[name].selects else 0.0)
    whole = evaluate(model, {name: sae})
    for module in ("measure", "scales"):
        monkeypatch.setattr(f"pipeline.evaluate.{module}.ROWS_AT_ONCE", 7)
    pieces = evaluate(model, {name: sae}, batch_blocks=2)
    assert flatten(pieces.metrics) == pytest.approx(flatten(whole.metrics), rel=1e-4)


def test_a_baseline_is_measured_as_saes_are(model, blocks):
    half = Control(lambda acts: acts / 2, ("without_gradient",), {"kind": "half"})
    metrics, _, sums, _ = evaluate(model, {}, controls={"half": half})
    expected = slow_figures(blocks, [block.acts / 2 for block in blocks])
    del expected["loss_added_all_positions"]
    figures = without_intervals(metrics["controls"]["half"]["without_gradient"])
    assert {name for name, value in figures.items() if value is None} == {
        "loss_added_all_positions",
        "l0",
        "dead_fraction",
        "dead_fraction_held_out",
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert list(sums) == [("half", "without_gradient")]
    assert figures["nmse"] == pytest.approx(0.5)


def test_sums_per_block_equal_runs_of_each_block_alone(model, blocks):
    sae = make_sae("topk", 3e3)
    sums = evaluate(model, {"it": sae}).sums
    order = draw_blocks(FewBlocks(LENGTHS), None)
    for mode, steered in (("with_gradient", True), ("without_gradient", False)):
        for at, number in enumerate(order):
            block = blocks[number]
            recon, _ = slow_recon(sae, block, steered=steered)
            loss, divergence = block.patch(recon, block.rows)
            error = (block.acts - recon)[block.rows].norm(dim=-1)
            got = Sums(*(column[at].item() for column in sums["it", mode]))
            assert (got.rows, got.patched_rows) == (len(block.targets), len(block.rows))
            assert got.loss == pytest.approx(block.loss, rel=1e-5)
            assert got.patched_loss == pytest.approx(loss, rel=1e-5)
            assert got.kl == pytest.approx(divergence, rel=1e-4, abs=1e-5)
            ratios = error / block.acts[block.rows].norm(dim=-1)
            assert got.nmse == pytest.approx(ratios.sum().item(), rel=1e-4)
    steered, plain = (sums["it", mode] for mode in ("with_gradient", "without_gradient"))
    assert (steered.kl - plain.kl).abs().min() > 1e-4


def test_rows_of_blocks_add_up_to_the_figures(model):
    metrics, _, sums, _ = evaluate(model, {"it": make_sae("topk")})
    rows = list_blocks(sums)
    assert [(row["mode"], row["block"]) for row in rows] == [
        (mode, block) for mode in ("with_gradient", "without_gradient") for block in range(8)
    ]
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key not in ("name", "mode")}
    figures = metrics["saes"]["it"]["with_gradient"]
    assert total["kl_sum"] / total["rows"] == pytest.approx(figures["kl"])
    assert total["nmse_sum"] / total["patched_rows"] == pytest.approx(figures["nmse"])
    assert total["patched_loss"] / total["loss"] - 1 == pytest.approx(figures["loss_added"])


def test_a_hook_that_others_go_around_runs_the_whole_model(model):
    hook = "blocks.1.hook_mlp_out"
    slow = split_blocks(model, hook)
    expected = slow_figures(slow, [block.acts / 2 for block in slow])
    half = Control(lambda acts: acts / 2, ("without_gradient",), {"kind": "half"})
    metrics = evaluate(model, {}, controls={"half": half}, hook=hook).metrics
    figures = metrics["controls"]["half"]["without_gradient"]
    for name in ("loss_added", "kl", "nmse"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-4)
    assert figures["kl"] > 1e-3


def test_a_reconstruction_without_error_adds_nothing(model):
    same = Control(lambda acts: acts.clone(), ("without_gradient",), {"kind": "same"})
    figures = evaluate(model, {}, controls={"same": same}).metrics["controls"]["same"]
    assert figures["without_gradient"]["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["without_gradient"]["loss_added"] == pytest.approx(0, abs=1e-6)


def test_intervals_are_quantiles_over_resampled_blocks(model):
    metrics, _, sums, _ = evaluate(model, {"it": make_sae("topk", 3e3)}, bootstrap_draws=40)
    weights = draw_weights(len(LENGTHS), draws=40)[1:].tolist()
    for mode in ("with_gradient", "without_gradient"):
        rows = [row for row in list_blocks(sums) if row["mode"] == mode]
        found = metrics["saes"]["it"][mode]
        for name, above, below, less in (
            ("loss_added", "patched_loss", "loss", 1),
            ("nmse", "nmse_sum", "patched_rows", 0),
            ("kl", "kl_sum", "rows", 0),
        ):
            values = []
            for draw in weights:
                picked = [row for row, n in zip(rows, draw, strict=True) for _ in range(int(n))]
                total, by = (sum(row[key] for row in picked) for key in (above, below))
                values.append(total / by - less)
            assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx(
                tuple(np.quantile(values, [0.025, 0.975]))
            )


def test_saes_of_own_loss_select_with_its_gradient(model):
    sae = make_sae("topk", 3e3)
    figures = {}
    for own in ((), ("it",)):
        found = evaluate(model, {"it": sae}, own_loss=own).metrics["saes"]["it"]
        figures[own] = found["with_gradient"]["loss"], found["without_gradient"]["loss"]
        overlap = found["selection_overlap"]
        assert 0 < overlap < 1
    (full, plain), (own, still_plain) = figures.values()
    assert plain == still_plain
    tokens, lengths = FewBlocks(LENGTHS).read_blocks("held_out", 0, 8)
    losses = []
    for block, length in zip(tokens, lengths, strict=True):
        one = torch.from_numpy(block[: length + 1]).long()[None]
        captured = capture(model, one, (HOOK,), loss="own")
        acts, grads = captured.acts[HOOK], captured.grads[HOOK]
        with torch.no_grad():
            recon = sae(acts[0], grads[0], one[0, :-1]).recon[None]
        left_out = torch.isin(torch.arange(int(length)), torch.tensor(EXCLUDE))
        replacement = torch.where(left_out[None, :, None], acts, recon)
        losses.append(patched_loss(model, one, HOOK, replacement).sum().item())
    assert own == pytest.approx(sum(losses) / sum(LENGTHS), rel=1e-4)
    assert abs(own - full) > 1e-4


def test_the_model_is_described(model):
    about = evaluate(model, {"it": make_sae("topk")}).metrics["model"]
    block = 2 * 2 * D_MODEL + 4 * D_MODEL**2 + 4 * D_MODEL + 8 * D_MODEL**2 + 5 * D_MODEL
    expected = (VOCAB + CONTEXT) * D_MODEL + 3 * block + 2 * D_MODEL
    assert about["n_parameters"] == expected
    assert (about["n_layers"], about["layer"], about["d_model"]) == (3, 1, D_MODEL)
