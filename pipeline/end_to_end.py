"""End-to-end SAEs (Braun et al. 2024, section 2.2): trained on what the language model makes of x̂.

A step starts from whole blocks of cached activations, and only the blocks above their layer run:
once on x, which gives the logits to keep, and once on x̂, with a graph. Neither the blocks below nor
the logits of more than a chunk of rows at a time are ever computed.

    model = load_store_model(store, config.model, device="cpu")
    plan = plan_blocks(store, batch_size=4096, epochs=1)
    for step in stream_end_to_end(model, store, hook=hook, batch_blocks=plan.batch_blocks, ...):
        take_step(learner, step.acts, step.grads, step.tokens, lr=lr, objective=step.objective)
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from pipeline.capture import autocast
from pipeline.config import ModelConfig
from pipeline.errors import TrainError
from pipeline.model import (
    LanguageModel,
    Unembedding,
    hash_weights,
    load_model,
    locate_checkpoint,
)
from pipeline.model.unembed import CHUNK_BYTES, reduce_precision
from pipeline.sae.group import ALONE, Group
from pipeline.sae.learning import Objective
from pipeline.upper import find_lower_blocks, run_upper
from store.blocks import BlockBatch, stream_blocks
from store.errors import StoreMismatch
from store.identity import diff_identities
from store.reader import ActivationStore


class BlockPlan(NamedTuple):
    """How many blocks a step takes, and how many steps there are."""

    batch_blocks: int
    n_batches: int  # whole ones, in all epochs


class EndToEndStep(NamedTuple):
    """What one training step is made of."""

    acts: Float[Tensor, "batch d_model"]  # rows to be patched: block by block, in position order
    grads: Float[Tensor, "batch d_model"]  # of the summed loss, nats per unit of activation
    tokens: Int[Tensor, " batch"]
    objective: Objective  # the divergence of the rows' x̂; serves any number of SAEs


def plan_blocks(store: ActivationStore, *, batch_size: int, epochs: int) -> BlockPlan:
    """As many blocks as have at most batch_size positions, at least one; pure arithmetic."""
    n_blocks = sum(store.shards[shard].n_blocks for shard in store.present) * epochs
    batch_blocks = max(1, batch_size // store.manifest.context_length)
    return BlockPlan(batch_blocks, n_blocks // batch_blocks)


def load_store_model(
    store: ActivationStore, config: ModelConfig, *, device: str | torch.device
) -> LanguageModel:
    """The language model that the store's activations came from.

    Raises StoreMismatch where `config` names another.
    """
    checkpoint = locate_checkpoint(config.name, config.revision)
    found = {
        "weights_hash": hash_weights(checkpoint),
        "weight_processing": config.weight_processing,
    }
    wanted = {name: store.manifest.identity.get(name) for name in found}
    if different := diff_identities(wanted, found):
        raise StoreMismatch(
            f"model for the store at {store.where}: {'; '.join(different)}. "
            "Run `pipeline train` with the profile or --model that the store was made from."
        )
    return load_model(checkpoint, weight_processing=config.weight_processing, device=device)


def stream_end_to_end(
    model: LanguageModel,
    store: ActivationStore,
    *,
    hook: str,
    batch_blocks: int,
    epochs: int,
    seed: int | None,
    exclude_positions: Sequence[int] = (),
    first_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    group: Group = ALONE,
    precision: str = "float32",
) -> Iterator[EndToEndStep]:
    """Each step's rows and objective, on the model's device, from `stream_blocks`.

    Rows at exclude_positions are not in a step and stay as the model made them. The very last batch
    may have fewer blocks. precision "bfloat16" runs the blocks under autocast, as in `capture`.

    Raises TrainError, before anything is read, where the hook is not the whole residual stream
    between two blocks; and while streaming, for a batch without a row to patch.
    """
    n_lower = count_lower_blocks(hook)
    batches = stream_blocks(
        store,
        hook=hook,
        batch_blocks=batch_blocks,
        epochs=epochs,
        seed=seed,
        first_batch=first_batch,
        rank=rank,
        world_size=world_size,
    )
    return (
        make_step(
            model,
            batch,
            n_lower=n_lower,
            exclude_positions=exclude_positions,
            group=group,
            precision=precision,
        )
        for batch in batches
    )


def make_step(
    model: LanguageModel,
    batch: BlockBatch,
    *,
    n_lower: int,
    exclude_positions: Sequence[int] = (),
    group: Group = ALONE,
    precision: str = "float32",
) -> EndToEndStep:
    """One step, whose objective is

        KL = 1/n sum over rows i, vocabulary v of p_iv (log p_iv - log q_iv)       in nats
        p = softmax(logits), q = softmax(logits with x̂ patched in)

    over the n real rows (those with a target) of all of the group's processes. Rows whose position
    is left out count too, as they do in evaluation: attention carries to them what was patched
    before them. (Braun et al. 2024, section 2.2, loss L_e2e.)

    Differs: p is of the stored activation, rounded to the store's numbers, not of the model's own;
    without the paper's L1 penalty, for TopK needs none. It names no position that is left out.

    A process whose blocks have no row to patch gives a step of no rows. Raises TrainError, in all
    processes, where none of them has one.
    """
    acts = batch.acts.to(model.device)
    tokens = batch.tokens.to(model.device).long()
    position = torch.arange(acts.shape[1], device=model.device)
    real = position < batch.lengths.to(model.device)[:, None]
    left_out = torch.isin(position, torch.tensor(list(exclude_positions), device=model.device))
    patched = real & ~left_out
    n_patched = int(patched.sum())
    n_all_patched, n_all_real = group.sum(torch.stack([patched.sum(), real.sum()])).tolist()
    if n_all_patched == 0:
        raise TrainError(
            f"blocks {batch.block.tolist()[:5]} of a batch: expected rows beyond "
            "train.exclude_positions, got none in any process. Raise --batch-size."
        )
    rows = (acts[patched], batch.grads.to(model.device)[patched], tokens[patched])
    if n_patched == 0:
        return EndToEndStep(*rows, torch.sum)  # 0: what is not patched does not diverge
    # take_step weighs each process's loss by its share of the rows that it patches.
    scale = n_all_patched / n_all_real / n_patched
    unembedding = model.unembedding
    if precision == "bfloat16":
        unembedding = reduce_precision(unembedding, torch.bfloat16)

    def run(residual: Tensor) -> Tensor:
        with autocast(model, precision):
            return run_upper(model, tokens, residual, n_lower=n_lower)[real]

    with torch.no_grad():
        original = run(acts)

    def divergence(recon: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
        residual = acts.to(model.dtype).index_put((patched,), recon.to(model.dtype))
        return row_divergences(run(residual), original, unembedding).sum() * scale

    return EndToEndStep(*rows, divergence)


def count_lower_blocks(hook: str) -> int:
    """How many blocks lie below a hook; raises TrainError unless all that is above reads it alone.

    resid_mid, attn_out and mlp_out do not say what goes around them.
    """
    n_lower = find_lower_blocks(hook)
    if n_lower is None:
        raise TrainError(
            f"hook for end_to_end: expected resid_pre or resid_post, got {hook}. Leave end_to_end "
            "out of train.architectures, or run `pipeline cache --hook resid_post`."
        )
    return n_lower


def row_divergences(
    hidden: Float[Tensor, "rows d_model"],
    original: Float[Tensor, "rows d_model"],
    unembedding: Unembedding,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, " rows"]:
    """KL(p || q) of each row, in nats, neither summed nor averaged.

        p = softmax(original @ W^T + b)        q = softmax(hidden @ W^T + b)
        KL = sum over v of p_v (log p_v - log q_v)        dKL / dhidden = (q - p) @ W

    Differentiable in `hidden` alone. Logits exist for chunk_bytes of rows at a time (five tensors
    of that size at most), and the gradient is taken with them. Products are in W's dtype, softmax
    and divergence in float32 at least.
    """
    return _Divergence.apply(hidden, original, *unembedding, chunk_bytes)


class _Divergence(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        original: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_bytes: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        divergence = hidden.new_empty(len(hidden), dtype=dtype)
        grads = torch.empty_like(hidden) if wanted else None
        chunk = max(1, chunk_bytes // (4 * len(weight)))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            log_p, log_q = (
                linear(part[rows].to(weight.dtype), weight, bias).log_softmax(-1, dtype=dtype)
                for part in (original, hidden)
            )
            p = log_p.exp()
            divergence[rows] = log_p.sub_(log_q).mul_(p).sum(-1)
            if grads is not None:
                grads[rows] = (log_q.exp_().sub_(p).to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(grads)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_divergence,) = grad_outputs
        (grads,) = ctx.saved_tensors
        return grads * grad_divergence[:, None].to(grads.dtype), None, None, None, None
