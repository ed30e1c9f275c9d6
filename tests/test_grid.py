"""A grid over workers: the files of one process, whoever dies or fails on the way."""

import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import grid
from pipeline.cli.options import Invocation, invoke
from pipeline.cluster import open_workers
from pipeline.errors import TrainError
from pipeline.grid import Share, ShareResult, plan_grid, run_grid, split_members
from pipeline.runs import Run
from pipeline.training import plan_training, run_training
from tests.tiny import read_tree, spawn_cli

SETTINGS = (
    *("train.architectures=[topk, batch_topk]", "train.betas=[0, 1e4]", "train.precision=float32"),
    *("train.steps=6", "train.checkpoint_every=2", "train.log_every=2", "train.epochs=1"),
)
NAMES = ("k4-beta0", "k4-beta1e4", "batch_topk-k4-beta0", "batch_topk-k4-beta1e4")


class Here:
    """As many workers as wanted, all of them this process, one after the other."""

    def __init__(self, n_workers: int, wrap: Callable[..., ShareResult] | None = None) -> None:
        self.n_workers, self.wrap = n_workers, wrap
        self.given: list[tuple[str, ...]] = []

    def __call__(
        self, function: Callable[[Share], ShareResult], parts: Iterable[Share]
    ) -> Iterator[ShareResult]:
        for part in parts:
            self.given.append(part.members)
            yield self.wrap(function, part) if self.wrap else function(part)


