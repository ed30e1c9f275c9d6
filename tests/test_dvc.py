"""dvc.yaml lists what decides a stage's output, and DVC runs what must run and no more."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.tiny import make_project

REPOSITORY = Path(__file__).parents[1]
STAGES = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]

ENTRIES = {
    "corpus": "pipeline/corpus/build.py",
    "cache": "pipeline/cache.py",
    "cache-own": "pipeline/cache.py",
    "train": "pipeline/training.py",
    "train-own": "pipeline/training.py",
    "evaluate": "pipeline/evaluate/__init__.py",
    "report": "pipeline/report/__init__.py",
}

# Imported, but what they hold cannot change a stage's output other than through its settings.
DECIDES_NOTHING = {
    "pipeline/__init__.py",
    "pipeline/corpus/__init__.py",  # names of its modules
    "pipeline/config.py",  # the settings themselves are listed as params
    "pipeline/errors.py",
    "pipeline/files.py",
    "store/__init__.py",
    "store/errors.py",
    "store/files.py",  # where bytes come from; the manifest says which they must be
    "store/download.py",
    "store/remote.py",
    "store/backends.py",
    "store/shard_cache.py",
    "store/crash.py",  # dies where a test asks for it
    "store/verify.py",  # finds damage and changes nothing
    "store/adoption.py",  # takes over files of the right content
    "store/summary.py",  # totals of a manifest
    "store/disk.py",  # room, durable writes, locks: they decide whether bytes arrive, not which
    "store/lock.py",
}


def imports_of(path: Path) -> set[str]:
    """Files of this repository that a module imports at its top level."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            base = REPOSITORY / name.replace(".", "/")
            for candidate in (base.with_suffix(".py"), base / "__init__.py"):
                if name.split(".")[0] in ("pipeline", "store") and candidate.is_file():
                    found.add(candidate.relative_to(REPOSITORY).as_posix())
    return found


def closure(entry: str, *, stop: set[str]) -> set[str]:
    """All modules that `entry` leads to, not looking behind those in `stop`."""
    reached, waiting = set(), {entry}
    while waiting:
        path = waiting.pop()
        reached.add(path)
        if path not in stop or path.endswith("__init__.py"):
            waiting |= imports_of(REPOSITORY / path) - reached
    return reached


def listed(stage: str) -> set[str]:
    """The stage's module dependencies; a folder stands for every module in it."""
    files = set()
    for dep in STAGES[stage]["deps"]:
        path = REPOSITORY / dep
        if "${" in dep:
            continue
        files |= {
            p.relative_to(REPOSITORY).as_posix()
            for p in ([path] if path.is_file() else path.rglob("*.py"))
        }
    return files


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lists_the_modules_that_decide_its_output(stage):
    needed = closure(ENTRIES[stage], stop=DECIDES_NOTHING) - DECIDES_NOTHING
    modules = {path for path in listed(stage) if path.endswith(".py")}
    assert modules - DECIDES_NOTHING == needed


class Clone:
    """The repository's pipeline on a tiny profile, in a git repository of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_project(folder)
        for name in ("dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".gitignore", ".dvcignore"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
        for name in ("pipeline", "store"):
            shutil.copytree(
                REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)

    def repro(self) -> list[str]:
        """Run `dvc repro`; returns the stages that ran."""
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONSAFEPATH": "1",  # the installed package, not this copy
        }
        done = subprocess.run(
            ["dvc", "repro"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.output = done.stdout
        return [
            line.split("'")[1]
            for line in done.stdout.splitlines()
            if line.startswith("Running stage")
        ]

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new))


def test_repro_runs_what_a_change_touches(tmp_path):
    clone = Clone(tmp_path / "clone")
    assert clone.repro() == list(STAGES)
    assert clone.repro() == []

    name = "blocks.1.hook_resid_post/grads/c/0/0"  # not those of tiny-own, as acts are
    published = (clone.folder / "stores/tiny" / name).stat()
    kept = [path.stat().st_ino for path in (clone.folder / "stores/.work").glob(f"*/store/{name}")]
    assert len(kept) == 2  # the other is cache-own's
    assert published.st_ino in kept  # on disk once, DVC's cache counted
    assert published.st_nlink == 3

    clone.edit("configs/tiny.yaml", "betas: [0, 1e4]", "betas: [0, 2e4]")
    assert clone.repro() == ["train", "evaluate", "report"]

    clone.edit("pipeline/capture.py", '"""', '"""Edited. ')
    assert clone.repro()[:2] == ["cache", "cache-own"]
    assert clone.output.count("computed 0 of") == 2

    for profile in ("tiny", "tiny-own"):
        clone.edit(f"configs/{profile}.yaml", "layers: [1]", "layers: [0]")
    assert clone.repro() == [name for name in STAGES if name != "corpus"]

    status = subprocess.run(
        ["git", "status", "--porcelain"],
        cwd=clone.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "stores" not in status.stdout  # outputs stay out of git
