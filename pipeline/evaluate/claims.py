"""Which of the paper's claims hold here: each comparison with its interval, and a verdict.

A verdict is "holds" where the whole 95% interval, and every seed where several were trained, lies
on the claimed side; "does not hold" where they lie on the other; "not decided" otherwise, as where
there are too few units for an interval; "not measured" where what it compares is not there. Each
interval stands alone: of twenty comparisons without an effect, one is expected to be decided by
chance.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pipeline.evaluate.claims_of_tables import (
    decide_perturbation,
    decide_sensitivity,
    decide_splitting,
)
from pipeline.evaluate.comparisons import Key, Resampled, compare, compare_share, resample_all
from pipeline.evaluate.faithfulness import MODES
from pipeline.evaluate.pairs import Evidence, Pair, plan_pairs
from pipeline.evaluate.verdicts import Claim, Side, make_claim

_MODES = {"with_gradient": "with ∇ at inference", "without_gradient": "without ∇ at inference"}
_RIVALS = {
    "plain": "g-SAE against {}",
    "label": "g-SAE against {} given ∇ at inference",
    "shuffled": "g-SAE against one trained on shuffled gradients",
    "own": "g-SAE against one trained on the gradients of each token's own loss",
    "random": "g-SAE against random directions",
}
_FIGURES = {
    "loss_added": "loss added, a fraction of the model's loss",
    "nmse": "NMSE",
    "kl": "KL, nats per token",
    "dead": "the fraction of dead latents",
    "dead_held_out": "the fraction of latents that fire on no held-out row",
    "density": "the median firing frequency of live latents",
    "associated": "the associated tokens' gain in probability",
    "others": "the absolute change of all other tokens' probabilities, over that gain",
}
# Where there is too little text for the paper's definition, another that says so.
_INSTEAD = {"dead": "dead_held_out"}
_PAPER_DEAD = {  # Table 1, by L0: g-SAE and TopK
    3: (0.95, 0.98),
    5: (0.88, 0.92),
    10: (0.71, 0.81),
    32: (0.34, 0.43),
    64: (0.19, 0.26),
}


def _say_nothing(_: Pair) -> str:
    return ""


def _say_steering(_: Pair) -> str:
    return "over 5"


def _say_density(pair: Pair) -> str:
    return "0.56 (medians 0.24% and 0.43%)" if pair.spec.k == 32 else ""


def _say_dead(pair: Pair) -> str:
    found = _PAPER_DEAD.get(pair.spec.k)
    return f"−{found[1] - found[0]:.2f} ({found[0]} against {found[1]})" if found else ""


class Question(NamedTuple):
    """A claim about a figure of a g-SAE and a rival, before it is looked at."""

    id: str
    statement: str
    source: str
    rival: str  # as `plan_pairs` has it
    figure: str  # as `resample_all` has it
    modes: tuple[str, ...]  # one claim each; "" where a figure has no mode
    wanted: Side  # -1: ours is smaller
    as_ratio: bool = False
    paper: Callable[[Pair], str] = _say_nothing


_BEFORE_SHARE = (
    Question(
        "dead", "Fewer latents are dead", "Table 1", "plain", "dead", MODES, -1, False, _say_dead
    ),
    Question(
        "dead_shuffled",
        "Trained on real gradients, fewer latents are dead than on shuffled ones",
        "",
        "shuffled",
        "dead",
        MODES,
        -1,
    ),
    Question("loss_added", "Less loss is added", "Fig. 4", "plain", "loss_added", MODES, -1),
    Question(
        "shuffled",
        "Trained on real gradients, less loss is added than on shuffled ones",
        "",
        "shuffled",
        "loss_added",
        MODES,
        -1,
    ),
    Question(
        "own",
        "Gradients of all later losses lower loss added more than those of each token's own",
        "",
        "own",
        "loss_added",
        MODES,
        -1,
    ),
    Question(
        "label",
        "Loss added falls by more than the selection gains by seeing the label",
        "",
        "label",
        "loss_added",
        MODES[:1],
        -1,
    ),
)
_AFTER_SHARE = (
    Question("nmse", "NMSE is lower", "Fig. 4", "plain", "nmse", MODES, -1),
    Question("kl", "Predictions move less", "", "plain", "kl", MODES, -1),
    Question(
        "steering",
        "Latents steer the tokens that they stand for more strongly",
        "Figs. 5 and 6",
        "plain",
        "associated",
        ("",),
        1,
        True,
        _say_steering,
    ),
    Question(
        "steering_shuffled",
        "Trained on real gradients, latents steer more strongly than on shuffled ones",
        "",
        "shuffled",
        "associated",
        ("",),
        1,
        True,
    ),
    Question(
        "steering_random",
        "Latents steer their tokens more strongly than random directions steer theirs",
        "",
        "random",
        "associated",
        ("",),
        1,
        True,
    ),
    Question(
        "steering_others",
        "Steering moves all other tokens less, for as much gain on those that a latent stands for "
        "(the paper sums signed changes instead, exactly the negative of that gain)",
        "Figs. 5 and 6",
        "plain",
        "others",
        ("",),
        -1,
        True,
    ),
    Question(
        "density",
        "Latents fire more rarely",
        "Fig. 8 top",
        "plain",
        "density",
        MODES,
        -1,
        True,
        _say_density,
    ),
    Question(
        "density_shuffled",
        "Trained on real gradients, latents fire more rarely than on shuffled ones",
        "",
        "shuffled",
        "density",
        MODES,
        -1,
        True,
    ),
)


def decide_claims(evidence: Evidence) -> list[Claim]:
    """Every claim, once for each pair of SAEs and mode that it speaks of; pure.

    Intervals are 95%, over documents, paired (losses, NMSE, KL), over latents (dead, density,
    steering), or those of the tables (Table 2, Figs. 2 and 3). With several seeds they are of the
    mean over seeds, and the range over seeds stands beside them. The paper's values are GPT-2
    small's at layer 7, given where kind, k and mode are those that it printed.
    """
    resampled = resample_all(evidence)
    return [
        *(claim for question in _BEFORE_SHARE for claim in _ask(question, evidence, resampled)),
        *_decide_share(evidence, resampled),
        *(claim for question in _AFTER_SHARE for claim in _ask(question, evidence, resampled)),
        *decide_splitting(evidence),
        *decide_sensitivity(evidence.tables.get("sensitivity", ())),
        *decide_perturbation(evidence.tables.get("perturbation", ())),
    ]


def _ask(question: Question, evidence: Evidence, resampled: Mapping[Key, Resampled]) -> list[Claim]:
    instead, found = _INSTEAD.get(question.figure), {figure for figure, _, _ in resampled}
    if instead in found and question.figure not in found:
        question = question._replace(figure=instead, paper=_say_nothing)
    pairs = plan_pairs(evidence, question.rival)
    asked = [(pair, mode) for pair in pairs for mode in question.modes]
    claims = [_answer(question, pair, mode, resampled) for pair, mode in asked]
    measured = [claim for claim in claims if claim.verdict != "not measured"]
    return measured or [_answer(question, None, "", resampled)]


def _answer(
    question: Question, pair: Pair | None, mode: str, resampled: Mapping[Key, Resampled]
) -> Claim:
    seeds = zip(pair.ours, pair.theirs, strict=True) if pair else ()
    keys = [[(question.figure, name, mode) for name in seed] for seed in seeds]
    found = [[resampled[key] for key in seed] for seed in keys if {*seed} <= resampled.keys()]
    ours, theirs = ([seed[side].draws for seed in found] for side in (0, 1))
    printed = pair is not None and pair.spec.architecture == "topk" and mode != MODES[1]
    return make_claim(
        question.id,
        question.statement,
        question.source,
        comparison=_describe(question.rival, pair, mode),
        measure=_FIGURES[question.figure],
        compared=compare(ours, theirs, as_ratio=question.as_ratio) if found else None,
        wanted=question.wanted,
        units=_count_units(found[0]) if found else "",
        paper=question.paper(pair) if pair and printed else "",
        sees_label=mode == MODES[0],
    )


def _describe(rival: str, pair: Pair | None, mode: str = "") -> str:
    """What is compared with what, at which sizes, in which mode."""
    words = _RIVALS[rival].format(pair.spec.name if pair else "TopK")
    return "; ".join(filter(None, [words, pair.spec.describe() if pair else "", _MODES.get(mode)]))


def _count_units(resampled: Sequence[Resampled]) -> str:
    return " and ".join(dict.fromkeys(one.units for one in resampled))


def _decide_share(evidence: Evidence, resampled: Mapping[Key, Resampled]) -> list[Claim]:
    """How much of the g-SAE's gain with the gradient its rival has too, given it at inference
    alone.

        share = (TopK - TopK given ∇) / (TopK - g-SAE with ∇)        of loss added

    Against one half; without a value where that gain is not decided itself.
    """

    def claim(pair: Pair | None) -> Claim:
        arms = ()
        if pair:
            plain = [evidence.controls[name]["of"] for name in pair.theirs]
            arms = tuple(
                [resampled["loss_added", name, MODES[0]] for name in names]
                for names in (plain, pair.theirs, pair.ours)
            )
        return make_claim(
            "label_share",
            "Most of the gain with ∇ is not the selection seeing the label",
            "",
            comparison=_describe("label", pair),
            measure="the fall of loss added",
            compared=compare_share(*([one.draws for one in arm] for arm in arms)) if arms else None,
            wanted=-1,
            units=_count_units([arm[0] for arm in arms]),
            sees_label=True,
        )

    claims = [claim(pair) for pair in plan_pairs(evidence, "label")]
    return [
        one if one.value is not None else one._replace(verdict="not decided") for one in claims
    ] or [claim(None)]
