"""Plain zarr-python, TensorStore and xarray read a published store as docs/format.md says."""

import contextlib
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr
from zarr.errors import ZarrUserWarning

import store
from store.compression import COMPRESSIONS
from store.manifest import locate_scales
from store.numbers import FORMATS, VALUE_FORMATS
from tests.store.small_store import HOOK, PADDED, all_rows, make_spec, write_store

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
CASES = [(dtype, compression) for dtype in VALUE_FORMATS for compression in COMPRESSIONS]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def opened(request, tmp_path_factory):
    dtype, compression = request.param
    spec = make_spec(PADDED, acts_dtype=dtype, grads_dtype=dtype, compression=compression)
    return write_store(tmp_path_factory.mktemp("store") / "out", spec)


# Each returns an array of a store by its path.


def open_with_zarr(path, array):
    return np.asarray(zarr.open_group(path, mode="r")[array])


def open_with_tensorstore(path, array):
    kvstore = {"driver": "file", "path": f"{path}/{array}/"}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    return np.asarray(opened.read().result())


def open_with_xarray(path, array):
    group, _, name = array.rpartition("/")
    with allow_foreign_files(group):
        dataset = xarray.open_zarr(path, group=group or None, consolidated=False)
    return dataset[name].to_numpy()


def open_with_xarray_and_no_dask(path, array):
    group, _, name = array.rpartition("/")
    with allow_foreign_files(group):
        dataset = xarray.open_dataset(path, engine="zarr", group=group, consolidated=False)
    return dataset[name].to_numpy()


def allow_foreign_files(group):
    """zarr-python warns of manifest.json when it lists the root group, and of nothing else."""
    message = r"Object at (manifest|provenance)\.json is not recognized as a component of a Zarr"
    if group:
        return contextlib.nullcontext()
    return pytest.warns(ZarrUserWarning, match=message)


OPENERS = [
    open_with_zarr,
    open_with_tensorstore,
    open_with_xarray,
    open_with_xarray_and_no_dask,
]


def decode(numbers, name, scales):
    """By the rules of the format page, without this package."""
    if name == "bfloat16":
        return (numbers.astype("<u4") << 16).view("<f4")
    if name == "int8":
        rows, channels = scales
        return numbers.astype("<f4") * rows[:, None] * channels
    return numbers.astype("<f4" if numbers.dtype.kind == "f" else numbers.dtype)


def read_values(opened, read, path):
    """Every row of a column in block-major order."""
    spec, column = opened.spec, opened.spec.columns()[path]
    numbers = read(opened.where, path)
    scales = []
    if column.numbers.name == "int8":
        scales = [read(opened.where, array) for array in locate_scales(path)]
    parts = []
    for shard in opened.shards:
        first = shard.first_block * spec.context_length
        slots = slice(first, first + shard.n_rows)
        here = [scales[0][slots], scales[1][shard.index]] if scales else []
        order = np.argsort(store.permute_rows(spec.seed, shard.index, shard.n_rows))
        parts.append(decode(numbers[slots], column.numbers.name, here)[order])
    return torch.from_numpy(np.concatenate(parts))


@pytest.mark.parametrize("read", OPENERS)
def test_every_engine_reads_every_format(opened, read):
    names = {"acts": f"{HOOK}/acts", "grads": f"{HOOK}/grads"}
    for field, expected in all_rows(opened.spec)._asdict().items():
        assert torch.equal(read_values(opened, read, names.get(field, field)), expected), field


def test_xarray_sees_names(opened):
    with warnings.catch_warnings():  # the hook's group has no foreign files
        warnings.simplefilter("error")
        hook = xarray.open_zarr(opened.where, group=HOOK, consolidated=False)
    assert hook.sizes["slot"] == opened.manifest.n_slots
    assert hook.sizes["channel"] == opened.d_model
    assert hook.acts.dims == hook.grads.dims == ("slot", "channel")
    assert hook.acts.attrs["number_format"] == opened.manifest.acts_dtype
    with allow_foreign_files(""):
        root = xarray.open_zarr(opened.where, consolidated=False)
    assert sorted(map(str, root.data_vars)) == ["block", "loss", "position", "tokens"]
    assert root.attrs["fingerprint"] == opened.manifest.fingerprint
    scales = {array.dims for name, array in hook.items() if "scale" in str(name)}
    wanted = {("slot",), ("shard", "channel")}
    assert scales == (wanted if FORMATS[opened.manifest.acts_dtype].scaled else set())


def test_xarray_sees_the_whole_tree(tmp_path):
    opened = write_store(tmp_path / "out", make_spec(hooks=("a.x", "b.y")))
    with allow_foreign_files(""):
        tree = xarray.open_datatree(opened.where, engine="zarr", consolidated=False)
    assert sorted(tree.children) == ["a.x", "b.y"]


def test_the_page_example_of_xarray_runs(tmp_path, monkeypatch):
    write_store(tmp_path / "stores/demo", make_spec())
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(import xarray\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 1
    names: dict = {}
    with allow_foreign_files(""):
        exec(examples[0], names)
    assert names["rows"].tokens.shape == (168,)
    assert names["hook"].acts.shape == (168, 5)
