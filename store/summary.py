"""A store's figures as its manifest has them: no shard is read."""

import math
from typing import NamedTuple

from store.manifest import Manifest


class ArraySummary(NamedTuple):
    """Of one array's rows in all shards, as stored."""

    mean: float
    rms: float
    max_abs: float
    mean_row_norm: float
    saturated: int
    underflowed: int


def count_bytes(manifest: Manifest) -> int:
    """Bytes of all shard files."""
    return sum(file.bytes for shard in manifest.shards for file in shard.files.values())


def summarize_arrays(manifest: Manifest) -> dict[str, ArraySummary]:
    """The shards' statistics put together, for every array that has them.

    Means are weighted by rows: rms = sqrt(sum of n * rms^2 / sum of n), and likewise the others.
    """
    n_rows = [shard.n_rows for shard in manifest.shards]

    def average(values: list[float]) -> float:
        return sum(n * value for n, value in zip(n_rows, values, strict=True)) / sum(n_rows)

    summaries = {}
    for path in manifest.shards[0].statistics:
        parts = [shard.statistics[path] for shard in manifest.shards]
        summaries[path] = ArraySummary(
            mean=average([part.mean for part in parts]),
            rms=math.sqrt(average([part.rms**2 for part in parts])),
            max_abs=max(part.max_abs for part in parts),
            mean_row_norm=average([part.mean_row_norm for part in parts]),
            saturated=sum(part.saturated for part in parts),
            underflowed=sum(part.underflowed for part in parts),
        )
    return summaries
