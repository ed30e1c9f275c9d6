"""One batch through the language model: tokens in; activations, gradients and losses out.

Parameters are frozen, so no graph exists until the first hooked activation is made a leaf, and the
blocks below it run as in inference. The head's gradient is taken in chunks of rows, and one
backward pass from the last hidden state serves every hook.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.attention import own_loss_hooks
from pipeline.errors import CaptureError, ModelError
from pipeline.model import LanguageModel, check_hooks, final_hidden, row_losses
from pipeline.model.sites import Hook
from pipeline.model.unembed import RowLosses, reduce_precision


class Captured(NamedTuple):
    """What one batch says; float32, or float64 for a float64 model."""

    acts: dict[str, Tensor]  # per hook [batch, context, d_model]
    grads: dict[str, Tensor]  # the same; of the summed or own loss, nats per unit; 0 on padding
    loss: Tensor  # [batch, context], nats; 0 on padding


class _Batch(NamedTuple):
    """Token blocks on the model's device, each part [batch, context]."""

    inputs: Tensor
    targets: Tensor
    real: Tensor  # False on padding


class _Tap(NamedTuple):
    """One hooked activation of a forward pass."""

    acts: Tensor  # the site's value
    node: Tensor  # the tensor of the graph at which the loss's gradient is the site's


def capture(
    model: LanguageModel,
    tokens: Int[Tensor, "batch tokens"],
    hooks: Sequence[str],
    *,
    lengths: Int[Tensor, " batch"] | None = None,
    precision: str = "float32",
    loss: str = "full",
) -> Captured:
    """Activations at `hooks`, gradients of the loss there, and losses, from one pass.

        L = sum over real rows i of L_i        L_i = -log p(token_{i+1} | token_0 .. token_i)
        grads_i = dL / d acts_i                loss "full": a row's own target and all later ones
        grads_i = dL_i / d acts_i              loss "own": its own target alone

    tokens [batch, context + 1]: the last is only a target. Rows from lengths[b] on are padding:
    their loss is 0 and no part of L, and attention being causal they do not reach real rows.
    precision "bfloat16" runs both passes under autocast. acts and loss are the same numbers for
    either loss; "own" cuts the backward pass between positions (`pipeline.attention`).

    L is summed, not averaged, so that a row's gradient does not depend on what else is in the
    batch. Differs: the paper names no reduction, and smol-sae, which it builds on, takes the mean.

    Raises ModelError if the model lacks a hook, it has another width, or for loss "own" attention
    cannot be cut; CaptureError if tokens or lengths are out of range, or if an activation, loss or
    gradient is missing or not finite, or all of a hook's gradients are 0.
    """
    if loss not in ("full", "own"):
        raise ValueError(f"loss: expected full or own, got {loss!r}")
    check_hooks(model, hooks)
    batch = _split_blocks(model, tokens, lengths)
    cuts = own_loss_hooks(model) if loss == "own" else []
    taps: dict[str, _Tap] = {}
    tap_hooks = [tap for hook in hooks for tap in _watch(hook, taps, model, batch)]
    with torch.enable_grad(), autocast(model, precision):
        hidden = final_hidden(model.bridge, batch.inputs, [*tap_hooks, *cuts])
    for hook in hooks:
        if hook not in taps:
            raise _not_once(hook, "none")
    rows = _score(model, hidden.detach(), batch, precision, with_grads=True)
    grads = _backward(hidden, _spread(rows.grads, batch.real), taps)
    captured = Captured(
        acts={hook: _widen(taps[hook].acts) for hook in hooks},
        grads={hook: _widen(grads[hook]) for hook in hooks},
        loss=_spread(rows.loss, batch.real),
    )
    _check_numbers(captured, batch.real)
    return captured


