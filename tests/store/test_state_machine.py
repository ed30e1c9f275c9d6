"""Write, kill, resume, damage, verify, repair, pull and read in any order: exact bytes or an error.

    python -m tests.store.test_state_machine --steps 10000 --seed 0

There is no model of what happened: a store's bytes are a function of its spec, so whatever stands
on disk is compared with what an undisturbed run writes.
"""

import argparse
import contextlib
import functools
import json
import shutil
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import ClassVar

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

import store
from store.download import Retry
from store.errors import ManifestError, ShardCorrupt, StoreError, StoreMismatch, StoreNotFound
from store.files import LocalFiles
from store.manifest import MANIFEST_NAME, PROVENANCE_NAME
from store.pull import plan_pull, pull_store
from store.remote import RemoteFiles
from store.repair import RepairReport, repair
from store.shard_cache import ShardCache
from store.verify import verify_full, verify_quick
from store.work import Commit, commit_path, read_commits, write_commit
from tests.remotes import local_remote
from tests.store.damage import DAMAGES, swap
from tests.store.small_store import (
    PADDED,
    all_rows,
    assert_rows_equal,
    list_files,
    make_rows,
    make_spec,
    work_of,
    write_store,
)
from tests.store.test_crash import MENDING, PULLING, WRITING, die_at, fill

LENGTHS = PADDED[:8]
SPECS = (
    make_spec(LENGTHS, d_model=3),
    make_spec(LENGTHS, d_model=3, acts_dtype="int8", grads_dtype="float32", compression="zstd"),
)
SHARED_MEMORY = Path("/dev/shm")
PUBLISHING = WRITING[WRITING.index("before-publish") :]
# What is killed, what is lost beforehand so that there is something to do, and where it dies.
KILLS = (
    *(("resume", "all", point) for point in WRITING),
    *(("resume", "file", point) for point in PUBLISHING),
    *(("repair", "file of copy", point) for point in WRITING if "commit" in point),
    *(("repair", "file of copy", point) for point in WRITING if "zarr.json" in point),
    *(("repair", "file of copy", point) for point in MENDING),
    *(("pull", "copy", point) for point in WRITING if point.endswith(":file")),
    *(("pull", "copy", point) for point in PULLING),
)
SOURCES = ("pulled", "good", None)
WAYS = ("slots", "shard", "block", "token", "column", "stream", "blocks")


class World:
    """An undisturbed store of a spec, made once; nobody harms it."""

    def __init__(self, spec: store.StoreSpec) -> None:
        self.spec = spec
        self.folder = tempfile.TemporaryDirectory(dir=pick_folder())
        self.good = Path(write_store(Path(self.folder.name) / "good", spec).where)
        self.files = {k: v for k, v in list_files(self.good).items() if k != PROVENANCE_NAME}
        self.rows = all_rows(spec)
        of_shard = Counter()
        for path, content in self.files.items():
            if "/c/" in path:
                of_shard[path.partition("/c/")[2].split("/")[0]] += len(content)
        self.cache_bytes = 2 * max(of_shard.values())  # a stream's window has to fit
        assert self.cache_bytes < sum(of_shard.values())
        self.n_slots_of = [shard.n_rows for shard in spec.layout.shards]


