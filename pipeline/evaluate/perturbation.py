"""What predicts the effect of a perturbation on the loss: the gradient, or its size alone.

    ΔL = L(x + δ) - L(x)        rho = Spearman(|ΔL|, |∇_x L · δ|) and Spearman(|ΔL|, ||δ||_2)

(Olmo et al. 2024, section 2.4, Fig. 3.) δ is isotropic, added to one row of a sequence at one site;
L is the summed cross-entropy of the sequence, in nats, from a whole forward pass.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from pipeline.capture import capture, patched_loss
from pipeline.corpus.reader import Corpus
from pipeline.errors import CorpusError
from pipeline.evaluate.bootstrap import draw_weights, find_interval, spread_interval
from pipeline.evaluate.directions import draw_isotropic, read_acts, start_generator
from pipeline.evaluate.held_out import draw_blocks, read_batches
from pipeline.model import LanguageModel, name_site, resolve_hooks, row_losses
from pipeline.upper import run_upper

TOKENS_AT_ONCE = 4096
HALF_WIDTH = 3**0.5 / 2  # of the norms around their mean 1: their standard deviation is 1/2
TAILS = (0.05, 0.95)
SITES = ("resid_post", "mlp_out")  # of Fig. 3: named by its caption, and by the text


class Setting(NamedTuple):
    """What is perturbed, and how strongly."""

    site: str
    layer: int
    size: float  # mean norm of δ, as a fraction of the mean norm at the site

    @property
    def hook(self) -> str:
        return name_site(self.layer, self.site)


class Sequences(NamedTuple):
    """The sequences that are perturbed: the first rows of held-out blocks."""

    blocks: np.ndarray  # of as many rows at least
    context: int  # rows of each
    free: tuple[int, ...]  # positions that may be perturbed


def measure_perturbation(
    model: LanguageModel,
    corpus: Corpus,
    *,
    sites: Sequence[str] = SITES,
    layers: Sequence[int] | None,
    sizes: Sequence[float],
    n_samples: int,
    context: int,
    exclude_positions: tuple[int, ...],
    draws: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row per site, layer and size: rank correlations of |ΔL|, and how far |ΔL| spreads.

    For each of them, every one of n_samples sequences is perturbed once, at a random position that
    training did not leave out: δ is uniform on the sphere in direction, its norm uniform on
    m (1 ± √3/2), of mean m (`norm`) and standard deviation m/2, with m = size x the mean ||x||_2 of
    the site over those positions. `rho_steepness` is Spearman(|ΔL|, ||∇L|| ||δ||): that of how
    steep the loss is at the row, which the norm of δ cannot know, without δ's direction. `spread`
    is log10 of |ΔL|'s 95th over its 5th percentile; it mixes all that differs between samples
    (text, position, norm and direction), where a fixed gradient and norm alone would give 1.5, the
    ratio of a normal variable's quantiles; None where the 5th is 0. `change` is the median |ΔL|.
    Intervals are over sequences, which are of different blocks.

    A sequence has `context` tokens, or as many as the corpus's blocks have; there are fewer than
    n_samples where fewer blocks are held out. layers None is all of them. A site that the model
    does not offer is left out.

    Differs: the paper gives norms in activation units, not as fractions, and neither the number nor
    the length of sequences, nor how many positions are perturbed. Raises CorpusError if no held-out
    block is so long.
    """
    sequences = choose_sequences(corpus, n_samples, context, exclude_positions)
    settings = plan_settings(model, sites=sites, layers=layers, sizes=sizes)
    norms = measure_norms(model, corpus, sequences, sorted({s.hook for s in settings}))
    batches = [
        perturb(model, tokens, settings, norms, _draw_all(blocks, sequences, settings, model, seed))
        for blocks, tokens in _read(corpus, sequences)
    ]
    effects = torch.cat(batches, 2)
    weights = draw_weights(effects.shape[2], draws=draws, seed=seed)
    return [
        setting._asdict()
        | {"norm": setting.size * norms[setting.hook]}
        | {"n": effects.shape[2], "context": sequences.context}
        | summarise(effect, weights)
        for setting, effect in zip(settings, effects, strict=True)
    ]


