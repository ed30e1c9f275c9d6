"""What each number format and compression costs: `python -m tests.benchmarks.formats FOLDER`.

Caches the demo corpus once in float32 in FOLDER, writes the same rows again in every format, and
reads each store through the training stream: bytes per token, MB of float32 values written and read
per second, in turns. Then trains the demo profile's SAEs, from several seeds, on each number format
and measures them on held-out text (means over the seeds, without gradient at inference);
compression changes no value, so it is not trained again. Prints a table and one JSON line last.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.config import Config, load_config
from pipeline.evaluate import evaluate_runs
from pipeline.training import plan_training, run_training
from store import plan_stream, stream_batches
from store.layout import ShardSpec
from store.lock import lock_work
from store.manifest import StoreSpec
from store.publication import publish
from store.reader import ActivationStore, open_store
from store.writer import ShardRows, prepare_work, write_shard
from tests.tiny import run_cli

NUMBERS = ("float32", "float16", "bfloat16", "int8")
COMPRESSIONS = ("none", "zstd", "blosc")
PROFILE = Path("configs/demo.yaml")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rates-only", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    folder = arguments.folder
    nothing = ("sensitivity_rows", "perturbation_samples", "steering_latents", "splitting_latents")
    changes = {"train.seeds": arguments.seeds, "train.gradients": ["cached"]}
    config = load_config(PROFILE, changes | {f"evidence.{key}": 0 for key in nothing})
    source = _cache_source(folder)
    plans = {
        f"{numbers}-{compression}": _respell(source.spec, numbers, compression)
        for numbers in NUMBERS
        for compression in COMPRESSIONS
    }
    write_s: dict[str, list[float]] = {name: [] for name in plans}
    read_s: dict[str, list[float]] = {name: [] for name in plans}
    for repeat in range(arguments.repeats):
        for name, spec in plans.items():
            write_s[name].append(_write(source, spec, folder / "formats" / f"{name}-{repeat}"))
        for name in plans:
            read_s[name].append(_read(folder / "formats" / f"{name}-{repeat}"))
    quality = {} if arguments.rates_only else _train_all(config, folder)
    value_mb = source.n_rows * source.d_model * 2 * 4 / 1e6
    print("| format | bytes/token | write MB/s | read MB/s | SAE | NMSE | loss added |")
    print("|---|---|---|---|---|---|---|")
    for name in plans:
        store = open_store(folder / "formats" / f"{name}-0")
        n_bytes = sum(f.bytes for shard in store.manifest.shards for f in shard.files.values())
        rates = (value_mb / statistics.median(seconds[name]) for seconds in (write_s, read_s))
        head = f"| {name} | {n_bytes / store.n_rows:.0f} | " + " | ".join(f"{r:.0f}" for r in rates)
        for sae, nmse, loss_added in quality.get(name.removesuffix("-none"), [("", 0.0, 0.0)]):
            print(f"{head} | {sae} | {nmse:.5f} | {loss_added:.5%} |")
    if not arguments.rates_only:
        print(json.dumps(_compare(quality)))


def _cache_source(folder: Path) -> ActivationStore:
    out, corpus = folder / "stores/float32", folder / "data"
    run_cli("cache", "--profile", "demo", "--dtype", "float32", "--corpus", corpus, "--out", out)
    return open_store(out)


def _respell(spec: StoreSpec, numbers: str, compression: str) -> StoreSpec:
    """The same rows in another format."""
    changes = {"acts_dtype": numbers, "grads_dtype": numbers, "compression": compression}
    return replace(spec, identity=spec.identity | changes, **changes)


def _write(source: ActivationStore, spec: StoreSpec, out: Path) -> float:
    """Seconds inside write_shard, for the whole store."""
    work, seconds = out.parent / ".work" / out.name, 0.0
    with lock_work(work):
        prepare_work(work, spec)
        for shard, rows in _read_rows(source):
            started = time.perf_counter()
            write_shard(work, spec, shard, rows)
            seconds += time.perf_counter() - started
        publish(work, spec, out, provenance={})
    return seconds


def _read_rows(source: ActivationStore) -> Iterator[tuple[ShardSpec, ShardRows]]:
    for shard in source.shards:
        rows = source.read_shard(shard.index)
        hook = source.hooks[0]
        yield (
            shard,
            ShardRows({hook: rows.acts}, {hook: rows.grads}, *rows[2:]),
        )


def _read(out: Path) -> float:
    """Seconds for one epoch of the training stream, from a warm page cache."""
    store = open_store(out)
    plan = plan_stream(store, hook=store.hooks[0], batch_size=2048, epochs=1, seed=0, window=None)
    started = time.perf_counter()
    n_batches = sum(1 for _ in stream_batches(store, plan))
    assert n_batches == plan.n_batches
    return time.perf_counter() - started


def _train_all(config: Config, folder: Path) -> dict[str, list[tuple[str, float, float]]]:
    return {numbers: _train(config, folder, numbers) for numbers in NUMBERS}


def _train(config: Config, folder: Path, numbers: str) -> list[tuple[str, float, float]]:
    store, run, out = folder / f"formats/{numbers}-none-0", folder / f"runs/{numbers}", folder
    run_training(plan_training(config.train, store), config.train, run, device="cpu", provenance={})
    metrics = evaluate_runs(
        config,
        run_folders=[run],
        corpus_folder=folder / "data",
        store=store,
        out=out / f"results/{numbers}",
    )
    by_beta: dict[float, list[dict]] = {}
    for sae in metrics["saes"].values():
        by_beta.setdefault(sae["beta"], []).append(sae["without_gradient"])
    return [
        (f"beta {beta:g}", _mean(saes, "nmse"), _mean(saes, "loss_added"))
        for beta, saes in by_beta.items()
    ]


def _mean(saes: list[dict], name: str) -> float:
    return statistics.fmean(sae[name] for sae in saes)


def _compare(quality: dict[str, list[tuple[str, float, float]]]) -> dict[str, object]:
    """The largest relative change that int8 makes to the mean NMSE or loss added at one beta."""
    changes = [
        abs(found / wanted - 1)
        for (_, *at_int8), (_, *at_float32) in zip(quality["int8"], quality["float32"], strict=True)
        for found, wanted in zip(at_int8, at_float32, strict=True)
    ]
    return {
        "name": "int8 against float32: largest change of NMSE or loss added",
        "value": max(changes),
        "unit": "relative",
        "against": 0.01,
        "ratio": max(changes) / 0.01,
    }


if __name__ == "__main__":
    main()
