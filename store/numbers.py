"""float32, float16 and bfloat16 on disk, and float32 tensors in memory.

Numbers that a format cannot hold are counted, recorded in the shard's statistics, and refused past
a threshold: *saturated* values are finite and would round to infinity (stored as the largest finite
number), *underflowed* values are not zero and would round to zero. NaN and Inf are always refused.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from store.errors import NumberRangeError

# Of an array's values in one shard: a saturated value is a wrong one.
MAX_SATURATED_FRACTION = 1e-6
# Of an array's nonzero values in one shard: each is off by less than 3e-8 in float16.
MAX_UNDERFLOWED_FRACTION = 0.01
_ROWS_AT_ONCE = 4096  # bounds the float64 copies


class NumberFormat(NamedTuple):
    """How an array's numbers are stored."""

    name: str
    disk: np.dtype  # what Zarr sees; bfloat16 is kept as the uint16 of its bits
    fill: float | int  # of slots without a row: NaN, the NaN bits 0xFFFF, or -1
    memory: torch.dtype  # the torch dtype with the same values


FORMATS = {
    "float32": NumberFormat("float32", np.dtype("<f4"), float("nan"), torch.float32),
    "float16": NumberFormat("float16", np.dtype("<f2"), float("nan"), torch.float16),
    "bfloat16": NumberFormat("bfloat16", np.dtype("<u2"), 0xFFFF, torch.bfloat16),
    "int32": NumberFormat("int32", np.dtype("<i4"), -1, torch.int32),
}
FLOAT_FORMATS = ("float32", "float16", "bfloat16")


class Statistics(BaseModel):
    """Of one array's real rows in one shard, as stored; sums are taken in float64."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    mean: float  # of all values
    rms: float  # root of the mean square of all values
    max_abs: float
    mean_row_norm: float  # mean over rows of the Euclidean norm
    saturated: int  # finite values that the format would have rounded to infinity
    underflowed: int  # values that were not zero and are stored as zero


class Stored(NamedTuple):
    """Numbers as they are on disk, with what turns them back into values."""

    numbers: np.ndarray  # [rows, *row_shape] of the disk dtype
    row_scale: np.ndarray | None = None  # float32 [rows], of a scaled format
    channel_scale: np.ndarray | None = None  # float32 [width], of a scaled format

    def take(self, rows: np.ndarray | slice) -> "Stored":
        """Some of the rows; a view where `rows` is a slice."""
        scale = None if self.row_scale is None else self.row_scale[rows]
        return Stored(self.numbers[rows], scale, self.channel_scale)


class RowNames(NamedTuple):
    """What to call the rows in an error message."""

    shard: int
    array: str
    block: Int[Tensor, " rows"]
    position: Int[Tensor, " rows"]

    def of(self, row: int) -> str:
        block, position = int(self.block[row]), int(self.position[row])
        return f"{self.array} at shard {self.shard}, block {block}, position {position}"


def encode_numbers(values: Tensor, number_format: NumberFormat) -> Stored:
    """The values as the disk will hold them; saturated ones become the largest finite number."""
    converted = values.detach().to(number_format.memory).contiguous()
    if number_format.memory.is_floating_point:
        limit = torch.finfo(number_format.memory).max
        converted = converted.clamp(-limit, limit)
    if number_format.name == "bfloat16":  # numpy has no bfloat16
        converted = converted.view(torch.int16)
    return Stored(converted.numpy().view(number_format.disk))


def decode_numbers(
    stored: Stored, number_format: NumberFormat, out: Tensor | None = None
) -> Tensor:
    """The exact stored values as float32 or int32, written into `out` where it is given.

    The numbers must be writable; without `out` the result may share their memory.
    """
    if number_format.name == "bfloat16":  # numpy has no bfloat16
        values = torch.from_numpy(stored.numbers.view(np.int16)).view(torch.bfloat16)
    else:
        values = torch.from_numpy(stored.numbers)
    if out is not None:
        return out.copy_(values)
    return values.float() if number_format.memory.is_floating_point else values


def check_numbers(
    values: Float[Tensor, "rows width"], number_format: NumberFormat, names: RowNames
) -> Statistics:
    """Measure the values as the format will hold them.

    Raises NumberRangeError, naming shard, array, block and position, for NaN or Inf, for more than
    MAX_SATURATED_FRACTION of the values saturated, or more than MAX_UNDERFLOWED_FRACTION of the
    nonzero ones underflowed.
    """
    sums, squares, maxima = [], [], []
    saturated = torch.zeros(len(values), dtype=torch.int64)  # values per row
    underflowed, nonzero = torch.zeros_like(saturated), 0
    for first in range(0, len(values), _ROWS_AT_ONCE):
        part = values[first : first + _ROWS_AT_ONCE]
        _check_finite(part, first, names)
        stored = decode_numbers(encode_numbers(part, number_format), number_format)
        here = slice(first, first + len(part))
        saturated[here] = part.to(number_format.memory).isinf().sum(dim=1)
        underflowed[here] = ((part != 0) & (stored == 0)).sum(dim=1)
        nonzero += int(torch.count_nonzero(part))
        # In numpy, because torch's sums depend on the number of threads.
        exact = stored.numpy().astype(np.float64)
        sums.append(exact.sum(axis=1))
        squares.append(np.square(exact).sum(axis=1))
        maxima.append(np.abs(exact).max())
    doing = f"in {number_format.name}"
    _check_lost(saturated, values.numel(), MAX_SATURATED_FRACTION, f"saturating {doing}", names)
    _check_lost(underflowed, nonzero, MAX_UNDERFLOWED_FRACTION, f"underflowing {doing}", names)
    row_squares = np.concatenate(squares)
    return Statistics(
        mean=float(np.concatenate(sums).sum() / values.numel()),
        rms=float(np.sqrt(row_squares.sum() / values.numel())),
        max_abs=float(max(maxima)),
        mean_row_norm=float(np.sqrt(row_squares).mean()),
        saturated=int(saturated.sum()),
        underflowed=int(underflowed.sum()),
    )


def _check_finite(part: Float[Tensor, "rows width"], first: int, names: RowNames) -> None:
    finite = part.isfinite()
    if finite.all():
        return
    row = int((~finite.all(dim=1)).nonzero()[0])
    value = part[row][~finite[row]][0].item()
    raise NumberRangeError(
        f"{names.of(first + row)}: expected finite numbers, got {value}. "
        "Look at the model's output for that block, or set cache.precision to float32, and run "
        "`pipeline cache` again."
    )


def _check_lost(
    lost: Int[Tensor, " rows"], n_values: int, limit: float, doing: str, names: RowNames
) -> None:
    n_lost = int(lost.sum())
    if n_lost <= limit * n_values:
        return
    setting = f"cache.{names.array.rpartition('/')[2]}_dtype"
    raise NumberRangeError(
        f"{names.of(int(lost.nonzero()[0]))} (the first): expected at most a fraction {limit:g} of "
        f"the values {doing}, got {n_lost} of {n_values}. "
        f"Set {setting} to bfloat16 or float32 and run `pipeline cache` again."
    )