def list_sites(model: LanguageModel, layers: Sequence[int] | None) -> list[str]:
    """Those of SITES that the model offers in each of these layers, None: all. Where a block is not
    what the sites' equations say, resid_post stands, mlp_out does not.
    """
    layers = range(model.facts.n_layers) if layers is None else layers
    return [
        site for site in SITES if all(name_site(layer, site) in model.sites for layer in layers)
    ]


def choose_sequences(
    corpus: Corpus, n: int, context: int, exclude_positions: Sequence[int] = ()
) -> Sequences:
    """At most n held-out blocks, in their fixed random order, that have `context` rows; raises
    CorpusError if none has. Pure arithmetic on the blocks' lengths.
    """
    context = min(context, corpus.manifest.context_length)
    free = [position for position in range(context) if position not in exclude_positions]
    lengths, order = corpus.lengths("held_out"), draw_blocks(corpus, None)
    blocks = order[lengths[order] >= context][:n]
    if len(blocks) == 0 or not free:
        raise CorpusError(
            f"held-out text at {corpus.folder}: expected a block of at least {context} rows "
            "(evidence.perturbation_context), some of them to perturb, got none. Run with `--set "
            "evidence.perturbation_context=<rows>`."
        )
    return Sequences(blocks, context, tuple(free))


def plan_settings(
    model: LanguageModel,
    *,
    sites: Sequence[str],
    layers: Sequence[int] | None,
    sizes: Sequence[float],
) -> list[Setting]:
    """Every site that the model offers, layer and size; raises ModelError for a missing layer."""
    layers = range(model.facts.n_layers) if layers is None else layers
    resolve_hooks("resid_post", layers, model.facts)
    settings = [Setting(site, layer, size) for site in sites for layer in layers for size in sizes]
    return [setting for setting in settings if setting.hook in model.sites]


def measure_norms(
    model: LanguageModel, corpus: Corpus, sequences: Sequences, hooks: Sequence[str]
) -> dict[str, float]:
    """Mean ||x||_2 at each hook, over all rows that may be perturbed."""
    norms = dict.fromkeys(hooks, 0.0)
    for _, tokens in _read(corpus, sequences):
        acts = read_acts(model, tokens, hooks)
        for hook in hooks:
            rows = acts[hook][:, list(sequences.free)]
            norms[hook] += rows.norm(dim=-1).mean(1).cpu().double().sum().item()
    return {hook: norm / len(sequences.blocks) for hook, norm in norms.items()}


