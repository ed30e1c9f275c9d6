"""Claims decided from the figures and intervals of other tables: Table 2, Figs. 2 and 3."""

from collections.abc import Mapping
from typing import Any

from pipeline.evaluate.bootstrap import Interval
from pipeline.evaluate.comparisons import (
    Comparison,
    Evidence,
    Pair,
    Rows,
    compare_cells,
    compare_ratios,
    plan_pairs,
    subtract_intervals,
)
from pipeline.evaluate.verdicts import Claim, make_claim

FIRST_SENSITIVE_LAYER = 3  # of the paper's Fig. 2


def decide_splitting(evidence: Evidence) -> list[Claim]:
    """Table 2: the gradient's size along latents with a near neighbour over that along those
    without one, and whether that ratio is larger than TopK's.
    """
    rows = evidence.tables.get("splitting_summary", ())
    ratios = {row["sae"]: ratio for row in rows if (ratio := read_positive(row, "ratio"))}
    pairs = plan_pairs(evidence, "plain")
    claims = []
    for pair in pairs:
        seeds = [s for s in zip(pair.ours, pair.theirs, strict=True) if {*s} <= ratios.keys()]
        ours, theirs = ([ratios[seed[side]] for seed in seeds] for side in (0, 1))
        if seeds:
            claims.append(_right_tail(pair, compare_ratios(ours)))
            claims.append(_beside_topk(pair, compare_ratios(ours, theirs)))
    return claims or [_right_tail(None, None), _beside_topk(None, None)]


def _right_tail(pair: Pair | None, compared: Comparison | None) -> Claim:
    return make_claim(
        "splitting",
        "The loss is steeper along latents that have a near duplicate",
        "Table 2",
        comparison=_describe("right tail against left, g-SAE", pair),
        measure="the gradient's size along latents",
        compared=compared,
        wanted=1,
        paper="1.38 (2.861 over 2.070, ×1e-5)",
    )


def _beside_topk(pair: Pair | None, compared: Comparison | None) -> Claim:
    return make_claim(
        "splitting_topk",
        "It is so more than in TopK",
        "Table 2",
        comparison=_describe("right over left, g-SAE against TopK", pair),
        measure="those ratios",
        compared=compared,
        wanted=1,
        paper="1.28 (1.38 over 1.08)",
    )


def _describe(words: str, pair: Pair | None) -> str:
    return f"{words}; {pair.spec.describe()}" if pair else words


def decide_sensitivity(rows: Rows) -> list[Claim]:
    """Fig. 2: directions between two activations against random ones, from layer 3 on."""
    return [
        _compare_layers(
            f"sensitivity_{against}",
            f"The model is more sensitive along differences of activations than along {words}",
            "Fig. 2",
            cells=[
                interval
                for row in rows
                if row["direction"] == "difference" and row["layer"] >= FIRST_SENSITIVE_LAYER
                if (interval := read_interval(row, f"ratio_to_{against}"))
            ],
            what=f"layers from {FIRST_SENSITIVE_LAYER} on",
            measure="mean |∇L · direction| at unit norm",
            at=1.0,
            paper="clearly higher from layer 3 on",
        )
        for against, words in (
            ("isotropic", "isotropic random directions"),
            ("covariance", "random directions of the activations' covariance"),
        )
    ]


def decide_perturbation(rows: Rows) -> list[Claim]:
    """Fig. 3: how well |grad · delta| ranks perturbations by their effect, less how well their norm
    does. Both are of the same perturbations, but only their own intervals are known: that of the
    difference is wider than need be.
    """
    pairs = [(read_interval(row, "rho_gradient"), read_interval(row, "rho_norm")) for row in rows]
    return [
        _compare_layers(
            "perturbation",
            "The gradient predicts a perturbation's effect better than its norm does",
            "Fig. 3",
            cells=[subtract_intervals(a, b) for a, b in pairs if a and b],
            what="sites, layers and sizes",
            measure="Spearman's rho with |ΔL|",
            at=0.0,
            paper="higher at every layer and size",
        )
    ]


def _compare_layers(
    id: str,
    statement: str,
    source: str,
    *,
    cells: list[Interval],
    what: str,
    measure: str,
    at: float,
    paper: str,
) -> Claim:
    """A claim of all layers: value and interval of the one in the middle, and how many agree."""
    n_above, n_below = sum(c.low > at for c in cells), sum(c.high < at for c in cells)
    agree = f"higher in {n_above}, lower in {n_below} of {len(cells)} {what}"
    kind = "ratio" if at else "difference"
    return make_claim(
        id,
        statement,
        source,
        comparison=agree if cells else what,
        measure=f"{measure}, in the middle one",
        compared=compare_cells(cells, at=at, measure=kind) if cells else None,
        wanted=1,
        paper=paper,
    )


def read_interval(row: Mapping[str, Any], name: str) -> Interval | None:
    """A figure and its interval; None where one of the three is missing."""
    values = [row.get(key) for key in (name, f"{name}_low", f"{name}_high")]
    known = [value for value in values if value is not None]
    return Interval(*known) if len(known) == len(values) else None


def read_positive(row: Mapping[str, Any], name: str) -> Interval | None:
    """The same, None where one of the three is not above 0 too."""
    interval = read_interval(row, name)
    return interval if interval and min(interval) > 0 else None
