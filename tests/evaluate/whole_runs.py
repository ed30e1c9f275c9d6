"""Figures from whole runs of the model, one block and one row at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from pipeline.model import LanguageModel
from pipeline.sae import SparseAutoencoder
from tests.evaluate.few_blocks import FewBlocks
from tests.evaluate.small_saes import EXCLUDE, HOOK, LENGTHS


class Block:
    """One held-out block without its padding: what whole runs of the bridge say of it."""

    def __init__(self, model: LanguageModel, tokens: Tensor, hook: str = HOOK) -> None:
        self.hook = hook
        self.bridge, self.inputs, self.targets = model.bridge, tokens[None, :-1], tokens[1:]
        self.rows = [i for i in range(len(self.targets)) if i not in EXCLUDE]
        leaf: list[Tensor] = []

        def keep(value: Tensor, **_: Any) -> Tensor:
            leaf.append(value.detach().requires_grad_())
            return leaf[0]

        logits = self.run(keep)
        loss = cross_entropy(logits, self.targets, reduction="sum")
        (grads,) = torch.autograd.grad(loss, leaf[0])
        self.loss, self.acts, self.grads = loss.item(), leaf[0][0].detach(), grads[0]
        self.log_p = logits.detach().double().log_softmax(-1)
        self.zero, _ = self.patch(torch.zeros_like(self.acts), self.rows)
        self.mean, _ = self.patch(torch.ones_like(self.acts), self.rows)

    def run(self, hook: Any) -> Tensor:
        return self.bridge.run_with_hooks(self.inputs, fwd_hooks=[(self.hook, hook)])[0]

    @torch.no_grad()
    def patch(self, recon: Tensor, rows: list[int]) -> tuple[float, float]:
        """Summed loss, and summed KL of the original's predictions from the patched run's."""
        replaced = self.acts.clone()
        replaced[rows] = recon[rows]
        logits = self.run(lambda value, hook: replaced[None])  # noqa: ARG005
        divergence = kl_div(
            logits.double().log_softmax(-1), self.log_p, log_target=True, reduction="sum"
        )
        return cross_entropy(logits, self.targets, reduction="sum").item(), divergence.item()


def slow_recon(sae: SparseAutoencoder, block: Block, *, steered: bool) -> tuple[Tensor, list[set]]:
    """x̂ of each row by itself, and which latents fire on it."""
    recon, fired = [], []
    for act, grad, token in zip(block.acts, block.grads, block.inputs[0], strict=True):
        with torch.no_grad():
            passed = sae(act[None], grad[None] if steered else None, token[None])
        recon.append(passed.recon[0])
        values, indices = (column[0].tolist() for column in passed.latents)
        fired.append({i for i, value in zip(indices, values, strict=True) if value > 0})
    return torch.stack(recon), fired


def split_blocks(model: LanguageModel, hook: str) -> list[Block]:
    held_out = FewBlocks(LENGTHS).read_blocks("held_out", 0, len(LENGTHS))
    return [
        Block(model, torch.from_numpy(tokens[: length + 1]).long(), hook)
        for tokens, length in zip(*held_out, strict=True)
    ]


def slow_figures(blocks: list[Block], recons: list[Tensor]) -> dict[str, float]:
    ratios, losses, all_losses, divergences = [], [], [], []
    for block, recon in zip(blocks, recons, strict=True):
        ratios += [
            ((block.acts[i] - recon[i]).norm() / block.acts[i].norm()).item() for i in block.rows
        ]
        loss, divergence = block.patch(recon, block.rows)
        losses.append(loss)
        divergences.append(divergence)
        all_losses.append(block.patch(recon, list(range(len(block.targets))))[0])
    own, zero, mean = (
        sum(getattr(block, name) for block in blocks) for name in ("loss", "zero", "mean")
    )
    return {
        "nmse": sum(ratios) / len(ratios),
        "nmse_squared": sum(ratio**2 for ratio in ratios) / len(ratios),
        "kl": sum(divergences) / sum(LENGTHS),
        "loss": sum(losses) / sum(LENGTHS),
        "loss_added": sum(losses) / own - 1,
        "loss_added_all_positions": sum(all_losses) / own - 1,
        "ce_recovered_zero": (zero - sum(losses)) / (zero - own),
        "ce_recovered_mean": (mean - sum(losses)) / (mean - own),
    }
