"""How much the loss changes along real differences of activations, and along random directions.

    s(u) = |∇_x L(x) · u|,  ||u||_2 = 1                      (Olmo et al. 2024, section 2.3, Fig. 2)

at the residual stream after every layer, from one forward and backward pass. x are a fixed random
sample of held-out rows; L is the summed cross-entropy of x's block in nats, so s is in nats per
unit of activation. The means are over rows, and their intervals over blocks of text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pipeline.capture import capture
from pipeline.corpus.reader import Corpus
from pipeline.errors import CorpusError
from pipeline.evaluate.bootstrap import (
    draw_weights,
    find_interval,
    resample_ratio,
    spread_interval,
)
from pipeline.evaluate.directions import (
    Moments,
    draw_covariance,
    draw_isotropic,
    factor_covariance,
    read_acts,
    scale_to_unit,
    start_generator,
)
from pipeline.evaluate.held_out import draw_blocks, read_batches
from pipeline.model import LanguageModel, resolve_hooks

DIRECTIONS = ("difference", "other_difference", "covariance", "isotropic")
ROWS_PER_BLOCK = 64  # at most: more blocks tell more than more rows of a block
PARTNERS_PER_BLOCK = 32  # 32 of 32 blocks, at 12 layers of 768, are 38 MB


class Sample(NamedTuple):
    """Which held-out rows are looked at."""

    reference: dict[int, list[int]]  # by block: all its rows that are not left out
    measured: dict[int, list[int]]  # by block: where gradients are taken; other blocks than those


class Reference(NamedTuple):
    """What a layer's directions are drawn from."""

    rows: Float[Tensor, "partners d_model"]  # real activations, of the reference blocks
    factor: Float[Tensor, "d_model d_model"]  # of the covariance of all rows of those blocks


