"""The faults that a user or a disk causes, each caused for real: one line, a non-zero exit, nothing
lost.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_project, read_tree, run_cli, spawn_cli


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = make_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cached_project(cached, tmp_path, monkeypatch):
    """A copy of it to harm."""
    folder = tmp_path / "project"
    shutil.copytree(cached, folder)
    monkeypatch.chdir(folder)
    return folder


def fails(capsys, *args, code=1):
    """The command's one-line error; fails unless the exit code is `code`."""
    assert run_cli(*args) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("Error")]
    assert [line for line in errors if line] == err.splitlines()[-1:]  # one line, the last
    return err


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cahce"], "Did you mean cache?"),
        (["cache", "--layr", "1"], "Did you mean '--layer'?"),
        (["train", "--set", "train.beta=3"], "Did you mean train.betas?"),
        (["cache", "--set", "cache.layers"], "expected KEY=VALUE"),
        (
            ["cache", "--profile", "tiyn"],
            "profile tiyn: expected one of demo, demo-own, gpt2-small, gpt2-small-own, paper-demo, "
            "paper-demo-own, tiny, tiny-own, or",
        ),
        # fault 2: wrong type or range
        (["train", "--k", "65"], "train.ks: expected at most d_sae = 64, got 65"),
        (["train", "--beta", "-1"], "train.betas.0: Input should be greater than or equal to 0"),
        (["train", "--beta", "nan"], "train.betas.0: Input should be a finite number"),
        (["train", "--beta", "much"], "'much' is not a valid float"),
        (["train", "--set", "train.lr=.nan"], "train.lr: Input should be a finite number"),
        (["train", "--set", "train.batch_size=-1"], "train.batch_size: Input should be greater"),
        (["cache", "--dtype", "fp15"], "'fp15' is not one of"),
        (
            ["cache", "--set", "cache.acts_dtype=fp15"],
            "cache.acts_dtype: Input should be 'float32'",
        ),
        (["cache", "--layer", "seven"], "'seven' is not a valid integer"),
        # fault 4: unsafe YAML, here on the command line
        (["cache", "--set", "cache.layers=!!python/object/apply:os.getcwd []"], "YAML at --set"),
    ],
)
def test_1_2_4_wrong_words_and_values(project, monkeypatch, capsys, args, message):
    monkeypatch.setattr("pipeline.cache.load_model", None)  # none of these gets as far as a model
    before = files_in(project)
    assert message in fails(capsys, *args, code=2)
    assert files_in(project) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("profile: tiny\nprofile: demo\n", "duplicate key"),
        ("profile: !!python/name:os.system\n", "could not determine a constructor"),
        ("profile: &a [*a, *a]\n", "YAML at params.yaml"),
    ],
)
def test_4_unsafe_params_file(project, capsys, text, message):
    (project / "params.yaml").write_text(text)
    assert message in fails(capsys, "cache", "--dry-run", code=2)


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        (["--layer", "99"], ["99", "0 to 2"]),
        (["--hook", "resid_pots"], ["resid_pots", "resid_post"]),
        (["--hook", "blocks.1.attn.hook_q"], ["blocks.1.attn.hook_q"]),
    ],
)
def test_3_layers_and_hooks_that_the_model_lacks(project, capsys, args, messages):
    err = fails(capsys, "cache", *args)
    assert all(message in err for message in messages), err
    assert not (project / "stores").exists() or not list(
        (project / "stores").glob(".work/*/commits/*")
    )


def test_5_empty_corpus(project, capsys):
    shutil.rmtree(project / "texts")
    (project / "texts").mkdir()
    assert "expected .txt, .jsonl, .parquet files, got none" in fails(capsys, "corpus")
    assert not (project / "data/tiny").exists()


def test_5_shorter_than_one_block(project, capsys):
    for path in (project / "texts").glob("*.txt"):
        path.write_text("a" if path.name < "02" else "")
    assert "one train block of 16 + 1 tokens, got 4 tokens" in fails(capsys, "corpus")
    assert not (project / "data/tiny").exists()


