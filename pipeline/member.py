"""One SAE of the grid: its name, how the configuration starts it and steps it, and its state."""

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.device import pick_precision
from pipeline.errors import TrainError
from pipeline.paths import format_number
from pipeline.sae import (
    ARCHITECTURES,
    Learner,
    SparseAutoencoder,
    StepMetrics,
    init_weights,
    start_learning,
    take_step,
)
from pipeline.sae.group import ALONE, Group
from pipeline.sae.learning import Objective

END_TO_END = "end_to_end"  # a TopK SAE, trained for another objective

# Settings that decide no weight of a member: the grid's lists, of which it is one combination; the
# lengths, of which its number of steps was made; and what is written on the way.
_NOT_OF_A_MEMBER = {
    *("hook", "architectures", "betas", "gradients", "ks", "d_saes", "seeds"),
    *("epochs", "tokens", "steps", "allow_partial"),
    *("log_every", "checkpoint_every", "loggers"),
}
_SHUFFLED = "shuffled"
_OPTION_SETTINGS = {"n_experts": "n_experts", "bandwidth": "jumprelu_bandwidth"}


class MemberSpec(NamedTuple):
    """One SAE of the grid."""

    name: str  # also its folder
    architecture: str
    k: int
    beta: float
    seed: int
    d_sae: int
    gradient: str  # which one steers: full, own, shuffled or own-shuffled; see `plan_members`

    @property
    def shuffled(self) -> bool:
        """Whether each row gets another row's gradient."""
        return self.gradient.endswith(_SHUFFLED)


class Member(NamedTuple):
    """One SAE in training."""

    spec: MemberSpec
    learner: Learner


def plan_members(config: TrainConfig, *, loss: str = "full") -> tuple[MemberSpec, ...]:
    """All combinations of architectures, d_saes, ks, betas, gradients and seeds.

    `loss` is what the store's gradients are of (`find_loss`): all losses of a block ("full") or
    each row's own ("own"). Names are k32-beta1e5; jumprelu-k32-beta0 if not topk, followed by
    -d1024 and -seed0 where there are several d_saes and seeds, and by -own, -shuffled or
    -own-shuffled if the gradient is not full.

    An architecture that selects nothing has one member for all betas. Where beta is 0, nothing is
    selected, or training is end to end, there is one member for all gradients.
    """
    members = []
    for architecture in config.architectures:
        betas = config.betas if _find_class(architecture).selects else (0.0,)
        for d_sae, k, beta in product(config.d_saes, config.ks, betas):
            steered = beta > 0 and architecture != END_TO_END
            for kind, seed in product(config.gradients if steered else ("cached",), config.seeds):
                gradient = _name_gradient(loss, kind)
                name = "".join(
                    [
                        "" if architecture == "topk" else f"{architecture}-",
                        f"k{k}-beta{format_number(beta)}",
                        f"-d{d_sae}" if len(config.d_saes) > 1 else "",
                        f"-seed{seed}" if len(config.seeds) > 1 else "",
                        "" if gradient == "full" else f"-{gradient}",
                    ]
                )
                members.append(MemberSpec(name, architecture, k, beta, seed, d_sae, gradient))
    return tuple(members)


def find_loss(facts: Mapping[str, Any]) -> str:
    """Of which loss the store's gradients are, by what a run says of it: "full" or "own"."""
    return (facts.get("store_identity") or {}).get("loss", "full")


