"""Around the figures: whose results they are, which text is held out, and what fires on it."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config import load_config
from pipeline.corpus.packing import Packing, SplitPacker
from pipeline.corpus.reader import Blocks
from pipeline.corpus.tokens import find_separator
from pipeline.errors import CorpusError
from pipeline.evaluate import activity as activity_module
from pipeline.evaluate import evaluate_runs
from pipeline.evaluate.activity import Activity, list_fired
from pipeline.evaluate.held_out import draw_blocks, label_documents, read_held_out
from pipeline.evaluate.stage import fit_controls
from pipeline.evaluate.subjects import Subjects, name_architecture
from pipeline.model import LanguageModel, load_model
from pipeline.sae import Latents, TopKSAE
from pipeline.sae.base import list_dense
from store.reader import open_store
from tests.checkpoints import save_gpt2
from tests.evaluate.few_blocks import CONTEXT, VOCAB, FewBlocks
from tests.evaluate.small_saes import HOOK, LENGTHS, evaluate, save_run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("gpt2")
    return load_model(save_gpt2(folder, n_layers=3, context=CONTEXT, vocab=VOCAB))


def test_controls_of_a_run_come_from_its_store(cached):
    store = open_store(cached / "stores/tiny")
    saes = {f"k{k}": TopKSAE(d_model=16, d_sae=32, k=k) for k in (4, 8)}
    facts = {name: {"architecture": "topk"} for name in saes}
    controls = fit_controls(store, store.hooks[0], Subjects((), dict(saes), facts), (0,))
    rows = store.read_shard(0, store.hooks[0])
    acts = rows.acts[rows.position > 0]
    errors = [(controls[f"pca-k{k}"].code(acts) - acts).square().sum().item() for k in (4, 8)]
    assert errors[1] < errors[0] < (acts - acts.mean(0)).square().sum().item()
    assert controls["pca-k4"].facts["fitted_rows"] == store.n_rows - store.manifest.n_blocks


def test_an_end_to_end_sae_goes_by_its_objective():
    assert name_architecture("topk", {"objective": "end_to_end"}) == "end_to_end"
    assert name_architecture("topk", {"seed": 0}) == "topk"


def test_a_run_s_results_name_architectures_and_baselines(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(cached)
    store = open_store("stores/tiny")
    members = {"relu-k4-beta0": {}, "end_to_end-k4-beta0": {"objective": "end_to_end"}}
    save_run(tmp_path / "run", store, members)
    without = ("sensitivity_rows", "perturbation_samples", "steering_latents", "splitting_latents")
    settings = {"evaluate.tokens": 100, **{f"evidence.{name}": 0 for name in without}}
    metrics = evaluate_runs(
        load_config(Path("configs/tiny.yaml"), settings),
        run_folders=[tmp_path / "run"],
        corpus_folder=Path("data/tiny"),
        store="stores/tiny",
        out=tmp_path / "results",
    )
    assert json.loads((tmp_path / "results/metrics.json").read_text()) == metrics
    named = {name: (sae["architecture"], sae["seed"]) for name, sae in metrics["saes"].items()}
    assert named == {"relu-k4-beta0": ("relu", 3), "end_to_end-k4-beta0": ("end_to_end", 3)}
    assert list(metrics["controls"]) == ["random-k4-d48", "pca-k4", "pca-topk-k4"]
    assert 0 < metrics["controls"]["pca-k4"]["without_gradient"]["nmse"] < 1
    assert metrics["controls"]["pca-k4"]["k"] == 4
    with (tmp_path / "results/saes.csv").open() as file:
        rows = [(row["sae"], row["architecture"], row["mode"]) for row in csv.DictReader(file)]
    assert rows == [
        (name, architecture, mode)
        for name, (architecture, _) in named.items()
        for mode in ("with_gradient", "without_gradient")
    ]


def test_what_fires_does_not_depend_on_padding():
    values = torch.tensor([[0.5, 0.0, 2.0], [0.0, 0.0, 0.0]])
    rows, latents = list_fired(Latents(values, torch.tensor([[4, 4, 1], [0, 1, 2]])))
    assert (rows.tolist(), latents.tolist()) == ([0, 0], [4, 1])
    rows, latents = list_fired(list_dense(values))
    assert (rows.tolist(), latents.tolist()) == ([0, 0], [0, 2])


def test_activity_equals_a_count_over_all_rows(monkeypatch):
    monkeypatch.setattr(activity_module, "DEAD_WINDOW_ROWS", 10)
    fires = torch.rand(31, 6, generator=torch.Generator().manual_seed(0)) < torch.tensor(
        [0.5, 0.2, 0.1, 0.05, 0.03, 0.0]
    )
    activity, ends, start = Activity(6), [], 0
    for size in (4, 6, 7, 3, 11):
        rows, latents = fires[start : start + size].nonzero(as_tuple=True)
        activity.add(rows, latents, n_rows=size)
        start += size
        if start >= 10:
            ends.append((~fires[start - 10 : start].any(0)).float().mean().item())
    assert activity.l0 == pytest.approx(fires.sum().item() / 31)
    assert activity.dead_fraction == pytest.approx(sum(ends) / len(ends))
    assert activity.dead_fraction_held_out == pytest.approx((~fires.any(0)).float().mean().item())
    assert len(ends) == 4


@pytest.mark.parametrize(
    ("n_tokens", "n_blocks"),
    [(None, 8), (1, 1), (71, 8)],  # of 71 rows in 8 blocks
)
def test_as_many_blocks_as_hold_the_tokens(model, n_tokens, n_blocks):
    batches = list(
        read_held_out(
            model, FewBlocks(LENGTHS), HOOK, exclude_positions=(), n_tokens=n_tokens, batch_blocks=4
        )
    )
    assert sum(len(batch.tokens) for batch in batches) == n_blocks
    lengths = torch.cat([batch.lengths for batch in batches])
    assert int(sum(batch.real.sum() for batch in batches)) == int(lengths.sum()) >= (n_tokens or 71)


class Packed(FewBlocks):
    """Documents as the corpus stage packs them, in a split of their own."""

    def __init__(
        self, documents: list[np.ndarray], separator: int, *, bos: int | None, is_text: bool
    ) -> None:
        packer = SplitPacker(Packing("packed", CONTEXT, separator=separator, bos=bos), None)
        parts = [packer.add(ids, is_text=is_text) for ids in documents]
        tokens, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        object.__setattr__(self, "blocks", Blocks(tokens, lengths))
        manifest = SimpleNamespace(packing="packed", prepend_bos=bos is not None)
        object.__setattr__(self, "manifest", manifest)

    def n_blocks(self, split: str) -> int:
        assert split == "held_out"
        return len(self.blocks.lengths)


@pytest.mark.parametrize("bos", [None, "separator", 50])
@pytest.mark.parametrize("at_once", [4096, 3])
def test_a_block_is_of_the_document_that_it_begins_in(model, bos, at_once, monkeypatch):
    """Documents are numbered, and their tokens are that number: a block's first token, if it is not
    the separator itself, says which document it is of.
    """
    monkeypatch.setattr("pipeline.evaluate.held_out._BLOCKS_AT_ONCE", at_once)
    separator = find_separator(model.bridge.tokenizer)
    bos = separator if bos == "separator" else bos
    sizes = (3, 40, 1, 2, 1, CONTEXT - 1, 2 * CONTEXT - 1, 30, 5)
    documents = [np.full(size, separator + i, np.int32) for i, size in enumerate(sizes, 1)]
    corpus = Packed(documents, separator, bos=bos, is_text=True)
    order = np.random.default_rng(0).permutation(corpus.n_blocks("held_out"))
    found = label_documents(model, corpus, order)
    first = int(bos is not None)
    for label, block in zip(found.tolist(), corpus.blocks.tokens[order], strict=True):
        begins = block[first] if block[first] != separator else block[first + 1]
        assert label == begins - separator
    assert len(found.unique()) > 3


def test_documents_without_separators_are_one(model):
    separator = find_separator(model.bridge.tokenizer)
    documents = [np.full(20, separator + i, np.int32) for i in range(1, 10)]
    corpus = Packed(documents, separator, bos=None, is_text=False)
    order = np.arange(corpus.n_blocks("held_out"))
    found = label_documents(model, corpus, order)
    assert set(found.tolist()) == {0}


def test_every_block_of_one_document_each_is_its_own(model):
    measured = evaluate(model, {}, n_tokens=40)
    order = draw_blocks(FewBlocks(LENGTHS), 40)
    assert measured.documents.tolist() == order.tolist()
    assert measured.metrics["model"]["documents"] == len(order) < len(LENGTHS)


def test_more_tokens_than_are_held_out(model):
    with pytest.raises(CorpusError, match="expected at least 72 tokens"):
        evaluate(model, {}, n_tokens=72)
