"""The paper's evidence, from text to page by dvc.yaml's own commands: all of it, about these SAEs
and no others, and of runs that belong together.
"""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.evaluate.claims import decide_claims
from pipeline.evaluate.pairs import Evidence
from pipeline.evaluate.steering import RANDOM
from pipeline.report.exhibits import EXHIBITS, read_tables
from pipeline.sae import init_weights, load_sae, read_sae_config, save_sae
from tests.checkpoints import save_gpt2
from tests.report.pages import Outline
from tests.tiny import CONTEXT, REPOSITORY, change_profile, make_project, run_cli, write_texts

RUNS = ("--run", "runs/tiny", "--run", "runs/tiny-own")

_ACTIVITY = ("l0", "dead_fraction", "dead_fraction_held_out")
# What each table may leave empty, where nothing of that kind can be measured.
TABLES = {
    "saes": set(),
    "controls": {"of", "d_sae", "loss_added_all_positions", *_ACTIVITY},  # PCA has no latents
    "fronts": set(),
    "firing": set(),
    "density_medians": set(),
    "dead": set(),
    "sensitivity": set(),
    "perturbation": set(),
    "steering": set(),
    "steering_latents": set(),
    "splitting": set(),
    "splitting_gradients": set(),
    "splitting_summary": set(),
    "claims": {"source", "paper", "n_seeds", "seeds_low", "seeds_high"},
}
# These need the held-out rows of five of the paper's batches, 20,480.
OF_FIVE_BATCHES = {"dead_fraction", "dead_paper", "dead_paper_low", "dead_paper_high"}
# These need rows on which one of a few latents fires.
OF_FIRING = {
    f"{name}_active{end}" for name in ("gradient", "ratio") for end in ("", "_low", "_high")
}
OF_TEXT_ALONE = {"sensitivity", "perturbation"}
# Counts of few latents, which other weights may well have again; all other figures of SAEs change.
COUNTS = {("dead", None), ("claims", "dead"), ("claims", "dead_shuffled")}

# GPT-2 small's shape and the profile's own settings, but for how much is looked at.
FEW = {
    "model.name": "model",
    "corpus.source": "texts",
    "corpus.context_length": 16,
    "corpus.train_tokens": "null",
    "corpus.held_out_tokens": "null",
    "corpus.held_out_fraction": 0.25,
    "cache.batch_blocks": 8,
    "train.batch_size": 128,
    "train.steps": 3,
    "evidence.bootstrap_draws": 50,
    "evidence.sensitivity_rows": 160,
    "evidence.perturbation_sizes": "[0.1, 1]",
    "evidence.perturbation_samples": 8,
    "evidence.perturbation_context": 8,
    "evidence.steering_latents": 8,
    "evidence.steering_sequences": 2,
    "evidence.steering_context": 12,
    "evidence.steering_alphas": "[0.1, 0.5]",
    "evidence.splitting_latents": 8,
    "evidence.splitting_blocks": 16,
}


