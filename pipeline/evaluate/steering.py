"""Steering along a latent's decoder direction (Olmo et al. 2024, Figs. 5 and 6).

The direction is added to the residual stream and what the model then predicts is compared with what
it predicted before: on the tokens that the direction raises by way of the unembedding, and on all
others. `pushes` has the equations.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.corpus.reader import Corpus
from pipeline.errors import CorpusError
from pipeline.evaluate.association import associate, check_tokens, read_direct_map
from pipeline.evaluate.bootstrap import (
    draw_weights,
    find_interval,
    resample_mean,
    spread_interval,
)
from pipeline.evaluate.pushes import SteeringEffect, look_at_sequences, steer
from pipeline.model import LanguageModel
from pipeline.sae import SparseAutoencoder

RANDOM = "random directions"  # the control: as many latents that no SAE has learned
SWEEP_LATENTS = 100  # Fig. 5's curves are of at most so many; all of them at Fig. 6's length


class Directions(NamedTuple):
    """Latents of one SAE, or directions that are none's."""

    latents: list[int]
    rows: Float[Tensor, "latents d_model"]  # of any norm but 0


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
) -> dict[str, list[dict[str, Any]]]:
    """Steer up to n_latents live latents of every SAE on the same held-out sequences.

        x -> x + a d_i / ||d_i||        a = alpha * (mean norm of x at the hook)

    at every position of a sequence that training did not leave out, all at once; effects are means
    over those positions and over sequences. `live` has the ids of the latents that fired on
    held-out text, selected without the gradient, which would see the label. Beside the SAEs stand
    as many random directions, with the tokens that they raise.

    Table `steering` has a row per SAE and length: means over latents with intervals from `draws`
    resamplings of the latents. Of `alphas` it takes the first SWEEP_LATENTS latents, at `alpha` all
    of them. Table `steering_latents` has a row per SAE and latent, at `alpha`.

    Differs: the paper does not say how many tokens are associated, which positions are steered and
    measured, how long its sequences are, nor how its alpha (50 in Fig. 6, in units of the residual
    stream) compares with the stream's norm; all stand in the table.

    Raises CorpusError where fewer than n_sequences held-out blocks are `context` tokens long, or
    training left all of those positions out, ConfigError where n_tokens are not fewer than the
    vocabulary.
    """
    check_tokens(model, n_tokens)
    tokens = draw_sequences(
        corpus, n_sequences, context, exclude_positions=exclude_positions, seed=seed
    ).to(model.device)
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
            some = slice(None if length == alpha else SWEEP_LATENTS)
            absolute = length * text.norm
            effect = steer(
                model, text, directions[some], associated[some], hook=hook, length=absolute
            )
            rows.append(
                {"sae": name, "alpha": length, "alpha_absolute": absolute}
                | _summarise(effect, draws, seed)
                | facts
            )
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
    """At most n random live latents of each SAE that has any, and n isotropic directions. A decoder
    row of zeros is no direction, and is never picked.
    """
    picked = {}
    for name, sae in saes.items():
        ids = live[name].cpu()
        ids = ids[sae.W_dec.detach().norm(dim=-1).cpu()[ids] > 0]
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        some = ids[order[:n]]
        if len(some):
            picked[name] = Directions(some.tolist(), sae.W_dec.detach()[some.to(sae.W_dec.device)])
    drawn = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))
    return picked | {RANDOM: Directions(list(range(n)), drawn)}


def draw_sequences(
    corpus: Corpus, n: int, context: int, *, exclude_positions: Sequence[int] = (), seed: int
) -> Int[Tensor, "sequences context"]:
    """The first `context` tokens of `choose_blocks`; raises what that does."""
    picked = choose_blocks(corpus, n, context, exclude_positions, seed=seed)
    blocks = [corpus.read_blocks("held_out", int(i), 1).tokens for i in picked]
    return torch.from_numpy(np.concatenate(blocks)[:, :context]).long()


def choose_blocks(
    corpus: Corpus, n: int, context: int, exclude_positions: Sequence[int] = (), *, seed: int = 0
) -> np.ndarray:
    """n random held-out blocks of at least `context` rows; raises CorpusError if there are fewer,
    or no position below `context` is left to steer. Pure arithmetic on the blocks' lengths.
    """
    if set(range(context)) <= set(exclude_positions):
        raise CorpusError(
            f"held-out text at {corpus.folder}: expected a position below {context} "
            "(evidence.steering_context) that training did not leave out, got none. Run with "
            "`--set evidence.steering_context=<tokens>`."
        )
    long = np.flatnonzero(corpus.lengths("held_out") >= context)
    if len(long) < n:
        raise CorpusError(
            f"held-out text at {corpus.folder}: expected {n} blocks of at least {context} tokens "
            f"(evidence.steering_sequences, evidence.steering_context), got {len(long)}. Run with "
            "less of either: `--set evidence.steering_sequences=<n>`, `--set "
            "evidence.steering_context=<tokens>`."
        )
    return np.random.default_rng(seed).permutation(long)[:n]


def _summarise(effect: SteeringEffect, draws: int, seed: int) -> dict[str, float | None]:
    """Means over latents, each with its interval."""
    n_latents = len(effect.associated)
    weights = draw_weights(n_latents, draws=draws, seed=seed)
    figures: dict[str, float | None] = {}
    for name, values in effect._asdict().items():
        figures |= spread_interval(name, find_interval(resample_mean(values.cpu(), weights)))
    return figures | {"n_latents": n_latents}


def _list_latents(
    name: str, latents: Sequence[int], alpha: float, effect: SteeringEffect
) -> list[dict[str, Any]]:
    columns = zip(latents, effect.associated.tolist(), effect.others_absolute.tolist(), strict=True)
    return [
        {"sae": name, "latent": i, "alpha": alpha, "associated": a, "others_absolute": b}
        for i, a, b in columns
    ]
