"""Which k latents a row keeps: gradient-weighted TopK, and how far it departs from plain TopK."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import ConfigError

# Rows handled at once where what is made of them is many times their size.
ROW_BLOCK = 512

# Rows weighed and searched at once: few enough to stay near, and enough for torch to search
# them on two cores, for it gives a core 137 rows of 240 numbers at least. CPU time of one core at
# 1024 rows of 15360 in float32, k 32: 42 ms; in pieces of 64 rows 43 ms, of 512 rows 46 ms.
_SEARCH_ROWS = 256
_GROUP = 8  # scores of which only the largest is compared first
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Latents(NamedTuple):
    """A sparse code: the latents that rows may use, in no particular order."""

    values: Float[Tensor, "batch width"]  # never negative, 0: unused; in units of the scaled input
    indices: Int[Tensor, "batch width"]  # int64, distinct within a row where values are above zero


def select(
    pre_acts: Float[Tensor, "batch d_sae"],
    grads: Float[Tensor, "batch d_model"] | None,
    W_dec: Float[Tensor, "d_sae d_model"],
    *,
    k: int,
    beta_per_token: float,
) -> Latents:
    """Keep the k latents with the largest signed gradient-weighted score, then apply a ReLU.

        score = z + beta / loss_tokens * z * |grads @ W_dec^T|        (Olmo et al. 2024, section 3)
        y_i   = ReLU(z_i) if score_i is among the k largest, else 0

    pre_acts z [batch, d_sae]; grads [batch, d_model], nats per unit of unscaled activation, of the
    *summed* loss; W_dec [d_sae, d_model]; beta_per_token is beta / loss_tokens, in units of
    activation per nat. `grads=None` selects by z alone, exactly as beta 0 does. Which of several
    equal scores is kept is left to torch.topk.

    Differs: the paper does not say how its loss is reduced; a stored gradient is of the summed
    loss, and beta / loss_tokens restores the scale of a mean over loss_tokens. The ReLU: smol-sae
    has none, so that its TopK may keep negative latents; here they are zero, and exports to other
    libraries are exact.

    Raises ConfigError if k > d_sae.
    """
    if k > pre_acts.shape[1]:
        raise ConfigError(f"k at select: expected at most d_sae = {pre_acts.shape[1]}, got {k}.")
    projected = None if grads is None or beta_per_token == 0 else grads @ W_dec.T
    with torch.no_grad():
        indices = rank(pre_acts, projected, k=k, beta_per_token=beta_per_token)
    return Latents(pre_acts.gather(1, indices).relu_(), indices)


def rank(
    pre_acts: Float[Tensor, "batch d_sae"],
    projected: Float[Tensor, "batch d_sae"] | None,
    *,
    k: int,
    beta_per_token: float,
) -> Int[Tensor, "batch k"]:
    """The indices that `select` keeps, given grads @ W_dec^T, which is overwritten."""
    if pre_acts.is_cuda:  # where launches cost, and no cache holds a piece
        return find_largest(_weigh(pre_acts, projected, beta_per_token), k=k)
    pieces = pre_acts.split(_SEARCH_ROWS)
    projections = [None] * len(pieces) if projected is None else projected.split(_SEARCH_ROWS)
    found = [
        find_largest(_weigh(piece, projection, beta_per_token), k=k)
        for piece, projection in zip(pieces, projections, strict=True)
    ]
    return torch.cat(found)


def _weigh(pre_acts: Tensor, projected: Tensor | None, beta_per_token: float) -> Tensor:
    if projected is None:
        return pre_acts
    return torch.addcmul(pre_acts, pre_acts, projected.abs_(), value=beta_per_token, out=projected)


def find_largest(scores: Float[Tensor, "batch d_sae"], *, k: int) -> Int[Tensor, "batch k"]:
    """Indices of each row's k largest, in no particular order.

    On a CPU the scores' bits are compared as integers, which order numbers that are not negative as
    the numbers are ordered, and faster.
    """
    if scores.is_cuda:
        return scores.topk(k, dim=1, sorted=False).indices
    bits = scores.view(_INTEGERS[scores.element_size()])
    indices = _find_largest_integers(bits, k)
    if bits.gather(1, indices).lt(0).any():  # negative scores, or NaN, among the largest
        return scores.topk(k, dim=1, sorted=False).indices
    return indices


def _find_largest_integers(numbers: Tensor, k: int) -> Tensor:
    """The k largest are in the k groups with the largest maxima, which are found the same way."""
    n_groups, rest = divmod(numbers.shape[1], _GROUP)
    if rest or n_groups < 4 * k:
        return numbers.topk(k, dim=1, sorted=False).indices
    grouped = numbers.view(-1, _GROUP, n_groups)  # a group's numbers lie far apart
    groups = _find_largest_integers(grouped.amax(1), k)
    members = grouped.gather(2, groups[:, None].expand(-1, _GROUP, -1))
    best = members.flatten(1).topk(k, dim=1, sorted=False).indices
    return groups.gather(1, best % k) + best // k * n_groups


def count_shared(selected: Latents, plain: Latents, *, d_sae: int) -> Int[Tensor, ""]:
    """How many latents above zero, of all rows, are above zero in the same row of `plain` too."""
    first_key = torch.arange(len(selected.indices), device=selected.indices.device)[:, None] * d_sae
    keys, plain_keys = (
        (latents.indices + first_key)[latents.values > 0] for latents in (selected, plain)
    )
    return torch.isin(keys, plain_keys, assume_unique=True).sum()


def sum_gradient_weight(
    selected: Latents,
    grads: Float[Tensor, "batch d_model"],
    W_dec: Float[Tensor, "d_sae d_model"],
    *,
    beta_per_token: float,
) -> Float[Tensor, ""]:
    """Sum over all rows and latents above zero of beta / loss_tokens * |W_dec^T grad|.

    It is what `select` adds to 1 before it multiplies z: far below 1 the gradient does not matter,
    far above 1 little else does. No unit.
    """
    rows, slots = (selected.values > 0).nonzero(as_tuple=True)
    latents, n = selected.indices[rows, slots], 32 * ROW_BLOCK
    total = grads.new_zeros(())
    for row, latent in zip(rows.split(n), latents.split(n), strict=True):
        total += (W_dec[latent] * grads[row]).sum(dim=1).abs().sum()
    return beta_per_token * total
