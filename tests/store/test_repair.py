"""Damage of every kind is listed, and mended from the work folder, from a copy, or by recomputing
the bad shards alone.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

import store
from store.errors import ManifestError, StoreLocked, StoreMismatch, StoreNotFound
from store.files import LocalFiles
from store.manifest import ShardRecord, build_manifest, encode_manifest, locate_shard
from store.pull import plan_pull, pull_store
from store.repair import RepairedShard, RepairReport, repair
from store.verify import DamagedFile, list_foreign, verify_full, verify_quick
from tests.store.damage import DAMAGES, swap
from tests.store.small_store import HOOK, PADDED, list_files, make_spec, work_of, write_store
from tests.store.test_crash import fill

SPEC = make_spec(PADDED)
ACTS, TOKENS = f"{HOOK}/acts/c/1/0", "tokens/c/1"
NOTHING = RepairReport(False, (), (), ())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return Path(write_store(tmp_path_factory.mktemp("pristine") / "out", SPEC).where).parent


@pytest.fixture
def copy(pristine):
    """Another whole copy of the store."""
    return LocalFiles(pristine / "out")


@pytest.fixture
def out(tmp_path):
    """A store whose files are also the work folder's."""
    return Path(write_store(tmp_path / "stores/out", SPEC).where)


@pytest.fixture
def lone(pristine, tmp_path):
    """The store without its work folder, as pulled from somewhere."""
    return shutil.copytree(pristine / "out", tmp_path / "lone/out")


def content(folder) -> dict[str, bytes]:
    files = list_files(folder)
    files.pop("provenance.json", None)
    return files


def test_a_whole_store(out, copy):
    assert verify_quick(LocalFiles(out)) == verify_full(LocalFiles(out)) == []
    before = list_files(out.parent)
    assert repair(out, source=copy) == NOTHING
    assert list_files(out.parent) == before


def test_a_whole_store_without_a_work_folder_gets_none(lone):
    assert repair(lone) == NOTHING
    assert not (lone.parent / ".work").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_full_verify_lists_it_and_quick_what_sizes_tell(lone, damage):
    DAMAGES[damage](lone / ACTS)
    assert [file.path for file in verify_full(LocalFiles(lone))] == [ACTS]
    quick = [file.path for file in verify_quick(LocalFiles(lone))]
    assert quick == ([ACTS] if damage.startswith(("cut", "longer", "removed", "a folder")) else [])


def test_swapped_shards(out):
    before = content(out)
    swap(out / ACTS, out / f"{HOOK}/acts/c/2/0")
    assert [file.shard for file in verify_full(LocalFiles(out))] == [1, 2]
    assert repair(out).dropped == (1, 2)
    assert fill(out, SPEC) == [1, 2]
    assert content(out) == before


def test_everything_is_listed_and_nothing_stops_at_the_first(lone):
    (lone / ACTS).unlink()
    os.truncate(lone / TOKENS, 7)
    DAMAGES["first bit"](lone / "loss/c/4")
    (lone / "tokens/zarr.json").write_text("{")
    (lone / HOOK / "zarr.json").unlink()
    n_bytes = (Path(lone) / "tokens/c/1").stat().st_size
    assert n_bytes == 7
    seen: list[int] = []
    damage = verify_full(LocalFiles(lone), seen.append)
    assert [(file.shard, file.path) for file in damage] == [
        (None, f"{HOOK}/zarr.json"),
        (None, "tokens/zarr.json"),
        (1, TOKENS),
        (1, ACTS),
        (4, "loss/c/4"),
    ]
    assert damage[2].problem.startswith("7 bytes instead of")
    assert damage[3].problem == "missing"
    assert damage[4].problem == "other content"
    manifest = store.Manifest.model_validate_json((lone / "manifest.json").read_bytes())
    assert sum(seen) == sum(f.bytes for s in manifest.shards for f in s.files.values())
    assert [file.path for file in verify_quick(LocalFiles(lone))] == [
        file.path for file in damage[:4]
    ]


def vouch_for_nan(folder: Path, spec: store.StoreSpec, array: str, shard: int) -> None:
    """Let the first number of a shard of float32 be NaN, and the manifest have its checksums."""
    file = folder / locate_shard(array, shard)
    values = bytearray(file.read_bytes())
    values[:4] = np.float32(np.nan).tobytes()
    chunk_bytes = spec.shard_format(spec.arrays()[array]).chunk_bytes
    checksum = google_crc32c.value(bytes(values[:chunk_bytes]))
    values[chunk_bytes : chunk_bytes + 4] = checksum.to_bytes(4, "little")
    file.write_bytes(values)
    fields = json.loads((folder / "manifest.json").read_text())
    record = fields["shards"][shard]["files"][array]
    record["sha256"] = hashlib.sha256(values).hexdigest()
    record["crc32c"][0] = checksum
    write_manifest(folder, spec, fields)


