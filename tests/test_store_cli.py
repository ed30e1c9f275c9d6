"""`pipeline store`: info, verify, repair and diff, as a person or a program reads them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.damage import DAMAGES, swap
from tests.store.test_pickles import Bomb
from tests.tiny import read_tree, run_cli

STORE = "stores/tiny"
ACTS = "blocks.1.hook_resid_post/acts/c/1/0"


@pytest.fixture
def path(cached, tmp_path, monkeypatch):
    """The store in a copy of the project; its files are the work folder's, by hard links."""
    shutil.copytree(cached, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    shutil.rmtree(STORE)
    assert run_cli("cache") == 0
    return Path(STORE)


@pytest.fixture
def ask(capsys):
    """Run a command; returns its output, parsed where that is JSON."""

    def run(*args, code=0):
        capsys.readouterr()
        assert run_cli("store", *args) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return json.loads(out) if "--json" in args else out + err

    return run


def n_shards(path):
    return len(json.loads((path / "manifest.json").read_text())["shards"])


def test_info_says_what_it_is(path, ask):
    facts = ask("info", path, "--json")
    manifest = json.loads((path / "manifest.json").read_text())
    assert facts["fingerprint"] == manifest["fingerprint"]
    assert facts["n_tokens"] == manifest["n_rows"]
    assert facts["n_present"] == facts["n_shards"] == len(manifest["shards"])
    on_disk = sum(file.stat().st_size for file in path.rglob("c/**/*") if file.is_file())
    assert facts["bytes"] == on_disk
    assert facts["bytes_per_token"] == pytest.approx(on_disk / manifest["n_rows"])
    assert facts["provenance"]["profile"] == "tiny"
    assert facts["identity"]["weights_hash"] == manifest["identity"]["weights_hash"]


def test_info_puts_the_shards_statistics_together(path, ask):
    from store import open_store

    opened = open_store(path)
    rows = [opened.read_shard(shard.index) for shard in opened.shards]
    found = ask("info", path, "--json")["statistics"]["blocks.1.hook_resid_post/acts"]
    values = [part.acts.double() for part in rows]
    n_values = sum(part.numel() for part in values)
    rms = (sum(part.square().sum() for part in values) / n_values).sqrt()
    assert found["rms"] == pytest.approx(float(rms), rel=1e-6)
    assert found["max_abs"] == pytest.approx(max(float(part.abs().max()) for part in values))
    assert found["saturated"] == 0


def test_info_in_words_needs_no_model(path, ask):
    shutil.rmtree("model")
    shutil.rmtree("data")
    text = ask("info", path)
    for words in (
        "9 of 9 present",
        "bytes per token",
        "saturated 0",
        "made with profile",
        "made on",
    ):
        assert words in text, text


def test_info_of_a_damaged_store(path, ask):
    (path / ACTS).unlink()
    (path / "provenance.json").unlink()
    text = ask("info", path)
    assert "8 of 9 present" in text
    assert "provenance.json is missing" in text
    assert ask("info", path, "--json")["missing_or_cut"] == [1]


def test_verify_a_whole_store(path, ask):
    assert "9 shards are exactly the bytes that were written" in ask("verify", path)
    assert "in full size" in ask("verify", path, "--quick")
    assert ask("verify", path, "--json")["whole"] is True


@pytest.mark.parametrize("damage", DAMAGES)
def test_17_18_19_verify_lists_it_and_repair_redoes_only_it(path, ask, capsys, damage):
    before = read_tree(path)
    DAMAGES[damage](path / ACTS)
    found = ask("verify", path, "--json", code=1)
    assert [file["path"] for file in found["damage"]] == [ACTS]
    assert "shard 1:" in ask("verify", path, code=1)
    if damage in ("removed", "a folder"):  # the work folder's link still has it
        assert "taken from the work folder" in ask("repair", path)
    else:
        text = ask("repair", path, code=1)
        assert "shard 1 left. Run `pipeline cache`" in text
        assert "may differ" not in text  # the same machine
        assert run_cli("cache") == 0
        assert "computed 1 of 9 shards" in capsys.readouterr().out
    assert read_tree(path) == before
    assert ask("verify", path, "--json")["damage"] == []


def test_18_swapped_shards(path, ask):
    before = read_tree(path)
    swap(path / ACTS, path / "blocks.1.hook_resid_post/acts/c/2/0")
    assert ask("verify", path, "--quick", "--json")["whole"] is True  # sizes cannot tell
    assert {file["shard"] for file in ask("verify", path, "--json", code=1)["damage"]} == {1, 2}
    assert ask("repair", path, "--json", code=1)["recompute"] == [1, 2]
    assert run_cli("cache") == 0
    assert read_tree(path) == before


def test_19_missing_shards_are_counted_and_training_refuses(path, ask, capsys):
    for shard in (0, 3, 7):
        (path / f"tokens/c/{shard}").unlink()
    text = ask("verify", path, "--quick", code=1)
    assert "3 of 9 shards damaged. Run `pipeline store repair stores/tiny`" in text
    assert run_cli("train") == 1
    err = capsys.readouterr().err
    assert "3 of 9 shards missing" in err
    assert "pipeline store repair" in err
    assert not Path("runs").exists()


def test_19_a_deleted_commit_record(path, capsys):
    """The shard does not exist any more for the work folder; the published store is whole."""
    (record,) = Path("stores/.work").glob("*/commits/00002.json")
    record.unlink()
    before = read_tree(path)
    assert run_cli("cache") == 0
    assert read_tree(path) == before
    shutil.rmtree(path)
    capsys.readouterr()
    assert run_cli("cache") == 0
    assert "computed 1 of 9 shards" in capsys.readouterr().out
    assert read_tree(path) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_without_its_work_folder_is_not_computed_whole(path, capsys, damage):
    """As after `dvc pull` or a copy."""
    before = read_tree(path)
    shutil.rmtree("stores/.work")
    (path / ACTS).unlink()
    DAMAGES[damage](path / "tokens/c/4")
    capsys.readouterr()
    assert run_cli("cache") == 0
    assert "computed 2 of 9 shards" in capsys.readouterr().out
    assert read_tree(path) == before
    assert run_cli("store", "verify", path) == 0


@pytest.mark.parametrize("damage", ["removed", "cut to nothing", "first bit"])
def test_19_23_a_broken_manifest_fails_every_load(path, ask, capsys, tmp_path, damage):
    copy = shutil.copytree(path, tmp_path / "copy")
    before = read_tree(path)
    DAMAGES[damage](path / "manifest.json")
    assert run_cli("train") == 1
    assert "manifest" in capsys.readouterr().err
    for command in ("info", "verify"):
        assert f"pipeline store repair {path}`" in ask(command, path, code=1)
    assert "manifest.json: written again" in ask("repair", path)
    assert read_tree(path) == before
    shutil.rmtree("stores/.work")
    DAMAGES[damage](path / "manifest.json")
    assert f"repair {path} --from STORE" in ask("repair", path, code=1)
    assert "manifest.json: written again" in ask("repair", path, "--from", copy)
    assert read_tree(path) == before


def test_20_zarr_json_is_listed_and_written_again(path, ask):
    before = read_tree(path)
    (path / "tokens/zarr.json").unlink()
    metadata = json.loads((path / "zarr.json").read_text()) | {"zarr_format": 2}
    (path / "zarr.json").write_text(json.dumps(metadata))
    found = ask("verify", path, "--json", code=1)
    assert [file["path"] for file in found["damage"]] == ["zarr.json", "tokens/zarr.json"]
    assert "tokens/zarr.json: written again" in ask("repair", path)
    assert read_tree(path) == before


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("manifest.json", {"info": 1, "verify": 1, "train": 1}),
        ("zarr.json", {"info": 0, "verify": 1, "train": 1}),
        (ACTS, {"info": 0, "verify": 1, "train": 1}),
        ("provenance.json", {"info": 0, "verify": 0}),
    ],
)
def test_8_a_pickle_in_a_store_is_never_loaded(path, tmp_path, capsys, name, codes):
    (path / name).unlink()
    (path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    for command, code in codes.items():
        words = ("train",) if command == "train" else ("store", command, path)
        capsys.readouterr()
        assert run_cli(*words) == code, command
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if command == "train" or name == "manifest.json":
            assert len(err.splitlines()) == 1
        if code:
            assert f"pipeline store repair {path}`" in out + err
    assert not (tmp_path / "trace").exists()
    assert not Path("runs").exists()


def test_8_a_pickle_as_a_commit_record_is_computed_anew(path, tmp_path, capsys):
    before = read_tree(path)
    (record,) = Path("stores/.work").glob("*/commits/00002.json")
    record.write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    shutil.rmtree(path)
    capsys.readouterr()
    assert run_cli("cache") == 0
    assert "computed 1 of 9 shards" in capsys.readouterr().out
    assert read_tree(path) == before
    assert not (tmp_path / "trace").exists()


def test_repair_from_a_copy(path, ask, tmp_path):
    before = read_tree(path)
    copy = shutil.copytree(path, tmp_path / "copy")
    DAMAGES["last bit"](path / ACTS)
    found = ask("repair", path, "--from", copy, "--json")
    assert [(shard["shard"], shard["done"]) for shard in found["shards"]] == [(1, "fetched")]
    assert read_tree(path) == before
    assert "every byte is the one that was written" in ask("repair", path)


def test_repair_says_when_bytes_may_differ(path, ask):
    provenance = path / "provenance.json"
    fields = json.loads(provenance.read_text())
    fields["shards"][1]["device"] = "cuda"
    provenance.unlink()
    provenance.write_text(json.dumps(fields))
    DAMAGES["last bit"](path / ACTS)
    found = ask("repair", path, "--json", code=1)
    assert "device cuda, here cpu" in found["notes"][0]


def test_23_dvc_finds_nothing_wrong_and_the_load_does(path, capsys):
    """A bit flipped in place keeps size and, to DVC's index, time: the read fails all the same."""
    file = path / ACTS
    stat = file.stat()
    DAMAGES["last bit"](file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    DAMAGES["first bit"](file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run_cli("train") == 1
    err = capsys.readouterr().err
    assert f"{ACTS}" in err
    assert "pipeline store repair" in err
    assert not Path("runs/tiny").exists()


def test_foreign_files_are_told_and_no_damage(path, ask):
    (path / "notes.txt").write_text("mine")
    assert "foreign: notes.txt" in ask("verify", path)
    assert ask("verify", path, "--json")["foreign"] == ["notes.txt"]


def test_diff(path, ask):
    assert "the same store by its manifest" in ask("diff", path, path)
    assert run_cli("cache", "--layer", "2", "--dtype", "float32", "--out", "stores/other") == 0
    text = ask("diff", path, "stores/other", code=1)
    assert "acts_dtype: float16 in A, float32 in B" in text
    assert 'hooks: ["blocks.1.hook_resid_post"] in A' in text
    found = ask("diff", path, "stores/other", "--json", code=1)
    assert {"field": "acts_dtype", "a": "float16", "b": "float32"} in found["differences"]
    assert len(found["differences"]) == len(text.splitlines())
    assert found["fingerprints"][0] != found["fingerprints"][1]


def test_no_store_is_one_line(path, ask):
    assert path.exists()
    for command in ("info", "verify", "repair"):
        assert "expected a folder with manifest.json" in ask(command, "nowhere", code=1)


@pytest.fixture(scope="module")
def two_layers(cached, tmp_path_factory):
    """A store of two hooks."""
    out = tmp_path_factory.mktemp("two") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cached)
        assert run_cli("cache", "--layer", "0", "--layer", "1", "--out", out) == 0
    return out


def test_one_layer_of_several_is_a_part_and_no_ruin(two_layers, path, ask, tmp_path, capsys):
    part = tmp_path / "part"
    text = ask("pull", two_layers, "--layer", "1", "--shards", "0:3", "--out", part)
    command = f"pipeline train --store {part} --layer 1 --allow-partial"
    assert f"next: {command}" in text
    last = f"shards 3 to {n_shards(part) - 1}: missing"
    text = ask("verify", part, code=1)
    lines = text.splitlines()
    assert lines[:2] == ["hook blocks.0.hook_resid_post: not here", last]
    assert "1 of 2 hooks not here, 6 of 9 shards missing" in lines[2]
    found = ask("verify", part, "--allow-partial", "--json")
    assert (found["whole"], found["damage"]) == (False, [])
    assert found["missing"] == list(range(3, 9))
    assert found["missing_hooks"] == ["blocks.0.hook_resid_post"]
    text = ask("info", part)
    assert "3 of 9 present" in text
    assert "hook blocks.0.hook_resid_post" in text
    small = ("--set", "train.epochs=1", "--set", "train.batch_size=64", "--out", tmp_path / "run")
    assert run_cli(*command.split()[1:], *small) == 0
    assert run_cli("train", "--store", part, "--set", "cache.layers=[0,1]", *small) == 1
    assert "or --layer" in capsys.readouterr().err
    DAMAGES["last bit"](part / "blocks.1.hook_resid_post/acts/c/1/0")
    assert "1 of 9 shards damaged" in ask("verify", part, "--allow-partial", code=1)
    assert path.exists()


def test_metadata_alone_is_counted(path, ask):
    (path / "tokens/zarr.json").unlink()
    assert "1 zarr.json damaged. Run `pipeline store repair" in ask("verify", path, code=1)
    assert run_cli("train") == 1


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("info", "nowhere", "--json"), 1, "no such folder. Correct the path"),
        (("info", "data/tiny", "--json"), 1, "got gsae-corpus. Name a store."),
        (("info", "https:/host/store", "--json"), 1, "https://host/store"),
        (("info", "model", "--json"), 1, "a folder of SAEs or of a model"),
        (("repair", "https://host/store", "--json"), 2, "https://host/store: expected a folder"),
        (("pull", STORE, "--shards", "5:2", "--json"), 2, "FIRST < STOP"),
        (("pull", STORE, "--shards", "3:3", "--json"), 2, "FIRST < STOP"),
        (("pull", STORE, "--hook", "x", "--json"), 1, "one of blocks.1.hook_resid_post, got x"),
        (("gc", "--max-gb", "nan", "--json"), 2, "finite"),
        (("gc", "--max-gb", "inf", "--json"), 2, "finite"),
        (("gc", "--cache", "nowhere", "--json"), 2, "does not exist"),
    ],
)
def test_an_error_is_one_line_and_one_object(cached, monkeypatch, ask, capsys, args, code, words):
    monkeypatch.chdir(cached)
    assert words in ask(*args, code=code)["error"]
    assert run_cli("store", *args) == code
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_store_is_not_made_inside_another(path, capsys):
    before = read_tree(path)
    for command in (("cache",), ("store", "pull", path)):
        assert run_cli(*command, "--out", path / "mine") == 1
        assert f"in the store at {path.absolute()}" in capsys.readouterr().err
        assert read_tree(path) == before


