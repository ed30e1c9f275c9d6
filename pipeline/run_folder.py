"""Where a run is written: beside its place, under other names, until it is whole.

.<name>.lock          held by the one process that trains into <name>
.<name>.part/         the run in the making, empty at every start
.<name>.checkpoints/  what an interrupted run goes on from
.<name>.old/          the earlier run, for the moment in which the new one takes its place
"""

import json
import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from pipeline.checkpoint import is_full, list_members
from pipeline.config import TrainConfig
from pipeline.errors import TrainError
from pipeline.files import name_beside, write_json
from pipeline.history import Row, read_history, write_history
from pipeline.member import Member, find_loss, finish_member, plan_members
from pipeline.runs import read_run
from pipeline.sae import StepMetrics, read_sae_config, save_sae
from pipeline.sae.io import WEIGHTS_NAME
from store.crash import crash_point
from store.disk import link_tree

HISTORY_NAME = "history.parquet"


def locate_work(out: Path) -> Path:
    """Where the run for `out` is written."""
    return name_beside(out, "part")


def locate_checkpoints(out: Path) -> Path:
    """Where checkpoints of the run for `out` are."""
    return name_beside(out, "checkpoints")


@contextmanager
def open_run(out: Path) -> Iterator[Path]:
    """Yield an empty sibling of `out` to write to; on success it takes the place of `out`.

    Where the body raises, the sibling stays, for a look at its live metrics, until the next run.
    """
    if is_foreign(out):
        raise TrainError(
            f"run folder at {out}: expected an earlier run, an empty folder or nothing, got other "
            f"files, which would be lost. Choose another --out."
        )
    with lock_run(out):
        work = locate_work(out)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        old = name_beside(out, "old")
        shutil.rmtree(old, ignore_errors=True)
        crash_point("train:before-publish")
        if out.exists():
            out.rename(old)
        crash_point("train:between-renames")
        work.rename(out)
        crash_point("train:after-publish")
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(locate_checkpoints(out), ignore_errors=True)


def is_foreign(out: Path) -> bool:
    """Whether something is at `out` that `train` did not write and must not replace."""
    if not out.is_dir():
        return out.exists()
    try:
        config = json.loads((out / "config.json").read_bytes())
        return not all((out / name / "config.json").is_file() for name in config["members"])
    except (OSError, ValueError, KeyError, TypeError):
        return any(out.iterdir())


def restore_run(out: Path) -> None:
    """Give an earlier run its place again if a process died before the next one had taken it.

    Where the next one has, the earlier one is deleted, as that process would have done.
    """
    old = name_beside(out, "old")
    if not old.exists():
        return
    with lock_run(out):
        if old.exists() and not out.exists():
            old.rename(out)
        elif (out / "config.json").is_file():
            shutil.rmtree(old, ignore_errors=True)


def sweep_checkpoints(out: Path, finished: Collection[str]) -> None:
    """Delete checkpoints that a process left which died once it had published these members.

    Those with another member are of a larger grid, to go on from; those of a run that somebody
    else writes now are theirs.
    """
    folder = locate_checkpoints(out)
    if not folder.is_dir() or not list_members(folder) <= set(finished):
        return
    with suppress(TrainError), lock_run(out):
        shutil.rmtree(folder, ignore_errors=True)


def find_finished(out: Path, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Where the run at `out` has the SAEs of these recipes, by the name that they have there.

    A folder may have another name: k32-beta0 is k32-beta0-seed0 once there are several seeds.
    Raises TrainError where the run has an SAE of no recipe, which would be lost.
    """
    if not (out / "config.json").exists():
        return {}
    finished = {}
    for name in read_run(out).members:
        folder = out / name
        training = read_sae_config(folder).training
        same = [key for key, recipe in recipes.items() if not _diff(recipe, training)]
        if not same:
            got = f"{name}, which would be lost"
            if name in recipes:
                got = f"{name} with other ones ({_diff(recipes[name], training)[0]})"
            raise TrainError(
                f"run at {out}: expected none or one of {', '.join(recipes)} alone, with the same "
                f"store and settings, got {got}. Choose another --out, or pass --overwrite."
            )
        if all((folder / file).is_file() for file in (WEIGHTS_NAME, HISTORY_NAME)):
            finished[same[0]] = folder
    return finished


def write_run(
    work: Path,
    config: TrainConfig,
    members: Sequence[Member],
    *,
    rows: Mapping[str, Sequence[Row]],
    keep: Mapping[str, Path],
    failed: Mapping[str, str],
    training: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Write the members, the finished ones of `keep` and what is said of all, to `work`.

    `training` is what each member's config.json says of how it came about, beside its
    `trained_tokens`, and `facts` what the run's does. What failed in the runs of the kept ones is
    said again.
    """
    for name, folder in keep.items():
        link_tree(folder, work / name)
        for logs in folder.parent.glob(f"*/{folder.name}"):  # live/<name>, tensorboard/<name>
            link_tree(logs, work / logs.parent.name / name)
    for member in members:
        folder = work / member.spec.name
        logged = rows[member.spec.name]
        trained = {"trained_tokens": logged[-1]["tokens"]}
        _save_weights(member, folder, training={**training[member.spec.name], **trained})
        write_history(folder / HISTORY_NAME, logged)
    for run in {folder.parent for folder in keep.values()}:
        failed = json.loads((run / "config.json").read_bytes())["failed"] | failed
    grid = [spec.name for spec in plan_members(config, loss=find_loss(facts))]
    there = {*keep, *(member.spec.name for member in members)}
    names = [name for name in grid if name in there] + sorted(there - set(grid))
    missing = set(grid) - there
    last = {name: read_history(work / name / HISTORY_NAME)[-1] for name in names}
    summary = {
        name: {key: _finite(last[name][key]) for key in StepMetrics._fields} for name in names
    }
    write_json(work / "summary.json", summary)
    write_json(
        work / "config.json",
        {
            "train": config.model_dump(mode="json"),
            "members": names,
            "failed": {name: problem for name, problem in failed.items() if name in missing},
            **facts,
        },
    )


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Keep other writers from the run at `out`; whoever holds the lock may take it again."""
    path = name_beside(out, "lock")
    lock = FileLock(path, timeout=0, is_singleton=True)  # which counts how often it is taken
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        if not path.exists():  # filelock waits for a file that cannot be made, as in /proc
            raise TrainError(
                f"run folder at {out}: expected a writable place, got one where no file can be "
                "made. Choose another --out."
            ) from None
        raise TrainError(
            f"run folder at {out}: expected no other writer, got one that holds {path}. "
            f"Wait for it, or choose another --out."
        ) from None
    except OSError as error:
        raise TrainError(
            f"run folder at {out}: expected a writable place, got: {error}. Choose another --out."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _save_weights(member: Member, folder: Path, *, training: Mapping[str, Any]) -> None:
    try:
        save_sae(finish_member(member), folder, training=training)
    except SafetensorError as error:
        todo = "Make room and run" if is_full(error) else "Run"
        raise TrainError(
            f"SAE for {folder}: expected a disk that takes it, got: {error}. {todo} the same "
            "command again: it goes on from the last checkpoint."
        ) from None


def _finite(value: float | int | None) -> float | int | None:
    """Null for what JSON has no number for: the NMSE of a row of zeros is infinite."""
    return value if value is None or math.isfinite(value) else None


def _diff(recipe: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: expected {value!r:.60}, got {training.get(key)!r:.60}"
        for key, value in recipe.items()
        if training.get(key) != value
    ]
