"""Commits: what counts as one, what is swept, and that the bytes depend on the inputs alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import store
from store.errors import NumberRangeError, StoreMismatch
from store.manifest import StoreSpec
from store.work import commit_path, store_folder, sweep
from store.writer import prepare_work, required_bytes, write_shard
from tests.store.small_store import (
    HOOK,
    PACKED,
    PADDED,
    as_stored,
    list_files,
    make_rows,
    make_spec,
    write_store,
)


@pytest.fixture
def spec():
    return make_spec(PADDED)


@pytest.fixture
def work(tmp_path, spec):
    prepare_work(tmp_path / "work", spec)
    return tmp_path / "work"


def write(work, spec, index, **facts):
    shard = spec.layout.shards[index]
    return write_shard(work, spec, shard, make_rows(spec, shard), facts=facts)


def test_nothing_is_committed_at_first(tmp_path, work, spec):
    assert store.committed_shards(work, spec) == {}
    assert store.committed_shards(tmp_path / "nowhere", spec) == {}
    assert sweep(tmp_path / "nowhere") == 0


def test_a_commit_is_the_record_of_the_shard(work, spec):
    record = write(work, spec, 2, host="a")
    assert store.committed_shards(work, spec) == {2: record}
    assert record.spec == spec.layout.shards[2]
    assert record.statistics.keys() == {"loss", f"{HOOK}/acts", f"{HOOK}/grads"}
    acts = as_stored(make_rows(spec, record.spec).acts[HOOK], "float16").double()
    assert record.statistics[f"{HOOK}/acts"].rms == pytest.approx(acts.square().mean().sqrt())
    assert json.loads(commit_path(work, 2).read_text())["facts"] == {"host": "a"}


def test_a_committed_shard_is_left_as_it_is(work, spec):
    first = write(work, spec, 1, worker="first")
    before = list_files(work)
    shard = spec.layout.shards[1]
    rows = make_rows(spec, shard)
    other = rows._replace(loss=rows.loss + 1)
    assert write_shard(work, spec, shard, other, facts={"worker": "second"}) == first
    assert list_files(work) == before


@pytest.mark.parametrize(
    "damage", ["missing file", "cut file", "cut record", "no record", "renamed"]
)
def test_what_is_no_commit_is_swept_and_made_again(work, spec, damage):
    write(work, spec, 0)
    kept = list_files(work)
    record = write(work, spec, 1)
    whole = list_files(work)
    file = store_folder(work) / f"{HOOK}/acts/c/1/0"
    if damage == "missing file":
        file.unlink()
    elif damage == "cut file":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "cut record":
        commit_path(work, 1).write_bytes(commit_path(work, 1).read_bytes()[:-5])
    elif damage == "no record":
        commit_path(work, 1).unlink()
    else:
        commit_path(work, 1).rename(commit_path(work, 3))
    assert store.committed_shards(work, spec).keys() == {0}
    (work / "scratch/leftover").write_text("half a shard")
    (work / "scratch/draft").mkdir()
    assert sweep(work) > 0
    assert {k: v for k, v in list_files(work).items() if "locks" not in k} == {
        k: v for k, v in kept.items() if "locks" not in k
    }
    assert list((work / "scratch").iterdir()) == []
    assert sweep(work) == 0
    assert write(work, spec, 1) == record
    assert list_files(work) == whole


def test_bytes_depend_on_the_inputs_alone(tmp_path, spec):
    """Another order, an interruption, other facts: the same store, provenance.json apart."""
    straight = Path(write_store(tmp_path / "a/out", spec).where)
    work, out = tmp_path / "b/work", tmp_path / "b/out"
    prepare_work(work, spec)
    for index in (3, 1, 4):
        write(work, spec, index, worker=index)
    commit_path(work, 1).unlink()  # as if killed just before
    (work / "scratch/half").write_bytes(b"x")
    prepare_work(work, spec)
    sweep(work)
    for index in reversed(range(len(spec.layout.shards))):
        write(work, spec, index, worker="again")
    store.publish(work, spec, out, provenance={"time": "later"})
    first, second = list_files(straight), list_files(out)
    assert first.pop("provenance.json") != second.pop("provenance.json")
    assert first == second


def test_prepare_mends_the_metadata_and_leaves_the_rest(work, spec):
    write(work, spec, 0)
    before = list_files(work)
    (work / "store/zarr.json").write_text("{")
    (work / f"store/{HOOK}/acts/zarr.json").unlink()
    prepare_work(work, spec)
    assert list_files(work) == before


def test_work_folder_of_another_spec(work, spec):
    with pytest.raises(StoreMismatch, match=r"acts_dtype: expected 'float32', got 'float16'"):
        prepare_work(work, replace(spec, acts_dtype="float32"))
    with pytest.raises(StoreMismatch, match=r"identity\.weights: expected 'w1', got 'w0'"):
        prepare_work(work, make_spec(PADDED, weights="w1"))


def test_required_bytes_is_what_a_store_takes(tmp_path):
    spec = make_spec(PACKED, d_model=300)
    path = Path(write_store(tmp_path / "out", spec).where)
    taken = sum(len(content) for content in list_files(path).values())
    assert taken <= required_bytes(spec) < 1.3 * taken


def swap_rows(rows):
    order = torch.arange(len(rows.block)).flip(0)
    return rows._replace(block=rows.block[order], position=rows.position[order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows._replace(acts={}), "columns"),
        (lambda rows: rows._replace(grads={"other": rows.grads[HOOK]}), "columns"),
        (lambda rows: rows._replace(acts={HOOK: rows.acts[HOOK][1:]}), "shape"),
        (lambda rows: rows._replace(acts={HOOK: rows.acts[HOOK][:, 1:]}), "shape"),
        (lambda rows: rows._replace(loss=rows.loss[1:]), "shape"),
        (swap_rows, "position by position"),
        (lambda rows: rows._replace(block=rows.block + 1), "position by position"),
        (lambda rows: rows._replace(block=rows.block - 4), "position by position"),
        (lambda rows: rows._replace(position=rows.position + 1), "position by position"),
    ],
)
def test_rows_that_are_not_the_shards(work, spec, change, message):
    shard = spec.layout.shards[1]
    with pytest.raises(ValueError, match=message):
        write_shard(work, spec, shard, change(make_rows(spec, shard)))
    assert not commit_path(work, 1).exists()


@pytest.mark.parametrize("field", ["acts", "grads", "loss"])
def test_nan_is_refused_with_its_place(work, spec, field):
    shard = spec.layout.shards[1]
    rows = make_rows(spec, shard)
    values = rows.loss if field == "loss" else getattr(rows, field)[HOOK]
    values[9] = torch.nan
    place = f"shard 1, block {rows.block[9]}, position {rows.position[9]}: .*got nan"
    with pytest.raises(NumberRangeError, match=place):
        write_shard(work, spec, shard, rows)
    assert store.committed_shards(work, spec) == {}
    assert not list((work / "store").rglob("c/**/*"))


def test_several_hooks_in_any_order_give_the_same_bytes(tmp_path):
    spec: StoreSpec = make_spec(PACKED, hooks=("b.x", "a.y"))
    written = []
    for order in (("b.x", "a.y"), ("a.y", "b.x")):
        work = tmp_path / order[0]
        prepare_work(work, spec)
        shard = spec.layout.shards[0]
        rows = make_rows(spec, shard)
        rows = rows._replace(acts={h: rows.acts[h] for h in order},
                             grads={h: rows.grads[h] for h in order})  # fmt: skip
        write_shard(work, spec, shard, rows)
        written.append(list_files(work))
    assert written[0] == written[1]
    assert np.array_equal(PACKED, np.array(spec.identity["lengths"]))


@pytest.mark.parametrize("name", ["tokens", "block", "position"])
@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.float(),  # would be truncated
        lambda values: values.long() + 2**32,  # would lose its upper half
        lambda values: -1 - values,  # would look like a slot without a row
    ],
)
def test_integers_that_would_change_are_refused(tmp_path, name, change):
    spec = make_spec()
    shard = spec.layout.shards[1]
    rows = make_rows(spec, shard)
    rows = rows._replace(**{name: change(getattr(rows, name))})
    store.prepare_work(tmp_path, spec)
    with pytest.raises(ValueError, match="of shard 1: expected"):
        store.write_shard(tmp_path, spec, shard, rows)


def test_a_damaged_spec_file_costs_no_shard(tmp_path):
    spec = make_spec()
    store.prepare_work(tmp_path, spec)
    store.write_shard(tmp_path, spec, spec.layout.shards[0], make_rows(spec, spec.layout.shards[0]))
    file = tmp_path / "spec.json"
    whole = file.read_bytes()
    for damaged in (whole.replace(b'"n_rows": 168', b'"n_rows": 169'), whole[:40], b"[]", b""):
        assert damaged != whole
        file.write_bytes(damaged)
        store.prepare_work(tmp_path, spec)
        assert file.read_bytes() == whole
        assert list(store.committed_shards(tmp_path, spec)) == [0]
