import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

from pipeline import train as module
from pipeline.errors import TrainError
from pipeline.member import plan_members
from pipeline.sae import load_sae
from pipeline.sae.group import Group
from pipeline.train import StepReport, train
from store import Batch
from tests.test_member import make_config


def stream(n: int, *, seed: int = 0, d_model: int = 8) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        acts = torch.randn(64, d_model, generator=generator) * 5 + 1
        grads = torch.randn(64, d_model, generator=generator)
        rows = torch.arange(64)
        yield Batch(acts, grads, rows, torch.ones(64), torch.full((64,), i), rows)


def opens(n: int, **settings: int) -> Callable[[int], Iterator[Batch]]:
    return lambda first: itertools.islice(stream(n, **settings), first, None)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}


def test_a_run_holds_what_its_docstring_lists(tmp_path: Path) -> None:
    out = tmp_path / "runs/demo"
    config = make_config(betas=(0.0, 1e5), ks=(3, 4), log_every=4)

    metrics = train(
        config,
        opens(10),
        d_model=8,
        n_steps=10,
        out=out,
        provenance={"hook": "blocks.7.hook_resid_post"},
    )

    names = ["k3-beta0", "k3-beta1e5", "k4-beta0", "k4-beta1e5"]
    run = json.loads((out / "config.json").read_text())
    assert run["train"] == config.model_dump(mode="json")
    assert run["members"] == names
    assert (run["n_steps"], run["tokens"], run["hook"]) == (10, 640, "blocks.7.hook_resid_post")
    assert json.loads((out / "summary.json").read_text()) == {
        name: metrics[name]._asdict() for name in names
    }
    for name in names:
        sae = load_sae(out / name)
        assert f"k{sae.k}-beta{'1e5' if sae.beta else '0'}" == name
        saved = json.loads((out / name / "config.json").read_text())["training"]
        assert saved["hook"] == "blocks.7.hook_resid_post"
        rows = pq.read_table(out / name / "history.parquet").to_pylist()
        assert [row["step"] for row in rows] == [1, 4, 8, 10]
        assert rows[-1]["loss"] == metrics[name].loss < rows[0]["loss"]
        assert [row["overlap"] for row in rows if row["overlap"] is None] == []
        live = json.loads((out / "live" / name / "metrics.json").read_text())
        assert live == rows[-1]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*names, "config.json", "summary.json", "live"]
    )
    assert not list(out.parent.glob(".*.part"))


def test_reports_count_steps_and_tokens(tmp_path: Path) -> None:
    reports: list[StepReport] = []
    config = make_config(betas=(0.0, 1.0), log_every=3)

    train(config, opens(9), d_model=8, n_steps=5, out=tmp_path / "run", on_step=reports.append)

    assert [r.step for r in reports] == [1, 2, 3, 4, 5]
    assert [r.tokens for r in reports] == [64, 128, 192, 256, 320]
    assert [r.logged for r in reports] == [True, False, True, False, True]
    for report in reports:
        assert list(report.metrics) == ["k3-beta0", "k3-beta1"]
        assert report.tokens_per_s > 0
        for metrics in report.metrics.values():
            assert (metrics.overlap is not None) == report.logged
            assert math.isfinite(metrics.nmse)


def test_each_batch_is_read_once_and_none_beyond_the_last_step(tmp_path: Path) -> None:
    batches = stream(6)
    train(
        make_config(betas=(0.0, 1.0)), lambda _: batches, d_model=8, n_steps=4, out=tmp_path / "run"
    )
    assert next(batches).block[0] == 4


def test_weights_are_the_same_in_every_run_and_beside_any_other_member(tmp_path: Path) -> None:
    both = make_config(betas=(0.0, 30.0), ks=(3, 4))
    alone = make_config(betas=(30.0,))
    for name, config in (("first", both), ("second", both), ("alone", alone)):
        train(config, opens(6), d_model=8, n_steps=6, out=tmp_path / name)

    weights = [
        (tmp_path / name / "k3-beta30/sae.safetensors").read_bytes()
        for name in ("first", "second", "alone")
    ]
    assert weights[0] == weights[1] == weights[2]


