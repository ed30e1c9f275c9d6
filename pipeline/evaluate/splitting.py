"""Gradients along decoder rows that have a near-duplicate, and along those that have none (Olmo et
al. 2024, section 4.3, Fig. 8 bottom and Table 2).

The paper's claim is that latents in the right tail, whose decoder rows lie close to another one,
are those along which the loss changes most: the gradient's size rises from the left tail through
the middle to the right, and more so in the g-SAE.

All of it is about live latents: a dead latent's row is what training left of its random start.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.corpus.reader import Corpus
from pipeline.evaluate.activity import list_fired
from pipeline.evaluate.bootstrap import draw_weights, find_interval, spread_interval, sum_by
from pipeline.evaluate.held_out import (
    HeldOut,
    draw_blocks,
    label_documents,
    look_at,
    read_batches,
)
from pipeline.evaluate.neighbours import Picked, list_bins, pick_latents
from pipeline.evaluate.scales import ROWS_AT_ONCE
from pipeline.model import LanguageModel
from pipeline.sae import SparseAutoencoder

GROUPS = ("left", "middle", "right")


class SplittingTables(NamedTuple):
    """Rows of three tables."""

    histogram: list[dict[str, Any]]  # splitting
    gradients: list[dict[str, Any]]  # splitting_gradients
    summary: list[dict[str, Any]]  # splitting_summary


class BlockSums(NamedTuple):
    """Sums over each block's patched rows, of each picked latent i; d_i is its unit decoder row."""

    gradient: Float[Tensor, "blocks picked"]  # |d_i . grad|, nats per unit of activation
    rows: Float[Tensor, "blocks picked"]  # 1
    gradient_active: Float[Tensor, "blocks picked"]  # |d_i . grad| where the latent fires
    rows_active: Float[Tensor, "blocks picked"]  # 1 where it fires


class GroupMeans(NamedTuple):
    """Means of |d_i . grad| in each resampling, by GROUPS."""

    gradient: Float[Tensor, "3 draws_and_one"]
    gradient_active: Float[Tensor, "3 draws_and_one"]  # over rows where the latent fires


@torch.no_grad()
def measure_splitting(
    model: LanguageModel,
    corpus: Corpus,
    saes: Mapping[str, SparseAutoencoder],
    live: Mapping[str, Bool[Tensor, " d_sae"]],
    *,
    hook: str,
    exclude_positions: tuple[int, ...],
    n_latents: int,
    n_blocks: int,
    batch_blocks: int,
    draws: int,
) -> SplittingTables:
    """Nearest cosines among each SAE's live latents, and the gradients along those in the tails.

        gradient_G = mean over latents i in G, patched rows t of |d_i . grad_t L| / loss_tokens

    with d_i the decoder row at unit norm, L the loss summed over the block in nats, and loss_tokens
    the SAE's own setting. gradient_active is the mean over those (i, t) alone where the latent
    fires without the gradient in the selection. ratio is the gradient of the right group over that
    of the left, ratio_active likewise; ratio_by_document is the same ratio with the interval that
    claims are decided by.

    The blocks are the first n_blocks of held-out text's fixed random order, or all if there are
    fewer. Intervals resample blocks, and the latents of each group; that of ratio_by_document
    resamples whole documents, and is None of fewer than bootstrap.MIN_UNITS, as the others are of
    so few blocks or latents. With n_latents = 0, and of an
    SAE with fewer than three live latents, there is no gradient and the ratios are None.

    Tables: splitting (sae, bin_low, bin_high, fraction); splitting_gradients (sae, group, n,
    blocks, rows, loss_tokens, cosine_low, cosine_high, gradient and gradient_active with their
    intervals); splitting_summary (sae, d_sae, live, documents, cosine_q05, cosine_median,
    cosine_q95, ratio, ratio_active and ratio_by_document with their intervals).

    Differs: the paper names neither the denominator of the gradient (see loss_tokens), nor whether
    dead latents are in the histogram, nor how its 30 latents were taken from each part of it.
    """
    picked = {name: pick_latents(sae.W_dec, live[name], n_latents) for name, sae in saes.items()}
    sums: dict[str, list[BlockSums]] = {name: [] for name, it in picked.items() if len(it.latents)}
    order = draw_blocks(corpus, None)[: n_blocks if sums else 0]
    documents = label_documents(model, corpus, order) if sums else torch.empty(0)
    for tokens, lengths in read_batches(corpus, order, batch_blocks=batch_blocks):
        tokens, lengths = tokens.to(model.device), lengths.to(model.device)
        batch = look_at(model, tokens, lengths, hook, exclude_positions=exclude_positions)
        for name in sums:
            sums[name].append(sum_batch(saes[name], batch, picked[name].latents))
    tables = SplittingTables([], [], [])
    for name, sae in saes.items():
        about = {"sae": name, "d_sae": sae.d_sae, "live": int(live[name].sum())}
        about["documents"] = len(documents.unique())
        groups, summary = describe_sae(
            picked[name], sums.get(name, []), documents, sae.loss_tokens, draws=draws
        )
        tables.histogram.extend({"sae": name, **bar} for bar in list_bins(picked[name].cosines))
        tables.gradients.extend({"sae": name, **group} for group in groups)
        tables.summary.append(about | summary)
    return tables


