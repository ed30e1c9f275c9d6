"""Made-up results in the form that the stages write; no number in it is measured."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.paths import format_number

HOOK = "blocks.7.hook_resid_post"
LOSS, LOSS_MEAN, LOSS_ZERO = 2.4137, 5.9021, 8.3146
D_SAE = 2048
FINGERPRINT = "5e1f" * 16
CORPUS_FINGERPRINT = "c0de" * 16

TWO = ((32, 0.0), (32, 1e5))
EIGHT = tuple((k, beta) for k in (16, 32) for beta in (0.0, 1e3, 1e4, 1e5))


def name_member(k: int, beta: float) -> str:
    return f"k{k}-beta{format_number(beta)}"


def make_metrics(members: tuple[tuple[int, float], ...] = TWO) -> dict[str, Any]:
    """metrics.json: a larger beta loses NMSE, and gains loss only with the gradient."""
    return {
        "hook": HOOK,
        "model": {
            "tokens": 131_072,
            "loss": LOSS,
            "loss_zero_ablation": LOSS_ZERO,
            "loss_mean_ablation": LOSS_MEAN,
        },
        "saes": {name_member(k, beta): make_sae(k, beta) for k, beta in members},
    }


def make_sae(k: int, beta: float) -> dict[str, Any]:
    strength = math.log10(1 + beta / 300) / 2.5
    nmse = 0.62 * k**-0.21 + 0.021 * strength**2
    added = 0.9 * k**-0.8 * (1 - 0.12 * strength)
    overlap = 1 - 0.31 * strength
    return {
        "k": k,
        "beta": beta,
        "seed": 0,
        "d_sae": D_SAE,
        "loss_tokens": 8160,
        "with_gradient": make_mode(
            k, nmse + 0.006 * strength, added * (1 - 0.7 * strength), strength
        ),
        "without_gradient": make_mode(k, nmse, added, strength),
        "selection_overlap": overlap,
        "selection_overlap_at": {"255": max(0.06, overlap - 0.3 * strength), "8160": overlap},
        "gradient_weight": {"255": beta * 7.9e-4, "8160": beta * 2.47e-5},
        "latent_gradient": {"255": 7.9e-4, "8160": 2.47e-5},
    }


def make_mode(k: int, nmse: float, added: float, strength: float) -> dict[str, float]:
    loss = LOSS * (1 + added)
    return {
        "nmse": nmse,
        "nmse_squared": nmse**2 * 1.07,
        "loss": loss,
        "loss_added": added,
        "kl": 0.8 * added * LOSS,
        "loss_added_all_positions": added * 1.18,
        "ce_recovered_zero": (LOSS_ZERO - loss) / (LOSS_ZERO - LOSS),
        "ce_recovered_mean": (LOSS_MEAN - loss) / (LOSS_MEAN - LOSS),
        "l0": k - 0.04 * strength,
        "dead_fraction": 0.43 - 0.09 * strength,
        "dead_fraction_held_out": 0.29 - 0.08 * strength,
    }


def make_history(k: int, beta: float, n_steps: int = 300) -> dict[str, list[Any]]:
    """Columns of history.parquet: a quick fall, then a slow one, with a little noise."""
    sae = make_sae(k, beta)
    final = sae["with_gradient"]
    columns: dict[str, list[Any]] = {}
    for i in range(1, n_steps + 1):
        done, noise = i / n_steps, math.sin(12.9898 * i * (k + 1)) * 0.02
        fall = math.exp(-22 * done) + 0.12 * (1 - done)
        nmse = final["nmse"] * (1 + 2.2 * fall + noise)
        row = {
            "step": 10 * i,
            "tokens": 40_960 * i,
            "lr": 1e-3 * min(1, 20 * done, 5 * (1 - done)),
            "tokens_per_s": 11_000.0,
            "loss": 128 * nmse**2,
            "nmse": nmse,
            "nmse_squared": nmse**2,
            "l0": final["l0"],
            "dead_latents": round(D_SAE * final["dead_fraction"] * (1 - math.exp(-6 * done))),
            "overlap": 1 - (1 - sae["selection_overlap"]) * (1 - math.exp(-9 * done)),
            "gradient_weight": beta * 2.47e-5,
        }
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return columns


def make_config(members: tuple[tuple[int, float], ...] = TWO) -> dict[str, Any]:
    """The run's config.json."""
    train = {
        "hook": None,
        "betas": sorted({beta for _, beta in members}),
        "ks": sorted({k for k, _ in members}),
        "seeds": [0],
        "d_sae": D_SAE,
        "loss_tokens": 8160,
        "decoder_norm": "unit",
        "input_scaling": "mean_norm",
        "batch_size": 4096,
        "epochs": 4,
        "tokens": None,
        "lr": 1e-3,
        "exclude_positions": [0],
    }
    return {
        "train": train,
        "members": [name_member(k, beta) for k, beta in members],
        "hook": HOOK,
        "d_model": 128,
        "n_steps": 3000,
        "store_fingerprint": FINGERPRINT,
        "store_identity": make_store()["identity"],
        "profile": "demo",
        "config": {
            "model": {"name": "demo", "revision": None, "weight_processing": "raw"},
            "corpus": {"source": "demo", "context_length": 256, "packing": "packed"},
            "cache": {"hook": "resid_post", "layers": [7], "acts_dtype": "float16", "seed": 0},
            "train": train,
            "evaluate": {"tokens": None, "batch_blocks": 16, "loss_tokens": [255, 8160]},
            "run": {"device": "auto", "workers": 0, "scheduler": None},
        },
        "versions": {"python": "3.11.7", "gsae-pipeline": "0.1.0", "torch": "2.13.0"},
    }


