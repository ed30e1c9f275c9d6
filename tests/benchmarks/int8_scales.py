"""What int8 loses by the kind of its scales: `python -m tests.benchmarks.int8_scales [STORE]`.

Rounds the activations and gradients of a float32 or float16 store, shard by shard, with one scale
for each row, with one for each channel (set by all rows but position 0, whose values beyond it are
clipped) and with both, as stores do. Without a store: synthetic rows with two channels of 100 times
the others and a position 0 of norm 3000. Prints the relative error ||x - x'||^2 / ||x||^2, position
0 apart, and one JSON line last.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from store.numbers import FORMATS, decode_numbers, encode_numbers
from store.reader import open_store

CONTEXT, D_MODEL, N_BLOCKS = 256, 768, 64


class Part(NamedTuple):
    """Rows of one shard."""

    array: str  # "acts" or "grads"
    values: Tensor  # [rows, d_model]
    position: Tensor  # [rows]


class Errors(NamedTuple):
    median: float  # over rows of the row's relative error; position 0 left out, as below
    total: float  # squared error of all rows over their squares
    first: float  # the same of position 0
    clipped: int  # values beyond 127 steps, of any position


def round_per_row(values: Tensor, _: Tensor) -> tuple[Tensor, int]:
    scale = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    return (values / scale).round() * scale, 0


def round_per_channel(values: Tensor, position: Tensor) -> tuple[Tensor, int]:
    scale = values[position > 0].abs().amax(dim=0).clamp_min(1e-30) / 127
    numbers = (values / scale).round()
    return numbers.clamp(-127, 127) * scale, int((numbers.abs() > 127).sum())


def round_per_row_and_channel(values: Tensor, _: Tensor) -> tuple[Tensor, int]:
    return decode_numbers(encode_numbers(values, FORMATS["int8"]), FORMATS["int8"]), 0


KINDS = {
    "row": round_per_row,
    "channel": round_per_channel,
    "row x channel": round_per_row_and_channel,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path, nargs="?")
    arguments = parser.parse_args()
    parts = list(read_parts(arguments.store) if arguments.store else make_parts())
    print("| array | scale per | median | total | position 0 | clipped |")
    print("|---|---|---|---|---|---|")
    totals = {}
    for array in dict.fromkeys(part.array for part in parts):
        for kind, rounding in KINDS.items():
            errors = measure([part for part in parts if part.array == array], rounding)
            totals[array, kind] = errors.total
            print(
                f"| {array} | {kind} | {errors.median:.2e} | {errors.total:.2e} | "
                f"{errors.first:.2e} | {errors.clipped} |"
            )
    found, other = totals["acts", "row x channel"], min(totals["acts", k] for k in list(KINDS)[:2])
    print(
        json.dumps(
            {
                "name": "int8 acts, scales per row and channel against the better of one alone",
                "value": found,
                "unit": "relative squared error",
                "against": other,
                "ratio": found / other,
            }
        )
    )


def read_parts(path: Path) -> Iterator[Part]:
    opened = open_store(path)
    for shard in opened.shards:
        rows = opened.read_shard(shard.index, opened.hooks[0])
        yield Part("acts", rows.acts, rows.position)
        yield Part("grads", rows.grads, rows.position)


def make_parts() -> Iterator[Part]:
    values = torch.randn(N_BLOCKS * CONTEXT, D_MODEL, generator=torch.Generator().manual_seed(0))
    values[:, [100, 400]] *= 100
    position = torch.arange(len(values)) % CONTEXT
    values[position == 0] *= 3000 / values[position == 0].norm(dim=1, keepdim=True)
    yield Part("acts", values, position)


def measure(parts: list[Part], rounding: Callable[[Tensor, Tensor], tuple[Tensor, int]]) -> Errors:
    errors, squares, clipped = [], [], 0
    for _, values, position in parts:
        rounded, n_clipped = rounding(values, position)
        errors.append((values.double() - rounded.double()).square().sum(dim=1))
        squares.append(values.double().square().sum(dim=1))
        clipped += n_clipped
    error, square = torch.cat(errors), torch.cat(squares)
    first = torch.cat([part.position for part in parts]) == 0
    kept = ~first & (square > 0)
    return Errors(
        median=float((error[kept] / square[kept]).median()),
        total=float(error[kept].sum() / square[kept].sum()),
        first=float(error[first].sum() / square[first].sum()),
        clipped=clipped,
    )


if __name__ == "__main__":
    main()