def test_seeds_and_betas_matter(tmp_path: Path) -> None:
    config = make_config(betas=(0.0, 30.0), seeds=(0, 1))
    train(config, opens(3), d_model=8, n_steps=3, out=tmp_path / "run")
    weights = {p.read_bytes() for p in tmp_path.rglob("sae.safetensors")}
    assert len(weights) == 4


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    train(make_config(), opens(2), d_model=8, n_steps=2, out=tmp_path / "run")
    return tmp_path / "run"


def test_a_run_replaces_an_earlier_one(earlier: Path) -> None:
    train(make_config(betas=(7.0,)), opens(3), d_model=8, n_steps=3, out=earlier)
    assert json.loads((earlier / "config.json").read_text())["members"] == ["k3-beta7"]
    assert not (earlier / "k3-beta0").exists()
    assert [p.name for p in earlier.parent.iterdir() if p.name.endswith((".part", ".old"))] == []


def test_an_infinite_loss_stops_training_and_spares_the_earlier_run(earlier: Path) -> None:
    before = read_files(earlier)

    # the squared error of rows this large overflows float32
    def blow_up() -> Iterator[Batch]:
        for i, batch in enumerate(stream(4)):
            yield batch._replace(acts=batch.acts * 1e25) if i == 2 else batch

    with pytest.raises(
        TrainError, match=r"loss of k3-beta0 at step 3: .* got inf.*No member is left"
    ):
        train(make_config(), lambda _: blow_up(), d_model=8, n_steps=4, out=earlier)
    assert read_files(earlier) == before


