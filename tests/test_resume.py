"""Training killed at any step and run again: the bytes of an undisturbed run."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import train as module
from pipeline.cli.training import ask_to_stop
from pipeline.config import TrainConfig
from pipeline.errors import TrainError
from pipeline.run_folder import locate_checkpoints, restore_run
from pipeline.train import train
from tests.test_member import make_config
from tests.test_train import opens
from tests.tiny import run_cli, spawn_cli

N_STEPS = 11
GRID = make_config(
    architectures=("topk", "batch_topk"),
    betas=(0.0, 30.0),
    gradients=("cached", "shuffled"),
    checkpoint_every=3,
    log_every=2,
    lr_warmup_fraction=0.3,
    lr_decay_fraction=0.5,
    lr_decay="cosine",
    k_start=9,
    k_anneal_fraction=0.6,
    average_decay=0.9,
    aux_weight=0.1,
)


class Killed(BaseException):
    """The process is gone."""


def run(out: Path, config: TrainConfig = GRID, **changes: Any) -> list[str]:
    """Train on made-up batches; returns what was said."""
    said: list[str] = []
    arguments = {"d_model": 8, "n_steps": N_STEPS, "order": "o", "tell": said.append} | changes
    train(config, opens(N_STEPS), out=out, **arguments)
    return said


def die(point: str, skip: int, out: Path, config: TrainConfig = GRID) -> None:
    """Train until the process dies at this point, passed `skip` times before."""
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, point, skip)
        with pytest.raises(Killed):
            run(out, config)


def die_at(monkeypatch: pytest.MonkeyPatch, point: str, skip: int) -> None:
    left = skip

    def pass_point(name: str) -> None:
        nonlocal left
        if name == point:
            left -= 1
            if left < 0:
                raise Killed

    for target in ("pipeline.train", "pipeline.run_folder", "pipeline.checkpoint", "store.disk"):
        monkeypatch.setattr(f"{target}.crash_point", pass_point)


def read_results(out: Path) -> dict[str, Any]:
    """Every file's bytes, but for the rate, which is a matter of time, and files with a date."""
    results: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.name == "history.parquet":
            results[name] = pq.read_table(path).drop(["tokens_per_s"]).to_pylist()
        elif path.is_file() and "tokens_per_s" not in name and not name.endswith("/metrics.json"):
            results[name] = path.read_bytes()
    return results


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(out)
    return read_results(out)


# point, how often it is passed before, the step that the second process goes on after
DEATHS = [
    ("train:after-step", 2, 0),  # step 3 is done, its checkpoint is not
    ("train:after-step", 3, 3),
    ("train:after-step", 10, 9),  # the last step
    ("before-write:checkpoint", 1, 3),
    ("after-write:checkpoint", 1, 3),
    ("before-rename:checkpoint", 1, 3),
    ("after-rename:checkpoint", 1, 6),
    ("train:before-publish", 0, 9),
]


