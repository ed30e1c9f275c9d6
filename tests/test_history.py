from pathlib import Path

import pyarrow.parquet as pq

from pipeline.history import HISTORY_SCHEMA, read_history, write_history
from pipeline.sae import StepMetrics


def make_row(step: int) -> dict:
    metrics = StepMetrics(9.0 / step, 0.0, 0.5, 0.25, 3.5, 7, 1.0, 0.125)
    return {"step": step, "tokens": 10 * step, "lr": 0.1, "tokens_per_s": 5.0, **metrics._asdict()}


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    rows = [make_row(1), make_row(5), make_row(7) | {"overlap": None, "nmse_squared": float("inf")}]
    write_history(tmp_path / "history.parquet", rows)
    assert pq.read_table(tmp_path / "history.parquet").schema == HISTORY_SCHEMA
    assert read_history(tmp_path / "history.parquet") == rows


def test_no_rows_have_the_schema_too(tmp_path: Path) -> None:
    write_history(tmp_path / "history.parquet", [])
    assert pq.read_table(tmp_path / "history.parquet").schema == HISTORY_SCHEMA
    assert read_history(tmp_path / "history.parquet") == []


def test_every_metric_has_a_column() -> None:
    assert HISTORY_SCHEMA.names == [*make_row(1)]
