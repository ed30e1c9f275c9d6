"""Which device to run on, and how fast it multiplies."""

import time

import torch


def pick_device(name: str) -> str:
    """The device that `auto` stands for here: cuda where there is one, else cpu."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


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
