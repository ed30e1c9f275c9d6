"""`dvc plots` and `dvc metrics diff` on what evaluation writes."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.report.exhibits import read_table
from tests import report_data
from tests.report.evidence import write_tables
from tests.report.tables import make_all

REPOSITORY = Path(__file__).parents[2]
TOP = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())
PLOTS = [entry for entry in TOP["plots"] if "/live" not in str(entry)]  # training's are not here


@pytest.fixture
def results(tmp_path):
    """A repository with this one's metrics and plots, and made-up results."""
    folder = tmp_path / "results/demo"
    folder.mkdir(parents=True)
    metrics = report_data.make_metrics(report_data.EIGHT)
    report_data.write_json(folder / "metrics.json", metrics)
    write_tables(folder, make_all(metrics["saes"]))
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, "dvc", "init", "-q")
    if (REPOSITORY / ".dvc/plots").is_dir():
        shutil.copytree(REPOSITORY / ".dvc/plots", tmp_path / ".dvc/plots", dirs_exist_ok=True)
    (tmp_path / "params.yaml").write_text("profile: demo\n")
    with (tmp_path / "dvc.yaml").open("w") as file:
        YAML().dump({"vars": TOP["vars"], "metrics": TOP["metrics"], "plots": PLOTS}, file)
    return folder


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def find_columns(entry: Mapping[str, Any]) -> dict[str, str]:
    """The column that a plot draws of each of its tables."""
    ((name, axes),) = entry.items()
    columns = {name: axes["y"]} if isinstance(axes["y"], str) else axes["y"]
    return {Path(file).stem: column for file, column in columns.items()}


def test_every_plot_has_its_columns(results):
    """All rows of its tables, with words on the axes of words and finite numbers on the others."""
    shown = json.loads(run(results.parents[1], "dvc", "plots", "show", "--json"))
    assert not shown.get("errors")
    assert len(shown["data"]) == len(PLOTS)
    for entry in PLOTS:
        ((name, axes),) = entry.items()
        (plot,) = shown["data"][name.replace("${profile}", "demo")]
        chart = plot["content"]
        chart = json.loads(chart) if isinstance(chart, str) else chart
        assert "<DVC_METRIC" not in json.dumps(chart)  # nothing that DVC left to fill in
        columns, values = find_columns(entry), chart["data"]["values"]
        assert len(values) == sum(len(read_table(results / f"{table}.csv")) for table in columns)
        (y,) = set(columns.values())
        encoding = (chart.get("spec") or chart)["encoding"]
        for axis, column in (("x", axes["x"]), ("y", y)):
            assert encoding[axis]["field"] == column
            if encoding[axis]["type"] == "quantitative":
                assert all(math.isfinite(float(row[column])) for row in values)
            assert all(row[column] for row in values)


def test_every_table_is_plotted():
    """But for those whose figures another has that is, or for which there is no template."""
    plotted = {table for entry in PLOTS for table in find_columns(entry)}
    assert plotted ^ set(make_all(report_data.make_metrics()["saes"])) == {
        *("fronts", "density_medians", "steering_latents"),
        *("splitting_summary", "splitting_gradients"),
    }


def test_every_series_has_a_name():
    """Each of our templates takes it from a column that its tables have."""
    tables = make_all(report_data.make_metrics()["saes"])
    for entry in PLOTS:
        ((_, axes),) = entry.items()
        template = REPOSITORY / f".dvc/plots/{axes['template']}.json"
        if template.is_file():
            names = re.findall(r"datum\.(sae|control|direction|site)", template.read_text())
            for table in find_columns(entry):
                assert {*names} & tables[table][0].keys(), (axes, table)


def test_metrics_can_be_compared(results):
    folder = results.parents[1]
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    run(folder, "git", "add", "-A")
    run(folder, "git", *identity, "commit", "-q", "-m", "first")
    metrics = report_data.read_json(results / "metrics.json")
    metrics["saes"]["k16-beta0"]["with_gradient"]["loss_added"] += 0.5
    report_data.write_json(results / "metrics.json", metrics)
    changes = json.loads(run(folder, "dvc", "metrics", "diff", "--json"))
    (changed,) = changes["results/demo/metrics.json"].values()
    assert changed["diff"] == pytest.approx(0.5)
