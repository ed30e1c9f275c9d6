"""`dvc plots` and `dvc metrics diff` on what evaluation writes."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

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


def test_every_plot_has_its_columns(results):
    shown = json.loads(run(results.parents[1], "dvc", "plots", "show", "--json"))
    assert not shown.get("errors")
    assert len(shown["data"]) == len(PLOTS)
    for entry in PLOTS:
        ((name, axes),) = entry.items()
        (plot,) = shown["data"][name.replace("${profile}", "demo")]
        chart = plot["content"]
        chart = json.loads(chart) if isinstance(chart, str) else chart
        y = axes["y"]
        for column in (axes["x"], y if isinstance(y, str) else next(iter(y.values()))):
            values = [float(row[column]) for row in chart["data"]["values"]]
            assert len(values) > 10
            assert all(map(math.isfinite, values))


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
