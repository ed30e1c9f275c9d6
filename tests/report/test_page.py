"""The page with all its evidence: what it says, where its links lead, how it looks in a browser."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from pipeline.errors import PipelineError
from pipeline.report import build_report, write_report
from pipeline.report.exhibits import EXHIBITS, show_exhibits
from pipeline.report.inputs import link_tables
from tests import report_data
from tests.report.evidence import CLAIMS, show_curves, show_intervals, write_tables
from tests.report.pages import CLASHING_TICKS, CONTRASTS, SPILLED_NAMES, SPILLED_TEXT, Outline
from tests.report.tables import make_all

PLACED = {"name": "demo", "n_layers": 12, "layer": 7, "d_model": 128, "n_parameters": 3_000_000}
MANY = tuple((k, beta) for k in (8, 16, 32, 64) for beta in (0.0, 1e3, 3e3, 1e4, 3e4, 1e5))
FOLDERS = ("run_folder", "results_folder", "corpus_folder", "store_folder")
IDS = ["sensitivity", "perturbation", "fronts", "dead", "steering", "density", "splitting"]


def write_all(folder: Path, members=report_data.TWO) -> Path:
    """A page beside its results, both as the stages leave them; returns the page's path."""
    arguments = report_data.write_inputs(folder, members)
    saes = report_data.make_metrics(members)["saes"]
    write_tables(arguments["results_folder"], make_all(saes))
    arguments["out"] = folder / "report.html"
    write_report(**arguments)
    return arguments["out"]


def build(tables, members=report_data.TWO) -> str:
    return build_report(**report_data.make_inputs(members), evidence=tables)


def test_every_exhibit_is_on_the_page(tmp_path):
    outline = Outline(write_all(tmp_path).read_text(encoding="utf-8"))
    assert len(set(outline.ids)) == len(outline.ids)
    found = [id_ for id_ in outline.ids if id_.startswith("evidence-")]
    assert found == [f"evidence-{name}" for name in (*IDS, "controls")]  # one model: no scaling
    targets = [attrs["href"] or "" for tag, attrs in outline.tags if tag == "a"]
    assert {f"#{id_}" for id_ in (*found, "claims", "evidence")} <= set(targets)
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in outline.ids
        else:
            assert (tmp_path / target).is_file()
    linked = {Path(target).stem for target in targets if target.endswith(".csv")}
    assert linked == set(make_all(report_data.make_metrics()["saes"]))


def test_the_page_says_what_holds(tmp_path):
    page = write_all(tmp_path).read_text(encoding="utf-8")
    assert "Of 4 claims 1 holds, 1 does not hold, 1 differs between comparisons, 0 are not" in page
    assert page.index("does not hold") < page.index("Results</h2>")  # on top
    for text in ("−0.0592 to −0.0231", "−0.09 (0.34 against 0.43)", "over 5"):
        assert text in page
    assert page.count('class="label-seen"') == sum(row["sees_label"] for row in CLAIMS)


def test_without_evidence_the_page_has_no_section_for_it():
    page = build({})
    assert 'id="evidence"' not in page
    assert 'id="claims"' not in page
    assert "#evidence" not in page


def test_what_is_not_measured_has_no_exhibit():
    page = build({"dead": make_all(report_data.make_metrics()["saes"])["dead"]})
    outline = Outline(page)
    assert [i for i in outline.ids if i.startswith("evidence-")] == ["evidence-dead"]
    assert '.csv"' not in page  # nothing to link to
    assert "<code>dead.csv</code>" in page


def test_names_are_escaped():
    evil = "<script>alert(1)</script>&"
    tables = make_all({evil: report_data.make_sae(32, 0.0)})
    tables = {**tables, "claims": [CLAIMS[0] | {"statement": evil, "paper": evil}]}
    inputs = report_data.make_inputs()
    inputs["metrics"]["saes"][evil] = inputs["metrics"]["saes"].pop("k32-beta0")
    inputs["histories"][evil] = inputs["histories"].pop("k32-beta0")
    page = build_report(**inputs, evidence=tables, links={"dead": 'x"y.csv'})
    assert "<script" not in page
    assert 'x"y' not in page
    Outline(page)


def test_links_are_relative_and_the_same_everywhere(tmp_path):
    page, results = tmp_path / "results/demo.html", tmp_path / "results/demo+layers=3"
    assert link_tables(["dead"], results, page) == {"dead": "demo%2Blayers%3D3/dead.csv"}
    assert link_tables(["dead"], results, results / "page.html") == {"dead": "dead.csv"}
    assert link_tables(["dead"], results, tmp_path / "elsewhere/demo.html") == {}


@pytest.mark.parametrize("times", [1, 2])
def test_a_model_beside_itself_is_refused(tmp_path, times):
    """Its own results, or another's given twice."""
    arguments = report_data.write_inputs(tmp_path)
    metrics = report_data.read_json(tmp_path / "results/metrics.json")
    own = metrics | {"model": metrics["model"] | PLACED}
    report_data.write_json(tmp_path / "results/metrics.json", own)
    (tmp_path / "copy").mkdir()
    other = own | {"model": own["model"] | {"name": "larger"}} if times == 2 else own
    report_data.write_json(tmp_path / "copy/metrics.json", other)
    with pytest.raises(PipelineError, match=r"copy: expected others.*--beside"):
        write_report(**arguments, beside=[tmp_path / "copy"] * times)


DAMAGES = {
    "columns": lambda row: {f"x{key}": value for key, value in row.items()},
    "numbers": lambda row: {k: "many" if isinstance(v, int | float) else v for k, v in row.items()},
    "nothing": dict.fromkeys,
}


