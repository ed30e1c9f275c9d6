"""Steering against whole runs of the model, one latent and one sequence at a time."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.corpus.reader import Blocks, Corpus
from pipeline.errors import ConfigError, CorpusError
from pipeline.evaluate import bootstrap, pushes, steering
from pipeline.evaluate.association import associate, read_direct_map
from pipeline.evaluate.pushes import look_at_sequences, steer, steering_effect
from pipeline.evaluate.steering import RANDOM, draw_sequences, measure_steering
from pipeline.model import LanguageModel, load_model
from pipeline.report.exhibits.series import format_interval
from pipeline.report.exhibits.steering import estimate_density, show_steering
from pipeline.report.figures import series_style
from pipeline.report.tables import format_short
from pipeline.sae import TopKSAE, init_weights
from tests.checkpoints import save_gpt2, save_llama

D_MODEL, VOCAB, CONTEXT, D_SAE, EXCLUDE = 16, 64, 12, 40, (0, 5)
HOOK = "blocks.1.hook_resid_post"
LENGTHS = (12, 7, 12, 12, 9, 12)
FIGURES = ("associated", "others", "others_absolute")


class FewBlocks(Corpus):
    """Held-out blocks of random tokens, some of them padded."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        tokens = rng.integers(VOCAB, size=(len(LENGTHS), CONTEXT + 1), dtype=np.int32)
        object.__setattr__(self, "blocks", Blocks(tokens, np.array(LENGTHS, np.int32)))
        object.__setattr__(self, "folder", Path("few-blocks"))

    def lengths(self, split: str) -> np.ndarray:
        assert split == "held_out"
        return self.blocks.lengths

    def read_blocks(self, split: str, first: int, n: int) -> Blocks:
        assert split == "held_out"
        return Blocks(*(column[first : first + n] for column in self.blocks))


