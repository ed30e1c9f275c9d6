"""Directions in activation space to go from an activation, and what they are drawn from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from pipeline.model import LanguageModel, check_hooks, final_hidden


def start_generator(*numbers: int) -> Generator:
    """A generator of its own for each tuple of numbers, such as (seed, block): what is drawn for a
    block does not depend on the batch that it comes in.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(state >> np.uint64(1)))


def scale_to_unit(directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """u / ||u||_2 of each row; a row of zeros stays as it is."""
    return torch.nn.functional.normalize(directions, dim=-1, eps=torch.finfo(torch.float32).tiny)


def draw_isotropic(n: int, d_model: int, generator: Generator) -> Float[Tensor, "n d_model"]:
    """Unit vectors uniform on the sphere, float64."""
    return scale_to_unit(torch.randn(n, d_model, generator=generator, dtype=torch.float64))


def factor_covariance(
    covariance: Float[Tensor, "d_model d_model"],
) -> Float[Tensor, "d_model d_model"]:
    """F with F Fᵀ = covariance, float64: eigenvectors times roots of eigenvalues.

    Not Cholesky's factor: of fewer rows than d_model, or in a folded model, whose residual stream
    is centred, a covariance is singular.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    return vectors * values.clamp(min=0).sqrt()


def draw_covariance(
    factor: Float[Tensor, "d_model d_model"], n: int, generator: Generator
) -> Float[Tensor, "n d_model"]:
    """Normal vectors of mean 0 and covariance F Fᵀ, not of unit norm: F w, w ~ N(0, I); float64."""
    white = torch.randn(n, len(factor), generator=generator, dtype=factor.dtype)
    return white @ factor.T


class Moments:
    """Sums over rows, in float64, from which their covariance follows."""

    def __init__(self, d_model: int) -> None:
        self.n = 0
        self.total = torch.zeros(d_model, dtype=torch.float64)
        self.squares = torch.zeros(d_model, d_model, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "rows d_model"]) -> None:
        rows = rows.double()
        self.n += len(rows)
        self.total += rows.sum(0)
        self.squares += rows.T @ rows

    @property
    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        """E[x xᵀ] - E[x] E[x]ᵀ of the rows so far."""
        mean = self.total / self.n
        return self.squares / self.n - torch.outer(mean, mean)


@torch.no_grad()
def read_acts(
    model: LanguageModel, tokens: Int[Tensor, "batch context_and_one"], hooks: Sequence[str]
) -> dict[str, Float[Tensor, "batch context d_model"]]:
    """Activations at sites, from one forward pass; tokens as `capture` takes them, on any device.

    Raises ModelError if the model lacks a hook.
    """
    check_hooks(model, hooks)
    acts: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(value: Tensor, **_: Any) -> None:
            acts[name] = value

        return hook

    inputs = tokens[:, :-1].to(model.device)
    final_hidden(model.bridge, inputs, [(name, keep(name)) for name in hooks])
    return acts
