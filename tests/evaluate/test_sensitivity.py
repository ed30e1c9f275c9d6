"""Directional derivatives against differences of the loss itself, and where the answer is known."""

import math
from collections.abc import Iterator

import pytest
import torch

from pipeline.errors import CorpusError
from pipeline.evaluate import bootstrap, sensitivity
from pipeline.evaluate.bootstrap import draw_weights
from pipeline.evaluate.directions import (
    Moments,
    draw_covariance,
    draw_isotropic,
    factor_covariance,
    scale_to_unit,
    start_generator,
)
from pipeline.evaluate.held_out import draw_blocks
from pipeline.evaluate.sensitivity import (
    DIRECTIONS,
    Reference,
    draw_directions,
    measure_sensitivity,
    plan_sample,
    sum_derivatives,
    summarise,
)
from pipeline.model import LanguageModel, load_model
from pipeline.report.exhibits.sensitivity import show_sensitivity
from pipeline.report.tables import format_short
from tests.checkpoints import save_gpt2
from tests.evaluate.few_blocks import CONTEXT, VOCAB, FewBlocks, WholeRun

LENGTHS = (12, 7, 12, 1, 9, 12)
EXCLUDE = (0, 5)
N_LAYERS, D_MODEL = 2, 16
STEP = 1e-5