def pick_folder() -> Path | None:
    """Memory rather than a disk, where that is to be had."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else None


@functools.cache
def make_world(number: int) -> World:
    return World(SPECS[number])


class StoreMachine(RuleBasedStateMachine):
    """A store with its work folder, and a copy of it that is pulled from it or from a good one."""

    counts: ClassVar[Counter[str]] = (
        Counter()
    )  # steps of each rule, and what they met, over all runs

    @initialize(number=st.integers(0, len(SPECS) - 1), finished=st.booleans())
    def start(self, number: int, finished: bool) -> None:
        self.world = make_world(number)
        self.spec = self.world.spec
        self.folder = Path(tempfile.mkdtemp(dir=pick_folder()))
        self.out = self.folder / "stores/out"
        self.pulled = self.folder / "pulled/out"
        self.work = work_of(self.out, self.spec)
        self.held: dict[str, store.ActivationStore] = {}
        self.cache = ShardCache(self.folder / "cache", self.world.cache_bytes)
        self.remotes = {
            name: RemoteFiles(
                local_remote(self.path_of(name)), cache=self.cache, retry=Retry(2, first_s=0.0)
            )
            for name in ("out", "good")
        }
        if finished:
            fill(self.out, self.spec)
            self.pull_from("good")

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def path_of(self, name: str) -> Path:
        return {
            "out": self.out,
            "pulled": self.pulled,
            "good": self.world.good,
            "work": self.work,
            "cache": self.folder / "cache",
        }[name]

    # What changes the disk

    @rule(shard=st.integers(0, 7))
    def write(self, shard: int) -> None:
        self.counts["write"] += 1
        spec, index = self.spec, shard % len(self.spec.layout.shards)
        with store.lock_work(self.work):
            store.prepare_work(self.work, spec)
            shard_spec = spec.layout.shards[index]
            store.write_shard(self.work, spec, shard_spec, make_rows(spec, shard_spec))

    @rule()
    def resume(self) -> None:
        """As `pipeline cache`: whatever happened before, the end is a store that opens."""
        self.counts["resume"] += 1
        self.finish()
        store.open_store(self.out)

    @rule(source=st.sampled_from(SOURCES))
    def mend(self, source: str | None) -> None:
        """Repair and resume: whatever happened before, every byte is there again."""
        self.counts["mend"] += 1
        if self.out.exists():
            try:
                self.repair_from(self.out, source)
            except (ManifestError, StoreNotFound, StoreMismatch):
                shutil.rmtree(self.out)  # as the message says
        self.finish()
        assert verify_full(LocalFiles(self.out)) == []
        self.compare_trees(self.out)
        self.read_all(store.open_store(self.out))

    @rule(which=st.sampled_from(("out", "pulled")), source=st.sampled_from(SOURCES))
    def repair(self, which: str, source: str | None) -> None:
        self.counts["repair"] += 1
        path = self.path_of(which)
        with contextlib.suppress(StoreNotFound, ManifestError, StoreMismatch):
            report = self.repair_from(path, source)
            left = verify_full(LocalFiles(path))
            assert {file.problem for file in left} <= {"missing"}
            assert {file.shard for file in left} == set(report.dropped)
            assert source != "good" or not left

    @rule(source=st.sampled_from(("out", "good")))
    def pull(self, source: str) -> None:
        self.counts["pull"] += 1
        try:
            self.pull_from(source)
        except StoreError:
            self.counts["pull: error"] += 1
        else:
            assert verify_full(LocalFiles(self.pulled)) == []
            self.compare_trees(self.pulled)

    @rule(case=st.sampled_from(KILLS), skip=st.sampled_from((0, 0, 0, 1, 2, 5)))
    def kill(self, case: tuple[str, str, str], skip: int) -> None:
        """In the middle of something; what it leaves is for the other rules to find."""
        self.counts["kill"] += 1
        operation, lost, point = case
        if lost == "all":
            self.remove_folder("out")
            self.remove_folder("work")
        elif lost == "copy":
            self.remove_folder("pulled")
        else:
            path = self.out if lost == "file" else self.pulled
            DAMAGES["removed"](path / "tokens/c/1")

        def run() -> None:
            with contextlib.suppress(StoreError):
                if operation == "resume":
                    self.finish()
                elif operation == "repair":
                    self.repair_from(self.pulled, "good")
                else:
                    self.pull_from("good")

        self.counts["kill: died"] += die_at(point, skip, run) != 0

    @rule(
        which=st.sampled_from(("out", "pulled", "work", "cache")),
        place=st.floats(0, 1, exclude_max=True),
        damage=st.sampled_from(tuple(DAMAGES)),
    )
    def corrupt(self, which: str, place: float, damage: str) -> None:
        """Any file of a store, its manifest and metadata too, of the work folder or the cache."""
        folder = self.path_of(which)
        files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.stat().st_size]
        files = [f for f in files if f.name not in ("lock", "spec.json")]
        if files and not (which == "work" and damage == "a folder"):
            self.counts["corrupt"] += 1
            DAMAGES[damage](files[int(place * len(files))])

    @rule(which=st.sampled_from(("out", "pulled")), place=st.floats(0, 1, exclude_max=True))
    def swap(self, which: str, place: float) -> None:
        """Two shards of one array."""
        folder = self.path_of(which)
        files = [f for f in sorted(folder.rglob("c/**/*")) if f.is_file()]
        if files:
            self.counts["swap"] += 1
            file = files[int(place * len(files))]
            two = [f for f in files if f != file and array_of(f) == array_of(file)]
            if two:
                swap(file, two[0])

    @rule(shard=st.integers(0, 7), other=st.integers(0, 7))
    def stale_commit(self, shard: int, other: int) -> None:
        """A whole record: of another shard, or of the same shard in a run of other bytes."""
        n_shards = len(self.spec.layout.shards)
        commit = read_commits(self.work, self.spec).get(shard % n_shards)
        if commit is None:
            return
        self.counts["stale commit"] += 1
        index = other % n_shards
        if index != commit.record.index:
            content = commit_path(self.work, commit.record.index).read_bytes()
            commit_path(self.work, index).write_bytes(content)
            return
        files = dict(commit.record.files)
        files["loss"] = files["loss"].model_copy(update={"sha256": "0" * 64})
        record = commit.record.model_copy(update={"files": files})
        write_commit(self.work, Commit(record=record, facts={}))

    @rule(which=st.sampled_from(("out", "pulled", "work")))
    def remove(self, which: str) -> None:
        self.counts["remove"] += 1
        self.remove_folder(which)

    # What looks at it

    @rule(which=st.sampled_from(("out", "pulled")))
    def verify(self, which: str) -> None:
        """It lists every file that differs from an undisturbed run's, and no other."""
        self.counts["verify"] += 1
        path = self.path_of(which)
        different = self.list_different(path)
        try:
            full, quick = verify_full(LocalFiles(path)), verify_quick(LocalFiles(path))
        except (StoreNotFound, ManifestError):
            assert MANIFEST_NAME in different
            return
        assert {file.path for file in full} == different
        assert {file.path for file in quick} <= different
        self.counts["verify: damage"] += bool(different)

    @rule(which=st.sampled_from(("out", "pulled")))
    def hold(self, which: str) -> None:
        """Open now, read later: reads must find out by themselves."""
        self.counts["hold"] += 1
        with contextlib.suppress(StoreError):
            self.held[which] = store.open_store(self.path_of(which), allow_partial=True)

    @rule(
        which=st.sampled_from(("out", "pulled")),
        how=st.sampled_from(WAYS),
        held=st.booleans(),
        place=st.floats(0, 1, exclude_max=True),
    )
    def read(self, which: str, how: str, held: bool, place: float) -> None:
        self.counts["read"] += 1
        try:
            if held:
                opened = self.held.get(which)
            else:
                opened = store.open_store(self.path_of(which), allow_partial=True)
            if opened is not None:
                getattr(self, f"read_{how}")(opened, place)
                self.counts["read: exact"] += 1
        except StoreError:
            self.counts["read: error"] += 1

    @rule(
        which=st.sampled_from(("out", "good")),
        how=st.sampled_from(WAYS),
        place=st.floats(0, 1, exclude_max=True),
    )
    def read_remote(self, which: str, how: str, place: float) -> None:
        """Through the cache, whose bad copies are dropped one by one: a good remote is read."""
        self.counts["read remote"] += 1
        files = self.remotes[which]
        allowed = StoreError if which == "out" else ShardCorrupt
        try:
            for _ in range(len(self.world.files)):
                try:
                    opened = store.open_store(files, allow_partial=True)
                    getattr(self, f"read_{how}")(opened, place)
                    self.counts["read remote: exact"] += 1
                    return
                except allowed:
                    self.counts["read remote: error"] += 1
                    if which == "out":
                        return
            raise AssertionError("expected no more bad copies than files")
        finally:
            files.cancel_prefetch()
            while files._running:  # what forks next wants no threads
                time.sleep(0.001)

    # How each way of reading is compared

    def rows_of(self, mask: torch.Tensor) -> store.Rows:
        return store.Rows(*(column[mask] for column in self.world.rows))

    def shard_rows(self, shard: int) -> store.Rows:
        first = sum(self.world.n_slots_of[:shard])
        stop = first + self.world.n_slots_of[shard]
        return store.Rows(*(column[first:stop] for column in self.world.rows))

    def stored_rows(self, shard: int) -> store.Rows:
        order = store.permute_rows(self.spec.seed, shard, self.world.n_slots_of[shard])
        return store.Rows(*(column[order] for column in self.shard_rows(shard)))

    def read_slots(self, opened: store.ActivationStore, place: float) -> None:
        shard = int(place * len(self.world.n_slots_of))
        n_rows = self.world.n_slots_of[shard]
        start, stop = n_rows // 3, n_rows // 3 + max(1, n_rows // 2)
        expected = self.stored_rows(shard)
        found = opened.read_slots(shard, start, stop)
        assert_rows_equal(found, tuple(column[start:stop] for column in expected))

    def read_shard(self, opened: store.ActivationStore, place: float) -> None:
        shard = int(place * len(self.world.n_slots_of))
        assert_rows_equal(opened.read_shard(shard), self.shard_rows(shard))

    def read_block(self, opened: store.ActivationStore, place: float) -> None:
        block = int(place * len(LENGTHS))
        assert_rows_equal(opened.read_block(block), self.rows_of(self.world.rows.block == block))

    def read_token(self, opened: store.ActivationStore, place: float) -> None:
        row = int(place * len(self.world.rows.block))
        block, position = int(self.world.rows.block[row]), int(self.world.rows.position[row])
        found = opened.read_token(block, position)
        for value, column in zip(found, self.world.rows, strict=True):
            assert torch.equal(torch.as_tensor(value, dtype=column.dtype), column[row])

    def read_column(self, opened: store.ActivationStore, place: float) -> None:
        shard = int(place * len(self.world.n_slots_of))
        name = ("tokens", "loss", "block", "position")[int(place * 997) % 4]
        assert torch.equal(opened.read_column(shard, name), getattr(self.stored_rows(shard), name))

    def read_stream(self, opened: store.ActivationStore, place: float) -> None:
        """Every row of an epoch; the last partial batch is not given out."""
        plan = store.plan_stream(
            opened, hook=None, batch_size=5, epochs=1, seed=int(place * 100), window=2
        )
        batches = list(store.stream_batches(opened, plan))
        found = store.Rows(*(torch.cat(column) for column in zip(*batches, strict=True)))
        key = found.block * 1000 + found.position
        assert len(key.unique()) == len(key) == plan.n_batches * 5
        keys = self.world.rows.block * 1000 + self.world.rows.position
        rows = torch.searchsorted(keys, key)  # block-major order is ascending
        assert_rows_equal(found, tuple(column[rows] for column in self.world.rows))

    def read_blocks(self, opened: store.ActivationStore, place: float) -> None:
        """Every block of an epoch, with nothing but zeros after its rows."""
        batches = store.stream_blocks(
            opened, hook=None, batch_blocks=3, epochs=1, seed=int(place * 100)
        )
        seen = []
        for batch in batches:
            for i, (block, length) in enumerate(
                zip(batch.block.tolist(), batch.lengths.tolist(), strict=True)
            ):
                expected = self.rows_of(self.world.rows.block == block)
                assert length == LENGTHS[block]
                for name in ("acts", "grads", "tokens", "loss"):
                    found = getattr(batch, name)[i]
                    assert torch.equal(found[:length], getattr(expected, name))
                    assert not found[length:].any()
                seen.append(block)
        assert len(seen) == len(set(seen)) == sum(opened.shards[i].n_blocks for i in opened.present)

    def read_all(self, opened: store.ActivationStore) -> None:
        for shard in range(len(self.world.n_slots_of)):
            self.read_shard(opened, (shard + 0.5) / len(self.world.n_slots_of))
        for how in ("slots", "block", "token", "stream", "blocks"):
            getattr(self, f"read_{how}")(opened, 0.5)

    # Operations

    def remove_folder(self, which: str) -> None:
        shutil.rmtree(self.path_of(which), ignore_errors=True)

    def finish(self) -> None:
        """Run `fill` as a person would: again where it says so, after moving away what it names."""
        for _ in range(3):
            try:
                fill(self.out, self.spec)
            except store.ShardCorrupt:
                continue
            except StoreMismatch:  # a folder without its manifest is no store
                shutil.rmtree(self.out)
                continue
            return
        raise AssertionError("expected the third run to finish")

    def repair_from(self, path: Path, source: str | None) -> RepairReport:
        return repair(path, source=None if source is None else LocalFiles(self.path_of(source)))

    def pull_from(self, source: str) -> None:
        files = LocalFiles(self.path_of(source))
        pull_store(files, self.pulled, plan_pull(files))

    def list_different(self, path: Path) -> set[str]:
        return {
            name for name, content in self.world.files.items() if not same(path / name, content)
        }

    def compare_trees(self, path: Path) -> None:
        assert self.list_different(path) == set()
        assert list_files(path).keys() - {PROVENANCE_NAME} == self.world.files.keys()


