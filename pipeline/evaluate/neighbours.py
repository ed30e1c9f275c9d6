"""Near-duplicates among an SAE's live decoder rows (Olmo et al. 2024, Fig. 8 bottom)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.evaluate.scales import ROWS_AT_ONCE

BIN_WIDTH = 0.025  # of the histogram


class Tails(NamedTuple):
    """Places of latents in a list of cosines, equally many each."""

    left: Int[Tensor, " n"]  # the lowest cosines
    middle: Int[Tensor, " n"]  # those around the median
    right: Int[Tensor, " n"]  # the highest


class Picked(NamedTuple):
    """What is measured of one SAE."""

    live: Int[Tensor, " live"]  # latents; none where a single one is live, with none to be near
    cosines: Float[Tensor, " live"]  # of each with its nearest
    tails: Tails  # places in the two above

    @property
    def latents(self) -> Int[Tensor, " picked"]:
        """Those of the left tail, then of the middle, then of the right."""
        return self.live[torch.cat(self.tails)]


def nearest_cosines(W_dec: Float[Tensor, "latents d_model"]) -> Float[Tensor, " latents"]:
    """Each row's cosine with its nearest other row.

        c_i = max over j != i of (d_i . d_j) / (||d_i|| ||d_j||)

    ROWS_AT_ONCE rows of the product exist at a time. A row of zeros has cosine 0 with all others; a
    row alone has none to be near, and -inf.
    """
    units = normalize(W_dec.detach().float(), dim=-1)
    nearest = []
    for start in range(0, len(units), ROWS_AT_ONCE):
        cosines = units[start : start + ROWS_AT_ONCE] @ units.T
        cosines.diagonal(start).fill_(-math.inf)
        nearest.append(cosines.amax(1).clamp(max=1))
    return torch.cat(nearest) if nearest else units.new_empty(0)


def pick_tails(cosines: Float[Tensor, " latents"], n: int) -> Tails:
    """The n lowest, the n around the median, and the n highest; at most a third of all each."""
    n = min(n, len(cosines) // 3)
    order = cosines.argsort(stable=True)
    middle = (len(order) - n) // 2
    return Tails(order[:n], order[middle : middle + n], order[len(order) - n :])


def list_bins(cosines: Float[Tensor, " latents"]) -> list[dict[str, float]]:
    """Fraction of the latents in each bin, from the lowest cosine's to the one that ends at 1.

    A bin holds its lower end; the last holds 1 too.
    """
    if len(cosines) == 0:
        return []
    last = round(1 / BIN_WIDTH) - 1
    places = (cosines.double() / BIN_WIDTH).floor().long().clamp(max=last)
    first = int(places.min())
    fractions = torch.bincount(places - first, minlength=last - first + 1) / len(cosines)
    return [
        {"bin_low": i * BIN_WIDTH, "bin_high": (i + 1) * BIN_WIDTH, "fraction": fraction}
        for i, fraction in enumerate(fractions.tolist(), first)
    ]


def pick_latents(
    W_dec: Float[Tensor, "d_sae d_model"], live: Bool[Tensor, " d_sae"], n: int
) -> Picked:
    """The live latents, their cosines with the nearest live one, and n of each group."""
    latents = live.to(W_dec.device).nonzero().squeeze(1)
    latents = latents if len(latents) > 1 else latents[:0]
    cosines = nearest_cosines(W_dec[latents])
    return Picked(latents, cosines, pick_tails(cosines, n))
