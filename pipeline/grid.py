"""A grid over many workers: each trains its share of the members from one pass over the store.

A share is a run of its own, with checkpoints of its own, in a folder beside `out`:

    .<name>.grid/<share>/   named by a hash of what decides its members' weights

so that a worker's death costs the steps since its last checkpoint, and the same command goes on
where a former one was stopped. The finished shares are put together as `train` would have written
them. A member depends on nobody beside it: its weights are the same, bit for bit on CPUs with the
same number of threads.
"""

import functools
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.config import ModelConfig, TrainConfig
from pipeline.device import pick_device
from pipeline.errors import TrainError
from pipeline.loggers import check_loggers
from pipeline.member import END_TO_END
from pipeline.run_folder import find_finished, open_run, restore_run, write_run
from pipeline.runs import Run, read_run
from pipeline.train import NoMemberLeft, pin_precision
from pipeline.training import (
    TrainPlan,
    describe_input,
    plan_courses,
    plan_recipes,
    plan_training,
    run_training,
)
from store.errors import is_url
from store.files import StoreFiles
from store.reader import open_files, read_manifest

Recipes = Mapping[str, Mapping[str, Any]]  # all that decides each member's weights, by name


class StoreSource(NamedTuple):
    """Where a store is, as a worker opens it."""

    source: str  # an absolute path, or a URL
    cache_root: str | None  # folder for shards of a remote store
    cache_bytes: int | None

    def open(self) -> StoreFiles:
        return open_files(self.source, cache_root=self.cache_root, cache_bytes=self.cache_bytes)


@dataclass(frozen=True)
class Share:
    """Members that one worker trains."""

    index: int
    folder: str
    members: tuple[str, ...]


class ShareResult(NamedTuple):
    """What a worker says of its share."""

    share: Share
    failed: dict[str, str]  # why members have no SAE, by name
    stopped: bool = False  # after a checkpoint, as it was asked to


