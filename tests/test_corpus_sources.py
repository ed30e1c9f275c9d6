"""Sources and the text policy: what is read, and what is an error that says where."""

import itertools
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.sources import find_source, open_documents
from pipeline.demo.library import is_unseen, list_library
from pipeline.errors import CorpusError
from tests.corpora import corpus_config, write_jsonl


def read_all(source, **changes):
    return {d.id: d.content for d in open_documents(corpus_config(source, **changes))}


def test_a_folder_is_read_by_sorted_relative_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/2.txt", "b/10.txt", "a.TXT", "c.txt", ".git/x.txt", ".y.txt", "readme.md"):
        (tmp_path / name).write_text(name)
    assert list(read_all(tmp_path)) == ["a.TXT", "b/10.txt", "b/2.txt", "c.txt"]
    assert read_all(tmp_path / "b/2.txt") == {"2.txt": "b/2.txt"}


def test_jsonl_rows_are_numbered_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "tw\\u00f6", "x": 1}\n{"text": ""}'
    )
    assert read_all(path) == {"a.jsonl:0": "one", "a.jsonl:2": "twö", "a.jsonl:3": ""}


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_parquet_text(tmp_path, kind):
    texts = ["one", "twö", "", "one"]
    table = pa.table({"n": [1, 2, 3, 4], "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert list(read_all(tmp_path).values()) == texts
    assert list(read_all(tmp_path)) == [f"a.parquet:{i}" for i in range(4)]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int64()), pa.large_list(pa.uint16()), pa.list_(pa.int32(), 2)],
    ids=str,
)
def test_parquet_token_ids(tmp_path, kind):
    pq.write_table(pa.table({"ids": pa.array([[1, 2], [3, 4]], kind)}), tmp_path / "a.parquet")
    rows = read_all(tmp_path, column="ids")
    assert [ids.tolist() for ids in rows.values()] == [[1, 2], [3, 4]]


def test_jsonl_token_ids(tmp_path):
    rows = read_all(write_jsonl(tmp_path / "a.jsonl", [[1, 2], []]))
    assert [ids.tolist() for ids in rows.values()] == [[1, 2], []]


