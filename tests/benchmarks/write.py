"""The whole durable path of a shard against `cat`, in one run: `python -m tests.benchmarks.write`.

One shard 768 wide, float16 acts and grads, 81,920 rows: 256 MB of files. `write_shard` checks,
encodes, permutes, checksums, hashes, writes, syncs and commits it; the baseline is `cat` of the
same files into one and `sync` of that, on the same file system (`--folder`). Both take turns;
medians of 5 (`--repeats`). Prints where the time goes and one JSON line last.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import crc32c
import torch

import store
from store.disk import write_durably
from store.numbers import RowNames, check_numbers, encode_numbers
from store.shardfile import encode_shard
from tests.wide_store import make_wide_spec

HOOK = "blocks.7.hook_resid_post"
N_BLOCKS, CONTEXT, D_MODEL = 320, 256, 768
N_ROWS = N_BLOCKS * CONTEXT

T = TypeVar("T")


def make_rows() -> store.ShardRows:
    """Activations with a few wide channels, gradients a millionth of that with exact zeros."""
    generator = torch.Generator().manual_seed(0)
    width = torch.ones(D_MODEL).index_fill_(0, torch.tensor([138, 378, 447]), 100.0)
    acts = torch.randn(N_ROWS, D_MODEL, generator=generator) * width
    grads = torch.randn(N_ROWS, D_MODEL, generator=generator) * 1e-3
    grads[CONTEXT - 1 :: CONTEXT] = 0
    rows = torch.arange(N_ROWS)
    return store.ShardRows(
        acts={HOOK: acts},
        grads={HOOK: grads},
        tokens=torch.randint(0, 50257, (N_ROWS,), generator=generator).int(),
        loss=torch.rand(N_ROWS, generator=generator),
        block=rows.div(CONTEXT, rounding_mode="floor").int(),
        position=rows.remainder(CONTEXT).int(),
    )


def clock(call: Callable[[], object]) -> float:
    os.sync()  # nobody pays for what another left
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def write(work: Path, spec: store.StoreSpec, rows: store.ShardRows) -> float:
    """Seconds in write_shard, in a new work folder."""
    shutil.rmtree(work, ignore_errors=True)
    with store.lock_work(work):
        store.prepare_work(work, spec)
        return clock(lambda: store.write_shard(work, spec, spec.layout.shards[0], rows))


def list_shard_files(work: Path) -> list[Path]:
    return sorted(file for file in work.rglob("*") if file.is_file() and "c" in file.parts)


def cat(files: list[Path], out: Path) -> float:
    out.unlink(missing_ok=True)
    command = 'out=$1; shift; cat "$@" > "$out" && sync "$out"'
    call = ["sh", "-c", command, "sh", str(out), *map(str, files)]
    return clock(lambda: subprocess.run(call, check=True))


def split(spec: store.StoreSpec, rows: store.ShardRows, folder: Path) -> dict[str, float]:
    """Seconds of each step for acts and grads, one after the other; some are part of others."""
    order = store.permute_rows(spec.seed, 0, N_ROWS)
    seconds: dict[str, float] = {}

    def step(name: str, call: Callable[..., T], *arguments: Any) -> T:
        started = time.perf_counter()
        result = call(*arguments)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        return result

    for kind, values in (("acts", rows.acts[HOOK]), ("grads", rows.grads[HOOK])):
        array = spec.arrays()[f"{HOOK}/{kind}"]
        names = RowNames(0, array.path, rows.block, rows.position)
        stored, _ = step(
            "check_numbers: range, encode, statistics", check_numbers, values, array.numbers, names
        )
        step("  encode alone", encode_numbers, values, array.numbers)
        permuted = step("permute", stored.take, order).numbers
        encoded = step(
            "encode_shard: chunks, crc32c, compression",
            encode_shard,
            permuted,
            spec.shard_format(array),
        )
        step("  crc32c alone", crc32c.crc32c, permuted)
        content = b"".join(encoded.pieces)
        os.sync()
        step(
            "write_durably: write, sha256, fsync, rename",
            lambda e=encoded, k=kind: write_durably(folder / k, e.pieces, scratch=folder / "tmp"),
        )
        step("  sha256 alone", lambda c=content: hashlib.sha256(c).digest())
        os.sync()
        with (folder / "plain").open("wb") as file:
            step("  write alone", file.write, content)
            step("  fsync alone", os.fsync, file.fileno())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    arguments = parser.parse_args()
    spec, rows = (
        make_wide_spec(
            1, N_BLOCKS, context=CONTEXT, d_model=D_MODEL, numbers=arguments.dtype, hook=HOOK
        ),
        make_rows(),
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        write(folder / "work", spec, rows)
        files = list_shard_files(folder / "work")
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        ours, plain = [], []
        for _ in range(arguments.repeats):
            ours.append(write(folder / "work", spec, rows))
            plain.append(cat(list_shard_files(folder / "work"), folder / "cat"))
        steps = [split(spec, rows, folder) for _ in range(arguments.repeats)]
    rate = megabytes / statistics.median(ours)
    baseline = megabytes / statistics.median(plain)
    print(f"write_shard {rate:.0f} MB/s, cat and sync {baseline:.0f} MB/s, of {megabytes:.0f} MB")
    for name in steps[0]:
        print(f"{statistics.median(of[name] for of in steps) * 1e3:8.0f} ms  {name}")
    line = {
        "name": f"durable write of a {arguments.dtype} shard",
        "value": round(rate),
        "unit": "MB/s",
        "against": "cat of the same files into one, and sync",
        "ratio": round(rate / baseline, 3),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
