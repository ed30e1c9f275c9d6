"""Encoder and decoder of a k-sparse autoencoder, without a dense [batch, d_sae] matrix kept.

Only stock torch: products with a sparse matrix S [batch, d_sae] of k values per row are
embedding_bag sums, of S by rows and of S^T by columns. One core's CPU time at batch 4096,
d_model 768, d_sae 15360, k 32: S @ W 24 ms, sorting S 2 ms, S^T @ x 47 ms, of which about 17 ms go
to the pages of its result.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, pad

from pipeline.errors import ConfigError
from pipeline.sae.selection import Latents, rank

# Rows of a product, over which the next block's is written: 128 MiB at most, or 128 rows. Two cores
# took 312 ms for 4096 rows of 15360 float32 in blocks of 1024, 295 ms in blocks of 2048, and 291 ms
# in one.
ROW_BLOCK = 2048
_BLOCK_BYTES = 2**27


def encode_rows(
    acts: Float[Tensor, "batch d_model"],
    grads: Float[Tensor, "batch d_model"] | None,
    W_enc: Float[Tensor, "d_model d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
    beta_per_token: float,
    product_dtype: torch.dtype | None = None,
) -> Latents:
    """Select from z = (x - b_dec) @ W_enc + b_enc, keeping nothing else of z (see `select`).

    Differentiable through the kept values into acts, W_enc, b_enc and b_dec. The selection is data:
    nothing flows through the scores, so neither grads nor W_dec receives a gradient here.

    With product_dtype, z and grads @ W_dec^T are products of weights and rows rounded to that
    dtype, and are of that dtype themselves, as are the scores; the kept values are z's, in the
    dtype of W_enc. Gradients are those of the float32 weights, at the kept values. Raises
    ConfigError if k > d_sae.
    """
    if k > W_enc.shape[1]:
        raise ConfigError(f"k at encode_rows: expected at most {W_enc.shape[1]}, got {k}.")
    if beta_per_token == 0:
        grads = None
    arguments = (acts, grads, W_enc, b_enc, W_dec, b_dec, k, beta_per_token, product_dtype)
    return Latents(*_Encode.apply(*arguments))


def decode_rows(
    latents: Latents, W_dec: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "batch d_model"]:
    """S @ W_dec: sum each row's kept decoder rows, weighted by their values; no bias is added."""
    return _Decode.apply(latents.values, latents.indices, W_dec)


class _Encode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: Tensor,
        grads: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        k: int,
        beta_per_token: float,
        product_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        centred = acts - b_dec
        factors = centred, W_enc, b_enc
        if product_dtype is not None:
            factors = *_append_bias(*factors, product_dtype), None
            W_dec = W_dec if grads is None else W_dec.to(product_dtype)
        values, indices = _select_rows(*factors, grads, W_dec, k=k, beta_per_token=beta_per_token)
        values = values.to(W_enc.dtype)
        ctx.save_for_backward(centred, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_values, _ = grad_outputs
        centred, W_enc, values, indices = ctx.saved_tensors
        grad_pre_acts = grad_values * (values > 0)
        columns = _transpose(indices, d_sae=W_enc.shape[1])
        grad_W_enc = _sum_columns(columns, grad_pre_acts, centred).T
        grad_b_enc = torch.zeros_like(W_enc[0]).index_add_(
            0, indices.flatten(), grad_pre_acts.flatten()
        )
        grad_acts = None
        if ctx.needs_input_grad[0]:
            grad_acts = _sum_rows(indices, grad_pre_acts, W_enc.T.contiguous())
        # b_dec enters every row negated, so its gradient is minus the sum of the rows'.
        grad_b_dec = -(W_enc @ grad_b_enc)
        return grad_acts, None, grad_W_enc, grad_b_enc, None, grad_b_dec, None, None, None


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        # embedding_bag's own gradient by its weights: each kept decoder row times grad_recon. Its
        # graph is kept, for it does not need the sum that is made here once more.
        with torch.set_grad_enabled(ctx.needs_input_grad[0]):
            weights = values.detach().requires_grad_(ctx.needs_input_grad[0])
            recon = _sum_rows(indices, weights, W_dec.detach())
        ctx.weights, ctx.recon = weights, recon
        ctx.save_for_backward(values, indices, W_dec)
        return recon.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_recon,) = grad_outputs
        values, indices, W_dec = ctx.saved_tensors
        grad_recon = grad_recon.contiguous()
        grad_values = grad_W_dec = None
        if ctx.needs_input_grad[0]:
            (grad_values,) = torch.autograd.grad(
                ctx.recon, ctx.weights, grad_recon, retain_graph=True
            )
        if ctx.needs_input_grad[2]:
            grad_W_dec = _sum_columns(_transpose(indices, d_sae=len(W_dec)), values, grad_recon)
        return grad_values, None, grad_W_dec


