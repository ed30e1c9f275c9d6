"""What loggers write, read back with their own tools."""

import json
import logging
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import loggers
from pipeline.errors import TrainError
from pipeline.history import read_history, write_history
from pipeline.loggers import open_loggers
from tests.test_history import make_row


def log_two_steps(folder: Path, *names: str, **changes: Any) -> None:
    with open_loggers(names, folder, run="demo", settings={"lr": 0.1}, past={}) as log:
        for step in (1, 5):
            for member in ("a", "b"):
                log(member, make_row(step) | changes)


def test_rows_reach_dvclive(tmp_path: Path) -> None:
    log_two_steps(tmp_path)
    for member in ("a", "b"):
        live = tmp_path / "live" / member
        assert json.loads((live / "metrics.json").read_text()) == make_row(5)
        loss = (live / "plots/metrics/loss.tsv").read_text().split()
        assert loss == ["step", "loss", "1", "9.0", "5", "1.8"]


def test_what_is_not_measured_is_not_logged(tmp_path: Path) -> None:
    log_two_steps(tmp_path, "tensorboard", overlap=None)
    assert "overlap" not in json.loads((tmp_path / "live/a/metrics.json").read_text())


def test_dvclive_s_files_are_complete_while_training_goes_on(tmp_path: Path) -> None:
    with open_loggers((), tmp_path, run="demo", settings={}, past={}) as log:
        log("a", make_row(1))
        assert json.loads((tmp_path / "live/a/metrics.json").read_text())["loss"] == 9.0


def test_past_rows_are_logged_first_and_in_order(tmp_path: Path) -> None:
    past = {"a": [make_row(1), make_row(5)], "b": [make_row(1)]}
    with open_loggers((), tmp_path, run="demo", settings={}, past=past) as log:
        log("a", make_row(6))
    steps = (tmp_path / "live/a/plots/metrics/tokens.tsv").read_text().split()[2::2]
    assert steps == ["1", "5", "6"]
    assert (tmp_path / "live/b/metrics.json").exists()


def test_rows_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_two_steps(tmp_path, "tensorboard")
    for member in ("a", "b"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / member)).Reload()
        found = [(event.step, event.value) for event in events.Scalars("loss")]
        assert found == [(1, 9.0), (5, pytest.approx(1.8))]
        assert events.Tags()["scalars"] == [*make_row(1)][1:]


def test_rows_reach_wandb_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_two_steps(tmp_path, "wandb")
    assert capfd.readouterr().out == ""

    for member in ("a", "b"):
        (path,) = (tmp_path / "wandb" / member).glob("wandb/offline-run-*/run-*.wandb")
        records = [*read_wandb(path)]
        runs = [r.run for r in records if r.HasField("run")]
        history = [
            {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in r.history.item
            }
            for r in records
            if r.HasField("history")
        ]
        names = {(run.project, run.run_group, run.display_name) for run in runs}
        assert names == {("gsae-pipeline", "demo", f"demo/{member}")}
        assert [(row["_step"], row["loss"]) for row in history] == [(1, 9.0), (5, 1.8)]
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def test_a_training_that_goes_on_has_the_runs_of_wandb_that_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    begun: list[str] = []

    def begin(**settings: Any) -> Any:
        assert settings["resume"] == "allow"
        begun.append(settings["id"])
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setattr(wandb, "init", begin)
    log_two_steps(tmp_path, "wandb")
    write_history(tmp_path / "kept.parquet", [make_row(1) | {"loss": 9}])
    past = dict.fromkeys("ab", read_history(tmp_path / "kept.parquet"))
    with open_loggers(["wandb"], tmp_path, run="demo", settings={}, past=past) as log:
        log("a", make_row(5))
    log_two_steps(tmp_path, "wandb", tokens_per_s=1.5)
    first, resumed, again = begun[:2], begun[2:4], begun[4:]
    assert first == resumed
    assert len({*first, *again}) == 4  # of another training in the same folder, too


def read_wandb(path: Path) -> Iterator[Any]:
    """The records of wandb's file: a header of 7 bytes, then each with its checksum and length."""
    from wandb.proto import wandb_internal_pb2

    content, at = path.read_bytes(), 7
    assert len(content) < 2**15  # so that no record is split
    while at < len(content):
        (length, kind) = struct.unpack("<HB", content[at + 4 : at + 7])
        assert kind == 1  # a whole record
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[at + 7 : at + 7 + length])
        yield record
        at += 7 + length


def test_wandb_without_a_login_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(TrainError, match=r"No API key.* to log in\. Run.*WANDB_MODE=offline"):
        log_two_steps(tmp_path, "wandb")


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_package_that_is_not_there_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TrainError, match=f"expected the package {name}.*pip install {name}"):
        log_two_steps(tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


# what the working folder is; DVCLive on its own would turn the second into the third
@pytest.mark.parametrize("kind", ["plain", "git", "git without commits", "git and dvc"])
def test_dvclive_touches_neither_git_nor_dvc(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0" * 40)  # as under `dvc exp run`
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b.c")
    if kind != "plain":
        run("git", "init", "--quiet")
    if kind == "git and dvc":
        run("dvc", "init", "--quiet")
    if kind != "git without commits" and kind != "plain":
        run("git", "commit", "--quiet", "--allow-empty", "--all", "--message", "start")
    before = {path for path in tmp_path.rglob("*") if ".dvc/tmp" not in str(path)}
    refs = run("git", "status", "--short") if kind != "plain" else ""
    capfd.readouterr()

    with caplog.at_level(logging.INFO):
        log_two_steps(tmp_path / "out")

    made = {path for path in tmp_path.rglob("*") if ".dvc/tmp" not in str(path)} - before
    assert all(path == tmp_path / "out" or tmp_path / "out" in path.parents for path in made)
    assert not list(tmp_path.rglob("dvc.yaml"))
    if kind != "plain":
        run("git", "add", "--dry-run", "out")  # still untracked and free to add
        status = run("git", "status", "--short").replace("?? out/\n", "")
        assert status == refs
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
