"""All of a member that a step reads and changes, as named tensors, for checkpoints."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.checkpoint import Checkpoint
from pipeline.config import TrainConfig
from pipeline.member import Member, MemberSpec, make_sae
from pipeline.sae import start_learning
from pipeline.sae.group import ALONE, Group


def collect_state(members: Iterable[Member]) -> dict[str, Tensor]:
    """Weights, buffers, Adam's moments, idle tokens and moving averages of all members.

    Their names begin with the member's: k32-beta0/weights/W_enc. They are not copies.
    """
    state = {}
    for member in members:
        name, learner = member.spec.name, member.learner
        for key, tensor in learner.sae.state_dict().items():
            state[f"{name}/weights/{key}"] = tensor
        for index, moments in learner.optimizer.state_dict()["state"].items():
            state |= {f"{name}/adam/{index}/{key}": tensor for key, tensor in moments.items()}
        for index, tensor in enumerate(learner.average or ()):
            state[f"{name}/average/{index}"] = tensor
        state[f"{name}/idle_tokens"] = learner.idle_tokens
    return state


def find_not_finite(members: Iterable[Member]) -> dict[str, str]:
    """Of members whose state holds NaN or Inf, the name of a tensor that does.

    After a finite loss it may, where a gradient was not finite.
    """
    found = {}
    for member in members:
        for key, tensor in collect_state([member]).items():
            if not tensor.isfinite().all():
                found[member.spec.name] = key
                break
    return found


def list_lost(members: Iterable[Member], step: int) -> dict[str, str]:
    """Why members stop whose weights are not finite, though their losses were; by name. Pure."""
    return {
        name: f"{tensor} after step {step}: expected finite values, got NaN or Inf"
        for name, tensor in find_not_finite(members).items()
    }


def resume_members(
    specs: Sequence[MemberSpec],
    config: TrainConfig,
    saved: Checkpoint,
    d_model: int,
    device: str | torch.device,
    *,
    n_tokens: int | None = None,
    group: Group = ALONE,
) -> list[Member]:
    """The members that a checkpoint has, as they were, and torch's random state; none at step 0."""
    if saved.step == 0:
        return []
    torch.set_rng_state(saved.tensors["rng"])
    return [
        resume_member(spec, config, saved.tensors, d_model, device, n_tokens=n_tokens, group=group)
        for spec in specs
        if spec.name not in saved.failed
    ]


@torch.no_grad()
def resume_member(
    spec: MemberSpec,
    config: TrainConfig,
    state: Mapping[str, Tensor],
    d_model: int,
    device: str | torch.device,
    *,
    n_tokens: int | None = None,
    group: Group = ALONE,
) -> Member:
    """The member whose state `collect_state` gave, in memory of its own."""
    sae = make_sae(spec, config, d_model, device, n_tokens=n_tokens, group=group)
    learner = start_learning(sae, average=config.average_decay is not None)
    sae.load_state_dict(_below(f"{spec.name}/weights/", state))
    learner.idle_tokens.copy_(state[f"{spec.name}/idle_tokens"])
    for index, average in enumerate(learner.average or ()):
        average.copy_(state[f"{spec.name}/average/{index}"])
    # Copies: the optimizer takes tensors as they are, and how one lies in memory may decide how a
    # step goes through it.
    stepped = [p for group in learner.optimizer.param_groups for p in group["params"]]
    moments = {
        index: {
            key: torch.empty_like(parameter if saved.ndim else saved).copy_(saved)
            for key, saved in _below(f"{spec.name}/adam/{index}/", state).items()
        }
        for index, parameter in enumerate(stepped)
    }
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return Member(spec, learner)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