def draw_perturbations(
    n: int, free: Sequence[int], d_model: int, generator: Generator
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n d_model"]]:
    """n positions out of `free`, and n isotropic vectors of norms uniform on 1 ± √3/2."""
    positions = torch.tensor(free)[torch.randint(len(free), (n,), generator=generator)]
    uniform = 2 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1
    return positions, draw_isotropic(n, d_model, generator) * (1 + HALF_WIDTH * uniform)


def perturb(
    model: LanguageModel,
    tokens: Int[Tensor, "batch context_and_one"],
    settings: Sequence[Setting],
    norms: Mapping[str, float],
    drawn: Sequence[tuple[Int[Tensor, " settings"], Float[Tensor, "settings d_model"]]],
) -> Float[Tensor, "settings effects batch"]:
    """|ΔL|, |∇L · δ|, ||δ||_2 and ||∇L|| ||δ|| of each sequence under each setting, float64.

    `drawn` has each sequence's positions and perturbations of mean norm 1.
    """
    captured = capture(model, tokens, sorted({setting.hook for setting in settings}))
    every = torch.arange(len(tokens))
    effects = torch.empty(len(settings), 4, len(tokens), dtype=torch.float64)
    for s, setting in enumerate(settings):
        at = torch.stack([positions[s] for positions, _ in drawn])
        delta = torch.stack([deltas[s] for _, deltas in drawn])
        delta *= setting.size * norms[setting.hook]
        acts = captured.acts[setting.hook].clone()
        acts[every, at] += delta.to(acts)
        loss = run_patched(model, tokens, setting, acts)
        # Differences first: a sum over the sequence would round off what is small.
        change = loss.cpu().double() - captured.loss.cpu().double()
        later = torch.arange(change.shape[1]) >= at[:, None]  # attention is causal
        grads, norm = captured.grads[setting.hook][every, at].cpu().double(), delta.norm(dim=-1)
        changes, slope = (change * later).sum(1), (grads * delta).sum(-1)
        effects[s] = torch.stack([changes.abs(), slope.abs(), norm, grads.norm(dim=-1) * norm])
    return effects


@torch.no_grad()
def run_patched(
    model: LanguageModel,
    tokens: Int[Tensor, "batch context_and_one"],
    setting: Setting,
    acts: Float[Tensor, "batch context d_model"],
) -> Float[Tensor, "batch context"]:
    """Loss of each row, in nats, with `acts` at the setting's site.

    After resid_post only the blocks above run: the residual stream is all that they read.
    """
    if setting.site != "resid_post":
        return patched_loss(model, tokens, setting.hook, acts)
    tokens = tokens.to(model.device)
    hidden = run_upper(model, tokens[:, :-1], acts, n_lower=setting.layer + 1)
    targets = tokens[:, 1:]
    return row_losses(hidden.flatten(0, 1), targets.flatten(), model.unembedding).loss.view_as(
        targets
    )


def rank_correlations(
    a: Float[Tensor, " n"], b: Float[Tensor, " n"], weights: Float[Tensor, "draws n"]
) -> Float[Tensor, " draws"]:
    """Spearman's rho of a and b in each resampling: Pearson's of ranks, ties sharing their mean.

        rank_i = sum over j of w_j ([v_j < v_i] + [v_j = v_i] / 2) + 1/2

    weights say how often each unit is in a resampling. NaN where a or b is constant in one.
    """
    ranks = []
    for values in (a, b):
        below = (values[:, None] < values).double() + (values[:, None] == values).double() / 2
        rank = weights @ below
        ranks.append(rank - (weights * rank).sum(1, keepdim=True) / weights.sum(1, keepdim=True))
    x, y = ranks
    products = (weights * x * y).sum(1)
    return products / ((weights * x * x).sum(1) * (weights * y * y).sum(1)).sqrt()


def summarise(
    effects: Float[Tensor, "effects n"], weights: Float[Tensor, "draws_and_one n"]
) -> dict[str, float | None]:
    """One setting's figures, from its samples as `perturb` gives them."""
    changes = effects[0]
    gradient, norm, steepness = (rank_correlations(changes, e, weights) for e in effects[1:])
    low, high = torch.quantile(changes, torch.tensor(TAILS, dtype=torch.float64)).tolist()
    return {
        **spread_interval("rho_gradient", find_interval(gradient)),
        **spread_interval("rho_norm", find_interval(norm)),
        **spread_interval("rho_steepness", find_interval(steepness)),
        # Paired: of the same resampled sequences.
        **spread_interval("rho_difference", find_interval(gradient - norm)),
        "spread": math.log10(high / low) if low > 0 else None,
        "change": changes.median().item(),
    }


def _draw_all(
    blocks: Sequence[int],
    sequences: Sequences,
    settings: Sequence[Setting],
    model: LanguageModel,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    n, d_model = len(settings), model.facts.d_model
    return [
        draw_perturbations(n, sequences.free, d_model, start_generator(seed, block))
        for block in blocks
    ]


def _read(corpus: Corpus, sequences: Sequences) -> Iterator[tuple[list[int], Tensor]]:
    """Block numbers and tokens [batch, context + 1] of each batch."""
    size = max(1, TOKENS_AT_ONCE // sequences.context)
    batches = read_batches(corpus, sequences.blocks, batch_blocks=size)
    for i, (tokens, _) in enumerate(batches):
        blocks = sequences.blocks[i * size : (i + 1) * size].tolist()
        yield blocks, tokens[:, : sequences.context + 1]
