"""float32, float16, bfloat16 and int8 with scales on disk, and float32 tensors in memory.

Numbers that a format cannot hold are counted, recorded in the shard's statistics, and refused past
a threshold: *saturated* values are finite and beyond its largest number (which is stored instead),
*underflowed* values are not zero and would round to zero. NaN and Inf are always refused.

An int8 value is q * row_scale * channel_scale, in float32 and in that order. The scales are chosen
for each shard so that |q| is 127 at most, and 127 once in each row:

    channel_scale[j] = sqrt(d_model * mean over rows i of (x[i, j] / norm(x[i]))^2)
    row_scale[i] = max over j of |x[i, j]| / channel_scale[j] / 127

Each row counts once in the mean, whatever its norm, so that a position with a norm in the thousands
does not set the scale of the others. |error| <= row_scale * channel_scale / 2, and rounding.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from store.errors import NumberRangeError

# Of an array's values in one shard: a saturated value is a wrong one.
MAX_SATURATED_FRACTION = 1e-6
# Of an array's nonzero values in one shard: each is off by less than 3e-8 in float16. Not for int8,
# which rounds whatever is small against its row to zero.
MAX_UNDERFLOWED_FRACTION = 0.01
_ROWS_AT_ONCE = 256  # so few that their float64 copies stay in the processor's cache
_LARGEST_INT8 = 127
SMALLEST_SCALE = np.float32(2.0**-126)  # no subnormal numbers, which lose precision


class NumberFormat(NamedTuple):
    """How an array's numbers are stored."""

    name: str
    disk: np.dtype  # what Zarr sees; bfloat16 is kept as the uint16 of its bits
    fill: float | int  # of slots without a row: NaN, the NaN bits 0xFFFF, -1, or -128
    memory: torch.dtype  # a torch dtype with the same values
    largest: float  # what is stored of finite values beyond it
    scaled: bool = False  # values are numbers times a row's scale times a channel's


FORMATS = {
    "float32": NumberFormat(
        "float32", np.dtype("<f4"), float("nan"), torch.float32, torch.finfo(torch.float32).max
    ),
    "float16": NumberFormat("float16", np.dtype("<f2"), float("nan"), torch.float16, 65504.0),
    "bfloat16": NumberFormat(
        "bfloat16", np.dtype("<u2"), 0xFFFF, torch.bfloat16, torch.finfo(torch.bfloat16).max
    ),
    # Far enough below float32's largest number that no scale of a shard can reach it.
    "int8": NumberFormat("int8", np.dtype("i1"), -128, torch.float32, 2.0**96, scaled=True),
    "int32": NumberFormat("int32", np.dtype("<i4"), -1, torch.int32, 2.0**31 - 1),
}
VALUE_FORMATS = ("float32", "float16", "bfloat16", "int8")  # of activations and gradients


class Statistics(BaseModel):
    """Of one array's real rows in one shard, as stored; sums are taken in float64."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    mean: float  # of all values
    rms: float  # root of the mean square of all values
    max_abs: float
    mean_row_norm: float  # mean over rows of the Euclidean norm
    saturated: int  # finite values beyond the format's largest, which is stored instead
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


class Encoded(NamedTuple):
    """An array's values, checked and ready to be stored."""

    stored: Stored
    statistics: Statistics


def encode_numbers(values: Tensor, number_format: NumberFormat) -> Stored:
    """The values as the disk will hold them; saturated ones become the largest finite number.

    Of a scaled format: values [rows, width] of a whole shard, finite.
    """
    values = values.detach().contiguous()
    if number_format.scaled:
        return _encode_scaled(
            values.float().clamp(-number_format.largest, number_format.largest).numpy()
        )
    converted = torch.empty_like(values, dtype=number_format.memory)
    for here in _cut_rows(len(values)):
        part = values[here].to(number_format.memory)
        if number_format.memory.is_floating_point:
            torch.clamp(part, -number_format.largest, number_format.largest, out=converted[here])
        else:
            converted[here] = part
    if number_format.name == "bfloat16":  # numpy has no bfloat16
        converted = converted.view(torch.int16)
    return Stored(converted.numpy().view(number_format.disk))


def _encode_scaled(values: np.ndarray) -> Stored:
    """In float64 and numpy, because torch's sums depend on the number of threads."""
    channel_scale = find_channel_scale(values)
    row_scale = np.empty(len(values), np.float32)
    numbers = np.empty(values.shape, np.int8)
    for here in _cut_rows(len(values)):
        ratio = values[here] / channel_scale.astype(np.float64)
        exact = np.abs(ratio).max(axis=1) / _LARGEST_INT8
        scale = np.maximum(exact, SMALLEST_SCALE * (exact > 0)).astype(np.float32)
        # Rounded up, so that no ratio to it is larger than 127.
        scale = np.where(scale < exact, np.nextafter(scale, np.float32(np.inf)), scale)
        row_scale[here] = scale
        ratio /= np.where(scale > 0, scale, 1)[:, None]
        numbers[here] = np.rint(ratio, out=ratio)
    return Stored(numbers, row_scale, channel_scale)


def find_channel_scale(values: np.ndarray) -> np.ndarray:
    """How large each channel is in a row of unit root mean square: float32 [width].

    1 where that is zero or too small for a float32. values [rows, width], finite; rows of zeros
    count for nothing.
    """
    squares, n_rows = np.zeros(values.shape[1]), 0
    for here in _cut_rows(len(values)):
        part = np.square(values[here], dtype=np.float64)
        norms = part.sum(axis=1)
        n_rows += np.count_nonzero(norms)
        part /= np.where(norms > 0, norms, 1)[:, None]
        squares += part.sum(axis=0)
    scale = np.sqrt(squares * (values.shape[1] / max(n_rows, 1))).astype(np.float32)
    return np.where(scale < SMALLEST_SCALE, np.float32(1), scale)


