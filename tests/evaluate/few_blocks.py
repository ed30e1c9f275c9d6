"""Held-out blocks of random tokens, and the loss of one of them by a whole run of the model."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.corpus.reader import Blocks, Corpus
from pipeline.model import LanguageModel

CONTEXT, VOCAB = 12, 64


class FewBlocks(Corpus):
    """A corpus that needs no file; some blocks are padded."""

    def __init__(self, lengths: Sequence[int], *, source: str = "texts") -> None:
        rng = np.random.default_rng(0)
        tokens = rng.integers(VOCAB, size=(len(lengths), CONTEXT + 1), dtype=np.int32)
        object.__setattr__(self, "blocks", Blocks(tokens, np.array(lengths, np.int32)))
        object.__setattr__(self, "folder", Path("few-blocks"))
        manifest = SimpleNamespace(source=source, packing="per_document", context_length=CONTEXT)
        object.__setattr__(self, "manifest", manifest)

    def lengths(self, split: str) -> np.ndarray:
        assert split == "held_out"
        return self.blocks.lengths

    def read_blocks(self, split: str, first: int, n: int) -> Blocks:
        assert split == "held_out"
        return Blocks(*(column[first : first + n] for column in self.blocks))


class WholeRun:
    """One block without its padding: activations, gradients and losses at any hook."""

    def __init__(self, model: LanguageModel, tokens: np.ndarray, length: int) -> None:
        whole = torch.from_numpy(tokens[: length + 1]).long()
        self.bridge, self.inputs, self.targets = model.bridge, whole[None, :-1], whole[1:]

    def look_at(self, hook: str) -> tuple[Tensor, Tensor]:
        """Activations and gradients of the summed loss there, [rows, d_model]."""
        leaf: list[Tensor] = []

        def keep(value: Tensor, **_: Any) -> Tensor:
            leaf.append(value.detach().requires_grad_())
            return leaf[0]

        (grads,) = torch.autograd.grad(self._run(hook, keep), leaf[0])
        return leaf[0][0].detach(), grads[0]

    @torch.no_grad()
    def add(self, hook: str, position: int, delta: Tensor) -> float:
        """The summed loss with delta added to one row there."""

        def move(value: Tensor, **_: Any) -> Tensor:
            moved = value.clone()
            moved[0, position] += delta
            return moved

        return self._run(hook, move).item()

    def _run(self, hook: str, change: Any) -> Tensor:
        logits = self.bridge.run_with_hooks(self.inputs, fwd_hooks=[(hook, change)])
        return cross_entropy(logits[0], self.targets, reduction="sum")
