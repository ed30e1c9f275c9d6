"""Which of the paper's claims hold here: each comparison with its interval, and a verdict.

A verdict is "holds" where the whole 95% interval, and every seed where several were trained, lies
on the claimed side; "does not hold" where they lie on the other; "not decided" otherwise; "not
measured" where what it compares is not there. Each interval stands alone: of twenty comparisons
without an effect, one is expected to be decided by chance.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from pipeline.evaluate.claims_of_tables import (
    decide_perturbation,
    decide_sensitivity,
    decide_splitting,
)
from pipeline.evaluate.comparisons import (
    Evidence,
    Key,
    Pair,
    compare,
    compare_share,
    plan_pairs,
    resample_all,
)
from pipeline.evaluate.faithfulness import MODES
from pipeline.evaluate.verdicts import Claim, Side, make_claim

_MODES = {"with_gradient": "with ∇ at inference", "without_gradient": "without ∇ at inference"}
_RIVALS = {
    "plain": "g-SAE against TopK",
    "label": "g-SAE against TopK given ∇ at inference",
    "shuffled": "g-SAE against one trained on shuffled gradients",
    "own": "g-SAE against one trained on the gradients of each token's own loss",
}
_FIGURES = {
    "loss_added": "loss added, a fraction of the model's loss",
    "nmse": "NMSE",
    "kl": "KL, nats per token",
    "dead": "the fraction of dead latents",
    "density": "the median firing frequency of live latents",
    "associated": "the associated tokens' gain in probability",
    "others": "the absolute change of all other tokens' probabilities",
}
_PAPER_DEAD = {  # Table 1, by L0: g-SAE and TopK
    3: (0.95, 0.98),
    5: (0.88, 0.92),
    10: (0.71, 0.81),
    32: (0.34, 0.43),
    64: (0.19, 0.26),
}


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
    paper: Callable[[Pair], str] = lambda _: ""


def _say(words: str) -> Callable[[Pair], str]:
    return lambda _: words


def _say_dead(pair: Pair) -> str:
    found = _PAPER_DEAD.get(pair.spec.k)
    return f"−{found[1] - found[0]:.2f} ({found[0]} against {found[1]})" if found else ""


_BEFORE_SHARE = (
    Question(
        "dead", "Fewer latents are dead", "Table 1", "plain", "dead", MODES, -1, False, _say_dead
    ),
    Question("loss_added", "Less loss is added", "Fig. 4", "plain", "loss_added", MODES, -1),
    Question(
        "shuffled",
        "What the gradients say in training lowers loss added",
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
        _say("over 5"),
    ),
    Question(
        "steering_others",
        "Steering moves all other tokens less",
        "Figs. 5 and 6",
        "plain",
        "others",
        ("",),
        -1,
        True,
        _say("below 1"),
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
        _say("0.56 (medians 0.24% and 0.43%)"),
    ),
)


def decide_claims(evidence: Evidence) -> list[Claim]:
    """Every claim, once for each pair of SAEs and mode that it speaks of; pure.

    Intervals are 95%, over blocks of text, paired (losses, NMSE, KL), over latents (dead, density,
    steering), or those of the tables (Table 2, Figs. 2 and 3). With several seeds they are of the
    mean over seeds, and the range over seeds stands beside them. The paper's values, given
    whatever the setting, are GPT-2 small's at layer 7.
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


def _ask(question: Question, evidence: Evidence, resampled: Mapping[Key, Tensor]) -> list[Claim]:
    pairs = plan_pairs(evidence, question.rival)
    asked = [(pair, mode) for pair in pairs for mode in question.modes]
    claims = [_answer(question, pair, mode, resampled) for pair, mode in asked]
    measured = [claim for claim in claims if claim.verdict != "not measured"]
    return measured or [_answer(question, None, "", resampled)]


def _answer(
    question: Question, pair: Pair | None, mode: str, resampled: Mapping[Key, Tensor]
) -> Claim:
    seeds = zip(pair.ours, pair.theirs, strict=True) if pair else ()
    keys = [[(question.figure, name, mode) for name in seed] for seed in seeds]
    found = [[resampled[key] for key in seed] for seed in keys if {*seed} <= resampled.keys()]
    ours, theirs = ([seed[side] for seed in found] for side in (0, 1))
    words = [_RIVALS[question.rival], pair.spec.describe() if pair else "", _MODES.get(mode, "")]
    return make_claim(
        question.id,
        question.statement,
        question.source,
        comparison="; ".join(filter(None, words)),
        measure=_FIGURES[question.figure],
        compared=compare(ours, theirs, as_ratio=question.as_ratio) if found else None,
        wanted=question.wanted,
        paper=question.paper(pair) if pair else "",
        sees_label=mode == MODES[0],
    )


def _decide_share(evidence: Evidence, resampled: Mapping[Key, Tensor]) -> list[Claim]:
    """How much of the g-SAE's gain with the gradient TopK has too, given it at inference alone.

        share = (TopK - TopK given ∇) / (TopK - g-SAE with ∇)        of loss added

    Against one half; without a value where that gain is not decided itself.
    """
    head = ("label_share", "Most of the gain with ∇ is not the selection seeing the label", "")
    claims = []
    for pair in plan_pairs(evidence, "label"):
        plain = [evidence.controls[name]["of"] for name in pair.theirs]
        arms = (
            [resampled["loss_added", name, MODES[0]] for name in names]
            for names in (plain, pair.theirs, pair.ours)
        )
        claim = make_claim(
            *head,
            comparison=f"{_RIVALS['label']}, both against TopK; {pair.spec.describe()}",
            measure="the fall of loss added",
            compared=compare_share(*arms),
            wanted=-1,
            sees_label=True,
        )
        claims.append(claim if claim.value is not None else claim._replace(verdict="not decided"))
    return claims or [
        make_claim(
            *head,
            comparison=_RIVALS["label"],
            measure="the fall of loss added",
            compared=None,
            wanted=-1,
        )
    ]