def test_5_fewer_tokens_than_asked_for(project, capsys):
    err = fails(capsys, "corpus", "--tokens", "10000000")
    assert "10,000,000" in err
    assert not list((project / "data").glob("tiny*"))


def test_5_training_never_repeats_data_silently(cached_project, capsys):
    err = fails(capsys, "train", "--tokens", "100000000")
    assert "100000000" in err.replace(",", "")
    assert not list((cached_project / "runs").glob("tiny*"))


@pytest.mark.parametrize(("content", "offset"), [(b"caf\xe9 au lait", 3), (b"a nul: \x00 byte", 7)])
def test_6_text_that_is_not_text(project, capsys, content, offset):
    (project / "texts" / "17.txt").write_bytes(content)
    err = fails(capsys, "corpus")
    assert "17.txt" in err
    assert f"byte {offset}" in err


def test_16_a_read_only_folder_is_named_at_the_start(project):
    """A read-only mount, which stops root as well."""
    (project / "frozen").mkdir()
    command = (
        "mount --bind frozen frozen && mount -o remount,ro,bind frozen && "
        f"exec {sys.executable} -m pipeline cache --out frozen/store"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "frozen" in done.stderr
    assert "Traceback" not in done.stderr
    assert "cache:" not in done.stderr  # no progress: nothing was computed


def test_20_zarr_json_that_claims_another_shape(cached_project, capsys):
    path = cached_project / "stores/tiny/blocks.1.hook_resid_post/acts/zarr.json"
    metadata = json.loads(path.read_text())
    metadata["shape"][0] = 10**15
    path.unlink()  # a hard link of the work folder's
    path.write_text(json.dumps(metadata))
    assert "zarr.json" in fails(capsys, "train")


def test_20_zarr_json_cut_short(cached_project, capsys):
    path = cached_project / "stores/tiny/zarr.json"
    text = path.read_text()
    path.unlink()
    path.write_text(text[: len(text) // 2])
    assert "zarr.json" in fails(capsys, "train")


def test_21_another_tokenizer(cached_project, capsys):
    path = cached_project / "model/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"][0]["lstrip"] = True
    path.write_text(json.dumps(tokenizer))
    assert "tokenizer_hash: expected" in fails(capsys, "cache")


@pytest.mark.usefixtures("cached_project")
def test_21_another_width_of_block(capsys):
    err = fails(capsys, "cache", "--set", "corpus.context_length=8", "--corpus", "data/tiny")
    assert "context_length: expected 8, got 16" in err


def test_21_another_store_in_the_way(cached_project, capsys):
    before = read_tree(cached_project / "stores/tiny")
    err = fails(capsys, "cache", "--layer", "2", "--dtype", "float32", "--out", "stores/tiny")
    assert "hooks" in err
    assert "acts_dtype" in err
    assert read_tree(cached_project / "stores/tiny") == before


@pytest.mark.usefixtures("cached_project")
def test_21_evaluating_with_another_store(capsys):
    assert run_cli("train") == 0
    assert run_cli("cache", "--layer", "2") == 0
    err = fails(capsys, "evaluate", "--store", "stores/tiny+layers=2")
    assert "fingerprint" in err


def test_22_activations_that_are_not_finite(project, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(project / "model/model.safetensors")
    weights["transformer.h.2.mlp.c_proj.bias"][0] = float("nan")
    save_file(weights, project / "model/model.safetensors", metadata={"format": "pt"})
    assert "expected finite losses" in fails(capsys, "cache")
    assert not (project / "stores/tiny").exists()


def test_22_float16_overflow(project, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(project / "model/model.safetensors")
    weights["transformer.h.1.mlp.c_proj.bias"][3] = 1e6
    save_file(weights, project / "model/model.safetensors", metadata={"format": "pt"})
    err = fails(capsys, "cache")
    assert "saturating in float16" in err
    assert "shard 0, block 0, position 0" in err
    assert run_cli("cache", "--dtype", "bfloat16") == 0


@pytest.mark.usefixtures("project")
def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="99"):
        run_cli("--debug", "cache", "--layer", "99")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (["cache", "--device", "banana"], "run.device", 2),
        (["cache", "--profile", "../configs/tiny"], "expected a name such as demo", 2),
        (["cache", "--profile", ""], "expected a name such as demo", 2),
        (["cache", "--scheduler", "banana"], "run.scheduler at banana", 2),
        (["cache", "--layer", "1", "--layer", "1"], "expected different values", 2),
        (["cache", "--layer", "1", "--set", "cache.layers=[2]"], "expected cache.layers once", 2),
        (["cache", "--set", "cache.layers=" + "[" * 3000], "YAML at --set", 2),
        (["evaluate"], "Run `pipeline train`", 1),
        (["train"], "make the store with `pipeline cache`", 1),
    ],
)
def test_2_more_wrong_values(capsys, args, message, code):
    assert message in fails(capsys, *args, code=code)


def test_4_params_file_that_is_not_text(project, capsys):
    (project / "params.yaml").write_bytes(b"profile: caf\xe9")
    assert "params.yaml" in fails(capsys, "cache", "--dry-run", code=2)


def test_overwrite_never_replaces_what_is_not_ours(cached_project, capsys):
    before = read_tree(cached_project / "texts")
    fails(capsys, "corpus", "--out", "texts", "--overwrite")
    fails(capsys, "train", "--out", "texts", "--overwrite")
    fails(capsys, "cache", "--out", "texts", "--overwrite", "--layer", "2")
    assert run_cli("train") == 0
    fails(capsys, "evaluate", "--out", "texts")
    assert read_tree(cached_project / "texts") == before


def test_21_a_corpus_made_before_the_profile_was_edited(cached_project, capsys):
    profile = cached_project / "configs/tiny.yaml"
    profile.write_text(profile.read_text().replace("fraction: 0.1", "fraction: 0.3", 1))
    assert "held_out_fraction: expected 0.3, got 0.1" in fails(capsys, "cache")


@pytest.mark.usefixtures("cached_project")
@pytest.mark.parametrize(
    "change", ["model.weight_processing=folded", "corpus.held_out_fraction=0.3"]
)
def test_21_evaluating_with_another_model_or_corpus(capsys, change):
    """Another split could hold out what the SAEs were trained on."""
    assert run_cli("train") == 0
    assert run_cli("corpus", "--set", change, "--out", "data/other") == 0
    ours = ("--run", "runs/tiny", "--store", "stores/tiny")
    err = fails(capsys, "evaluate", "--set", change, "--corpus", "data/other", *ours)
    assert "weight_processing: expected 'raw'" in err or "corpus: expected" in err


def test_21_weights_that_changed_under_the_same_path(cached_project):
    """A process that has the former model loaded must not use it for the new one."""
    from safetensors.torch import load_file, save_file

    from store import open_store

    assert run_cli("cache", "--out", "stores/before", "--dtype", "float32") == 0
    weights = load_file(cached_project / "model/model.safetensors")
    weights["transformer.h.0.mlp.c_proj.bias"] += 1
    save_file(weights, cached_project / "model/model.safetensors", metadata={"format": "pt"})
    assert run_cli("cache", "--out", "stores/after", "--dtype", "float32") == 0
    before, after = (open_store(Path("stores") / name) for name in ("before", "after"))
    assert before.manifest.fingerprint != after.manifest.fingerprint
    assert not before.read_block(0).acts.equal(after.read_block(0).acts)


def test_11_ctrl_c_is_one_line(project):
    process = spawn_cli("cache", cwd=project)
    for line in process.stderr:
        if line.startswith("cache:"):  # in the middle of it
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("Interrupted.")
    assert "Traceback" not in err
    assert run_cli("cache") == 0


def test_per_document_and_bos_end_to_end(project):
    settings = ("packing=per_document", "prepend_bos=true", "held_out_fraction=0.3")
    changes = [word for setting in settings for word in ("--set", f"corpus.{setting}")]
    for stage in ("corpus", "cache", "train", "evaluate"):
        extra = ("--set", "train.batch_size=64") if stage in ("train", "evaluate") else ()
        assert run_cli(stage, *changes, *extra) == 0, stage
    assert list((project / "results").glob("*/metrics.json"))