@pytest.mark.parametrize(("point", "skip", "last"), DEATHS)
def test_26_a_run_again_has_the_bytes_of_an_undisturbed_one(
    tmp_path: Path,
    undisturbed: dict[str, Any],
    point: str,
    skip: int,
    last: int,
) -> None:
    die(point, skip, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    said = run(tmp_path / "run")
    assert (f"going on after step {last} of 11" in "".join(said)) == (last > 0)
    assert read_results(tmp_path / "run") == undisturbed
    assert not locate_checkpoints(tmp_path / "run").exists()


def test_26_interrupted_twice_and_with_a_damaged_checkpoint(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    for skip in (4, 4):  # after step 5, then after step 3 + 5
        die("train:after-step", skip, tmp_path / "run")
    newest = sorted(locate_checkpoints(tmp_path / "run").iterdir())[-1]
    assert newest.name.endswith("00000006")
    (newest / "state.safetensors").write_bytes(b"")
    said = run(tmp_path / "run")
    assert "state.safetensors is not as it was written" in said[0]
    assert "going on after step 3" in said[1]
    assert read_results(tmp_path / "run") == undisturbed


def test_other_settings_another_order_and_no_order_start_anew(tmp_path: Path) -> None:
    small = GRID.model_copy(update={"architectures": ("topk",), "betas": (0.0,)})
    changes: list[dict[str, Any]] = [
        {"config": small.model_copy(update={"lr": 0.02})},
        {"config": small.model_copy(update={"betas": (1.0, 0.0)})},
        {"config": small.model_copy(update={"log_every": 5})},
        {"order": "another"},
        {"order": None},
        {"provenance": {"store_fingerprint": "another"}},
    ]
    for i, change in enumerate(changes):
        die("train:after-step", 3, tmp_path / str(i), small)
        assert list(locate_checkpoints(tmp_path / str(i)).iterdir())
        said = run(tmp_path / str(i), **{"config": small} | change)
        assert "going on" not in "".join(said)


def test_what_decides_nothing_may_change(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    die("train:after-step", 5, tmp_path / "run", GRID.model_copy(update={"checkpoint_every": 2}))
    assert "going on after step 4" in run(tmp_path / "run")[0]
    assert read_results(tmp_path / "run") == undisturbed


def test_going_on_under_other_versions_is_told(tmp_path: Path) -> None:
    asked, heard = iter([True, True, True, *[False] * N_STEPS]), []
    for version in ("0.1", "0.1", "0.2", "0.2"):
        heard.append(said := [])
        facts = {"versions": {"gsae-pipeline": version, "torch": "2.9"}}
        changes = {"provenance": facts, "tell": said.append, "should_stop": lambda: next(asked)}
        with contextlib.suppress(KeyboardInterrupt):
            run(tmp_path / "run", **changes)
    told = "of other versions than those to come: gsae-pipeline: expected '0.1', got '0.2'"
    assert [sum(told in line for line in said) for said in heard] == [0, 0, 1, 0]
    assert ["going on after" in "".join(said) for said in heard] == [False, True, True, True]
    assert (tmp_path / "run").is_dir()


def test_a_stop_saves_first(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    asked = iter([False, False, False, False, True])
    with pytest.raises(KeyboardInterrupt, match=r"after step 5 of 11.*same command again"):
        run(tmp_path / "run", should_stop=lambda: next(asked))
    assert not (tmp_path / "run").exists()
    assert "going on after step 5 of 11" in run(tmp_path / "run")[0]
    assert read_results(tmp_path / "run") == undisturbed


def test_a_stop_in_the_last_step_is_the_end(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    asked = iter([False] * 10 + [True])
    run(tmp_path / "run", should_stop=lambda: next(asked))
    assert read_results(tmp_path / "run") == undisturbed


def test_22_nan_never_becomes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is lost in step 6, in which a checkpoint is due."""
    step_member = module.step_member

    def lose_a_weight(member: Any, *args: Any, **settings: Any) -> Any:
        metrics = step_member(member, *args, **settings)
        if settings["config"].betas == (0.0,) and member.learner.sae.k == lost_at:
            member.learner.sae.W_enc.data[0, 0] = float("nan")
        return metrics

    config = GRID.model_copy(
        update={
            "architectures": ("topk",),
            "betas": (0.0,),
            "k_start": 20,
            "k_anneal_fraction": 1.0,
        }
    )
    lost_at = module.find_k(config, 5, N_STEPS, k=3)
    monkeypatch.setattr(module, "step_member", lose_a_weight)
    with pytest.raises(TrainError, match=r"k3-beta0/weights/W_enc after step 6.*No member is left"):
        run(tmp_path / "run", config)
    names = [path.name[9:] for path in locate_checkpoints(tmp_path / "run").iterdir()]
    assert names == ["00000003"]


def test_a_former_run_that_was_set_aside_takes_its_place_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out)
    before = read_results(out)
    die("train:between-renames", 0, out, GRID.model_copy(update={"lr": 0.02}))
    assert not out.exists()
    restore_run(out)
    assert read_results(out) == before
    restore_run(out)  # has nothing to do
    assert read_results(out) == before

    die("train:after-publish", 0, out, GRID.model_copy(update={"lr": 0.02}))
    after = read_results(out)
    assert after != before
    restore_run(out)
    assert read_results(out) == after
    assert not out.with_name(".run.old").exists()  # nor would it come back once `out` is removed


@pytest.fixture
def project(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(cached, folder)
    monkeypatch.chdir(folder)
    return folder


SHORT = ("train", "--out", "runs/it", "--steps", "30", "--set", "train.checkpoint_every=10")


def test_26_sigkill_of_the_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = spawn_cli(
        *SHORT, cwd=project, STORE_CRASH_POINT="before-rename:checkpoint", STORE_CRASH_SKIP="1"
    )
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert run_cli(*SHORT) == 0
    assert "going on after step 10 of 30" in capsys.readouterr().err
    (project / "runs/it").rename(project / "runs/resumed")
    assert run_cli(*SHORT) == 0
    for path in (project / "runs/it").rglob("sae.safetensors"):
        resumed = project / "runs/resumed" / path.relative_to(project / "runs/it")
        assert path.read_bytes() == resumed.read_bytes()


def test_11_ctrl_c_saves_and_says_how_to_go_on(project: Path) -> None:
    command = ("train", "--out", "runs/it", "--epochs", "1000000", *SHORT[5:])
    process = spawn_cli(*command, cwd=project)
    deadline = time.monotonic() + 300
    while not list(project.glob("runs/.it.checkpoints/*/state.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert "\nStopping after this step. Ctrl-C again stops at once.\n" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("Stopped after step ")
    assert last.endswith("Run the same command again to go on.")
    step = int(last.split()[3])
    states = [json.loads(p.read_text()) for p in project.glob("runs/.it.checkpoints/*/state.json")]
    assert max(state["state"]["step"] for state in states) == step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_11_a_signal_is_answered_at_once_and_the_second_is_as_before(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reached: list[int] = []
    before = signal.signal(number, lambda number, _: reached.append(number))
    try:
        with ask_to_stop() as asked:
            assert not asked()
            os.kill(os.getpid(), number)
            assert asked()
            assert capfd.readouterr().err.strip() == (
                "Stopping after this step. Ctrl-C again stops at once."
            )
            assert reached == []
            os.kill(os.getpid(), number)
            assert reached == [number]
        os.kill(os.getpid(), number)
        assert reached == [number, number]

        monkeypatch.setenv("RANK", "1")  # the first of several processes says it for all
        with ask_to_stop() as asked:
            os.kill(os.getpid(), number)
            assert asked()
        assert capfd.readouterr().err == ""
    finally:
        signal.signal(number, before)
