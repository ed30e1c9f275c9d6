"""The report: its numbers, its figures, and what it refuses."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.report import build_report, write_report
from pipeline.report.charts import chart_betas, chart_training
from pipeline.report.facts import describe_statistics, describe_store
from pipeline.report.figures import (
    average_windows,
    plan_betas,
    plan_linear,
    plan_positive,
    plan_progress,
    series_style,
)
from pipeline.report.tables import (
    HEADLINE,
    build_table,
    format_bytes,
    format_count,
    format_percent,
    format_ratio,
    format_short,
    show,
)
from tests import report_data
from tests.report.pages import Outline

finite = st.floats(-1e12, 1e12, allow_subnormal=False)


@pytest.fixture(scope="module", params=[report_data.TWO, report_data.EIGHT], ids=["two", "eight"])
def page(request):
    return build_report(**report_data.make_inputs(request.param))


def test_page_is_well_formed_and_its_links_lead_somewhere(page):
    outline = Outline(page)
    assert len(set(outline.ids)) == len(outline.ids)
    targets = [attrs["href"] for tag, attrs in outline.tags if tag == "a"]
    assert {target.removeprefix("#") for target in targets} <= set(outline.ids)
    assert "<title>gsae-pipeline report: demo</title>" in page


def test_page_loads_nothing(page):
    outline = Outline(page)
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "img", "iframe", "object"}
    assert not [attrs for _, attrs in outline.tags if {"src", "srcset", "xlink:href"} & set(attrs)]
    assert not re.search(r"https?:|@import|url\(", page)
    assert "default-src 'none'" in page


def test_page_shows_every_sae_and_its_figures(page):
    assert "k32-beta1e5" in page
    for text in ("2.4137", "5.9021", "8.3146", "131,072", "12,288,000", "1,433,600"):
        assert text in page
    assert "0.2994" in page  # NMSE of k32-beta0
    assert report_data.FINGERPRINT in page
    assert report_data.CORPUS_FINGERPRINT in page
    assert "decoder_norm" in page  # all of the configuration
    assert "2.13.0" in page  # versions


def test_text_is_escaped():
    inputs = report_data.make_inputs()
    evil = '<script>alert("1")</script>&'
    inputs["profile"] = inputs["corpus"]["source"] = inputs["versions"]["torch"] = evil
    inputs["config"]["config"]["model"]["name"] = inputs["metrics"]["hook"] = evil
    inputs["metrics"]["saes"][evil] = inputs["metrics"]["saes"].pop("k32-beta0")
    inputs["histories"][evil] = inputs["histories"].pop("k32-beta0")
    page = build_report(**inputs)
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    Outline(page)


def test_missing_values_are_dashes():
    inputs = report_data.make_inputs()
    sae = inputs["metrics"]["saes"]["k32-beta1e5"]
    whole = build_report(**inputs).count("<td>–</td>")
    sae["with_gradient"]["dead_fraction"] = None
    sae["without_gradient"]["nmse_squared"] = math.nan
    del sae["selection_overlap"]
    inputs["histories"]["k32-beta1e5"]["overlap"] = [None] * 300
    page = build_report(**inputs)
    assert len(re.findall(r"<td[^>]*>–</td>", page)) == whole + 3
    assert "nan" not in page.lower().replace("finan", "")
    Outline(page)


def test_every_architecture_and_the_baseline_have_their_place():
    """By k, then in the order of the configuration; what selects nothing has no beta."""
    inputs = report_data.make_inputs()
    saes, histories = inputs["metrics"]["saes"], inputs["histories"]
    for name, architecture in (("end_to_end-k32-beta0", "end_to_end"), ("relu-k32-beta0", "relu")):
        saes[name] = saes["k32-beta0"] | {"architecture": architecture}
        histories[name] = histories["k32-beta0"]
    saes["relu-k32-beta0"] |= {"selection_overlap": None, "gradient_weight": None}
    figures = saes["k32-beta0"]["with_gradient"]
    inputs["metrics"]["baselines"] = {"pca-k32": figures | {"kind": "pca", "k": 32, "nmse": 0.4321}}
    page = build_report(**inputs)
    Outline(page)
    rows = re.findall(r'<span class="name">([^<]*)</span></th><td>32</td><td>([^<]*)</td>', page)
    assert rows[:5] == [
        ("k32-beta0", "0"),
        ("k32-beta1e5", "1e5"),
        ("relu-k32-beta0", "–"),
        ("end_to_end-k32-beta0", "0"),
        ("pca-k32", "–"),
    ]
    assert "0.4321" in page
    assert "other codes of equal k" not in build_report(**report_data.make_inputs())


def test_end_to_end_has_a_loss_chart_of_its_own():
    saes = report_data.make_metrics()["saes"]
    saes["e2e"] = saes["k32-beta0"] | {"architecture": "end_to_end"}
    histories = {name: report_data.make_history(32, 0.0) for name in saes}
    charts = {
        chart.title: chart.svg
        for chart in chart_training(saes, histories, dict.fromkeys(saes, "c0"))
    }
    assert [
        ("<title>e2e<" in charts[t], "<title>k32-beta0<" in charts[t])
        for t in ("Loss", "Divergence", "NMSE")
    ] == [(False, True), (True, False), (True, True)]
    del saes["e2e"]
    assert "Divergence" not in {
        chart.title for chart in chart_training(saes, histories, dict.fromkeys(saes, "c0"))
    }


def test_page_without_store_corpus_and_versions():
    inputs = report_data.make_inputs() | {"store": None, "corpus": None, "versions": None}
    page = build_report(**inputs)
    assert "The store was not there" in page
    assert "The corpus was not there" in page
    Outline(page)


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (format_ratio, 0.29941, "0.2994"),
        (format_percent, -0.01234, "−1.23%"),  # a true minus sign
        (format_percent, 12.3456, "1,235%"),  # no decimals where they say nothing
        (format_short, 0.0, "0"),
        (format_short, 2.4679, "2.47"),
        (format_short, 1234.5, "1,234"),
        (format_short, 2.47e-5, "2.47e-5"),
        (format_short, -3.1e7, "−3.10e7"),
        (format_count, 1_433_600, "1,433,600"),
        (format_bytes, 733_989_888, "734.0 MB"),
        (format_bytes, 12, "12 bytes"),
    ],
)
def test_formats(form, value, text):
    assert form(value) == text


def test_show_has_a_dash_for_what_is_no_number():
    assert [show(v, format_ratio) for v in (None, math.nan, math.inf, "1", 1)] == [
        *["–"] * 4,
        "1.0000",
    ]


def mark_nmse(*saes: tuple[int, float | None]) -> list[bool]:
    """Which of the SAEs, given by k and NMSE, are marked as best."""
    metrics = {
        str(i): {"k": k, "beta": i, "with_gradient": {"nmse": nmse}}
        for i, (k, nmse) in enumerate(saes)
    }
    table = build_table(metrics, HEADLINE[:1], dict.fromkeys(metrics, ""))
    return [row.cells[0].best for row in table.rows]


def test_best_is_marked_among_equal_k():
    assert mark_nmse((32, 0.3), (32, 0.2)) == [False, True]
    assert mark_nmse((16, 0.5), (16, 0.4), (32, 0.3), (32, 0.2)) == [False, True, False, True]
    assert mark_nmse((32, 0.3), (32, 0.20001), (32, 0.2)) == [False, True, True]  # as printed
    assert mark_nmse((32, 0.2), (32, 0.2)) == [False, False]  # nobody is better
    assert mark_nmse((32, None), (32, 0.2), (32, 0.3)) == [False, True, False]
    assert mark_nmse((16, 0.4), (32, 0.2)) == [False, False]  # nothing to compare with


def test_store_facts_add_up():
    facts = dict(describe_store(report_data.make_store(n_shards=9)))
    assert facts["Shards"] == "9"
    assert facts["Size"] == "734.0 MB (733,989,888 bytes)"
    assert facts["Hooks"] == report_data.HOOK
    assert describe_store({"n_rows": 5}) == [("Tokens", "5")]


def test_statistics_are_combined_over_shards():
    first = {"mean_row_norm": 1.0, "rms": 3.0, "max_abs": 7.0, "underflowed": 2}
    second = {"mean_row_norm": 5.0, "rms": 5.0, "max_abs": 6.0, "underflowed": 4}
    shards = [
        {"n_rows": 300, "statistics": {"h/acts": first}},
        {"n_rows": 100, "statistics": {"h/acts": second}},
    ]
    statistics = describe_statistics({"d_model": 10, "shards": shards})
    assert statistics.names == ("Mean row norm", "RMS", "Largest", "Underflowed")
    # (3 * 1 + 5) / 4; sqrt((3 * 9 + 25) / 4); the larger; 6 of 4000 values
    assert statistics.rows == (("h/acts", ("2.00", "3.61", "7.00", "6 (0.150%)")),)


@settings(deadline=None)
@given(st.lists(finite, min_size=1))
def test_axes_hold_their_values(values):
    for axis in (plan_linear(values, label=str), plan_positive(values, label=str)):
        assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value in values)
        assert all(-1e-6 <= place <= 1 + 1e-6 for place, _ in axis.ticks)
    assert 2 <= len(plan_linear(values, label=str).ticks) <= 7


def test_axes():
    assert [text for _, text in plan_linear([0.0, 0.43], label=lambda v: f"{v:g}").ticks] == [
        *("0", "0.2", "0.4", "0.6")
    ]
    logarithmic = plan_positive([1.0, 10.0, 100.0], label=str)
    assert logarithmic.place(10.0) == pytest.approx(0.5)
    progress = plan_progress([0.0, 12.3], label=lambda v: f"{v:g}")
    assert progress.place(12.3) == 1
    assert [text for _, text in progress.ticks] == ["0", "2.5", "5", "7.5", "10"]


def test_beta_axis_has_a_place_for_zero():
    axis = plan_betas([1e5, 0.0, 1e3, 1e4], label=lambda v: f"{v:g}")
    places = [axis.place(beta) for beta in (0.0, 1e3, 1e4, 1e5)]
    assert places == sorted(places)
    assert places[2] - places[1] == pytest.approx(places[3] - places[2])  # logarithmic
    assert [text for _, text in axis.ticks] == ["0", "//", "1000", "10000", "100000"]


def test_beta_figures_need_three_betas():
    assert chart_betas(report_data.make_metrics(report_data.TWO)["saes"]) == []
    charts = chart_betas(report_data.make_metrics(report_data.EIGHT)["saes"])
    assert [chart.title for chart in charts] == ["Loss added against β", "NMSE against β"]
    assert [len(chart.keys) for chart in charts] == [4, 4]  # two ks, with and without


def test_curves_are_averaged():
    curve = [(1.0, 2.0), (2.0, 4.0), (3.0, None), (4.0, 6.0), (5.0, None)]
    assert average_windows(curve, most=3) == [(2.0, 3.0), (4.0, 6.0), (5.0, None)]
    assert average_windows(curve, most=5) == curve
    assert len(average_windows([(float(i), 1.0) for i in range(1001)])) <= 150


def test_styles_differ():
    assert len({series_style(i) for i in range(64)}) == 64


def test_write_report(tmp_path):
    arguments = report_data.write_inputs(tmp_path)
    write_report(**arguments)
    first = arguments["out"].read_bytes()
    assert first.decode() == build_report(**report_data.make_inputs())
    write_report(**arguments)
    assert arguments["out"].read_bytes() == first
    assert [path.name for path in arguments["out"].parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("results/metrics.json", "pipeline evaluate"),
        ("run/config.json", "pipeline train"),
        ("run/k32-beta1e5/history.parquet", "pipeline train"),
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff{"])
def test_unreadable_inputs_name_file_and_command(tmp_path, missing, command, content):
    arguments = report_data.write_inputs(tmp_path)
    path = tmp_path / missing
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PipelineError, match=f"Run `{command}`") as error:
        write_report(**arguments)
    assert str(path) in str(error.value)
    assert not arguments["out"].exists()


def test_store_and_corpus_may_be_gone_but_not_broken(tmp_path):
    arguments = report_data.write_inputs(tmp_path)
    (tmp_path / "store/manifest.json").unlink()
    write_report(**arguments)
    assert "The store was not there" in arguments["out"].read_text(encoding="utf-8")
    (tmp_path / "corpus/manifest.json").write_text("{")
    with pytest.raises(PipelineError, match="Run `pipeline corpus`"):
        write_report(**arguments)


@pytest.mark.parametrize("which", ["store", "corpus"])
def test_another_store_or_corpus_is_refused(tmp_path, which):
    arguments = report_data.write_inputs(tmp_path)
    manifest = tmp_path / which / "manifest.json"
    fingerprint = getattr(report_data, "FINGERPRINT" if which == "store" else "CORPUS_FINGERPRINT")
    content = manifest.read_text().replace(fingerprint, "f" * 64)
    manifest.write_text(content)
    with pytest.raises(PipelineError, match=rf"{which} at .* got ffff.*--{which}"):
        write_report(**arguments)


def test_measurements_of_another_run_are_refused(tmp_path):
    arguments = report_data.write_inputs(tmp_path, report_data.EIGHT)
    others = report_data.make_metrics(report_data.TWO)
    report_data.write_json(tmp_path / "results/metrics.json", others)
    with pytest.raises(PipelineError, match="Run `pipeline evaluate`"):
        write_report(**arguments)