class GridJob(NamedTuple):
    """All that a worker needs beside its share; a pipeline.proof.Job."""

    work: Path  # with the shares' runs
    stop_path: Path  # in it, once the shares are to stop
    device: str
    config: TrainConfig  # of the whole grid, with the precision pinned
    model: ModelConfig | None  # for end-to-end members
    layers: tuple[int, ...]
    store: StoreSource
    store_checksum: str  # of the manifest, and so of all that the store holds
    facts: dict[str, Any]  # for the members' configs

    @property
    def inputs(self) -> dict[str, str]:
        return {"store": self.store_checksum}

    def find_inputs(self) -> dict[str, Callable[[], str]]:
        return {"store": lambda: read_manifest(self.store.open()).checksum}

    def stop(self) -> None:
        """Have all shares stop after the step in hand and a checkpoint."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.stop_path.touch()

    def prepare(self) -> None:
        """Nothing: a share opens what it reads."""


class ShareMapper(Protocol):
    """Such as pipeline.cluster.Workers."""

    @property
    def n_workers(self) -> int: ...
    def __call__(
        self, function: Callable[[Share], ShareResult], parts: Iterable[Share]
    ) -> Iterable[ShareResult]: ...


def plan_grid(
    config: TrainConfig,
    out: Path,
    *,
    source: str | Path,
    cache_root: str | None = None,
    cache_bytes: int | None = None,
    layers: Sequence[int] = (),
    device: str,
    model: ModelConfig | None = None,
    provenance: Mapping[str, Any],
) -> tuple[TrainPlan, GridJob]:
    """What the grid reads, and what its workers are told.

    `device` is what each worker is asked to take; what "auto" means for the precision is decided
    here. Raises what `plan_training` raises.
    """
    path = str(source) if is_url(str(source)) else str(Path(source).resolve())
    store = StoreSource(path, cache_root, cache_bytes)
    files = open_files(source, cache_root=cache_root, cache_bytes=cache_bytes)
    plan = plan_training(config, files, layers)
    work = out.resolve().with_name(f".{out.name}.grid")
    job = GridJob(
        work=work,
        stop_path=work / f".stop-{uuid.uuid4().hex}",  # no later command's
        device=device,
        config=pin_precision(config, pick_device(device)),
        model=model,
        layers=tuple(layers),
        store=store,
        store_checksum=plan.store.manifest.checksum,
        facts={**describe_input(plan), **provenance},
    )
    return plan, job


def split_members(recipes: Recipes, n_shares: int) -> list[Share]:
    """Deal the members round, so that shares are about equal in number and in kind. Pure."""
    names = list(recipes)
    shares = []
    for index in range(min(n_shares, len(names))):
        members = tuple(names[index::n_shares])
        content = json.dumps({name: recipes[name] for name in members}, sort_keys=True)
        folder = hashlib.sha256(content.encode()).hexdigest()[:16]
        shares.append(Share(index, folder, members))
    return shares


def train_share(job: GridJob, share: Share) -> ShareResult:
    """Train a share into its own folder, going on where a worker that died had come to."""
    plan = plan_training(job.config, job.store.open(), job.layers)
    try:
        run = run_training(
            plan,
            job.config,
            job.work / share.folder,
            device=pick_device(job.device),
            provenance=job.facts,
            model=job.model,
            only=share.members,
            should_stop=job.stop_path.exists,
        )
    except KeyboardInterrupt:
        if not job.stop_path.exists():
            raise
        return ShareResult(share, {}, stopped=True)
    except NoMemberLeft as error:  # the other shares' members may fare better
        return ShareResult(share, error.failed)
    return ShareResult(share, run.failed)


def run_grid(
    plan: TrainPlan,
    job: GridJob,
    config: TrainConfig,
    out: Path,
    workers: AbstractContextManager[ShareMapper],
    *,
    overwrite: bool = False,
    on_share: Callable[[ShareResult], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Run:
    """Train the members that `out` does not have yet on `workers`, one share each, and write `out`.

    `workers` is entered only if members are missing. `tell` is told of shares passed over.
    Raises TrainError where all members failed, `out` holds another run or a process that writes
    one, or a logger is not installed; KeyboardInterrupt once shares have stopped by `job.stop`.
    """
    check_loggers(config.loggers)
    courses = plan_courses(plan, job.config, device=job.device, model=job.model)
    recipes = plan_recipes(courses, job.config, job.facts)
    restore_run(out)
    kept = {} if overwrite else find_finished(out, recipes)
    if len(kept) == len(recipes):
        return read_run(out)
    with open_run(out) as folder:
        # Only now: another process may have written the run until it gave up the lock.
        kept = {} if overwrite else find_finished(out, recipes)
        kept = _collect(job.work, recipes, tell) | kept
        missing = {name: recipe for name, recipe in recipes.items() if name not in kept}
        failed: dict[str, str] = {}
        stopped = False
        if missing:
            with workers as mapper:
                shares = split_members(missing, mapper.n_workers)
                for result in mapper(functools.partial(train_share, job), shares):
                    failed |= result.failed
                    stopped |= result.stopped
                    if on_share and not result.stopped:
                        on_share(result)
        if stopped:
            raise KeyboardInterrupt(
                "Stopped; all workers' steps are saved. Run the same command again to go on."
            )
        kept = _collect(job.work, recipes) | kept
        if not kept:
            raise TrainError(
                f"{'; '.join(failed.values())}. No member is left, and nothing was written to "
                f"{out}. Lower --lr, or set train.max_grad_norm."
            )
        # The run's own facts are those of the stream that one process would train from last.
        last = max(
            kept, key=lambda name: (recipes[name]["objective"] == END_TO_END, name in missing)
        )
        said = read_run(kept[last].parent).config
        aside = ("train", "members", "failed")
        write_run(
            folder,
            config,
            (),
            rows={},
            keep={name: kept[name] for name in recipes if name in kept},
            failed=failed,
            training={},
            facts={key: value for key, value in said.items() if key not in aside},
        )
    shutil.rmtree(job.work, ignore_errors=True)
    return read_run(out)


def _collect(
    work: Path, recipes: Recipes, tell: Callable[[str], None] | None = None
) -> dict[str, Path]:
    """Finished members of the shares in `work`.

    A share with a member of other settings, or that cannot be read, is passed over whole; `tell` is
    told.
    """
    finished: dict[str, Path] = {}
    for folder in sorted(work.glob("[!.]*")):
        try:
            finished |= find_finished(folder, recipes)
        except TrainError as error:
            if tell:
                reason = str(error).partition(". ")[0]  # what to do next is for a whole run
                tell(f"share passed over, and its members trained again: {reason}.")
    return finished