@pytest.mark.parametrize("name", sorted(make_all(report_data.make_metrics()["saes"])))
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_refused(name, damage):
    tables = make_all(report_data.make_metrics()["saes"])
    damaged = {**tables, name: [DAMAGES[damage](row) for row in tables[name]]}
    with pytest.raises(PipelineError, match=rf"table at results/{name}\.csv: expected .*evaluate`"):
        build_report(**report_data.make_inputs(), evidence=damaged, results_folder=Path("results"))


@pytest.mark.parametrize("error", [StopIteration, KeyError("k"), RuntimeError("a\nb")])
def test_what_an_exhibit_raises_is_one_line(monkeypatch, error):
    def show_it(*_):
        raise error

    monkeypatch.setattr("pipeline.report.exhibits.EXHIBITS", (show_it,))
    with pytest.raises(PipelineError) as refused:
        show_exhibits({}, {}, Path("results/demo"))
    line = r"measurements at results/demo: .* for it \(.*\). Run `pipeline evaluate`\."
    assert re.fullmatch(line, str(refused.value))
    assert isinstance(refused.value.__cause__, StopIteration | KeyError | RuntimeError)


def test_a_table_without_its_columns_is_refused(tmp_path):
    path = write_all(tmp_path)
    (tmp_path / "results/dead.csv").write_text("sae,k\nk32-beta0,32\n")
    arguments = {key: tmp_path / key.removesuffix("_folder") for key in FOLDERS}
    with pytest.raises(PipelineError, match=r"results/dead\.csv: expected a column mode, got none"):
        write_report(profile="demo", **arguments, out=path)


def test_runs_that_were_measured_together(tmp_path):
    """Their SAEs are found in their folders, and only if they are those that were measured."""
    for name in "ab":
        (tmp_path / name).mkdir()
    first = report_data.write_inputs(tmp_path / "a", ((32, 0.0),))
    second = report_data.write_inputs(tmp_path / "b", ((32, 1e5),))
    runs = [report_data.read_json(tmp_path / name / "results/metrics.json")["run"] for name in "ab"]
    both = report_data.make_metrics() | {"runs": runs}
    report_data.write_json(tmp_path / "a/results/metrics.json", both)
    write_report(**first, more_runs=[second["run_folder"]])
    assert "k32-beta1e5" in first["out"].read_text(encoding="utf-8")
    with pytest.raises(PipelineError, match="Run `pipeline evaluate`"):
        write_report(**first)


def test_controls_stand_beside_the_saes():
    inputs = report_data.make_inputs()
    figures = inputs["metrics"]["saes"]["k32-beta0"]["with_gradient"]
    control = {"kind": "random decoder", "k": 32, "with_gradient": figures | {"nmse": 0.6543}}
    inputs["metrics"]["controls"] = {"random-k32": control}
    page = build_report(**inputs)
    assert "random-k32" in page
    assert "0.6543" in page


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-quic"]
        )
        yield chromium
        chromium.close()


def open_page(browser, path: Path, width: int, scheme: str = "light"):
    """A tab that shows the page with everything unfolded, and what went wrong in it."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert requests == [path.as_uri()]
    return tab, problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("members", [report_data.TWO, report_data.EIGHT], ids=["two", "eight"])
def test_page_in_a_browser(tmp_path, browser, members, width, scheme):
    path = write_all(tmp_path, members)
    tab, problems = open_page(browser, path, width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.querySelectorAll('svg.plot').length") >= 10
    headline = tab.locator("#results .scroll").first
    fits = headline.evaluate("box => box.scrollWidth <= box.clientWidth")
    assert fits == (width == 1280)  # on a phone the table scrolls in its own box
    assert tab.evaluate(SPILLED_NAMES) == []
    assert tab.evaluate(SPILLED_TEXT) == []
    contrasts = tab.evaluate(CONTRASTS)
    assert {"p", "td", "th", "dd", "text"} <= {tag for tag, _ in contrasts}
    assert [pair for pair in contrasts if pair[1] < 4.5] == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) > 128) == (scheme == "light")
    assert problems == []
    tab.context.close()


@pytest.mark.parametrize("width", [400, 1280])
def test_many_saes_stay_legible(tmp_path, browser, width, monkeypatch):
    """With figures of every kind."""
    monkeypatch.setattr(
        "pipeline.report.exhibits.EXHIBITS", (*EXHIBITS, show_curves, show_intervals)
    )
    path = write_all(tmp_path, MANY)
    tab, problems = open_page(browser, path, width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(SPILLED_NAMES) == []
    assert tab.evaluate(SPILLED_TEXT) == []
    assert tab.evaluate(CLASHING_TICKS) == []
    assert tab.evaluate("document.querySelectorAll('.legend.sticky').length") == 0
    assert problems == []
    tab.context.close()


def test_on_paper_nothing_is_cut_or_dark(tmp_path, browser):
    tab, _ = open_page(browser, write_all(tmp_path, report_data.EIGHT), 703, "dark")  # A4's width
    tab.emulate_media(media="print", color_scheme="dark")
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate(
        "document.querySelectorAll('.settings')[0].checkVisibility({contentVisibilityAuto: true})"
    )
    assert not tab.locator("nav").first.is_visible()
    boxes = "[...document.querySelectorAll('.scroll')]"
    cut = f"{boxes}.filter(b => b.scrollWidth > b.clientWidth + 1).map(b => b.ariaLabel)"
    assert tab.evaluate(cut) == []
    assert tab.evaluate(f"{boxes}.every(b => getComputedStyle(b).overflowX === 'visible')")
    tab.context.close()
