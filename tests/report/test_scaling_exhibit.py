"""Several models' results side by side."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pipeline.errors import PipelineError
from pipeline.report import write_report
from pipeline.report.exhibits import read_table
from pipeline.report.exhibits.scaling import relate_models, show_scaling
from tests import report_data
from tests.report.evidence import write_tables
from tests.report.tables import make_all

PLACED = {"name": "demo", "n_layers": 12, "layer": 7, "d_model": 128, "n_parameters": 3_000_000}
SAES = (("topk", 0.0), ("gsae", 1e5))


def make_metrics(
    name: str, n_layers: int, layer: int, *, seeds: tuple[int, ...] = (0,), **model: Any
) -> dict[str, Any]:
    """A larger beta and more layers add less loss; without the gradient it is a tenth more."""
    d_model = 64 * n_layers  # what the SAEs have; `model` may say otherwise

    def make_sae(beta: float, seed: int) -> dict[str, Any]:
        added = (0.1 + 0.02 * seed) / n_layers * (0.5 if beta else 1)
        return {
            "architecture": "topk",
            "beta": beta,
            "k": 32,
            "d_sae": 20 * d_model,
            "seed": seed,
            "with_gradient": {
                "loss_added": added,
                "loss_added_low": 0.9 * added,
                "loss_added_high": 1.1 * added,
            },
            "without_gradient": {"loss_added": 1.1 * added if beta else added},
        }

    return {
        "hook": f"blocks.{layer}.hook_resid_post",
        "model": {"name": name, "n_layers": n_layers, "layer": layer, "d_model": d_model}
        | {"n_parameters": 12 * n_layers * d_model**2}
        | model,
        "saes": {f"{s}-seed{seed}": make_sae(beta, seed) for s, beta in SAES for seed in seeds},
    }


SMALL, MEDIUM, XL = (
    make_metrics("small", 12, 8),
    make_metrics("medium", 24, 17),
    make_metrics("xl", 48, 35),
)


def test_rows_go_from_the_smallest_model_to_the_largest():
    rows = relate_models([MEDIUM, XL, SMALL])
    assert [row["model"] for row in rows] == ["small"] * 4 + ["medium"] * 4 + ["xl"] * 4
    assert [row["relative_depth"] for row in rows[::4]] == [0.75, 0.75, 0.75]
    first = rows[0]
    assert (first["sae"], first["mode"], first["k"]) == ("topk-seed0", "with_gradient", 32)
    assert first["loss_added"] == pytest.approx(0.1 / 12)
    assert first["loss_added_low"] == pytest.approx(0.09 / 12)
    assert rows[1]["loss_added_low"] is None


@pytest.mark.parametrize(
    ("hook", "layer", "depth", "same"),
    [
        ("blocks.7.hook_resid_post", 7, 8 / 12, True),
        ("blocks.9.hook_resid_pre", 9, 0.75, True),  # a block's input leaves that block out
        ("blocks.3.hook_resid_post", 3, 4 / 12, False),
    ],
)
def test_depth_counts_the_blocks_below(hook, layer, depth, same):
    other = make_metrics("other", 12, layer) | {"hook": hook}
    rows = [row for row in relate_models([XL, other]) if row["model"] == "other"]
    assert [row["relative_depth"] for row in rows] == pytest.approx([depth] * 4)
    assert {row["same_depth"] for row in rows} == {same}


def test_size_without_parameter_counts():
    unknown = make_metrics("unknown", 24, 17, n_parameters=None)
    assert [row["model"] for row in relate_models([XL, unknown, SMALL])[::4]] == [
        "small",
        "unknown",
        "xl",
    ]


def test_results_of_an_unnamed_model():
    old = make_metrics("old", 12, 8, d_model=None)
    with pytest.raises(PipelineError, match=r"got no d_model\. Run `pipeline evaluate` again"):
        relate_models([SMALL, old])


def test_the_figure_joins_models_of_equal_depth_alone():
    shallow = make_metrics("shallow", 24, 3)
    exhibit = show_scaling({"scaling": relate_models([SMALL, XL, shallow])}, {})
    assert exhibit is not None
    (chart,) = exhibit.charts
    labels = {key.label: key.joined for key in chart.keys}
    kinds = ("topk", "topk, β = 1e5, with ∇", "topk, β = 1e5, without ∇")
    assert labels == {
        **dict.fromkeys(kinds, True),
        **{f"{kind}, at another depth": False for kind in kinds},
    }
    assert chart.svg.count('class="line') == 3
    assert len(exhibit.figures[0].rows) == 6
    assert exhibit.figures[0].rows[0][0] == "small"
    assert "--beside" not in exhibit.protocol
    assert exhibit.data == ("scaling",)


def test_two_layers_of_one_model_are_two_marks():
    """Equally large, and at about the same depth, but no seeds of each other."""
    results = [make_metrics("small", 12, 7), make_metrics("small", 12, 8)]
    exhibit = show_scaling({"scaling": relate_models(results)}, {})
    assert exhibit is not None
    assert exhibit.charts[0].svg.count("<title>topk</title>") == 1 + 2  # the line, and its marks
    assert "Only one model" not in exhibit.protocol


def test_seeds_are_averaged_and_their_intervals_left_out():
    seeds = (0, 1)
    results = [make_metrics("small", 12, 8, seeds=seeds), make_metrics("xl", 48, 35, seeds=seeds)]
    exhibit, one_seed = (
        show_scaling({"scaling": relate_models(metrics)}, {}) for metrics in (results, [SMALL, XL])
    )
    assert exhibit is not None
    assert one_seed is not None
    assert exhibit.charts[0].svg.count('class="line') == 3
    assert 'class="band' not in exhibit.charts[0].svg
    assert 'class="band' in one_seed.charts[0].svg


def test_a_single_model_says_what_to_run():
    exhibit = show_scaling({"scaling": relate_models([SMALL])}, {})
    assert exhibit is not None
    assert "pipeline report --beside RESULTS" in exhibit.protocol
    assert "small" in exhibit.charts[0].svg
    assert exhibit.data == ("saes",)
    assert show_scaling({}, {}) is None


def test_another_sae_changes_the_table():
    changed = make_metrics("small", 12, 8, seeds=(5,))
    added = [[row["loss_added"] for row in relate_models([m])] for m in (SMALL, changed)]
    assert added[0] != added[1]


def write_two_models(folder: Path) -> tuple[dict[str, Any], Path]:
    """The arguments of write_report for one model, and the results of a larger one."""
    arguments = report_data.write_inputs(folder)
    own = report_data.make_metrics()
    write_tables(arguments["results_folder"], make_all(own["saes"]))
    run = report_data.read_json(folder / "results/metrics.json")["run"]
    placed = own | {"run": run, "model": own["model"] | PLACED}
    report_data.write_json(folder / "results/metrics.json", placed)
    (folder / "other").mkdir()
    larger = PLACED | {"name": "larger", "n_layers": 24, "layer": 15, "n_parameters": 9_000_000}
    report_data.write_json(folder / "other/metrics.json", own | {"model": own["model"] | larger})
    return arguments | {"out": folder / "page+k=4.html"}, folder / "other"


def list_links(page: Path, exhibit: str) -> list[str]:
    """Where the links of one exhibit lead."""
    _, _, found = page.read_text(encoding="utf-8").partition(f'id="evidence-{exhibit}"')
    return re.findall(r'href="(.*?)"', found.partition("</article>")[0])


def test_one_model_alone_has_no_data_of_its_own(tmp_path):
    arguments, _ = write_two_models(tmp_path)
    before = set(tmp_path.rglob("*"))
    write_report(**arguments)
    page = arguments["out"]
    assert "Only one model is here" in page.read_text(encoding="utf-8")
    assert list_links(page, "scaling") == ["results/saes.csv"]
    assert set(tmp_path.rglob("*")) - before == {page}


def test_other_models_stand_beside_and_their_data_beside_the_page(tmp_path):
    arguments, other = write_two_models(tmp_path)
    write_report(**arguments, beside=[other])
    page = arguments["out"].read_text(encoding="utf-8")
    assert "Only one model is here" not in page
    assert "larger" in page
    (link,) = list_links(arguments["out"], "scaling")
    assert link == "page%2Bk%3D4-scaling.csv"
    rows = read_table(tmp_path / unquote(link))
    both = [
        report_data.read_json(tmp_path / f"{name}/metrics.json") for name in ("results", "other")
    ]
    assert rows == relate_models(both)
    assert len({(row["result"], row["model"], row["sae"], row["mode"]) for row in rows}) == 8
    with pytest.raises(PipelineError, match=r"nowhere.*Run `pipeline evaluate`"):
        write_report(**arguments, beside=[tmp_path / "nowhere"])


def test_data_that_cannot_be_written_leave_the_page_as_it_was(tmp_path):
    arguments, other = write_two_models(tmp_path)
    arguments["out"].write_text("before")
    (tmp_path / "page+k=4-scaling.csv").mkdir()
    with pytest.raises(PipelineError, match=r"table at .*-scaling\.csv: .* got a folder.*--out"):
        write_report(**arguments, beside=[other])
    assert arguments["out"].read_text() == "before"
