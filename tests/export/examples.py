"""A run of SAEs with random weights, one of each architecture, as training leaves it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from pipeline.sae import ARCHITECTURES, SparseAutoencoder, save_sae

HOOK = "blocks.7.hook_resid_post"
D_MODEL, D_SAE, K, BETA = 8, 24, 3, 1e5
N_TOKENS = 11
OPTIONS = {"n_experts": 2, "bandwidth": 0.001, "n_tokens": N_TOKENS}
FIGURES = {
    "nmse": 0.25,
    "loss_added": 0.07,
    "ce_recovered_zero": 0.98,
    "l0": 3.0,
    "dead_fraction": 0.01,
}


def make_sae(architecture: str = "topk", *, beta: float = 0.0, seed: int = 0) -> SparseAutoencoder:
    """Every parameter random, thresholds positive, and an input scale that is not 1."""
    cls = ARCHITECTURES[architecture]
    sae = cls(
        d_model=D_MODEL,
        d_sae=D_SAE,
        k=K,
        beta=beta,
        loss_tokens=255,
        **{name: OPTIONS[name] for name in cls.options},
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        sae.input_scale.fill_(0.37)
        if architecture == "batch_topk":
            sae.threshold.fill_(0.3)
    return sae


def make_inputs(n: int = 64, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed))


def encode_dense(sae: SparseAutoencoder, acts: torch.Tensor) -> torch.Tensor:
    """Latents [rows, d_sae] without a gradient."""
    values, indices = sae.encode(acts)
    return values.new_zeros(len(acts), sae.d_sae).scatter_add_(1, indices, values)


def write_run(folder: Path, architectures: tuple[str, ...] = ("topk",)) -> Path:
    """A run with an SAE of each architecture, and for topk one with beta."""
    members = {name: make_sae(name) for name in architectures}
    if "topk" in members:
        members["gsae"] = make_sae("topk", beta=BETA, seed=2)
    settings = {
        "model": {"name": "openai-community/gpt2", "weight_processing": "raw"},
        "corpus": {"source": "/home/someone/texts", "subset": None, "context_length": 128}
        | {"prepend_bos": True},
        "run": {"shard_cache": "/home/someone/cache"},
    }
    facts: dict[str, Any] = {
        "hook": HOOK,
        "store": "/home/someone/stores/demo",
        "store_fingerprint": "5e1f" * 16,
        "config": settings,
    }
    for name, sae in members.items():
        save_sae(sae, folder / name, training={"seed": 0, **facts})
    config = {
        "train": {"exclude_positions": [0], "allow_partial": False},
        "members": list(members),
        "failed": {},
        "d_model": D_MODEL,
        "tokens": 2_088_960,
        **facts,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_metrics(folder: Path, run: Path) -> Path:
    """Measurements of all SAEs of a run, better with the gradient than without."""
    content = (run / "config.json").read_bytes()
    modes = {"with_gradient": FIGURES | {"nmse": 0.125}, "without_gradient": FIGURES}
    metrics = {
        "run": hashlib.sha256(content).hexdigest(),
        "saes": dict.fromkeys(json.loads(content)["members"], modes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder
