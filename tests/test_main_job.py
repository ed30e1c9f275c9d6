"""The five stages on a tiny project, and what an interruption may cost."""

import json
import signal

import numpy as np
import pytest
import torch
import zarr

from pipeline.capture import capture
from pipeline.corpus import open_corpus
from pipeline.model import load_model
from store import open_store
from store.layout import permute_rows
from tests.tiny import make_project, read_tree, run_cli, spawn_cli

HOOK = "blocks.1.hook_resid_post"
STAGES = ("corpus", "cache", "train", "evaluate", "report")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project in which all stages have run."""
    folder = make_project(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in STAGES:
            assert run_cli(stage) == 0, stage
    return folder


def test_every_stage_leaves_its_output(finished):
    metrics = json.loads((finished / "results/tiny/metrics.json").read_text())
    assert set(metrics["saes"]) == {"k4-beta0", "k4-beta1e4"}
    assert "k4-beta1e4" in (finished / "results/tiny.html").read_text()
    assert (finished / "runs/tiny/k4-beta0/sae.safetensors").stat().st_size > 0
    assert len(open_store(finished / "stores/tiny").manifest.shards) >= 8


def test_store_rows_are_what_capture_gives(finished):
    """Plain zarr, un-permuted by the documented rule, equals the capture's output."""
    corpus = open_corpus(finished / "data/tiny")
    manifest = open_store(finished / "stores/tiny").manifest
    group = zarr.open_group(finished / "stores/tiny", mode="r")
    model = load_model(finished / "model")
    start = 0
    for shard in manifest.shards[:2]:
        blocks = corpus.read_blocks("train", shard.first_block, shard.n_blocks)
        captured = capture(model, torch.from_numpy(blocks.tokens).long(), (HOOK,))
        rows = slice(start, start + shard.n_rows)
        order = permute_rows(manifest.seed, shard.index, shard.n_rows)
        for name, wanted in (("acts", captured.acts[HOOK]), ("grads", captured.grads[HOOK])):
            stored = np.empty((shard.n_rows, 16), dtype=np.float16)
            stored[order] = group[HOOK][name][rows]
            np.testing.assert_array_equal(stored, wanted.flatten(0, 1).numpy().astype(np.float16))
        tokens = np.empty(shard.n_rows, dtype=np.int32)
        tokens[order] = group["tokens"][rows]
        np.testing.assert_array_equal(tokens, blocks.tokens[:, :-1].ravel())
        start += manifest.rows_per_shard


def test_evaluation_figures_are_consistent(finished):
    metrics = json.loads((finished / "results/tiny/metrics.json").read_text())
    topk, gsae = metrics["saes"]["k4-beta0"], metrics["saes"]["k4-beta1e4"]
    assert topk["with_gradient"] == topk["without_gradient"]
    assert topk["selection_overlap"] == 1
    assert gsae["selection_overlap"] < 1
    assert gsae["with_gradient"] != gsae["without_gradient"]
    for sae in (topk, gsae):
        for mode in ("with_gradient", "without_gradient"):
            figures = sae[mode]
            assert figures["loss_added"] == pytest.approx(
                figures["loss"] / metrics["model"]["loss"] - 1
            )
            assert 0 < figures["nmse_squared"] < figures["nmse"] < 1
            assert 0 < figures["l0"] <= 4


def test_a_second_cache_computes_nothing(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    assert run_cli("cache") == 0
    assert "computed 0 of" in capsys.readouterr().out


def test_a_removed_store_is_adopted_again(finished, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(finished)
    before = read_tree(finished / "stores/tiny")
    (finished / "stores/tiny").rename(tmp_path / "removed")
    assert run_cli("cache") == 0
    assert "computed 0 of" in capsys.readouterr().out
    assert read_tree(finished / "stores/tiny") == before


def test_several_layers_from_one_pass(finished, monkeypatch):
    monkeypatch.chdir(finished)
    assert run_cli("cache", "--layer", "0", "--layer", "1") == 0
    both = zarr.open_group(finished / "stores/tiny+layers=0,1", mode="r")
    one = zarr.open_group(finished / "stores/tiny", mode="r")
    assert "blocks.0.hook_resid_post" in both
    for name in ("acts", "grads"):
        np.testing.assert_allclose(both[HOOK][name][:], one[HOOK][name][:], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "resid_post"])
def test_one_hook_of_a_store_with_several(finished, monkeypatch, capsys, hook):
    monkeypatch.chdir(finished)
    both = ("--layer", "0", "--layer", "1")
    assert run_cli("cache", *both) == 0
    code = run_cli("train", *both, "--hook", hook, "--tokens", "2048")
    if hook == "resid_post":  # two of them have that name
        assert code == 1
        assert "expected one of blocks.0.hook_resid_post, blocks.1" in capsys.readouterr().err
    else:
        assert code == 0
        (run,) = (finished / "runs").glob("tiny+layers=0,1+*")
        assert json.loads((run / "config.json").read_text())["hook"] == hook


def test_sigkill_while_caching_costs_only_the_shards_at_hand(
    finished, tmp_path, monkeypatch, capsys
):
    project = make_project(tmp_path / "killed")
    process = spawn_cli(
        "cache", cwd=project, STORE_CRASH_POINT="before-write:commit", STORE_CRASH_SKIP="3"
    )
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (project / "stores/tiny").exists()
    kept = {
        path: path.stat().st_mtime_ns
        for path in (project / "stores").glob(".work/*/commits/*.json")
    }
    assert len(kept) == 3

    monkeypatch.chdir(project)
    assert run_cli("cache") == 0
    n_shards = len(open_store(project / "stores/tiny").manifest.shards)
    assert f"computed {n_shards - len(kept)} of {n_shards} shards" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert read_tree(project / "stores/tiny") == read_tree(finished / "stores/tiny")


def test_two_workers_write_the_same_bytes(finished, tmp_path):
    project = make_project(tmp_path / "workers")
    process = spawn_cli("cache", "--workers", "2", cwd=project)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    records = [
        json.loads(path.read_text()) for path in (project / "stores").glob(".work/*/commits/*.json")
    ]
    assert len({record["facts"]["pid"] for record in records}) == 2
    assert read_tree(project / "stores/tiny") == read_tree(finished / "stores/tiny")
