"""Who is told of the logged steps as they happen: DVCLive always, wandb and TensorBoard if asked.

<folder>/live/<member>/ is DVCLive's, <folder>/tensorboard/<member>/ TensorBoard's,
<folder>/wandb/<member>/ that of wandb, which has a run for each member.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dvclive.live import Live

from pipeline.errors import TrainError
from pipeline.history import Row

Log = Callable[[str, Row], None]  # a member's row
_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}  # by logger


@contextmanager
def open_loggers(
    names: Sequence[str],
    folder: Path,
    *,
    run: str,
    settings: Mapping[str, Any],
    past: Mapping[str, Sequence[Row]],
) -> Iterator[Log]:
    """Yield what hands a row to DVCLive and to all loggers named; they are closed at the end.

    `run` and `settings` are what wandb calls the group of runs and shows of each. `past` rows of
    members, which a checkpoint kept, are logged first, so that all have the log of an undisturbed
    run. Raises TrainError, before anything is written, where a logger's package is not installed.
    """
    check_loggers(names)
    openers: dict[str, Callable[[], AbstractContextManager[Log]]] = {
        "tensorboard": lambda: log_to_tensorboard(folder / "tensorboard"),
        "wandb": lambda: log_to_wandb(folder / "wandb", run=run, settings=settings),
    }
    with ExitStack() as stack:
        logs = [stack.enter_context(log_to_dvclive(folder / "live"))]
        logs += [stack.enter_context(openers[name]()) for name in names]

        def log(member: str, row: Row) -> None:
            for each in logs:
                each(member, row)

        rows = ((name, row) for name, logged in past.items() for row in logged)
        for name, row in sorted(rows, key=lambda named: named[1]["step"]):
            log(name, row)
        yield log


def check_loggers(names: Sequence[str]) -> None:
    """Raise TrainError where the package of a logger is not installed."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise TrainError(
                f"train.loggers: expected the package {_PACKAGES[name]} for {name}, got none "
                f"installed. Run `pip install {_PACKAGES[name]}`, or leave out --logger {name}."
            )


@contextmanager
def log_to_dvclive(folder: Path) -> Iterator[Log]:
    """DVCLive's files, which are complete after each row."""
    lives: dict[str, _Live] = {}

    def log(member: str, row: Row) -> None:
        if member not in lives:
            lives[member] = _Live(
                str(folder / member),
                report=None,
                save_dvc_exp=False,
                dvcyaml=None,
                monitor_system=False,
            )
        live = lives[member]
        live.step = row["step"]
        for name, value in _list_metrics(row):
            live.log_metric(name, value)
        live.sync()

    try:
        yield log
    finally:
        for live in lives.values():
            live.end()


@contextmanager
def log_to_tensorboard(folder: Path) -> Iterator[Log]:
    """An event file per member; TensorBoard shows them as runs beside each other."""
    tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
    writers: dict[str, Any] = {}

    def log(member: str, row: Row) -> None:
        if member not in writers:
            writers[member] = tensorboard.SummaryWriter(str(folder / member))
        for name, value in _list_metrics(row):
            writers[member].add_scalar(name, value, row["step"])
        writers[member].flush()

    try:
        yield log
    finally:
        for writer in writers.values():
            writer.close()


@contextmanager
def log_to_wandb(folder: Path, *, run: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    """A run of wandb per member, in the project gsae-pipeline; offline by WANDB_MODE=offline."""
    runs: dict[str, Any] = {}

    def log(member: str, row: Row) -> None:
        if member not in runs:
            runs[member] = _open_wandb(folder / member, run, member, row, settings)
        runs[member].log(dict(_list_metrics(row)), step=row["step"])

    try:
        yield log
    finally:
        for opened in runs.values():
            opened.finish()
        for path in folder.rglob("*"):
            if path.is_symlink():  # to wandb's own log in the user's cache: no copy would be whole
                path.unlink()


def _open_wandb(
    folder: Path, run: str, member: str, first: Row, settings: Mapping[str, Any]
) -> Any:
    """The member's run, which an interrupted training that goes on has already.

    Such a training logs the `first` row again; no other has one of the same rate and loss.
    """
    wandb: Any = importlib.import_module("wandb")
    decisive = (run, member, float(first["tokens_per_s"]), float(first["loss"]))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            project="gsae-pipeline",
            group=run,
            name=f"{run}/{member}",
            id=hashlib.sha256(repr(decisive).encode()).hexdigest()[:16],
            resume="allow",
            reinit="create_new",  # beside the other members' runs
            dir=str(folder),
            config=dict(settings),
            settings=wandb.Settings(silent=True, symlink=False),
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise TrainError(
            f"wandb for {folder}: expected to be logged in, got: {reason}. "
            "Run `wandb login`, or set WANDB_MODE=offline."
        ) from None


def _list_metrics(row: Row) -> Iterator[tuple[str, Any]]:
    """What is measured; an architecture that selects nothing has no overlap."""
    return ((name, value) for name, value in row.items() if name != "step" and value is not None)


class _Live(Live):
    """DVCLive without its DVC repository.

    Stock `Live` runs `dvc init` and `git add` in a Git repository that is not a DVC one (3.49), and
    asks Git for a revision in every other; all that we want of it are its files.
    """

    def _init_dvc(self) -> None:
        self._dvc_file = "dvc.yaml"
