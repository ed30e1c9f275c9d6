"""Which device to run on, and how fast it multiplies."""

import time

import torch

from pipeline.errors import ConfigError


def pick_device(name: str) -> str:
    """The device named, or for `auto` cuda where there is one, else cpu.

    Raises ConfigError if there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"run.device: expected auto, cpu, or a cuda device that is here, got {name} "
            f"({reason:.80})."
        ) from None
    return name


def product_rate(n_rows: int, d_model: int, *, device: str, precision: str) -> float:
    """Multiply-adds per second of [n_rows, d_model] @ [d_model, 4 d_model], best of five."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left = torch.randn(n_rows, d_model, device=device, dtype=dtype)
    right = torch.randn(d_model, 4 * d_model, device=device, dtype=dtype)
    seconds = min(_time_product(left, right) for _ in range(5))
    return n_rows * d_model * 4 * d_model / seconds


def _time_product(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    (left @ right)[0, 0].item()
    return time.perf_counter() - started
