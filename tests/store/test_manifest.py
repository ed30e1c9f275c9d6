"""Fingerprints, differences, and what a manifest may not claim."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import ManifestError, StoreNotFound
from store.files import LocalFiles
from store.identity import diff_identities, fingerprint_of
from store.manifest import (
    StoreSpec,
    _checksum,
    build_manifest,
    encode_manifest,
    locate_scales,
    locate_shard,
)
from store.reader import read_manifest
from tests.store.small_store import HOOK, PADDED, make_spec, write_store

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children),
    max_leaves=8,
)
IDENTITY = st.dictionaries(st.text(), JSON, max_size=4)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return Path(write_store(tmp_path_factory.mktemp("pristine") / "out", make_spec()).where)


@pytest.fixture
def written(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "out")


def edit(path, change):
    """Change manifest.json as a careful forger would, with a new checksum."""
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    content["checksum"] = _checksum(content)
    file.write_text(json.dumps(content))


@settings(deadline=None)
@given(IDENTITY, IDENTITY)
def test_fingerprints_differ_exactly_where_identities_do(left, right):
    lines = diff_identities(left, right)
    assert (fingerprint_of(left) == fingerprint_of(right)) == (not lines)
    assert not diff_identities(left, json.loads(json.dumps(left)))


def test_fingerprint_is_fixed():
    # sha256 of {"a":[1,2.5],"b":"\u00e9"}, so that other programs can compute it.
    identity = {"b": "é", "a": [1, 2.5]}
    assert fingerprint_of(identity) == (
        "60d4fe7d84d09285a774fa6c850ed0e739e0153890529471751ae4df4e1df886"
    )


def test_difference_names_every_field():
    lines = diff_identities(
        {"model": {"weights": "a", "name": "x"}, "seed": 1, "old": 0},
        {"model": {"weights": "b", "name": "x"}, "seed": 1, "new": [2]},
    )
    assert lines == [
        "model.weights: expected 'a', got 'b'",
        "new: expected nothing, got [2]",
        "old: expected 0, got nothing",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"hooks": ()},
        {"hooks": (HOOK, HOOK)},
        {"hooks": ("a/b",)},
        {"hooks": ("..",)},
        {"hooks": ("tokens",)},  # a root array's name
        {"acts_dtype": "int32"},
        {"grads_dtype": "fp15"},
        {"d_model": 0},
        {"context_length": 5},  # not the layout's
        {"seed": 4},  # not the identity's
        {"identity": {"format_version": 1}},
        {"compression": "gzip"},
        {"identity": {"compression": "zstd"}},
    ],
)
def test_spec_refuses_contradictions(change):
    spec = make_spec()
    fields = {name: getattr(spec, name) for name in StoreSpec.__dataclass_fields__}
    with pytest.raises(ValueError, match=r"expected|layout"):
        StoreSpec(**(fields | change))


def test_manifest_round_trip(written):
    manifest = read_manifest(LocalFiles(written))
    assert manifest.spec == make_spec()
    assert build_manifest(manifest.spec, manifest.shards) == manifest
    assert encode_manifest(manifest) == (written / "manifest.json").read_bytes()


def test_no_store(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path, tmp_path / "file"):
        with pytest.raises(StoreNotFound, match=f"{path}.*pipeline cache"):
            read_manifest(LocalFiles(path))


@pytest.mark.parametrize("size", [0, 1, 100, -3])
def test_cut_manifest(written, size):
    file = written / "manifest.json"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(LocalFiles(written))


def test_edit_without_new_checksum(written):
    file = written / "manifest.json"
    file.write_text(file.read_text().replace('"underflowed": 0', '"underflowed": 1', 1))
    with pytest.raises(ManifestError, match="checksum"):
        read_manifest(LocalFiles(written))


def set_field(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        assert keys[-1] in content
        content[keys[-1]] = value

    return change


FILE = ("shards", 1, "files", "tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("format", value="zip"), "format in .* expected activation-store, got zip"),
        (set_field("format_version", value=1), "format_version in .* expected 2, got 1"),
        (set_field("compression", value="gzip"), "compression"),
        (set_field("compression", value="zstd"), "bytes, chunks, lengths"),
        (set_field("fingerprint", value="0" * 64), "fingerprint in"),
        (set_field("identity", "weights", value="w1"), "fingerprint in"),
        (set_field("seed", value=4), "seed"),
        (set_field("d_model", value=6), "bytes, chunks"),
        (set_field("d_model", value="5"), "at d_model"),  # no silent conversions
        (set_field("d_model", value=5.0), "at d_model"),
        (set_field("n_slots", value=10**15), "n_slots"),
        (set_field("hooks", value=["../../etc"]), "hook"),
        (set_field("acts_dtype", value="float32"), "bytes, chunks"),
        (set_field("shards", 0, "n_rows", value=31), "n_rows"),
        (set_field("shards", 0, "files", value={}), "expected files"),
        (set_field(*FILE, "bytes", value=10**15), "bytes, chunks"),
        (set_field(*FILE, "bytes", value=-1), "at shards.1.files.tokens.bytes"),
        # The cache names files by it.
        (set_field(*FILE, "sha256", value="/etc/passwd"), "tokens.sha256"),
        (set_field(*FILE, "sha256", value="../" * 20 + "0000"), "tokens.sha256"),
        (set_field(*FILE, "sha256", value="0" * 63), "tokens.sha256"),
        (set_field(*FILE, "sha256", value="0" * 65), "tokens.sha256"),
        (set_field(*FILE, "sha256", value="0" * 64 + "\n"), "tokens.sha256"),
        (set_field(*FILE, "sha256", value="A" * 64), "tokens.sha256"),
        (set_field(*FILE, "crc32c", value=[-1, 0]), "tokens.crc32c.0"),
        (set_field(*FILE, "crc32c", value=[0, 2**32]), "tokens.crc32c.1"),
        (set_field(*FILE, "crc32c", value=[1]), "bytes, chunks"),
        (set_field(*FILE, "chunk_bytes", value=[64, 64]), "bytes, chunks"),
        (lambda content: content["shards"][1]["files"]["tokens"].pop("chunk_bytes"), "chunk_bytes"),
        (set_field("shards", value=[]), "layout"),
        (lambda content: content.update(extra=1), "at extra"),
        (lambda content: content.pop("n_rows"), "at n_rows"),
        (lambda content: content["shards"].reverse(), "layout"),
    ],
)
def test_forged_manifest(written, change, message):
    edit(written, change)
    with pytest.raises(ManifestError, match=message):
        read_manifest(LocalFiles(written))


@pytest.mark.parametrize("content", ["[]", "null", '{"format": 1}', "NaN", "\xff"])
def test_other_files_in_its_place(written, content):
    (written / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(LocalFiles(written))


CHANNELS = ("shards", 1, "files", f"{HOOK}/acts_channel_scale")
SPELLED = make_spec(acts_dtype="int8", compression="zstd")


def change_lengths(change):
    """Of the compressed chunks, with the file's size to match."""

    def edit_file(content):
        file = content["shards"][1]["files"]["tokens"]
        file["chunk_bytes"] = change(file["chunk_bytes"])
        file["bytes"] = sum(file["chunk_bytes"]) + 2 * 16 + 3 * 4

    return edit_file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_lengths(lambda lengths: [*lengths, 1]), "bytes, chunks, lengths"),
        (change_lengths(lambda lengths: lengths[:1]), "bytes, chunks, lengths"),
        (change_lengths(lambda _: []), "bytes, chunks, lengths"),
        (change_lengths(lambda lengths: [lengths[0], -1]), "one byte or more"),
        (change_lengths(lambda lengths: [0, sum(lengths)]), "one byte or more"),
        (set_field(*FILE, "bytes", value=10**15), "bytes, chunks, lengths"),
        (set_field("compression", value="none"), "bytes, chunks, lengths"),
        (set_field("acts_dtype", value="float16"), "expected files"),
        (
            set_field("shards", 1, "files", f"{HOOK}/acts_channel_scale", "crc32c", value=[1, 2]),
            "2",
        ),
    ],
)
def test_forged_manifest_of_compressed_int8(tmp_path, change, message):
    path = Path(write_store(tmp_path / "out", SPELLED).where)
    assert read_manifest(LocalFiles(path)).spec == SPELLED
    edit(path, change)
    with pytest.raises(ManifestError, match=message):
        read_manifest(LocalFiles(path))


