"""Which SAEs are compared with which."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from pipeline.evaluate.activity import Activity
from pipeline.evaluate.faithfulness import Sums
from pipeline.evaluate.steering import RANDOM
from pipeline.paths import format_number

Rows = Sequence[Mapping[str, Any]]
BySeed = dict[Any, str]  # names of SAEs, or of what stands for them


class Evidence(NamedTuple):
    """All that claims are decided from."""

    saes: Mapping[str, Mapping[str, Any]]  # metrics["saes"], with seed and gradient
    controls: Mapping[str, Mapping[str, Any]]  # metrics["controls"]
    sums: Mapping[tuple[str, str], Sums]  # by SAE or control, and mode
    activities: Mapping[str, Mapping[str, Activity]]  # by SAE and mode
    tables: Mapping[str, Rows]  # the other measurements', by name; those not made are not there
    alpha: float  # length at which steering is compared, as in the table
    draws: int  # resamplings
    documents: Int[Tensor, " blocks"] | None = None  # of each block of the sums; None: its own


class Spec(NamedTuple):
    """What SAEs of several seeds have in common."""

    architecture: str
    k: int
    d_sae: int
    beta: float
    loss_tokens: int  # 0 of beta 0
    gradient: str  # that it was trained with: full | shuffled | own; of beta 0: ""

    def describe(self) -> str:
        """What sets it apart from others of its kind: "k = 32, d_sae = 2048, β = 3e4 / 255"."""
        beta = format_number(self.beta) + (f" / {self.loss_tokens}" if self.loss_tokens else "")
        return f"k = {self.k}, d_sae = {self.d_sae}, β = {beta}"

    @property
    def name(self) -> str:
        """Its architecture, as it is written in words."""
        return "TopK" if self.architecture == "topk" else self.architecture.replace("_", " ")


class Pair(NamedTuple):
    """SAEs to compare, seed by seed."""

    spec: Spec  # of ours
    ours: tuple[str, ...]
    theirs: tuple[str, ...]  # one for each of ours, of the same seed


def plan_pairs(evidence: Evidence, rival: str) -> list[Pair]:
    """Each g-SAE (beta > 0, all later losses' gradient) with its rival of the same architecture, k
    and size.

    rival "plain" is trained with beta 0, "label" the same given the gradient at inference,
    "shuffled" and "own" with another gradient and the same beta; "random" are directions that no
    SAE has learned. Only seeds that both have count.
    """
    groups: dict[Spec, BySeed] = {}
    for name, facts in evidence.saes.items():
        groups.setdefault(_specify(facts), {})[facts.get("seed")] = name
    pairs = []
    for spec, ours in sorted(groups.items()):
        theirs = _find_rivals(rival, spec, groups, evidence)
        seeds = [seed for seed in ours if seed in theirs]
        if spec.gradient == "full" and seeds:
            names = (tuple(side[seed] for seed in seeds) for side in (ours, theirs))
            pairs.append(Pair(spec, *names))
    return pairs


def _find_rivals(
    rival: str, spec: Spec, groups: Mapping[Spec, BySeed], evidence: Evidence
) -> BySeed:
    if rival == "random":
        return dict.fromkeys(groups[spec], RANDOM)
    if rival in ("shuffled", "own"):
        return groups.get(spec._replace(gradient=rival), {})
    plain = groups.get(spec._replace(beta=0.0, loss_tokens=0, gradient=""), {})
    if rival == "plain":
        return plain
    steered = {
        (control["of"], control["beta"], control.get("loss_tokens") or 0): name
        for name, control in evidence.controls.items()
        if control["of"]
    }
    given = {seed: (name, spec.beta, spec.loss_tokens) for seed, name in plain.items()}
    return {seed: steered[key] for seed, key in given.items() if key in steered}


def _specify(facts: Mapping[str, Any]) -> Spec:
    beta = float(facts["beta"] or 0)
    gradient = (facts.get("gradient") or "full") if beta else ""
    loss_tokens = (facts.get("loss_tokens") or 0) if beta else 0
    return Spec(facts["architecture"], facts["k"], facts["d_sae"], beta, loss_tokens, gradient)
