"""Nearest decoder rows and gradients against loops, and on dictionaries whose answer is known."""

import csv
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluate import neighbours, splitting
from pipeline.evaluate.neighbours import list_bins, nearest_cosines, pick_tails
from pipeline.evaluate.splitting import (
    BlockSums,
    SplittingTables,
    measure_splitting,
    resample_groups,
)
from pipeline.model import LanguageModel, load_model
from pipeline.report.exhibits import read_table
from pipeline.report.exhibits.splitting import show_splitting
from pipeline.sae import TopKSAE, init_weights
from tests.checkpoints import save_gpt2
from tests.evaluate.few_blocks import CONTEXT, VOCAB, FewBlocks, WholeRun

HOOK = "blocks.1.hook_resid_post"
LENGTHS = (12, 7, 12, 2, 9, 12, 3, 8)
EXCLUDE = (0, 5)
D_MODEL, D_SAE, N = 16, 40, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = save_gpt2(tmp_path_factory.mktemp("gpt2"), n_layers=3, context=CONTEXT, vocab=VOCAB)
    return load_model(folder)


def make_sae(seed: int = 0) -> TopKSAE:
    sae = TopKSAE(d_model=D_MODEL, d_sae=D_SAE, k=8, beta=5e3, loss_tokens=255)
    generator = torch.Generator().manual_seed(seed)
    init_weights(sae, torch.randn(100, D_MODEL, generator=generator), seed=seed, scale_input=True)
    return sae


def measure(model: LanguageModel, sae: TopKSAE, live: Tensor | None = None, **changes):
    arguments = {
        "hook": HOOK,
        "exclude_positions": EXCLUDE,
        "n_latents": N,
        "n_blocks": len(LENGTHS),
        "batch_blocks": 2,
        "draws": 50,
    }
    live = torch.ones(sae.d_sae, dtype=torch.bool) if live is None else live
    return measure_splitting(
        model, FewBlocks(LENGTHS), {"it": sae}, {"it": live}, **(arguments | changes)
    )


def slow_nearest(W_dec: Tensor) -> list[float]:
    rows = [row.double() / row.double().norm() for row in W_dec.detach()]
    return [max((a @ b).item() for j, b in enumerate(rows) if i != j) for i, a in enumerate(rows)]


def slow_gradients(model: LanguageModel, sae: TopKSAE, latents: list[int]) -> tuple[float, float]:
    """Mean |d . grad| / loss_tokens over rows and latents, and where a latent fires: row by row."""
    everywhere, firing = [], []
    blocks = FewBlocks(LENGTHS).blocks
    for tokens, length in zip(blocks.tokens, LENGTHS, strict=True):
        acts, grads = WholeRun(model, tokens, length).look_at(HOOK)
        for t in range(length):
            if t in EXCLUDE:
                continue
            values, indices = (part[0].tolist() for part in sae.encode(acts[t][None]))
            fired = {i for i, value in zip(indices, values, strict=True) if value > 0}
            for i in latents:
                direction = sae.W_dec[i].detach().double()
                size = abs((direction @ grads[t].double()).item()) / direction.norm().item() / 255
                everywhere.append(size)
                firing += [size] if i in fired else []
    return sum(everywhere) / len(everywhere), sum(firing) / len(firing) if firing else math.nan


@pytest.mark.parametrize("rows_at_once", [512, 5])
def test_nearest_cosines_equal_a_loop(monkeypatch, rows_at_once):
    monkeypatch.setattr(neighbours, "ROWS_AT_ONCE", rows_at_once)
    W_dec = torch.randn(13, 6, generator=torch.Generator().manual_seed(0)) * 3
    assert nearest_cosines(W_dec).tolist() == pytest.approx(slow_nearest(W_dec), abs=1e-6)