def measure_sensitivity(
    model: LanguageModel,
    corpus: Corpus,
    *,
    exclude_positions: tuple[int, ...],
    n_rows: int,
    batch_blocks: int,
    draws: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row per layer and direction: the mean of s(u), and its ratio to that of random directions.

    difference         x - x_j, x_j a random real activation of that layer from another block
    other_difference   x_i - x_j, both such activations, of two different blocks where possible
    covariance         random, normal with the covariance of that layer's real activations
    isotropic          random, uniform on the sphere

    One direction of each kind is drawn per row. x_j, x_i and the covariance come from blocks set
    apart, so that nothing of a measured block is in its own directions but x itself. n_rows rows
    are measured, or as many as there are; `gradient_norm` is the mean of ||∇L||. Ratios are paired:
    both means are of the same resampled blocks.

    Differs: the paper does not say whether x_i is the x of the gradient: `difference` takes it so,
    `other_difference` does not. Neither does it say how L is reduced, on which a ratio does not
    depend, nor how many rows it took. Positions that training left out are left out.

    Raises CorpusError if fewer than two held-out blocks have rows, or those set apart have a single
    row, which has no difference and no covariance.
    """
    hooks = resolve_hooks("resid_post", range(model.facts.n_layers), model.facts)
    sample = choose_rows(corpus, n_rows, exclude_positions, seed=seed)
    references = read_references(
        model, corpus, sample.reference, hooks, batch_blocks=batch_blocks, seed=seed
    )
    blocks = _sum_blocks(
        model, corpus, sample.measured, references, batch_blocks=batch_blocks, seed=seed
    )
    sums = torch.stack(list(blocks))
    counts = torch.tensor([len(rows) for rows in sample.measured.values()], dtype=torch.float64)
    weights = draw_weights(len(counts), draws=draws, seed=seed)
    return [
        {"layer": layer, "direction": name} | figures
        for layer in range(len(hooks))
        for name, figures in summarise(sums[:, layer], counts, weights).items()
    ]


def choose_rows(
    corpus: Corpus, n_rows: int, exclude_positions: Sequence[int], *, seed: int = 0
) -> Sample:
    """`plan_sample` of the held-out blocks in their fixed random order; raises CorpusError if there
    is too little text for it.
    """
    sample = plan_sample(
        corpus.lengths("held_out").tolist(),
        draw_blocks(corpus, None).tolist(),
        n_rows=n_rows,
        exclude_positions=exclude_positions,
        seed=seed,
    )
    n_reference = sum(map(len, sample.reference.values()))
    if sample.measured and n_reference > 1:
        return sample
    found = f"2 blocks with rows, got {len(sample.reference)}"
    if sample.measured:
        found = f"2 rows in the blocks set apart, got {n_reference}"
    raise CorpusError(
        f"held-out text at {corpus.folder}: expected at least {found} "
        "(evidence.sensitivity_rows). Make a larger corpus with `pipeline corpus`, or leave this "
        "out with `--set evidence.sensitivity_rows=0`."
    )


def plan_sample(
    lengths: Sequence[int],
    order: Sequence[int],
    *,
    n_rows: int,
    exclude_positions: Sequence[int],
    seed: int = 0,
) -> Sample:
    """Blocks in the given order: first those of the reference, with n_rows rows but at most a fifth
    of the blocks, then the measured, until those have n_rows. Pure arithmetic.
    """
    rows = {b: [p for p in range(lengths[b]) if p not in exclude_positions] for b in order}
    rows = {block: positions for block, positions in rows.items() if positions}
    most, left, reference = max(1, len(rows) // 5), n_rows, {}
    for block in list(rows)[:most]:
        if left > 0:
            reference[block] = rows.pop(block)
            left -= len(reference[block])
    left, measured = n_rows, {}
    for block, positions in rows.items():
        if left > 0:
            size = min(len(positions), ROWS_PER_BLOCK, left)
            picked = np.random.default_rng((seed, block)).permutation(positions)[:size]
            measured[block] = sorted(picked.tolist())
            left -= size
    return Sample(reference, measured)


def read_references(
    model: LanguageModel,
    corpus: Corpus,
    blocks: Mapping[int, Sequence[int]],
    hooks: Sequence[str],
    *,
    batch_blocks: int,
    seed: int = 0,
) -> dict[str, Reference]:
    """What directions are drawn from, by hook, from one forward pass over the reference blocks."""
    moments = {hook: Moments(model.facts.d_model) for hook in hooks}
    partners: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for ids, (tokens, _) in _pair_batches(corpus, blocks, batch_blocks):
        acts = read_acts(model, tokens, hooks)
        for i, block in enumerate(ids):
            generator = start_generator(seed, block)
            picked = torch.randperm(len(blocks[block]), generator=generator)[:PARTNERS_PER_BLOCK]
            for hook in hooks:
                rows = acts[hook][i, list(blocks[block])].cpu()
                moments[hook].add(rows)
                partners[hook].append(rows[picked])
    return {
        hook: Reference(torch.cat(partners[hook]), factor_covariance(moments[hook].covariance))
        for hook in hooks
    }


def draw_directions(
    acts: Float[Tensor, "rows d_model"], reference: Reference, generator: Generator
) -> Float[Tensor, "directions rows d_model"]:
    """A unit vector of each of DIRECTIONS for each activation, float64."""
    n, d_model = acts.shape
    partners = reference.rows.double()
    # They lie block by block: so many apart, two are of different blocks.
    apart = PARTNERS_PER_BLOCK if len(partners) > 2 * PARTNERS_PER_BLOCK else 1
    j = torch.randint(len(partners), (n,), generator=generator)
    i = j + torch.randint(apart, max(apart, len(partners) - apart) + 1, (n,), generator=generator)
    i %= len(partners)
    return torch.stack(
        [
            scale_to_unit(acts.double() - partners[j]),
            scale_to_unit(partners[i] - partners[j]),
            scale_to_unit(draw_covariance(reference.factor, n, generator)),
            draw_isotropic(n, d_model, generator),
        ]
    )


def sum_derivatives(
    grads: Float[Tensor, "rows d_model"], directions: Float[Tensor, "directions rows d_model"]
) -> Float[Tensor, " directions_and_one"]:
    """Sums over rows, float64: |g · u| of each kind of direction, and ||g|| last."""
    grads = grads.double()
    derivatives = (directions * grads).sum(-1).abs()
    return torch.cat([derivatives.sum(-1), grads.norm(dim=-1).sum()[None]])


def summarise(
    sums: Float[Tensor, "blocks directions_and_one"],
    counts: Float[Tensor, " blocks"],
    weights: Float[Tensor, "draws_and_one blocks"],
) -> dict[str, dict[str, Any]]:
    """A layer's figures by direction, from its sums per block and the blocks' numbers of rows."""
    shared = {"n_rows": int(counts.sum()), "n_blocks": len(counts)}
    columns = dict(zip(DIRECTIONS, sums.T, strict=False))

    def divide(figure: str, above: Tensor, below: Tensor) -> dict[str, float | None]:
        return spread_interval(figure, find_interval(resample_ratio(above, below, weights)))

    norm = divide("gradient_norm", sums[:, -1], counts)
    return {
        name: shared
        | divide("mean", column, counts)
        | divide("ratio_to_isotropic", column, columns["isotropic"])
        | divide("ratio_to_covariance", column, columns["covariance"])
        | norm
        for name, column in columns.items()
    }


def _sum_blocks(
    model: LanguageModel,
    corpus: Corpus,
    blocks: Mapping[int, Sequence[int]],
    references: Mapping[str, Reference],
    *,
    batch_blocks: int,
    seed: int,
) -> Iterator[Float[Tensor, "layers directions_and_one"]]:
    """Each measured block's sums."""
    for ids, (tokens, lengths) in _pair_batches(corpus, blocks, batch_blocks):
        captured = capture(model, tokens, list(references), lengths=lengths)
        for i, block in enumerate(ids):
            rows, generator = list(blocks[block]), start_generator(seed, block)
            yield torch.stack(
                [
                    sum_derivatives(
                        captured.grads[hook][i, rows].cpu(),
                        draw_directions(captured.acts[hook][i, rows].cpu(), reference, generator),
                    )
                    for hook, reference in references.items()
                ]
            )


def _pair_batches(
    corpus: Corpus, blocks: Iterable[int], batch_blocks: int
) -> Iterator[tuple[Sequence[int], tuple[Tensor, Tensor]]]:
    """Block numbers of each batch, with its tokens and lengths."""
    order = list(blocks)
    ids = (order[i : i + batch_blocks] for i in range(0, len(order), batch_blocks))
    batches = read_batches(corpus, np.array(order), batch_blocks=batch_blocks)
    return zip(ids, batches, strict=True)
