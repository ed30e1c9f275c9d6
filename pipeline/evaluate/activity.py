"""Which latents fire, and how often."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

DEAD_WINDOW_ROWS = 5 * 4096  # the paper: no activation in 5 consecutive batches (of 4096 tokens)


class Activity:
    """Counts of firings, fed with consecutive batches of the latents that fired.

    `dead_fraction` is the paper's: the fraction of latents without an activation in 5 * 4096
    consecutive rows, averaged over the ends of all batches that have so many rows behind them; None
    where there are too few rows. `dead_fraction_held_out` counts those that never fired at all.
    """

    def __init__(self, d_sae: int) -> None:
        self.n_rows = 0
        self.firings = torch.zeros(d_sae, dtype=torch.int64)
        self._last_row = torch.full((d_sae,), -1)  # row after which each latent last fired
        self._dead_fractions: list[float] = []

    def add(self, indices: Int[Tensor, "batch k"], fired: Bool[Tensor, "batch k"]) -> None:
        """Count one batch: latent `indices[b, j]` fired on row b where `fired[b, j]`."""
        rows = self.n_rows + torch.arange(1, len(indices) + 1)[:, None].expand_as(indices)
        self.firings += torch.bincount(indices[fired], minlength=len(self.firings))
        self._last_row.scatter_reduce_(0, indices[fired], rows[fired], reduce="amax")
        self.n_rows += len(indices)
        if self.n_rows >= DEAD_WINDOW_ROWS:
            dead = self._last_row <= self.n_rows - DEAD_WINDOW_ROWS
            self._dead_fractions.append(dead.float().mean().item())

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a row."""
        return self.firings.sum().item() / self.n_rows

    @property
    def dead_fraction(self) -> float | None:
        if not self._dead_fractions:
            return None
        return sum(self._dead_fractions) / len(self._dead_fractions)

    @property
    def dead_fraction_held_out(self) -> float:
        return (self.firings == 0).float().mean().item()
