"""What a training step needs of a batch, which batches are refused, and shuffled gradients."""

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import TrainError
from store.layout import draw_keys


@runtime_checkable
class Rows(Protocol):
    """Rows for one step, such as `store.Batch`.

    A batch may have an `objective` too, a function of x̂ that is minimised in place of the squared
    error (`pipeline.end_to_end`).
    """

    @property
    def acts(self) -> Tensor: ...  # [batch, d_model]
    @property
    def grads(self) -> Tensor: ...  # [batch, d_model], of the summed loss
    @property
    def tokens(self) -> Tensor: ...  # [batch]


def take(batches: Iterable[Rows], n: int) -> Iterator[Rows]:
    """The first n, without asking for one more: the stream would read it from disk."""
    return (batch for _, batch in zip(range(n), batches, strict=False))


def check_rows(batch: Rows, *, d_model: int, step: int) -> None:
    """Raise TrainError for rows that are not d_model wide or not finite, naming the first."""
    for name in ("acts", "grads"):
        tensor = getattr(batch, name)
        if tensor.ndim != 2 or tensor.shape[1] != d_model:
            raise TrainError(
                f"{name} at step {step}: expected [batch, {d_model}], got {list(tensor.shape)}."
            )
        bad = ~torch.isfinite(tensor).all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise TrainError(
                f"{name} at step {step}{_locate(batch, row)}: expected finite values, got NaN or "
                f"Inf. Cache these activations again with pipeline cache."
            )


def shuffle_gradients(
    grads: Float[Tensor, "batch d_model"], *, seed: int, step: int, rank: int = 0
) -> Float[Tensor, "batch d_model"]:
    """Each row's gradient to another row, for the control of `train.gradients`.

        shuffled_i = grads_perm(i)        perm = stable argsort of draw_keys((seed, step, rank), n)

    What a gradient says of its own row is lost, while the batch's gradients stay the same as a set;
    on average one row keeps its own. A pure function of its arguments, so that training goes on
    from a checkpoint with the same bits, and members beside each other get the same gradients. Of
    several processes each permutes its own rows, by its `rank`, so that their number decides which
    rows meet.
    """
    order = draw_keys((seed, step, rank), len(grads)).argsort(kind="stable")
    return grads[torch.from_numpy(order).to(grads.device)]


def _locate(batch: Rows, row: int) -> str:
    """Where a row came from, if its batch says so."""
    places = {name: getattr(batch, name, None) for name in ("block", "position")}
    return "".join(f", {key} {int(at[row])}" for key, at in places.items() if at is not None)