@pytest.fixture(scope="module", autouse=True)
def few_units() -> Iterator[None]:
    """Intervals of a handful of latents too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "MIN_UNITS", 1)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    return save_gpt2(folder, n_layers=3, d_model=D_MODEL, context=CONTEXT, vocab=VOCAB)


@pytest.fixture(scope="module")
def model(checkpoint) -> LanguageModel:
    return load_model(checkpoint, dtype=torch.float64)


def make_sae(seed: int) -> TopKSAE:
    sae = TopKSAE(d_model=D_MODEL, d_sae=D_SAE, k=4)
    acts = torch.randn(300, D_MODEL, generator=torch.Generator().manual_seed(seed))
    init_weights(sae, acts, seed=seed, scale_input=True)
    return sae


def draw_tokens(n: int) -> torch.Tensor:
    return torch.randint(VOCAB, (n, CONTEXT), generator=torch.Generator().manual_seed(1))


def draw_directions(n: int) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(2)).double()


def measure(model: LanguageModel, saes: dict[str, TopKSAE], **changes: Any) -> dict[str, list]:
    arguments = {
        "hook": HOOK,
        "exclude_positions": EXCLUDE,
        "n_latents": 6,
        "n_sequences": 3,
        "context": 10,
        "n_tokens": 5,
        "alphas": (0.5, 2.0),
        "alpha": 2.0,
        "draws": 50,
    }
    live = {name: torch.arange(2, 30) for name in saes}
    return measure_steering(model, FewBlocks(), saes, live, **arguments | changes)


def test_the_direct_map_is_the_checkpoint_s_own_weights_folded_and_centred(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    folded = tensors["transformer.wte.weight"] * tensors["transformer.ln_f.weight"]
    folded = folded - folded.mean(1, keepdim=True)
    expected = (folded - folded.mean(0)).T
    rows = draw_directions(20).float()
    for processing in ("raw", "folded"):
        loaded = load_model(checkpoint, weight_processing=processing)
        direct = read_direct_map(loaded)
        torch.testing.assert_close(direct, expected, rtol=1e-4, atol=1e-5)
        for row, tokens in zip(rows, associate(rows, direct, 5).tolist(), strict=True):
            scores = [float(row @ expected[:, v]) for v in range(VOCAB)]
            assert tokens == sorted(range(VOCAB), key=lambda v: -scores[v])[:5]
    raw = load_model(checkpoint, weight_processing="raw").unembedding.weight.T
    assert not torch.equal(associate(rows, raw, 5), associate(rows, direct, 5))


def test_rms_norm_keeps_the_mean_over_the_model_s_width(tmp_path):
    folder = save_llama(tmp_path, d_model=D_MODEL, vocab=VOCAB)
    tensors = load_file(folder / "model.safetensors")
    folded = tensors["lm_head.weight"] * tensors["model.norm.weight"]
    expected = (folded - folded.mean(0)).T
    torch.testing.assert_close(read_direct_map(load_model(folder)), expected, rtol=1e-4, atol=1e-5)


def test_an_effect_by_hand():
    before = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    after = torch.tensor([[0.7, 0.1, 0.2], [0.1, 0.4, 0.5]])
    effect = steering_effect(before, after, torch.tensor([[0], [1]]))
    torch.testing.assert_close(effect.associated, torch.tensor([0.2, 0.2]))
    torch.testing.assert_close(effect.others, -effect.associated)
    torch.testing.assert_close(effect.others_absolute, torch.tensor([0.2, 0.2]))


@pytest.mark.parametrize("site", ["resid_post", "resid_pre", "mlp_out", "attn_out", "resid_mid"])
def test_batched_steering_equals_a_whole_run_per_latent_and_sequence(model, site, monkeypatch):
    monkeypatch.setattr(pushes, "_ROWS_AT_ONCE", 2 * 3 * CONTEXT)
    monkeypatch.setattr(pushes, "_CPU_ROWS", 4)
    hook, length = f"blocks.1.hook_{site}", 3.0
    at = hook.replace("resid_mid", "attn_out")  # what is added to the one is added to the other
    tokens, directions = draw_tokens(3), draw_directions(5)
    associated = associate(directions, read_direct_map(model), 4)
    text = look_at_sequences(model, tokens, hook, exclude_positions=EXCLUDE)
    effect = steer(model, text, directions, associated, hook=hook, length=length)
    rows = [i for i in range(CONTEXT) if i not in EXCLUDE]
    for i, direction in enumerate(directions):
        on, off = [], []
        for sequence in tokens:

            def push(value, direction=direction, **_):
                value = value.clone()
                for row in rows:
                    value[0, row] += length * direction / direction.norm()
                return value

            with torch.no_grad():
                before = model.bridge(sequence[None])[0].softmax(-1)
                after = model.bridge.run_with_hooks(sequence[None], fwd_hooks=[(at, push)])[0]
            change = after.softmax(-1) - before
            for row in rows:
                inside = set(associated[i].tolist())
                on.append(sum(change[row, v].item() for v in inside))
                off.append(sum(abs(change[row, v].item()) for v in range(VOCAB) if v not in inside))
        assert effect.associated[i].item() == pytest.approx(sum(on) / len(on), abs=1e-6)
        assert effect.others_absolute[i].item() == pytest.approx(sum(off) / len(off), abs=1e-6)
    assert effect.associated.abs().min() > 1e-4


def test_the_norm_is_of_the_hook_s_own_activations_where_they_are_steered(model):
    tokens = draw_tokens(2)
    for site in ("resid_post", "mlp_out"):
        seen: list[torch.Tensor] = []
        name = f"blocks.1.hook_{site}"
        with torch.no_grad():
            model.bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: seen.append(v))])  # noqa: ARG005, B023
        norms = [
            seen[0][i, j].norm().item() for i in range(2) for j in range(CONTEXT) if j not in (0, 5)
        ]
        text = look_at_sequences(model, tokens, name, exclude_positions=EXCLUDE)
        assert text.norm == pytest.approx(sum(norms) / len(norms))


def test_a_planted_latent_is_found_and_steers_its_token(model):
    direct = read_direct_map(model)
    planted = direct[:, 7] / direct[:, 7].norm()
    sae = make_sae(0)
    sae.W_dec.data[3] = planted.float()
    tokens = associate(sae.W_dec[3:4].double(), direct, 1)
    assert tokens.tolist() == [[7]]
    push = {"hook": "blocks.2.hook_resid_post", "alphas": (), "alpha": 1e7}
    tables = measure(model, {"it": sae}, n_tokens=1, n_latents=30, **push)
    effects = {
        row["latent"]: row["associated"] for row in tables["steering_latents"] if row["sae"] == "it"
    }
    assert set(effects) == set(range(2, 30))
    # After so long a push below the final norm nothing but the direction is left.
    corpus_tokens = draw_sequences(FewBlocks(), 3, 10, seed=0)
    text = look_at_sequences(model, corpus_tokens, HOOK, exclude_positions=EXCLUDE)
    left = model.bridge.ln_final(1e7 * planted[None, None])[0, 0] @ model.unembedding.weight.T
    expected = left.softmax(-1)[7] - text.probs[:, 7].mean()
    assert effects[3] == pytest.approx(expected.item(), abs=1e-5)
    assert effects[3] > 0.8


def test_tables_are_finite_and_change_with_the_sae(model, monkeypatch):
    monkeypatch.setattr(steering, "SWEEP_LATENTS", 4)
    first, second = (measure(model, {"it": make_sae(seed)}) for seed in (0, 1))
    rows = first["steering"]
    assert [(row["sae"], row["alpha"], row["n_latents"]) for row in rows] == [
        (name, alpha, n) for name in ("it", RANDOM) for alpha, n in ((0.5, 4), (2.0, 6))
    ]
    assert rows[0]["alpha_absolute"] / 0.5 == pytest.approx(rows[1]["alpha_absolute"] / 2)
    for row in [*rows, *first["steering_latents"]]:
        assert all(math.isfinite(v) for v in row.values() if not isinstance(v, str))
    for row in rows:
        assert row["others"] == pytest.approx(-row["associated"])
        for figure in FIGURES:
            assert row[f"{figure}_low"] <= row[figure] <= row[f"{figure}_high"]
        assert (row["n_sequences"], row["context"], row["n_positions"]) == (3, 10, 8)
    own = [row["associated"] for row in first["steering_latents"] if row["sae"] == "it"]
    assert rows[1]["associated"] == pytest.approx(sum(own) / len(own))
    changed = [row["associated"] for row in second["steering"]]
    assert changed[:2] != [row["associated"] for row in rows][:2]
    assert changed[2:] == [row["associated"] for row in rows][2:]  # the control is the same


def test_saes_without_a_live_latent_have_no_row_and_short_text_is_an_error(model):
    saes = {"it": make_sae(0)}
    arguments = {"hook": HOOK, "exclude_positions": (), "n_latents": 2, "n_sequences": 1}
    rest = {"context": 4, "n_tokens": 1, "alphas": (), "alpha": 1.0, "draws": 5}
    tables = measure_steering(
        model, FewBlocks(), saes, {"it": torch.arange(0)}, **arguments, **rest
    )
    assert {row["sae"] for row in tables["steering"]} == {RANDOM}
    with pytest.raises(CorpusError, match=r"expected 5 blocks of at least 10 tokens .*, got 4"):
        measure(model, saes, n_sequences=5)


def test_decoder_rows_of_zeros_are_not_steered(model):
    sae = make_sae(0)
    sae.W_dec.data[2:28] = 0.0
    tables = measure(model, {"it": sae})
    rows = [row for row in tables["steering_latents"] if row["sae"] == "it"]
    assert {row["latent"] for row in rows} == {28, 29}
    assert all(math.isfinite(row["associated"]) for row in rows)
    assert [row["n_latents"] for row in tables["steering"] if row["sae"] == "it"] == [2, 2]
    sae.W_dec.data[:] = 0.0
    assert {row["sae"] for row in measure(model, {"it": sae})["steering"]} == {RANDOM}


def test_more_associated_tokens_than_the_vocabulary_has(model):
    with pytest.raises(ConfigError, match=f"expected fewer than the {VOCAB} tokens of .*, got 64"):
        measure(model, {"it": make_sae(0)}, n_tokens=VOCAB)


def test_a_density_integrates_to_one_and_peaks_where_the_values_are():
    values = [*np.random.default_rng(0).normal(3, 0.5, 200), 9.0]
    points = estimate_density(values, n_points=400)
    x, y = (np.array(column) for column in zip(*points, strict=True))
    assert np.trapezoid(y, x) == pytest.approx(1, abs=0.01)
    assert x[y.argmax()] == pytest.approx(3, abs=0.3)
    assert estimate_density([0.25] * 5) == []  # of no width
    assert estimate_density([*values, math.nan], n_points=400) == points
    assert estimate_density([math.nan]) == []


def test_the_exhibit_draws_what_was_measured(model):
    saes = {"topk-k4-beta0": make_sae(0), "topk-k4-beta1e4": make_sae(1)}
    tables: dict[str, Any] = measure(model, saes)
    styles = {name: series_style(i) for i, name in enumerate(saes)}
    exhibit = show_steering(tables, styles)
    assert exhibit is not None
    assert len(exhibit.charts) == 4
    for chart in exhibit.charts:
        assert [key.label for key in chart.keys] == [*saes, RANDOM]
    (table,) = exhibit.figures
    (row,) = (r for r in tables["steering"] if (r["sae"], r["alpha"]) == ("topk-k4-beta1e4", 2))
    assert table.rows[1][2] == format_interval(row, "associated", format_short)
    assert " to " in table.rows[1][2]
    assert "3 held-out sequences" in exhibit.protocol
    assert "fired on held-out text without the gradient" in exhibit.protocol
    gaps = [row | {"associated": None, "associated_low": None} for row in tables["steering"]]
    shown = show_steering(tables | {"steering": gaps}, styles)
    assert shown is not None
    assert shown.figures[0].rows[0][2] == "–"
    assert show_steering({}, styles) is None
    assert show_steering({"steering": []}, styles) is None