def decode_numbers(
    stored: Stored, number_format: NumberFormat, out: Tensor | None = None
) -> Tensor:
    """The exact stored values as float32 or int32, written into `out` where it is given.

    The numbers must be writable; without `out` the result may share their memory.
    """
    values = view_numbers(stored.numbers, number_format)
    if number_format.scaled:
        assert stored.row_scale is not None
        assert stored.channel_scale is not None
        # Faster than torch.mul of int8 and float32, which makes a copy of its own first.
        out = values.float() if out is None else out.copy_(values)
        out.mul_(torch.from_numpy(stored.row_scale)[:, None])
        return out.mul_(torch.from_numpy(stored.channel_scale))
    if out is not None:
        return out.copy_(values)
    return values.float() if number_format.memory.is_floating_point else values


def view_numbers(numbers: np.ndarray, number_format: NumberFormat) -> Tensor:
    """The numbers, which must be writable, as a tensor on the same memory; int8 unscaled."""
    if number_format.name == "bfloat16":  # numpy has no bfloat16
        return torch.from_numpy(numbers.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(numbers)


def check_numbers(
    values: Float[Tensor, "rows width"], number_format: NumberFormat, names: RowNames
) -> Encoded:
    """Encode the values and measure them as the format holds them.

    Raises NumberRangeError, naming shard, array, block and position, for NaN or Inf, for more than
    MAX_SATURATED_FRACTION of the values saturated, or, unless in int8, more than
    MAX_UNDERFLOWED_FRACTION of the nonzero ones underflowed.
    """
    _check_finite(values, names)
    encoded = encode_numbers(values, number_format)
    sums, squares, maxima = [], [], []
    saturated = torch.zeros(len(values), dtype=torch.int64)  # values per row
    n_nonzero, n_underflowed = 0, 0
    decoded = torch.empty(min(_ROWS_AT_ONCE, len(values)), values.shape[1])
    exact = np.empty(decoded.shape)
    for here in _cut_rows(len(values)):
        part = values[here]
        stored = decode_numbers(encoded.take(here), number_format, out=decoded[: len(part)])
        if _find_largest(part) > number_format.largest:  # or else there is nothing to count
            beyond = part.to(number_format.memory).abs() > number_format.largest
            saturated[here] = beyond.sum(dim=1)
        nonzero = _count_nonzero(part)
        n_nonzero += nonzero
        n_underflowed += nonzero - _count_nonzero(stored)  # zeros stay zeros
        maxima.append(_find_largest(stored))
        # In numpy, because torch's sums depend on the number of threads.
        numbers = exact[: len(part)]
        numbers[:] = stored.numpy()
        sums.append(numbers.sum(axis=1))
        squares.append(np.square(numbers, out=numbers).sum(axis=1))
    doing = f"in {number_format.name}"
    _check_lost(saturated, values.numel(), MAX_SATURATED_FRACTION, f"saturating {doing}", names)
    if not number_format.scaled and n_underflowed > MAX_UNDERFLOWED_FRACTION * n_nonzero:
        underflowed = _count_underflowed(values, encoded, number_format)
        limit = MAX_UNDERFLOWED_FRACTION
        _check_lost(underflowed, n_nonzero, limit, f"underflowing {doing}", names)
    row_squares = np.concatenate(squares)
    statistics = Statistics(
        mean=float(np.concatenate(sums).sum() / values.numel()),
        rms=float(np.sqrt(row_squares.sum() / values.numel())),
        max_abs=float(max(maxima)),
        mean_row_norm=float(np.sqrt(row_squares).mean()),
        saturated=int(saturated.sum()),
        underflowed=n_underflowed,
    )
    return Encoded(encoded, statistics)


def _cut_rows(n_rows: int) -> Iterator[slice]:
    return (slice(i, min(i + _ROWS_AT_ONCE, n_rows)) for i in range(0, n_rows, _ROWS_AT_ONCE))


def _check_finite(values: Float[Tensor, "rows width"], names: RowNames) -> None:
    if all(np.isfinite(_find_largest(values[here])) for here in _cut_rows(len(values))):
        return
    finite = values.isfinite().all(dim=1)
    row = int((~finite).nonzero()[0])
    value = values[row][~values[row].isfinite()][0].item()
    raise NumberRangeError(
        f"{names.of(row)}: expected finite numbers, got {value}. "
        "Look at the model's output for that block, or set cache.precision to float32, and run "
        "`pipeline cache` again."
    )


def _count_underflowed(
    values: Float[Tensor, "rows width"], encoded: Stored, number_format: NumberFormat
) -> Int[Tensor, " rows"]:
    stored = decode_numbers(encoded, number_format)
    return ((values != 0) & (stored == 0)).sum(dim=1)


def _find_largest(part: Float[Tensor, "rows width"]) -> float:
    """The largest absolute value; NaN where there is one."""
    numbers = part.numpy()
    return float(np.maximum(numbers.max(), -numbers.min()))


def _count_nonzero(part: Float[Tensor, "rows width"]) -> int:
    return part.numel() - int(np.count_nonzero(part.numpy() == 0))


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
