"""Stage two: train the SAEs of a grid from one pass over cached activations.

    <out>/config.json     settings, steps, members, those that failed, and what the caller says
    <out>/summary.json    last metrics, by member
    <out>/<member>/       sae.safetensors, config.json, history.parquet
    <out>/live/<member>/  the same history as DVCLive writes it; other loggers have folders beside

Neither the language model nor the corpus is needed. A member's weights depend on its own settings
and the stream alone, never on which others train beside it, and on a CPU they are the same bit for
bit in every run, interrupted or not.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.checkpoint import Checkpoint, check_room, name_training, read_newest, write_checkpoint
from pipeline.config import TrainConfig
from pipeline.device import pick_precision
from pipeline.errors import TrainError
from pipeline.history import Row
from pipeline.loggers import open_loggers
from pipeline.member import (
    Member,
    MemberSpec,
    find_loss,
    plan_members,
    plan_recipe,
    start_member,
    step_member,
)
from pipeline.member_state import collect_state, list_lost, resume_members
from pipeline.rows import Rows, check_rows, shuffle_gradients, take
from pipeline.run_folder import locate_checkpoints, locate_work, open_run, write_run
from pipeline.sae import LossNotFinite, StepMetrics
from pipeline.sae.group import ALONE, Group
from pipeline.sae.learning import Objective
from pipeline.schedules import find_k, find_lr
from store.crash import crash_point
from store.identity import diff_identities
from store.stream_plan import StreamState

# Settings of which each member has one value, by another key.
_AXES = {"betas", "gradients", "ks", "d_saes", "seeds"}
_L0_MISS = 0.1  # of k: a steered L0 that is further off is told


class NoMemberLeft(TrainError):
    """All members failed."""

    def __init__(self, failed: Mapping[str, str], out: Path) -> None:
        super().__init__(
            f"{'; '.join(failed.values())}. No member is left, and nothing was written to {out}. "
            "Lower --lr, or set train.max_grad_norm."
        )
        self.failed = dict(failed)


class StepReport(NamedTuple):
    """Progress after one step of all members."""

    step: int  # from 1
    n_steps: int
    tokens: int  # rows trained on so far, by all processes
    lr: float
    tokens_per_s: float  # rows per second, all members together, since the last logged step
    logged: bool  # on logged steps the metrics hold overlap and gradient_weight
    metrics: dict[str, StepMetrics]  # by member


class _Inputs(NamedTuple):
    """A batch on the device, in float32."""

    acts: Tensor
    grads: Tensor
    tokens: Tensor
    objective: Objective | None


def train(
    config: TrainConfig,
    open_stream: Callable[[int], Iterable[Rows]],
    *,
    d_model: int,
    n_steps: int,
    out: Path,
    specs: Sequence[MemberSpec] | None = None,
    keep: Mapping[str, Path] | None = None,
    order: str | None = None,
    device: str | torch.device = "cpu",
    n_tokens: int | None = None,
    group: Group = ALONE,
    provenance: Mapping[str, Any] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    tell: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, StepMetrics]:
    """Train `specs` (default: the whole grid) on n_steps batches and write the run to `out`.

    open_stream(i) gives the batches from batch i on, and of them this process's rows. `order` names
    the batches; with it checkpoints are written, and an interrupted training with the same settings
    goes on from its last one, which `tell` is told where other versions of the code (`provenance`)
    wrote it. `keep` are finished members, by name, that become part of the run as they are.
    `n_tokens` is the vocabulary's size, for tokenized SAEs. Of the processes of `group`
    the first alone writes, logs and tells. `provenance` (hook, store, versions) goes into the
    configs as it is. Everything is written to a sibling of `out` that takes its place at the end,
    so that a run that fails leaves a former one as it was.

    Returns the last metrics of the members trained. One whose loss or weights are not finite stops
    alone: `tell` is told, and config.json lists it under "failed".

    Differs: smol-sae does not keep decoder rows at unit norm.

    Raises TrainError where all members failed, for a batch that is not finite or not d_model wide,
    too few batches, an `out` that is no run folder or not writable, and another training run into
    `out`; KeyboardInterrupt, after a checkpoint, once should_stop() is true after a step.
    """
    exact = pin_precision(config, device)
    leads, facts = group.rank == 0, dict(provenance or {})
    specs = plan_members(config, loss=find_loss(facts)) if specs is None else tuple(specs)
    tell = tell if tell and leads else _ignore
    recipes = {
        spec.name: plan_recipe(spec, exact, n_steps=n_steps, order=order, provenance=facts)
        for spec in specs
    }
    training = name_training({"recipes": recipes, "log_every": config.log_every})
    checkpoints = locate_checkpoints(out)
    settings = exact.model_dump(mode="json", exclude=_AXES)
    versions = facts.get("versions", {})

    with open_run(out) if leads else nullcontext(locate_work(out)) as work:
        saved = read_newest(checkpoints, training=training, tell=tell) if order else None
        saved = saved or Checkpoint(0, 0, StreamState(order or "", 0), {}, {}, {}, versions)
        step, tokens, failed, rows = saved.step, saved.tokens, saved.failed, saved.rows
        _check_same_step(group, step, checkpoints)
        members = resume_members(
            specs, exact, saved, d_model, device, n_tokens=n_tokens, group=group
        )
        for member in members:  # as their last step had it
            member.learner.sae.k = find_k(config, step - 1, n_steps, k=member.spec.k)
        if step:
            tell(f"going on after step {step} of {n_steps}, from the checkpoint in {checkpoints}")
        if saved.versions and (changed := diff_identities(saved.versions, versions)):
            tell(f"steps so far were of other versions than those to come: {'; '.join(changed)}")

        logs = open_loggers(config.loggers, work, run=out.name, settings=settings, past=rows)
        with logs if leads else nullcontext(_ignore) as log:
            tokens_at_log, time_at_log = tokens, time.perf_counter()
            batches = enumerate(take(open_stream(step), n_steps - step), start=step + 1)
            for step, batch in batches:
                check_rows(batch, d_model=d_model, step=step)
                inputs = _put_rows(batch, device)
                if not members:
                    members = [
                        start_member(
                            *(spec, exact, inputs.acts),
                            k=find_k(config, 0, n_steps, k=spec.k),
                            n_tokens=n_tokens,
                            group=group,
                        )
                        for spec in specs
                    ]
                tokens += int(group.sum(torch.tensor(len(inputs.acts))))
                logged = step == 1 or step % config.log_every == 0 or step == n_steps
                lr = find_lr(config, step - 1, n_steps)
                metrics, stopped = _step_members(
                    members, inputs, exact, step=step, n_steps=n_steps, lr=lr, full=logged
                )

                stopping = _anyone(group, should_stop) and step < n_steps
                saving = stopping or (step < n_steps and step % config.checkpoint_every == 0)
                if saving or step == n_steps:
                    stopped |= list_lost(members, step)
                for problem in stopped.values():
                    tell(f"{problem}; this member stops")
                failed |= stopped
                members = [member for member in members if member.spec.name not in failed]
                if not members:
                    raise NoMemberLeft(failed, out)
                if step == 1 and order and leads:  # Adam has its moments now
                    check_room(out.parent, collect_state(members))

                tokens_per_s = (tokens - tokens_at_log) / (time.perf_counter() - time_at_log)
                report = StepReport(step, n_steps, tokens, lr, tokens_per_s, logged, metrics)
                if logged:
                    tokens_at_log, time_at_log = tokens, time.perf_counter()
                    for name in metrics:
                        row = _describe(report, name)
                        rows.setdefault(name, []).append(row)
                        log(name, row)
                if on_step and leads:
                    on_step(report)
                crash_point("train:after-step")
                if saving and order and leads:
                    state = collect_state(members) | {"rng": torch.get_rng_state()}
                    place = StreamState(order, step)
                    now = Checkpoint(step, tokens, place, failed, state, rows, versions)
                    write_checkpoint(checkpoints, now, training=training)
                if stopping:
                    group.meet()  # one that ends sooner would have the others ended by torchrun
                    then = ", which is saved. Run the same command again to go on" if order else ""
                    raise KeyboardInterrupt(f"Stopped after step {step} of {n_steps}{then}.")

        if step < max(n_steps, 1):
            raise TrainError(
                f"activations for {out}: expected {n_steps} batches, got {step} ({tokens} rows). "
                f"Lower --tokens or cache more."
            )
        for member in members:
            _tell_missed_l0(member, rows[member.spec.name][-1], tell)
        if leads:
            write_run(
                work,
                config,
                members,
                rows=rows,
                keep=keep or {},
                failed=failed,
                training={name: settings | facts | recipe for name, recipe in recipes.items()},
                facts={
                    "precision": exact.precision,
                    "d_model": d_model,
                    "n_steps": n_steps,
                    "tokens": tokens,
                    **facts,
                },
            )
    group.meet()
    return {member.spec.name: _pick_metrics(rows[member.spec.name][-1]) for member in members}


def pin_precision(config: TrainConfig, device: str | torch.device) -> TrainConfig:
    """The same settings, with the precision that "auto" means on this device."""
    return config.model_copy(update={"precision": pick_precision(config.precision, device)})


def _check_same_step(group: Group, step: int, checkpoints: Path) -> None:
    """Raise TrainError unless all processes found the first one's checkpoint."""
    first = int(group.sum(torch.tensor(step if group.rank == 0 else 0)))
    if step != first:
        raise TrainError(
            f"checkpoint at {checkpoints} of process {group.rank}: expected step {first} as the "
            f"first process has it, got {step}. Name an --out that all processes share."
        )


