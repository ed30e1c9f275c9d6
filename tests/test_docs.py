"""The pages say what the code does."""

import re
import runpy
from pathlib import Path

import pytest

from pipeline.config import known_keys
from tests.tiny import run_cli

REPOSITORY = Path(__file__).parents[1]
SET_UP = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "
GENERATE = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))


@pytest.mark.parametrize(
    ("page", "render"), [("cli", "render_cli"), ("settings", "render_settings")]
)
def test_generated_pages_are_current(page, render):
    text = (REPOSITORY / "docs" / f"{page}.md").read_text()
    assert text == GENERATE[render](), "run `python docs/generate.py`"


def test_every_setting_is_explained():
    text = (REPOSITORY / "docs" / "settings.md").read_text()
    for key in known_keys():
        assert f"| `{key}` |" in text


def test_readme_has_the_two_commands_that_ci_runs():
    commands = re.findall(r"^python3 -m venv .*$", (REPOSITORY / "README.md").read_text(), re.M)
    assert commands == [
        SET_UP + "-e . && dvc repro",
        SET_UP + "-e '.[test]' && pytest",
    ]
    assert "grep '^python3 -m venv' README.md" in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(page):
    path = REPOSITORY / page
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page}: {target}"


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory):
    """The demo profile on a few thousand tokens, in the folders that the README names."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        few = ("--tokens", "8192", "--set", "corpus.held_out_tokens=2048")
        assert run_cli("corpus", *few, "--out", "data/demo") == 0
        assert run_cli("cache", *few, "--corpus", "data/demo", "--out", "stores/demo") == 0
        short = ("--set", "train.batch_size=512", "--set", "train.epochs=1")
        assert run_cli("train", *short, "--store", "stores/demo", "--out", "runs/demo") == 0
    return folder


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)


def test_readme_code_runs_as_printed(finished_demo, monkeypatch, capsys):
    """Three lines open a store, a few more apply an SAE, five splice it in."""
    monkeypatch.chdir(finished_demo)
    scope: dict = {}
    for code in python_blocks():
        exec(code, scope)
    assert "torch.Size([256, 128]) torch.Size([256, 128])" in capsys.readouterr().out
    assert scope["logits"].shape[:2] == (1, 8)
