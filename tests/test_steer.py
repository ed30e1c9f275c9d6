"""One concept's latent: found, steered with, shown; a planted one's answer is known."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest
import torch

from pipeline.concept import (
    Firing,
    encode_token,
    find_by_text,
    find_by_token,
    measure_firing,
    read_reference,
)
from pipeline.corpus.reader import open_corpus
from pipeline.errors import ConfigError
from pipeline.evaluate.association import read_direct_map
from pipeline.generate import Generation, generate
from pipeline.model import LanguageModel, load_model, load_tokenizer
from pipeline.report.steered import show_text
from pipeline.sae import SaeConfig, SparseAutoencoder, TopKSAE, init_weights, load_sae, save_sae
from pipeline.sae.io import read_sae_config
from pipeline.subject import choose_sae
from tests.tiny import run_cli

PLANTED, ZERO, TOKEN, NAME = 9, 5, "w", "k4-beta1e4"
FEW = ("--new-tokens", "3", "--sae", NAME)


@pytest.fixture(scope="module")
def project(cached, tmp_path_factory) -> Path:
    """A run whose SAE has one latent planted: it fires at once and raises one token."""
    folder = tmp_path_factory.mktemp("steer") / "project"
    shutil.copytree(cached, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_cli("train", "--steps", "5", "--out", "runs/tiny") == 0
    model = load_model(folder / "model")
    token = encode_token(load_tokenizer(folder / "model"), TOKEN)
    where = folder / "runs/tiny" / NAME
    sae, training = load_sae(where), read_sae_config(where).training
    direct = read_direct_map(model)
    with torch.no_grad():
        # No direction raises the token by more of its logits' standard deviations.
        sae.W_dec[PLANTED] = 5 * torch.linalg.pinv(direct @ direct.T, rtol=1e-4) @ direct[:, token]
        sae.b_enc[PLANTED] = 100.0
        sae.W_dec[ZERO] = 0.0
    save_sae(sae, where, training=training)
    return folder


@pytest.fixture(scope="module")
def model(project) -> LanguageModel:
    return load_model(project / "model")


def steer(capsys, *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run_cli("steer", *FEW, "--json", *args) == 0
    return json.loads(capsys.readouterr().out)


def test_a_planted_latent_is_found_by_its_token_and_steers_it(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    alphas = ("--alpha", "2", "--alpha", "0.5")
    found = steer(capsys, "--token", TOKEN, "--out", "plots/it.svg", *alphas)
    assert (found["latent"], found["sae"], found["fires"]) == (PLANTED, NAME, 1.0)
    assert "its rank: 1" in found["why"]
    first = found["tokens"][0]
    assert first["token"] == TOKEN
    assert first["change"] > 0.1
    assert first["change"] == max(token["change"] for token in found["tokens"])
    assert [effect["alpha"] for effect in found["effects"]] == [0.5, 2.0]
    weak, strong = found["effects"]
    assert strong["associated"] > weak["associated"] > 0
    together = sum(token["change"] for token in found["tokens"])
    assert strong["associated"] == pytest.approx(together, abs=1e-5)
    for effect in found["effects"]:
        assert effect["others"] == -effect["associated"]
        assert effect["others_absolute"] >= effect["associated"] - 1e-6
    alphas_of_texts = [text["alpha"] for text in found["texts"]]
    assert alphas_of_texts == [0.0, 0.5, 2.0] * 2
    before, after = found["texts"][0]["text"], found["texts"][2]["text"]
    assert after.count(TOKEN) > before.count(TOKEN)
    assert found["plot"] == "plots/it.svg"
    assert steer(capsys, "--token", TOKEN, "--out", "plots/it.svg", *alphas) == found


def test_the_plot_is_a_file_that_stands_alone(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    found = steer(capsys, "--latent", "3", "--prompt", "the <cat>")
    svg = Path(f"results/tiny-{NAME}-3.svg")
    assert found["plot"] == str(svg)
    assert found["texts"][0]["prompt"] == "the <cat>"
    picture = svg.read_text()
    document = minidom.parseString(picture).documentElement
    assert document is not None
    assert document.tagName == "svg"
    assert len(document.getElementsByTagName("circle")) >= 2 * len(found["effects"])
    assert "&lt;cat&gt;" in picture
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    steer(capsys, "--latent", "3", "--out", "it.html")
    assert Path("it.html").read_text().startswith("<!doctype html>")


def test_what_it_prints(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    capsys.readouterr()
    assert run_cli("steer", "--text", "the cat sat on a mat and then", *FEW) == 0
    out = capsys.readouterr().out
    for words in (
        "fires with",
        "tokens that it raises",
        "all others, absolute",
        "[before]",
        "plot",
    ):
        assert words in out


def test_without_a_corpus_text_is_built_in(project, monkeypatch, capsys, tmp_path):
    shutil.copytree(project, tmp_path / "project", ignore=shutil.ignore_patterns("data", "stores"))
    monkeypatch.chdir(tmp_path / "project")
    found = steer(capsys, "--token", TOKEN)
    assert found["latent"] == PLANTED
    assert "built-in text" in found["reference"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "expected one of --token, --latent and --text"),
        (("--token", "a", "--latent", "1"), "expected one of --token, --latent and --text"),
        (("--token", "cat"), "expected one token of the model's, got 3: 'c', 'a', 't'"),
        (("--token", "é"), "expected one token of the model's, got"),
        (("--latent", "64"), "--latent: expected 0 to 63, got 64"),
        (("--latent", "1", "--sae", "k5"), "--sae k5: expected one of k4-beta0, k4-beta1e4"),
        (("--text", "a"), "expected tokens beyond the positions that training left out"),
        (("--latent", "1", "--out", "plot.png"), "expected a name that ends in .svg or .html"),
        (
            ("--latent", "1", "--alpha", "nan"),
            "--alpha: expected numbers from -1e+06 to 1e+06, got nan",
        ),
        (("--latent", "1", "--prompt", ""), "--prompt: expected at least one token"),
        (("--latent", str(ZERO)), f"latent {ZERO} of {NAME}: expected a decoder row that is not"),
        (("--latent", "1", "--set", "evidence.steering_tokens=9999"), "expected fewer than the"),
    ],
)
def test_wrong_input_is_one_line(project, monkeypatch, capsys, args, message):
    monkeypatch.chdir(project)
    assert run_cli("steer", *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "demo"), "model for the SAEs at runs/tiny"),
        (("--corpus", "nowhere"), "corpus at nowhere"),
        (("--run", "runs/none"), "run at runs/none: expected trained SAEs"),
    ],
)
def test_what_does_not_belong_together(project, monkeypatch, capsys, args, message):
    monkeypatch.chdir(project)
    assert run_cli("steer", "--latent", "1", "--run", "runs/tiny", *args) == 1
    assert message in capsys.readouterr().err


def test_the_sae_with_the_highest_beta_on_gradients_of_its_own_is_taken():
    def config(beta: float, gradient: str) -> SaeConfig:
        facts = {"architecture": "topk", "d_model": 4, "d_sae": 8, "k": 2, "loss_tokens": 1}
        return SaeConfig(**facts, beta=beta, options={}, training={"gradient": gradient})

    configs = {
        "plain": config(0, "full"),
        "high": config(9, "full"),
        "as-high": config(9, "own"),
        "shuffled": config(99, "shuffled"),
        "own-shuffled": config(999, "own-shuffled"),
    }
    assert choose_sae(configs, None, where=Path("run")) == "high"
    assert choose_sae(configs, "plain", where=Path("run")) == "plain"
    for name in ("plain", "own-shuffled"):
        assert choose_sae({name: configs[name]}, None, where=Path("run")) == name


def test_a_token_s_latent_is_that_of_the_largest_standardised_logit():
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(30, 8, generator=generator) * torch.rand(30, 1, generator=generator)
    direct = torch.randn(8, 20, generator=generator)
    direct -= direct.mean(1, keepdim=True)
    alive = torch.rand(30, generator=generator) < 0.5
    scores = {
        i: float((row @ direct)[7] / (row @ direct).std(correction=0))
        for i, row in enumerate(W_dec)
        if alive[i]
    }
    found = find_by_token(W_dec, direct, 7, alive)
    assert found.latent == max(scores, key=lambda i: scores[i])
    assert found.score == pytest.approx(max(scores.values()), rel=1e-4)


def test_a_text_s_latent_fires_there_and_not_elsewhere():
    # Always on; on the text alone; on the text, but barely; elsewhere alone.
    on_text = torch.tensor([5.0, 2.0, 0.01, 0.0], dtype=torch.float64)
    elsewhere = torch.tensor([4.9, 0.1, 0.0, 3.0], dtype=torch.float64)
    found = find_by_text(Firing(on_text, on_text), Firing(elsewhere, elsewhere))
    assert found.latent == 1
    assert found.score == pytest.approx(2 / (0.1 + 2.0))
    silent = Firing(0 * elsewhere, 0 * elsewhere)  # nothing fires on the reference text
    found = find_by_text(Firing(on_text, on_text), silent)
    assert found.latent == 0
    assert found.score is not None
    assert 0 < found.score < float("inf")
    with pytest.raises(ConfigError, match="expected text on which a latent fires"):
        find_by_text(Firing(0 * on_text, on_text), Firing(elsewhere, elsewhere))


def test_firing_equals_one_row_at_a_time(project, model):
    sae: SparseAutoencoder = TopKSAE(d_model=16, d_sae=40, k=3)
    init_weights(sae, torch.randn(200, 16), seed=0, scale_input=True)
    corpus = open_corpus(project / "data/tiny")
    tokens = read_reference(corpus, None, context=10, seed=0).tokens[:20]
    hook = "blocks.1.hook_resid_post"
    firing = measure_firing(model, sae, tokens, hook=hook, exclude_positions=(0, 3))
    sums, counts, n_rows = torch.zeros(40), torch.zeros(40), 0
    for sequence in tokens:
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            model.bridge.run_with_hooks(
                sequence[None],
                fwd_hooks=[(hook, lambda value, hook, seen=seen: seen.append(value))],  # noqa: ARG005
            )
            for i in (1, 2, *range(4, 10)):
                values, indices = (column[0] for column in sae.encode(seen[0][0, i : i + 1]))
                for value, latent in zip(values.tolist(), indices.tolist(), strict=True):
                    sums[latent] += value
                    counts[latent] += value > 0
                n_rows += 1
    torch.testing.assert_close(firing.mean, (sums / n_rows).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(firing.frequency, (counts / n_rows).double())


def test_text_is_that_of_a_loop_over_whole_runs(model):
    hook, prompt, n = "blocks.1.hook_resid_post", [5, 9, 2], 20  # beyond the context of 16
    push = torch.randn(16, generator=torch.Generator().manual_seed(0))
    pushes = torch.stack([0 * push, 4 * push])
    greedy = Generation((), n, 0.0, 0)
    got = generate(model, prompt, pushes, hook=hook, exclude_positions=(0,), how=greedy)
    for push, ids in zip(pushes, got, strict=True):
        tokens = list(prompt)
        for _ in range(n):

            def add(value, push=push, **_):
                value = value.clone()
                value[0, 1:] += push
                return value

            with torch.no_grad():
                logits = model.bridge.run_with_hooks(
                    torch.tensor([tokens[-16:]]), fwd_hooks=[(hook, add)]
                )
            tokens.append(int(logits[0, -1].argmax()))
        assert ids == tokens[3:]
    assert got[0] != got[1]


def test_samples_have_the_model_s_probabilities_and_a_seed(model):
    hook, same = "blocks.1.hook_resid_post", torch.zeros(1, 16)

    def sample(seed: int) -> list[int]:
        how = Generation((), 1, 1.0, seed)
        return generate(model, [5, 9], same, hook=hook, exclude_positions=(), how=how)[0]

    drawn = [sample(seed)[0] for seed in range(100)]
    assert sample(3) == [drawn[3]]
    with torch.no_grad():
        probs = model.bridge(torch.tensor([[5, 9]]))[0, -1].softmax(-1)
    likeliest = int(probs.argmax())
    p = probs[likeliest].item()
    assert 0.05 < p < 0.95
    assert drawn.count(likeliest) / 100 == pytest.approx(p, abs=4 * (p * (1 - p) / 100) ** 0.5)


def test_what_cannot_be_printed_is_shown():
    assert show_text("a\n\tb\x00") == "a↵→b·"