def patched_loss(
    model: LanguageModel,
    tokens: Int[Tensor, "batch tokens"],
    hook: str,
    replacement: Float[Tensor, "batch context d_model"],
    *,
    lengths: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch context"]:
    """Cross-entropy of each row, in nats, with the activation at `hook` replaced; 0 on padding.

    replacement [batch, context, d_model] stands in for the site in all that the model computes
    from it, at every position. tokens and lengths as in `capture`. Raises ModelError if the model
    lacks the hook, CaptureError if tokens or lengths are out of range.
    """
    batch = _split_blocks(model, tokens, lengths)
    hidden = _run_patched(model, batch, hook, replacement)
    return _spread(_score(model, hidden, batch, "float32").loss, batch.real)


def patched_hidden(
    model: LanguageModel,
    tokens: Int[Tensor, "batch tokens"],
    hook: str,
    replacement: Float[Tensor, "batch context d_model"],
    *,
    lengths: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch context d_model"]:
    """What the unembedding reads in the run of `patched_loss`; raises what that does."""
    return _run_patched(model, _split_blocks(model, tokens, lengths), hook, replacement)


@torch.no_grad()
def _run_patched(model: LanguageModel, batch: _Batch, hook: str, replacement: Tensor) -> Tensor:
    check_hooks(model, [hook])
    replacement = replacement.to(model.device, model.dtype)
    fired: list[str] = []

    def put(value: Tensor, before: Tensor | None) -> Tensor:
        _check_tap(hook, value, bool(fired), model, batch)
        fired.append(hook)
        return replacement if before is None else replacement - before

    hidden = final_hidden(model.bridge, batch.inputs, _hooks_at(hook, put))
    if not fired:
        raise _not_once(hook, "none")
    return hidden


def _split_blocks(model: LanguageModel, tokens: Tensor, lengths: Tensor | None) -> _Batch:
    """Inputs and targets of token blocks; what lies beyond a block's last target becomes 0."""
    tokens = tokens.to(model.device)
    context = tokens.shape[1] - 1
    limit = model.facts.context_length or context
    if not 0 < context <= limit:
        raise CaptureError(
            f"tokens at corpus.context_length: expected 1 to {limit} ({model.facts.name}'s limit), "
            f"got {context}. Run `pipeline corpus --set corpus.context_length={limit}`."
        )
    if lengths is None:
        lengths = torch.full((len(tokens),), context)
    lengths = lengths.to(model.device)
    if lengths.min() < 0 or lengths.max() > context:
        raise CaptureError(
            f"lengths at this batch: expected 0 to {context} rows, got {lengths.min().item()} to "
            f"{lengths.max().item()}. Run `pipeline corpus` again."
        )
    position = torch.arange(context + 1, device=model.device)
    tokens = tokens.masked_fill(position > lengths[:, None], 0)
    if tokens.min() < 0 or tokens.max() >= model.facts.d_vocab:
        raise CaptureError(
            f"tokens at this batch: expected 0 to {model.facts.d_vocab - 1} ({model.facts.name}'s "
            f"vocabulary), got {tokens.min().item()} to {tokens.max().item()}. Run `pipeline "
            "corpus` with the same `--model`."
        )
    return _Batch(tokens[:, :-1], tokens[:, 1:], position[:-1] < lengths[:, None])


def _watch(hook: str, taps: dict[str, _Tap], model: LanguageModel, batch: _Batch) -> list[Hook]:
    """Hooks that put a node of the graph at a site and note it in `taps`."""

    def tap(value: Tensor, before: Tensor | None) -> Tensor:
        _check_tap(hook, value, hook in taps, model, batch)
        # Exact, and keeps autocast's 16 bits out of the gradient.
        value = value.to(torch.promote_types(value.dtype, model.dtype))
        node = value if value.requires_grad else value.detach().requires_grad_()
        taps[hook] = _Tap((node if before is None else before + node).detach(), node)
        return node

    return _hooks_at(hook, tap)


def _hooks_at(hook: str, act: Callable[[Tensor, Tensor | None], Tensor]) -> list[Hook]:
    """`act` on a site's value and None; at resid_mid, on attn_out's and resid_pre's.

    attn_out enters the model only through resid_pre + attn_out: the gradient there is the sum's.
    """
    before: list[Tensor] = []

    def keep(value: Tensor, **_: Any) -> None:
        before.append(value)

    def at_site(value: Tensor, **_: Any) -> Tensor:
        return act(value, before[-1] if before else None)

    if not hook.endswith(".hook_resid_mid"):
        return [(hook, at_site)]
    block = hook.removesuffix("hook_resid_mid")
    return [(f"{block}hook_resid_pre", keep), (f"{block}hook_attn_out", at_site)]


def _check_tap(hook: str, value: Tensor, fired: bool, model: LanguageModel, batch: _Batch) -> None:
    expected = [*batch.inputs.shape, model.facts.d_model]
    if [*value.shape] != expected:
        raise ModelError(
            f"width at {hook}: expected {expected} (batch, context, d_model), got "
            f"{[*value.shape]}. Run with `--hook resid_post`."
        )
    if fired:
        raise _not_once(hook, "more than one")


def _not_once(hook: str, count: str) -> ModelError:
    return ModelError(
        f"hook at {hook}: expected one call in a forward pass, got {count}. Run with `--hook "
        "resid_post`."
    )


def _score(
    model: LanguageModel, hidden: Tensor, batch: _Batch, precision: str, *, with_grads: bool = False
) -> RowLosses:
    """Losses of the real rows in order."""
    unembedding = model.unembedding
    if precision == "bfloat16":
        unembedding = reduce_precision(unembedding, torch.bfloat16)
    real = batch.real
    return row_losses(hidden[real], batch.targets[real], unembedding, with_grads=with_grads)


def _backward(hidden: Tensor, hidden_grads: Tensor, taps: dict[str, _Tap]) -> dict[str, Tensor]:
    nodes = [tap.node for tap in taps.values()]
    grads: Sequence[Tensor | None] = [None] * len(nodes)
    if hidden.requires_grad:
        grads = torch.autograd.grad(hidden, nodes, hidden_grads, allow_unused=True)
    reached = {hook: grad for hook, grad in zip(taps, grads, strict=True) if grad is not None}
    for hook in taps:
        if hook not in reached:
            raise CaptureError(
                f"gradient at {hook}: expected a path from there to the loss, got none. Run with "
                "`--hook resid_post`."
            )
    return reached


def autocast(model: LanguageModel, precision: str) -> AbstractContextManager[Any]:
    """Nothing for "float32"; inside, products are in 16 bits for "bfloat16"."""
    if precision == "float32":
        return nullcontext()
    if precision == "bfloat16":
        return torch.autocast(model.device.type, torch.bfloat16)
    raise ValueError(f"precision: expected float32 or bfloat16, got {precision!r}")


def _spread(rows: Tensor | None, real: Tensor) -> Tensor:
    """Values of the real rows in their places [batch, context, ...], 0 on padding."""
    assert rows is not None
    spread = rows.new_zeros(*real.shape, *rows.shape[1:])
    spread[real] = rows
    return spread


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_numbers(captured: Captured, real: Tensor) -> None:
    """Raise CaptureError, naming hook, block and position, for NaN, Inf or all-zero gradients."""
    for hook, acts in captured.acts.items():
        _check_finite("activation", hook, acts, real)
    _check_finite("loss", "the head", captured.loss[..., None], real)
    for hook, grads in captured.grads.items():
        _check_finite("gradient", hook, grads, real)
        if real.any() and not grads.any():
            raise CaptureError(
                f"gradient at {hook}: expected numbers, got 0 at every position. Run with `--hook "
                "resid_post`, or check the model's weights."
            )


def _check_finite(kind: str, hook: str, values: Tensor, real: Tensor) -> None:
    bad = real & ~values.isfinite().all(-1)
    if bad.any():
        block, position = bad.nonzero()[0].tolist()
        raise CaptureError(
            f"{kind} at {hook}, block {block} of the batch, position {position}: expected finite "
            "numbers, got NaN or Inf. Run with `--set cache.precision=float32`, or check the "
            "model's weights."
        )
