"""Claims decided from the figures and intervals of other tables: Table 2, Figs. 2 and 3."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.evaluate.bootstrap import Interval
from pipeline.evaluate.comparisons import Comparison, compare_intervals, divide_intervals
from pipeline.evaluate.pairs import Evidence, Pair, Rows, plan_pairs
from pipeline.evaluate.verdicts import Claim, make_claim

FIRST_SENSITIVE_LAYER = 3  # of the paper's Fig. 2
_RATIO = "ratio_by_document"  # right over left, whose interval resamples documents


def decide_splitting(evidence: Evidence) -> list[Claim]:
    """Table 2: the gradient's size along latents with a near neighbour over that along those
    without one, and whether that ratio is larger than that of beta 0 or of shuffled gradients.
    """
    rows = evidence.tables.get("splitting_summary", ())
    ratios = {row["sae"]: ratio for row in rows if (ratio := read_positive(row, _RATIO))}
    units = {row["sae"]: f"{row['documents']} documents and the latents" for row in rows}
    claims = {"": [], "plain": [], "shuffled": []}
    for rival in ("plain", "shuffled"):
        for pair in plan_pairs(evidence, rival):
            seeds = [s for s in zip(pair.ours, pair.theirs, strict=True) if {*s} <= ratios.keys()]
            ours, theirs = ([ratios[seed[side]] for seed in seeds] for side in (0, 1))
            if seeds:
                of = units[seeds[0][0]]
                both = [divide_intervals(a, b) for a, b in zip(ours, theirs, strict=True)]
                claims[rival].append(_compare_rival(rival, pair, both, of))
                if rival == "plain":
                    claims[""].append(_right_tail(pair, ours, of))
    return [
        *(claims[""] or [_right_tail(None, [])]),
        *(claims["plain"] or [_compare_rival("plain", None, [])]),
        *(claims["shuffled"] or [_compare_rival("shuffled", None, [])]),
    ]


def _right_tail(pair: Pair | None, ratios: list[Interval], units: str = "") -> Claim:
    return make_claim(
        "splitting",
        "The loss is steeper along latents that have a near duplicate",
        "Table 2",
        comparison=_describe("right tail against left, g-SAE", pair),
        measure="the gradient's size along latents",
        compared=_compare_seeds(ratios),
        wanted=1,
        units=units,
        paper="1.38 (2.861 over 2.070, ×1e-5)" if _is_printed(pair) else "",
    )


def _compare_rival(rival: str, pair: Pair | None, ratios: list[Interval], units: str = "") -> Claim:
    plain = rival == "plain"
    name = pair.spec.name if pair else "TopK"
    against = name if plain else "one trained on shuffled gradients"
    return make_claim(
        "splitting_topk" if plain else "splitting_shuffled",
        "The loss steepens more along near duplicates than without the gradient"
        if plain
        else "The loss steepens more along near duplicates than with shuffled gradients",
        "Table 2" if plain else "",
        comparison=_describe(f"right over left, g-SAE against {against}", pair),
        measure="those ratios",
        compared=_compare_seeds(ratios),
        wanted=1,
        units=units,
        paper="1.28 (1.38 over 1.08)" if plain and _is_printed(pair) else "",
    )


def _compare_seeds(ratios: list[Interval]) -> Comparison | None:
    return compare_intervals(ratios, measure="ratio", at=1.0, by_seed=True) if ratios else None


def _is_printed(pair: Pair | None) -> bool:
    """Whether Table 2 has this kind of SAE."""
    return pair is not None and pair.spec.architecture == "topk"


def _describe(words: str, pair: Pair | None) -> str:
    return f"{words}; {pair.spec.describe()}" if pair else words


def decide_sensitivity(rows: Rows) -> list[Claim]:
    """Fig. 2: differences of activations against random directions, from layer 3 on; with the x of
    the gradient as one of the two, and with two others, for the paper leaves open which.
    """
    return [
        _compare_cells(
            f"sensitivity_{against}",
            f"The model is more sensitive along differences of activations than along {words}",
            "Fig. 2",
            cells=[
                interval
                for row in rows
                if row["direction"] == direction and row["layer"] >= FIRST_SENSITIVE_LAYER
                if (interval := read_interval(row, f"ratio_to_{against}"))
            ],
            pair=pair,
            what=f"layers from {FIRST_SENSITIVE_LAYER} on",
            measure="mean |∇L · direction| at unit norm",
            at=1.0,
            units=f"{rows[0]['n_blocks']} blocks" if rows else "",
            paper="clearly higher from layer 3 on",
        )
        for against, words in (
            ("isotropic", "isotropic random directions"),
            ("covariance", "random directions of the activations' covariance"),
        )
        for direction, pair in (
            ("difference", "of x and another activation"),
            ("other_difference", "of two others than x"),
        )
    ]


def decide_perturbation(rows: Rows) -> list[Claim]:
    """Fig. 3: how well |grad · delta| ranks perturbations by their effect, less how well their norm
    does, of the same perturbations.
    """
    return [
        _compare_cells(
            "perturbation",
            "The gradient predicts a perturbation's effect better than its norm does",
            "Fig. 3",
            cells=[cell for row in rows if (cell := read_interval(row, "rho_difference"))],
            pair="",
            what="sites, layers and sizes",
            measure="Spearman's rho with |ΔL|",
            at=0.0,
            units=f"{rows[0]['n']} blocks" if rows else "",
            paper="higher at every layer and size",
        )
    ]


def _compare_cells(
    id: str,
    statement: str,
    source: str,
    *,
    cells: list[Interval],
    pair: str,
    what: str,
    measure: str,
    at: float,
    units: str,
    paper: str,
) -> Claim:
    """A claim of many layers, or more: the mean over them, and how many agree.

    They are of the same text, so the mean's interval is the mean of theirs: wider than need be.
    """
    n_above, n_below = sum(c.low > at for c in cells), sum(c.high < at for c in cells)
    agree = f"higher in {n_above}, lower in {n_below} of {len(cells)} {what}"
    kind = "ratio" if at else "difference"
    return make_claim(
        id,
        statement,
        source,
        comparison=": ".join(filter(None, [pair, agree if cells else what])),
        measure=f"{measure}, mean over {what}",
        compared=compare_intervals(cells, measure=kind, at=at) if cells else None,
        wanted=1,
        units=units if cells else "",
        paper=paper if cells else "",
    )


def read_interval(row: Mapping[str, Any], name: str) -> Interval | None:
    """A figure and its interval, NaN where that is not known; None where the figure is not."""
    value, low, high = (row.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None or not math.isfinite(value):
        return None
    return Interval(value, *(math.nan if end is None else end for end in (low, high)))


def read_positive(row: Mapping[str, Any], name: str) -> Interval | None:
    """The same, None where one of the three is not above 0 too."""
    interval = read_interval(row, name)
    return interval if interval and not min(interval) <= 0 else None
