"""Streaming a warm local store against a raw file of the same rows, in one run:
`python -m tests.benchmarks.stream`.

Both give activations and gradients, 768 wide, as float32 torch batches of 4096, for two epochs. The
store: 368,640 rows in 24 shards (1.1 GB as float16), default window, position 0 left out. The raw
files hold the rows that the stream gives, in its order, as float16, memory-mapped. They are read in
contiguous pieces of 64 MB into one buffer per file, and converted batch by batch, by all torch
threads. The table also has them converted by one, and by one from the map itself, which reads
nothing into memory first. Readers take turns; medians of 3 (`--repeats`). The JSON line, last, is
of the first format and compression.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import store
from tests.wide_store import make_wide_spec

HOOK = "blocks.7.hook_resid_post"
N_SHARDS, BLOCKS_PER_SHARD, CONTEXT, D_MODEL = 24, 60, 256, 768
BATCH, EPOCHS = 4096, 2
RAW = ("raw float16, all threads", "")
PIECE_ROWS = 2**26 // (2 * D_MODEL) // BATCH * BATCH


def make_spec(numbers: str, compression: str, n_shards: int) -> store.StoreSpec:
    return make_wide_spec(
        n_shards,
        BLOCKS_PER_SHARD,
        context=CONTEXT,
        d_model=D_MODEL,
        numbers=numbers,
        compression=compression,
        hook=HOOK,
    )


def make_rows(shard: store.ShardSpec) -> store.ShardRows:
    """Normal activations, and gradients a thousandth of that; every shard has the same."""
    generator = torch.Generator().manual_seed(0)
    acts, grads = torch.randn(2, shard.n_rows, D_MODEL, generator=generator)
    rows = torch.arange(shard.n_rows)
    return store.ShardRows(
        acts={HOOK: acts},
        grads={HOOK: grads / 1000},
        tokens=torch.randint(0, 50257, (shard.n_rows,), generator=generator).int(),
        loss=torch.rand(shard.n_rows, generator=generator),
        block=(rows.div(CONTEXT, rounding_mode="floor") + shard.first_block).int(),
        position=rows.remainder(CONTEXT).int(),
    )


def write_store(out: Path, spec: store.StoreSpec) -> store.ActivationStore:
    work = out.parent / ".work" / out.name
    rows = make_rows(spec.layout.shards[0])
    with store.lock_work(work):
        store.prepare_work(work, spec)
        for shard in spec.layout.shards:
            here = rows._replace(block=rows.block + shard.first_block)
            store.write_shard(work, spec, shard, here)
        store.publish(work, spec, out, provenance={})
    return store.open_store(out)


def plan_epochs(opened: store.ActivationStore, epochs: int = EPOCHS) -> store.StreamPlan:
    return store.plan_stream(
        opened,
        hook=HOOK,
        batch_size=BATCH,
        epochs=epochs,
        seed=0,
        window=None,
        exclude_positions=(0,),
    )


def write_raw(folder: Path, opened: store.ActivationStore) -> None:
    with (folder / "acts.f16").open("wb") as acts, (folder / "grads.f16").open("wb") as grads:
        for batch in store.stream_batches(opened, plan_epochs(opened, 1)):
            acts.write(batch.acts.half().numpy().data)
            grads.write(batch.grads.half().numpy().data)


def read_raw(
    folder: Path, *, n_threads: int, into_buffer: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    torch.set_num_threads(n_threads)
    maps = [
        np.memmap(folder / name, np.float16, mode="c").reshape(-1, D_MODEL)
        for name in ("acts.f16", "grads.f16")
    ]
    buffers = [np.empty((PIECE_ROWS, D_MODEL), np.float16) for _ in maps]
    for first in list(range(0, len(maps[0]), PIECE_ROWS)) * EPOCHS:
        pieces = [mapped[first : first + PIECE_ROWS] for mapped in maps]
        if into_buffer:
            for buffer, piece in zip(buffers, pieces, strict=True):
                np.copyto(buffer[: len(piece)], piece)
            pieces = [buffer[: len(pieces[0])] for buffer in buffers]
        acts, grads = map(torch.from_numpy, pieces)
        for start in range(0, len(acts), BATCH):
            here = slice(start, start + BATCH)
            yield acts[here].float(), grads[here].float()


def measure_rows_per_s(batches: Iterator[tuple]) -> float:
    started = time.perf_counter()
    n_rows = sum(len(batch[0]) for batch in batches)
    return n_rows / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--formats", nargs="+", default=["float16", "bfloat16", "float32", "int8"])
    parser.add_argument("--compressions", nargs="+", default=["none"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, default=N_SHARDS)
    arguments = parser.parse_args()
    n_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        folder = Path(scratch)
        stores = {
            (numbers, compression): write_store(
                folder / f"{numbers}-{compression}",
                make_spec(numbers, compression, arguments.shards),
            )
            for numbers, compression in itertools.product(arguments.formats, arguments.compressions)
        }
        write_raw(folder, next(iter(stores.values())))
        readers: dict[tuple[str, str], Callable[[], Iterator[tuple]]] = {
            RAW: lambda: read_raw(folder, n_threads=n_threads, into_buffer=True),
            ("raw float16, one thread", ""): lambda: read_raw(
                folder, n_threads=1, into_buffer=True
            ),
            ("raw float16, from the map", ""): lambda: read_raw(
                folder, n_threads=1, into_buffer=False
            ),
        }
        for key, opened in stores.items():
            readers[key] = lambda opened=opened: store.stream_batches(opened, plan_epochs(opened))
        rates: dict[tuple[str, str], list[float]] = {key: [] for key in readers}
        for repeat in range(arguments.repeats + 1):
            for key, read in readers.items():
                rate = measure_rows_per_s(read())
                if repeat:  # the first warms the page cache
                    rates[key].append(rate)
        report(stores, {key: statistics.median(found) for key, found in rates.items()})


def report(
    stores: dict[tuple[str, str], store.ActivationStore], rates: dict[tuple[str, str], float]
) -> None:
    raw = rates[RAW]
    first = next(iter(stores.values()))
    plan = plan_epochs(first)
    found = store.find_mixedness(first, plan)
    print(f"{first.n_rows} rows, {len(first.shards)} shards, slices of {plan.slice_rows}, {found}")
    print(f"at most {store.stream_memory_bytes(first, plan) / 2**20:.0f} MiB held")
    print("| format | compression | disk bytes/row | rows/s | of raw |\n|---|---|---|---|---|")
    for (numbers, compression), rate in rates.items():
        n_bytes = 4.0 * D_MODEL
        if opened := stores.get((numbers, compression)):
            files = (file for shard in opened.manifest.shards for file in shard.files.values())
            n_bytes = sum(file.bytes for file in files) / opened.n_rows
        print(f"| {numbers} | {compression} | {n_bytes:.0f} | {rate:,.0f} | {rate / raw:.2f} |")
    key = next(iter(stores))
    line = {
        "name": f"stream acts + grads, {' '.join(key)}",
        "value": rates[key],
        "unit": "rows/s",
        "against": raw,
        "ratio": rates[key] / raw,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
