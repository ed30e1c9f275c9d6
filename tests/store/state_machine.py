"""A store that is written, killed, damaged, repaired, pulled and read, in any order.

There is no model of what happened: a store's bytes are a function of its spec, so whatever stands
on disk is compared with what an undisturbed run writes.
"""

import contextlib
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import store
from store.download import Retry
from store.errors import ManifestError, ShardCorrupt, StoreError, StoreMismatch, StoreNotFound
from store.files import LocalFiles
from store.manifest import MANIFEST_NAME
from store.pull import plan_pull, pull_store
from store.remote import RemoteFiles
from store.repair import RepairReport, repair
from store.shard_cache import ShardCache
from store.verify import verify_full, verify_quick
from store.work import Commit, commit_path, read_commits, write_commit
from tests.remotes import local_remote
from tests.store.damage import DAMAGES, swap
from tests.store.small_store import make_rows, work_of
from tests.store.test_crash import MENDING, PULLING, WRITING, die_at, fill
from tests.store.world import SPECS, make_world, pick_folder

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
        self.world.compare_trees(self.out)
        self.world.read_all(store.open_store(self.out))

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
            self.world.compare_trees(self.pulled)

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
        different = self.world.list_different(path)
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
                getattr(self.world, f"read_{how}")(opened, place)
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
                    getattr(self.world, f"read_{how}")(opened, place)
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


def array_of(file: Path) -> str:
    return str(file).rpartition("/c/")[0]
