"""A tiny project: a random GPT-2, a folder of text, a profile for both, and the command run inside
it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cli import main
from tests.checkpoints import save_gpt2

REPOSITORY = Path(__file__).parents[1]
CONTEXT = 16

# What differs from the demo profile, so that everything takes a second.
_CHANGES = {
    "model.name": "model",
    "corpus.source": "texts",
    "corpus.context_length": str(CONTEXT),
    "corpus.train_tokens": "null",
    "cache.layers": "[1]",
    "cache.precision": "float32",
    "cache.batch_blocks": "32",
    "train.d_saes": "[64]",
    "train.gradients": "[cached]",
    "train.ks": "[4]",
    "train.betas": "[0, 1e4]",
    "train.batch_size": "512",
    "evaluate.tokens": "null",
    "evaluate.batch_blocks": "32",
    "evidence.bootstrap_draws": "50",
    "evidence.sensitivity_rows": "160",
    "evidence.perturbation_layers": "null",
    "evidence.perturbation_samples": "8",
    "evidence.perturbation_context": "12",
    "evidence.steering_latents": "8",
    "evidence.steering_sequences": "2",
    "evidence.steering_context": "12",
    "evidence.steering_alphas": "[0.5, 1]",
    "evidence.steering_alpha": "1",
    "evidence.splitting_latents": "8",
    "evidence.splitting_blocks": "24",
}
_OWN = {"cache.loss": "own", "train.betas": "[1e4]"}


class Result(NamedTuple):
    code: int
    out: str
    err: str


def make_project(folder: Path) -> Path:
    """Model, texts, params.yaml, configs/tiny.yaml and configs/tiny-own.yaml in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_gpt2(folder / "model", n_layers=3, d_model=16, n_heads=2, context=CONTEXT)
    write_texts(folder / "texts")
    profile = (REPOSITORY / "configs" / "demo.yaml").read_text()
    (folder / "configs").mkdir(exist_ok=True)
    for name, changes in {"tiny": _CHANGES, "tiny-own": _CHANGES | _OWN}.items():
        (folder / "configs" / f"{name}.yaml").write_text(change_profile(profile, changes))
    (folder / "params.yaml").write_text("profile: tiny\n")
    return folder


def change_profile(profile: str, changes: Mapping[str, str]) -> str:
    """The text of a profile with other values, by section and key."""
    lines, section, left = [], "", dict(changes)
    for line in profile.splitlines():
        key = line.strip().partition(":")[0]
        section = section if line.startswith(" ") else key
        value = left.pop(f"{section}.{key}", None)
        lines.append(line if value is None else f"  {key}: {value}")
    assert not left, f"no such keys: {', '.join(left)}"
    return "\n".join(lines) + "\n"


def write_texts(folder: Path, n: int = 40) -> None:
    """Text files of a few hundred words each, always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    text = "the cat sat on a mat and then that rat ran to tea at noon"
    words = text.split()
    for i in range(n):
        text = " ".join(rng.choice(words, size=int(rng.integers(100, 300))))
        (folder / f"{i:02}.txt").write_text(text)


def run_cli(*args: str | Path) -> int:
    """Run the command in this process; returns its exit code."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def spawn_cli(*args: str | Path, cwd: Path, **environment: str) -> subprocess.Popen[str]:
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