def write_manifest(folder: Path, spec: store.StoreSpec, fields: dict) -> None:
    shards = [ShardRecord.model_validate_json(json.dumps(shard)) for shard in fields["shards"]]
    (folder / "manifest.json").write_bytes(encode_manifest(build_manifest(spec, shards)))


def test_a_store_that_was_never_right(lone, copy):
    """A manifest that vouches for NaN, or whose checksums contradict its hashes."""
    vouch_for_nan(lone, SPEC, "loss", shard=2)
    fields = json.loads((lone / "manifest.json").read_text())
    fields["shards"][3]["files"]["tokens"]["crc32c"][0] ^= 1
    write_manifest(lone, SPEC, fields)
    damage = verify_full(LocalFiles(lone))
    assert damage == [
        DamagedFile(2, "loss/c/2", "numbers that are not finite", True),
        DamagedFile(3, "tokens/c/3", "other checksums than the manifest's", True),
    ]
    assert verify_quick(LocalFiles(lone)) == []
    # No copy of equal hash can be better, so these are computed again.
    assert repair(lone, source=copy).dropped == (2, 3)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_numbers_of_a_part_are_checked_too(tmp_path, dtype):
    """Of all that is here, though each shard lacks the other hook."""
    hooks = ("blocks.2.hook_resid_post", HOOK)
    spec = make_spec(hooks=hooks, acts_dtype=dtype)
    files = write_store(tmp_path / "out", spec).files
    part = LocalFiles(tmp_path / "part")
    pull_store(files, part.folder, plan_pull(files, hook=HOOK))
    missing = verify_full(part)
    assert {file.problem for file in missing} == {"missing"}
    vouch_for_nan(part.folder, spec, f"{HOOK}/acts" + "_row_scale" * (dtype == "int8"), shard=1)
    found = [file for file in verify_full(part) if file not in missing]
    bad = DamagedFile(1, f"{HOOK}/acts/c/1/0", "numbers that are not finite", True)
    assert found == [bad]


def test_foreign_files_are_listed_and_left(out):
    (out / "notes.txt").write_text("mine")
    (out / "tokens/c/99").write_bytes(b"stray")
    assert list_foreign(LocalFiles(out)) == ["notes.txt", "tokens/c/99"]
    assert verify_full(LocalFiles(out)) == []
    DAMAGES["first bit"](out / ACTS)
    repair(out)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("has_work", [True, False])
def test_recomputing_only_the_bad_shards(out, damage, has_work):
    before = content(out)
    work = work_of(out, SPEC)
    third = out.parent / "third"  # another name of the same bytes, as in DVC's cache
    os.link(out / ACTS, third)
    if not has_work:
        shutil.rmtree(work)
    DAMAGES[damage](out / ACTS)
    damaged = third.read_bytes()
    kept = out / "tokens/c/3"
    inode = kept.stat().st_ino
    if has_work and damage in ("removed", "a folder"):
        report = repair(out)  # the work folder still has the bytes
        assert report.shards == (RepairedShard(1, (ACTS,), "relinked"),)
    else:
        assert repair(out).shards == (RepairedShard(1, (ACTS,), "dropped"),)
        with pytest.raises(store.ShardMissing):  # never mistaken for whole
            store.open_store(out)
        assert fill(out, SPEC) == [1]
    assert third.read_bytes() == damaged
    assert content(out) == before
    assert kept.stat().st_ino == inode
    assert verify_full(LocalFiles(out)) == []
    facts = json.loads((out / "provenance.json").read_text())["shards"]
    assert facts[3]["pid"] == 1  # who computed the others is still known


@pytest.mark.parametrize("damage", DAMAGES)
def test_fetching_from_a_copy(out, copy, damage):
    before = content(out)
    DAMAGES[damage](out / ACTS)
    DAMAGES[damage](out / "loss/c/4")
    report = repair(out, source=copy)
    assert report.dropped == ()
    done = {shard.done for shard in report.shards}
    assert done == ({"relinked"} if damage in ("removed", "a folder") else {"fetched"})
    assert content(out) == before
    assert verify_full(LocalFiles(out)) == []
    same = (out / ACTS).stat().st_ino == (work_of(out, SPEC) / "store" / ACTS).stat().st_ino
    assert same
    assert fill(out, SPEC) == []
    shutil.rmtree(out)
    assert fill(out, SPEC) == []  # the work folder is whole, too
    assert content(out) == before