def test_duplicated_rows_have_cosine_one_and_are_the_right_tail():
    """Six orthogonal rows, of which two stand there twice, once at another length."""
    W_dec = torch.cat([torch.eye(6), 2.5 * torch.eye(6)[:2]])
    cosines = nearest_cosines(W_dec)
    assert cosines.tolist() == pytest.approx([1, 1, 0, 0, 0, 0, 1, 1], abs=1e-6)
    assert set(pick_tails(cosines, 2).right.tolist()) <= {0, 1, 6, 7}
    bins = list_bins(cosines)
    assert (bins[0]["bin_low"], bins[-1]["bin_high"]) == (0, 1)
    assert [bar["fraction"] for bar in bins if bar["fraction"]] == [0.5, 0.5]


def test_a_row_of_zeros_and_a_row_alone():
    assert nearest_cosines(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [0, 0]
    assert nearest_cosines(torch.ones(1, 3)).tolist() == [-math.inf]
    assert nearest_cosines(torch.ones(0, 3)).tolist() == []
    assert list_bins(torch.empty(0)) == []


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), st.integers(0, 8))
def test_tails_are_the_ends_and_the_middle(values, n):
    tails = pick_tails(torch.tensor(values), n)
    taken = min(n, len(values) // 3)
    left, middle, right = (part.tolist() for part in tails)
    assert len(left) == len(middle) == len(right) == taken
    assert len({*left, *middle, *right}) == 3 * taken
    ordered = sorted(values)
    assert sorted(values[i] for i in left) == ordered[:taken]
    assert sorted(values[i] for i in right) == ordered[len(ordered) - taken :]
    first = (len(values) - taken) // 2
    assert sorted(values[i] for i in middle) == ordered[first : first + taken]


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
def test_bins_hold_every_cosine_once(values):
    bins = list_bins(torch.tensor(values))
    assert sum(bar["fraction"] for bar in bins) == pytest.approx(1)
    assert bins[0]["fraction"] > 0
    assert bins[0]["bin_low"] <= min(values) <= bins[0]["bin_high"]
    assert bins[-1]["bin_high"] == 1


def test_gradients_equal_those_of_whole_runs(model):
    sae = make_sae()
    sae.W_dec.data *= torch.linspace(0.5, 2, D_SAE)[:, None]  # lengths must not matter
    live = torch.arange(D_SAE) % 10 > 0
    tables = measure(model, sae, live)
    latents = live.nonzero().squeeze(1)
    nearest = slow_nearest(sae.W_dec[latents])
    order = sorted(range(len(nearest)), key=nearest.__getitem__)
    middle = (len(order) - N) // 2
    picked = {"left": order[:N], "middle": order[middle : middle + N], "right": order[-N:]}
    assert [row["group"] for row in tables.gradients] == list(picked)
    means = {}
    for row in tables.gradients:
        places = picked[row["group"]]
        means[row["group"]] = slow_gradients(model, sae, latents[places].tolist())
        assert row["gradient"] == pytest.approx(means[row["group"]][0], rel=1e-4)
        assert row["gradient_active"] == pytest.approx(means[row["group"]][1], rel=1e-4)
        assert row["gradient_low"] < row["gradient"] < row["gradient_high"]
        ends = [nearest[i] for i in (places[0], places[-1])]
        assert [row["cosine_low"], row["cosine_high"]] == pytest.approx(ends, abs=1e-6)
        n_rows = sum(length - sum(p < length for p in EXCLUDE) for length in LENGTHS)
        assert (row["n"], row["blocks"], row["rows"]) == (N, len(LENGTHS), n_rows)
    (summary,) = tables.summary
    assert summary["live"] == len(latents)
    for i, key in enumerate(("ratio", "ratio_active")):
        ratio = means["right"][i] / means["left"][i]
        assert summary[key] == pytest.approx(ratio, rel=1e-4)
        assert summary[f"{key}_low"] < summary[key] < summary[f"{key}_high"]


def test_the_ratio_of_documents_resamples_them_whole(model, monkeypatch):
    """Where each block is a document it is the ratio of blocks; of fewer documents it says less,
    and of one nothing.
    """
    ends = {}
    for n in (8, 1):

        def label(_, __, order, n=n):
            return torch.from_numpy(order) % n

        monkeypatch.setattr(splitting, "label_documents", label)
        (row,) = measure(model, make_sae()).summary
        assert row["documents"] == n
        assert row["ratio_by_document"] == pytest.approx(row["ratio"])
        ends[n] = row["ratio_by_document_low"], row["ratio_by_document_high"]
        assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
    assert ends[1] == (None, None)
    assert None not in ends[8]


def test_as_many_blocks_as_asked_for(model):
    rows = measure(model, make_sae(), n_blocks=2).gradients
    assert {row["blocks"] for row in rows} == {2}


def test_rows_at_once_and_batches_change_nothing(model, monkeypatch):
    whole = measure(model, make_sae())
    for module in (neighbours, splitting):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    pieces = measure(model, make_sae(), batch_blocks=3)
    for one, other in zip(whole.gradients, pieces.gradients, strict=True):
        assert one["group"] == other["group"]
        for key in ("rows", "gradient", "gradient_active", "gradient_low", "gradient_active_high"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_resampling_varies_with_blocks_and_with_latents():
    """Ones everywhere leave nothing to vary; equal blocks leave the latents, equal latents the
    blocks.
    """
    ones = torch.ones(8, 24, dtype=torch.float64)
    by_block = torch.arange(1.0, 9)[:, None] * ones
    by_latent = torch.tensor([*range(1, 9), *[3.0] * 8, *range(9, 1, -1)]) * ones
    spreads = []
    for totals in (ones, by_block, by_latent):
        means = resample_groups(BlockSums(totals, ones, totals, ones), draws=100)
        assert means.gradient.shape == (3, 101)
        spreads.append(
            [part.std().item() for part in (*means.gradient, means.gradient[2] / means.gradient[0])]
        )
    constant, blocks, latents = spreads
    assert max(constant) == pytest.approx(0)
    assert min(blocks[:3]) > 0.3
    assert blocks[3] == pytest.approx(0)  # what blocks share cancels in the ratio
    assert min(latents[0], latents[2], latents[3]) > 0.1
    assert latents[1] == pytest.approx(0)  # equal latents


@pytest.mark.parametrize(("n_latents", "n_live"), [(0, D_SAE), (N, 2), (N, 1), (N, 0)])
def test_nothing_to_project_on(model, n_latents, n_live):
    tables = measure(model, make_sae(), torch.arange(D_SAE) < n_live, n_latents=n_latents)
    (summary,) = tables.summary
    assert (tables.gradients, summary["ratio"], summary["live"]) == ([], None, n_live)
    assert bool(tables.histogram) == (n_live > 1) == (summary["cosine_median"] is not None)


def read_back(tables: SplittingTables, folder) -> dict:
    named = {
        "splitting": tables.histogram,
        "splitting_gradients": tables.gradients,
        "splitting_summary": tables.summary,
    }
    for name, rows in named.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return {name: read_table(folder / f"{name}.csv") for name in named}


def test_a_random_sae_changes_the_tables_and_all_is_finite(model, tmp_path):
    one, other = (measure(model, make_sae(seed)) for seed in (0, 1))
    for table, changed in zip(one, other, strict=True):
        assert table != changed
        numbers = [v for row in table for v in row.values() if isinstance(v, float)]
        assert numbers
        assert all(map(math.isfinite, numbers))
        assert None not in [v for row in table for v in row.values()]
    exhibit = show_splitting(read_back(one, tmp_path), {"it": "c0 d0"})
    assert exhibit is not None
    assert len(exhibit.charts) == 3
    gradients = exhibit.figures[1].rows[0]
    assert gradients[0] == "it"
    assert len(gradients) == 5
    assert f"{1e5 * one.gradients[0]['gradient']:.3g}"[:3] == gradients[1][:3]
    assert "8 held-out blocks" in exhibit.protocol


def test_the_exhibit_without_gradients(model):
    tables = measure(model, make_sae(), n_latents=0)
    shown = show_splitting(
        {"splitting": tables.histogram, "splitting_summary": tables.summary}, {"it": "c0 d0"}
    )
    assert shown is not None
    assert len(shown.charts) == 1
    assert "No gradients were measured" in shown.protocol
    assert show_splitting({"splitting": []}, {}) is None