def array_of(file: Path) -> str:
    return str(file).rpartition("/c/")[0]


def same(file: Path, content: bytes) -> bool:
    """Shard files are compared byte by byte, JSON by what it says."""
    try:
        found = file.read_bytes()
        if file.suffix == ".json":
            return json.loads(found) == json.loads(content)
    except (OSError, ValueError):
        return False
    return found == content


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}

TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=12, stateful_step_count=30, derandomize=True, **QUIET
)


def run_extended(n_steps: int, first_seed: int) -> dict:
    """Run machines of up to 50 steps with one seed after another until there are `n_steps`.

    What fails is printed as it is: shrinking it would take more steps than the run.
    """
    StoreMachine.counts.clear()
    started, failures, number = time.monotonic(), 0, first_seed
    while count_steps(StoreMachine.counts) < n_steps:
        options = settings(
            max_examples=100, stateful_step_count=50, phases=[Phase.generate], **QUIET
        )
        try:
            run_state_machine_as_test(
                seed(number)(type("M", (StoreMachine,), {})), settings=options
            )
        except Exception:
            traceback.print_exc()
            failures += 1
        number += 1
    seconds = time.monotonic() - started
    steps = count_steps(StoreMachine.counts)
    return {
        "name": "state machine",
        "steps": steps,
        "seed": first_seed,
        "failures": failures,
        "counts": dict(sorted(StoreMachine.counts.items())),
        "seconds": round(seconds, 1),
        "steps_per_s": round(steps / seconds, 1),
    }


def count_steps(counts: Counter[str]) -> int:
    """Rules that did something; what they met is counted beside them."""
    return sum(count for name, count in counts.items() if ":" not in name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = run_extended(arguments.steps, arguments.seed)
    print(json.dumps(result))  # noqa: T201
    raise SystemExit(1 if result["failures"] else 0)
