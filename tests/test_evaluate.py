"""Every architecture's figures against whole runs of the model, one block and one row at a time."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.config import load_config
from pipeline.corpus.reader import Blocks, Corpus
from pipeline.errors import CorpusError
from pipeline.evaluate import activity as activity_module
from pipeline.evaluate import evaluate_run, evaluate_saes, fit_baselines, name_architecture
from pipeline.evaluate.activity import Activity, list_fired
from pipeline.evaluate.held_out import read_held_out
from pipeline.model import LanguageModel, load_model
from pipeline.report import facts
from pipeline.sae import (
    ARCHITECTURES,
    Latents,
    SparseAutoencoder,
    TopKSAE,
    init_weights,
    save_sae,
    start_learning,
    take_step,
)
from pipeline.sae.base import list_dense
from store.reader import open_store
from tests.checkpoints import save_gpt2

CONTEXT, VOCAB, D_MODEL, D_SAE, K = 12, 64, 16, 48, 4
HOOK = "blocks.1.hook_resid_post"
LENGTHS = (12, 7, 12, 2, 9, 12)
EXCLUDE = (0, 5)
LOSS_TOKENS = 255
OPTIONS = {
    "tokenized": {"n_tokens": VOCAB},
    "switch": {"n_experts": 4},
    "jumprelu": {"bandwidth": 0.1},
}
MEMBERS = [
    (name, beta) for name, cls in ARCHITECTURES.items() for beta in (0.0, 3e3)[: 1 + cls.selects]
]


class FewBlocks(Corpus):
    """Held-out blocks of random tokens, some of them padded."""

    def __init__(self, lengths: tuple[int, ...] = LENGTHS) -> None:
        rng = np.random.default_rng(0)
        tokens = rng.integers(VOCAB, size=(len(lengths), CONTEXT + 1), dtype=np.int32)
        object.__setattr__(self, "blocks", Blocks(tokens, np.array(lengths, np.int32)))
        object.__setattr__(self, "folder", Path("few-blocks"))

    def lengths(self, split: str) -> np.ndarray:
        assert split == "held_out"
        return self.blocks.lengths

    def read_blocks(self, split: str, first: int, n: int) -> Blocks:
        assert split == "held_out"
        return Blocks(*(column[first : first + n] for column in self.blocks))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("gpt2")
    return load_model(save_gpt2(folder, n_layers=3, context=CONTEXT, vocab=VOCAB))


def make_sae(architecture: str, beta: float = 0.0) -> SparseAutoencoder:
    """A few steps from its start, so that thresholds and tables hold something."""
    sae = ARCHITECTURES[architecture](
        d_model=D_MODEL,
        d_sae=D_SAE,
        k=K,
        beta=beta,
        loss_tokens=LOSS_TOKENS,
        **OPTIONS.get(architecture, {}),
    )
    generator = torch.Generator().manual_seed(0)
    acts, grads = (torch.randn(300, D_MODEL, generator=generator) for _ in range(2))
    tokens = torch.randint(VOCAB, (300,), generator=generator)
    init_weights(sae, acts, seed=0, scale_input=True)
    learner = start_learning(sae)
    for _ in range(3):
        take_step(learner, acts, grads * 0.05, tokens, lr=3e-3)
    return sae


class Block:
    """One held-out block without its padding: what whole runs of the bridge say of it."""

    def __init__(self, model: LanguageModel, tokens: Tensor) -> None:
        self.bridge, self.inputs, self.targets = model.bridge, tokens[None, :-1], tokens[1:]
        self.rows = [i for i in range(len(self.targets)) if i not in EXCLUDE]
        leaf: list[Tensor] = []

        def keep(value: Tensor, **_: Any) -> Tensor:
            leaf.append(value.detach().requires_grad_())
            return leaf[0]

        loss = self.run(keep)
        (grads,) = torch.autograd.grad(loss, leaf[0])
        self.loss, self.acts, self.grads = loss.item(), leaf[0][0].detach(), grads[0]
        self.zero = self.patch(torch.zeros_like(self.acts), self.rows)
        self.mean = self.patch(torch.ones_like(self.acts), self.rows)

    def run(self, hook: Any) -> Tensor:
        logits = self.bridge.run_with_hooks(self.inputs, fwd_hooks=[(HOOK, hook)])
        return cross_entropy(logits[0], self.targets, reduction="sum")

    @torch.no_grad()
    def patch(self, recon: Tensor, rows: list[int]) -> float:
        replaced = self.acts.clone()
        replaced[rows] = recon[rows]
        return self.run(lambda value, hook: replaced[None]).item()  # noqa: ARG005


@pytest.fixture(scope="module")
def blocks(model) -> list[Block]:
    corpus = FewBlocks()
    return [
        Block(model, torch.from_numpy(tokens[: length + 1]).long())
        for tokens, length in zip(*corpus.blocks, strict=True)
    ]


def slow_recon(sae: SparseAutoencoder, block: Block, *, steered: bool) -> tuple[Tensor, list[set]]:
    """x̂ of each row by itself, and which latents fire on it."""
    recon, fired = [], []
    for act, grad, token in zip(block.acts, block.grads, block.inputs[0], strict=True):
        with torch.no_grad():
            passed = sae(act[None], grad[None] if steered else None, token[None])
        recon.append(passed.recon[0])
        values, indices = (column[0].tolist() for column in passed.latents)
        fired.append({i for i, value in zip(indices, values, strict=True) if value > 0})
    return torch.stack(recon), fired


def slow_figures(blocks: list[Block], recons: list[Tensor]) -> dict[str, float]:
    ratios, losses, all_losses = [], [], []
    for block, recon in zip(blocks, recons, strict=True):
        ratios += [
            ((block.acts[i] - recon[i]).norm() / block.acts[i].norm()).item() for i in block.rows
        ]
        losses.append(block.patch(recon, block.rows))
        all_losses.append(block.patch(recon, list(range(len(block.targets)))))
    own, zero, mean = (
        sum(getattr(block, name) for block in blocks) for name in ("loss", "zero", "mean")
    )
    return {
        "nmse": sum(ratios) / len(ratios),
        "nmse_squared": sum(ratio**2 for ratio in ratios) / len(ratios),
        "loss": sum(losses) / sum(LENGTHS),
        "loss_added": sum(losses) / own - 1,
        "loss_added_all_positions": sum(all_losses) / own - 1,
        "ce_recovered_zero": (zero - sum(losses)) / (zero - own),
        "ce_recovered_mean": (mean - sum(losses)) / (mean - own),
    }


def evaluate(model: LanguageModel, saes: dict[str, SparseAutoencoder], **changes: Any) -> Any:
    arguments = {
        "hook": HOOK,
        "mean_act": torch.ones(D_MODEL),
        "exclude_positions": EXCLUDE,
        "n_tokens": None,
        "batch_blocks": 4,
        "loss_tokens": (LOSS_TOKENS, 8160),
    }
    return evaluate_saes(model, FewBlocks(), saes, **arguments | changes)


def flatten(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers alone, by dotted key."""
    return {key: value for key, value in facts.flatten(metrics) if isinstance(value, int | float)}


