"""Train from a store: plan what to read, keep what an earlier run has, and hand the streams on."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.config import ModelConfig, TrainConfig
from pipeline.errors import TrainError
from pipeline.loggers import check_loggers
from pipeline.member import END_TO_END, MemberSpec, find_loss, plan_members, plan_recipe
from pipeline.rows import Rows
from pipeline.run_folder import find_finished, lock_run, restore_run, sweep_checkpoints
from pipeline.runs import Run, read_run
from pipeline.sae.group import ALONE, Group
from pipeline.schedules import plan_steps
from pipeline.train import NoMemberLeft, StepReport, pin_precision, train
from store.files import StoreFiles
from store.reader import ActivationStore, open_files, open_store, read_manifest
from store.stream import stream_batches
from store.stream_plan import StreamPlan, count_rows, plan_stream


class Course(NamedTuple):
    """Members that learn from one stream."""

    specs: tuple[MemberSpec, ...]
    n_steps: int
    order: str  # names the batches and their order, for checkpoints
    open_stream: Callable[[int], Iterable[Rows]]  # from a batch on


class TrainPlan(NamedTuple):
    """What training will read, decided before anything runs."""

    store: ActivationStore
    stream: StreamPlan

    @property
    def n_steps(self) -> int:
        return self.stream.n_batches


def plan_training(
    config: TrainConfig, source: str | Path | StoreFiles, layers: Sequence[int] = ()
) -> TrainPlan:
    """Open the store and count its batches; raises TrainError for a foreign hook or few rows.

    Where `config.hook` is null or fits several of the store's hooks, one layer stands for the only
    one of them that it has.
    """
    files = open_files(source) if isinstance(source, str | Path) else source
    hooks = read_manifest(files).hooks
    names = {config.hook, f"hook_{config.hook}"}
    wanted = [hook for hook in hooks if config.hook is None or names & {hook, hook.split(".")[-1]}]
    if len(wanted) > 1 and len(layers) == 1:
        wanted = [hook for hook in wanted if hook.startswith(f"blocks.{layers[0]}.")]
    if len(wanted) != 1:
        raise TrainError(
            f"train.hook for {files.where}: expected one of {', '.join(hooks)}, "
            f"got {config.hook or 'none'}. Pass --hook, or --layer for its only hook."
        )
    store = open_store(files, hook=wanted[0], allow_partial=config.allow_partial)
    n_steps = plan_steps(config, count_rows(store, config.exclude_positions))
    stream = plan_stream(
        store,
        hook=wanted[0],
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.shuffle_seed,
        window=config.window_shards,
        exclude_positions=config.exclude_positions,
        tokens=n_steps * config.batch_size,
    )
    return TrainPlan(store, stream)


def run_training(
    plan: TrainPlan,
    config: TrainConfig,
    out: Path,
    *,
    device: str,
    provenance: Mapping[str, Any],
    model: ModelConfig | None = None,
    only: Sequence[str] | None = None,
    group: Group = ALONE,
    overwrite: bool = False,
    on_step: Callable[[StepReport], None] | None = None,
    tell: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Run:
    """Train the members that `out` does not have yet from one pass over the store.

    End-to-end members have a pass of their own, over whole blocks; only for them is `model` loaded.
    A run at `out` of the same store and settings is extended; with `overwrite` a new one replaces
    it. `only` names the members to train, if not the whole grid. The other arguments are those of
    `train`.

    Raises TrainError if `out` holds another run or a process that writes one, for a logger that is
    not installed, or for a batch with fewer rows than processes.
    """
    if config.batch_size < group.world_size:
        raise TrainError(
            f"train.batch_size: expected at least a row for each of {group.world_size} processes, "
            f"got {config.batch_size}. Raise --batch-size or lower --nproc-per-node."
        )
    check_loggers(config.loggers)
    facts = {**describe_input(plan), **provenance}
    courses = plan_courses(plan, config, device=device, model=model, only=only, group=group)
    recipes = plan_recipes(courses, pin_precision(config, device), facts)
    leads = group.rank == 0
    if leads:
        restore_run(out)
    group.meet()
    kept = {} if overwrite else find_finished(out, recipes)
    if _ask_first(group, len(kept) == len(recipes)):
        if leads:
            sweep_checkpoints(out, kept)
        return read_run(out)

    train_some = functools.partial(
        train,
        config,
        d_model=plan.store.manifest.d_model,
        out=out,
        device=device,
        n_tokens=_count_vocabulary(plan) if "tokenized" in config.architectures else None,
        group=group,
        provenance=facts,
        on_step=on_step,
        tell=tell,
        should_stop=should_stop,
    )
    with lock_run(out) if leads else nullcontext():
        group.meet()
        # Only now: another process may have written the run until it gave up the lock.
        kept = {} if overwrite else find_finished(out, recipes)
        if tell and kept and leads:
            tell(f"kept as they are in {out}: {', '.join(kept)}")
        _train_courses(
            courses, kept, lambda: find_finished(out, recipes), train_some, overwrite=overwrite
        )
    return read_run(out)


def _train_courses(
    courses: Sequence[Course],
    kept: Mapping[str, Path],
    find_kept: Callable[[], Mapping[str, Path]],
    train_some: Callable[..., object],
    *,
    overwrite: bool,
) -> None:
    """Train what is missing of each course; raises NoMemberLeft last, if one had none left."""
    lost: NoMemberLeft | None = None
    published = False
    for course in courses:
        missing = [spec for spec in course.specs if spec.name not in kept]
        if not missing:
            continue
        try:
            train_some(
                open_stream=course.open_stream,
                n_steps=course.n_steps,
                specs=missing,
                keep=kept,
                order=course.order,
            )
            published = True
        except NoMemberLeft as error:  # another course's may do better
            lost = error
        except KeyboardInterrupt as stop:
            if overwrite and published:
                kept_ones = "Leave out --overwrite then, which would train the finished ones again."
                raise KeyboardInterrupt(f"{stop} {kept_ones}".strip()) from None
            raise
        kept = find_kept()
    if lost:
        raise lost


def _ask_first(group: Group, answer: bool) -> bool:
    """The first process's answer, for all of them."""
    return bool(group.sum(torch.tensor(int(answer and group.rank == 0))))


