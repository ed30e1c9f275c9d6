"""Zarr engines on this task, in one run: `python -m tests.benchmarks.engines`.

One shard of float16 [163840, 768] (252 MB) in chunks of 640 rows (983 KB) with crc32c. Every engine
writes the same rows, durably, and reads the same file of a published store from a warm page cache:
whole, chunk by chunk in order (as training does), and 64 random rows. The engines take turns;
medians of 3 (`--repeats`). Prints a table and one JSON line last.

Only TensorStore and our writer sync the file they write; for the others the benchmark does. Ours
also takes the sha256 of what it writes, and checks every chunk that it reads against the manifest.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr

import store
from store.disk import fsync_folder, write_durably
from store.manifest import locate_shard
from store.metadata import create_metadata
from store.shardfile import encode_shard
from tests.wide_store import make_wide_spec

HOOK, ARRAY = "h", "h/acts"
N_BLOCKS, CONTEXT, D_MODEL = 256, 640, 768
N_ROWS = N_BLOCKS * CONTEXT
SPEC = make_wide_spec(1, N_BLOCKS, context=CONTEXT, d_model=D_MODEL)
ROWS_PER_CHUNK = SPEC.layout.rows_per_chunk
SHARD_FILE = locate_shard(ARRAY, 0)

Write = Callable[[Path, np.ndarray], object]  # into a folder with the arrays' metadata
Read = Callable[[Any], np.ndarray]  # rows of the array, by a slice or sorted indices


class Engine(NamedTuple):
    write: Write
    open: Callable[[Path], Read]


def write_ours(folder: Path, rows: np.ndarray) -> None:
    encoded = encode_shard(rows, SPEC.shard_format(SPEC.arrays()[ARRAY]))
    write_durably(folder / SHARD_FILE, encoded.pieces, scratch=folder / "scratch")


def open_ours(folder: Path) -> Read:
    opened = store.open_store(folder)

    def read(rows: slice | np.ndarray) -> np.ndarray:
        slots = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return opened.read_stored(0, ARRAY, slots).numbers

    return read


@contextmanager
def zarrs_pipeline() -> Iterator[None]:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield


def write_zarr_python(folder: Path, rows: np.ndarray) -> None:
    array = zarr.open_array(folder / ARRAY, mode="r+", config={"write_empty_chunks": True})
    array[:] = rows
    sync(folder / SHARD_FILE)


def write_zarrs(folder: Path, rows: np.ndarray) -> None:
    with zarrs_pipeline():
        write_zarr_python(folder, rows)


def sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    fsync_folder(file.parent)


def open_zarr_python(folder: Path) -> Read:
    array = zarr.open_array(folder / ARRAY, mode="r")
    return lambda rows: np.asarray(array[rows] if isinstance(rows, slice) else array.oindex[rows])


def open_zarrs(folder: Path) -> Read:
    with zarrs_pipeline():
        return open_zarr_python(folder)


def open_tensorstore(folder: Path, **options: object) -> Any:
    import tensorstore

    kvstore = {"driver": "file", "path": f"{folder / ARRAY}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore} | options).result()


def write_tensorstore(folder: Path, rows: np.ndarray) -> None:
    open_tensorstore(folder, store_data_equal_to_fill_value=True).write(rows).result()


def read_tensorstore(folder: Path) -> Read:
    array = open_tensorstore(folder, fill_missing_data_reads=False)
    return lambda rows: np.asarray(array[rows].read().result())


ENGINES = {
    "ours": Engine(write_ours, open_ours),
    "zarr-python": Engine(write_zarr_python, open_zarr_python),
    "zarrs": Engine(write_zarrs, open_zarrs),
    "TensorStore": Engine(write_tensorstore, read_tensorstore),
}


def make_store(folder: Path, rows: np.ndarray) -> None:
    """A published store of one shard whose acts are the rows, in stored order."""
    order = torch.from_numpy(np.argsort(store.permute_rows(SPEC.seed, 0, N_ROWS)))
    acts = torch.from_numpy(rows)[order].float()
    whole = store.ShardRows(
        acts={HOOK: acts},
        grads={HOOK: torch.ones_like(acts)},
        tokens=torch.zeros(N_ROWS, dtype=torch.int32),
        loss=torch.ones(N_ROWS),
        block=torch.arange(N_ROWS).div(CONTEXT, rounding_mode="floor").int(),
        position=torch.arange(N_ROWS).remainder(CONTEXT).int(),
    )
    work = folder.parent / "work"
    with store.lock_work(work):
        store.prepare_work(work, SPEC)
        store.write_shard(work, SPEC, SPEC.layout.shards[0], whole)
        store.publish(work, SPEC, folder, provenance={})


class Seconds(NamedTuple):
    wall: float
    cpu: float


def clock(call: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def clock_write(write: Write, folder: Path, rows: np.ndarray) -> Seconds:
    create_metadata(folder, SPEC)
    os.sync()  # nobody pays for what another left
    return clock(lambda: write(folder, rows))


def list_reads(read: Read, random_rows: np.ndarray) -> dict[str, Callable[[], object]]:
    def in_order() -> None:
        for first in range(0, N_ROWS, ROWS_PER_CHUNK):
            read(slice(first, first + ROWS_PER_CHUNK))

    return {
        "whole": lambda: read(slice(0, N_ROWS)),
        "in order": in_order,
        "random": lambda: read(random_rows),
    }


def measure(folder: Path, repeats: int) -> tuple[dict[str, dict[str, list[Seconds]]], set[str]]:
    """Times by engine and task, and the engines whose files are the bytes that ours are."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((N_ROWS, D_MODEL), np.float32).astype(np.float16)
    random_rows = np.sort(generator.choice(N_ROWS, 64, replace=False))
    make_store(folder / "store", rows)
    wanted = (folder / "store" / SHARD_FILE).read_bytes()
    times: dict[str, dict[str, list[Seconds]]] = {name: {} for name in ENGINES}
    same = set()
    for repeat in range(repeats + 1):  # the first warms up
        for name, engine in ENGINES.items():
            out = folder / "written"
            found = {"write": clock_write(engine.write, out, rows)}
            if (out / SHARD_FILE).read_bytes() == wanted:
                same.add(name)
            read = engine.open(out if name != "ours" else folder / "store")
            assert np.array_equal(read(slice(0, N_ROWS)), rows), name
            shutil.rmtree(out)
            read = engine.open(folder / "store")
            found |= {task: clock(call) for task, call in list_reads(read, random_rows).items()}
            for task, seconds in found.items():
                times[name].setdefault(task, []).extend([seconds] * (repeat > 0))
    return times, same