def make_store(n_shards: int = 9) -> dict[str, Any]:
    """A store's manifest.json, with the keys that the report reads."""
    rows = 1_433_600
    names = ("mean", "rms", "max_abs", "mean_row_norm", "saturated", "underflowed")
    acts = dict(zip(names, (0.0132, 2.31, 61.2, 25.9, 0, 3), strict=True))
    grads = dict(zip(names, (2.1e-6, 0.0081, 1.9, 0.0874, 0, 40_213), strict=True))
    return {
        "format": "activation-store",
        "format_version": 1,
        "fingerprint": FINGERPRINT,
        "identity": {
            "weights_hash": "ab12" * 16,
            "weight_processing": "raw",
            "corpus": CORPUS_FINGERPRINT,
            "loss_reduction": "sum",
            "precision": "bfloat16",
        },
        "hooks": [HOOK],
        "d_model": 128,
        "context_length": 256,
        "acts_dtype": "float16",
        "grads_dtype": "float16",
        "seed": 0,
        "rows_per_chunk": 4096,
        "rows_per_shard": rows // n_shards // 4096 * 4096,
        "n_blocks": rows // 256,
        "n_rows": rows,
        "shards": [
            {
                "index": i,
                "n_rows": rows // n_shards,
                "files": {
                    f"{HOOK}/acts": {"bytes": 40_777_216, "sha256": "00" * 32},
                    f"{HOOK}/grads": {"bytes": 40_777_216, "sha256": "00" * 32},
                },
                "statistics": {f"{HOOK}/acts": acts, f"{HOOK}/grads": grads},
            }
            for i in range(n_shards)
        ],
    }


def make_corpus() -> dict[str, Any]:
    """A corpus's manifest.json, with the keys that the report reads."""
    return {
        "format": "gsae-corpus",
        "format_version": 1,
        "fingerprint": CORPUS_FINGERPRINT,
        "source": "demo",
        "subset": None,
        "split": None,
        "column": None,
        "tokenizer_hash": "7045" * 16,
        "context_length": 256,
        "packing": "packed",
        "prepend_bos": False,
        "held_out_fraction": 0.1,
        "splits": {
            "train": {"documents": 1_204, "tokens": 1_433_600, "blocks": 5_600, "parts": []},
            "held_out": {"documents": 131, "tokens": 131_072, "blocks": 512, "parts": []},
        },
        "versions": {"python": "3.11.7", "datasets": "5.0.0"},
    }


def make_inputs(members: tuple[tuple[int, float], ...] = TWO) -> dict[str, Any]:
    """The arguments of build_report."""
    config = make_config(members)
    return {
        "profile": "demo",
        "metrics": make_metrics(members),
        "config": config,
        "histories": {name_member(k, beta): make_history(k, beta) for k, beta in members},
        "store": make_store(),
        "corpus": make_corpus(),
        "versions": config["versions"],
    }


def write_inputs(folder: Path, members: tuple[tuple[int, float], ...] = TWO) -> dict[str, Any]:
    """The same as files; returns the arguments of write_report."""
    inputs = make_inputs(members)
    for path, content in (
        ("results/metrics.json", inputs["metrics"]),
        ("run/config.json", inputs["config"]),
        ("store/manifest.json", inputs["store"]),
        ("corpus/manifest.json", inputs["corpus"]),
    ):
        (folder / path).parent.mkdir()
        write_json(folder / path, content)
    run = hashlib.sha256((folder / "run/config.json").read_bytes()).hexdigest()
    write_json(folder / "results/metrics.json", inputs["metrics"] | {"run": run})
    for name, history in inputs["histories"].items():
        (folder / "run" / name).mkdir()
        pq.write_table(pa.table(history), folder / "run" / name / "history.parquet")
    return {
        "profile": "demo",
        "run_folder": folder / "run",
        "results_folder": folder / "results",
        "corpus_folder": folder / "corpus",
        "store_folder": folder / "store",
        "out": folder / "out" / "report.html",
    }


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