def _put_rows(batch: Rows, device: str | torch.device) -> _Inputs:
    # In two calls: one that copies to a GPU and converts would convert on the CPU first.
    return _Inputs(
        batch.acts.to(device).float(),
        batch.grads.to(device).float(),
        batch.tokens.to(device),
        getattr(batch, "objective", None),
    )


def _step_members(
    members: Sequence[Member],
    inputs: _Inputs,
    config: TrainConfig,
    *,
    step: int,
    n_steps: int,
    lr: float,
    full: bool,
) -> tuple[dict[str, StepMetrics], dict[str, str]]:
    """One step of each member: its metrics, or why it stops, by name."""
    metrics, stopped = {}, {}
    acts, grads, tokens, objective = inputs
    shuffled = grads
    if any(member.spec.shuffled for member in members):
        rank = members[0].learner.sae.group.rank
        shuffled = shuffle_gradients(grads, seed=config.shuffle_seed, step=step, rank=rank)
    for member in members:
        name = member.spec.name
        try:
            metrics[name] = step_member(
                member,
                acts,
                shuffled if member.spec.shuffled else grads,
                tokens,
                config=config,
                lr=lr,
                k=find_k(config, step - 1, n_steps, k=member.spec.k),
                objective=objective,
                full=full,
            )
        except LossNotFinite as error:
            stopped[name] = f"loss of {name} at step {step}: {error}"
    return metrics, stopped


def _tell_missed_l0(member: Member, last: Row, tell: Callable[[str], None]) -> None:
    """Say so where a penalty had too few steps to bring L0 near k."""
    sae, l0 = member.learner.sae, last["l0"]
    if not sae.selects and abs(l0 - sae.k) > _L0_MISS * sae.k:
        tell(
            f"L0 of {member.spec.name}: expected about {sae.k} after the last step, got {l0:.1f}. "
            "Train longer for an SAE to compare at this k."
        )


def _anyone(group: Group, says: Callable[[], bool] | None) -> bool:
    """Whether any process of the group says so: all of them must do the same."""
    return bool(group.sum(torch.tensor(int(says() if says else False))))


def _describe(report: StepReport, name: str) -> Row:
    head = {"step": report.step, "tokens": report.tokens, "lr": report.lr}
    return head | {"tokens_per_s": report.tokens_per_s} | report.metrics[name]._asdict()


def _pick_metrics(row: Row) -> StepMetrics:
    return StepMetrics(**{name: row[name] for name in StepMetrics._fields})


def _ignore(*_: object) -> None:
    pass