def _append_bias(
    rows: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "batch inner"], Float[Tensor, "inner d_sae"]]:
    """Both rounded to dtype, with the bias in their product.

    Beside bfloat16's product, which takes one core 80 ms, addmm would take 22 ms more. Eight
    columns instead of one keep the rows aligned for tensor cores.
    """
    inner, d_sae = W_enc.shape
    weights = W_enc.new_zeros(d_sae, inner + 8, dtype=dtype)
    weights[:, :inner] = W_enc.T
    weights[:, inner] = b_enc
    return pad(rows, (0, 8), value=1.0).to(dtype), weights.T


def _select_rows(
    centred: Float[Tensor, "batch inner"],
    W_enc: Float[Tensor, "inner d_sae"],
    b_enc: Float[Tensor, " d_sae"] | None,
    grads: Float[Tensor, "batch d_model"] | None,
    W_dec: Float[Tensor, "d_sae d_model"],
    *,
    k: int,
    beta_per_token: float,
) -> Latents:
    """Latents in the dtype of the weights; the products are made in memory that blocks share."""
    batch, d_sae = len(centred), W_enc.shape[1]
    n_rows = min(ROW_BLOCK, max(128, _BLOCK_BYTES // (d_sae * W_enc.element_size())), batch)
    if centred.is_cuda:  # where launches cost, and no cache holds a block
        n_rows = batch
    pre_acts = W_enc.new_empty(n_rows, d_sae)
    projected = None if grads is None else torch.empty_like(pre_acts)
    values = W_enc.new_empty(batch, k)
    indices = torch.empty_like(values, dtype=torch.int64)
    for first in range(0, batch, n_rows or 1):
        here = slice(first, first + n_rows)
        rows = centred[here]
        z = torch.mm(rows, W_enc, out=pre_acts[: len(rows)])
        if b_enc is not None:  # on a CPU, addmm fills its result with the bias first
            z += b_enc
        weights = None
        if grads is not None and projected is not None:
            weights = torch.mm(grads[here].to(W_dec.dtype), W_dec.T, out=projected[: len(rows)])
        indices[here] = rank(z, weights, k=k, beta_per_token=beta_per_token)
        values[here] = z.gather(1, indices[here])
    return Latents(values.relu_(), indices)


class _Columns(NamedTuple):
    """The sparse matrix S [batch, d_sae] by columns."""

    order: Int[Tensor, " batch*k"]  # entry of S in row order, for each entry in column order
    rows: Int[Tensor, " batch*k"]  # row of each entry, in column order
    offsets: Int[Tensor, " d_sae"]  # where each column starts


def _transpose(indices: Int[Tensor, "batch k"], *, d_sae: int) -> _Columns:
    """List the entries by latent; the stable sort makes the order of every sum the rows' own."""
    flat = indices.flatten()
    # Half as many bytes sort twice as fast.
    order = flat.int().argsort(stable=True)
    n_entries = torch.bincount(flat, minlength=d_sae)
    return _Columns(order, order // indices.shape[1], n_entries.cumsum(0) - n_entries)


def _sum_rows(
    indices: Int[Tensor, "batch k"],
    weights: Float[Tensor, "batch k"],
    table: Float[Tensor, "d_sae d_model"],
) -> Float[Tensor, "batch d_model"]:
    """S @ table."""
    return embedding_bag(indices, table, mode="sum", per_sample_weights=weights)


def _sum_columns(
    columns: _Columns,
    weights: Float[Tensor, "batch k"],
    table: Float[Tensor, "batch d_model"],
) -> Float[Tensor, "d_sae d_model"]:
    """S^T @ table; a latent that no row keeps gets zeros."""
    return embedding_bag(
        columns.rows,
        table,
        columns.offsets,
        mode="sum",
        per_sample_weights=weights.flatten()[columns.order],
    )
