import json
import math
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

from pipeline.errors import TrainError
from pipeline.sae import load_sae
from pipeline.train import StepReport, plan_lr, plan_steps, train
from store import Batch
from tests.test_member import make_config


def stream(n: int, *, seed: int = 0, d_model: int = 8) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        acts = torch.randn(64, d_model, generator=generator) * 5 + 1
        grads = torch.randn(64, d_model, generator=generator)
        rows = torch.arange(64)
        yield Batch(acts, grads, rows, torch.ones(64), torch.full((64,), i), rows)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}


# n_rows, epochs, tokens, batch size -> steps
STEPS = [
    (640, 1, None, 64, 10),  # all rows
    (650, 1, None, 64, 10),  # the last 10 rows make no batch
    (650, 2, None, 64, 20),  # batches run on across epochs
    (650, 1, 200, 64, 3),
    (650, 1, 650, 64, 10),
    (650, 2, 651, 64, 10),
]


@pytest.mark.parametrize(("n_rows", "epochs", "tokens", "batch_size", "n_steps"), STEPS)
def test_plan_steps(
    n_rows: int, epochs: int, tokens: int | None, batch_size: int, n_steps: int
) -> None:
    config = make_config(epochs=epochs, tokens=tokens, batch_size=batch_size)
    assert plan_steps(config, n_rows) == n_steps


def test_more_tokens_than_there_are_is_an_error_with_both_counts() -> None:
    with pytest.raises(TrainError, match=r"at most 1300 \(2 epochs of 650 rows\), got 1301"):
        plan_steps(make_config(epochs=2, tokens=1301), 650)


@pytest.mark.parametrize(("tokens", "n_rows"), [(63, 650), (None, 63), (None, 0)])
def test_less_than_a_batch_is_an_error(tokens: int | None, n_rows: int) -> None:
    with pytest.raises(TrainError, match=r"at most the \d+ rows to train on, got 64"):
        plan_steps(make_config(tokens=tokens), n_rows)


def test_plan_lr_is_a_trapezium() -> None:
    rates = [plan_lr(step, 20, lr=4.0, warmup=0.15, decay=0.2) for step in range(20)]
    assert rates == pytest.approx([1, 2, 3, *[4] * 13, 3.2, 2.4, 1.6, 0.8])


@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (0.5, 0.5), (0.9, 0.0), (0.0, 0.9)])
@pytest.mark.parametrize("n_steps", [1, 2, 7, 100])
def test_plan_lr_is_positive_and_at_most_lr(n_steps: int, warmup: float, decay: float) -> None:
    rates = [plan_lr(step, n_steps, lr=1.0, warmup=warmup, decay=decay) for step in range(n_steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_a_run_holds_what_its_docstring_lists(tmp_path: Path) -> None:
    out = tmp_path / "runs/demo"
    config = make_config(betas=(0.0, 1e5), ks=(3, 4), log_every=4)

    metrics = train(
        config,
        stream(10),
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

    train(config, stream(9), d_model=8, n_steps=5, out=tmp_path / "run", on_step=reports.append)

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
    train(make_config(betas=(0.0, 1.0)), batches, d_model=8, n_steps=4, out=tmp_path / "run")
    assert next(batches).block[0] == 4


def test_weights_are_the_same_in_every_run_and_beside_any_other_member(tmp_path: Path) -> None:
    both = make_config(betas=(0.0, 30.0), ks=(3, 4))
    alone = make_config(betas=(30.0,))
    for name, config in (("first", both), ("second", both), ("alone", alone)):
        train(config, stream(6), d_model=8, n_steps=6, out=tmp_path / name)

    weights = [
        (tmp_path / name / "k3-beta30/sae.safetensors").read_bytes()
        for name in ("first", "second", "alone")
    ]
    assert weights[0] == weights[1] == weights[2]


def test_seeds_and_betas_matter(tmp_path: Path) -> None:
    config = make_config(betas=(0.0, 30.0), seeds=(0, 1))
    train(config, stream(3), d_model=8, n_steps=3, out=tmp_path / "run")
    weights = {p.read_bytes() for p in tmp_path.rglob("sae.safetensors")}
    assert len(weights) == 4


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    train(make_config(), stream(2), d_model=8, n_steps=2, out=tmp_path / "run")
    return tmp_path / "run"


def test_a_run_replaces_an_earlier_one(earlier: Path) -> None:
    train(make_config(betas=(7.0,)), stream(3), d_model=8, n_steps=3, out=earlier)
    assert json.loads((earlier / "config.json").read_text())["members"] == ["k3-beta7"]
    assert not (earlier / "k3-beta0").exists()
    assert [p.name for p in earlier.parent.iterdir() if p.name.endswith((".part", ".old"))] == []


def test_an_infinite_loss_stops_training_and_spares_the_earlier_run(earlier: Path) -> None:
    before = read_files(earlier)

    # the squared error of rows this large overflows float32
    def blow_up() -> Iterator[Batch]:
        for i, batch in enumerate(stream(4)):
            yield batch._replace(acts=batch.acts * 1e25) if i == 2 else batch

    with pytest.raises(TrainError, match=r"loss of k3-beta0 at step 3: .* got inf; nothing was"):
        train(make_config(), blow_up(), d_model=8, n_steps=4, out=earlier)
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
        train(make_config(), batches, d_model=8, n_steps=2, out=earlier)
    assert read_files(earlier) == before


def test_too_few_batches_and_none_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"expected 5 batches, got 2 \(128 rows\)"):
        train(make_config(), stream(2), d_model=8, n_steps=5, out=tmp_path / "run")
    with pytest.raises(TrainError, match="got 0"):
        train(make_config(), stream(2), d_model=8, n_steps=0, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_width_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"acts at step 1: expected \[batch, 9\], got \[64, 8\]"):
        train(make_config(), stream(2), d_model=9, n_steps=2, out=tmp_path / "run")


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(TrainError, match="expected an earlier run"):
            train(make_config(), stream(2), d_model=8, n_steps=2, out=out)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    batches = stream(2)
    with pytest.raises(TrainError, match=r"run folder at .*file/run: expected a writable place"):
        train(make_config(), batches, d_model=8, n_steps=2, out=tmp_path / "file/run")
    assert next(batches).block[0] == 0


def test_two_runs_into_one_folder_at_once_are_refused(earlier: Path) -> None:
    before = read_files(earlier)
    with (
        FileLock(earlier.with_name(".run.lock")),
        pytest.raises(TrainError, match="expected no other writer"),
    ):
        train(make_config(), stream(2), d_model=8, n_steps=2, out=earlier)
    assert read_files(earlier) == before