def describe_sae(
    picked: Picked,
    sums: Sequence[BlockSums],
    documents: Tensor,
    loss_tokens: int,
    *,
    draws: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One SAE's rows by group and its summary, from each batch's sums and their blocks' documents;
    of no sums there is no group.
    """
    if not sums:
        return [], summarise(picked.cosines, None, None)
    total = BlockSums(*(torch.cat(column) for column in zip(*sums, strict=True)))
    means = resample_groups(total, draws=draws)
    whole = BlockSums(*(sum_by(documents, column) for column in total))
    by_document = resample_groups(whole, draws=draws)
    groups = list_groups(picked, total, means, loss_tokens)
    return groups, summarise(picked.cosines, means, by_document)


def sum_batch(sae: SparseAutoencoder, batch: HeldOut, latents: Int[Tensor, " picked"]) -> BlockSums:
    """Project one batch's gradients on the unit decoder rows of `latents`."""
    units = normalize(sae.W_dec[latents].to(batch.grads.dtype), dim=-1)
    patched = batch.patched[..., None]
    projected = (batch.grads @ units.T).abs().double() * patched
    fires = find_firing(sae, batch, latents) & patched
    return BlockSums(
        projected.sum(1),
        patched.expand_as(projected).sum(1).double(),
        (projected * fires).sum(1),
        fires.sum(1).double(),
    )


def find_firing(
    sae: SparseAutoencoder, batch: HeldOut, latents: Int[Tensor, " picked"]
) -> Bool[Tensor, "blocks context picked"]:
    """Where each of `latents` fires without the gradient, on every row of the batch."""
    n_rows = batch.real.numel()
    fires = torch.zeros(n_rows, len(latents), dtype=torch.bool, device=batch.acts.device)
    place = torch.full((sae.d_sae,), -1, device=latents.device)
    place[latents] = torch.arange(len(latents), device=latents.device)
    acts, tokens = batch.acts.flatten(0, 1), batch.tokens[:, :-1].flatten()
    for start in range(0, n_rows, ROWS_AT_ONCE):
        piece = slice(start, start + ROWS_AT_ONCE)
        rows, fired = list_fired(sae.encode(acts[piece], None, tokens[piece]))
        wanted = place[fired] >= 0
        fires[rows[wanted] + start, place[fired[wanted]]] = True
    return fires.view(*batch.real.shape, -1)


def resample_groups(sums: BlockSums, *, draws: int) -> GroupMeans:
    """Every group's means in each resampling.

    All groups see the same blocks in a draw, so that their ratio does not vary with the text's
    common part.
    """
    n = sums.rows.shape[1] // len(GROUPS)
    blocks = draw_weights(len(sums.rows), draws=draws)
    latents = torch.cat([draw_weights(n, draws=draws, seed=i + 1) for i in range(len(GROUPS))], 1)

    def mean(totals: Tensor, counts: Tensor) -> Tensor:
        both = ((blocks @ part.cpu()) * latents for part in (totals, counts))
        totals, counts = (part.unflatten(1, (len(GROUPS), n)).sum(2).T for part in both)
        return totals / counts

    return GroupMeans(mean(sums.gradient, sums.rows), mean(sums.gradient_active, sums.rows_active))


def list_groups(
    picked: Picked, sums: BlockSums, means: GroupMeans, loss_tokens: int
) -> list[dict[str, Any]]:
    """A row per group; its cosines are the lowest and the highest in it."""
    return [
        {
            "group": group,
            "n": len(places),
            "blocks": len(sums.rows),
            "rows": int(sums.rows[:, 0].sum()),
            "loss_tokens": loss_tokens,
            "cosine_low": picked.cosines[places].min().item(),
            "cosine_high": picked.cosines[places].max().item(),
            **spread_interval("gradient", find_interval(mean / loss_tokens)),
            **spread_interval("gradient_active", find_interval(active / loss_tokens)),
        }
        for group, places, mean, active in zip(GROUPS, picked.tails, *means, strict=True)
    ]


def summarise(
    cosines: Float[Tensor, " live"], means: GroupMeans | None, by_document: GroupMeans | None
) -> dict[str, Any]:
    """Quantiles of the cosines, None of none; and what the right tail's gradient is of the
    left's.
    """
    points = torch.tensor([0.05, 0.5, 0.95], device=cosines.device)
    quantiles = torch.quantile(cosines, points).tolist() if len(cosines) else (None,) * 3
    names = ("cosine_q05", "cosine_median", "cosine_q95")
    by_group = (*(means or (None, None)), by_document.gradient if by_document else None)
    ratios = [None if by is None else find_interval(by[-1] / by[0]) for by in by_group]
    return (
        dict(zip(names, quantiles, strict=True))
        | spread_interval("ratio", ratios[0])
        | spread_interval("ratio_active", ratios[1])
        | spread_interval("ratio_by_document", ratios[2])
    )
