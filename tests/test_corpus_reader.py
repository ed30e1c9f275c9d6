"""Opening and reading a corpus: any range of blocks exactly, or an error."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import open_corpus
from pipeline.errors import CorpusError
from tests.corpora import shrink_groups, some_texts, write, write_jsonl

PART = "train/part-00000.parquet"


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "text.jsonl", some_texts())


@pytest.fixture
def small_groups(monkeypatch):
    shrink_groups(monkeypatch)


@pytest.mark.usefixtures("small_groups")
def test_any_range_of_blocks_can_be_read(tmp_path, source):
    corpus = write(source, tmp_path / "out", packing="per_document")
    parts = corpus.manifest.splits["train"].parts
    assert [part.blocks for part in parts] == [12, 12, 2]
    whole = corpus.read_blocks("train", 0, 26)
    for first in range(27):
        for n in range(27 - first):
            blocks = corpus.read_blocks("train", first, n)
            np.testing.assert_array_equal(blocks.tokens, whole.tokens[first : first + n])
            np.testing.assert_array_equal(blocks.lengths, whole.lengths[first : first + n])
    for first, n in ((26, 1), (0, 27), (-1, 2), (3, -1)):
        with pytest.raises(CorpusError, match="expected blocks below 26"):
            corpus.read_blocks("train", first, n)


@pytest.mark.usefixtures("small_groups")
def test_only_the_row_groups_of_the_blocks_are_read(tmp_path, source, monkeypatch):
    corpus = write(source, tmp_path / "out")
    read, groups = pq.ParquetFile.read_row_groups, []

    def watched(file, row_groups, **options):
        groups.extend(row_groups)
        return read(file, row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", watched)
    corpus.read_blocks("train", 12 + 5, 4)  # of the second part, the second and third group
    assert groups == [1, 2]


def test_the_parquet_columns_are_plain(tmp_path, source):
    """Anyone can read it without this package."""
    corpus = write(source, tmp_path / "out")
    table = pq.read_table(tmp_path / "out/train")
    assert table.schema.field("tokens").type.list_size == 17
    assert table.schema.field("tokens").type.value_type == pa.int32()
    assert table.schema.field("length").type == pa.int32()
    assert len(table) == corpus.n_blocks("train")


def drop(name):
    return lambda out: (out / name).unlink()


def change(name, edit):
    def harm(out):
        path = out / name
        path.write_bytes(edit(path.read_bytes()))

    return harm


def edit_manifest(**changes):
    def edit(content):
        return json.dumps(json.loads(content) | changes).encode()

    return change("manifest.json", edit)


DAMAGE = {
    "no manifest": (drop("manifest.json"), "expected manifest.json, got none"),
    "no part": (drop(PART), "a part that the manifest lists, got no file"),
    "cut part": (change(PART, lambda b: b[:-1]), r"expected \d+ bytes, got \d+"),
    "flipped bit": (change(PART, lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]), "got another"),
    "swapped": (lambda out: (out / PART).write_bytes((out / f"held_out/{PART[6:]}").read_bytes()),
                r"expected \d+ bytes|got another"),
    "cut manifest": (change("manifest.json", lambda b: b[:99]), "manifest, got the whole"),
    "no JSON": (change("manifest.json", lambda _: b"\xff"), "manifest, got the whole"),
    "unknown field": (edit_manifest(extra=1), "got extra: Extra inputs are not permitted"),
    "other version": (edit_manifest(format_version=2), "version 1 manifest, got format_version"),
    "wrong type": (edit_manifest(context_length="16"), "got context_length: Input should be"),
    "another's settings": (edit_manifest(context_length=8), "hash of the manifest's own identity"),
    "no split": (edit_manifest(splits={}), "splits: expected train, held_out"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_corpus_is_not_opened(tmp_path, source, name):
    harm, message = DAMAGE[name]
    out = tmp_path / "out"
    write(source, out)
    assert open_corpus(out).n_blocks("train")
    harm(out)
    with pytest.raises(CorpusError, match=rf"out.*{message}.*`pipeline corpus"):
        open_corpus(out)


def test_parts_stay_inside_the_folder(tmp_path, source):
    write(source, tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    path.write_text(path.read_text().replace(PART, "../part-00000.parquet"))
    with pytest.raises(CorpusError, match=r"parts.0.file: String should match"):
        open_corpus(tmp_path / "out")


def test_any_bit_flipped_after_opening_gives_the_exact_blocks_or_an_error(tmp_path, source):
    """Compression alone notices few of these; the checksum of each page notices all."""
    corpus = write(source, tmp_path / "out")
    whole = corpus.read_blocks("train", 0, corpus.n_blocks("train"))
    path = tmp_path / "out" / PART
    content = path.read_bytes()
    n_refused = 0
    for i in range(4, len(content) - 8 - int.from_bytes(content[-8:-4], "little")):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            blocks = corpus.read_blocks("train", 0, len(whole.lengths))
        except CorpusError:
            n_refused += 1
        else:
            np.testing.assert_array_equal(blocks.tokens, whole.tokens)
            np.testing.assert_array_equal(blocks.lengths, whole.lengths)
    assert n_refused > 200
