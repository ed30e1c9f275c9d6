"""The BatchTopK autoencoder (Bussmann et al. 2024): k latents per row on average over a batch."""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from pipeline.sae.base import SparseAutoencoder, TrainingPass
from pipeline.sae.group import Group
from pipeline.sae.selection import ROW_BLOCK, Latents

THRESHOLD_DECAY = 0.99  # per step, of the running means: about the last 100 batches count
_SAMPLE_STRIDE = 61  # prime, so that the sample has every latent


class BatchTopKSAE(SparseAutoencoder):
    """A k-sparse autoencoder whose rows share the latents of their batch.

        z     = (s x - b_dec) @ W_enc + b_enc                               [batch, d_sae]
        score = z + beta / loss_tokens * z * |grads @ W_dec^T|              [batch, d_sae]
        y     = ReLU(z) on the batch * k largest scores of the batch, else 0         in training
        y     = ReLU(z) where score > θ, else 0                                      in inference
        x̂    = (y @ W_dec + b_dec) / s                                     [batch, d_model]

    Bussmann et al. 2024 (2412.06410), section 3; the score is Olmo et al. 2024's, section 3. A
    batch is that of all processes together. θ is the running mean over training batches of the
    smallest score above zero that was kept, so that the mean L0 is about k; there is one for
    scores with a gradient and one for z alone, which the same batches give. Before the first batch
    both are 0. Where k is annealed, the mean starts again with each k.

    Differs: the paper's θ is a plain mean over batches. `encode` is inference; a batch is selected
    in `train_forward` only.
    """

    architecture: ClassVar[str] = "batch_topk"
    selects: ClassVar[bool] = True

    threshold: Tensor  # scalar buffer; of z, in units of the scaled input
    steered_threshold: Tensor  # scalar buffer; of scores with a gradient, likewise

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("steered_threshold", torch.zeros(()))
        self._smallest: tuple[Tensor | None, Tensor | None] = None, None  # until `after_loss`
        self._k_changed = False

    def reset_extra(self) -> None:
        """Both thresholds are 0 again: not yet known."""
        self.threshold.zero_()
        self.steered_threshold.zero_()

    def set_k(self, k: int) -> None:
        """The thresholds of another k say nothing of this one's."""
        self._k_changed = k != self.k
        self.k = k

    @torch.no_grad()
    def after_loss(self) -> None:
        """Move the thresholds towards what `train_forward` kept."""
        for threshold, smallest in zip(
            (self.steered_threshold, self.threshold), self._smallest, strict=True
        ):
            if smallest is not None:
                goes_on = (threshold > 0) & (not self._k_changed)
                threshold.lerp_(smallest, torch.where(goes_on, 1 - THRESHOLD_DECAY, 1.0))
        self._smallest = None, None

    def encode(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """The latents above the threshold; rows differ in how many, and are filled up with 0."""
        del tokens
        x = self.scale_rows(acts)
        steered = grads is not None and self.beta > 0
        threshold = self.steered_threshold if steered else self.threshold
        with torch.no_grad():
            blocks = self._score_blocks(x, grads if steered else None)
            kept = _join([_list_above(block.scores, block, threshold) for block in blocks])
        return _pad(self._read(kept, x), n_rows=len(acts))

    def train_forward(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> TrainingPass:
        """Select in the whole batch; the smallest scores kept are left to `after_loss`."""
        del tokens
        x = self.scale_rows(acts)
        n = int(self.group.sum(torch.tensor(len(acts)))) * self.k
        with torch.no_grad():
            kept, plain = self._list_largest(x, grads if self.beta else None, n=n)
            kept, steered = _keep_in_group(kept, n, self.group)
            unsteered = steered if plain is None else _keep_in_group(plain, n, self.group)[1]
        self._smallest = steered, unsteered
        entries = self._read(kept, x)
        recon = (_decode(entries, self.W_dec, n_rows=len(acts)) + self.b_dec) / self.input_scale
        return TrainingPass(recon, _pad(entries, n_rows=len(acts)), recon.new_zeros(()))

    def _score_blocks(self, x: Tensor, grads: Tensor | None) -> Iterator["_Block"]:
        """All of z and the scores, a few rows at a time (see `encode_rows`)."""
        dtype = self.product_dtype or self.W_enc.dtype
        W_enc, b_enc, W_dec = (w.to(dtype) for w in (self.W_enc, self.b_enc, self.W_dec))
        n_rows = max(1, len(x)) if x.is_cuda else ROW_BLOCK
        for first in range(0, max(1, len(x)), n_rows):
            centred = (x[first : first + n_rows] - self.b_dec).to(dtype)
            z = scores = torch.addmm(b_enc, centred, W_enc).to(x.dtype)
            if grads is not None:
                projected = (grads[first : first + n_rows].to(dtype) @ W_dec.T).to(x.dtype)
                scores = torch.addcmul(z, z, projected.abs_(), value=self.beta_per_token)
            yield _Block(z, scores, first * self.d_sae)

    def _list_largest(
        self, x: Tensor, grads: Tensor | None, *, n: int
    ) -> tuple["_Candidates", "_Candidates | None"]:
        """This process's n largest scores above zero; with grads, its n largest z too."""
        kept = plain = None
        for block in self._score_blocks(x, grads):
            kept = _take_in(kept, block.scores, block, n)
            if grads is not None:
                plain = _take_in(plain, block.pre_acts, block, n)
        assert kept is not None  # there is a block, though it may be empty
        return kept, plain

    def _read(self, kept: "_Candidates", x: Tensor) -> "_Entries":
        places, order = kept.places.sort()
        rows, columns = places // self.d_sae, places % self.d_sae
        values = _Values.apply(
            x, self.W_enc, self.b_enc, self.b_dec, kept.pre_acts[order], rows, columns
        )
        return _Entries(values, rows, columns)


class _Block(NamedTuple):
    """Some rows' latents, dense."""

    pre_acts: Float[Tensor, "rows d_sae"]
    scores: Float[Tensor, "rows d_sae"]
    first_place: int  # row * d_sae + latent of the first


class _Candidates(NamedTuple):
    """Latents that may be kept, in no particular order."""

    scores: Float[Tensor, " n"]
    pre_acts: Float[Tensor, " n"]
    places: Int[Tensor, " n"]  # row * d_sae + latent


class _Entries(NamedTuple):
    """The kept latents, row by row."""

    values: Float[Tensor, " n"]
    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]


def _list_above(scores: Tensor, block: _Block, floor: Tensor | float) -> _Candidates:
    places = (scores > floor).flatten().nonzero().flatten()
    return _Candidates(
        scores.flatten()[places], block.pre_acts.flatten()[places], places + block.first_place
    )


def _join(parts: list[_Candidates]) -> _Candidates:
    return _Candidates(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _take_in(kept: _Candidates | None, scores: Tensor, block: _Block, n: int) -> _Candidates:
    """The n largest of both; nothing below a score that n others reach is looked at."""
    floor = kept.scores.min() if kept and len(kept.scores) == n else None
    listed = _list_above(scores, block, _guess_floor(scores, n) if floor is None else floor)
    if floor is None and len(listed.scores) < n:
        listed = _list_above(scores, block, 0.0)  # the guess was too high
    joined = _join([kept, listed]) if kept else listed
    if len(joined.scores) <= n:
        return joined
    best = joined.scores.topk(n, sorted=False).indices
    return _Candidates(*(tensor[best] for tensor in joined))


def _guess_floor(scores: Tensor, n: int) -> Tensor | float:
    """A score that a little more than n reach, from a sample; to sort all takes 10 times longer."""
    sample = scores.flatten()[::_SAMPLE_STRIDE]
    rank = int(1.2 * n / _SAMPLE_STRIDE) + 10
    return sample.topk(rank).values[-1].clamp_min(0) if rank <= len(sample) else 0.0


def _keep_in_group(
    kept: _Candidates, n: int, group: Group
) -> tuple[_Candidates, Float[Tensor, ""] | None]:
    """This process's part of the n largest of all processes, and the smallest score of those n."""
    lengths = group.gather(torch.tensor([len(kept.scores)], device=kept.scores.device))
    first = int(lengths[: group.rank].sum())
    everyone = group.gather(kept.scores)
    values, indices = everyone.topk(min(n, len(everyone)), sorted=False)
    own = indices[(indices >= first) & (indices < first + len(kept.scores))] - first
    smallest = values.min() if len(values) else None
    return _Candidates(*(tensor[own] for tensor in kept)), smallest


def _pad(entries: _Entries, *, n_rows: int) -> Latents:
    """Rows as wide as the widest; filled up with value 0 at any index."""
    values, rows, columns = entries
    lengths = rows.bincount(minlength=n_rows)
    width = max(1, int(lengths.max())) if n_rows else 1
    slots = torch.arange(len(rows), device=rows.device) - (lengths.cumsum(0) - lengths)[rows]
    indices = torch.arange(width, device=rows.device).repeat(n_rows, 1)
    indices[rows, slots] = columns
    return Latents(values.new_zeros(n_rows, width).index_put((rows, slots), values), indices)


def _decode(entries: _Entries, W_dec: Tensor, *, n_rows: int) -> Float[Tensor, "batch d_model"]:
    """S @ W_dec, of exactly the kept entries: an unusual row that keeps many costs only those."""
    values, rows, columns = entries
    lengths = rows.bincount(minlength=n_rows)
    return embedding_bag(
        columns, W_dec, lengths.cumsum(0) - lengths, mode="sum", per_sample_weights=values
    )


class _Values(Function):
    """z at the kept places, all above zero, computed before; its gradient is as sparse as it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        values: Tensor,
        rows: Tensor,
        columns: Tensor,
    ) -> Tensor:
        del b_enc
        ctx.save_for_backward(x, W_enc, b_dec, rows, columns)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        x, W_enc, b_dec, rows, columns = ctx.saved_tensors
        order = columns.argsort(stable=True)
        lengths = columns.bincount(minlength=W_enc.shape[1])
        grad_W_enc = embedding_bag(
            rows[order],
            x - b_dec,
            lengths.cumsum(0) - lengths,
            mode="sum",
            per_sample_weights=grad[order],
        ).T
        grad_b_enc = torch.zeros_like(W_enc[0]).index_add_(0, columns, grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            entries = _Entries(grad, rows, columns)
            grad_x = _decode(entries, W_enc.T.contiguous(), n_rows=len(x))
        # b_dec enters every row negated, so its gradient is minus the sum of the rows'.
        return grad_x, grad_W_enc, grad_b_enc, -(W_enc @ grad_b_enc), None, None, None
