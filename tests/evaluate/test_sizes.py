"""Settings that ask for more text than is held out are refused by arithmetic, before the model
runs.
"""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, load_config
from pipeline.errors import CorpusError, ModelError
from pipeline.evaluate import evaluate_runs, stage
from pipeline.evaluate.sizes import check_model, check_text
from pipeline.model import LanguageModel, load_model
from store.reader import open_store
from tests.checkpoints import save_gpt2
from tests.evaluate.few_blocks import CONTEXT, VOCAB, FewBlocks
from tests.evaluate.small_saes import save_run
from tests.tiny import REPOSITORY, read_tree

# Nothing but faithfulness, on whatever is held out.
NOTHING = {
    "evaluate.tokens": None,
    "evidence.sensitivity_rows": 0,
    "evidence.perturbation_samples": 0,
    "evidence.perturbation_layers": None,
    "evidence.perturbation_context": 8,
    "evidence.steering_latents": 0,
    "evidence.splitting_latents": 0,
}
STEERING = {"evidence.steering_latents": 1, "evidence.steering_context": 9}
# What is asked for, and the real rows of each block, of which position 0 is left out.
ENOUGH: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, (1, 2)),
    ({"evaluate.tokens": 2}, (1, 2)),
    ({"evaluate.tokens": 20}, (12, 8)),
    ({"evidence.sensitivity_rows": 99}, (3, 2)),  # as many as there are
    ({"evidence.perturbation_samples": 99}, (7, 8)),  # one sequence in place of 99
    (STEERING | {"evidence.steering_sequences": 2}, (9, 8, 9)),
    ({"evidence.splitting_latents": 8, "evidence.splitting_blocks": 99}, (2, 3)),  # two blocks
]
# The same, and what the error says.
TOO_LITTLE: list[tuple[dict[str, Any], tuple[int, ...], str]] = [
    (
        {"evaluate.tokens": 21},
        (12, 8),
        "at least 21 tokens (evaluate.tokens), got 20. Set evaluate.tokens to null",
    ),
    (
        {"evaluate.tokens": 1},
        (12, 12, 1),  # the last is drawn first
        "a row that training did not leave out, got none in 1 blocks (evaluate.tokens). Set",
    ),
    (
        {"evidence.sensitivity_rows": 99},
        (12, 1),  # the second has no row but the one left out
        "at least 2 blocks with rows, got 1 (evidence.sensitivity_rows). Make",
    ),
    (
        {"evidence.sensitivity_rows": 99},
        (2, 2, 2),
        "at least 2 rows in the blocks set apart, got 1 (evidence.sensitivity_rows). Make",
    ),
    (
        {"evidence.perturbation_samples": 99},
        (7, 7),
        "a block of at least 8 rows (evidence.perturbation_context), some of them to perturb, got",
    ),
    (
        {"evidence.perturbation_samples": 1, "evidence.perturbation_context": 1},
        (12, 12),
        "a block of at least 1 rows (evidence.perturbation_context), some of them to perturb, got",
    ),
    (
        STEERING | {"evidence.steering_sequences": 3},
        (9, 8, 9),
        "3 blocks of at least 9 tokens (evidence.steering_sequences, evidence.steering_context), "
        "got 2. Run",
    ),
    (
        STEERING | {"evidence.steering_context": 1},
        (9, 8, 9),
        "a position below 1 (evidence.steering_context) that training did not leave out, got",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("gpt2")
    return load_model(save_gpt2(folder, n_layers=1, context=CONTEXT, vocab=VOCAB))


def make_config(settings: dict[str, Any]) -> Config:
    return load_config(REPOSITORY / "configs/demo.yaml", NOTHING | settings)


@pytest.mark.parametrize(("settings", "lengths"), ENOUGH)
def test_enough_is_held_out(model, settings, lengths):
    check_text(make_config(settings), FewBlocks(lengths), model, (0,))


@pytest.mark.parametrize(("settings", "lengths", "words"), TOO_LITTLE)
def test_too_little_is_held_out(model, settings, lengths, words):
    with pytest.raises(CorpusError) as caught:
        check_text(make_config(settings), FewBlocks(lengths), model, (0,))
    assert str(caught.value).startswith(f"held-out text at few-blocks: expected {words}")
    assert "\n" not in str(caught.value)
    check_text(make_config({}), FewBlocks(lengths), model, (0,))  # without that measurement


def test_of_the_demo_text_all_there_is_is_enough(model):
    check_text(make_config({"evaluate.tokens": 21}), FewBlocks((12, 8), source="demo"), model, (0,))


@pytest.mark.parametrize("lengths", [(), (1,), (1, 1)])
def test_there_is_no_row_to_measure(model, lengths):
    with pytest.raises(CorpusError, match=f"got none in {len(lengths)} blocks .*larger corpus"):
        check_text(make_config({}), FewBlocks(lengths), model, (0,))


def test_sensitivity_is_refused_where_a_block_lacks_its_site(model):
    lacking = model._replace(sites=model.sites - {"blocks.0.hook_resid_post"})
    evidence = make_config({"evidence.sensitivity_rows": 9}).evidence
    check_model(evidence, model)
    with pytest.raises(ModelError, match=r"all of its 1 blocks, got none in 0\. .*_rows=0`\.$"):
        check_model(evidence, lacking)
    check_model(make_config({}).evidence, lacking)


@pytest.mark.parametrize(
    "settings",
    [
        {"evaluate.tokens": 10**9},
        STEERING | {"evidence.steering_sequences": 10**6},
    ],
)
def test_nothing_is_measured_first(cached, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(cached)
    for first in ("evaluate_saes", "fit_controls", "mean_activation"):
        monkeypatch.setattr(stage, first, lambda *_, **__: pytest.fail("measured"))
    run = save_run(tmp_path / "run", open_store("stores/tiny"))
    with pytest.raises(CorpusError, match="held-out text at data/tiny: expected"):
        evaluate_runs(
            load_config(Path("configs/tiny.yaml"), NOTHING | settings),
            run_folders=[run],
            corpus_folder=Path("data/tiny"),
            store="stores/tiny",
            out=tmp_path / "results",
        )
    assert set(read_tree(tmp_path)) == {f"run/{name}" for name in read_tree(run)}
