"""The tokenized autoencoder (Dooms & Wilhelm 2024): TopK beside a table of what each token adds."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import ConfigError, TrainError
from pipeline.sae.base import TrainingPass
from pipeline.sae.selection import Latents
from pipeline.sae.topk import TopKSAE

# Of a token's mean error in a batch, what its row takes on at least; a row that has seen fewer than
# 1 / MIN_STEP batches takes on 1 / their number, which makes it the mean of what was left to it.
MIN_STEP = 0.01


class TokenizedSAE(TopKSAE):
    """A TopK autoencoder whose decoder bias depends on the token.

        y = TopKSAE's                                                        [batch, d_sae]
        x̂ = (y @ W_dec + b_dec + T[token]) / s                               [batch, d_model]

    Dooms & Wilhelm 2024 (2502.17332); with T = 0 it is TopKSAE. T is a buffer that
    starts at zero. After each step, every token t of the batch (of all processes) moves by

        T[t] += max(1 / n_t, MIN_STEP) * mean over the rows of t of s (x - x̂)

    where n_t is the number of batches that had t, this one included: a step down the squared error
    of these rows, the whole way to its minimum the first time. A token beyond the table, which
    training never met, adds nothing.

    Differs: the paper learns T by Adam, from half of each token's mean activation. Adam's step is
    dense, and needs three more tensors as large as T; this rule touches the batch's tokens only. T
    follows the squared error, whatever else is minimised, and is left out of clipping and of
    averaged weights.

    Raises ConfigError if n_tokens is not positive.
    """

    architecture: ClassVar[str] = "tokenized"
    options: ClassVar[tuple[str, ...]] = ("n_tokens",)

    lookup: Tensor  # T, buffer [n_tokens, d_model], in units of the scaled input
    n_batches: Tensor  # n_t, int64 buffer [n_tokens]

    def __init__(self, *, n_tokens: int, **settings: Any) -> None:
        super().__init__(**settings)
        if n_tokens < 1:
            raise ConfigError(
                f"n_tokens at TokenizedSAE: expected a positive number, got {n_tokens}."
            )
        self.n_tokens = n_tokens
        self.register_buffer("lookup", torch.zeros(n_tokens, self.d_model))
        self.register_buffer("n_batches", torch.zeros(n_tokens, dtype=torch.int64))
        self._last: tuple[Tensor, Tensor] | None = None  # tokens and errors until `after_step`

    def reset_extra(self) -> None:
        """The table is zero, and no token has been seen."""
        self.lookup.zero_()
        self.n_batches.zero_()

    def decode(
        self, latents: Latents, tokens: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch d_model"]:
        """x̂ in the units of x; raises TrainError without tokens."""
        if tokens is None:
            raise TrainError(
                "tokens for TokenizedSAE: expected the token ids of the rows, got none. Pass "
                "tokens=, or take an architecture that needs none."
            )
        known = (tokens >= 0) & (tokens < self.n_tokens)
        added = self.lookup[tokens.where(known, 0)] * known[:, None]
        return super().decode(latents) + added / self.input_scale

    def train_forward(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> TrainingPass:
        """As forward; what it leaves over is kept for `after_step`.

        Raises TrainError for a token beyond the table.
        """
        passed = super().train_forward(acts, grads, tokens)
        assert tokens is not None  # or decode would have raised
        if ((tokens < 0) | (tokens >= self.n_tokens)).any():
            raise TrainError(
                f"tokens for TokenizedSAE: expected ids below n_tokens = {self.n_tokens}, got "
                f"{int(tokens.min())} to {int(tokens.max())}. Give it a larger n_tokens."
            )
        self._last = tokens, ((acts - passed.recon) * self.input_scale).detach()
        return passed

    @torch.no_grad()
    def after_step(self, l0: float) -> None:
        """Move the table's rows of the batch's tokens."""
        del l0
        assert self._last is not None, "after_step without train_forward"
        tokens, errors = (self.group.gather(tensor) for tensor in self._last)
        self._last = None
        listed, places, n_rows = tokens.unique(return_inverse=True, return_counts=True)
        means = errors.new_zeros(len(listed), self.d_model).index_add_(0, places, errors)
        means /= n_rows[:, None]
        self.n_batches[listed] += 1
        steps = (1 / self.n_batches[listed]).clamp_min(MIN_STEP)
        self.lookup[listed] += steps[:, None] * means
