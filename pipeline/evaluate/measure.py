"""One pass over held-out text: every SAE patched into the model, with and without the gradient at
inference.

The g-SAE's selection uses the gradient of the very loss that is then measured, so it sees the
label. Every figure is therefore taken twice: with the gradient (the paper's protocol) and without
it (beta = 0 at inference, what an exported SAE does). Positions that training left out stay
unpatched; beside it stands the loss with all positions patched.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.capture import capture, patched_loss
from pipeline.corpus.reader import Corpus
from pipeline.errors import CorpusError
from pipeline.evaluate.activity import Activity
from pipeline.evaluate.faithfulness import ce_recovered, loss_added, nmse_per_row
from pipeline.model import LanguageModel
from pipeline.sae import SparseAutoencoder
from pipeline.sae.selection import measure_gradient_weight, measure_overlap

MODES = ("with_gradient", "without_gradient")


class HeldOut(NamedTuple):
    """One batch of held-out blocks with all that the model says about it."""

    tokens: Tensor  # [batch, context + 1]
    lengths: Tensor  # [batch] real rows of each block
    acts: Tensor  # [batch, context, d_model]
    grads: Tensor  # [batch, context, d_model] of the summed loss
    loss: Tensor  # [batch, context] nats
    real: Tensor  # [batch, context] rows that have a target
    patched: Tensor  # [batch, context] real rows whose position training did not leave out


class Totals:
    """Sums over held-out rows for one SAE in one mode."""

    def __init__(self, d_sae: int) -> None:
        self.nmse = 0.0
        self.nmse_squared = 0.0
        self.loss = 0.0
        self.loss_all_positions = 0.0
        self.activity = Activity(d_sae)


class BetaScale(NamedTuple):
    """What beta does at one loss_tokens, averaged over rows."""

    overlap: float  # fraction of the selected latents that plain TopK selects too
    gradient_weight: float  # mean beta / loss_tokens * |W_decᵀ ∇L| of selected latents
    latent_gradient: (
        float  # mean |W_decᵀ ∇L| / loss_tokens of selected latents; Table 2 has 2.1e-5 to 2.9e-5
    )


@torch.no_grad()
def evaluate_saes(
    model: LanguageModel,
    corpus: Corpus,
    saes: Mapping[str, SparseAutoencoder],
    *,
    hook: str,
    mean_act: Tensor,
    exclude_positions: tuple[int, ...],
    n_tokens: int | None,
    batch_blocks: int,
    loss_tokens: tuple[int, ...],
    on_progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Activity]]]:
    """Measure every SAE on the corpus's held-out blocks; returns metrics and activities by member
    and mode.

    `mean_act` [d_model] is what mean ablation patches in. Losses are means in nats over all real
    held-out rows. Raises CorpusError if fewer than `n_tokens` are held out.
    """
    totals = {name: {mode: Totals(sae.d_sae) for mode in MODES} for name, sae in saes.items()}
    scales: dict[str, list[tuple[int, dict[int, BetaScale]]]] = {name: [] for name in saes}
    n_rows = n_patched = 0
    sums = {"loss": 0.0, "zero": 0.0, "mean": 0.0}
    for batch in read_held_out(
        model,
        corpus,
        hook,
        exclude_positions=exclude_positions,
        n_tokens=n_tokens,
        batch_blocks=batch_blocks,
    ):
        n_rows += int(batch.real.sum())
        n_patched += int(batch.patched.sum())
        sums["loss"] += batch.loss[batch.real].sum().item()
        sums["zero"] += _patched_sum(model, batch, hook, torch.zeros_like(batch.acts))
        sums["mean"] += _patched_sum(model, batch, hook, mean_act.expand_as(batch.acts))
        for name, sae in saes.items():
            _add_batch(totals[name], model, batch, sae, hook)
            scales[name].append((int(batch.patched.sum()), _measure_beta(sae, batch, loss_tokens)))
        if on_progress:
            on_progress(int(batch.real.sum()))

    means = {key: value / n_rows for key, value in sums.items()}
    metrics = {
        "hook": hook,
        "model": {
            "tokens": n_rows,
            "loss": means["loss"],
            "loss_zero_ablation": means["zero"],
            "loss_mean_ablation": means["mean"],
        },
        "saes": {
            name: _describe(sae)
            | {mode: _summarise(totals[name][mode], means, n_rows, n_patched) for mode in MODES}
            | _average_scales(scales[name], sae.loss_tokens)
            for name, sae in saes.items()
        },
    }
    return metrics, {
        name: {m: t.activity for m, t in modes.items()} for name, modes in totals.items()
    }


def read_held_out(
    model: LanguageModel,
    corpus: Corpus,
    hook: str,
    *,
    exclude_positions: tuple[int, ...],
    n_tokens: int | None,
    batch_blocks: int,
) -> Iterator[HeldOut]:
    """Held-out blocks in a fixed random order, so that `n_tokens` of them are a sample of all
    documents.
    """
    lengths = corpus.lengths("held_out")
    available = int(lengths.sum())
    if n_tokens is not None and n_tokens > available:
        raise CorpusError(
            f"held-out text at {corpus.folder}: expected at least {n_tokens:,} tokens "
            f"(evaluate.tokens), got {available:,}. Set evaluate.tokens to null, or make a larger "
            "corpus with `pipeline corpus`."
        )
    order = np.random.default_rng(0).permutation(len(lengths))
    n_blocks = len(order)
    if n_tokens is not None:
        n_blocks = int(np.searchsorted(np.cumsum(lengths[order]), n_tokens)) + 1
    for i in range(0, n_blocks, batch_blocks):
        blocks = [
            corpus.read_blocks("held_out", int(j), 1)
            for j in order[i : min(i + batch_blocks, n_blocks)]
        ]
        tokens = (
            torch.from_numpy(np.concatenate([b.tokens for b in blocks])).long().to(model.device)
        )
        real_lengths = torch.from_numpy(np.concatenate([b.lengths for b in blocks])).to(
            model.device
        )
        captured = capture(model, tokens, (hook,), lengths=real_lengths)
        position = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        real = position < real_lengths[:, None]
        kept = ~torch.isin(position, torch.tensor(exclude_positions, device=tokens.device))
        yield HeldOut(
            tokens,
            real_lengths,
            captured.acts[hook],
            captured.grads[hook],
            captured.loss,
            real,
            real & kept,
        )


def _add_batch(
    totals: dict[str, Totals],
    model: LanguageModel,
    batch: HeldOut,
    sae: SparseAutoencoder,
    hook: str,
) -> None:
    """Reconstruct and patch one batch in both modes; at beta = 0 the second is the first."""
    for mode in MODES if sae.beta else MODES[:1]:
        grads = batch.grads.flatten(0, 1) if mode == "with_gradient" else None
        latents = sae.encode(batch.acts.flatten(0, 1), grads)
        recon = sae.decode(latents)
        rows = batch.patched.flatten()
        ratios = nmse_per_row(batch.acts.flatten(0, 1)[rows], recon[rows]).double()
        total = totals[mode]
        total.nmse += ratios.sum().item()
        total.nmse_squared += ratios.square().sum().item()
        total.activity.add(latents.indices[rows].cpu(), (latents.values[rows] > 0).cpu())
        recon = recon.view_as(batch.acts)
        total.loss += _patched_sum(model, batch, hook, recon)
        total.loss_all_positions += _patched_sum(model, batch, hook, recon, all_positions=True)
    if not sae.beta:
        totals["without_gradient"] = totals["with_gradient"]


def _patched_sum(
    model: LanguageModel,
    batch: HeldOut,
    hook: str,
    replacement: Tensor,
    *,
    all_positions: bool = False,
) -> float:
    where = batch.real if all_positions else batch.patched
    patched = torch.where(where[..., None], replacement, batch.acts)
    loss = patched_loss(model, batch.tokens, hook, patched, lengths=batch.lengths)
    return loss[batch.real].sum().item()


def _measure_beta(
    sae: SparseAutoencoder, batch: HeldOut, loss_tokens: tuple[int, ...]
) -> dict[int, BetaScale]:
    acts, grads = batch.acts[batch.patched], batch.grads[batch.patched]
    plain = sae.encode(acts).indices
    scales = {}
    for n in {*loss_tokens, sae.loss_tokens}:
        indices = sae.encode(acts, grads * (sae.loss_tokens / n)).indices
        latent_gradient = measure_gradient_weight(indices, grads, sae.W_dec, beta_per_token=1 / n)
        scales[n] = BetaScale(
            overlap=measure_overlap(indices, plain, d_sae=sae.d_sae),
            gradient_weight=sae.beta * latent_gradient,
            latent_gradient=latent_gradient,
        )
    return scales


def _average_scales(
    batches: list[tuple[int, dict[int, BetaScale]]], own: int
) -> dict[str, float | dict[str, float]]:
    """Row-weighted means over batches, by loss_tokens; the SAE's own overlap stands apart."""
    n_rows = sum(n for n, _ in batches)

    def mean(loss_tokens: int, field: str) -> float:
        return sum(n * getattr(scales[loss_tokens], field) for n, scales in batches) / n_rows

    every = sorted(batches[0][1])
    return {
        "selection_overlap": mean(own, "overlap"),
        "selection_overlap_at": {str(n): mean(n, "overlap") for n in every},
        "gradient_weight": {str(n): mean(n, "gradient_weight") for n in every},
        "latent_gradient": {str(n): mean(n, "latent_gradient") for n in every},
    }


def _describe(sae: SparseAutoencoder) -> dict[str, Any]:
    return {"k": sae.k, "beta": sae.beta, "d_sae": sae.d_sae, "loss_tokens": sae.loss_tokens}


def _summarise(
    total: Totals, means: dict[str, float], n_rows: int, n_patched: int
) -> dict[str, float | None]:
    loss = total.loss / n_rows
    return {
        "nmse": total.nmse / n_patched,
        "nmse_squared": total.nmse_squared / n_patched,
        "loss": loss,
        "loss_added": loss_added(means["loss"], loss),
        "loss_added_all_positions": loss_added(means["loss"], total.loss_all_positions / n_rows),
        "ce_recovered_zero": ce_recovered(means["loss"], loss, means["zero"]),
        "ce_recovered_mean": ce_recovered(means["loss"], loss, means["mean"]),
        "l0": total.activity.l0,
        "dead_fraction": total.activity.dead_fraction,
        "dead_fraction_held_out": total.activity.dead_fraction_held_out,
    }
