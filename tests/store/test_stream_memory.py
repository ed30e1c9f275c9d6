"""A stream's memory is bounded by its settings: a store ten times larger than the bound."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import store
from tests.wide_store import make_wide_spec

N_SHARDS, BLOCKS, CONTEXT, D_MODEL = 72, 64, 32, 1024
PROGRAM = """
import json, sys
import numcodecs.blosc  # as large as all that a stream holds
import store

opened = store.open_store(sys.argv[1])
plan = store.plan_stream(
    opened, hook="h", batch_size=256, epochs=1, seed=0, window=8, exclude_positions=(0,)
)

def read_status(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

before = read_status("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
n_batches = sum(1 for batch in store.stream_batches(opened, plan))
print(json.dumps({
    "grown": read_status("VmHWM") - before,
    "limit": store.stream_memory_bytes(opened, plan),
    "complete": n_batches == plan.n_batches,
}))
"""


def write_large(out: Path, numbers: str, compression: str) -> int:
    """Shards of the same cheap rows; returns the bytes of all files."""
    n_rows = BLOCKS * CONTEXT
    spec = make_wide_spec(
        N_SHARDS,
        BLOCKS,
        context=CONTEXT,
        d_model=D_MODEL,
        numbers=numbers,
        compression=compression,
        chunk_bytes=2**17,
    )
    acts, grads = torch.randn(2, n_rows, D_MODEL)
    rows = torch.arange(n_rows)
    work = out.parent / ".work"
    with store.lock_work(work):
        store.prepare_work(work, spec)
        for shard in spec.layout.shards:
            here = store.ShardRows(
                acts={"h": acts},
                grads={"h": grads},
                tokens=rows.int(),
                loss=rows.float(),
                block=(rows.div(CONTEXT, rounding_mode="floor") + shard.first_block).int(),
                position=rows.remainder(CONTEXT).int(),
            )
            store.write_shard(work, spec, shard, here)
        store.publish(work, spec, out, provenance={})
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize(("numbers", "compression"), [("float16", "none"), ("int8", "blosc")])
def test_a_store_ten_times_the_limit_is_read_within_it(tmp_path, numbers, compression):
    n_bytes = write_large(tmp_path / "out", numbers, compression)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "out"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["complete"]
    assert n_bytes > 10 * found["limit"]
    assert found["grown"] < found["limit"]
