"""The package's walls and doors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import store

MODULES = sorted(Path(store.__file__).parent.rglob("*.py"))


def list_imports(module: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module))
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_store_never_imports_pipeline(module):
    assert "pipeline" not in list_imports(module)


def test_zarr_is_imported_by_the_metadata_alone():
    assert [module.name for module in MODULES if "zarr" in list_imports(module)] == ["metadata.py"]


def test_public_names():
    assert sorted(store.__all__) == store.__all__
    for name in store.__all__:
        assert getattr(store, name).__module__.startswith("store"), name


def test_importing_does_nothing():
    """No output, no thread, and no zarr, which only writing needs."""
    code = (
        "import sys, threading, store; "
        "assert threading.active_count() == 1; assert 'zarr' not in sys.modules; "
        "assert 'pipeline' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout + done.stderr == ""
