"""One pass over held-out text: every SAE patched into the model, with and without the gradient at
inference, and what they are compared with.

The g-SAE's selection uses the gradient of the very loss that is then measured, so it sees the
label. Every figure is therefore taken twice: with the gradient (the paper's protocol) and without
it (beta = 0 at inference, what an exported SAE does). Positions that training left out stay
unpatched; beside it stands the loss with all positions patched.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.capture import patched_loss
from pipeline.corpus.reader import Corpus
from pipeline.evaluate.activity import Activity, list_fired
from pipeline.evaluate.faithfulness import ce_recovered, loss_added, nmse_per_row
from pipeline.evaluate.held_out import HeldOut, read_held_out
from pipeline.evaluate.scales import NOTHING_SELECTED, ROWS_AT_ONCE, ScaleTotals
from pipeline.model import LanguageModel
from pipeline.sae import SparseAutoencoder

MODES = ("with_gradient", "without_gradient")

Baseline = Callable[[Float[Tensor, "rows d_model"]], Float[Tensor, "rows d_model"]]  # acts → recon


class Totals:
    """Sums over held-out rows of one reconstruction."""

    def __init__(self) -> None:
        self.nmse = 0.0
        self.nmse_squared = 0.0
        self.loss = 0.0
        self.loss_all_positions = 0.0

    def add(self, model: LanguageModel, batch: HeldOut, hook: str, recon: Tensor) -> None:
        """Compare x̂ [blocks, context, d_model] with x, and patch it in."""
        ratios = nmse_per_row(batch.acts[batch.patched], recon[batch.patched]).double()
        self.nmse += ratios.sum().item()
        self.nmse_squared += ratios.square().sum().item()
        self.loss += _patched_sum(model, batch, hook, recon)
        self.loss_all_positions += _patched_sum(model, batch, hook, recon, all_positions=True)


class SaeTotals:
    """Sums over held-out rows of one SAE, by mode; where beta is 0 the two modes are one."""

    def __init__(self, sae: SparseAutoencoder, loss_tokens: tuple[int, ...]) -> None:
        modes = MODES if sae.beta else MODES[:1]
        self.totals = {mode: Totals() for mode in modes}
        self.activities = {mode: Activity(sae.d_sae) for mode in modes}
        self.scales = ScaleTotals(sae, loss_tokens) if sae.selects else None

    def add(self, model: LanguageModel, batch: HeldOut, hook: str, sae: SparseAutoencoder) -> None:
        """Reconstruct and patch one batch in each mode."""
        for mode, total in self.totals.items():
            recon = reconstruct(
                sae, batch, self.activities[mode], with_gradient=mode == "with_gradient"
            )
            total.add(model, batch, hook, recon)
        if self.scales:
            self.scales.add(sae, batch)

    def in_mode(self, mode: str) -> tuple[Totals, Activity]:
        mode = mode if mode in self.totals else MODES[0]
        return self.totals[mode], self.activities[mode]


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
    baselines: Mapping[str, Baseline] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Activity]]]:
    """Measure every SAE on the corpus's held-out blocks; returns metrics and activities by member
    and mode.

    `mean_act` [d_model] is what mean ablation patches in. Losses are means in nats over all real
    held-out rows, NMSE over those whose position training did not leave out. An architecture that
    selects nothing has None for what beta does, and the same figures in both modes. `baselines` are
    reconstructed and patched in the same way. Raises CorpusError if fewer than `n_tokens` are held
    out.
    """
    baselines = baselines or {}
    measured = {name: SaeTotals(sae, loss_tokens) for name, sae in saes.items()}
    compared = {name: Totals() for name in baselines}
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
            measured[name].add(model, batch, hook, sae)
        for name, baseline in baselines.items():
            recon = baseline(batch.acts.flatten(0, 1)).view_as(batch.acts)
            compared[name].add(model, batch, hook, recon)
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
            name: _describe(sae) | _summarise_sae(measured[name], means, n_rows, n_patched)
            for name, sae in saes.items()
        },
        "baselines": {
            name: _summarise(total, means, n_rows, n_patched) for name, total in compared.items()
        },
    }
    activities = {
        name: {mode: sums.in_mode(mode)[1] for mode in MODES} for name, sums in measured.items()
    }
    return metrics, activities


def reconstruct(
    sae: SparseAutoencoder, batch: HeldOut, activity: Activity, *, with_gradient: bool
) -> Float[Tensor, "blocks context d_model"]:
    """x̂ of all rows, a few hundred at a time; `activity` counts what fires on the patched ones."""
    patched = batch.patched.flatten()
    columns = (batch.acts.flatten(0, 1), batch.grads.flatten(0, 1), batch.tokens[:, :-1].flatten())
    parts, fired_rows, fired_latents = [], [], []
    pieces = (column.split(ROWS_AT_ONCE) for column in columns)
    for i, (acts, grads, tokens) in enumerate(zip(*pieces, strict=True)):
        latents = sae.encode(acts, grads if with_gradient else None, tokens)
        parts.append(sae.decode(latents, tokens))
        rows, indices = list_fired(latents)
        fired_rows.append(rows + i * ROWS_AT_ONCE)
        fired_latents.append(indices)
    rows, latents = torch.cat(fired_rows), torch.cat(fired_latents)
    counted = patched[rows]
    number = patched.cumsum(0) - 1  # of each patched row among the patched ones
    activity.add(number[rows[counted]], latents[counted], n_rows=int(patched.sum()))
    return torch.cat(parts).view_as(batch.acts)


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


def _describe(sae: SparseAutoencoder) -> dict[str, Any]:
    """What the SAE is; k is the L0 wanted where the architecture does not fix it."""
    return {
        "architecture": sae.architecture,
        "k": sae.k,
        "beta": sae.beta,
        "d_sae": sae.d_sae,
        "loss_tokens": sae.loss_tokens,
    }


def _summarise_sae(
    sums: SaeTotals, means: dict[str, float], n_rows: int, n_patched: int
) -> dict[str, Any]:
    modes = {}
    for mode in MODES:
        total, activity = sums.in_mode(mode)
        modes[mode] = _summarise(total, means, n_rows, n_patched) | {
            "l0": activity.l0,
            "dead_fraction": activity.dead_fraction,
            "dead_fraction_held_out": activity.dead_fraction_held_out,
        }
    return modes | (sums.scales.summarise() if sums.scales else NOTHING_SELECTED)


def _summarise(
    total: Totals, means: dict[str, float], n_rows: int, n_patched: int
) -> dict[str, float]:
    loss = total.loss / n_rows
    return {
        "nmse": total.nmse / n_patched,
        "nmse_squared": total.nmse_squared / n_patched,
        "loss": loss,
        "loss_added": loss_added(means["loss"], loss),
        "loss_added_all_positions": loss_added(means["loss"], total.loss_all_positions / n_rows),
        "ce_recovered_zero": ce_recovered(means["loss"], loss, means["zero"]),
        "ce_recovered_mean": ce_recovered(means["loss"], loss, means["mean"]),
    }
