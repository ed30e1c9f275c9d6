"""Every architecture's figures against whole runs of the model, one block and one row at a time."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from pipeline.capture import capture, patched_loss
from pipeline.config import load_config
from pipeline.corpus.packing import Packing, SplitPacker
from pipeline.corpus.reader import Blocks
from pipeline.corpus.tokens import find_separator
from pipeline.errors import CorpusError
from pipeline.evaluate import activity as activity_module
from pipeline.evaluate import evaluate_runs, evaluate_saes
from pipeline.evaluate.activity import Activity, list_fired
from pipeline.evaluate.bootstrap import draw_weights
from pipeline.evaluate.controls import Control
from pipeline.evaluate.faithfulness import Sums
from pipeline.evaluate.held_out import draw_blocks, label_documents, read_held_out
from pipeline.evaluate.measure import list_blocks
from pipeline.evaluate.stage import fit_controls
from pipeline.evaluate.subjects import Subjects, name_architecture
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
from tests.evaluate.few_blocks import FewBlocks

CONTEXT, VOCAB, D_MODEL, D_SAE, K = 12, 64, 16, 48, 4
HOOK = "blocks.1.hook_resid_post"
LENGTHS = (12, 7, 12, 2, 9, 12, 12, 5)
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

    def __init__(self, model: LanguageModel, tokens: Tensor, hook: str = HOOK) -> None:
        self.hook = hook
        self.bridge, self.inputs, self.targets = model.bridge, tokens[None, :-1], tokens[1:]
        self.rows = [i for i in range(len(self.targets)) if i not in EXCLUDE]
        leaf: list[Tensor] = []

        def keep(value: Tensor, **_: Any) -> Tensor:
            leaf.append(value.detach().requires_grad_())
            return leaf[0]

        logits = self.run(keep)
        loss = cross_entropy(logits, self.targets, reduction="sum")
        (grads,) = torch.autograd.grad(loss, leaf[0])
        self.loss, self.acts, self.grads = loss.item(), leaf[0][0].detach(), grads[0]
        self.log_p = logits.detach().double().log_softmax(-1)
        self.zero, _ = self.patch(torch.zeros_like(self.acts), self.rows)
        self.mean, _ = self.patch(torch.ones_like(self.acts), self.rows)

    def run(self, hook: Any) -> Tensor:
        return self.bridge.run_with_hooks(self.inputs, fwd_hooks=[(self.hook, hook)])[0]

    @torch.no_grad()
    def patch(self, recon: Tensor, rows: list[int]) -> tuple[float, float]:
        """Summed loss, and summed KL of the original's predictions from the patched run's."""
        replaced = self.acts.clone()
        replaced[rows] = recon[rows]
        logits = self.run(lambda value, hook: replaced[None])  # noqa: ARG005
        divergence = kl_div(
            logits.double().log_softmax(-1), self.log_p, log_target=True, reduction="sum"
        )
        return cross_entropy(logits, self.targets, reduction="sum").item(), divergence.item()


@pytest.fixture(scope="module")
def blocks(model) -> list[Block]:
    return split_blocks(model, HOOK)


def without_intervals(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures alone, each of which lay inside its interval if it has one."""
    figures = dict(figures)
    for name in ("loss_added", "nmse", "kl"):
        assert figures.pop(f"{name}_low") <= figures[name] <= figures.pop(f"{name}_high")
    return figures


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


def split_blocks(model: LanguageModel, hook: str) -> list[Block]:
    held_out = FewBlocks(LENGTHS).read_blocks("held_out", 0, len(LENGTHS))
    return [
        Block(model, torch.from_numpy(tokens[: length + 1]).long(), hook)
        for tokens, length in zip(*held_out, strict=True)
    ]


def slow_figures(blocks: list[Block], recons: list[Tensor]) -> dict[str, float]:
    ratios, losses, all_losses, divergences = [], [], [], []
    for block, recon in zip(blocks, recons, strict=True):
        ratios += [
            ((block.acts[i] - recon[i]).norm() / block.acts[i].norm()).item() for i in block.rows
        ]
        loss, divergence = block.patch(recon, block.rows)
        losses.append(loss)
        divergences.append(divergence)
        all_losses.append(block.patch(recon, list(range(len(block.targets))))[0])
    own, zero, mean = (
        sum(getattr(block, name) for block in blocks) for name in ("loss", "zero", "mean")
    )
    return {
        "nmse": sum(ratios) / len(ratios),
        "nmse_squared": sum(ratio**2 for ratio in ratios) / len(ratios),
        "kl": sum(divergences) / sum(LENGTHS),
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
        "bootstrap_draws": 50,
    }
    return evaluate_saes(model, FewBlocks(LENGTHS), saes, **arguments | changes)


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
