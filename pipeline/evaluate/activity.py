"""Which latents fire, and how often."""

import torch
from jaxtyping import Int
from torch import Tensor

from pipeline.sae import Latents

DEAD_WINDOW_ROWS = 5 * 4096  # the paper: no activation in 5 consecutive batches (of 4096 tokens)


def list_fired(latents: Latents) -> tuple[Int[Tensor, " fired"], Int[Tensor, " fired"]]:
    """Row and latent of every value above zero, row by row: what fires, however it is padded."""
    rows, slots = (latents.values > 0).nonzero(as_tuple=True)
    return rows, latents.indices[rows, slots]


class Activity:
    """Counts of firings, fed with consecutive batches of the latents that fired.

    `dead_fraction` is the paper's: the fraction of latents without an activation in 5 * 4096
    consecutive rows, averaged over the ends of all batches that have so many rows behind them; None
    where there are too few rows. `dead_fraction_held_out` counts those that never fired at all.
    `dead_ends` is at how many of those ends, `n_ends` of them, each latent was dead.
    """

    def __init__(self, d_sae: int) -> None:
        self.n_rows = 0
        self.firings = torch.zeros(d_sae, dtype=torch.int64)
        self._last_row = torch.full((d_sae,), -1)  # row after which each latent last fired
        self.dead_ends = torch.zeros(d_sae, dtype=torch.int64)
        self.n_ends = 0

    def add(
        self, rows: Int[Tensor, " fired"], latents: Int[Tensor, " fired"], *, n_rows: int
    ) -> None:
        """Count one batch of n_rows: `latents[i]` fired on its row `rows[i]`, counted from 0."""
        rows, latents = rows.cpu(), latents.cpu()
        self.firings += torch.bincount(latents, minlength=len(self.firings))
        self._last_row.scatter_reduce_(0, latents, self.n_rows + rows + 1, reduce="amax")
        self.n_rows += n_rows
        if self.n_rows >= DEAD_WINDOW_ROWS:
            self.dead_ends += self._last_row <= self.n_rows - DEAD_WINDOW_ROWS
            self.n_ends += 1

    @property
    def l0(self) -> float | None:
        """Mean number of latents that fire on a row; None of no rows."""
        return self.firings.sum().item() / self.n_rows if self.n_rows else None

    @property
    def dead_fraction(self) -> float | None:
        return self.dead_ends.double().mean().item() / self.n_ends if self.n_ends else None

    @property
    def dead_fraction_held_out(self) -> float:
        return (self.firings == 0).float().mean().item()
