"""The model card says what was trained on what, how good it is, and how to load it."""

import pytest
from ruamel.yaml import YAML

from pipeline.export import FORMATS, plan_export, read_metrics
from pipeline.export.card import render_card
from pipeline.runs import read_run
from tests.export.examples import HOOK, write_metrics, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def metrics(run):
    return read_metrics(write_metrics(run.parent / "results", run), read_run(run))


def render(run, to="saelens", names=(), *, metrics=None, repo=None, **changes):
    plan = plan_export(run, names, to=to, metrics=metrics)
    return render_card(to, [facts._replace(**changes) for facts in plan.facts], repo=repo)


def front_matter(card):
    return YAML(typ="safe", pure=True).load(card.split("---")[1])


@pytest.mark.parametrize("to", FORMATS)
def test_the_card_has_every_fact(run, metrics, to):
    card = render(run, to, metrics=metrics)
    for fact in (
        f"at {HOOK} of openai-community/gpt2",
        "| [`gsae`](gsae) | topk | 8 | 24 | 3 | 1e5 | 255 | 2,088,960 |",
        "Text: texts (local), in blocks of 128 tokens, each begun by a beginning-of-text token.",
        "Trained without position 0 of each block.",
        "| gsae | with ∇ | 0.1250 | 7.00% | 98.00% | 3.0 | 1.0% |",
        "| gsae | without ∇ | 0.2500 | 7.00% | 98.00% | 3.0 | 1.0% |",
        "## Licence",
    ):
        assert fact in card
    assert "| topk | plain | 0.2500 |" in card  # with and without are the same
    assert "| topk | with" not in card


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_without_gradient_says_so(run, to):
    said = "This export selects without the gradient" in render(run, to, ["gsae"])
    assert said == (to != "safetensors")
    assert "selects without the gradient" not in render(run, to, ["topk"])
    assert "Not measured." in render(run, to)


def test_the_front_matter_is_what_the_hub_reads(run):
    matter = front_matter(render(run, "saelens", dataset="allenai/c4"))
    assert matter == {
        "license": "unknown",
        "library_name": "saelens",
        "base_model": "openai-community/gpt2",
        "datasets": ["allenai/c4"],
        "tags": [
            "sparse-autoencoder",
            "mechanistic-interpretability",
            "gradient-sparse-autoencoder",
            "arxiv:2411.10397",
            "saelens",
        ],
    }


@pytest.mark.parametrize("name", ["demo", None, "texts (local)", "no: hub\nname"])
def test_only_names_on_the_hub_are_in_the_front_matter(run, name):
    matter = front_matter(render(run, names=["topk"], model=name, dataset=name))
    assert not matter.keys() & {"base_model", "datasets"}


def test_an_end_to_end_sae_is_called_one(run):
    assert "| topk, end to end |" in render(run, training={"objective": "end_to_end"})
    assert "end to end" not in render(run)


def test_a_repository_is_named(run):
    card = render(run, "saelens", repo="owner/name")
    assert "hf download owner/name --local-dir ." in card
    assert 'SAE.from_pretrained("owner/name", "topk")' in card
    assert "owner/name" not in render(run, "saelens")


@pytest.mark.parametrize("architectures", [("topk",), ("tokenized",), ("topk", "tokenized")])
def test_code_of_our_own_format_runs_for_every_sae(tmp_path, monkeypatch, architectures):
    """That of the other libraries runs with them, in test_peers.py."""
    run = write_run(tmp_path / "run", architectures)
    card = render(run, "safetensors")
    (code,) = (part.split("```")[0] for part in card.split("```python\n")[1:])
    assert ("a tokenized SAE needs them" in code) == ("tokenized" in architectures)
    monkeypatch.chdir(run)
    for name in architectures:
        scope: dict = {}
        exec(code.replace(f'Path("{architectures[0]}")', f'Path("{name}")'), scope)
        assert scope["recon"].shape == (8, 8)
