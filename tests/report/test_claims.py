"""The summary: how claims are counted and told."""

from pipeline.report.exhibits.claims import SYMBOLS, count_claims, count_comparisons, show_claims
from tests.report.evidence import CLAIMS, make_claim


def show(*rows):
    claims = show_claims({"claims": rows})
    assert claims
    return claims


def test_claims_are_counted():
    holds, fails, open_ = "holds", "does not hold", "not decided"
    groups = [[holds], [holds, holds], [holds, open_], [fails], [open_, open_], [open_, fails], []]
    assert count_claims(groups) == (
        "Of 7 claims 2 hold, 1 does not hold, 2 differ between comparisons, 1 is not decided and 1 "
        "is not measured"
    )
    assert count_claims([[holds]]) == (
        "Of 1 claims 1 holds, 0 do not hold, 0 differ between comparisons and 0 are not decided"
    )


def test_comparisons_are_counted():
    assert count_comparisons(CLAIMS) == (
        "Of 5 comparisons 3 hold (2 by seeing the label), 1 does not hold, 1 is not decided."
    )
    assert count_comparisons([{"verdict": "not measured"}]) == (
        "Of 0 comparisons 0 hold, 0 do not hold, 0 are not decided."
    )


def test_comparisons_of_one_claim_stand_together():
    claims = show(*CLAIMS).claims
    told = [(len(c.comparisons), c.verdict.words, c.verdict.symbol, c.verdict.kind) for c in claims]
    assert told == [
        (2, "holds", "✓", "holds"),
        (2, "holds in 1 of 2", "±", "mixed"),
        (1, "not measured", "·", "not-measured"),
        (1, "does not hold", "✗", "does-not-hold"),
    ]
    assert claims[0].measure == "difference of the fraction of dead latents"
    assert len({*SYMBOLS.values(), "±"}) == 5  # told apart without colour


def test_a_claim_that_fails_in_part_says_so():
    rows = [make_claim("a", "a", verdict) for verdict in ("not decided", "does not hold")]
    assert show(*rows).claims[0].verdict.words == "fails in 1 of 2"


def test_numbers_of_a_comparison_have_the_same_decimals():
    (dead, _), (added, undecided), (missing,), (steering,) = (
        claim.comparisons for claim in show(*CLAIMS).claims
    )
    assert (dead.value, dead.interval, dead.seeds) == ("−0.0413", "−0.0592 to −0.0231", "")
    assert (dead.paper, dead.sees_label) == ("−0.09 (0.34 against 0.43)", True)
    assert added.seeds == "−0.0241 to −0.0193"  # of three
    assert (undecided.value, undecided.interval) == ("0.00061", "−0.00090 to 0.00210")
    assert (missing.value, missing.interval, missing.paper) == ("–", "", "–")
    assert steering.value == "0.910"


def test_measures_that_differ_stand_beside_the_comparison():
    rows = [make_claim("a", "a", "holds", (1.0, 1.0, 2.0), measure=m) for m in ("one", "two")]
    (claim,) = show(*rows).claims
    assert claim.measure == ""
    assert [c.words for c in claim.comparisons] == [
        "g-SAE against TopK; one",
        "g-SAE against TopK; two",
    ]


def test_what_is_missing_or_not_finite_is_a_dash():
    row = make_claim("a", "a", "not measured", (float("nan"), None, float("inf")), paper=None)
    (comparison,) = show(row).claims[0].comparisons
    assert (comparison.value, comparison.interval, comparison.paper) == ("–", "", "–")
    assert show_claims({}) is None
    assert show_claims({"claims": []}) is None


def test_an_undecided_claim_without_a_value_says_why():
    rows = [make_claim("label_share", "a", v) for v in ("not decided", "not measured")]
    assert [c.value for c in show(*rows).claims[0].comparisons] == ["no gain to share", "–"]
    (with_value,) = show(rows[0] | {"value": 0.25}).claims[0].comparisons
    assert with_value.value == "0.250"


def test_many_comparisons_are_folded():
    assert show(*CLAIMS).unfolded
    assert not show(*CLAIMS * 10).unfolded
