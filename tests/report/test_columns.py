"""Cells that evaluation does not write: each is named, and none is a dash on the page."""

import csv
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.report import build_report
from pipeline.report.exhibits import read_tables
from pipeline.report.exhibits.columns import COLUMNS, check_tables
from tests import report_data
from tests.report.evidence import write_tables
from tests.report.tables import make_all

TABLES = make_all(report_data.make_metrics()["saes"])


def damage(folder: Path, table: str, column: str, cell: str, *, row: int = 2) -> None:
    """All tables, with one cell changed in one of them."""
    write_tables(folder, TABLES)
    path = folder / f"{table}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[row][rows[0].index(column)] = cell
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize(
    ("table", "column", "cell", "got"),
    [
        ("dead", "dead_held_out", "", "none"),
        ("dead", "dead_held_out", "nan", "none"),
        ("dead", "dead_held_out", "-inf", "none"),
        ("dead", "dead_held_out", "many", "'many'"),  # which makes text of the whole column
        ("dead", "dead_held_out_low", "many", "'many'"),  # an interval is empty or a number
        ("dead", "k", "1_", "'1_'"),
        ("saes", "loss_added", "", "none"),
        ("controls", "nmse", "#REF!", "'#REF!'"),
        ("fronts", "y", "nan", "none"),
        ("firing", "firing_frequency", "", "none"),
        ("density_medians", "median_all", "", "none"),
        ("sensitivity", "ratio_to_covariance", "", "none"),
        ("perturbation", "norm", "", "none"),
        ("perturbation", "rho_gradient", "high", "'high'"),
        ("steering", "associated", "", "none"),
        ("steering_latents", "others_absolute", "inf", "none"),
        ("splitting", "fraction", "", "none"),
        ("splitting_summary", "live", "", "none"),
        ("splitting_gradients", "gradient", "nan", "none"),
        ("claims", "value", "", "none"),  # of a claim that holds
        ("claims", "low", "nan", "none"),
        ("claims", "seeds_low", "low", "'low'"),
    ],
)
def test_a_cell_without_its_number_is_named(tmp_path, table, column, cell, got):
    damage(tmp_path, table, column, cell)
    with pytest.raises(PipelineError) as error:
        check_tables(read_tables(tmp_path), tmp_path)
    assert str(error.value) == (
        f"table at {tmp_path / table}.csv: expected a finite number in column {column}, got {got} "
        "in row 2. Run `pipeline evaluate`."
    )


@pytest.mark.parametrize(
    ("table", "column"),
    [("dead", "sae"), ("controls", "sees_label"), ("fronts", "panel"), ("claims", "verdict")],
)
def test_a_cell_without_its_word_is_named(tmp_path, table, column):
    damage(tmp_path, table, column, "")
    with pytest.raises(PipelineError, match=f"{table}.*something in column {column}, got none"):
        check_tables(read_tables(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("dead", "dead_paper"),  # of fewer than 20,480 rows
        ("dead", "dead_held_out_high"),  # of fewer than 8 latents
        ("density_medians", "median_live"),  # where none is live
        ("perturbation", "rho_gradient"),  # of a single sequence
        ("splitting_summary", "ratio"),  # of fewer than three live latents
        ("splitting_gradients", "gradient_active"),  # where none fires
    ],
)
def test_a_cell_may_be_empty_where_there_is_too_little(tmp_path, table, column):
    damage(tmp_path, table, column, "")
    check_tables(read_tables(tmp_path), tmp_path)


def test_a_page_of_too_little_shows_the_rest():
    """Everything empty that may be, and no claim decided."""
    little = {
        name: [{**row, **dict.fromkeys(COLUMNS[name].may_lack)} for row in rows]
        for name, rows in TABLES.items()
    }
    little["claims"] = [{**row, "verdict": "not decided"} for row in little["claims"]]
    page = build_report(**report_data.make_inputs(), evidence=little)
    assert page.count('<article class="exhibit"') == 8
    assert "nan" not in page


def test_every_table_is_looked_at():
    assert set(COLUMNS) == set(TABLES)
