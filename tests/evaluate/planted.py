"""Planted figures, for claims to be decided from."""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.evaluate.faithfulness import MODES, Sums
from pipeline.evaluate.pairs import Evidence
from pipeline.evaluate.verdicts import Claim

N_BLOCKS = 60
DRAWS = 300
WITH, WITHOUT = MODES


def make_sums(added: float, *, noise: float = 0.0) -> Sums:
    """Blocks of very different difficulty, all of which lose the same fraction, or every other one
    more and every other one less.
    """
    rows = torch.full((N_BLOCKS,), 100.0).double()
    loss = rows * torch.linspace(1, 6, N_BLOCKS).double()
    own = noise * torch.tensor([1.0, -1.0]).double().repeat(N_BLOCKS // 2)
    return Sums(
        rows=rows,
        patched_rows=rows - 1,
        loss=loss,
        patched_loss=loss * (1 + added + own),
        nmse=(rows - 1) * (0.5 + added + own),
        nmse_squared=rows,
        kl=rows * (0.3 + added + own),
        loss_all_positions=loss,
    )


def make_facts(**changes: Any) -> dict[str, Any]:
    facts = {"architecture": "topk", "k": 32, "beta": 0.0, "d_sae": 64, "seed": 0}
    return facts | {"gradient": "full"} | changes


def make_evidence(
    saes: dict[str, dict[str, Any]], added: dict[Any, float | Sums], **changes: Any
) -> Evidence:
    """`added` is by name, for both modes, or by name and mode."""
    sums = {}
    for name in {key if isinstance(key, str) else key[0] for key in added}:
        for mode in MODES:
            value = added.get((name, mode), added.get(name))
            if value is not None:
                sums[name, mode] = value if isinstance(value, Sums) else make_sums(value)
    evidence = Evidence(saes, {}, sums, {}, {}, alpha=1.0, draws=DRAWS)
    return evidence._replace(**changes)


def pick(claims: Sequence[Claim], id: str, mode: str | None = None) -> Claim:
    words = {WITH: "with ∇ at", WITHOUT: "without ∇ at", None: ""}[mode]
    (claim,) = [claim for claim in claims if claim.id == id and words in claim.comparison]
    return claim


PAIR = {"g": make_facts(beta=3e4), "plain": make_facts()}
