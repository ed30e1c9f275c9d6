"""The language model run on a reconstruction: losses of a batch's rows, and how far its predictions
have moved.

One run of the blocks above the hook gives both, from one product with the vocabulary: of the
logits nothing but their logarithmic sum is needed.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from pipeline.capture import patched_hidden
from pipeline.evaluate.held_out import HeldOut
from pipeline.model import LanguageModel, Unembedding
from pipeline.model.unembed import reduce_precision
from pipeline.upper import find_lower_blocks, run_upper

CHUNK_BYTES = 4 * 2**20  # of float32 logits; 4096 rows of 4096 take half as long as at 96 MiB


class Reference(NamedTuple):
    """What the model makes of one batch's real rows as they are."""

    hidden: Float[Tensor, "rows d_model"]  # what the unembedding reads
    log_sum: Float[Tensor, " rows"]  # of the exponentials of the logits
    mean_weight: Float[Tensor, "rows d_model"]  # softmax(logits) @ W
    target_weight: Float[Tensor, "rows d_model"]  # W's row of each next token
    target_bias: Float[Tensor, " rows"]


class Outcome(NamedTuple):
    """What the model makes of one batch's patched rows; 0 on padding."""

    loss: Float[Tensor, "blocks context"]  # nats
    kl: Float[Tensor, "blocks context"]  # nats


class Patcher:
    """Patches reconstructions into one hook of a model, batch after batch.

    Where all that is above the hook reads it alone (resid_pre, resid_post) only the blocks above
    it run; at other hooks the whole model does.
    """

    def __init__(self, model: LanguageModel, hook: str) -> None:
        self.model, self.hook, self.n_lower = model, hook, find_lower_blocks(hook)
        # Centred over the vocabulary, which changes no loss: its sums keep more digits.
        dtype = torch.promote_types(model.unembedding.weight.dtype, torch.float32)
        self.unembedding = reduce_precision(model.unembedding, dtype)

    def look(self, batch: HeldOut) -> Reference:
        """Run the batch as it is, once for all reconstructions."""
        targets = batch.tokens[:, 1:][batch.real]
        return make_reference(self._run(batch, batch.acts), targets, self.unembedding)

    def patch(
        self,
        batch: HeldOut,
        reference: Reference,
        recon: Float[Tensor, "blocks context d_model"],
        *,
        all_positions: bool = False,
    ) -> Outcome:
        """Put x̂ in the place of x at the patched positions, or at all real ones."""
        where = batch.real if all_positions else batch.patched
        hidden = self._run(batch, torch.where(where[..., None], recon.to(batch.acts), batch.acts))
        columns = compare_rows(hidden, reference, self.unembedding)
        return Outcome(*(_spread(column, batch.real) for column in columns))

    def _run(self, batch: HeldOut, acts: Tensor) -> Tensor:
        """What the unembedding reads at the real rows."""
        if self.n_lower is None:
            hidden = patched_hidden(
                self.model, batch.tokens, self.hook, acts, lengths=batch.lengths
            )
        else:
            inputs = batch.tokens[:, :-1].masked_fill(~batch.real, 0)
            hidden = run_upper(self.model, inputs, acts, n_lower=self.n_lower)
        return hidden[batch.real]


def make_reference(
    hidden: Float[Tensor, "rows d_model"],
    targets: Int[Tensor, " rows"],
    unembedding: Unembedding,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Reference:
    """What `compare_rows` needs of the rows as they are, logits a chunk at a time."""
    weight, bias = unembedding
    hidden = hidden.to(weight.dtype)
    log_sum, mean_weight = hidden.new_empty(len(hidden)), torch.empty_like(hidden)
    for rows in _chunks(len(hidden), len(weight), chunk_bytes):
        logits = linear(hidden[rows], weight, bias)
        log_sum[rows] = logits.logsumexp(-1)
        mean_weight[rows] = logits.sub_(log_sum[rows, None]).exp_() @ weight
    target_bias = hidden.new_zeros(len(hidden)) if bias is None else bias[targets]
    return Reference(hidden, log_sum, mean_weight, weight[targets], target_bias)


def compare_rows(
    hidden: Float[Tensor, "rows d_model"],
    reference: Reference,
    unembedding: Unembedding,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Loss of each patched row and KL(original || patched), in nats, neither summed nor averaged.

        l(h) = h @ W^T + b        A(h) = log sum over v of exp l_v(h)        p = softmax(l(h0))
        loss = A(h) - W_target · h - b_target
        KL   = sum over v of p_v (log p_v - log q_v) = A(h) - A(h0) - (p @ W) · (h - h0)

    h0 are the rows as they are, h those patched, q = softmax(l(h)). The second form of KL is the
    first with log softmax written out; p @ W and A(h0) are the same for every reconstruction. Its
    rounding error is that of A, 1e-6 or so, and may leave a KL of 0 below 0.
    """
    weight, bias = unembedding
    hidden = hidden.to(weight.dtype)
    log_sum = hidden.new_empty(len(hidden))
    for rows in _chunks(len(hidden), len(weight), chunk_bytes):
        logits = linear(hidden[rows], weight, bias)
        largest = logits.amax(-1, keepdim=True)
        log_sum[rows] = largest[:, 0] + logits.sub_(largest).exp_().sum(-1).log_()
    loss = log_sum - (reference.target_weight * hidden).sum(-1) - reference.target_bias
    moved = hidden - reference.hidden
    return loss, log_sum - reference.log_sum - (reference.mean_weight * moved).sum(-1)


def _chunks(n_rows: int, d_vocab: int, chunk_bytes: int) -> list[slice]:
    size = max(1, chunk_bytes // (4 * d_vocab))
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def _spread(rows: Tensor, real: Tensor) -> Tensor:
    spread = rows.new_zeros(real.shape)
    spread[real] = rows
    return spread
