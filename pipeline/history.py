"""What training logs: one row per logged step, through DVCLive as it happens and as Parquet at the
end."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from dvclive.live import Live

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


class History:
    """The logged steps of one SAE; `live` is DVCLive's folder."""

    def __init__(self, live: Path) -> None:
        self._live = _Live(
            str(live), report=None, save_dvc_exp=False, dvcyaml=None, monitor_system=False
        )
        self._rows: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any]) -> None:
        """Append a row with the keys of HISTORY_SCHEMA; DVCLive's files are complete after each."""
        self._rows.append(row)
        self._live.step = row["step"]
        for name, value in row.items():
            if name != "step":
                self._live.log_metric(name, value)
        self._live.sync()

    def close(self, path: Path) -> None:
        """End the DVCLive log and write all rows to a Parquet file."""
        self._live.end()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=HISTORY_SCHEMA), path)


class _Live(Live):
    """DVCLive without its DVC repository.

    Stock `Live` runs `dvc init` and `git add` in a Git repository that is not a DVC one (3.49), and
    asks Git for a revision in every other; all that we want of it are its files.
    """

    def _init_dvc(self) -> None:
        self._dvc_file = "dvc.yaml"
