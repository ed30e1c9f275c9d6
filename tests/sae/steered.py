"""What the tests of the architectures with a steered penalty share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.sae import ARCHITECTURES, SparseAutoencoder, init_weights, start_learning, take_step

BANDWIDTH = 0.3


def make_sae(architecture: str, *, d_model: int = 5, d_sae: int = 12, k: int = 3) -> Any:
    options = {"bandwidth": BANDWIDTH} if architecture == "jumprelu" else {}
    return ARCHITECTURES[architecture](d_model=d_model, d_sae=d_sae, k=k, **options)


def make_random(architecture: str, *, scale: float = 0.7) -> Any:
    """A tiny float64 SAE with random parameters, decoder rows not of norm 1, weight 0.4."""
    sae = make_sae(architecture).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * noise)
        sae.input_scale.fill_(scale)
        sae.sparsity_weight.fill_(0.4)
        sae.weight_unit.fill_(0.02)
    return sae


def draw(n: int = 40, d_model: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(n, d_model, generator=generator, dtype=torch.float64)


def clone_parameters(sae: SparseAutoencoder) -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}


def differentiate(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name; zero where the loss does not depend on a parameter."""
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
    }


def differentiate_training(sae: Any, acts: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """A pass in training, and the gradients of a loss of x̂ plus the penalty."""
    passed = sae.train_forward(acts)
    loss = (passed.recon - acts).square().sum() / len(acts) + passed.penalty
    return passed, differentiate(loss, dict(sae.named_parameters()))


def compare(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-9, msg=name)


class Recovery(NamedTuple):
    before: float  # mean over features of the largest cosine with a decoder row
    after: float
    l0: float  # on 4096 rows that were not trained on
    losses: list[float]


def recover(architecture: str, *, n_steps: int) -> Recovery:
    """Train on rows that are sums of 3 of 64 known features in 32 dimensions."""
    generator = torch.Generator().manual_seed(1)  # not the seed of the decoder
    features = nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)

    def draw_rows(n: int = 512) -> Tensor:
        chosen = torch.rand(n, 64, generator=generator).topk(3, dim=1).indices
        strength = torch.rand(n, 3, generator=generator) + 0.5
        return torch.zeros(n, 64).scatter(1, chosen, strength) @ features

    def find_cosine() -> float:
        return (features @ sae.W_dec.T).max(dim=1).values.mean().item()

    sae = make_sae(architecture, d_model=32, d_sae=128, k=3)
    if architecture == "jumprelu":
        sae.bandwidth = 0.03
    init_weights(sae, draw_rows(), seed=0, scale_input=True)
    learner, before, losses = start_learning(sae), find_cosine(), []
    for i in range(n_steps):
        lr = 3e-3 * min(1.0, (i + 1) / 20, (n_steps - i) / (n_steps / 5))
        losses.append(take_step(learner, draw_rows(), lr=lr).loss)
    with torch.no_grad():
        l0 = (sae.encode(draw_rows(4096)).values > 0).sum().item() / 4096
    return Recovery(before, find_cosine(), l0, losses)