def median(times: Sequence[Seconds]) -> Seconds:
    return Seconds(*(statistics.median(column) for column in zip(*times, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        times, same = measure(Path(folder), arguments.repeats)
    medians = {name: {t: median(all_of) for t, all_of in of.items()} for name, of in times.items()}
    megabytes = N_ROWS * D_MODEL * 2 / 1e6
    print(
        "| engine | write, MB/s | read whole, MB/s | chunks in order, MB/s | CPU s per GB of that "
        "| 64 random rows, ms | file equal to ours |"
    )
    print("|---" * 7 + "|")
    for name, of in medians.items():
        rates = [f"{megabytes / of[task].wall:.0f}" for task in ("write", "whole", "in order")]
        cpu = f"{of['in order'].cpu / megabytes * 1e3:.2f}"
        random = f"{of['random'].wall * 1e3:.1f}"
        cells = [name, *rates, cpu, random, "yes" if name in same else "no"]
        print(f"| {' | '.join(cells)} |")
    rate = {name: megabytes / of["in order"].wall for name, of in medians.items()}
    fastest = max((name for name in rate if name != "ours"), key=lambda name: rate[name])
    line = {
        "name": "reading a float16 shard chunk by chunk in order",
        "value": round(rate["ours"]),
        "unit": "MB/s",
        "against": f"{fastest}, the fastest other engine",
        "ratio": round(rate["ours"] / rate[fastest], 2),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
