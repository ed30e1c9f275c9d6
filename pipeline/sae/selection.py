"""Which k latents a row keeps: gradient-weighted TopK, and how far it departs from plain TopK."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import ConfigError

# Rows handled at once where what is made of them is many times their size.
ROW_BLOCK = 512

# Scores are weighed and searched in pieces that two cores' L2 caches hold. Measured on one core at
# 1024 rows of 15360: absolute value, weighing and group maxima take 19 ms so, 26 ms in one piece.
_CACHE_BYTES = 2**22
_GROUP = 16  # scores of which only the largest is compared first
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
    n_rows = max(1, _CACHE_BYTES // (pre_acts.shape[1] * pre_acts.element_size()))
    pieces = pre_acts.split(n_rows)
    projections = [None] * len(pieces) if projected is None else projected.split(n_rows)
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

    On a CPU in two stages: the k largest scores are among the k groups with the largest maxima. The
    maxima are taken of the bits read as integers, which order numbers that are not negative as the
    numbers are ordered: for bfloat16 6 times as fast. CPU time of one core
    at 1024 rows of 15360 float32, k 32: 40 ms in one stage, 27 ms in two.
    """
    n_groups, rest = divmod(scores.shape[1], _GROUP)
    if scores.is_cuda or rest or n_groups < 4 * k:
        return scores.topk(k, dim=1, sorted=False).indices
    bits = scores.view(_INTEGERS[scores.element_size()])
    maxima, groups = bits.view(-1, _GROUP, n_groups).amax(1).topk(k, dim=1, sorted=False)
    if maxima.lt(0).any():  # negative scores, or NaN, among the largest
        return scores.topk(k, dim=1, sorted=False).indices
    members = torch.arange(0, scores.shape[1], n_groups)
    candidates = (groups[:, :, None] + members).flatten(1)
    best = scores.gather(1, candidates).topk(k, dim=1, sorted=False).indices
    return candidates.gather(1, best)


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
