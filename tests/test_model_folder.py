"""Checkpoint folders: their facts, where they are found, and the hash of what is in them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.model import ModelFacts, hash_weights, load_model, locate_checkpoint, read_facts
from pipeline.model import folder as folder_module
from tests.checkpoints import save_gpt2, save_llama, save_neox
from tests.hub import hub_environment, serve_hub
from tests.refusals import refuse


@pytest.fixture
def gpt2(tmp_path):
    """A GPT-2 checkpoint to spoil."""
    return save_gpt2(tmp_path / "gpt2", n_layers=3)


def test_facts_of_three_architectures(tmp_path):
    shape = {"n_layers": 3, "d_model": 24, "context": 10, "vocab": 70}
    neox, sequential = tmp_path / "neox", tmp_path / "sequential"
    assert read_facts(save_gpt2(tmp_path / "gpt2", **shape)) == ModelFacts(
        "gpt2", "GPT2LMHeadModel", 3, 24, 10, 70, False
    )
    assert read_facts(save_neox(neox, **shape), name="EleutherAI/pythia") == ModelFacts(
        "EleutherAI/pythia", "GPTNeoXForCausalLM", 3, 24, 10, 70, True
    )
    assert not read_facts(save_neox(sequential, **shape, parallel=False)).parallel_blocks
    assert read_facts(save_llama(tmp_path / "llama", **shape)) == ModelFacts(
        "llama", "LlamaForCausalLM", 3, 24, 10, 70, False
    )


# config.json, what the message says.
BAD_CONFIGS = [
    (None, "checkpoint at .*config.json: expected a JSON object, got .*No such file"),
    ("{", "expected a JSON object"),
    ("[1]", "expected a JSON object, got list"),
    ("{}", "expected a language model that transformers knows, got None"),
    ('{"model_type": "gpt99"}', "that transformers knows, got 'gpt99'"),
    ('{"model_type": "gpt2", "n_layer": "many"}', "that transformers knows, got 'gpt2'"),
    ('{"model_type": "gpt2"}', "expected a causal language model, got gpt2"),
    (
        '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}',
        "expected a causal language model, got BertForMaskedLM",
    ),
]


@pytest.mark.parametrize(("text", "words"), BAD_CONFIGS)
def test_bad_configurations_are_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    refuse(words, read_facts, tmp_path)


def test_locate_takes_a_folder_and_the_demo(gpt2, monkeypatch):
    assert locate_checkpoint(str(gpt2)) == gpt2
    monkeypatch.chdir(gpt2.parent)
    assert locate_checkpoint("gpt2") == gpt2  # a folder of that name goes before the hub
    monkeypatch.setattr(folder_module, "DEMO_FOLDER", gpt2)
    assert locate_checkpoint("demo") == gpt2
    refuse("revision at model.revision: expected null", locate_checkpoint, str(gpt2), "main")


def test_locate_refuses_what_is_not_there(tmp_path, monkeypatch):
    refuse("expected a folder", locate_checkpoint, str(tmp_path / "nothing"))
    refuse("expected model.safetensors, got none", locate_checkpoint, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refuse("model 'gpt2' on the hub: expected a download", locate_checkpoint, "gpt2")
    assert "--model demo" in message
    refuse("expected it to exist", locate_checkpoint, "no such name")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused(gpt2, name):
    (gpt2 / "model.safetensors").rename(gpt2 / name)
    message = refuse(f"got {name}.*pickles are never loaded", locate_checkpoint, str(gpt2))
    assert "safetensors" in message
    refuse("pickles are never loaded", load_model, gpt2)


LOCATE = """
import sys
from pipeline.errors import ModelError
from pipeline.model import locate_checkpoint
for name in sys.argv[1:]:
    try:
        print(locate_checkpoint(*name.split("@")))
    except ModelError as error:
        print(error)
"""


def locate_elsewhere(url: str, home: Path, *names: str) -> list[str]:
    """What locate_checkpoint says of each "name@revision" in a process that knows one hub."""
    result = subprocess.run(
        [sys.executable, "-c", LOCATE, *names],
        env=hub_environment(url, home),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_the_hub_is_asked_for_safe_files_only(gpt2, tmp_path):
    served, home = tmp_path / "hub" / "models" / "owner" / "tiny", tmp_path / "home"
    shutil.copytree(gpt2, served)
    for unwanted in ("pytorch_model.bin", "modeling.py", "tf_model.h5", "onnx/config.json"):
        (served / unwanted).parent.mkdir(exist_ok=True)
        (served / unwanted).write_bytes(b"never")
    with serve_hub(tmp_path / "hub") as url:
        fetched, other, revision = locate_elsewhere(
            url, home, "owner/tiny", "owner/other", "owner/tiny@no-such-branch"
        )
    assert "'owner/other' on the hub: expected it to exist" in other
    assert "at revision 'no-such-branch': expected it to exist" in revision
    assert {path.relative_to(fetched).as_posix() for path in Path(fetched).rglob("*")} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert hash_weights(Path(fetched)) == hash_weights(gpt2)
    # The hub is gone: what was fetched is found, what was not is refused.
    again, other = locate_elsewhere(url, home, "owner/tiny", "owner/other")
    assert again == fetched
    assert "expected a download or a copy in the cache, got neither" in other


def test_hash_sees_weights_and_configuration(gpt2):
    before = hash_weights(gpt2)
    (gpt2 / "tokenizer_config.json").write_text("{}")
    assert hash_weights(gpt2) == before
    weights = gpt2 / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hash_weights(gpt2) != before
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hash_weights(gpt2) == before
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"n_head": 4}))
    assert hash_weights(gpt2) != before
