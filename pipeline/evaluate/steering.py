"""Steering along a latent's decoder direction (Olmo et al. 2024, Figs. 5 and 6).

The direction is added to the residual stream and what the model then predicts is compared with what
it predicted before: on the tokens that the direction raises by way of the unembedding, and on all
others. Only the blocks above the hook run, once for many latents, and probabilities exist for a
cache's worth of rows at a time.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.corpus.reader import Corpus
from pipeline.end_to_end import run_upper
from pipeline.errors import CorpusError
from pipeline.evaluate.association import associate, read_direct_map
from pipeline.evaluate.bootstrap import draw_weights, find_interval, resample_mean
from pipeline.model import LanguageModel, final_hidden
from pipeline.model.sites import Hook
from pipeline.model.unembed import CHUNK_BYTES
from pipeline.sae import SparseAutoencoder

RANDOM = "random directions"  # the control: as many latents that no SAE has learned
SWEEP_LATENTS = 100  # Fig. 5's curves are of at most so many; all of them at Fig. 6's length

_ROWS_AT_ONCE = 4096  # positions that run through the upper blocks together
# Rows of probabilities at once on a CPU: those of a small vocabulary stay in the cache, and a large
# unembedding is not read again for a handful.
_CPU_ROWS = 64


class SteeringEffect(NamedTuple):
    """What steering did to the probabilities of one row, or their mean over rows."""

    associated: Tensor  # sum over the associated tokens of the change
    others: Tensor  # the same sum over all other tokens
    others_absolute: Tensor  # sum over all other tokens of the change's absolute value


class Directions(NamedTuple):
    """Latents of one SAE, or directions that are none's."""

    latents: list[int]
    rows: Float[Tensor, "latents d_model"]  # of any norm


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
def measure_steering(
    model: LanguageModel,
    corpus: Corpus,
    saes: Mapping[str, SparseAutoencoder],
    live: Mapping[str, Tensor],
    *,
    hook: str,
    exclude_positions: tuple[int, ...],
    n_latents: int,
    n_sequences: int,
    context: int,
    n_tokens: int,
    alphas: Sequence[float],
    alpha: float,
    draws: int,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Steer up to n_latents live latents of every SAE on the same held-out sequences.

        x -> x + a d_i / ||d_i||        a = alpha * (mean norm of x at the hook)

    at every position of a sequence that training did not leave out, all at once; effects are means
    over those positions and over sequences. `live` has the ids of the latents that fired on
    held-out text. Beside the SAEs stand as many random directions, with the tokens that they raise.

    Table `steering` has a row per SAE and length: means over latents with intervals from `draws`
    resamplings of the latents. Of `alphas` it takes the first SWEEP_LATENTS latents, at `alpha` all
    of them. Table `steering_latents` has a row per SAE and latent, at `alpha`.

    Differs: the paper does not say how many tokens are associated, which positions are steered and
    measured, how long its sequences are, nor how its alpha (50 in Fig. 6, in units of the residual
    stream) compares with the stream's norm; all stand in the table.

    on_progress is told of each batch's positions. Raises CorpusError where fewer than n_sequences
    held-out blocks are `context` tokens long.
    """
    tokens = draw_sequences(corpus, n_sequences, context, seed=seed).to(model.device)
    text = look_at_sequences(model, tokens, hook, exclude_positions=exclude_positions)
    direct = read_direct_map(model)
    facts = {
        "n_sequences": n_sequences,
        "context": context,
        "n_positions": int(text.steered.sum()),
        "n_tokens": n_tokens,
    }
    rows, latent_rows = [], []
    picked = pick_directions(saes, live, n=n_latents, d_model=model.facts.d_model, seed=seed)
    for name, (latents, directions) in picked.items():
        directions = directions.to(model.device, direct.dtype)
        associated = associate(directions, direct, n_tokens)
        for length in sorted({*alphas, alpha}):
            n = len(directions) if length == alpha else min(len(directions), SWEEP_LATENTS)
            effect = steer(
                model,
                text,
                directions[:n],
                associated[:n],
                hook=hook,
                length=length * text.norm,
                on_progress=on_progress,
            )
            key = {"sae": name, "alpha": length, "alpha_absolute": length * text.norm}
            rows.append(key | _summarise(effect, draws, seed) | {"n_latents": n} | facts)
            if length == alpha:
                latent_rows += _list_latents(name, latents, length, effect)
    return {"steering": rows, "steering_latents": latent_rows}


def pick_directions(
    saes: Mapping[str, SparseAutoencoder],
    live: Mapping[str, Tensor],
    *,
    n: int,
    d_model: int,
    seed: int,
) -> dict[str, Directions]:
    """At most n random live latents of each SAE that has any, and n isotropic directions."""
    picked = {}
    for name, sae in saes.items():
        ids = live[name].cpu()
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        some = ids[order[:n]]
        if len(some):
            picked[name] = Directions(some.tolist(), sae.W_dec.detach()[some.to(sae.W_dec.device)])
    drawn = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))
    return picked | {RANDOM: Directions(list(range(n)), drawn)}


def draw_sequences(
    corpus: Corpus, n: int, context: int, *, seed: int
) -> Int[Tensor, "sequences context"]:
    """The first `context` tokens of n random held-out blocks; raises CorpusError if so many are not
    that long.
    """
    long = np.flatnonzero(corpus.lengths("held_out") >= context)
    if len(long) < n:
        raise CorpusError(
            f"held-out text at {corpus.folder}: expected {n} blocks of at least {context} tokens, "
            f"got {len(long)}. Lower evidence.steering_sequences or evidence.steering_context."
        )
    picked = np.random.default_rng(seed).permutation(long)[:n]
    blocks = [corpus.read_blocks("held_out", int(i), 1).tokens for i in picked]
    return torch.from_numpy(np.concatenate(blocks)[:, :context]).long()


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
    on_progress: Callable[[int], None] | None = None,
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
        if on_progress:
            on_progress(len(some) * text.tokens.numel())
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


def _summarise(effect: SteeringEffect, draws: int, seed: int) -> dict[str, float]:
    """Means over latents, each with its interval."""
    weights = draw_weights(len(effect.associated), draws=draws, seed=seed)
    figures = {}
    for name, values in effect._asdict().items():
        interval = find_interval(resample_mean(values.cpu(), weights))
        figures |= {
            name: interval.value,
            f"{name}_low": interval.low,
            f"{name}_high": interval.high,
        }
    return figures


def _list_latents(
    name: str, latents: Sequence[int], alpha: float, effect: SteeringEffect
) -> list[dict[str, Any]]:
    columns = zip(latents, effect.associated.tolist(), effect.others_absolute.tolist(), strict=True)
    return [
        {"sae": name, "latent": i, "alpha": alpha, "associated": a, "others_absolute": b}
        for i, a, b in columns
    ]
