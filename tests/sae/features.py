"""Data whose sparse features are known: three of 32 directions per row, weighted by 1 to 2."""

import torch
from torch import Tensor

D_MODEL, N_FEATURES, N_ACTIVE = 40, 32, 3
OPTIONS = {"n_experts": 2, "bandwidth": 0.03, "n_tokens": 10}  # for architectures that have them

# A seed that no SAE of the tests starts from: init_weights would draw the same directions.
_drawn = torch.randn(N_FEATURES, D_MODEL, generator=torch.Generator().manual_seed(987654321))
FEATURES = _drawn / _drawn.norm(dim=1, keepdim=True)


def draw_rows(n: int, generator: torch.Generator) -> Tensor:
    """Rows [n, D_MODEL]."""
    active = torch.rand(n, N_FEATURES, generator=generator).topk(N_ACTIVE, dim=1).indices
    weights = 1 + torch.rand(n, N_ACTIVE, generator=generator)
    return torch.zeros(n, N_FEATURES).scatter(1, active, weights) @ FEATURES
