"""One pass over held-out text: every SAE and control patched into the model, with and without the
gradient at inference.

Positions that training left out stay unpatched; beside it stands the loss with all positions
patched. Everything is summed per block, so that intervals can be had by resampling blocks.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.capture import capture
from pipeline.corpus.reader import Corpus
from pipeline.evaluate.activity import Activity, list_fired
from pipeline.evaluate.controls import Baseline, Control
from pipeline.evaluate.faithfulness import MODES, Sums, nmse_per_row
from pipeline.evaluate.held_out import HeldOut, draw_blocks, label_documents, read_held_out
from pipeline.evaluate.patching import Patcher, Reference
from pipeline.evaluate.scales import NOTHING_SELECTED, ROWS_AT_ONCE, ScaleTotals
from pipeline.evaluate.summary import describe_model, describe_sae, describe_text, summarise_all
from pipeline.model import LanguageModel
from pipeline.sae import SparseAutoencoder


class Measured(NamedTuple):
    """What one pass says."""

    metrics: dict[str, Any]  # as metrics.json has it
    activities: dict[str, dict[str, Activity]]  # by SAE and mode
    sums: dict[tuple[str, str], Sums]  # by SAE or control, and mode
    documents: Int[Tensor, " blocks"]  # that each block of the sums begins in


class Totals:
    """Sums per held-out block of one reconstruction."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []  # [columns of Sums, blocks]

    def add(
        self,
        patcher: Patcher,
        batch: HeldOut,
        reference: Reference,
        recon: Float[Tensor, "blocks context d_model"],
        *,
        all_positions: bool,
    ) -> None:
        """Compare x̂ with x, and patch it in; a second time at all positions if asked."""
        outcome = everywhere = patcher.patch(batch, reference, recon)
        nmse = torch.zeros_like(batch.loss)
        nmse[batch.patched] = nmse_per_row(batch.acts[batch.patched], recon[batch.patched])
        if all_positions and not torch.equal(batch.real, batch.patched):
            everywhere = patcher.patch(batch, reference, recon, all_positions=True)
        columns = Sums(
            rows=batch.real,
            patched_rows=batch.patched,
            loss=batch.loss,
            patched_loss=outcome.loss,
            nmse=nmse,
            nmse_squared=nmse.double().square(),
            kl=outcome.kl,
            loss_all_positions=everywhere.loss if all_positions else nmse * torch.nan,
        )
        self._batches.append(torch.stack([column.double().sum(1) for column in columns]).cpu())

    def sums(self) -> Sums:
        return Sums(*torch.cat(self._batches, dim=1))


class Code:
    """One SAE, control or ablation, and its sums by mode; where beta is 0 the two modes are one."""

    def __init__(self, code: SparseAutoencoder | Baseline, modes: Sequence[str]) -> None:
        self.code = code
        self.totals = {mode: Totals() for mode in modes}
        self.activities = {
            mode: Activity(code.d_sae) for mode in modes if isinstance(code, SparseAutoencoder)
        }

    def add(
        self, patcher: Patcher, batch: HeldOut, reference: Reference, *, all_positions: bool = False
    ) -> None:
        """Reconstruct and patch one batch in each mode."""
        for mode, total in self.totals.items():
            recon = reconstruct(self.code, batch, self.activities.get(mode), mode=mode)
            total.add(patcher, batch, reference, recon, all_positions=all_positions)

    def find_mode(self, mode: str) -> str:
        """The mode that stands for `mode`."""
        return mode if mode in self.totals else next(iter(self.totals))


class _Pass(NamedTuple):
    """Everything that is measured, by name."""

    ablated: dict[str, Code]
    compared: dict[str, Code]  # controls
    measured: dict[str, Code]  # SAEs
    scales: dict[str, ScaleTotals]  # of those that select

    def add(self, patcher: Patcher, batch: HeldOut, own_loss: Collection[str]) -> None:
        """Measure one batch; SAEs named in `own_loss` see each token's own gradient."""
        reference = patcher.look(batch)
        own = _with_own_grads(patcher, batch) if own_loss else batch
        for code in (*self.ablated.values(), *self.compared.values()):
            code.add(patcher, batch, reference)
        for name, code in self.measured.items():
            seen = own if name in own_loss else batch
            code.add(patcher, seen, reference, all_positions=True)
            if name in self.scales:
                self.scales[name].add(seen)


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
    bootstrap_draws: int,
    controls: Mapping[str, Control] | None = None,
    own_loss: Collection[str] = (),
    on_progress: Callable[[int], None] | None = None,
) -> Measured:
    """Measure every SAE on the corpus's held-out blocks.

    `mean_act` [d_model] is what mean ablation patches in. Losses and KL are means in nats over all
    real held-out rows, NMSE over those whose position training did not leave out. Intervals are
    those of bootstrap_draws resamplings of blocks, though blocks of one document depend on each
    other: claims are decided by documents. An architecture that selects nothing has None for what
    beta does, and the same figures in both modes. `controls` are reconstructed and patched in the
    same way, but not at all positions. SAEs named in `own_loss` select with the gradient of each
    token's own loss, as they were trained to. Raises CorpusError if fewer than `n_tokens` are held
    out.
    """
    controls = controls or {}
    about = {"hook": hook, "model": describe_model(model, hook)}
    documents = label_documents(model, corpus, draw_blocks(corpus, n_tokens))
    patcher = Patcher(model, hook)
    codes = _Pass(
        ablated={
            "zero": Code(torch.zeros_like, MODES[1:]),
            "mean": Code(mean_act.expand_as, MODES[1:]),
        },
        compared={name: Code(control.code, control.modes) for name, control in controls.items()},
        measured={name: Code(sae, MODES if sae.beta else MODES[:1]) for name, sae in saes.items()},
        scales={name: ScaleTotals(sae, loss_tokens) for name, sae in saes.items() if sae.selects},
    )
    for batch in read_held_out(
        model,
        corpus,
        hook,
        exclude_positions=exclude_positions,
        n_tokens=n_tokens,
        batch_blocks=batch_blocks,
    ):
        codes.add(patcher, batch, own_loss)
        if on_progress:
            on_progress(int(batch.real.sum()))
    return _gather(about, codes, saes, controls, documents, draws=bootstrap_draws)


