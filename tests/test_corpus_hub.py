"""The real way to a hub's datasets and models, in processes that know a hub on loopback only."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import draw_split, open_corpus
from tests.checkpoints import save_gpt2
from tests.corpora import byte_tokenizer, some_texts
from tests.hub import hub_environment, serve_hub

REPOSITORY = Path(__file__).parents[1]

CARD = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/train-*}, {split: validation, path: en/validation-*}]
- config_name: short
  data_files: [{split: train, path: short/*}]
---
"""

# Name, and what differs from {"source": "owner/parquet", "subset": "en"}.
CORPORA = {
    "parquet": {},
    "jsonl": {"source": "owner/jsonl"},
    "token ids": {"column": "ids"},
    "no subset": {"subset": None},
    "unknown subset": {"subset": "fr"},
    "unknown split": {"split": "test"},
    "unknown column": {"column": "body"},
    "numbers": {"column": "n"},
    "too short": {"subset": "short"},
    "missing": {"source": "owner/nothing"},
    "private": {"source": "owner/private"},
}

WRITE = """
import json, sys
from pathlib import Path
from pipeline.corpus import write_corpus
from pipeline.errors import CorpusError
from tests.corpora import byte_tokenizer, corpus_config

for name, changes in json.loads(sys.argv[2]).items():
    settings = {"source": "owner/parquet", "subset": "en"} | changes
    try:
        write_corpus(corpus_config(**settings), byte_tokenizer(), Path(sys.argv[1]) / name)
        error = None
    except CorpusError as caught:
        error = str(caught)
    print(json.dumps([name, error]))
"""


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    texts = some_texts()
    for name in ("parquet", "jsonl", "private"):
        for subset in ("en", "short"):
            (root / "datasets/owner" / name / subset).mkdir(parents=True)
        (root / "datasets/owner" / name / "README.md").write_text(CARD)
    for name, some in {
        "en/train-0": texts[:25],
        "en/train-1": texts[25:],
        "en/validation-0": ["unseen"],
        "short/0": ["a", "b", "c", "d", "e"],
    }.items():
        ids = [list(text.encode()) for text in some]
        table = pa.table({"n": list(range(len(some))), "text": some, "ids": ids})
        pq.write_table(table, root / f"datasets/owner/parquet/{name}.parquet")
        with gzip.open(root / f"datasets/owner/jsonl/{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in some)
    save_gpt2(root / "models/gpt2")
    (root / "models/gpt2/pytorch_model.bin").write_bytes(b"a pickle")
    save_gpt2(root / "models/owner/secret")
    return root


def run_client(script, *args, root, home, **environment):
    """Run a script against the hub; returns what it printed as JSON, line by line."""
    with serve_hub(root, private=("owner/private", "owner/secret")) as url:
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            cwd=REPOSITORY,
            env=hub_environment(url, home) | environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def written(hub_root, tmp_path_factory):
    """The folder of corpora, and the error of each that was refused."""
    folder = tmp_path_factory.mktemp("corpora")
    home = tmp_path_factory.mktemp("home")
    lines = run_client(WRITE, folder, json.dumps(CORPORA), root=hub_root, home=home)
    return folder, {name: error for name, error in lines if error}


@pytest.mark.parametrize(
    ("name", "source"),
    [("parquet", "owner/parquet"), ("jsonl", "owner/jsonl"), ("token ids", "owner/parquet")],
)
def test_a_dataset_is_streamed_into_a_corpus(written, name, source):
    folder, errors = written
    assert name not in errors
    corpus = open_corpus(folder / name)
    manifest = corpus.manifest
    assert (manifest.source, manifest.subset, manifest.split) == (source, "en", "train")
    chosen = [
        text
        for i, text in enumerate(some_texts())
        if draw_split(f"{source}/en/train/{i}", 0.3) == "train"
    ]
    if name == "token ids":
        stream = [token for text in chosen for token in text.encode()]
    else:
        stream = [t for text in chosen for t in [0, *byte_tokenizer()(text)["input_ids"]]]
    assert manifest.splits["train"].documents == len(chosen)
    n_blocks = (len(stream) - 1) // 16
    blocks = corpus.read_blocks("train", 0, corpus.n_blocks("train"))
    assert blocks.tokens.tolist() == [stream[i * 16 : i * 16 + 17] for i in range(n_blocks)]


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("no subset", ["subset None", "'en', 'short'", "--set corpus.subset=NAME"]),
        ("unknown subset", ["subset fr", "'en', 'short'", "--set corpus.subset=NAME"]),
        ("unknown split", ["split test", "'train', 'validation'", "--set corpus.split=NAME"]),
        ("unknown column", ["'body'", "'n', 'text', 'ids'", "--set corpus.column=NAME"]),
        ("numbers", ["owner/parquet/en/train/0", "got int", "--set corpus.column=NAME"]),
        ("too short", ["expected at least one train block", "--set corpus.context_length=N"]),
        ("missing", ["owner/nothing", "doesn't exist on the Hub", "--set corpus.source=PATH"]),
        ("private", ["owner/private", "cannot be accessed", "hf auth whoami"]),
    ],
)
def test_what_a_hub_refuses_is_one_line_that_says_what_to_do(written, name, messages):
    folder, errors = written
    assert all(message in errors[name] for message in messages), errors[name]
    assert "\n" not in errors[name]
    assert not (folder / name).exists()


def test_without_a_network(hub_root, tmp_path):
    wanted = json.dumps({"offline": {}})
    environment = {"HF_HUB_OFFLINE": "1"}
    lines = run_client(
        WRITE, tmp_path / "out", wanted, root=hub_root, home=tmp_path / "home", **environment
    )
    assert "Couldn't reach 'owner/parquet' on the Hub" in lines[0][1]
    assert "--set corpus.source=PATH" in lines[0][1]


SNAPSHOT = """
import json, os
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoConfig, AutoTokenizer

folder = snapshot_download("gpt2", allow_patterns=["*.json", "*.safetensors"])
print(json.dumps(sorted(os.listdir(folder))))
config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
print(json.dumps([config.n_layer, len(tokenizer)]))
print(json.dumps(open(f"{folder}/model.safetensors", "rb").read(8).hex()))
for name in ("owner/nothing", "owner/secret"):
    try:
        snapshot_download(name)
    except RepositoryNotFoundError as error:
        print(json.dumps(error.response.status_code))
"""


def test_a_model_is_downloaded_from_it(hub_root, tmp_path):
    files, sizes, start, missing, private = run_client(SNAPSHOT, root=hub_root, home=tmp_path)
    assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sizes == [2, 64]
    assert start == (hub_root / "models/gpt2/model.safetensors").read_bytes()[:8].hex()
    assert (missing, private) == (404, 401)
