"""Four SAEs trained from one stream of a store, beside four runs of their own:
`OMP_NUM_THREADS=2 python -m tests.benchmarks.grid --steps 32`.

TopK and g-SAE of k 32 and 64, d_model 768, d_sae 15360, batch 4096, in the profile's precision;
the store is that of tests.benchmarks.stream, float16, warm. Prints a table and one JSON line last.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import store
from pipeline.config import TrainConfig, load_config
from pipeline.member import plan_members, start_member, step_member
from pipeline.memory import keep_freed_memory
from tests.benchmarks.sae_step import BATCH, BETA, LR
from tests.benchmarks.stream import make_spec, plan_epochs, write_store
from tests.benchmarks.train_from_store import PROFILE


def time_grid(opened: store.ActivationStore, config: TrainConfig, n_steps: int) -> float:
    """Seconds to train all members that the configuration lists from one stream."""
    started = time.perf_counter()
    members = None
    stream = store.stream_batches(opened, plan_epochs(opened), as_stored=True)
    for batch in itertools.islice(stream, n_steps):
        acts, grads = batch.acts.float(), batch.grads.float()
        if members is None:
            members = [start_member(spec, config, acts) for spec in plan_members(config)]
        for member in members:
            step_member(member, acts, grads, config=config, lr=LR, full=False)
    return time.perf_counter() - started


def compare(*, d_sae: int, n_steps: int, repeats: int, scratch: Path | None) -> dict[str, float]:
    """Median seconds of one run of four members and of four runs of one, taking turns."""
    shared = {"train.d_saes": [d_sae], "train.gradients": ["cached"]}
    four = load_config(PROFILE, {"train.betas": [0.0, BETA], "train.ks": [32, 64], **shared}).train
    ones = [
        load_config(PROFILE, {"train.betas": [beta], "train.ks": [k], **shared}).train
        for beta, k in itertools.product((0.0, BETA), (32, 64))
    ]
    seconds: dict[str, list[float]] = {"one stream": [], "four runs": []}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        n_shards = max(2, -(-n_steps * BATCH // (60 * 255)))
        opened = write_store(Path(folder) / "store", make_spec("float16", "none", n_shards))
        for _ in range(repeats):
            seconds["one stream"].append(time_grid(opened, four, n_steps))
            seconds["four runs"].append(sum(time_grid(opened, one, n_steps) for one in ones))
    return {name: statistics.median(found) for name, found in seconds.items()}


def report(medians: dict[str, float], *, n_steps: int) -> None:
    print("| four members | s | ms per member and step |\n|---|---|---|")
    for name, found in medians.items():
        print(f"| {name} | {found:.1f} | {found / (4 * n_steps) * 1e3:.1f} |")
    line = {
        "name": f"four SAEs from one stream, {n_steps} steps",
        "value": medians["one stream"],
        "unit": "s",
        "against": medians["four runs"],
        "ratio": medians["one stream"] / medians["four runs"],
    }
    print(json.dumps(line))


def main() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the pipeline command does
    keep_freed_memory()  # as pipeline train does
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-sae", type=int, default=15360)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--dir", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    medians = compare(
        d_sae=arguments.d_sae,
        n_steps=arguments.steps,
        repeats=arguments.repeats,
        scratch=arguments.dir,
    )
    report(medians, n_steps=arguments.steps)


if __name__ == "__main__":
    main()
