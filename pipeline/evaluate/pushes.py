"""What a push does: directions added to a model's residual stream, and its next-token probabilities
before and after.

Only the blocks above the hook run, once for many directions, and probabilities exist for a cache's
worth of rows at a time.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.model import LanguageModel, final_hidden
from pipeline.model.sites import Hook
from pipeline.model.unembed import CHUNK_BYTES
from pipeline.upper import run_upper

_ROWS_AT_ONCE = 4096  # positions that run through the upper blocks together
# Rows of probabilities at once on a CPU: those of a small vocabulary stay in the cache, and a large
# unembedding is not read again for a handful.
_CPU_ROWS = 64


class SteeringEffect(NamedTuple):
    """What steering did to the probabilities of one row, or their mean over rows."""

    associated: Tensor  # sum over the associated tokens of the change
    others: Tensor  # the same sum over all other tokens
    others_absolute: Tensor  # sum over all other tokens of the change's absolute value


class Sequences(NamedTuple):
    """Text to steer, and what the model makes of it unsteered."""

    tokens: Int[Tensor, "sequences context"]
    residual: Float[Tensor, "sequences context d_model"]  # at the hook, or above the same block
    steered: Bool[Tensor, " context"]  # positions that are steered, and measured
    norm: float  # mean norm of the activations at the hook, over steered positions
    probs: Float[Tensor, "rows d_vocab"]  # of the steered positions, sequence by sequence


def steering_effect(
    before: Float[Tensor, "*rows d_vocab"],
    after: Float[Tensor, "*rows d_vocab"],
    associated: Int[Tensor, "*rows n"],
) -> SteeringEffect:
    """The change of each row's probabilities, on its associated tokens L and on all others.

        associated      = sum over j in L of after_j - before_j
        others          = sum over j not in L of after_j - before_j = -associated
        others_absolute = sum over j not in L of |after_j - before_j|

    (Olmo et al. 2024, Fig. 5.) Probabilities sum to 1, so the paper's second sum is the first one's
    exact negative and says nothing new. Differs: we therefore also report the sum of absolute
    changes over all other tokens. Neither is averaged here.
    """
    change = after - before
    on_associated = change.gather(-1, associated)
    total = on_associated.sum(-1)
    absolute = change.abs().sum(-1) - on_associated.abs().sum(-1)
    return SteeringEffect(total, -total, absolute)


@torch.no_grad()
def look_at_sequences(
    model: LanguageModel,
    tokens: Int[Tensor, "sequences context"],
    hook: str,
    *,
    exclude_positions: Sequence[int],
) -> Sequences:
    """One forward pass over whole sequences without padding."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def note(value: Tensor, **_: Any) -> None:
            kept[name] = value

        return note

    site = _find_upper(hook)
    names = {hook, site} if site else {hook}
    hidden = final_hidden(model.bridge, tokens, [(name, keep(name)) for name in names])
    position = torch.arange(tokens.shape[1], device=model.device)
    steered = ~torch.isin(position, torch.tensor([*exclude_positions], device=model.device))
    norm = kept[hook][:, steered].norm(dim=-1).mean().item()
    probs = read_logits(hidden[:, steered].flatten(0, 1), model).softmax(-1)
    return Sequences(tokens, kept[site or hook], steered, norm, probs)


@torch.no_grad()
def steer(
    model: LanguageModel,
    text: Sequences,
    directions: Float[Tensor, "latents d_model"],
    associated: Int[Tensor, "latents n"],
    *,
    hook: str,
    length: float,
) -> SteeringEffect:
    """The effect [latents] of adding each direction at `length` to every steered position: the mean
    over positions and sequences.
    """
    unit = directions / directions.norm(dim=-1, keepdim=True)
    size = max(1, _ROWS_AT_ONCE // text.tokens.numel())
    parts = []
    for some, tokens in zip(unit.split(size), associated.split(size), strict=True):
        hidden = _run_steered(model, text, length * some, hook)
        parts.append(_compare(hidden, text.probs, tokens, model))
    total, absolute = (torch.cat(column) for column in zip(*parts, strict=True))
    return SteeringEffect(total, -total, absolute)


def add_at(hook: str, delta: Tensor, steered: Bool[Tensor, " context"]) -> Hook:
    """A hook of the whole model that adds delta [(batch,) d_model] at a site's steered positions.

    What is added to attn_out is added to resid_mid, which has no place of its own in every model.
    """

    def add(value: Tensor, **_: Any) -> Tensor:
        return value + (steered[:, None] * delta[..., None, :]).to(value.dtype)

    return hook.replace("hook_resid_mid", "hook_attn_out"), add


def _find_upper(hook: str) -> str | None:
    """The site between two blocks at which adding is the same as at the hook, where there is one:
    what the MLP writes goes nowhere but into resid_post.
    """
    site = hook.replace("hook_mlp_out", "hook_resid_post")
    return site if re.fullmatch(r"blocks\.\d+\.hook_resid_(pre|post)", site) else None


def _run_steered(
    model: LanguageModel, text: Sequences, delta: Tensor, hook: str
) -> Float[Tensor, "latents rows d_model"]:
    """What the unembedding reads at the steered positions of all sequences, for each latent."""
    n = len(delta)
    tokens = text.tokens.repeat(n, 1)
    delta = delta.repeat_interleave(len(text.tokens), 0)
    if site := _find_upper(hook):
        name, add = add_at(site, delta, text.steered)
        layer = int(name.split(".")[1]) + name.endswith("post")
        residual = add(text.residual.repeat(n, 1, 1))
        assert residual is not None
        hidden = run_upper(model, tokens, residual, n_lower=layer)
    else:
        hidden = final_hidden(model.bridge, tokens, [add_at(hook, delta, text.steered)])
    return hidden[:, text.steered].reshape(n, -1, hidden.shape[-1])


def _compare(
    hidden: Float[Tensor, "latents rows d_model"],
    before: Float[Tensor, "rows d_vocab"],
    associated: Int[Tensor, "latents n"],
    model: LanguageModel,
) -> tuple[Float[Tensor, " latents"], Float[Tensor, " latents"]]:
    """`steering_effect`'s associated and others_absolute, averaged over rows, in small chunks."""
    n_latents, n_rows, _ = hidden.shape
    chunk = max(_CPU_ROWS, CHUNK_BYTES // (4 * before.shape[1]))
    if model.device.type == "cpu":
        chunk = _CPU_ROWS
    sums = before.new_zeros(2, n_latents)
    for i in range(n_latents):
        tokens = associated[i]
        for start in range(0, n_rows, chunk):
            rows = slice(start, start + chunk)
            change = read_logits(hidden[i, rows], model).softmax(-1).sub_(before[rows])
            on_associated = change[:, tokens]
            sums[0, i] += on_associated.sum()
            sums[1, i] += torch.linalg.vector_norm(change, ord=1) - on_associated.abs().sum()
    total, absolute = sums / n_rows
    return total, absolute


def read_logits(hidden: Tensor, model: LanguageModel) -> Tensor:
    """Logits in float32 at least; the product is taken in the unembedding's numbers."""
    weight, bias = model.unembedding
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    return logits.to(torch.promote_types(weight.dtype, torch.float32))
