"""zarr.json: what zarr-python writes is what we expect, and nothing else is accepted."""

import json

import pytest

from store.compression import COMPRESSIONS
from store.errors import ManifestError
from store.files import LocalFiles
from store.metadata import check_metadata, create_metadata, list_metadata
from store.numbers import VALUE_FORMATS
from tests.store.small_store import HOOK, PADDED, list_files, make_spec


@pytest.fixture
def folder(tmp_path):
    create_metadata(tmp_path / "store", make_spec())
    return tmp_path / "store"


@pytest.mark.parametrize("acts_dtype", VALUE_FORMATS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("hooks", [(HOOK,), ("a.b", "c")])
def test_zarr_writes_what_is_expected(tmp_path, acts_dtype, compression, hooks):
    spec = make_spec(PADDED, hooks=hooks, acts_dtype=acts_dtype, compression=compression)
    create_metadata(tmp_path / "one", spec)
    create_metadata(tmp_path / "two", spec)
    assert list_files(tmp_path / "one") == list_files(tmp_path / "two")
    assert list_files(tmp_path / "one").keys() == list_metadata(spec).keys()
    check_metadata(LocalFiles(tmp_path / "one"), spec)


@pytest.mark.parametrize("path", sorted(list_metadata(make_spec())))
@pytest.mark.parametrize("size", [0, 20, -1, None])
def test_cut_or_missing(folder, path, size):
    file = folder / path
    content = file.read_bytes()[:-1]  # up to the closing brace
    file.unlink()
    if size is not None:
        file.write_bytes(content[:size])
    with pytest.raises(ManifestError, match="Zarr metadata at"):
        check_metadata(LocalFiles(folder), make_spec())


CODECS = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("shape",), [10**15, 5]),
        (("data_type",), "float32"),
        (("chunk_grid", "configuration", "chunk_shape"), [8, 5]),
        (("chunk_grid", "name"), "rectilinear"),
        (("chunk_key_encoding", "configuration", "separator"), "."),
        (("fill_value",), 0.0),
        ((*CODECS, "chunk_shape"), [8, 5]),
        ((*CODECS, "codecs"), [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ((*CODECS, "index_location"), "start"),
        (("dimension_names",), None),
        (("attributes", "number_format"), "bfloat16"),
        (("storage_transformers",), [{"name": "other"}]),
        (("node_type",), "group"),
        (("zarr_format",), 2),
        (("must_understand_me",), True),
    ],
)
def test_other_values(folder, keys, value):
    file = folder / HOOK / "acts/zarr.json"
    content = json.loads(file.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=rf"{keys[0]} in .*acts/zarr\.json: expected"):
        check_metadata(LocalFiles(folder), make_spec())


def test_metadata_of_another_compression(folder):
    with pytest.raises(ManifestError, match=r'codecs in .*expected .*"zstd".*as in the manifest'):
        check_metadata(LocalFiles(folder), make_spec(compression="zstd"))


def test_metadata_of_another_store(folder):
    with pytest.raises(ManifestError, match=r"attributes in .*fingerprint"):
        check_metadata(LocalFiles(folder), make_spec(weights="w1"))
