"""What is exported, what is refused before anything is written, and what the folder holds."""

import json
import shutil

import pytest
import torch

from pipeline.cli.export import FORMATS as CLI_FORMATS
from pipeline.errors import ConfigError, TrainError
from pipeline.export import FORMATS, load_saelens, plan_export, read_metrics, run_export
from pipeline.history import read_history
from pipeline.runs import read_run
from pipeline.sae import ARCHITECTURES, load_sae
from tests.export.examples import BETA, write_metrics, write_run
from tests.tiny import run_cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an SAE of every architecture."""
    return write_run(tmp_path_factory.mktemp("runs") / "all", tuple(ARCHITECTURES))


def test_the_command_line_lists_the_formats():
    assert tuple(FORMATS) == CLI_FORMATS


# format, SAE -> what the message says
REFUSED = [
    ("saelens", "tokenized", "expected one of topk, batch_topk.*got tokenized.*--to safetensors,"),
    ("saelens", "switch", "got switch. Export it with --to safetensors,"),
    ("dictionary-learning", "switch", "got switch. Export it with --to safetensors,"),
    (
        "sparsify",
        "batch_topk",
        "expected one of topk, got batch_topk.*"
        "--to saelens or dictionary-learning or safetensors, or name other SAEs with --sae",
    ),
    ("saelens", "gsea", "expected one of .*got gsea. Did you mean gsae?"),
]


@pytest.mark.parametrize(("to", "name", "message"), REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_line(run, to, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_export(run, [name], to=to)
    assert "\n" not in str(caught.value)


def test_one_that_does_not_fit_stops_the_export_of_all(run):
    with pytest.raises(ConfigError, match="for --to saelens"):
        plan_export(run, to="saelens")


def test_safetensors_holds_everything_bit_for_bit(run, tmp_path):
    run_export(plan_export(run, to="safetensors"), tmp_path / "export")
    members = read_run(tmp_path / "export").members  # the export is a run
    assert set(members) == {*ARCHITECTURES, "gsae"}
    for name in members:
        saved, exported = load_sae(run / name), load_sae(tmp_path / "export" / name)
        assert type(exported) is type(saved)
        assert exported.beta == saved.beta
        for key, tensor in saved.state_dict().items():
            assert torch.equal(exported.state_dict()[key], tensor), (name, key)


def test_only_what_is_named_is_exported(run, tmp_path):
    run_export(plan_export(run, ["gsae", "gsae"], to="safetensors"), tmp_path / "export")
    assert read_run(tmp_path / "export").members == ("gsae",)
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "README.md",
        "config.json",
        "gsae",
    ]


@pytest.mark.parametrize("to", FORMATS)
def test_no_path_of_the_trainers_machine_is_published(run, tmp_path, to):
    run_export(plan_export(run, ["gsae"], to=to), tmp_path / "export")
    for path in (tmp_path / "export").rglob("*"):
        assert not path.is_file() or b"/home/someone" not in path.read_bytes(), path


@pytest.fixture(scope="module")
def in_two_courses(cached, tmp_path_factory):
    """A run with an SAE that was trained on whole blocks, hence on another number of tokens."""
    out = tmp_path_factory.mktemp("courses") / "run"
    grid = ("--beta", "0", "--architecture", "topk", "--architecture", "end_to_end")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cached)
        assert run_cli("train", *grid, "--steps", "3", "--out", out) == 0
    return out


@pytest.mark.parametrize("earlier", [False, True])
def test_every_sae_has_its_own_number_of_tokens(in_two_courses, tmp_path, earlier):
    run = shutil.copytree(in_two_courses, tmp_path / "run")
    histories = {name: run / name / "history.parquet" for name in read_run(run).members}
    trained = {name: read_history(path)[-1]["tokens"] for name, path in histories.items()}
    assert len(set(trained.values())) == 2
    for name, history in histories.items():
        if earlier:  # it did not record them
            config = json.loads((run / name / "config.json").read_text())
            del config["training"]["trained_tokens"]
            (run / name / "config.json").write_text(json.dumps(config))
        else:
            history.unlink()
    again = tmp_path / "again"
    run_export(plan_export(run, to="safetensors"), again)
    for folder in (run, again):
        plan = plan_export(folder, to="saelens")
        assert {facts.name: facts.tokens for facts in plan.facts} == trained
    run_export(plan, tmp_path / "saelens")
    card = (tmp_path / "saelens" / "README.md").read_text()
    for name, tokens in trained.items():
        (row,) = (line for line in card.splitlines() if line.startswith(f"| [`{name}`]"))
        assert row.endswith(f" | {tokens:,} |")
        metadata = json.loads((tmp_path / "saelens" / name / "cfg.json").read_text())["metadata"]
        assert metadata["trained_tokens"] == tokens


def test_a_place_without_a_name_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli("export", run, "--to", "safetensors", "--out", ".") == 1
    (*_, last) = capsys.readouterr().err.splitlines()
    assert last == (
        "Error: export folder at .: expected a folder's name, got none. "
        "Pass one such as --out exports/demo."
    )
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_are_not_touched(run, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(TrainError, match=r"expected an empty folder .*Choose another --out"):
        run_export(plan_export(run, ["gsae"], to="saelens"), tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_sae_that_cannot_be_read_leaves_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    plan = plan_export(run, to="saelens")
    (run / "gsae" / "sae.safetensors").write_bytes(b"")
    with pytest.raises(TrainError, match="expected safetensors"):
        run_export(plan, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_measurements_of_another_run_are_refused(run, tmp_path):
    measured = write_metrics(tmp_path / "results", run)
    assert read_metrics(measured, read_run(run))["saes"]["gsae"]
    other = write_run(tmp_path / "other")
    with pytest.raises(TrainError, match="got another run's"):
        read_metrics(measured, read_run(other))


def test_the_command_exports_with_the_runs_measurements(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / "demo")
    command = ("export", "runs/demo", "--to", "saelens", "--sae", "gsae", "--out")
    assert run_cli(*command, "first") == 0
    assert "no measurements of this run in results/demo" in capsys.readouterr().err
    write_metrics(tmp_path / "results" / "demo", run)
    assert run_cli(*command, "second") == 0
    assert capsys.readouterr() == ("exported gsae in second\n", "")
    metadata = json.loads((tmp_path / "second/gsae/cfg.json").read_text())["metadata"]
    assert metadata["metrics_with_gradient"]["nmse"] == 0.125
    assert metadata["metrics_without_gradient"]["nmse"] == 0.25
    assert load_saelens(tmp_path / "second/gsae").beta == 0 != BETA


# arguments -> exit code, what the one line says
WRONG = [
    (("--to", "onnx"), 2, "'onnx' is not one of"),
    (("--to", "saelens", "--sae", "nothing"), 2, "expected one of topk, gsae, got nothing"),
    (("--to", "saelens", "--push", "name"), 2, "--push name: expected OWNER/NAME"),
    (("--to", "saelens", "--push", "a b/c"), 2, "--push a b/c: expected OWNER/NAME"),
    (("--to", "saelens", "--results", "nowhere"), 1, "measurements at nowhere"),
    (("--to", "saelens", "--format", "x"), 2, "No such option"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG)
def test_wrong_arguments_leave_nothing(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert run_cli("export", "run", "--out", "out", *arguments) == code
    (*_, last) = capsys.readouterr().err.splitlines()
    assert message in last
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
