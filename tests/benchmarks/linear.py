"""How the cost of a store grows: `python -m tests.benchmarks.linear`.

A random GPT-2 (4 layers, 128 wide) caches 1x, 4x and 16x tokens in one process with one torch
thread: seconds, bytes and files of the finished store. Then one and two workers with one torch
thread each cache the 4x tokens, timed with and without the start of their processes. Prints a table
of each, and one JSON line last.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from pipeline.cache import Mapper, run_cache
from pipeline.cache_plan import CachePlan, plan_cache
from pipeline.cluster import open_workers
from pipeline.config import Config, load_config
from pipeline.corpus import write_corpus
from pipeline.model import load_tokenizer
from tests.checkpoints import save_gpt2
from tests.tiny import REPOSITORY

CONTEXT, D_MODEL = 64, 128
TIMES = (1, 4, 16)


def make_config(folder: Path, n_tokens: int, **run: object) -> Config:
    """The demo profile on a small random model; shards of a fixed size."""
    overrides = {
        "model.name": str(folder / "model"),
        "corpus.source": str(folder / "texts"),
        "corpus.context_length": CONTEXT,
        "corpus.train_tokens": n_tokens,
        "corpus.held_out_tokens": None,
        "cache.layers": [2],
        "cache.precision": "float32",
        "cache.shard_mb": 1,
        **{f"run.{key}": value for key, value in run.items()},
    }
    return load_config(REPOSITORY / "configs" / "demo.yaml", overrides)


def make_inputs(folder: Path, n_tokens: int) -> None:
    """The model, and random text of rather more tokens than asked for."""
    save_gpt2(folder / "model", n_layers=4, d_model=D_MODEL, n_heads=4, context=CONTEXT, vocab=64)
    letters = np.random.default_rng(0).choice(list("etaoin shrdlu"), size=(400, n_tokens // 300))
    (folder / "texts").mkdir()
    for i, row in enumerate(letters):
        (folder / "texts" / f"{i:03}.txt").write_text("".join(row))


def plan_store(folder: Path, config: Config, name: str) -> CachePlan:
    corpus = folder / f"corpus-{config.corpus.train_tokens}"
    if not corpus.exists():
        write_corpus(config.corpus, load_tokenizer(folder / "model"), corpus)
    return plan_cache(config, corpus, folder / name / "store")


def time_one_process(folder: Path, n_tokens: int) -> tuple[float, int, int]:
    """Seconds, bytes and files of one store."""
    plan = plan_store(folder, make_config(folder, n_tokens), f"one-{n_tokens}")
    started = time.perf_counter()
    run_cache(plan, provenance={})
    seconds = time.perf_counter() - started
    files = [path for path in plan.out.rglob("*") if path.is_file()]
    return seconds, sum(path.stat().st_size for path in files), len(files)


def time_workers(folder: Path, n_tokens: int, n_workers: int) -> tuple[float, float]:
    """Seconds of the shards alone, and of these with the start and end of the workers."""
    config = make_config(folder, n_tokens, workers=n_workers, threads=1)
    plan = plan_store(folder, config, f"workers-{n_workers}")
    plan.settings.work.mkdir(parents=True)
    mapped = 0.0

    @contextmanager
    def clocked() -> Iterator[Mapper]:
        nonlocal mapped
        with open_workers(config.run, plan.settings) as mapper:
            started = time.perf_counter()
            yield mapper
            mapped = time.perf_counter() - started

    started = time.perf_counter()
    run_cache(plan, clocked(), provenance={})
    return mapped, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=65_536, help="of 1x")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_inputs(folder, arguments.tokens * TIMES[-1])
        time_one_process(folder, arguments.tokens // 4)  # loads the model
        costs = [time_one_process(folder, arguments.tokens * times) for times in TIMES]
        n_tokens = arguments.tokens * TIMES[1]
        alone, both = (time_workers(folder, n_tokens, n) for n in (1, 2))
    print(f"{'tokens':>12}{'seconds':>10}{'MB':>10}{'files':>8}   per token, against 1x")
    for times, cost in zip(TIMES, costs, strict=True):
        ratios = "  ".join(
            f"{now / once / times:.3f}" for now, once in zip(cost, costs[0], strict=True)
        )
        seconds, n_bytes, n_files = cost
        print(
            f"{times * arguments.tokens:12,}{seconds:10.2f}{n_bytes / 1e6:10.1f}{n_files:8}   "
            f"{ratios}"
        )
    for name, (mapped, whole) in (("one worker", alone), ("two workers", both)):
        print(
            f"{name:>12}: {n_tokens / mapped:,.0f} tokens/s, "
            f"{n_tokens / whole:,.0f} with their start and the store's publication"
        )
    seconds, n_bytes, n_files = (
        now / once / TIMES[-1] for now, once in zip(costs[-1], costs[0], strict=True)
    )
    print(
        json.dumps(
            {
                "name": "seconds per token of a store of 16x tokens",
                "value": round(costs[-1][0] / (TIMES[-1] * arguments.tokens) * 1e6, 3),
                "unit": "us/token",
                "against": "1x tokens",
                "ratio": round(seconds, 3),
                "ratio_bytes": round(n_bytes, 3),
                "ratio_files": round(n_files, 3),
                "two_workers_against_one": round(alone[0] / both[0], 3),
                "two_workers_against_one_with_start": round(alone[1] / both[1], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