@pytest.mark.parametrize("n_hooks", [1, 2])
def test_arrays_of_int8_have_scales(n_hooks):
    spec = make_spec(PADDED, hooks=("a", "b")[:n_hooks], acts_dtype="float16", grads_dtype="int8")
    arrays = spec.arrays()
    assert [path for path in arrays if path.startswith("a/")] == [
        "a/acts", "a/grads", "a/grads_row_scale", "a/grads_channel_scale",
    ]  # fmt: skip
    assert spec.columns().items() < arrays.items()
    last = spec.layout.shards[-1]
    sizes = {"a/grads_row_scale": (168, last.n_rows), "a/grads_channel_scale": (6, 1)}
    for path, (n_slots, n_rows) in sizes.items():
        assert (spec.count_slots(arrays[path]), arrays[path].count_rows(last)) == (n_slots, n_rows)


def test_chunk_keys():
    assert locate_shard("tokens", 3) == "tokens/c/3"
    assert locate_shard(f"{HOOK}/acts", 3) == f"{HOOK}/acts/c/3/0"
    rows, channels = locate_scales(f"{HOOK}/acts")
    assert locate_shard(rows, 3) == f"{HOOK}/acts_row_scale/c/3"
    assert locate_shard(channels, 3) == f"{HOOK}/acts_channel_scale/c/3/0"
