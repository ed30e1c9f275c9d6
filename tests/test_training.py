"""A grid that grows, and members of which one fails, from a real store."""

import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from pipeline import train as module
from pipeline import training
from pipeline.config import load_config
from pipeline.errors import TrainError
from pipeline.member import MemberSpec
from pipeline.sae.group import Group
from pipeline.training import plan_courses, plan_training, run_training
from tests.tiny import run_cli, spawn_cli

TRAIN = ("train", "--out", "runs/it", "--steps", "6")


@pytest.fixture
def project(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(cached, folder)
    monkeypatch.chdir(folder)
    return folder


def find_inodes(project: Path) -> dict[str, int]:
    files = (project / "runs/it").glob("*/sae.safetensors")
    return {path.parent.name: path.stat().st_ino for path in files}


def test_a_grid_that_grows_trains_what_is_missing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*TRAIN, "--beta", "0") == 0
    before = find_inodes(project)
    grown = ("--beta", "0", "--beta", "7", "--architecture", "topk", "--architecture", "relu")
    assert run_cli(*TRAIN, *grown, "--set", "train.log_every=2") == 0
    assert "kept as they are in runs/it: k4-beta0\n" in capsys.readouterr().err
    after = find_inodes(project)
    assert set(after) == {"k4-beta0", "k4-beta7", "relu-k4-beta0"}
    assert after["k4-beta0"] == before["k4-beta0"]
    run = json.loads((project / "runs/it/config.json").read_text())
    assert run["members"] == ["k4-beta0", "k4-beta7", "relu-k4-beta0"]

    assert run_cli(*TRAIN, *grown) == 0  # nothing is missing
    assert find_inodes(project) == after
    assert run_cli(*TRAIN, *grown, "--overwrite") == 0
    assert not set(find_inodes(project).values()) & set(after.values())


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (("--lr", "0.5"), "lr: expected 0.5, got 0.002"),
        (("--batch-size", "256"), "batch_size: expected 256, got 512"),
        (
            ("--beta", "7"),
            "one of k4-beta7 alone, with the same store and settings, got k4-beta0, ",
        ),
    ],
)
def test_another_run_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], changed: tuple[str, ...], what: str
) -> None:
    assert run_cli(*TRAIN, "--beta", "0") == 0
    before = find_inodes(project)
    beta = () if "--beta" in changed else ("--beta", "0")
    assert run_cli(*TRAIN, *beta, *changed) == 1
    err = capsys.readouterr().err
    assert what in err
    assert "pass --overwrite" in err
    assert find_inodes(project) == before


def test_22_a_bad_member_is_named_and_the_command_fails_after_the_others(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.step_member

    def step_member(member, acts, *rest, **settings):
        if member.spec.beta:
            acts = acts * float("nan")
        return original(member, acts, *rest, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, "step_member", step_member)
        assert run_cli(*TRAIN, "--beta", "0", "--beta", "7") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("Error: loss of k4-beta7 at step 1: expected a finite loss, got nan")
    before = find_inodes(project)
    assert set(before) == {"k4-beta0"}

    assert run_cli(*TRAIN, "--beta", "0", "--beta", "7") == 0  # tried again, and only it
    after = find_inodes(project)
    assert set(after) == {"k4-beta0", "k4-beta7"}
    assert after["k4-beta0"] == before["k4-beta0"]
    assert json.loads((project / "runs/it/config.json").read_text())["failed"] == {}


@pytest.mark.usefixtures("project")
def test_what_another_process_finished_before_the_lock_was_ours_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config(Path("configs/tiny.yaml"), {"train.betas": [0.0], "train.steps": 4}).train
    plan, out = plan_training(config, Path("stores/tiny")), Path("runs/it")
    original, published = training.lock_run, []

    @contextmanager
    def lock_late(folder: Path) -> Iterator[None]:
        if not published:
            published.append(folder)
            run_training(plan, config, folder, device="cpu", provenance={})
            published.append((folder / "k4-beta0/sae.safetensors").stat().st_ino)
        with original(folder):
            yield

    monkeypatch.setattr(training, "lock_run", lock_late)
    said: list[str] = []
    run = run_training(plan, config, out, device="cpu", provenance={}, tell=said.append)
    assert said == ["kept as they are in runs/it: k4-beta0"]
    assert published == [out, (run.folder / "k4-beta0/sae.safetensors").stat().st_ino]


@pytest.mark.usefixtures("project")
def test_a_missing_logger_is_named_before_anything_is_locked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "pipeline.loggers.importlib.util.find_spec",
        lambda name, *rest: None if name == "wandb" else find_spec(name, *rest),
    )
    assert run_cli(*TRAIN, "--logger", "wandb") == 1
    assert "expected the package wandb" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_checkpoints_of_a_larger_grid_outlive_a_smaller_one(project: Path) -> None:
    grown = (*TRAIN, "--beta", "0", "--beta", "7", "--set", "train.checkpoint_every=2")
    assert run_cli(*TRAIN, "--beta", "0") == 0
    killed = spawn_cli(
        *grown, cwd=project, STORE_CRASH_POINT="train:after-step", STORE_CRASH_SKIP="4"
    )
    killed.communicate()
    checkpoints = project / "runs/.it.checkpoints"
    before = sorted(path.name for path in checkpoints.iterdir())
    assert before

    assert run_cli(*TRAIN, "--beta", "0") == 0  # has all that it asks for
    assert sorted(path.name for path in checkpoints.iterdir()) == before
    saved = shutil.copytree(checkpoints, project / "saved")
    assert run_cli(*grown) == 0
    assert not checkpoints.exists()

    shutil.copytree(saved, checkpoints)  # as if it had died once it had published
    with FileLock(project / "runs/.it.lock"):
        assert run_cli(*grown) == 0
    assert checkpoints.exists()  # the one who holds the lock may need them
    assert run_cli(*grown) == 0
    assert not checkpoints.exists()


