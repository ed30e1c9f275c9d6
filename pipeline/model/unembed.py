"""Next-token cross-entropy and its gradient, in chunks of rows.

Logits over the vocabulary are a language model's memory peak: 8 x 256 rows of GPT-2's 50,257 are
412 MB, and autograd would keep several copies. Here two chunks exist at a time at most, and the
gradient is written down, not derived.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

CHUNK_BYTES = 96 * 2**20  # of float32 logits


class Unembedding(NamedTuple):
    """The linear map from the last hidden state to the logits."""

    weight: Tensor  # [d_vocab, d_model]
    bias: Tensor | None  # [d_vocab]; None where it is zero


class RowLosses(NamedTuple):
    """What the head says about each row."""

    loss: Tensor  # [rows], nats; float32, or float64 for a float64 model
    grads: Tensor | None  # [rows, d_model], of the row's loss with respect to its hidden state


def row_losses(
    hidden: Float[Tensor, "rows d_model"],
    targets: Int[Tensor, " rows"],
    unembedding: Unembedding,
    *,
    with_grads: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> RowLosses:
    """Cross-entropy of each row and, if asked, its gradient with respect to the row's hidden state.

        logits = hidden @ W^T + b          loss = logsumexp(logits) - logits[target]
        grad = (softmax(logits) - onehot(target)) @ W

    hidden [rows, d_model]; targets [rows], token ids. Losses are in nats, neither summed nor
    averaged. Products are taken in W's dtype, softmax and loss in float32 at least.
    """
    weight, bias = unembedding
    loss_dtype = torch.promote_types(weight.dtype, torch.float32)
    loss = hidden.new_empty(len(hidden), dtype=loss_dtype)
    grads = torch.empty_like(hidden) if with_grads else None
    chunk = max(1, chunk_bytes // (4 * len(weight)))
    with torch.no_grad():
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            target = targets[rows, None]
            logits = linear(hidden[rows].to(weight.dtype), weight, bias)
            log_probs = logits.log_softmax(-1, dtype=loss_dtype)
            loss[rows] = -log_probs.gather(-1, target)[:, 0]
            if grads is not None:
                minus_one = log_probs.new_tensor(-1.0).expand_as(target)
                error = log_probs.exp_().scatter_add_(-1, target, minus_one)
                grads[rows] = (error.to(weight.dtype) @ weight).to(hidden.dtype)
    return RowLosses(loss, grads)


def reduce_precision(unembedding: Unembedding, dtype: torch.dtype) -> Unembedding:
    """The unembedding in 16 bits, centred over the vocabulary first.

    A constant added to all logits of a row changes neither its loss nor its gradient, but GPT-2's
    logits lie near -100, where bfloat16's spacing is 0.5; centred ones lie near 0.
    """
    weight, bias = unembedding
    reduced = torch.empty_like(weight, dtype=dtype)
    torch.sub(weight, weight.mean(0), out=reduced)
    return Unembedding(reduced, None if bias is None else (bias - bias.mean()).to(dtype))
