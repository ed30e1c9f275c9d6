"""How many steps there are, and the learning rate and k of each: pure arithmetic."""

import math
from typing import Literal

from pipeline.config import TrainConfig
from pipeline.errors import TrainError


def plan_steps(config: TrainConfig, n_rows: int) -> int:
    """Number of whole batches in config.steps or config.tokens, else in config.epochs of n_rows.

    n_rows is what the store holds without exclude_positions. Raises TrainError where more is asked
    for than config.epochs give, or too little for one batch.
    """
    available = n_rows * config.epochs
    if config.steps is not None:
        name, wanted = "steps", config.steps * config.batch_size
    else:
        name, wanted = "tokens", available if config.tokens is None else config.tokens
    if n_rows == 0:
        raise TrainError(
            "train.exclude_positions: expected to leave rows to train on, got none. Leave out "
            "fewer positions or cache more."
        )
    if available < config.batch_size:
        raise TrainError(
            f"train.batch_size: expected at most the {available} rows to train on, "
            f"got {config.batch_size}. Lower --batch-size or cache more."
        )
    if wanted < config.batch_size:
        raise TrainError(
            f"train.tokens: expected at least one batch of {config.batch_size} rows, got {wanted}. "
            "Raise --tokens or lower --batch-size."
        )
    if wanted > available:
        asked, most = wanted, available
        if name == "steps":
            asked, most = wanted // config.batch_size, available // config.batch_size
        raise TrainError(
            f"train.{name}: expected at most {most} ({config.epochs} epochs of {n_rows} "
            f"rows), got {asked}. Lower --{name}, raise --epochs or cache more."
        )
    return wanted // config.batch_size


def plan_lr(
    step: int,
    n_steps: int,
    *,
    lr: float,
    warmup: float,
    decay: float,
    shape: Literal["linear", "cosine"] = "linear",
    end: float = 0.0,
) -> float:
    """Learning rate of one step, counted from 0; warmup and decay are fractions of n_steps.

    Of the decay, t in (0, 1) is what has passed, and 1 would be one step after the last:

        lr (end + (1 - end) (1 - t))                  linear
        lr (end + (1 - end) (1 + cos(pi t)) / 2)      cosine (Loshchilov & Hutter 2017, section 3)
    """
    n_warmup, n_decay = round(n_steps * warmup), round(n_steps * decay)
    # 1) linear warm-up, short of lr while it lasts
    if step < n_warmup:
        return lr * (step + 1) / (n_warmup + 1)
    # 2) constant
    if step < n_steps - n_decay:
        return lr
    # 3) decay to end * lr
    left = (n_steps - step) / (n_decay + 1)
    if shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return lr * (end + (1 - end) * left)


def plan_k(step: int, n_steps: int, *, k: int, k_start: int | None, fraction: float) -> int:
    """k of one step, counted from 0: from k_start down to k in equal steps, rounded, then k.

    k is reached after `fraction` of n_steps, and by the last step in any case. Without k_start it
    is k throughout.
    """
    n_anneal = min(round(n_steps * fraction), n_steps - 1)
    if k_start is None or step >= n_anneal:
        return k
    return round(k_start + (k - k_start) * step / n_anneal)


def find_lr(config: TrainConfig, step: int, n_steps: int) -> float:
    """`plan_lr` with the configuration's shape."""
    return plan_lr(
        step,
        n_steps,
        lr=config.lr,
        warmup=config.lr_warmup_fraction,
        decay=config.lr_decay_fraction,
        shape=config.lr_decay,
        end=config.lr_end_fraction,
    )


def find_k(config: TrainConfig, step: int, n_steps: int, *, k: int) -> int:
    """`plan_k` with the configuration's start."""
    return plan_k(step, n_steps, k=k, k_start=config.k_start, fraction=config.k_anneal_fraction)
