import json
import logging
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.history import HISTORY_SCHEMA, History
from pipeline.sae import StepMetrics


def make_row(step: int) -> dict:
    metrics = StepMetrics(9.0 / step, 0.0, 0.5, 0.25, 3.5, 7, 1.0, 0.125)
    return {"step": step, "tokens": 10 * step, "lr": 0.1, "tokens_per_s": 5.0, **metrics._asdict()}


def log_two_steps(folder: Path) -> None:
    history = History(folder / "live")
    history.log(make_row(1))
    history.log(make_row(5))
    history.close(folder / "history.parquet")


def test_rows_reach_parquet_and_dvclive(tmp_path: Path) -> None:
    log_two_steps(tmp_path)

    table = pq.read_table(tmp_path / "history.parquet")
    assert table.schema == HISTORY_SCHEMA
    assert table.to_pylist() == [make_row(1), make_row(5)]
    assert json.loads((tmp_path / "live/metrics.json").read_text()) == make_row(5)
    loss = (tmp_path / "live/plots/metrics/loss.tsv").read_text().split()
    assert loss == ["step", "loss", "1", "9.0", "5", "1.8"]


def test_dvclive_s_files_are_complete_while_training_goes_on(tmp_path: Path) -> None:
    history = History(tmp_path / "live")
    history.log(make_row(1))

    assert json.loads((tmp_path / "live/metrics.json").read_text())["loss"] == 9.0


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
