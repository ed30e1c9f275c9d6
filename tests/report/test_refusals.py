"""What the report refuses: damaged measurements, a run not there, a page without a place."""

import pytest

from pipeline.errors import PipelineError
from pipeline.report import write_report
from tests import report_data


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda _: {"a": 1}, "no model"),
        (lambda metrics: metrics | {"model": []}, "model of type list"),
        (lambda metrics: metrics | {"saes": 3}, "saes of type int"),
        (lambda metrics: metrics | {"runs": 3}, "runs of type int"),
        (lambda metrics: metrics | {"controls": "none"}, "controls of type str"),
        (lambda metrics: metrics | {"baselines": {"pca": None}}, "no baselines.pca"),
        (
            lambda metrics: change_sae(metrics, with_gradient="x"),
            "saes.k.with_gradient of type str",
        ),
        (lambda metrics: change_sae(metrics, k="x"), "saes.k.k of type str"),
        (
            lambda metrics: change_sae(metrics, with_gradient={"nmse": "x"}),
            "saes.k.with_gradient.nmse of type str",
        ),
        (
            lambda metrics: change_sae(metrics, gradient_weight=3),
            "saes.k.gradient_weight of type int",
        ),
    ],
)
@pytest.mark.parametrize("place", ["results", "beside"])
def test_damaged_measurements_are_named(tmp_path, place, change, got):
    arguments = report_data.write_inputs(tmp_path)
    metrics = report_data.read_json(tmp_path / "results/metrics.json")
    (tmp_path / "beside").mkdir()
    report_data.write_json(tmp_path / place / "metrics.json", change(metrics))
    with pytest.raises(PipelineError) as error:
        write_report(**arguments, beside=[tmp_path / "beside"] if place == "beside" else ())
    assert f"{tmp_path / place / 'metrics.json'}: expected" in str(error.value)
    assert str(error.value).endswith(f"got {got}. Run `pipeline evaluate`.")


def change_sae(metrics, **facts):
    return metrics | {"saes": {"k": report_data.make_sae(32, 0.0) | facts}}


def test_a_run_that_is_not_there_is_named_first(tmp_path):
    arguments = report_data.write_inputs(tmp_path)
    arguments |= {"run_folder": tmp_path / "nope", "results_folder": tmp_path / "nowhere"}
    with pytest.raises(PipelineError, match=r"run at .*nope.*Run `pipeline train`"):
        write_report(**arguments)


@pytest.mark.parametrize(
    ("out", "got"), [("", "a folder"), ("run/config.json/x.html", "File exists")]
)
def test_a_page_that_cannot_be_written(tmp_path, out, got):
    arguments = report_data.write_inputs(tmp_path) | {"out": tmp_path / out}
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(PipelineError, match=f"page at .* got {got}.*pipeline report --out"):
        write_report(**arguments)
    assert sorted(tmp_path.parent.iterdir()) == before
