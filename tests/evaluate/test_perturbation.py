"""Perturbations against whole runs of the model in float64, and rank correlations against ranks."""

import math
from collections.abc import Iterator

import pytest
import torch

from pipeline.errors import CorpusError, ModelError
from pipeline.evaluate import bootstrap, perturbation
from pipeline.evaluate.bootstrap import draw_weights
from pipeline.evaluate.directions import start_generator
from pipeline.evaluate.perturbation import (
    Setting,
    choose_sequences,
    draw_perturbations,
    measure_norms,
    measure_perturbation,
    perturb,
    plan_settings,
    summarise,
)
from pipeline.model import LanguageModel, load_model
from pipeline.report.exhibits.perturbation import show_perturbation
from pipeline.report.tables import minus
from tests.checkpoints import save_gpt2, save_neox
from tests.evaluate.few_blocks import CONTEXT, VOCAB, FewBlocks, WholeRun
from tests.evaluate.test_rank_correlations import slow_rho

N_BLOCKS, N_LAYERS, D_MODEL = 6, 3, 16
LENGTHS = (CONTEXT,) * N_BLOCKS
EXCLUDE = (0, 5)
SIZES = (0.03, 0.3)
SHORT = 8  # rows of a sequence, fewer than a block has


@pytest.fixture(scope="module", autouse=True)
def few_units() -> Iterator[None]:
    """Intervals of a handful of sequences too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "MIN_UNITS", 1)
        yield


class Model:
    """The same weights in float32, which is measured, and in float64, which is compared with."""

    def __init__(self, folder, save) -> None:
        save(folder, n_layers=N_LAYERS, context=CONTEXT, vocab=VOCAB)
        self.single = load_model(folder)
        self.double = load_model(folder, dtype=torch.float64)


@pytest.fixture(scope="module", params=[save_gpt2, save_neox], ids=["gpt2", "parallel"])
def model(request, tmp_path_factory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("gpt2")
    return load_model(save_gpt2(folder, n_layers=N_LAYERS, context=CONTEXT, vocab=VOCAB))


def measure(model, lengths=LENGTHS, **changes):
    arguments = {
        "layers": (0, 2),
        "sizes": SIZES,
        "n_samples": 100,
        "context": SHORT,
        "exclude_positions": EXCLUDE,
        "draws": 20,
    }
    return measure_perturbation(model, FewBlocks(lengths), **arguments | changes)


def numbers(rows):
    return [value for row in rows for value in row.values() if not isinstance(value, str)]


def slow_effects(
    model: LanguageModel, corpus: FewBlocks, blocks: list[int], setting: Setting, s: int, n: int
) -> tuple[float, list[list[float]]]:
    """The site's mean norm, and each sequence's |ΔL|, |∇L · δ|, ||δ|| and ||∇L|| ||δ||, one whole
    run at a time.
    """
    free = [position for position in range(SHORT) if position not in EXCLUDE]
    runs = [WholeRun(model, corpus.blocks.tokens[block], SHORT) for block in blocks]
    looks = [run.look_at(setting.hook) for run in runs]
    norms = [acts[position].norm().item() for acts, _ in looks for position in free]
    mean = sum(norms) / len(norms)
    effects = []
    for block, run, (_, grads) in zip(blocks, runs, looks, strict=True):
        positions, deltas = draw_perturbations(n, free, D_MODEL, start_generator(0, block))
        position, delta = int(positions[s]), deltas[s] * setting.size * mean
        before = run.add(setting.hook, position, torch.zeros_like(delta))
        change = run.add(setting.hook, position, delta) - before
        slope, norm = (grads[position] @ delta).item(), delta.norm().item()
        effects.append([abs(change), abs(slope), norm, grads[position].norm().item() * norm])
    return mean, effects


def test_every_effect_equals_whole_runs_in_float64(model):
    corpus = FewBlocks(LENGTHS)
    sequences = choose_sequences(corpus, 100, SHORT, EXCLUDE)
    settings = plan_settings(
        model.single, sites=("resid_post", "mlp_out"), layers=None, sizes=SIZES
    )
    assert len(settings) == 2 * N_LAYERS * len(SIZES)
    blocks = sequences.blocks.tolist()
    norms = measure_norms(
        model.single, corpus, sequences, sorted({setting.hook for setting in settings})
    )
    drawn = [
        draw_perturbations(len(settings), sequences.free, D_MODEL, start_generator(0, block))
        for block in blocks
    ]
    tokens = torch.from_numpy(corpus.blocks.tokens[blocks][:, : SHORT + 1]).long()
    effects = perturb(model.single, tokens, settings, norms, drawn)
    found = measure(model.single, layers=None)
    for s, (setting, row) in enumerate(zip(settings, found, strict=True)):
        norm, slow = slow_effects(model.double, corpus, blocks, setting, s, len(settings))
        assert norms[setting.hook] == pytest.approx(norm, rel=1e-5)
        assert (row["site"], row["layer"], row["size"]) == setting
        assert row["norm"] == pytest.approx(setting.size * norm, rel=1e-5)
        assert torch.allclose(effects[s].T, torch.tensor(slow).double(), rtol=1e-3, atol=2e-5)
        changes, slopes, sizes, steep = (list(column) for column in zip(*slow, strict=True))
        assert row["rho_gradient"] == pytest.approx(slow_rho(changes, slopes))
        assert row["rho_norm"] == pytest.approx(slow_rho(changes, sizes))
        assert row["rho_steepness"] == pytest.approx(slow_rho(changes, steep))
        assert row["rho_difference"] == pytest.approx(row["rho_gradient"] - row["rho_norm"])
        assert row["change"] == pytest.approx(sorted(changes)[(N_BLOCKS - 1) // 2], rel=1e-2)
        assert (row["n"], row["context"]) == (N_BLOCKS, SHORT)


def test_sites_of_a_sequential_block_are_one_and_of_a_parallel_one_too(model):
    """What is added to mlp_out is added to resid_post; only its size differs."""
    corpus = FewBlocks(LENGTHS)
    tokens = torch.from_numpy(corpus.blocks.tokens).long()
    settings = [Setting(site, 1, 1.0) for site in ("resid_post", "mlp_out")]
    norms = {setting.hook: 0.5 for setting in settings}
    drawn = [
        (positions.repeat(2), deltas.repeat(2, 1))
        for block in range(N_BLOCKS)
        for positions, deltas in [
            draw_perturbations(1, range(1, CONTEXT), D_MODEL, start_generator(block))
        ]
    ]
    upper, whole = perturb(model.double, tokens, settings, norms, drawn)
    assert torch.allclose(upper, whole, rtol=1e-6)


def test_small_perturbations_follow_the_gradient(model):
    rows = measure(model.double, sizes=(1e-5,))
    assert [row["rho_gradient"] for row in rows] == pytest.approx([1.0] * len(rows))
    assert all(row["rho_norm"] < 0.999 for row in rows)


def test_batches_change_nothing(gpt2, monkeypatch):
    whole = measure(gpt2)
    monkeypatch.setattr(perturbation, "TOKENS_AT_ONCE", SHORT)
    assert numbers(measure(gpt2)) == pytest.approx(numbers(whole), rel=1e-2)


def test_another_seed_is_another_sample(gpt2):
    assert numbers(measure(gpt2)) == numbers(measure(gpt2))
    assert measure(gpt2)[0]["change"] != measure(gpt2, seed=1)[0]["change"]


@pytest.mark.parametrize(
    ("n", "context", "expected"),
    [
        (100, 8, (4, 8)),  # the blocks of at least 8 rows
        (3, 8, (3, 8)),
        (100, 1000, (3, CONTEXT)),  # no longer than the corpus's own blocks
    ],
)
def test_sequences_are_the_first_rows_of_long_blocks(n, context, expected):
    corpus = FewBlocks((12, 7, 12, 2, 9, 12))
    sequences = choose_sequences(corpus, n, context, EXCLUDE)
    assert (len(sequences.blocks), sequences.context) == expected
    assert len(set(sequences.blocks.tolist())) == len(sequences.blocks)
    assert (corpus.lengths("held_out")[sequences.blocks] >= sequences.context).all()
    assert sequences.free == tuple(p for p in range(sequences.context) if p not in EXCLUDE)


@pytest.mark.parametrize(
    ("lengths", "exclude"),
    [((7, 7), EXCLUDE), ((12, 12), tuple(range(8)))],  # too short; nothing may be perturbed
)
def test_nothing_to_perturb(lengths, exclude):
    with pytest.raises(CorpusError, match="at least 8 rows"):
        choose_sequences(FewBlocks(lengths), 5, 8, exclude)


def test_settings_are_of_sites_that_the_model_offers(gpt2):
    sites = ("resid_post", "mlp_out", "nothing")
    settings = plan_settings(gpt2, sites=sites, layers=(1,), sizes=SIZES)
    assert settings == [Setting(site, 1, size) for site in sites[:2] for size in SIZES]
    with pytest.raises(ModelError, match="expected 0 to 2"):
        plan_settings(gpt2, sites=sites, layers=(3,), sizes=SIZES)


def test_norms_are_uniform_around_their_mean():
    positions, deltas = draw_perturbations(20_000, (1, 4), 3, start_generator(0))
    norms = deltas.norm(dim=-1)
    low, high = 1 - math.sqrt(3) / 2, 1 + math.sqrt(3) / 2
    assert low <= norms.min() < low + 0.01
    assert high - 0.01 < norms.max() <= high
    assert norms.mean().item() == pytest.approx(1, abs=0.01)
    assert norms.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.allclose(deltas.mean(0), torch.zeros(3).double(), atol=0.02)
    assert positions.unique().tolist() == [1, 4]


def test_a_loss_that_is_its_gradient_and_no_function_of_the_norm():
    generator = start_generator(0)
    slopes = torch.rand(200, generator=generator).double() * 4 - 2  # in decades
    norms = torch.rand(200, generator=generator).double()
    effects = torch.stack([2 * 10**slopes, 10**slopes, norms, -slopes])
    figures = summarise(effects, draw_weights(200, draws=200))
    assert figures["rho_gradient"] == pytest.approx(1)
    assert figures["rho_gradient_low"] == pytest.approx(1)
    assert figures["rho_norm_low"] < 0 < figures["rho_norm_high"]
    assert figures["rho_steepness_high"] == pytest.approx(-1)
    assert figures["rho_difference_low"] > 0.5
    assert figures["spread"] == pytest.approx(0.9 * 4, abs=0.2)
    assert figures["change"] == pytest.approx(2, rel=0.5)


def test_what_cannot_be_said_is_missing():
    effects = torch.rand(4, 50, generator=start_generator(0)).double()
    effects[0, :10] = 0.0  # a fifth of the perturbations change nothing
    effects[2] = 1.0  # all norms are one
    figures = summarise(effects, draw_weights(50, draws=20))
    assert [name for name, value in figures.items() if value is None] == [
        *("rho_norm", "rho_norm_low", "rho_norm_high"),
        *("rho_difference", "rho_difference_low", "rho_difference_high"),
        "spread",
    ]


def test_the_exhibit_has_a_chart_and_a_table_per_site(gpt2):
    rows = measure(gpt2)
    assert all(math.isfinite(value) for value in numbers(rows))
    exhibit = show_perturbation({"perturbation": rows}, {})
    assert exhibit is not None
    assert [chart.title for chart in exhibit.charts] == [
        "Perturbing resid_post",
        "Perturbing mlp_out",
    ]
    for chart, table in zip(exhibit.charts, exhibit.figures, strict=True):
        markers = [(key.label, key.marker) for key in chart.keys]
        assert markers == [
            (f"{words}, size {size}", marker)
            for words, marker in (("|∇L · δ|", "dot"), ("‖δ‖", "ring"))
            for size in SIZES
        ]
        assert [line[0] for line in table.rows] == [
            f"layer {layer}, {size}" for layer in (0, 2) for size in SIZES
        ]
    assert f"{rows[0]['rho_gradient']:.2f}" in exhibit.figures[0].rows[0][2]
    steepness = exhibit.figures[0].columns.index("‖∇L‖ ‖δ‖")
    assert minus(f"{rows[0]['rho_steepness']:.2f}") in exhibit.figures[0].rows[0][steepness]
    assert "6 held-out sequences of 8 tokens" in exhibit.protocol
    assert exhibit.data == ("perturbation",)


def test_no_exhibit_without_rows():
    assert show_perturbation({}, {}) is None
    assert show_perturbation({"perturbation": []}, {}) is None