def describe_input(plan: TrainPlan) -> dict[str, Any]:
    """What a run and its members say of the store that they were trained from."""
    return {
        "hook": plan.stream.hook,
        "store": plan.store.where,
        "store_fingerprint": plan.store.manifest.fingerprint,
        "store_identity": plan.store.manifest.identity,
    }


def plan_recipes(
    courses: Sequence[Course], config: TrainConfig, facts: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """All that decides each member's weights, by name; the precision of `config` is not auto."""
    return {
        spec.name: plan_recipe(
            spec, config, n_steps=course.n_steps, order=course.order, provenance=facts
        )
        for course in courses
        for spec in course.specs
    }


def plan_courses(
    plan: TrainPlan,
    config: TrainConfig,
    *,
    device: str,
    model: ModelConfig | None,
    only: Sequence[str] | None = None,
    group: Group = ALONE,
) -> list[Course]:
    """The members of the shuffled stream, and those of a stream of whole blocks, if there are any.

    A process reads its own rows of each batch.
    """
    loss = find_loss(describe_input(plan))
    specs = [s for s in plan_members(config, loss=loss) if only is None or s.name in only]
    shuffled = tuple(spec for spec in specs if spec.architecture != END_TO_END)
    in_blocks = tuple(spec for spec in specs if spec.architecture == END_TO_END)

    def open_stream(first_batch: int) -> Iterable[Rows]:
        return stream_batches(
            plan.store,
            plan.stream,
            first_batch=first_batch,
            rank=group.rank,
            world_size=group.world_size,
            as_stored=True,  # converted on the device
        )

    courses = [Course(shuffled, plan.n_steps, plan.stream.order, open_stream)] if shuffled else []
    if in_blocks:
        courses.append(_plan_end_to_end(plan, config, in_blocks, device, model, group))
    return courses


def _plan_end_to_end(
    plan: TrainPlan,
    config: TrainConfig,
    specs: tuple[MemberSpec, ...],
    device: str,
    model: ModelConfig | None,
    group: Group,
) -> Course:
    """About as many rows as the shuffled stream gives, in whole blocks."""
    from pipeline.end_to_end import load_store_model, plan_blocks, stream_end_to_end

    assert model is not None, "end-to-end members need the language model"
    store, manifest = plan.store, plan.store.manifest
    blocks = plan_blocks(store, batch_size=config.batch_size, epochs=config.epochs)
    if blocks.batch_blocks < group.world_size:
        raise TrainError(
            f"train.batch_size: expected at least a block of {manifest.context_length} positions "
            f"for each of {group.world_size} processes, got {config.batch_size}. Raise "
            "--batch-size or lower --nproc-per-node."
        )
    rows = plan.n_steps * config.batch_size
    n_steps = max(1, min(blocks.n_batches, rows // (blocks.batch_blocks * manifest.context_length)))
    decisive = (
        *(manifest.checksum, plan.stream.hook, blocks.batch_blocks, config.shuffle_seed),
        *(plan.stream.exclude_positions, store.present),
    )
    order = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
    loaded: list[Any] = []  # at most one model, once it is needed

    def open_stream(first_batch: int) -> Iterable[Rows]:
        loaded[:] = loaded or [load_store_model(store, model, device=device)]
        return stream_end_to_end(
            loaded[0],
            store,
            hook=plan.stream.hook,
            batch_blocks=blocks.batch_blocks,
            epochs=config.epochs,
            seed=config.shuffle_seed,
            exclude_positions=plan.stream.exclude_positions,
            first_batch=first_batch,
            rank=group.rank,
            world_size=group.world_size,
            group=group,
            precision=str(manifest.identity.get("precision", "float32")),
        )

    return Course(specs, n_steps, order, open_stream)


def _count_vocabulary(plan: TrainPlan) -> int:
    """What the store's tokens reach; the rows of others in a table would stay zero."""
    present = plan.store.present
    return 1 + max(int(plan.store.read_column(shard, "tokens").max()) for shard in present)