@pytest.mark.parametrize("name", ["acts", "grads"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_value_that_is_not_finite_is_named_by_its_place(
    earlier: Path, name: str, value: float
) -> None:
    before = read_files(earlier)
    batches = list(stream(2))
    getattr(batches[1], name)[5, 3] = value

    with pytest.raises(TrainError, match=f"{name} at step 2, block 1, position 5"):
        train(make_config(), lambda _: batches, d_model=8, n_steps=2, out=earlier)
    assert read_files(earlier) == before


def test_too_few_batches_and_none_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"expected 5 batches, got 2 \(128 rows\)"):
        train(make_config(), opens(2), d_model=8, n_steps=5, out=tmp_path / "run")
    with pytest.raises(TrainError, match="got 0"):
        train(make_config(), opens(2), d_model=8, n_steps=0, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_width_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"acts at step 1: expected \[batch, 9\], got \[64, 8\]"):
        train(make_config(), opens(2), d_model=9, n_steps=2, out=tmp_path / "run")


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(TrainError, match="expected an earlier run"):
            train(make_config(), opens(2), d_model=8, n_steps=2, out=out)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    batches = stream(2)
    with pytest.raises(TrainError, match=r"run folder at .*file/run: expected a writable place"):
        train(make_config(), lambda _: batches, d_model=8, n_steps=2, out=tmp_path / "file/run")
    assert next(batches).block[0] == 0


def test_two_runs_into_one_folder_at_once_are_refused(earlier: Path) -> None:
    before = read_files(earlier)
    with (
        FileLock(earlier.with_name(".run.lock")),
        pytest.raises(TrainError, match="expected no other writer"),
    ):
        train(make_config(), opens(2), d_model=8, n_steps=2, out=earlier)
    assert read_files(earlier) == before


def break_member(monkeypatch: pytest.MonkeyPatch, *names: str, step: int) -> None:
    """From this step on the loss of these members is NaN."""
    original, count = module.step_member, itertools.count()

    def step_member(member: Any, acts: Any, *rest: Any, **settings: Any) -> Any:
        if member.spec.name in names and next(count) >= (step - 1) * len(names):
            acts = acts * torch.nan
        return original(member, acts, *rest, **settings)

    monkeypatch.setattr(module, "step_member", step_member)


def test_22_a_bad_member_stops_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(betas=(0.0, 30.0), ks=(3, 4), checkpoint_every=2)
    said: list[str] = []
    train(config, opens(6), d_model=8, n_steps=6, out=tmp_path / "whole")
    break_member(monkeypatch, "k3-beta30", step=3)
    metrics = train(
        config, opens(6), d_model=8, n_steps=6, out=tmp_path / "run", order="o", tell=said.append
    )

    others = ["k3-beta0", "k4-beta0", "k4-beta30"]
    assert list(metrics) == others
    run = json.loads((tmp_path / "run/config.json").read_text())
    assert run["members"] == others
    assert list(run["failed"]) == ["k3-beta30"]
    assert (
        "loss of k3-beta30 at step 3: expected a finite loss, got nan" in run["failed"]["k3-beta30"]
    )
    assert len(said) == 1
    assert "k3-beta30 at step 3" in said[0]
    assert not (tmp_path / "run/k3-beta30").exists()
    assert list(json.loads((tmp_path / "run/summary.json").read_text())) == others
    for name in others:
        weights = [
            (tmp_path / out / name / "sae.safetensors").read_bytes() for out in ("run", "whole")
        ]
        assert weights[0] == weights[1]


def test_22_if_all_fail_the_run_fails(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_files(earlier)
    break_member(monkeypatch, "k3-beta0", "k3-beta30", step=2)
    with pytest.raises(
        TrainError, match=r"k3-beta0 at step 2.*k3-beta30 at step 2.*No member is left"
    ):
        train(make_config(betas=(0.0, 30.0)), opens(4), d_model=8, n_steps=4, out=earlier)
    assert read_files(earlier) == before


def test_weights_that_are_lost_in_the_last_step_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.step_member

    def step_member(member: Any, *rest: Any, **settings: Any) -> Any:
        metrics = original(member, *rest, **settings)
        if settings["full"] and member.spec.beta:
            member.learner.sae.b_dec.data[0] = torch.inf
        return metrics

    monkeypatch.setattr(module, "step_member", step_member)
    config = make_config(betas=(0.0, 30.0))
    train(config, opens(1), d_model=8, n_steps=1, out=tmp_path / "run")
    run = json.loads((tmp_path / "run/config.json").read_text())
    assert run["members"] == ["k3-beta0"]
    assert "k3-beta30/weights/b_dec after step 1" in run["failed"]["k3-beta30"]


def test_finished_members_are_kept_as_they_are(tmp_path: Path) -> None:
    """Under their new names, once there are several seeds; their logs too."""
    small, large = make_config(), make_config(betas=(0.0, 30.0), seeds=(0, 1))
    train(small, opens(4), d_model=8, n_steps=4, out=tmp_path / "run")
    inode = (tmp_path / "run/k3-beta0/sae.safetensors").stat().st_ino
    kept = {"k3-beta0-seed0": tmp_path / "run/k3-beta0"}
    missing = [spec for spec in plan_members(large) if spec.name not in kept]
    metrics = train(
        large, opens(4), d_model=8, n_steps=4, out=tmp_path / "run", specs=missing, keep=kept
    )
    train(large, opens(4), d_model=8, n_steps=4, out=tmp_path / "whole")

    names = [spec.name for spec in plan_members(large)]
    assert list(metrics) == names[1:]
    assert (tmp_path / "run/k3-beta0-seed0/sae.safetensors").stat().st_ino == inode
    assert json.loads((tmp_path / "run/config.json").read_text())["members"] == names
    summaries = [(tmp_path / out / "summary.json").read_text() for out in ("run", "whole")]
    assert summaries[0] == summaries[1]
    for name in names:
        for file in (f"{name}/sae.safetensors", f"live/{name}/plots/metrics/loss.tsv"):
            assert (tmp_path / "run" / file).read_bytes() == (
                tmp_path / "whole" / file
            ).read_bytes()


def test_an_objective_takes_the_place_of_the_squared_error(tmp_path: Path) -> None:
    class Objective(NamedTuple):
        acts: torch.Tensor
        grads: torch.Tensor
        tokens: torch.Tensor
        objective: Callable[[torch.Tensor], torch.Tensor]

    def open_stream(first: int) -> Iterator[Objective]:
        for batch in opens(3)(first):
            yield Objective(*batch[:3], lambda recon: 7.0 + recon.square().mean() * 0)

    metrics = train(make_config(), open_stream, d_model=8, n_steps=3, out=tmp_path / "run")
    assert metrics["k3-beta0"].loss == 7.0


def test_auto_precision_is_resolved_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fast, wanted in ((True, "bfloat16"), (False, "float32")):
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda fast=fast: fast)
        out = tmp_path / wanted
        train(make_config(precision="auto"), opens(2), d_model=8, n_steps=2, out=out)
        run = json.loads((out / "config.json").read_text())
        assert (run["train"]["precision"], run["precision"]) == ("auto", wanted)
        saved = json.loads((out / "k3-beta0/config.json").read_text())["training"]
        assert saved["precision"] == wanted
    weights = {path.read_bytes() for path in tmp_path.rglob("sae.safetensors")}
    assert len(weights) == 2


class Second(Group):
    """The second of two processes, whose every batch the first one has too."""

    rank, world_size = 1, 2

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_only_the_first_process_writes_and_tells(tmp_path: Path) -> None:
    said: list[Any] = []
    train(
        make_config(), opens(3), d_model=8, n_steps=3, out=tmp_path / "run", order="o",
        group=Second(), on_step=said.append, tell=said.append,
    )  # fmt: skip
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_room_for_checkpoints_counts_adam_s_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(module, "check_room", lambda _, tensors: asked.append(set(tensors)))
    run = {"d_model": 8, "n_steps": 2, "order": "o"}
    train(make_config(architectures=("topk",)), opens(2), out=tmp_path / "run", **run)
    (names,) = asked  # once
    assert any(name.endswith("/adam/0/exp_avg_sq") for name in names)


def test_a_row_of_zeros_does_not_cost_the_run(tmp_path: Path) -> None:
    def with_zeros(first: int) -> Iterator[Batch]:
        for batch in opens(2)(first):
            batch.acts[3] = 0
            yield batch

    config = make_config(architectures=("topk",), betas=(0.0,))
    train(config, with_zeros, d_model=8, n_steps=2, out=tmp_path / "run")
    (summary,) = json.loads((tmp_path / "run/summary.json").read_text()).values()
    assert math.isfinite(summary["nmse_squared"])
    assert math.isfinite(summary["loss"])


def test_a_tokenized_sae_without_a_vocabulary_is_one_line(tmp_path: Path) -> None:
    config = make_config(architectures=("tokenized",))
    with pytest.raises(TrainError, match=r"n_tokens of tokenized-k.*: expected the vocabulary"):
        train(config, opens(2), d_model=8, n_steps=2, out=tmp_path / "run")


def test_a_steered_sae_starts_at_k_start(tmp_path: Path) -> None:
    l0 = []
    for k_start, fraction in ((None, 0.0), (3, 1.0)):
        config = make_config(
            architectures=("relu",), ks=(1,), k_start=k_start, k_anneal_fraction=fraction
        )
        out = tmp_path / str(k_start)
        train(config, opens(2), d_model=8, n_steps=2, out=out)
        l0.append(pq.read_table(out / "relu-k1-beta0/history.parquet")["l0"][0].as_py())
        assert load_sae(out / "relu-k1-beta0").k == 1
    assert l0[1] > 2 * l0[0]


def test_an_l0_that_is_not_near_k_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    config = make_config(architectures=("relu", "topk"), ks=(1,), betas=(0.0,))
    train(config, opens(2), d_model=8, n_steps=2, out=tmp_path / "run", tell=said.append)
    (line,) = said
    assert line.startswith("L0 of relu-k1-beta0: expected about 1 after the last step, got ")


def test_a_place_where_no_file_can_be_made_is_not_called_locked() -> None:
    with pytest.raises(TrainError, match=r"/proc/x: expected a writable place, got one where no"):
        train(make_config(), opens(2), d_model=8, n_steps=2, out=Path("/proc/x"))