@pytest.fixture(scope="module")
def project(cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny project with a run that one process trained."""
    folder = tmp_path_factory.mktemp("grid") / "project"
    shutil.copytree(cached, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = configure().config.train
        plan = plan_training(config, Path("stores/tiny"))
        run_training(plan, config, folder / "runs/alone", device="cpu", provenance={"by": "test"})
        yield folder


def configure(*more: str) -> Invocation:
    changed = {setting.partition("=")[0] for setting in more}
    kept = [setting for setting in SETTINGS if setting.partition("=")[0] not in changed]
    return invoke(None, {}, (*kept, "run.threads=1", *more))


def train_grid(
    out: Path, mapper: Any, *more: str, tell: Callable[[str], None] | None = None
) -> Run:
    config = configure(*more).config.train
    plan, job = plan_grid(
        config, out, source=Path("stores/tiny"), device="cpu", provenance={"by": "test"}
    )
    return run_grid(plan, job, config, out, nullcontext(mapper), tell=tell)


def read_results(out: Path) -> dict[str, Any]:
    """Every file's content, but for the rate, which is a matter of time."""
    results: dict[str, Any] = {}
    for name, content in read_tree(out).items():
        if name.endswith("history.parquet"):
            results[name] = pq.read_table(out / name).drop(["tokens_per_s"]).to_pylist()
        elif "tokens_per_s" not in name and not name.endswith("/metrics.json"):
            results[name] = content
    return results


@given(st.integers(1, 12), st.integers(1, 12))
def test_shares_hold_each_member_once_and_are_about_equal(n_members: int, n_workers: int) -> None:
    recipes = {f"m{i}": {"k": i} for i in range(n_members)}
    shares = split_members(recipes, n_workers)
    assert sorted(name for share in shares for name in share.members) == sorted(recipes)
    sizes = [len(share.members) for share in shares]
    assert len(sizes) == min(n_members, n_workers)
    assert max(sizes) - min(sizes) <= 1
    assert [share.index for share in shares] == list(range(len(shares)))
    assert len({share.folder for share in shares}) == len(shares)


def test_a_share_of_other_settings_has_another_folder() -> None:
    (one,), (other,) = split_members({"a": {"k": 1}}, 1), split_members({"a": {"k": 2}}, 1)
    assert one.members == other.members
    assert one.folder != other.folder


@pytest.mark.parametrize("n_workers", [1, 3])
def test_shares_make_the_files_of_one_process(project: Path, n_workers: int) -> None:
    out, mapper = project / f"runs/split{n_workers}", Here(n_workers)
    run = train_grid(out, mapper)
    assert run.members == NAMES
    assert mapper.given == [NAMES[i::n_workers] for i in range(n_workers)]
    assert read_results(out) == read_results(project / "runs/alone")
    assert not list(out.parent.glob(f".{out.name}.grid*"))


def test_a_grid_that_grows_keeps_what_it_has(project: Path) -> None:
    out = project / "runs/grown"
    train_grid(out, Here(1), "train.architectures=[topk]")
    weights = out / "k4-beta0/sae.safetensors"
    first = weights.stat().st_ino
    mapper = Here(4)
    train_grid(out, mapper)
    assert mapper.given == [("batch_topk-k4-beta0",), ("batch_topk-k4-beta1e4",)]
    assert weights.stat().st_ino == first  # the file, not one like it
    results = read_results(out)
    alone = read_results(project / "runs/alone")
    assert results.keys() == alone.keys()
    of_members = [name for name in alone if name.endswith(("safetensors", "parquet"))]
    assert [results[name] for name in of_members] == [alone[name] for name in of_members]
    assert train_grid(out, Here(0)).members == NAMES  # nothing is missing: nobody is asked


def test_a_stopped_grid_goes_on_with_the_missing_shares(project: Path) -> None:
    out = project / "runs/stopped"

    def stop_at_second(function: Callable[[Share], ShareResult], share: Share) -> ShareResult:
        if share.index == 1:
            raise KeyboardInterrupt
        return function(share)

    with pytest.raises(KeyboardInterrupt):
        train_grid(out, Here(2, stop_at_second))
    assert not out.exists()
    mapper = Here(4)
    train_grid(out, mapper)
    assert mapper.given == [("k4-beta1e4",), ("batch_topk-k4-beta1e4",)]
    assert read_results(out) == read_results(project / "runs/alone")


def test_shares_that_are_asked_to_stop_save_first_and_go_on(project: Path) -> None:
    out, config = project / "runs/asked", configure().config.train
    plan, job = plan_grid(
        config, out, source=Path("stores/tiny"), device="cpu", provenance={"by": "test"}
    )

    def stop_at_second(function: Callable[[Share], ShareResult], share: Share) -> ShareResult:
        if share.index == 1:
            job.stop()
        return function(share)

    finished: list[ShareResult] = []
    with pytest.raises(KeyboardInterrupt, match=r"saved\. Run the same command again to go on"):
        run_grid(
            *(plan, job, config, out, nullcontext(Here(3, stop_at_second))),
            on_share=finished.append,
        )
    assert [result.share.index for result in finished] == [0]
    assert len([*job.work.glob(".*.checkpoints/*-00000001")]) == 2  # after the step in hand
    train_grid(out, Here(2))
    assert read_results(out) == read_results(project / "runs/alone")


def test_a_share_of_other_settings_is_passed_over_and_told(project: Path) -> None:
    out = project / "runs/changed"

    def stop_at_second(function: Callable[[Share], ShareResult], share: Share) -> ShareResult:
        if share.index == 1:
            raise KeyboardInterrupt
        return function(share)

    with pytest.raises(KeyboardInterrupt):
        train_grid(out, Here(2, stop_at_second), "train.lr=1e-3")
    said: list[str] = []
    mapper = Here(1)
    train_grid(out, mapper, tell=said.append)
    (line,) = said
    assert line.startswith("share passed over, and its members trained again: run at ")
    assert line.endswith("k4-beta0 with other ones (lr: expected 0.002, got 0.001).")
    assert mapper.given == [NAMES]


def test_what_another_process_finished_before_the_lock_was_ours_is_kept(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = project / "runs/late", grid.open_run

    @contextmanager
    def open_late(folder: Path) -> Iterator[Path]:
        shutil.copytree(project / "runs/alone", folder)
        with original(folder) as work:
            yield work

    monkeypatch.setattr(grid, "open_run", open_late)
    mapper = Here(1)
    assert train_grid(out, mapper).members == NAMES
    assert mapper.given == []


def test_a_share_that_fails_is_reported_and_the_others_are_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.member.take_step", functools.partial(_fail, "batch_topk"))
    run = train_grid(project / "runs/partly", Here(4))
    assert run.members == NAMES[:2]
    assert run.failed.keys() == set(NAMES[2:])
    assert "loss of batch_topk-k4-beta0 at step 1" in run.failed["batch_topk-k4-beta0"]
    alone = read_results(project / "runs/alone/k4-beta0")
    assert read_results(run.folder / "k4-beta0") == alone

    monkeypatch.setattr("pipeline.member.take_step", functools.partial(_fail, ""))
    with pytest.raises(TrainError, match="No member is left, and nothing was written"):
        train_grid(project / "runs/none", Here(2))
    assert not (project / "runs/none").exists()


def _fail(architecture: str, learner: Any, *args: Any, **settings: Any) -> Any:
    from pipeline.sae import LossNotFinite, take_step

    if learner.sae.architecture.startswith(architecture):
        raise LossNotFinite("expected a finite loss, got nan")
    return take_step(learner, *args, **settings)


# What runs on dask's workers.


def die_once(token: Path, function: Callable[[Share], ShareResult], share: Share) -> ShareResult:
    """SIGKILL after step 5 of the second share, once: there is a checkpoint of step 4."""
    if share.index == 1:
        os.environ |= {
            "STORE_CRASH_POINT": "train:after-step",
            "STORE_CRASH_SKIP": "4",
            "STORE_CRASH_TOKEN": str(token),
        }
    result = function(share)
    return result._replace(failed={"pid": str(os.getpid())})


def test_workers_of_which_one_dies_make_the_files_of_one_process(
    project: Path, tmp_path: Path
) -> None:
    out, token = project / "runs/workers", tmp_path / "token"
    token.touch()
    run = configure("run.workers=2", "run.retries=1").config
    plan, job = plan_grid(
        run.train, out, source=Path("stores/tiny"), device="cpu", provenance={"by": "test"}
    )
    finished: list[ShareResult] = []

    @contextmanager
    def workers() -> Iterator[Any]:
        with open_workers(run.run, job, part="share") as mapper:

            class Deadly:
                n_workers = mapper.n_workers

                def __call__(self, function: Any, parts: Any) -> Any:
                    return mapper(functools.partial(die_once, token, function), parts)

            yield Deadly()

    trained = run_grid(plan, job, run.train, out, workers(), on_share=finished.append)

    assert not token.exists()  # it died
    assert trained.members == NAMES
    assert {r.share.members for r in finished} == {NAMES[::2], NAMES[1::2]}
    assert str(os.getpid()) not in {r.failed["pid"] for r in finished}
    assert read_results(out) == read_results(project / "runs/alone")


def test_11_ctrl_c_has_workers_save_first(project: Path) -> None:
    out = project / "runs/interrupted"
    settings = ("train.betas=[0, 1e4]", "train.epochs=1000000", "train.checkpoint_every=1000000")
    options = [word for setting in settings for word in ("--set", setting)]
    process = spawn_cli("train", "--out", str(out), "--workers", "2", *options, cwd=project)
    deadline = time.monotonic() + 300
    while len([*project.glob("runs/.interrupted.grid/.*.part/live/*/metrics.json")]) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert [line for line in err.splitlines() if line] == [
        "Stopping after this step. Ctrl-C again stops at once.",
        "Stopped; all workers' steps are saved. Run the same command again to go on.",
    ]
    saved = [*project.glob("runs/.interrupted.grid/.*.checkpoints/*/state.json")]
    assert len(saved) == 2


def test_a_worker_that_sees_another_store_is_refused(project: Path) -> None:
    config = configure("run.workers=1").config
    _, job = plan_grid(
        config.train,
        project / "runs/other",
        source=Path("stores/tiny"),
        device="cpu",
        provenance={},
    )
    found = {name: find() for name, find in job.find_inputs().items()}
    assert found == job.inputs
    manifest = project / "stores/tiny/manifest.json"
    assert json.loads(manifest.read_text())["checksum"] == job.inputs["store"]
