"""A project in which SAEs were trained, in the folders that docs/export.md names."""

import shutil

import pytest

from tests.tiny import run_cli


@pytest.fixture(scope="session")
def project(cached, tmp_path_factory):
    """stores/demo, runs/demo with two SAEs, and exports/demo with both for SAELens."""
    folder = tmp_path_factory.mktemp("export") / "project"
    shutil.copytree(cached, folder)
    (folder / "stores/tiny").rename(folder / "stores/demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        grid = ("--k", "32", "--beta", "0", "--beta", "3e4", "--set", "train.epochs=1")
        assert run_cli("train", *grid, "--store", "stores/demo", "--out", "runs/demo") == 0
        assert run_cli("export", "runs/demo", "--to", "saelens", "--out", "exports/demo") == 0
    return folder
