"""Verdicts on planted figures: what was put there is found, and what was not is not."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.evaluate.activity import Activity
from pipeline.evaluate.claims import decide_claims
from pipeline.evaluate.faithfulness import MODES, Sums
from pipeline.evaluate.pairs import Evidence, plan_pairs
from pipeline.evaluate.steering import RANDOM
from tests.evaluate.planted import (
    DRAWS,
    N_BLOCKS,
    PAIR,
    WITH,
    WITHOUT,
    make_evidence,
    make_facts,
    make_sums,
    pick,
)


def test_nothing_measured_says_so_of_every_claim():
    claims = decide_claims(Evidence({}, {}, {}, {}, {}, alpha=1.0, draws=DRAWS))
    assert [claim.id for claim in claims] == [
        "dead",
        "dead_shuffled",
        "loss_added",
        "shuffled",
        "own",
        "label",
        "label_share",
        "nmse",
        "kl",
        "steering",
        "steering_shuffled",
        "steering_random",
        "steering_others",
        "density",
        "density_shuffled",
        "splitting",
        "splitting_topk",
        "splitting_shuffled",
        "sensitivity_isotropic",
        "sensitivity_isotropic",
        "sensitivity_covariance",
        "sensitivity_covariance",
        "perturbation",
    ]
    assert {claim.verdict for claim in claims} == {"not measured"}
    assert all(claim.statement and claim.comparison and claim.value is None for claim in claims)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (make_sums(0.05), "holds"),
        (make_sums(0.15), "does not hold"),
        (make_sums(0.10, noise=0.05), "not decided"),
    ],
)
@pytest.mark.parametrize("id", ["loss_added", "nmse", "kl"])
def test_a_planted_difference_is_decided(id, ours, verdict):
    claims = decide_claims(make_evidence(PAIR, {"g": ours, "plain": make_sums(0.10, noise=0.01)}))
    for mode in MODES:
        claim = pick(claims, id, mode)
        assert claim.verdict == verdict
        assert claim.value is not None
        assert claim.low < claim.value < claim.high
        assert claim.sees_label == (mode == WITH)
        assert claim.measure.startswith("difference of")
        assert (claim.n_seeds, claim.seeds_low) == (1, claim.value)


def test_modes_are_decided_apart():
    added = {("g", WITH): 0.02, ("g", WITHOUT): 0.13, "plain": 0.10}
    claims = decide_claims(make_evidence(PAIR, added))
    verdicts = [pick(claims, "loss_added", mode).verdict for mode in MODES]
    assert verdicts == ["holds", "does not hold"]
    assert pick(claims, "loss_added", WITH).value == pytest.approx(-0.08)


def test_every_seed_has_to_agree_with_the_interval():
    saes = {
        f"{name}{seed}": PAIR[name] | {"seed": seed} for name in ("g", "plain") for seed in (0, 1)
    }
    added = {"g0": 0.02, "plain0": 0.10, "plain1": 0.10}
    (agree, differ) = (
        pick(decide_claims(make_evidence(saes, added | {"g1": g1})), "loss_added", WITH)
        for g1 in (0.06, 0.11)
    )
    assert (agree.verdict, differ.verdict) == ("holds", "not decided")
    assert agree.value == pytest.approx(-0.06)
    assert (agree.seeds_low, agree.seeds_high) == pytest.approx((-0.08, -0.04))
    assert agree.n_seeds == 2
    assert differ.high < 0  # so it is the seed that leaves it open


def test_pairs_agree_in_all_but_the_gradient():
    saes = {
        "g": make_facts(beta=3e4),
        "other k": make_facts(k=16),
        "other size": make_facts(d_sae=128),
        "other kind": make_facts(architecture="batch_topk"),
        "other seed": make_facts(seed=1),
        "end to end": make_facts(architecture="end_to_end"),
        "shuffled": make_facts(beta=3e4, gradient="shuffled"),
        "own": make_facts(beta=3e4, gradient="own"),
        "other beta": make_facts(beta=1e4, gradient="own"),
    }
    evidence = make_evidence(saes, {})
    assert plan_pairs(evidence, "plain") == []
    assert [pair.theirs for pair in plan_pairs(evidence, "shuffled")] == [("shuffled",)]
    assert [pair.theirs for pair in plan_pairs(evidence, "own")] == [("own",)]
    with_plain = make_evidence(saes | {"plain": make_facts()}, {})
    ((_, ours, theirs),) = plan_pairs(with_plain, "plain")
    assert (ours, theirs) == (("g",), ("plain",))


@pytest.mark.parametrize("rival", ["shuffled", "own"])
@pytest.mark.parametrize(("added", "verdict"), [(0.2, "holds"), (0.01, "does not hold")])
def test_other_gradients_in_training_are_rivals(rival, added, verdict):
    saes = PAIR | {"other": make_facts(beta=3e4, gradient=rival)}
    claims = decide_claims(make_evidence(saes, {"g": 0.05, "plain": 0.10, "other": added}))
    assert pick(claims, rival, WITHOUT).verdict == verdict
    other = {"shuffled": "own", "own": "shuffled"}[rival]
    assert pick(claims, other).verdict == "not measured"


@pytest.mark.parametrize(
    ("ours", "given", "share", "verdicts"),
    [
        (0.02, 0.08, 0.25, ("holds", "holds")),
        (0.02, 0.03, 0.875, ("holds", "does not hold")),
        (0.06, 0.04, 1.5, ("does not hold", "does not hold")),
        (0.12, 0.08, None, ("does not hold", "not decided")),  # there is no gain to divide
    ],
)
def test_how_much_is_the_selection_seeing_the_label(ours, given, share, verdicts):
    control = {"kind": "gradient at inference only", "of": "plain", "beta": 3e4}
    evidence = make_evidence(
        PAIR,
        {("g", WITH): ours, "plain": 0.10, ("steered", WITH): given},
        controls={"steered": control, "pca": {"kind": "PCA", "of": None, "beta": 0.0}},
    )
    claims = decide_claims(evidence)
    found = pick(claims, "label"), pick(claims, "label_share")
    assert tuple(claim.verdict for claim in found) == verdicts
    assert found[0].sees_label
    assert found[1].value == (share if share is None else pytest.approx(share))


def steer(name: str, associated: Tensor, alpha: float = 1.0) -> list[dict[str, Any]]:
    return [
        {
            "sae": name,
            "latent": i,
            "alpha": alpha,
            "associated": value,
            "others_absolute": 2 - value,
        }
        for i, value in enumerate(associated.tolist())
    ]


def test_steering_is_a_ratio_at_one_length():
    effect = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.1
    saes = PAIR | {"shuffled": make_facts(beta=3e4, gradient="shuffled")}
    rows = [
        *steer("g", 3 * effect),
        *steer("plain", effect),
        *steer("shuffled", 3 * effect.flip(0)),
        *steer("g", -effect, alpha=2.0),
        *steer(RANDOM, 9 * effect),
    ]
    claims = decide_claims(make_evidence(saes, {}, tables={"steering_latents": rows}))
    ids = ("steering", "steering_shuffled", "steering_random", "steering_others")
    steering, shuffled, random, others = (pick(claims, id) for id in ids)
    assert steering.value == pytest.approx(3)
    assert steering.low < 3 < steering.high
    assert steering.measure.startswith("ratio of")
    assert (steering.paper, steering.units) == ("over 5", "50 latents")
    assert not steering.sees_label
    assert random.value == pytest.approx(1 / 3)
    verdicts = [claim.verdict for claim in (steering, shuffled, random, others)]
    assert verdicts == ["holds", "not decided", "does not hold", "holds"]
    mean = effect.mean().item()
    assert others.value == pytest.approx((2 - 3 * mean) / (3 * mean) / ((2 - mean) / mean))
    assert "exactly the negative" in others.statement
    assert others.paper == ""
    longer = decide_claims(make_evidence(PAIR, {}, tables={"steering_latents": rows}, alpha=2.0))
    assert pick(longer, "steering").verdict == "not measured"  # of TopK


def test_what_no_gain_spills_over_is_not_measured():
    rows = [*steer("g", -torch.ones(20)), *steer("plain", torch.ones(20))]
    claims = decide_claims(make_evidence(PAIR, {}, tables={"steering_latents": rows}))
    assert pick(claims, "steering_others").verdict == "not measured"
    sometimes = torch.linspace(-1, 1.2, 20)
    rows = [*steer("g", sometimes), *steer("plain", torch.ones(20))]
    claims = decide_claims(make_evidence(PAIR, {}, tables={"steering_latents": rows}))
    claim = pick(claims, "steering_others")
    assert (claim.verdict, claim.low) == ("not decided", None)
    assert claim.value == pytest.approx((2 - 0.1) / 0.1, rel=1e-5)


def make_activity(frequencies: Tensor, n_rows: int = 1000) -> Activity:
    activity = Activity(len(frequencies))
    fires = torch.arange(n_rows)[:, None] < frequencies * n_rows
    activity.add(*fires.nonzero(as_tuple=True), n_rows=n_rows)
    return activity


def test_dead_latents_and_density_come_from_the_firings():
    sparse = make_activity(torch.cat([torch.zeros(40), torch.linspace(0.01, 0.1, 160)]))
    dense = make_activity(torch.cat([torch.zeros(120), torch.linspace(0.1, 0.5, 80)]))
    activities = {
        "g": dict.fromkeys(MODES, sparse),
        "plain": dict.fromkeys(MODES, dense),
    }
    claims = decide_claims(make_evidence(PAIR, {}, activities=activities))
    dead, density = (pick(claims, id, WITH) for id in ("dead", "density"))
    assert dead.value == pytest.approx(0.2 - 0.6)
    assert dead.measure == "difference of the fraction of latents that fire on no held-out row"
    assert (dead.paper, dead.units) == ("", "200 latents")
    assert density.value == pytest.approx(0.055 / 0.3, rel=0.02)
    assert density.paper.startswith("0.56")
    assert pick(claims, "density", WITHOUT).paper == ""
    assert (dead.verdict, density.verdict) == ("holds", "holds")
    # Two samples of 200 latents, as the normal approximation has it.
    error = 1.96 * math.sqrt((0.2 * 0.8 + 0.6 * 0.4) / 200)
    assert dead.high - dead.low == pytest.approx(2 * error, rel=0.2)
    swapped = {"g": activities["plain"], "plain": activities["g"]}
    claims = decide_claims(make_evidence(PAIR, {}, activities=swapped))
    assert pick(claims, "dead", WITH).verdict == "does not hold"


def test_dead_as_the_paper_has_it_where_there_is_text_enough(monkeypatch):
    monkeypatch.setattr("pipeline.evaluate.activity.DEAD_WINDOW_ROWS", 1000)
    frequencies = torch.linspace(0.01, 0.5, 50)
    activities = {"g": dict.fromkeys(MODES, make_activity(frequencies))}
    activities["plain"] = dict.fromkeys(MODES, make_activity(frequencies.clamp(min=0.2) - 0.2))
    claims = decide_claims(make_evidence(PAIR, {}, activities=activities))
    claim = pick(claims, "dead", WITH)
    assert claim.measure == "difference of the fraction of dead latents"
    assert claim.paper == "−0.09 (0.34 against 0.43)"
    assert pick(claims, "dead", WITHOUT).paper == ""
    for changes in ({"k": 8}, {"architecture": "batch_topk"}):
        saes = {name: facts | changes for name, facts in PAIR.items()}
        claims = decide_claims(make_evidence(saes, {}, activities=activities))
        assert pick(claims, "dead", WITH).paper == pick(claims, "density", WITH).paper == ""
    assert "against batch topk" in pick(claims, "dead", WITH).comparison


def test_latents_that_never_fire_have_no_density():
    activities = {
        "g": dict.fromkeys(MODES, make_activity(torch.zeros(20))),
        "plain": dict.fromkeys(MODES, make_activity(torch.full((20,), 0.1))),
    }
    claim = pick(decide_claims(make_evidence(PAIR, {}, activities=activities)), "density")
    assert (claim.verdict, claim.value, claim.low) == ("not measured", None, None)
    assert Activity(4).l0 is None


def test_blocks_of_a_document_are_not_independent():
    """Noise that documents share: over blocks nearly everything is decided, over documents it is
    wrong about as often as 5% intervals are.
    """
    documents = torch.arange(12).repeat_interleave(30)
    by_block = by_document = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        noise = 0.1 * torch.randn(12, generator=generator).double()[documents]
        rows = torch.full((360,), 100.0).double()
        ours, theirs = (
            Sums(rows, rows, rows, rows * (2 + own), rows, rows, rows, rows)
            for own in (noise, torch.zeros(360).double())
        )
        evidence = make_evidence(PAIR, {"g": ours, "plain": theirs})
        together = evidence._replace(documents=documents)
        (alone, whole) = (
            pick(decide_claims(each), "loss_added", WITH) for each in (evidence, together)
        )
        assert alone.value == pytest.approx(whole.value)
        assert whole.high - whole.low > 3 * (alone.high - alone.low)
        assert (alone.units, whole.units) == ("360 documents", "12 documents")
        by_block += alone.verdict != "not decided"
        by_document += whole.verdict != "not decided"
    assert by_block > 20
    assert by_document < 8


@pytest.mark.parametrize("n", [1, 7, 8])
def test_few_documents_decide_nothing(n):
    documents = torch.arange(N_BLOCKS) % n
    evidence = make_evidence(PAIR, {"g": 0.05, "plain": 0.10}, documents=documents)
    claim = pick(decide_claims(evidence), "loss_added", WITH)
    assert claim.value == pytest.approx(-0.05)
    assert claim.verdict == ("holds" if n >= 8 else "not decided")
    assert (claim.low is None) == (claim.high is None) == (n < 8)
    assert claim.units == f"{n} documents"


def test_weights_of_other_losses_are_other_saes():
    saes = {
        "plain": make_facts(loss_tokens=255),
        "g": make_facts(beta=3e4, loss_tokens=255),
        "h": make_facts(beta=3e4, loss_tokens=8160),
    }
    controls = {
        name: {"of": "plain", "beta": 3e4, "loss_tokens": n}
        for name, n in (("short", 255), ("long", 8160))
    }
    evidence = make_evidence(saes, {}, controls=controls)
    assert [(pair.ours, pair.theirs) for pair in plan_pairs(evidence, "plain")] == [
        (("g",), ("plain",)),
        (("h",), ("plain",)),
    ]
    assert [pair.theirs for pair in plan_pairs(evidence, "label")] == [("short",), ("long",)]
    assert len({pair.spec.describe() for pair in plan_pairs(evidence, "plain")}) == 2


def test_claims_are_rows_of_a_table():
    claims = decide_claims(make_evidence(PAIR, {"g": 0.05, "plain": 0.10}))
    for claim in claims:
        assert json.loads(json.dumps(claim._asdict(), allow_nan=False)) == claim._asdict()
