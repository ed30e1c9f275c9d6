"""A tiny project: a random GPT-2, a folder of text, a profile for both, and the command run inside
it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cli import main
from tests.checkpoints import save_gpt2

REPOSITORY = Path(__file__).parents[1]
CONTEXT = 16

# What differs from the demo profile, so that everything takes a second.
_CHANGES = {
    "  name: demo": "  name: model",
    "  source: demo": "  source: texts",
    "  context_length: 256": f"  context_length: {CONTEXT}",
    "  layers: [7]": "  layers: [1]",
    "  precision: bfloat16": "  precision: float32",
    "  batch_blocks: 16": "  batch_blocks: 32",
    "  d_sae: 2048": "  d_sae: 64",
    "  ks: [32]": "  ks: [4]",
    "  betas: [0, 3e4]  # the paper's 1e5 is too large here: docs/performance.md has the sweep": (
        "  betas: [0, 1e4]"
    ),
    "  batch_size: 2048": "  batch_size: 512",
}


class Result(NamedTuple):
    code: int
    out: str
    err: str


def make_project(folder: Path) -> Path:
    """Model, texts, params.yaml and configs/tiny.yaml in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_gpt2(folder / "model", n_layers=3, d_model=16, n_heads=2, context=CONTEXT)
    write_texts(folder / "texts")
    profile = (REPOSITORY / "configs" / "demo.yaml").read_text()
    for line, changed in _CHANGES.items():
        assert line in profile, line
        profile = profile.replace(line, changed)
    for key in ("train_tokens", "held_out_tokens", "tokens"):
        profile = "\n".join(
            f"  {key}: null" if line.startswith(f"  {key}:") else line
            for line in profile.splitlines()
        )
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "tiny.yaml").write_text(profile + "\n")
    (folder / "params.yaml").write_text("profile: tiny\n")
    return folder


def write_texts(folder: Path, n: int = 40) -> None:
    """Text files of a few hundred words each, always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    text = "the cat sat on a mat and then that rat ran to tea at noon"
    words = text.split()
    for i in range(n):
        text = " ".join(rng.choice(words, size=int(rng.integers(100, 300))))
        (folder / f"{i:02}.txt").write_text(text)


def run_cli(*args: str) -> int:
    """Run the command in this process; returns its exit code."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def spawn_cli(*args: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the command as a process of its own, in its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *map(str, args)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def read_tree(folder: Path, *, without: tuple[str, ...] = ("provenance.json",)) -> dict[str, bytes]:
    """Every file below `folder` by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }
