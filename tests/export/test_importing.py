"""SAELens folders as a run that `pipeline evaluate` takes."""

import json
import shutil

import pytest

from pipeline.errors import ConfigError, TrainError
from pipeline.export import import_saelens
from pipeline.export.saelens import CONFIG_NAME
from store import open_store
from tests.export.examples import HOOK, write_run
from tests.tiny import run_cli


def test_an_imported_sae_measures_as_its_original_without_gradient(project, monkeypatch):
    monkeypatch.chdir(project)
    command = ("import", "exports/demo", "--from", "saelens", "--store", "stores/demo")
    assert run_cli(*command, "--out", "runs/imported") == 0
    found = {}
    for run in ("demo", "imported"):
        assert run_cli("evaluate", "--run", f"runs/{run}", "--store", "stores/demo") == 0
        found[run] = json.loads((project / f"results/{run}/metrics.json").read_text())
    assert found["imported"]["model"] == found["demo"]["model"]
    for name, own in found["demo"]["saes"].items():
        theirs = found["imported"]["saes"][name]
        assert theirs["with_gradient"] == theirs["without_gradient"]  # there is no beta
        for key in ("nmse", "loss", "loss_added", "l0"):
            wanted = own["without_gradient"][key]
            assert theirs["without_gradient"][key] == pytest.approx(wanted, rel=1e-4), (name, key)


def test_one_folder_is_a_run_of_one(project, tmp_path):
    manifest = open_store(project / "stores/demo").manifest
    (name, *_) = sorted(path.name for path in (project / "exports/demo").glob("*/"))
    run = import_saelens(
        project / "exports/demo" / name, manifest, tmp_path / "run", exclude_positions=(0, 1)
    )
    assert run.members == (name,)
    assert run.exclude_positions == (0, 1)


# change of cfg.json (or of its metadata), the arguments -> what the message says
REFUSED = [
    ({"d_in": 8}, {}, TrainError, "W_dec at .*expected"),
    ({}, {"hook": "blocks.9.hook_resid_post"}, ConfigError, "the store has .*got blocks.9"),
    (
        {"metadata": {"sae_lens_version": "6.1.0"}},
        {},
        ConfigError,
        r"the store has \(blocks.1.hook_resid_post\), got None. Pass --hook.",
    ),
    ({"architecture": "temporal"}, {}, TrainError, "architecture at "),
    ({"metadata": [6]}, {}, TrainError, r"metadata at .*expected an object, got \[6\]"),
    ({"exclude_positions": [0.5]}, {}, TrainError, r"exclude_positions of .*got \[0.5\]"),
]


@pytest.mark.parametrize(("changes", "arguments", "error", "message"), REFUSED)
def test_what_does_not_fit_the_store_leaves_nothing(
    project, tmp_path, changes, arguments, error, message
):
    (source, *_) = sorted((project / "exports/demo").glob("*/"))
    shutil.copytree(source, tmp_path / "sae")
    config = json.loads((source / CONFIG_NAME).read_text())
    if "exclude_positions" in changes:
        changes = {"metadata": config["metadata"] | changes}
    (tmp_path / "sae" / CONFIG_NAME).write_text(json.dumps(config | changes))
    manifest = open_store(project / "stores/demo").manifest
    with pytest.raises(error, match=message):
        import_saelens(tmp_path / "sae", manifest, tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_another_width_and_no_sae_are_refused(project, tmp_path):
    manifest = open_store(project / "stores/demo").manifest
    assert run_cli("export", str(write_run(tmp_path / "other")), "--to", "saelens", "--out",
                   str(tmp_path / "narrow")) == 0  # fmt: skip
    assert manifest.hooks != (HOOK,)
    with pytest.raises(TrainError, match="expected d_in = 16, the width of the store, got 8"):
        import_saelens(tmp_path / "narrow", manifest, tmp_path / "run", hook=manifest.hooks[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainError, match=r"expected cfg\.json in it or in its subfolders"):
        import_saelens(tmp_path / "empty", manifest, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_is_not_replaced(project):
    manifest = open_store(project / "stores/demo").manifest
    with pytest.raises(TrainError, match="expected an empty folder or nothing"):
        import_saelens(project / "exports/demo", manifest, project / "runs" / "demo")
