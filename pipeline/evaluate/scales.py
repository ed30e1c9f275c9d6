"""What beta does: how far the gradient moves the selection, at several values of loss_tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.evaluate.activity import list_fired
from pipeline.evaluate.held_out import HeldOut
from pipeline.sae import SparseAutoencoder

ROWS_AT_ONCE = 512  # 512 rows of 15,360 dense float32 latents are 31 MB

NOTHING_SELECTED = {
    "selection_overlap": None,
    "selection_overlap_at": None,
    "gradient_weight": None,
    "latent_gradient": None,
}


class ScaleTotals:
    """Sums over held-out rows of one selecting SAE, by loss_tokens N.

    Counted are the latents that fire: they are what is selected, less those with z <= 0 that a
    k-sparse architecture is left with where fewer than k are positive. BatchTopK keeps the
    threshold of its own N: at another, how many fire is another number too.
    """

    def __init__(self, sae: SparseAutoencoder, loss_tokens: Sequence[int]) -> None:
        self.sae, self.own, self.beta = sae, sae.loss_tokens, sae.beta
        every = sorted({*loss_tokens, sae.loss_tokens})
        self.fired = dict.fromkeys(every, 0)
        self.shared = dict.fromkeys(every, 0)  # that fire without the gradient too
        self.gradient = dict.fromkeys(every, 0.0)  # |W_decᵀ ∇L| of those that fire

    def add(self, batch: HeldOut) -> None:
        """Select one batch's patched rows once for each N, and once without the gradient."""
        columns = (batch.acts, batch.grads, batch.tokens[:, :-1])
        pieces = (column[batch.patched].split(ROWS_AT_ONCE) for column in columns)
        for acts, grads, tokens in zip(*pieces, strict=True):
            self._add_rows(acts, grads, tokens)

    def _add_rows(self, acts: Tensor, grads: Tensor, tokens: Tensor) -> None:
        sae = self.sae
        plain = _keys(*list_fired(sae.encode(acts, None, tokens)), sae.d_sae)
        projected = (grads @ sae.W_dec.T).abs()
        for n in self.fired:
            # beta / N weighs the gradient as the SAE's own beta / loss_tokens weighs this one.
            rows, latents = list_fired(sae.encode(acts, grads * (self.own / n), tokens))
            self.fired[n] += len(rows)
            self.shared[n] += int(torch.isin(_keys(rows, latents, sae.d_sae), plain).sum())
            self.gradient[n] += projected[rows, latents].sum(dtype=torch.float64).item()

    def summarise(self) -> dict[str, float | dict[str, float]]:
        """Means over the latents that fire; the overlap at the SAE's own N stands apart.

        selection_overlap     fraction that fires without the gradient too
        gradient_weight       beta / N * |W_decᵀ ∇L|, what the score adds to 1; no unit
        latent_gradient       |W_decᵀ ∇L| / N; Olmo et al. 2024, Table 2 has 2.1e-5 to 2.9e-5
        """
        some = {n: max(fired, 1) for n, fired in self.fired.items()}
        overlap = {str(n): self.shared[n] / some[n] for n in some}
        gradient = {str(n): self.gradient[n] / some[n] / n for n in some}
        return {
            "selection_overlap": overlap[str(self.own)],
            "selection_overlap_at": overlap,
            "gradient_weight": {n: self.beta * value for n, value in gradient.items()},
            "latent_gradient": gradient,
        }


def _keys(rows: Tensor, latents: Tensor, d_sae: int) -> Tensor:
    return rows * d_sae + latents
