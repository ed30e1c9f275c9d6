"""A claim and its verdict."""

import math
from typing import Literal, NamedTuple

from pipeline.evaluate.comparisons import Comparison

Verdict = Literal["holds", "does not hold", "not decided", "not measured"]
Side = Literal[-1, 1]


class Claim(NamedTuple):
    """One comparison and what it says of one claim."""

    id: str
    statement: str  # what is claimed, in plain words
    source: str  # where the paper claims it; "" for a control of ours
    comparison: str  # what against what, at which k, in which mode
    measure: str  # what value is: a difference or ratio, and of which figure
    value: float | None
    low: float | None  # of the 95% interval
    high: float | None
    units: str  # what the interval resamples, and how many there are: "40 documents"
    n_seeds: int | None  # that value is over; None where SAEs have no part in it
    seeds_low: float | None  # the smallest and largest seed's own value
    seeds_high: float | None
    paper: str  # the paper's value, or ""
    sees_label: bool  # something in it selects with the gradient of the loss that is measured
    verdict: Verdict


def make_claim(
    id: str,
    statement: str,
    source: str,
    *,
    comparison: str,
    measure: str,
    compared: Comparison | None,
    wanted: Side,
    units: str = "",
    paper: str = "",
    sees_label: bool = False,
) -> Claim:
    """The claim with its verdict; `measure` says of what, `compared` None: nothing to compare. So
    it is where the value is not finite; an interval that is not known decides nothing.
    """
    if compared and not math.isfinite(compared.value):
        compared = None
    by_seed = compared.by_seed if compared else ()
    return Claim(
        id=id,
        statement=statement,
        source=source,
        comparison=comparison,
        measure=f"{compared.measure} of {measure}" if compared else measure,
        value=compared.value if compared else None,
        low=_if_finite(compared.low) if compared else None,
        high=_if_finite(compared.high) if compared else None,
        units=units,
        n_seeds=len(by_seed) or None,
        seeds_low=_if_finite(min(by_seed, default=None)),
        seeds_high=_if_finite(max(by_seed, default=None)),
        paper=paper,
        sees_label=sees_label,
        verdict=give_verdict(compared.side, wanted) if compared else "not measured",
    )


def _if_finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def give_verdict(side: int, wanted: Side) -> Verdict:
    """A side taken (0: none), against the side that the claim takes."""
    if side == 0:
        return "not decided"
    return "holds" if side == wanted else "does not hold"