@pytest.mark.parametrize(("architecture", "beta"), MEMBERS)
def test_figures_equal_whole_runs_row_by_row(model, blocks, architecture, beta):
    sae = make_sae(architecture, beta)
    metrics, activities = evaluate(model, {"it": sae})
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
        got = dict(figures[mode])
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
    whole, _ = evaluate(model, {name: sae})
    for module in ("measure", "scales"):
        monkeypatch.setattr(f"pipeline.evaluate.{module}.ROWS_AT_ONCE", 7)
    pieces, _ = evaluate(model, {name: sae}, batch_blocks=2)
    assert flatten(pieces) == pytest.approx(flatten(whole), rel=1e-4)


def test_a_baseline_is_measured_as_saes_are(model, blocks):
    metrics, _ = evaluate(model, {}, baselines={"half": lambda acts: acts / 2})
    expected = slow_figures(blocks, [block.acts / 2 for block in blocks])
    assert metrics["baselines"] == {"half": pytest.approx(expected, rel=1e-4)}
    assert metrics["baselines"]["half"]["nmse"] == pytest.approx(0.5)


def test_pca_of_each_k_comes_from_the_store(cached):
    store = open_store(cached / "stores/tiny")
    saes = {f"k{k}": TopKSAE(d_model=16, d_sae=32, k=k) for k in (4, 8)}
    baselines, about = fit_baselines(store, store.hooks[0], saes, (0,))
    rows = store.read_shard(0, store.hooks[0])
    acts = rows.acts[rows.position > 0]
    errors = [(recon(acts) - acts).square().sum().item() for recon in baselines.values()]
    assert list(baselines) == ["pca-k4", "pca-k8"]
    assert errors[1] < errors[0] < (acts - acts.mean(0)).square().sum().item()
    assert about["pca-k4"] == {
        "kind": "pca",
        "k": 4,
        "fitted_rows": store.n_rows - store.manifest.n_blocks,
    }


def test_an_end_to_end_sae_goes_by_its_objective():
    assert name_architecture("topk", {"objective": "end_to_end"}) == "end_to_end"
    assert name_architecture("topk", {"seed": 0}) == "topk"


def test_a_run_s_results_name_architectures_and_baselines(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(cached)
    store = open_store("stores/tiny")
    members = {"relu-k4-beta0": {}, "end_to_end-k4-beta0": {"objective": "end_to_end"}}
    for name, objective in members.items():
        sae = make_sae("topk" if objective else "relu")
        save_sae(sae, tmp_path / "run" / name, training={"seed": 3, **objective})
    run = {
        "members": list(members),
        "failed": {},
        "hook": store.hooks[0],
        "train": {"exclude_positions": [0], "allow_partial": False},
        "store_fingerprint": store.manifest.fingerprint,
    }
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    metrics = evaluate_run(
        load_config(Path("configs/tiny.yaml"), {"evaluate.tokens": 100}),
        run_folder=tmp_path / "run",
        corpus_folder=Path("data/tiny"),
        store="stores/tiny",
        out=tmp_path / "results",
    )
    assert json.loads((tmp_path / "results/metrics.json").read_text()) == metrics
    named = {name: (sae["architecture"], sae["seed"]) for name, sae in metrics["saes"].items()}
    assert named == {"relu-k4-beta0": ("relu", 3), "end_to_end-k4-beta0": ("end_to_end", 3)}
    assert list(metrics["baselines"]) == ["pca-k4"]
    assert 0 < metrics["baselines"]["pca-k4"]["nmse"] < 1
    assert metrics["baselines"]["pca-k4"]["k"] == 4
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
    [(None, 6), (1, 1), (54, 6)],  # of 54 rows in 6 blocks
)
def test_as_many_blocks_as_hold_the_tokens(model, n_tokens, n_blocks):
    batches = list(
        read_held_out(
            model, FewBlocks(), HOOK, exclude_positions=(), n_tokens=n_tokens, batch_blocks=4
        )
    )
    assert sum(len(batch.tokens) for batch in batches) == n_blocks
    lengths = torch.cat([batch.lengths for batch in batches])
    assert int(sum(batch.real.sum() for batch in batches)) == int(lengths.sum()) >= (n_tokens or 54)


def test_more_tokens_than_are_held_out(model):
    with pytest.raises(CorpusError, match="expected at least 55 tokens"):
        evaluate(model, {}, n_tokens=55)
