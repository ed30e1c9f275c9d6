"""An environment with the real libraries, beside the one that runs the tests.

sae-lens wants another transformer-lens than ours, so the libraries have their own environment,
.venv-peers in the checkout. It holds only what tests/peers-constraints.txt lists; all else, torch
first of all, it finds in the environment that runs the tests, whose packages come after its own.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from filelock import FileLock

REPOSITORY = Path(__file__).parents[2]
CONSTRAINTS = REPOSITORY / "tests" / "peers-constraints.txt"
FOLDER = REPOSITORY / ".venv-peers"


def find_peers_python() -> Path:
    """The interpreter of the environment; made first, or again where its constraints changed."""
    shared = sysconfig.get_paths()["purelib"]
    wanted = f"{sys.version}\n{shared}\n{CONSTRAINTS.read_text()}"
    python, stamp = FOLDER / "bin" / "python", FOLDER / "stamp.txt"
    with FileLock(FOLDER.with_name(".venv-peers.lock")):
        if not stamp.is_file() or stamp.read_text() != wanted:
            _run(sys.executable, "-m", "venv", "--clear", str(FOLDER))
            install = ("-m", "pip", "install", "--quiet", "--no-deps", "-r", str(CONSTRAINTS))
            _run(str(python), *install)
            own = sysconfig.get_path("purelib", "venv", {"base": str(FOLDER)})
            (Path(own) / "shared.pth").write_text(f"{shared}\n")
            stamp.write_text(wanted)
    return python


def run_in_peers(*arguments: str | Path) -> str:
    """Run Python there, offline, and return what it prints."""
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return _run(str(find_peers_python()), "-I", *map(str, arguments), **offline)


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