def plan_recipe(
    spec: MemberSpec,
    config: TrainConfig,
    *,
    n_steps: int,
    order: str | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """All that decides a member's weights; its config.json has the same keys under "training".

    `order` names the batches and their order. Of `provenance`, hook and store_fingerprint count.
    """
    cls = _find_class(spec.architecture)
    unused = {key for name, key in _OPTION_SETTINGS.items() if name not in cls.options}
    settings = config.model_dump(mode="json", exclude=_NOT_OF_A_MEMBER | unused)
    return settings | {
        "architecture": cls.architecture,
        "objective": END_TO_END if spec.architecture == END_TO_END else "reconstruction",
        "k": spec.k,
        "beta": spec.beta,
        "seed": spec.seed,
        "d_sae": spec.d_sae,
        "gradient": spec.gradient,
        "n_steps": n_steps,
        "order": order,
        "hook": provenance.get("hook"),
        "store_fingerprint": provenance.get("store_fingerprint"),
    }


def make_sae(
    spec: MemberSpec,
    config: TrainConfig,
    d_model: int,
    device: str | torch.device,
    *,
    n_tokens: int | None,
    group: Group,
) -> SparseAutoencoder:
    """A member's SAE, whose weights are still zero; a tokenized one needs `n_tokens`."""
    cls = _find_class(spec.architecture)
    if "n_tokens" in cls.options and n_tokens is None:
        raise TrainError(
            f"n_tokens of {spec.name}: expected the vocabulary's size, got none. Pass n_tokens=."
        )
    options = {"n_tokens": n_tokens} | {
        name: getattr(config, key) for name, key in _OPTION_SETTINGS.items()
    }
    sae = cls(
        d_model=d_model,
        d_sae=spec.d_sae,
        k=spec.k,
        beta=spec.beta,
        loss_tokens=config.loss_tokens,
        **{name: options[name] for name in cls.options},
    )
    sae.group = group
    if pick_precision(config.precision, device) == "bfloat16":
        sae.product_dtype = torch.bfloat16
    return sae.to(device)


def start_member(
    spec: MemberSpec,
    config: TrainConfig,
    acts: Float[Tensor, "batch d_model"],
    *,
    k: int | None = None,
    n_tokens: int | None = None,
    group: Group = ALONE,
) -> Member:
    """A fresh SAE and its optimizer, initialised from the first batch of all processes.

    `k` is that of the first step, to which what is steered is fitted; `n_tokens` the size of the
    vocabulary, for a tokenized SAE.
    """
    sae = make_sae(spec, config, acts.shape[1], acts.device, n_tokens=n_tokens, group=group)
    sae.k = spec.k if k is None else k
    init_weights(
        sae,
        group.gather(acts),
        seed=spec.seed,
        scale_input=config.input_scaling == "mean_norm",
        b_dec=config.b_dec_start,
    )
    return Member(spec, start_learning(sae, average=config.average_decay is not None))


def step_member(
    member: Member,
    acts: Float[Tensor, "batch d_model"],
    grads: Float[Tensor, "batch d_model"],
    tokens: Int[Tensor, " batch"] | None = None,
    *,
    config: TrainConfig,
    lr: float,
    k: int | None = None,
    objective: Objective | None = None,
    full: bool,
) -> StepMetrics:
    """Take one optimizer step as the configuration says, with `k` of this step; see `take_step`."""
    member.learner.sae.set_k(member.spec.k if k is None else k)
    return take_step(
        member.learner,
        acts,
        grads,
        tokens,
        lr=lr,
        decoder_norm=config.decoder_norm,
        aux_weight=config.aux_weight,
        aux_k=config.aux_k,
        max_grad_norm=config.max_grad_norm,
        average_decay=config.average_decay or 0.0,
        objective=objective,
        full=full,
    )


@torch.no_grad()
def finish_member(member: Member) -> SparseAutoencoder:
    """The SAE as it is saved: with its own k, and with the averages of its weights if it has any.

    Averages of unit decoder rows are a little shorter than 1 and are left so: what is
    reconstructed is what the averages reconstruct.

    Differs: averages start at the initial weights, without Adam's correction of that bias; and
    buffers (the input's scale, BatchTopK's threshold, a penalty's weight) are those of the last
    step, not averages.
    """
    sae, averages = member.learner.sae, member.learner.average
    sae.k = member.spec.k
    for parameter, average in zip(sae.parameters(), averages or (), strict=averages is not None):
        parameter.copy_(average)
    return sae


def _find_class(architecture: str) -> type[SparseAutoencoder]:
    return ARCHITECTURES["topk" if architecture == END_TO_END else architecture]


def _name_gradient(loss: str, kind: str) -> str:
    """What a member's config.json says of its gradient, for an entry of `train.gradients`."""
    if kind == _SHUFFLED:
        return _SHUFFLED if loss == "full" else f"{loss}-{_SHUFFLED}"
    return loss