def test_a_copy_that_is_damaged_in_the_same_place(lone, out):
    """What the copy has is taken, what it has not is computed."""
    for path in (lone / ACTS, out / ACTS, out / "loss/c/4"):
        DAMAGES["last bit"](path)
    report = repair(out, source=LocalFiles(lone))
    assert [(shard.shard, shard.done) for shard in report.shards] == [
        (1, "dropped"),
        (4, "fetched"),
    ]
    assert fill(out, SPEC) == [1]
    assert verify_full(LocalFiles(out)) == []


def test_metadata_is_written_again(out, lone):
    before = content(out)
    for path in (out, lone):
        (path / "tokens/zarr.json").write_text("{")
        (path / HOOK / "acts/zarr.json").unlink()
        report = repair(path)
        assert report == RepairReport(False, ("tokens/zarr.json", f"{HOOK}/acts/zarr.json"), (), ())
        assert content(path) == before
    assert fill(out, SPEC) == []


@pytest.mark.parametrize("damage", ["cut to nothing", "first bit", "removed", "a folder"])
def test_a_broken_manifest_comes_from_a_copy_or_not_at_all(lone, copy, damage):
    DAMAGES[damage](lone / "manifest.json")
    with pytest.raises((ManifestError, StoreNotFound), match=r"store repair .* --from STORE"):
        repair(lone)
    other = make_spec(PADDED, weights="w1")
    stranger = LocalFiles(write_store(lone.parent / "other/out", other).where)
    with pytest.raises(StoreMismatch, match="expected to be a damaged copy"):
        repair(lone, source=stranger)
    DAMAGES["last bit"](lone / ACTS)
    report = repair(lone, source=copy)
    assert report.manifest_restored
    assert report.shards == (RepairedShard(1, (ACTS,), "fetched"),)
    assert content(lone) == content(copy.folder)


@pytest.mark.parametrize("damage", ["first bit", "removed"])
def test_the_work_folder_makes_a_lost_manifest_again(out, damage):
    before = content(out)
    DAMAGES[damage](out / "manifest.json")
    (out / ACTS).unlink()
    report = repair(out)
    assert report.manifest_restored
    assert report.shards == (RepairedShard(1, (ACTS,), "relinked"),)
    assert content(out) == before


def test_a_manifest_is_not_made_of_some_shards(out):
    (out / "manifest.json").unlink()
    (work_of(out, SPEC) / "commits/00001.json").unlink()
    with pytest.raises(StoreNotFound, match="no work folder with every shard"):
        repair(out)


def test_another_store_is_no_source(out, tmp_path):
    other = write_store(tmp_path / "other/out", make_spec(PADDED, weights="w1"))
    DAMAGES["last bit"](out / ACTS)
    with pytest.raises(StoreMismatch, match="weights: expected 'w0', got 'w1'"):
        repair(out, source=LocalFiles(other.where))


def test_a_store_that_is_being_written_is_left_alone(out):
    DAMAGES["last bit"](out / ACTS)
    with store.lock_work(work_of(out, SPEC)), pytest.raises(StoreLocked):
        repair(out)


def test_other_hardware_is_said(out):
    provenance = out / "provenance.json"
    fields = json.loads(provenance.read_text())
    provenance.unlink()
    for shard in fields["shards"]:
        shard |= {"device": "cuda", "threads": 4}
    provenance.write_text(json.dumps({**fields, "versions": {"torch": "2.8"}}))
    DAMAGES["last bit"](out / ACTS)
    machine = {"device": "cpu", "threads": 4, "torch": "2.9"}
    assert repair(out, machine=machine).notes == (
        "shard 1 was computed with device cuda, here cpu; torch 2.8, here 2.9: "
        "its bytes may differ when they are computed again",
    )


def test_the_same_hardware_needs_no_note(lone):
    fields = json.loads((lone / "provenance.json").read_text())
    fields["shards"][1] |= {"threads": 4}
    (lone / "provenance.json").write_text(json.dumps(fields))
    DAMAGES["last bit"](lone / ACTS)
    assert repair(lone, machine={"threads": 4}).notes == ()


def test_unknown_hardware_is_said(lone):
    (lone / "provenance.json").unlink()
    DAMAGES["last bit"](lone / ACTS)
    (note,) = repair(lone, machine={"threads": 4}).notes
    assert "threads not recorded, here 4" in note