def test_the_report_takes_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli("report", "--store", "s3://user:secret@bucket/store") == 2
    err = capsys.readouterr().err
    assert "expected a folder, got a URL. Copy the store with `pipeline store pull`" in err
    assert "secret" not in err
    assert len(err.splitlines()) == 1


def test_an_unfinished_pull_is_to_be_gone_on_with(tmp_path, ask):
    (tmp_path / ".part.pull").mkdir()
    (tmp_path / "part").mkdir()
    for command in ("info", "repair"):
        assert "`pipeline store pull` again" in ask(command, tmp_path / "part", code=1)


def test_an_unfinished_pull_of_another_store_is_named(path, ask):
    Path("stores/.part.pull").mkdir()
    Path("stores/.part.pull/source").write_text("another checksum")
    shutil.copytree(path / "tokens", "stores/part/tokens")
    text = ask("pull", path, "--out", "stores/part", code=1)
    assert "got an unfinished pull of another or an unknown store. Finish that one" in text


def test_16_a_folder_of_another_owner_is_named_before_the_work(path):
    """As root without root's privileges, for whom another's folder is another's."""
    shutil.rmtree(path.parent)
    path.parent.mkdir(mode=0o755)
    os.chown(path.parent, 65534, 65534)
    command = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", sys.executable, "-m"]
    done = subprocess.run([*command, "pipeline", "cache"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"folder at {path.parent.absolute()}/.work/" in done.stderr
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert "cache:" not in done.stderr  # nothing was computed
