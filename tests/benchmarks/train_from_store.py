"""A g-SAE trained from a store against the same batches held in memory:
`python -m tests.benchmarks.train_from_store`.

d_model 768, d_sae 15360, k 32, beta 1e5, batch 4096, all torch threads; the loop's own steps. The
store is that of tests.benchmarks.stream, float16, warm; batches are float16 either way, and a step
converts them. Runs of `--steps` steps take turns, each
from fresh weights; a step is timed with the wait for its batch. Prints medians over all steps but
each run's first, and one JSON line last: at most 1.02 is wanted.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import store
from pipeline.config import TrainConfig, load_config
from pipeline.member import plan_members, start_member, step_member
from pipeline.memory import keep_freed_memory
from tests.benchmarks.stream import D_MODEL, N_SHARDS, make_spec, plan_epochs, write_store

PROFILE = Path(__file__).parents[2] / "configs" / "gpt2-small.yaml"


def time_steps(config: TrainConfig, batches: Iterable[store.Batch]) -> list[float]:
    """Seconds of each step but the first, from one batch's arrival to the next one's."""
    member, seconds = None, []
    started = time.perf_counter()
    for batch in batches:
        if member is None:
            (spec,) = plan_members(config)
            member = start_member(spec, config, batch.acts.float())
        acts, grads = batch.acts.float(), batch.grads.float()
        step_member(member, acts, grads, config=config, lr=config.lr, full=False)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return seconds[1:]


def main() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the pipeline command does
    keep_freed_memory()  # as pipeline train does
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--repeats", type=int, default=4, help="runs of each kind")
    parser.add_argument("--shards", type=int, default=N_SHARDS)
    parser.add_argument("--d-sae", type=int, default=15360)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    changes = {
        "train.betas": [1e5],
        "train.ks": [32],
        "train.d_saes": [arguments.d_sae],
        "train.gradients": ["cached"],
        "train.precision": arguments.precision,
    }
    config = load_config(PROFILE, changes).train
    open_stream = partial(store.stream_batches, as_stored=True)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        spec = make_spec("float16", "none", arguments.shards)
        opened = write_store(Path(scratch) / "store", spec)
        plan = plan_epochs(opened)
        held = list(itertools.islice(open_stream(opened, plan), arguments.steps))
        seconds: dict[str, list[float]] = {"store": [], "memory": []}
        for _ in range(arguments.repeats):
            for name, found in seconds.items():
                stream = open_stream(opened, plan) if name == "store" else iter(held)
                found += time_steps(config, itertools.islice(stream, arguments.steps))
                del stream  # and its threads with it
    report({name: statistics.median(found) for name, found in seconds.items()})


def report(medians: dict[str, float]) -> None:
    for name, seconds in medians.items():
        print(f"{name}: {seconds * 1e3:.1f} ms/step")
    line = {
        "name": f"g-SAE step from the store, d_model {D_MODEL}",
        "value": medians["store"],
        "unit": "s",
        "against": medians["memory"],
        "ratio": medians["store"] / medians["memory"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