@pytest.fixture(scope="module", autouse=True)
def few_units() -> Iterator[None]:
    """Intervals of a handful of blocks too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "MIN_UNITS", 1)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = save_gpt2(
        tmp_path_factory.mktemp("gpt2"), n_layers=N_LAYERS, context=CONTEXT, vocab=VOCAB
    )
    return load_model(folder, dtype=torch.float64)


def measure(model, lengths=LENGTHS, **changes):
    arguments = {"exclude_positions": EXCLUDE, "n_rows": 10, "batch_blocks": 4, "draws": 20}
    return measure_sensitivity(model, FewBlocks(lengths), **arguments | changes)


def numbers(rows):
    return [value for row in rows for value in row.values() if not isinstance(value, str)]


def test_means_equal_differences_of_the_loss(model, monkeypatch):
    monkeypatch.setattr(sensitivity, "ROWS_PER_BLOCK", 4)
    corpus = FewBlocks(LENGTHS)
    sample = plan_sample(
        LENGTHS, draw_blocks(corpus, None).tolist(), n_rows=10, exclude_positions=EXCLUDE
    )
    runs = {b: WholeRun(model, corpus.blocks.tokens[b], LENGTHS[b]) for b in range(len(LENGTHS))}
    found = {(row["layer"], row["direction"]): row for row in measure(model)}
    assert len(found) == N_LAYERS * len(DIRECTIONS)
    assert [len(rows) for rows in sample.measured.values()] == [4, 4, 2]
    ((block, rows),) = sample.reference.items()
    slopes = {key: [] for key in found}
    norms = {layer: [] for layer in range(N_LAYERS)}
    generators = {block: start_generator(0, block) for block in sample.measured}
    for layer in range(N_LAYERS):
        hook = f"blocks.{layer}.hook_resid_post"
        others = runs[block].look_at(hook)[0][rows]
        # The same draws: partners in their random order, and normal vectors of this covariance.
        picked = torch.randperm(len(rows), generator=start_generator(0, block))
        factor = factor_covariance(torch.cov(others.T, correction=0))
        for b, positions in sample.measured.items():
            acts, grads = runs[b].look_at(hook)
            directions = draw_directions(
                acts[positions], Reference(others[picked], factor), generators[b]
            )
            norms[layer] += grads[positions].norm(dim=-1).tolist()
            for name, units in zip(DIRECTIONS, directions, strict=True):
                for position, unit in zip(positions, units, strict=True):
                    up, down = (runs[b].add(hook, position, sign * STEP * unit) for sign in (1, -1))
                    slopes[layer, name].append(abs(up - down) / (2 * STEP))
    means = {key: sum(values) / 10 for key, values in slopes.items()}
    for (layer, name), row in found.items():
        assert row["mean"] == pytest.approx(means[layer, name], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(sum(norms[layer]) / 10, rel=1e-6)
        for other in ("isotropic", "covariance"):
            ratio = means[layer, name] / means[layer, other]
            assert row[f"ratio_to_{other}"] == pytest.approx(ratio, rel=1e-4)
        assert (row["n_rows"], row["n_blocks"]) == (10, 3)
        assert row["mean_low"] <= row["mean"] <= row["mean_high"]


def test_batches_change_nothing(model):
    assert numbers(measure(model, batch_blocks=1)) == pytest.approx(
        numbers(measure(model, batch_blocks=5)), rel=1e-9
    )


def test_another_seed_is_another_sample(model):
    assert numbers(measure(model)) == numbers(measure(model))
    assert measure(model)[0]["mean"] != measure(model, seed=1)[0]["mean"]


def test_as_many_rows_as_there_are(model):
    rows = measure(model, n_rows=1000)
    sample = plan_sample(
        LENGTHS,
        draw_blocks(FewBlocks(LENGTHS), None).tolist(),
        n_rows=1000,
        exclude_positions=EXCLUDE,
    )
    assert rows[0]["n_rows"] == sum(map(len, sample.measured.values()))
    assert rows[0]["n_blocks"] == 4  # of six, one has no row and one is the reference


def test_one_block_with_rows_is_too_few(model):
    with pytest.raises(CorpusError, match="at least 2 blocks with rows, got 1"):
        measure(model, lengths=(12, 1))


def test_one_row_is_no_reference(model):
    with pytest.raises(CorpusError, match="at least 2 rows in the blocks set apart, got 1"):
        measure(model, lengths=(2, 2, 2))  # position 0 does not count


def test_a_ratio_to_nothing_is_missing():
    sums = torch.ones(4, len(DIRECTIONS) + 1, dtype=torch.float64)
    sums[:, DIRECTIONS.index("covariance")] = 0.0
    figures = summarise(sums, torch.full((4,), 3.0), draw_weights(4, draws=20))["difference"]
    assert figures["ratio_to_covariance"] is None
    assert figures["ratio_to_covariance_low"] is None
    assert figures["ratio_to_isotropic"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("n_blocks", "n_rows", "n_reference", "n_measured"),
    [
        (10, 10, 1, 1),  # one block of 10 rows is enough for each
        (10, 25, 2, 3),  # a third reference block would be more than a fifth
        (10, 1000, 2, 8),
        (2, 1000, 1, 1),
        (1, 10, 1, 0),
    ],
)
def test_the_plan(n_blocks, n_rows, n_reference, n_measured):
    order = list(range(n_blocks))[::-1]
    plan = plan_sample([12] * n_blocks, order, n_rows=n_rows, exclude_positions=EXCLUDE)
    assert (len(plan.reference), len(plan.measured)) == (n_reference, n_measured)
    assert [*plan.reference, *plan.measured] == order[: n_reference + n_measured]
    assert sum(map(len, plan.measured.values())) == min(n_rows, 10 * n_measured)
    for rows in (*plan.reference.values(), *plan.measured.values()):
        assert set(rows) <= set(range(12)) - set(EXCLUDE)
        assert rows == sorted(set(rows))


def test_a_known_gradient():
    generator = start_generator(1)
    d_model, n = 64, 4000
    axis = torch.eye(d_model, dtype=torch.float64)[3]
    partner = torch.ones(1, d_model)
    acts = torch.randn(n, d_model, generator=generator)
    # Covariance along one axis alone; gradients of norm 3 towards the one partner.
    reference = Reference(partner, factor_covariance(torch.outer(axis, axis)))
    grads = 3 * scale_to_unit(partner - acts)
    sums = sum_derivatives(grads, draw_directions(acts, reference, generator)) / n
    difference, other, covariance, isotropic, norm = sums.tolist()
    assert difference == pytest.approx(3, rel=1e-6)
    assert other == 0  # the partner's difference from itself
    assert covariance == pytest.approx(grads[:, 3].abs().mean().item(), rel=1e-6)
    # E|u_1| of a uniform unit vector: Γ(d/2) / (√π Γ((d + 1)/2))
    one = math.exp(math.lgamma(d_model / 2) - math.lgamma((d_model + 1) / 2)) / math.pi**0.5
    assert isotropic == pytest.approx(3 * one, rel=0.05)
    assert norm == pytest.approx(3, rel=1e-6)


def test_ratios_compare_the_same_blocks():
    isotropic = torch.tensor([1.0, 4.0, 9.0, 2.0])  # twice as steep everywhere: no doubt remains
    sums = torch.stack([2 * isotropic, isotropic, isotropic, isotropic, 5 * isotropic], 1)
    counts = torch.tensor([1.0, 1, 2, 1])
    figures = summarise(sums, counts, draw_weights(4, draws=100))
    row = figures["difference"]
    assert row["mean"] == pytest.approx(2 * 16 / 5)
    assert row["mean_low"] < row["mean"] < row["mean_high"]
    ends = [row[f"ratio_to_isotropic{end}"] for end in ("", "_low", "_high")]
    assert ends == pytest.approx([2, 2, 2])
    assert row["gradient_norm"] == pytest.approx(16)


@pytest.mark.parametrize("rank", [6, 2])  # 2: no Cholesky factor
def test_draws_have_the_covariance(rank):
    generator = start_generator(0)
    parts = torch.randn(6, rank, generator=generator, dtype=torch.float64)
    covariance = parts @ parts.T
    factor = factor_covariance(covariance)
    assert torch.allclose(factor @ factor.T, covariance)
    draws = draw_covariance(factor, 200_000, generator)
    assert (draws.mean(0).abs() < 0.03).all()
    assert torch.allclose(torch.cov(draws.T), covariance, atol=0.02 * covariance.abs().max())
    few = torch.cov(draws[:200].T)
    assert not torch.allclose(few, covariance, atol=0.02 * covariance.abs().max())


def test_isotropic_directions_favour_none():
    draws = draw_isotropic(100_000, 5, start_generator(0))
    assert torch.allclose(draws.norm(dim=-1), torch.ones(len(draws), dtype=torch.float64))
    assert torch.allclose(
        draws.T @ draws / len(draws), torch.eye(5, dtype=torch.float64) / 5, atol=5e-3
    )


def test_moments_in_pieces():
    rows = torch.randn(50, 4, generator=start_generator(0)) * torch.arange(1, 5) + 1000
    moments = Moments(4)
    for piece in rows.split(7):
        moments.add(piece)
    assert torch.allclose(moments.covariance, torch.cov(rows.double().T, correction=0), rtol=1e-6)


def test_two_others_are_of_two_blocks(monkeypatch):
    monkeypatch.setattr(sensitivity, "PARTNERS_PER_BLOCK", 3)
    blocks = torch.arange(4.0).repeat_interleave(3)[:, None]  # each row is its block's number
    reference = Reference(blocks, torch.eye(1, dtype=torch.float64))
    directions = draw_directions(torch.full((500, 1), 9.0), reference, start_generator(0))
    assert (directions[DIRECTIONS.index("other_difference")] != 0).all()
    assert (directions[DIRECTIONS.index("difference")] == 1).all()


def test_the_exhibit_shows_every_layer(model):
    rows = measure(model)
    assert all(math.isfinite(value) for value in numbers(rows))
    exhibit = show_sensitivity({"sensitivity": rows}, {})
    assert exhibit is not None
    means, ratios = exhibit.charts
    assert [key.label for key in means.keys][-1] == "random, isotropic"
    assert means.svg.count('class="line') == len(ratios.keys) == len(DIRECTIONS)
    (table,) = exhibit.figures
    assert [line[0] for line in table.rows] == ["0", "1"]
    assert table.rows[0][2].startswith(format_short(rows[0]["ratio_to_isotropic"]))
    assert "10 random rows of" in exhibit.protocol
    assert exhibit.data == ("sensitivity",)


def test_no_exhibit_without_rows():
    assert show_sensitivity({}, {}) is None
    assert show_sensitivity({"sensitivity": []}, {}) is None


def test_an_exhibit_of_one_layer_with_gaps(model):
    rows = [row | {"ratio_to_isotropic_low": None} for row in measure(model)][: len(DIRECTIONS)]
    exhibit = show_sensitivity({"sensitivity": rows}, {})
    assert exhibit is not None
    assert len(exhibit.figures[0].rows) == 1