@pytest.mark.usefixtures("project")
def test_a_folder_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "--steps", "6", "--out", ".") == 1
    assert "run folder at .: expected a folder's name, got none. Pass" in capsys.readouterr().err


@pytest.mark.usefixtures("project")
def test_a_batch_with_fewer_rows_than_processes_is_refused() -> None:
    group = Group()
    group.world_size = 3
    config = load_config(Path("configs/tiny.yaml"), {"train.batch_size": 2}).train
    plan = plan_training(config, Path("stores/tiny"))
    with pytest.raises(TrainError, match="a row for each of 3 processes, got 2"):
        run_training(plan, config, Path("runs/it"), device="cpu", provenance={}, group=group)
    assert not Path("runs").exists()


def test_rows_stay_as_they_are_stored_until_a_step(project: Path) -> None:
    """In 16 bits, of which half as many go to a GPU."""
    config = load_config(project / "configs" / "tiny.yaml")
    plan = plan_training(config.train, project / "stores" / "tiny")
    course, *_ = plan_courses(plan, config.train, device="cpu", model=config.model)
    batch = next(iter(course.open_stream(0)))
    assert [batch.acts.dtype, batch.grads.dtype] == [torch.float16, torch.float16]


@pytest.mark.usefixtures("project")
def test_a_hook_that_several_layers_have_is_chosen_by_its_layer() -> None:
    assert run_cli("cache", "--layer", "0", "--layer", "1", "--out", "stores/two") == 0
    config = load_config(Path("configs/tiny.yaml"), {"train.hook": "resid_post"}).train
    with pytest.raises(TrainError, match="--layer for its only hook"):
        plan_training(config, Path("stores/two"))
    plan = plan_training(config, Path("stores/two"), [0])
    assert plan.stream.hook == "blocks.0.hook_resid_post"


def test_a_stop_after_the_first_course_says_how_not_to_begin_again(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --overwrite the same command would train what it has finished once more."""
    grid = ("--beta", "0", "--architecture", "topk", "--architecture", "end_to_end")
    assert run_cli(*TRAIN, *grid) == 0
    before, real = find_inodes(project), training.train

    def stop_in_the_second(*args: object, specs: Sequence[MemberSpec], **kwargs: object) -> object:
        if specs[0].architecture == "end_to_end":
            kwargs["should_stop"] = lambda: True
        return real(*args, specs=specs, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(training, "train", stop_in_the_second)
    assert run_cli(*TRAIN, *grid, "--overwrite") == 130
    said = capsys.readouterr().err
    assert "to go on. Leave out --overwrite then, which would train the finished ones" in said
    halfway = find_inodes(project)
    assert set(halfway) == {"k4-beta0"}
    assert halfway["k4-beta0"] != before["k4-beta0"]

    monkeypatch.undo()
    monkeypatch.chdir(project)
    assert run_cli(*TRAIN, *grid) == 0
    assert "going on after step 1 of" in capsys.readouterr().err
    assert find_inodes(project)["k4-beta0"] == halfway["k4-beta0"]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--d-sae", "1000000000000"), "Error: memory: expected enough for the settings, got: "),
        (("--device", "meta"), "run.device: expected auto, cpu, or a cuda device that is here"),
    ],
)
def test_what_no_machine_has_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], words: str
) -> None:
    assert run_cli(*TRAIN, *arguments) != 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last


def test_end_to_end_and_tokenized_members_train_beside_the_others(project: Path) -> None:
    kinds = ("topk", "tokenized", "end_to_end")
    grid = [part for kind in kinds for part in ("--architecture", kind)]
    assert run_cli(*TRAIN, "--beta", "0", *grid) == 0
    assert set(find_inodes(project)) == {
        *("k4-beta0", "tokenized-k4-beta0", "end_to_end-k4-beta0"),
    }
    config = json.loads((project / "runs/it/end_to_end-k4-beta0/config.json").read_text())
    assert config["architecture"] == "topk"
    assert config["training"]["objective"] == "end_to_end"