def _with_own_grads(patcher: Patcher, batch: HeldOut) -> HeldOut:
    """The batch with each row's gradient of its own loss in place of that of all later ones."""
    model, hook = patcher.model, patcher.hook
    captured = capture(model, batch.tokens, (hook,), lengths=batch.lengths, loss="own")
    return batch._replace(grads=captured.grads[hook])


def _gather(
    about: Mapping[str, Any],
    codes: _Pass,
    saes: Mapping[str, SparseAutoencoder],
    controls: Mapping[str, Control],
    documents: Int[Tensor, " blocks"],
    *,
    draws: int,
) -> Measured:
    """What the sums say."""
    measured, compared, scales = codes.measured, codes.compared, codes.scales
    sums = {
        (name, mode): code.totals[code.find_mode(mode)].sums()
        for name, code in (measured | compared).items()
        for mode in (MODES if name in measured else code.totals)
    }
    ablations = {name: code.totals[MODES[1]].sums() for name, code in codes.ablated.items()}
    fired = {
        (name, mode): code.activities[code.find_mode(mode)]
        for name, code in (measured | compared).items()
        for mode in (MODES if name in measured else code.activities)
    }
    figures = summarise_all(sums, fired, ablations, draws=draws)
    metrics = {
        "hook": about["hook"],
        "model": about["model"] | describe_text(ablations, documents),
        "saes": {
            name: describe_sae(sae)
            | figures[name]
            | (scales[name].summarise() if name in scales else NOTHING_SELECTED)
            for name, sae in saes.items()
        },
        "controls": {name: control.facts | figures[name] for name, control in controls.items()},
    }
    activities = {name: {mode: fired[name, mode] for mode in MODES} for name in measured}
    return Measured(metrics, activities, sums, documents)


def reconstruct(
    code: SparseAutoencoder | Baseline,
    batch: HeldOut,
    activity: Activity | None,
    *,
    mode: str,
) -> Float[Tensor, "blocks context d_model"]:
    """x̂ of all rows, a few hundred at a time; `activity` counts what fires on the patched ones."""
    if not isinstance(code, SparseAutoencoder):
        return code(batch.acts.flatten(0, 1)).view_as(batch.acts)
    patched = batch.patched.flatten()
    columns = (batch.acts.flatten(0, 1), batch.grads.flatten(0, 1), batch.tokens[:, :-1].flatten())
    parts, fired_rows, fired_latents = [], [], []
    pieces = (column.split(ROWS_AT_ONCE) for column in columns)
    for i, (acts, grads, tokens) in enumerate(zip(*pieces, strict=True)):
        latents = code.encode(acts, grads if mode == "with_gradient" else None, tokens)
        parts.append(code.decode(latents, tokens))
        rows, indices = list_fired(latents)
        fired_rows.append(rows + i * ROWS_AT_ONCE)
        fired_latents.append(indices)
    rows, latents = torch.cat(fired_rows), torch.cat(fired_latents)
    counted = patched[rows]
    number = patched.cumsum(0) - 1  # of each patched row among the patched ones
    if activity:
        activity.add(number[rows[counted]], latents[counted], n_rows=int(patched.sum()))
    return torch.cat(parts).view_as(batch.acts)


def list_blocks(sums: Mapping[tuple[str, str], Sums]) -> list[dict[str, Any]]:
    """One row per SAE or control, mode and block, blocks numbered as they were read."""
    return [
        {
            "name": name,
            "mode": mode,
            "block": block,
            "rows": int(rows),
            "patched_rows": int(patched_rows),
            "loss": loss,
            "patched_loss": patched_loss,
            "nmse_sum": nmse,
            "kl_sum": kl,
        }
        for (name, mode), of_blocks in sums.items()
        for block, (rows, patched_rows, loss, patched_loss, nmse, _, kl, _) in enumerate(
            zip(*(column.tolist() for column in of_blocks), strict=True)
        )
    ]