def run_all(profile, settings=()):
    """Every stage of dvc.yaml, in this folder."""
    stages = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        _, *args = stage["cmd"].replace("${profile}", profile).split()
        assert run_cli(*args, *settings) == 0, name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project in which all stages have run, with a shuffled control, a layer that Fig. 2's claim
    speaks of and enough held-out text for Table 1.
    """
    folder = make_project(tmp_path_factory.mktemp("evidence"))
    save_gpt2(folder / "model", n_layers=4, d_model=16, n_heads=2, context=CONTEXT)
    for name, gradients in (("tiny", "[cached, shuffled]"), ("tiny-own", "[cached]")):
        path = folder / f"configs/{name}.yaml"
        changes = {
            "train.gradients": gradients,
            "corpus.held_out_fraction": "0.8",
            "evaluate.batch_blocks": "512",
        }
        path.write_text(change_profile(path.read_text(), changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_all("tiny")
    return folder


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """A copy of it to change."""
    shutil.copytree(finished, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def check_complete(results: Path, *, may_lack: Collection[str] = ()) -> None:
    """Every table is there and finite, every exhibit on the page, every claim decided or not."""
    tables = read_tables(results)
    assert set(tables) == set(TABLES)
    for name, rows in tables.items():
        rows = [row for row in rows if row.get("id") != "label_share"]  # of no gain it has no value
        empty = {key for row in rows for key, value in row.items() if value is None}
        assert empty <= TABLES[name] | {*may_lack}, name
    page = results.with_name(f"{results.name}.html").read_text()
    outline = Outline(page)
    _, *articles = page.split('<article class="exhibit" id="evidence-')
    drawn = {article.partition('"')[0]: article.count("<svg") for article in articles}
    assert set(drawn) == {show.__name__.removeprefix("show_") for show in EXHIBITS}
    assert all(drawn.values()), drawn
    for tag, facts in outline.tags:
        assert tag == "a" or not re.search(r"\b(nan|inf)\b", " ".join(map(str, facts.values())))
    links = {str(facts.get("href")) for tag, facts in outline.tags if tag == "a"}
    behind = {f"{results.name}/{name}.csv" for name in TABLES}
    assert links >= behind - {f"{results.name}/saes.csv"}
    claimed = {claim["id"] for claim in tables["claims"]}
    assert claimed == {claim.id for claim in decide_claims(Evidence({}, {}, {}, {}, {}, 1.0, 2))}
    verdicts = {claim["verdict"] for claim in tables["claims"]}
    assert verdicts <= {"holds", "does not hold", "not decided"}  # and none "not measured"


def test_the_evidence_is_complete(finished):
    check_complete(finished / "results/tiny")


def test_gpt2_small_makes_every_figure(tmp_path, monkeypatch):
    """The profile as it is but for FEW, on random weights."""
    save_gpt2(tmp_path / "model", n_layers=12, d_model=768, n_heads=12, context=256, vocab=50257)
    write_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    run_all("gpt2-small", [word for key in FEW for word in ("--set", f"{key}={FEW[key]}")])
    check_complete(tmp_path / "results/gpt2-small", may_lack=OF_FIVE_BATCHES | OF_FIRING)


def test_random_saes_change_every_table_about_saes(project):
    """By their weights alone: sizes, input scale and bias are the trained ones'. What is about the
    model and its text alone stays as it is.
    """
    less = ("--tokens", "448", "--out")
    assert run_cli("evaluate", *RUNS, *less, "results/trained") == 0
    folders = sorted(path.parent for path in (project / "runs").glob("*/*/sae.safetensors"))
    assert len(folders) == 4
    for seed, folder in enumerate(folders, start=100):
        sae, before = load_sae(folder), load_sae(folder)
        init_weights(sae, before.b_dec[None], seed=seed, scale_input=False)
        sae.b_dec.data.copy_(before.b_dec)
        sae.input_scale.copy_(before.input_scale)
        save_sae(sae, folder, training=read_sae_config(folder).training)
    assert run_cli("evaluate", *RUNS, *less, "results/random") == 0
    trained, random = (read_tables(project / "results" / name) for name in ("trained", "random"))
    assert set(trained) == set(random) == set(TABLES)
    for name, rows in trained.items():
        for key, ours in group(name, rows).items():
            theirs = group(name, random[name])[key]
            same = is_of_text(name, key) or all(row.get("value", 0) is None for row in ours)
            if not COUNTS & {(name, None), (name, key)}:
                assert (ours == theirs) == same, (name, key)
    assert trained["dead"] != random["dead"]
    for tables in (trained, random):  # and the counts are these SAEs'
        live = [1 - row["live"] / 64 for row in tables["density_medians"]]
        assert [row["dead_held_out"] for row in tables["dead"]] == pytest.approx(live)


def group(table, rows):
    """Rows by the SAE that they are about; claims by what they compare."""
    groups = {}
    for row in rows:
        key = {"controls": "control", "claims": "id"}.get(table, "sae")
        groups.setdefault(row.get(key), []).append(row)
    return groups


def is_of_text(table, key):
    """Whether no SAE has a part in a group of rows."""
    if table == "controls":  # but for TopK given the gradient
        return "+ gradient" not in key
    return table in OF_TEXT_ALONE or key == RANDOM or key.split("_")[0] in OF_TEXT_ALONE


@pytest.mark.parametrize(
    ("left_out", "claims"),
    [
        ({"sensitivity", "steering"}, {"steering_others", "sensitivity_isotropic"}),
        ({"perturbation", "splitting"}, {"splitting_topk"}),
    ],
    ids=lambda names: "+".join(sorted(names)),
)
def test_a_size_of_0_leaves_a_measurement_out(project, left_out, claims):
    sizes = {"sensitivity": "rows", "perturbation": "samples"}
    settings = [f"evidence.{name}_{sizes.get(name, 'latents')}=0" for name in sorted(left_out)]
    less = ("--tokens", "448", *(word for each in settings for word in ("--set", each)))
    (project / "results/tiny/of_an_earlier_version.csv").write_text("a\n1\n")
    assert run_cli("evaluate", *RUNS, *less, "--out", "results/tiny") == 0
    assert run_cli("report", *RUNS) == 0
    tables = read_tables(project / "results/tiny")
    assert set(tables) == {name for name in TABLES if name.split("_")[0] not in left_out}
    undecided = {row["id"] for row in tables["claims"] if row["verdict"] == "not measured"}
    assert {name.split("_")[0] for name in undecided} == left_out
    assert undecided >= claims
    shown = Outline((project / "results/tiny.html").read_text()).ids
    exhibits = {show.__name__.removeprefix("show_") for show in EXHIBITS}
    assert {name for name in exhibits if f"evidence-{name}" in shown} == exhibits - left_out


def fails(capsys, *args):
    """The command's error, which is its last line and the only one."""
    capsys.readouterr()
    assert run_cli(*args) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "expected" in line]
    (error,) = errors
    assert error.startswith("Error: ")
    return error


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cache.layers=[2]"], "hook: expected 'blocks.1.hook_resid_post', got 'blocks.2."),
        (["corpus.held_out_fraction=0.3"], "corpus: expected"),
        (["model.weight_processing=folded"], "weight_processing: expected 'raw', got 'folded'"),
        (["train.exclude_positions=[0, 1]"], "exclude_positions: expected [0], got [0, 1]"),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_runs_that_do_not_belong_together_are_refused(capsys, settings, message):
    every = ("--set", *settings, "--set", "train.steps=2", "--set", "cache.loss=own")
    for stage, folder in (("corpus", "data"), ("cache", "stores"), ("train", "runs")):
        place = {"cache": ("--corpus", "data/other"), "train": ("--store", "stores/other")}
        assert run_cli(stage, *every, *place.get(stage, ()), "--out", f"{folder}/other") == 0
    error = fails(capsys, "evaluate", "--run", "runs/tiny", "--run", "runs/other")
    assert "run at runs/other" in error
    assert message in error
    assert "pipeline evaluate --run" in error


def test_a_layer_that_the_model_lacks_is_refused_before_anything_is_measured(project, capsys):
    layers = ("--set", "evidence.perturbation_layers=[1, 99]")
    assert run_cli("evaluate", *RUNS, *layers, "--out", "results/lacking") == 2
    error = capsys.readouterr().err
    assert "perturbation_layers: expected 0 to 3" in error
    assert "got 99" in error
    assert "evaluate: " not in error
    assert not (project / "results/lacking").exists()


def test_two_saes_of_one_name_are_refused(project, capsys):
    shutil.copytree(project / "runs/tiny-own", project / "runs/again")
    error = fails(capsys, "evaluate", *RUNS, "--run", "runs/again")
    assert "SAE k4-beta1e4-own at runs/again" in error
    assert "got one twice" in error


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("runs", [["tiny-own", "tiny"], ["tiny"], ["tiny", "tiny-own", "tiny-own"]])
def test_a_report_of_other_runs_than_were_measured_is_refused(capsys, runs):
    named = [word for name in runs for word in ("--run", f"runs/{name}")]
    store = ("--store", f"stores/{runs[0]}")
    error = fails(capsys, "report", *named, *store, "--results", "results/tiny")
    assert "measurements at results/tiny" in error
    assert "another run's" in error
