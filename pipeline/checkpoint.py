"""Checkpoints: all that an interrupted training needs to go on exactly as if nothing had happened.

    <folder>/<training>-<step>/state.safetensors           tensors: weights, Adam, counters, RNG
    <folder>/<training>-<step>/history/<member>.parquet    the rows logged so far
    <folder>/<training>-<step>/state.json                  step, order, versions, SHA-256 of all

<training> is a hash of the settings and the stream: another training does not go on from it, and
leaves it alone. A checkpoint is written under a temporary name, made durable and renamed; the last
two are kept.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import Index, Section
from pipeline.errors import TrainError
from pipeline.files import write_json
from pipeline.history import Row, read_history, write_history
from pipeline.sae.io import PICKLE_SUFFIXES
from store.crash import crash_point
from store.disk import free_bytes, fsync_folder, remove, rename_durably
from store.stream_plan import StreamState

KEPT = 2
TENSORS_NAME = "state.safetensors"
STATE_NAME = "state.json"
_VERSION = 1
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Checkpoint(NamedTuple):
    """Where a training is after a step of all its members."""

    step: int  # steps taken
    tokens: int  # rows trained on
    stream: StreamState
    failed: dict[str, str]  # why members stopped, by name
    tensors: dict[str, Tensor]  # "<member>/<name>" as in `list_state`, and "rng"
    rows: dict[str, list[Row]]  # logged steps, by member
    versions: dict[str, str]  # of python and the packages that took the last steps, if known


class _State(Section):
    """The content of state.json."""

    version: int
    training: _Sha256
    step: Index
    tokens: Index
    order: str
    batch: Index
    failed: dict[str, str]
    members: Annotated[tuple[str, ...], Field(strict=False)]  # those with history
    versions: dict[str, str] = Field(default_factory=dict)  # earlier checkpoints have none
    files: dict[str, _Sha256]


class _Damaged(Exception):
    """A checkpoint is not what was written."""


def name_training(facts: Mapping[str, Any]) -> str:
    """sha256, in hex, of all that decides a training, as canonical JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_room(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise TrainError unless there is room for the checkpoints that are kept and a new one."""
    needed, free = (KEPT + 1) * _count_bytes(tensors), free_bytes(folder)
    if free < needed:
        raise TrainError(_describe_full(folder, needed, free))


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, training: str) -> Path:
    """Write a checkpoint, then delete all but the last KEPT of this training.

    Raises TrainError where the disk is full, and leaves the earlier ones as they are.
    """
    path = folder / f"{training[:8]}-{checkpoint.step:08}"
    part = folder / f".{path.name}.part"
    try:
        remove(part)
        (part / "history").mkdir(parents=True)
        crash_point("before-write:checkpoint")
        _write_files(part, checkpoint, training)
        crash_point("after-write:checkpoint")
        rename_durably(part, path, kind="checkpoint")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        if is_full(error):
            needed = _count_bytes(checkpoint.tensors)
            raise TrainError(_describe_full(folder, needed, free_bytes(folder))) from None
        raise
    # Of later steps there are only damaged ones, or training would have gone on from them.
    ours = _list_newest(folder, training)
    kept = [other for other in ours if other <= path][:KEPT]
    for other in {*ours, *folder.glob(".*.part")} - set(kept):
        remove(other)
    return path


def is_full(error: OSError | SafetensorError) -> bool:
    """Whether a disk or a quota is full; safetensors tells the system's error in its text alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)


def list_members(folder: Path) -> set[str]:
    """The members that checkpoints in a folder have rows of, whichever training they are of."""
    return {path.stem for path in folder.glob("[!.]*/history/*.parquet")}


def read_newest(folder: Path, *, training: str, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a training, or None.

    A damaged one is passed over, which `tell` is told, as it is of checkpoints of another training.
    Raises TrainError for a pickle, which is never opened.
    """
    if not folder.is_dir():
        return None
    _refuse_pickles(folder)
    ours = _list_newest(folder, training)
    for path in ours:
        try:
            return _read(path, training)
        except (_Damaged, OSError, ValueError, SafetensorError) as error:
            tell(f"checkpoint at {path}: damaged ({error}); training goes on from an earlier one.")
    if ours:
        tell(f"checkpoints at {folder}: none of this training is whole; it starts from step 1.")
    elif any(path.is_dir() for path in folder.glob("[!.]*")):
        tell(
            f"checkpoints at {folder}: expected this training's, got those of other settings or of "
            "another grid; it starts from step 1. They stay, for the command that wrote them to go "
            "on from, until a run is finished here."
        )
    return None


def _write_files(part: Path, checkpoint: Checkpoint, training: str) -> None:
    tensors = {name: tensor.detach().cpu() for name, tensor in checkpoint.tensors.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, part / TENSORS_NAME)
    for member, rows in checkpoint.rows.items():
        write_history(part / "history" / f"{member}.parquet", rows)
    files = sorted(path for path in part.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    state = _State(
        version=_VERSION,
        training=training,
        step=checkpoint.step,
        tokens=checkpoint.tokens,
        order=checkpoint.stream.order,
        batch=checkpoint.stream.batch,
        failed=checkpoint.failed,
        members=tuple(checkpoint.rows),
        versions=checkpoint.versions,
        files={path.relative_to(part).as_posix(): _hash_file(path) for path in files},
    ).model_dump(mode="json")
    write_json(part / STATE_NAME, {"state": state, "sha256": name_training(state)})
    for path in (part / "history", part):
        fsync_folder(path)


def _read(path: Path, training: str) -> Checkpoint:
    content = json.loads((path / STATE_NAME).read_bytes())
    try:
        whole = content["sha256"] == name_training(content["state"])
        state = _State.model_validate(content["state"])
    except (KeyError, TypeError, ValidationError):
        raise _Damaged(f"{STATE_NAME} is not as it was written") from None
    if not whole or state.version != _VERSION or state.training != training:
        raise _Damaged(f"{STATE_NAME} is not as it was written")
    for name, sha256 in state.files.items():
        if not (path / name).is_file() or _hash_file(path / name) != sha256:
            raise _Damaged(f"{name} is not as it was written")
    return Checkpoint(
        step=state.step,
        tokens=state.tokens,
        stream=StreamState(state.order, state.batch),
        failed=state.failed,
        tensors=load_file(path / TENSORS_NAME),
        rows={name: read_history(path / "history" / f"{name}.parquet") for name in state.members},
        versions=state.versions,
    )


def _list_newest(folder: Path, training: str) -> list[Path]:
    """The training's checkpoints, newest first."""
    return sorted(folder.glob(f"{training[:8]}-*"), reverse=True)


def _refuse_pickles(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(PICKLE_SUFFIXES):
            raise TrainError(
                f"checkpoint at {path}: expected safetensors, got a pickle, which is never loaded. "
                "Remove it; checkpoints are what `pipeline train` writes."
            )


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe_full(folder: Path, needed: int, free: int) -> str:
    return (
        f"disk for checkpoints at {folder}: expected {needed:,} bytes free, got {free:,}. Make "
        "room and run the same command again: it goes on from the last checkpoint."
    )


def _count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of a checkpoint of these tensors, but for its small files."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
