"""Text from a model whose residual stream is pushed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.evaluate.pushes import add_at, read_logits
from pipeline.model import LanguageModel, final_hidden


class Generation(NamedTuple):
    """How prompts are continued."""

    prompts: tuple[str, ...]  # none: beginnings of reference text
    n_tokens: int
    temperature: float  # 0: the likeliest token
    seed: int


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    pushes: Float[Tensor, "pushes d_model"],
    *,
    hook: str,
    exclude_positions: Sequence[int],
    how: Generation,
) -> list[list[int]]:
    """Continue a prompt under each push, which is added at every position but the excluded ones.

        next = argmax over v of logits_v + temperature * g_v          g: Gumbel noise

    which samples from softmax(logits / temperature). Every push has the same noise, so that texts
    differ by the push alone. Beyond the model's context the oldest tokens go. Plain forward passes:
    nothing is kept from one to the next.
    """
    limit = model.facts.context_length or len(prompt) + how.n_tokens
    tokens = torch.tensor([[*prompt]] * len(pushes), device=model.device)
    excluded = torch.tensor([*exclude_positions], device=model.device)
    generator = torch.Generator().manual_seed(how.seed)
    for _ in range(how.n_tokens):
        seen = tokens[:, -limit:]
        position = torch.arange(seen.shape[1], device=model.device)
        push = add_at(hook, pushes, ~torch.isin(position, excluded))
        logits = read_logits(final_hidden(model.bridge, seen, [push])[:, -1], model)
        uniform = torch.rand(logits.shape[1], generator=generator).clamp_(1e-9, 1 - 1e-7)
        noise = -(-uniform.log()).log()
        chosen = (logits + how.temperature * noise.to(logits)).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], 1)
    return tokens[:, len(prompt) :].tolist()
