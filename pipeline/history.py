"""What training logs of each SAE: one row per logged step, as Parquet at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]  # with the keys of HISTORY_SCHEMA

HISTORY_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimizer steps taken, from 1
        ("tokens", pa.int64()),  # rows trained on
        ("lr", pa.float64()),
        ("tokens_per_s", pa.float64()),  # rows per second, all members together, since the last row
        ("loss", pa.float64()),
        ("penalty", pa.float64()),
        ("nmse", pa.float64()),
        ("nmse_squared", pa.float64()),
        ("l0", pa.float64()),
        ("dead_latents", pa.int64()),
        ("overlap", pa.float64()),
        ("gradient_weight", pa.float64()),
    ]
)


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """Write an SAE's logged steps to a Parquet file."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=HISTORY_SCHEMA), path)


def read_history(path: Path) -> list[Row]:
    """The rows that `write_history` wrote."""
    return pq.read_table(path, schema=HISTORY_SCHEMA).to_pylist()
