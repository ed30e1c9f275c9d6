"""SAEs of a few steps, measured on a few blocks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluate import evaluate_saes
from pipeline.model import LanguageModel
from pipeline.sae import (
    ARCHITECTURES,
    SparseAutoencoder,
    init_weights,
    save_sae,
    start_learning,
    take_step,
)
from store.reader import ActivationStore
from tests.evaluate.few_blocks import VOCAB, FewBlocks

D_MODEL, D_SAE, K = 16, 48, 4
HOOK = "blocks.1.hook_resid_post"
LENGTHS = (12, 7, 12, 2, 9, 12, 12, 5)
EXCLUDE = (0, 5)
LOSS_TOKENS = 255
OPTIONS = {
    "tokenized": {"n_tokens": VOCAB},
    "switch": {"n_experts": 4},
    "jumprelu": {"bandwidth": 0.1},
}


def make_sae(architecture: str, beta: float = 0.0) -> SparseAutoencoder:
    """A few steps from its start, so that thresholds and tables hold something."""
    sae = ARCHITECTURES[architecture](
        d_model=D_MODEL,
        d_sae=D_SAE,
        k=K,
        beta=beta,
        loss_tokens=LOSS_TOKENS,
        **OPTIONS.get(architecture, {}),
    )
    generator = torch.Generator().manual_seed(0)
    acts, grads = (torch.randn(300, D_MODEL, generator=generator) for _ in range(2))
    tokens = torch.randint(VOCAB, (300,), generator=generator)
    init_weights(sae, acts, seed=0, scale_input=True)
    learner = start_learning(sae)
    for _ in range(3):
        take_step(learner, acts, grads * 0.05, tokens, lr=3e-3)
    return sae


def evaluate(model: LanguageModel, saes: dict[str, SparseAutoencoder], **changes: Any) -> Any:
    arguments = {
        "hook": HOOK,
        "mean_act": torch.ones(D_MODEL),
        "exclude_positions": EXCLUDE,
        "n_tokens": None,
        "batch_blocks": 4,
        "loss_tokens": (LOSS_TOKENS, 8160),
        "bootstrap_draws": 50,
    }
    return evaluate_saes(model, FewBlocks(LENGTHS), saes, **arguments | changes)


def save_run(
    folder: Path, store: ActivationStore, members: Mapping[str, Mapping[str, Any]] | None = None
) -> Path:
    """A run's folder as training on this store leaves it, of SAEs with these training facts."""
    members = members or {"topk-k4-beta0": {}}
    for name, training in members.items():
        sae = make_sae("relu" if name.startswith("relu") else "topk")
        save_sae(sae, folder / name, training={"seed": 3, **training})
    run = {
        "members": list(members),
        "failed": {},
        "hook": store.hooks[0],
        "train": {"exclude_positions": [0], "allow_partial": False},
        "store_fingerprint": store.manifest.fingerprint,
    }
    (folder / "config.json").write_text(json.dumps(run))
    return folder
