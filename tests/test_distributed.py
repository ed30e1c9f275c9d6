"""Several processes train what one would: real ones, that send their messages by gloo."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline.distributed import open_group
from pipeline.errors import ConfigError
from pipeline.sae.group import ALONE
from tests.group_process import TIMEOUT_S, Trained, list_cases, load, start, train_case
from tests.tiny import make_project, run_cli

START_S = 60  # for processes with torch on a busy machine
FORKS = multiprocessing.get_context("forkserver")  # of a process that imports all once
FORKS.set_forkserver_preload(["tests.group_process", "transformer_lens.model_bridge"])


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def start_group(
    world_size: int, out: Path, deed: str, *args: str, **environment: str
) -> Iterator[list[ForkServerProcess]]:
    """The processes of a group; those that are still there at the end are killed."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(find_port())}
    processes = []
    for rank in range(world_size):
        variables = place | {"RANK": str(rank), "WORLD_SIZE": str(world_size)} | environment
        processes.append(FORKS.Process(target=start, args=(variables, out, deed, *args)))
        processes[-1].start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


PAIRS = [(n, case) for n in (2, 3) for case in list_cases(n)]  # processes, what they train


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """By the number of processes, for each of them, where its results of a case {} are."""
    results = {}
    for n in (2, 3):
        out = tmp_path_factory.mktemp("group")
        with start_group(n, out, "train") as processes:
            for rank, process in enumerate(processes):
                process.join(START_S)
                assert process.exitcode == 0, (out / f"{rank}.err").read_text()
        results[n] = [f"{out}/{{}}/{n}-{rank}" for rank in range(n)]
    return results


def read(paths: list[str], case: str) -> list[Trained]:
    return [load(Path(path.format(case))) for path in paths]


@pytest.mark.parametrize(("n", "case"), PAIRS)
def test_a_group_trains_what_one_process_trains(
    groups: dict[int, list[str]], n: int, case: str
) -> None:
    """To the tolerance that docs/parallel.md states: the order of the sums is all that differs."""
    alone = train_case(case, ALONE)
    for trained in read(groups[n], case):
        assert trained.tensors.keys() == alone.tensors.keys()
        for name, expected in alone.tensors.items():
            torch.testing.assert_close(
                trained.tensors[name], expected, rtol=1e-4, atol=1e-5, msg=name
            )
        for step, expected in zip(trained.metrics, alone.metrics, strict=True):
            assert step == {
                name: value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
                for name, value in expected.items()
            }


@pytest.mark.parametrize(("n", "case"), PAIRS)
def test_all_processes_have_the_same_bits(groups: dict[int, list[str]], n: int, case: str) -> None:
    first, *others = read(groups[n], case)
    for other in others:
        assert other.metrics == first.metrics
        for name, tensor in first.tensors.items():
            assert torch.equal(other.tensors[name], tensor), name


def test_the_cases_show_what_they_are_for() -> None:
    plain, clipped = train_case("topk-beta", ALONE), train_case("clipped", ALONE)
    assert not torch.allclose(plain.tensors["W_enc"], clipped.tensors["W_enc"])
    auxk = train_case("auxk", ALONE)
    assert 0 < auxk.metrics[-1]["dead_latents"] < 24
    assert auxk.metrics[-1]["penalty"] > 0
    assert plain.metrics[-1]["overlap"] < 1


@pytest.mark.parametrize("n", [2, 3])
def test_sums_and_gathers_of_odd_shapes(groups: dict[int, list[str]], n: int) -> None:
    for trained in read(groups[n], "odd"):
        total = n * (n + 1) / 2
        assert torch.equal(trained.tensors["across"], torch.full((3, 2), total))
        assert trained.tensors["count"].item() == n * 2**40 + sum(range(n))
        expected = [10 * rank + i for rank in range(n) for i in range(rank)]
        assert trained.tensors["rows"].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("deed", ["die", "stall"])
def test_a_process_that_dies_or_stalls_ends_the_others(tmp_path: Path, deed: str) -> None:
    with start_group(3, tmp_path, deed) as processes:
        if deed == "die":
            processes[1].join(START_S)
            assert processes[1].exitcode == -signal.SIGKILL
        started = time.monotonic()
        for rank in (0, 2):
            processes[rank].join(START_S)
            assert processes[rank].exitcode == 1
            (line,) = (tmp_path / f"{rank}.err").read_text().splitlines()
            assert line.startswith(f"Error: process {rank} of 3: expected messages from the others")
        # A death is noticed at once, where a message may take 60 s; a stall, after that time.
        assert time.monotonic() - started < TIMEOUT_S + 10
        assert processes[1].is_alive() is (deed == "stall")


def test_without_variables_of_torchrun_a_process_is_alone(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with open_group("cpu") as place:
        assert place == (ALONE, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some clusters set it for other purposes
    with open_group("cuda") as place:
        assert place == (ALONE, "cuda")


def test_more_processes_than_gpus_is_one_line(monkeypatch) -> None:
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in (values | {"LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(ConfigError, match="a GPU for each process, got cuda and 1 GPUs"),
        open_group("cuda"),
    ):
        pass


# The command, on the tiny project's store.

N_STEPS = 12
TRAIN = (
    *("train", "--architecture", "topk", "--architecture", "batch_topk", "--beta", "1e4"),
    *("--steps", str(N_STEPS), "--set", "train.checkpoint_every=3", "--set", "train.log_every=1"),
    *("--set", "train.aux_weight=0.1", "--set", "train.average_decay=0.9"),
)
MEMBERS = ("k4-beta1e4", "batch_topk-k4-beta1e4")


@pytest.fixture(scope="module")
def project(cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project with a run that one process trained undisturbed."""
    folder = tmp_path_factory.mktemp("grouped") / "project"
    shutil.copytree(cached, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_cli(*TRAIN, "--out", "runs/alone") == 0
    return folder


def check_as_alone(project: Path, out: str, members: tuple[str, ...] = MEMBERS) -> None:
    """The weights are one process's, and so is every step's loss: no row came twice or never."""
    for member in members:
        alone, got = (project / "runs" / name / member for name in ("alone", out))
        weights = load_file(got / "sae.safetensors")
        for name, expected in load_file(alone / "sae.safetensors").items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-5, msg=name)
        rows, expected = (
            pq.read_table(folder / "history.parquet").to_pylist() for folder in (got, alone)
        )
        assert [row["step"] for row in rows] == list(range(1, N_STEPS + 1))
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in expected]
        losses = [row["loss"] for row in expected]
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)


def test_25_torchrun_a_rank_dies_and_other_numbers_of_ranks_go_on(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*TRAIN, "--out", "runs/again")
    token = project / "token"
    kill = {"STORE_CRASH_POINT": "train:after-step", "STORE_CRASH_TOKEN": str(token)}

    token.touch()  # one of two dies after step 5
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline")
    with subprocess.Popen(
        [sys.executable, "-m", *torchrun, *command],
        cwd=project,
        env=os.environ | kill | {"STORE_CRASH_SKIP": "4", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            await_gone(token)
            died = time.monotonic()
            out, err = process.communicate(timeout=START_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1, err
    assert time.monotonic() - died < 20
    assert "Signal 9 (SIGKILL)" in err  # torchrun names the cause
    assert "trained" not in out

    token.touch()  # one of three dies after step 8, five steps further on
    environment = kill | {"STORE_CRASH_SKIP": "4"}
    with start_group(3, project, "command", *command, **environment) as processes:
        for process in processes:
            process.join(START_S)
        codes = sorted(process.exitcode for process in processes)
        assert codes == [-signal.SIGKILL, 1, 1]
    errors = [(project / f"{rank}.err").read_text() for rank in range(3)]
    assert "going on after step 3 of 12" in errors[0]
    assert "going on" not in "".join(errors[1:])
    assert sum("expected messages from the others" in error for error in errors) == 2
    assert not (project / "runs/again").exists()

    with monkeypatch.context() as patch:
        patch.chdir(project)
        assert run_cli(*command) == 0
    check_as_alone(project, "again")


def test_25_end_to_end_too_where_blocks_have_unequal_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two dies after step 5; three go on after step 3."""
    project, rng = make_project(tmp_path / "project"), random.Random(0)
    for i in range(300):  # from one row, of position 0 alone, to as many as a block has
        text = "".join(rng.choices("abcdefgh", k=rng.choice((2, 9, 14))))
        (project / "texts" / f"short{i}.txt").write_text(text)
    monkeypatch.chdir(project)
    assert run_cli("cache", "--set", "corpus.packing=per_document", "--out", "stores/tiny") == 0
    command = ("train", "--architecture", "end_to_end", "--beta", "1e4", "--batch-size", "96")
    command = (*command, *TRAIN[7:])
    assert run_cli(*command, "--out", "runs/alone") == 0

    command = (*command, "--out", "runs/again")
    (project / "token").touch()
    kill = {"STORE_CRASH_POINT": "train:after-step", "STORE_CRASH_TOKEN": "token"}
    for n, environment in ((2, kill | {"STORE_CRASH_SKIP": "4"}), (3, {})):
        with start_group(n, project, "command", *command, **environment) as processes:
            for process in processes:
                process.join(START_S)
            codes = sorted(process.exitcode for process in processes)
            assert codes == ([-signal.SIGKILL, 1] if n == 2 else [0, 0, 0])
    assert "going on after step 3 of 12" in (project / "0.err").read_text()
    check_as_alone(project, "again", ("end_to_end-k4-beta1e4",))


def test_one_process_of_a_group_prints_and_writes(project: Path) -> None:
    with start_group(2, project, "command", *TRAIN, "--out", "runs/two") as processes:
        for process in processes:
            process.join(START_S)
            assert process.exitcode == 0
    check_as_alone(project, "two")
    assert "trained k4-beta1e4, batch_topk-k4-beta1e4" in (project / "0.out").read_text()
    assert "6,144 tokens of 6,144" in (project / "0.err").read_text()
    assert [(project / name).read_text() for name in ("1.out", "1.err")] == ["", ""]


def test_ctrl_c_of_one_process_saves_for_all(project: Path) -> None:
    command = ("train", "--out", "runs/stopped", "--steps", "2000", "--epochs", "40")
    command = (*command, "--set", "train.checkpoint_every=100000")
    (project / "0.err").unlink(missing_ok=True)
    with start_group(2, project, "command", *command) as processes:
        await_text(project / "0.err", "tokens of")
        os.kill(processes[1].pid, signal.SIGINT)  # the steps of the other may be one ahead
        for process in processes:
            process.join(START_S)
            assert process.exitcode == 130
    assert "which is saved" in (project / "0.err").read_text()
    (checkpoint,) = (project / "runs/.stopped.checkpoints").iterdir()
    assert (checkpoint / "state.json").is_file()


def await_gone(path: Path) -> None:
    deadline = time.monotonic() + START_S
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def await_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + START_S
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_under_torchrun_are_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(project)
    assert run_cli("train", "--workers", "2") == 2
    assert "run.workers under torchrun: expected one of the two" in capsys.readouterr().err