def test_the_demo_is_what_the_embedded_model_did_not_see():
    documents = read_all("demo")
    assert set(documents) <= {name for name in list_library() if is_unseen(name)}
    assert len(documents) > 50
    assert documents["_py_abc.py"] == Path(os.__file__).with_name("_py_abc.py").read_text()


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("demo", "demo"),
        ("gpt2", "hub"),
        ("allenai/c4", "hub"),
        ("here/too", "files"),  # a path that exists wins over the hub's name
    ],
)
def test_what_a_name_means(tmp_path, monkeypatch, source, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/too").mkdir(parents=True)
    assert find_source(source) == kind


@pytest.mark.parametrize(
    "source",
    ["./allenai/c4", "/no/such", "~/no/such", "~no_such_user/x", "text.JSONL", "a/b/c", "x y", ""],
)
def test_a_missing_path_is_no_hub_request(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=r"no such path.*--set\s+corpus.source"):
        open_documents(corpus_config(source))


MEGABYTE = 10**6

# What the file holds, and what the message must name: the file, the byte, the reason.
FAULTS = {
    "latin1.txt": (b"caf\xe9", "byte 3: expected UTF-8, got 0xe9"),
    "cut.txt": ("ö".encode()[:1], "byte 0: expected UTF-8, got 0xc3"),
    "surrogate.txt": (b"a\xed\xa0\x80", "byte 1: expected UTF-8, got 0xed"),
    "utf16.txt": ("ab".encode("utf-16"), "byte 3: expected UTF-8 text, got a NUL byte"),
    "nul.txt": (b"a\0b", "byte 1: expected UTF-8 text, got a NUL byte"),
    "bom.txt": (b"\xef\xbb\xbfab\xff", "byte 5: expected UTF-8, got 0xff"),
    "long.txt": (b"a" * (MEGABYTE + 1), "byte 0: expected at most corpus.max_document_mb = 1 MB"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', "byte 24: expected UTF-8, got 0xe9"),
    "wide.jsonl": (
        b'\xef\xbb\xbf{"text": "\xc3\xb6"}\n{"text": "\xe9"}',  # bytes count, not characters
        "byte 28: expected UTF-8, got 0xe9",
    ),
    "nul.jsonl": (b'{"text": "a"}\n{"text": "\0"}', "byte 24: expected UTF-8 text, got a NUL"),
    "escape.jsonl": (b'\n{"text": "a\\u0000"}', "line 2 (byte 1), byte 1: expected UTF-8 text"),
    "half.jsonl": (b'\n{"text": "a\\ud800"}', "line 2 (byte 1), character 1: expected Unicode"),
    "long.jsonl": (
        b'{"text": "a"}\n{"text": "' + b"a" * MEGABYTE + b'"}\n',
        "byte 14: expected at most corpus.max_document_mb = 1 MB",
    ),
    "json.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 (byte 14): expected one object"),
    "deep.jsonl": (b"[" * 100_000, "line 1 (byte 0): expected one object"),
    "list.jsonl": (b'["a"]', "line 1 (byte 0): expected an object, got list"),
    "key.jsonl": (b'{"body": "a", "n": 1}', "'text' at"),
    "null.jsonl": (b'{"text": null}', "expected text or a list of integers, got null"),
    "number.jsonl": (b'{"text": 3}', "expected text or a list of integers, got int"),
    "floats.jsonl": (b'{"text": [1.5]}', "got a list of something else"),
    "words.jsonl": (b'{"text": ["a"]}', "got a list of something else"),
    "ragged.jsonl": (b'{"text": [[1], [1, 2]]}', "got a list of something else"),
    "ids.jsonl": (b'{"text": [' + b"1," * 260_000 + b"1]}", "expected at most corpus.max_docu"),
    "cut.parquet": (b"PAR1 and no more", "expected a readable file"),
    "empty.parquet": (b"", "expected a readable file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_text_is_an_error_that_says_where(tmp_path, name):
    content, message = FAULTS[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        read_all(path)
    assert f"{path}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def invalid_utf8(values):
    """A string column of any bytes, which Arrow itself does not check."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (invalid_utf8([b"fine", b"caf\xe9"]), "a.parquet row 1, byte 3: expected UTF-8, got 0xe9"),
        (pa.array(["fine", "a\0"]), "a.parquet row 1, byte 1: expected UTF-8 text, got a NUL"),
        (pa.array(["fine", None]), "a.parquet row 1: expected text or a list of integers, got nul"),
        (pa.array(["fine", "a" * (MEGABYTE + 1)]), "a.parquet row 1, byte 0: expected at most"),
        (pa.array([[1], [None]]), "a.parquet row 1: expected text or a list of integers"),
        (pa.array([1.0]), "a.parquet: expected text or lists of integers, got double"),
        (pa.array([b"a"]), "a.parquet: expected text or lists of integers, got binary"),
        (pa.array([["a"]]), "a.parquet: expected text or lists of integers, got list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faulty_parquet_says_which_row(tmp_path, column, message):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=re.escape(message)):
        read_all(tmp_path)


def test_a_missing_column_lists_those_there_are(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"'text' at .*: expected one of 'a', 'b'\. .*--set corp"):
        read_all(tmp_path)


def test_what_is_kept_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n \xef\xbb\xbf")
    assert read_all(tmp_path) == {"a.txt": "one\r\ntwo\rthree\n \ufeff"}


def test_documents_as_long_as_the_limit_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * MEGABYTE)
    assert len(read_all(tmp_path)["a.txt"]) == MEGABYTE


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_long_line_is_refused_before_it_is_read(tmp_path, name):
    """The file is sparse, and far larger than memory if it were read."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(CorpusError, match="max_document_mb"):
        read_all(tmp_path)


def test_documents_come_before_the_source_has_been_read_whole(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", None])
    first = itertools.islice(open_documents(corpus_config(tmp_path)), 2)
    assert [document.content for document in first] == ["one", "two"]
