"""`--model gpt2` and a named dataset, through the real loading path, from a hub on loopback."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from store import open_store
from tests.checkpoints import save_gpt2
from tests.hub import hub_environment, serve_hub
from tests.tiny import make_project, spawn_cli, write_texts

CARD = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/*.parquet}]
---
"""


def test_the_main_job_with_a_model_and_a_dataset_by_name(tmp_path):
    root = tmp_path / "hub"
    save_gpt2(root / "models/gpt2", n_layers=3, d_model=16, n_heads=2, context=16)
    (root / "models/gpt2/pytorch_model.bin").write_bytes(b"a pickle that must not be fetched")
    write_texts(tmp_path / "texts")
    texts = [path.read_text() for path in sorted((tmp_path / "texts").glob("*.txt"))]
    dataset = root / "datasets/allenai/c4"
    (dataset / "en").mkdir(parents=True)
    (dataset / "README.md").write_text(CARD)
    pq.write_table(pa.table({"text": texts}), dataset / "en/train.parquet")

    project = make_project(tmp_path / "project")
    with serve_hub(root) as url:
        process = spawn_cli(
            "cache",
            "--model",
            "gpt2",
            "--set",
            "corpus.source=allenai/c4",
            "--set",
            "corpus.subset=en",
            "--out",
            "stores/hub",
            cwd=project,
            **hub_environment(url, tmp_path / "home"),
        )
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    manifest = open_store(project / "stores/hub").manifest
    assert manifest.d_model == 16
    corpus = json.loads(next(project.glob("data/*/manifest.json")).read_text())
    assert (corpus["source"], corpus["subset"]) == ("allenai/c4", "en")
    assert not list((tmp_path / "home").rglob("*.bin"))


def test_without_a_network_the_error_is_one_line(tmp_path):
    project = make_project(tmp_path / "project")
    environment = hub_environment("http://127.0.0.1:9", tmp_path / "home")  # nobody listens there
    process = spawn_cli("cache", "--model", "gpt2", cwd=project, **environment)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.startswith("Error: model 'gpt2' on the hub")
    assert len(err.strip().splitlines()) == 1
