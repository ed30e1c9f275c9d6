"""Verdicts on planted tables: the gradient by tail, sensitivity and perturbation."""

import math
from typing import Any

import pytest

from pipeline.evaluate.claims import decide_claims
from tests.evaluate.planted import PAIR, make_evidence, make_facts, pick


def spread(name: str, value: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def split(sae: str, *ratio: float | None) -> dict[str, Any]:
    value, low, high = ratio
    return {"sae": sae, "documents": 9, **spread("ratio_by_document", value or 0.0, low, high)}


@pytest.mark.parametrize(
    ("ours", "theirs", "verdicts"),
    [
        ((1.4, 1.3, 1.5), (1.05, 1.0, 1.1), ("holds", "holds")),
        ((1.4, 1.3, 1.5), (1.35, 1.2, 1.5), ("holds", "not decided")),
        ((0.8, 0.7, 0.9), (1.1, 1.0, 1.2), ("does not hold", "does not hold")),
        ((1.1, 0.9, 1.3), (1.1, 1.0, 1.2), ("not decided", "not decided")),
        ((1.4, None, None), (1.05, 1.0, 1.1), ("not decided", "not decided")),
    ],
)
def test_the_gradient_by_tail(ours, theirs, verdicts):
    saes = PAIR | {"other": make_facts(beta=3e4, gradient="shuffled")}
    rows = [split("g", *ours), split("plain", *theirs), split("other", *theirs)]
    claims = decide_claims(make_evidence(saes, {}, tables={"splitting_summary": rows}))
    ids = ("splitting", "splitting_topk", "splitting_shuffled")
    found = [pick(claims, id) for id in ids]
    assert [claim.verdict for claim in found] == [*verdicts, verdicts[1]]
    assert found[0].value == pytest.approx(ours[0])
    assert found[1].value == found[2].value == pytest.approx(ours[0] / theirs[0])
    assert [bool(claim.paper) for claim in found] == [True, True, False]
    assert found[0].units.startswith("9 documents")


def test_the_gradient_by_tail_over_seeds():
    saes = {f"{name}{seed}": PAIR[name] | {"seed": seed} for name in PAIR for seed in (0, 1)}
    rows = [split("g0", 1.4, 1.2, 1.6), split("plain0", 1, 1, 1), split("plain1", 1, 1, 1)]
    for second, verdict in (((1.6, 1.2, 2.0), "holds"), ((0.9, 0.8, 1.0), "not decided")):
        table = [*rows, split("g1", *second)]
        claims = decide_claims(make_evidence(saes, {}, tables={"splitting_summary": table}))
        for claim in (pick(claims, id) for id in ("splitting", "splitting_topk")):
            assert claim.verdict == verdict
            assert claim.n_seeds == 2
            assert {claim.seeds_low, claim.seeds_high} == {1.4, second[0]}
            ends = [(1.4 + second[0]) / 2, (1.2 + second[1]) / 2, (1.6 + second[2]) / 2]
            assert [claim.value, claim.low, claim.high] == pytest.approx(ends)


def layer(at: int, value: float, direction: str = "difference") -> dict[str, Any]:
    ratios = (
        spread(f"ratio_to_{name}", value, value - 0.1, value + 0.1)
        for name in ("isotropic", "covariance")
    )
    first, second = ratios
    return {"layer": at, "direction": direction, "n_blocks": 40, **first, **second}


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.5, 0.5, 0.5, 1.3, 1.4, 1.5], "holds"),  # layers below 3 do not count
        ([1.5, 1.5, 1.5, 1.3, 1.05, 1.5], "holds"),
        ([1.5, 1.5, 1.5, 1.1, 1.05, 1.05], "not decided"),
        ([1.5, 1.5, 1.5, 1.9, 0.8, 1.6], "holds"),  # one against the others moves the mean alone
        ([1.5, 1.5, 1.5, 0.7, 0.8, 0.8], "does not hold"),
    ],
)
def test_sensitivity_is_decided_by_the_mean_over_layers(ratios, verdict):
    rows = [layer(i, value) for i, value in enumerate(ratios)]
    rows += [layer(i, 9.0, "isotropic") for i in range(6)]
    rows += [layer(i, 0.5, "other_difference") for i in range(6)]
    claims = decide_claims(make_evidence({}, {}, tables={"sensitivity": rows}))
    claim, other = (claim for claim in claims if claim.id == "sensitivity_covariance")
    assert (claim.verdict, other.verdict) == (verdict, "does not hold")
    mean = sum(ratios[3:]) / 3
    assert (claim.value, claim.low, claim.high) == pytest.approx((mean, mean - 0.1, mean + 0.1))
    n = sum(value > 1.1 for value in ratios[3:])
    assert f"higher in {n}, lower in" in claim.comparison
    assert " of 3 layers from 3 on" in claim.comparison
    assert claim.units == "40 blocks"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.6, 0.6, 0.6, 0.6], "holds"),
        ([0.6, 0.6, 0.6, -0.2], "holds"),
        ([-0.6, -0.6, 0.1, 0.2], "does not hold"),
        ([0.1, 0.1, -0.1, 0.0], "not decided"),
    ],
)
def test_perturbation_compares_paired_correlations(differences, verdict):
    rows = [{"n": 30, **spread("rho_difference", x, x - 0.1, x + 0.05)} for x in differences]
    rows.append({"n": 30, **spread("rho_difference", math.nan, None, None)})
    claim = pick(
        decide_claims(make_evidence({}, {}, tables={"perturbation": rows})), "perturbation"
    )
    assert claim.verdict == verdict
    assert claim.value == pytest.approx(sum(differences) / 4)
    assert " of 4 sites" in claim.comparison
