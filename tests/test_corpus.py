"""Whole corpora: what is written is what the source says."""

import math
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.corpus.tokens
from pipeline.corpus import draw_split, hash_tokenizer, write_corpus
from pipeline.errors import CorpusError
from tests.corpora import (
    VOCAB,
    byte_tokenizer,
    corpus_config,
    shrink_groups,
    some_texts,
    write,
    write_jsonl,
)
from tests.tiny import read_tree

SPLITS = ("train", "held_out")


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "text.jsonl", some_texts())


@pytest.fixture
def small_groups(monkeypatch):
    shrink_groups(monkeypatch)


def stream_of(texts, split, name="text.jsonl"):
    """The joined tokens of one split, straight from the tokenizer."""
    chosen = [
        text for i, text in enumerate(texts) if draw_split(f"{name}:{i}", 0.3) == split and text
    ]
    return [t for text in chosen for t in [0, *byte_tokenizer()(text)["input_ids"]]]


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("split", SPLITS)
def test_a_packed_corpus_is_the_joined_text(tmp_path, source, split):
    corpus = write(source, tmp_path / "out")
    stream = stream_of(some_texts(), split)
    record = corpus.manifest.splits[split]
    n_blocks = (len(stream) - 1) // 16
    assert (corpus.n_blocks(split), record.tokens) == (n_blocks, n_blocks * 16)
    assert record.dropped_tokens == len(stream) - n_blocks * 16 - 1
    blocks = corpus.read_blocks(split, 0, n_blocks)
    assert blocks.tokens.tolist() == [stream[i * 16 : i * 16 + 17] for i in range(n_blocks)]
    assert blocks.lengths.tolist() == corpus.lengths(split).tolist() == [16] * n_blocks


def test_both_splits_share_no_document_and_lose_none(tmp_path, source):
    records = write(source, tmp_path / "out").manifest.splits
    assert records["train"].documents + records["held_out"].documents == 40
    assert records["held_out"].documents == sum(
        draw_split(f"text.jsonl:{i}", 0.3) == "held_out" for i in range(40)
    )


@pytest.mark.usefixtures("small_groups")
def test_per_document_blocks_have_the_documents_lengths(tmp_path, source):
    corpus = write(source, tmp_path / "out", packing="per_document")
    chosen = [
        text
        for i, text in enumerate(some_texts())
        if draw_split(f"text.jsonl:{i}", 0.3) == "train" and len(text) > 1
    ]
    lengths = [min(len(text) - 1, 16) for text in chosen]
    assert corpus.lengths("train").tolist() == lengths
    assert corpus.manifest.splits["train"].tokens == sum(lengths)
    blocks = corpus.read_blocks("train", 0, len(lengths))
    for text, tokens, length in zip(chosen, blocks.tokens, lengths, strict=True):
        assert byte_tokenizer().decode(tokens[: length + 1]) == text[:17]
        assert (tokens[length + 1 :] == 0).all()


def test_prepended_bos(tmp_path, source):
    corpus = write(source, tmp_path / "out", prepend_bos=True)
    tokens = corpus.read_blocks("train", 0, corpus.n_blocks("train")).tokens
    stream = stream_of(some_texts(), "train")
    assert (tokens[:, 0] == 0).all()
    assert tokens[:, 1:].flatten().tolist() == stream[: len(stream) // 16 * 16]


@pytest.mark.parametrize("packing", ["packed", "per_document"])
@pytest.mark.parametrize("asked", [1, 16, 17, 100, 160])
def test_as_many_tokens_as_asked_for(tmp_path, source, asked, packing):
    whole = write(source, tmp_path / "whole", packing=packing)
    lengths = whole.lengths("train")
    expected = int(np.searchsorted(np.cumsum(lengths), asked)) + 1
    changes = {"train_tokens": asked, "held_out_tokens": 20, "packing": packing}
    corpus = write(source, tmp_path / "out", **changes)
    assert corpus.n_blocks("train") == expected
    assert lengths[: expected - 1].sum() < asked <= corpus.manifest.splits["train"].tokens
    np.testing.assert_array_equal(
        corpus.read_blocks("train", 0, expected).tokens,
        whole.read_blocks("train", 0, expected).tokens,
    )


def test_enough_is_enough(tmp_path):
    """What comes after the last document that is needed is not read."""
    source = write_jsonl(tmp_path / "text.jsonl", [*some_texts(2000), None])
    write(source, tmp_path / "out", train_tokens=100, held_out_tokens=100)
    with pytest.raises(CorpusError, match="line 2001"):
        write(source, tmp_path / "out2")


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("packing", ["packed", "per_document"])
def test_the_same_bytes_however_batched(tmp_path, source, monkeypatch, packing):
    changes = {"packing": packing, "train_tokens": 200}
    write(source, tmp_path / "a", **changes)
    for name, value in (("BATCH_DOCUMENTS", 3), ("BATCH_BYTES", 50)):
        monkeypatch.setattr(pipeline.corpus.tokens, name, value)
        write(source, tmp_path / name, **changes)
        assert read_tree(tmp_path / name) == read_tree(tmp_path / "a")


def test_a_moved_source_is_the_same_corpus(tmp_path, source):
    before = write(source, tmp_path / "a")
    (tmp_path / "moved").mkdir()
    after = write(source.rename(tmp_path / "moved/text.jsonl"), tmp_path / "b")
    assert before.manifest.source != after.manifest.source
    assert before.manifest.fingerprint == after.manifest.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"context_length": 8},
        {"packing": "per_document"},
        {"prepend_bos": True},
        {"held_out_fraction": 0.5},
        {"train_tokens": 100},
    ],
    ids=str,
)
def test_what_decides_the_tokens_decides_the_fingerprint(tmp_path, source, changes):
    before = write(source, tmp_path / "a").manifest
    assert write(source, tmp_path / "b", **changes).manifest.fingerprint != before.fingerprint


def test_the_tokenizers_hash_is_its_own_not_its_uses(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = type(byte_tokenizer()).from_pretrained(tmp_path)
    before = hash_tokenizer(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=2)
    assert hash_tokenizer(tokenizer) == before == hash_tokenizer(byte_tokenizer())
    tokenizer.add_tokens(["new"])
    assert hash_tokenizer(tokenizer) != before


def test_a_text_cannot_forge_the_separator(tmp_path):
    texts = ["one<|endoftext|>two " * 3] * 20
    corpus = write(write_jsonl(tmp_path / "text.jsonl", texts), tmp_path / "out")
    tokens = corpus.read_blocks("train", 0, corpus.n_blocks("train")).tokens
    assert byte_tokenizer().decode(tokens[0]) == "<|endoftext|>one<|endoftext|>"
    assert (tokens[0] == 0).tolist() == [True] + [False] * 16


def test_token_ids_are_taken_as_they_are(tmp_path):
    ids = np.random.default_rng(0).integers(0, VOCAB, (60, 10))
    table = pa.table({"ids": pa.array(ids.tolist(), pa.list_(pa.int64()))})
    pq.write_table(table, tmp_path / "ids.parquet")
    corpus = write(tmp_path / "ids.parquet", tmp_path / "out", column="ids")
    train = [i for i in range(60) if draw_split(f"ids.parquet:{i}", 0.3) == "train"]
    tokens = corpus.read_blocks("train", 0, corpus.n_blocks("train")).tokens
    expected = ids[train].flatten()[: tokens.shape[0] * 16]
    np.testing.assert_array_equal(tokens[:, :-1].flatten(), expected)


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40])
def test_token_ids_beyond_the_vocabulary(tmp_path, bad):
    source = write_jsonl(tmp_path / "ids.jsonl", [[1, 2], [3, bad]])
    with pytest.raises(CorpusError, match=rf"ids.jsonl line 2.*expected 0 to 256.*got {bad}"):
        write(source, tmp_path / "out")


def test_progress_adds_up(tmp_path, source):
    done = []
    corpus = write_corpus(
        corpus_config(source), byte_tokenizer(), tmp_path / "out", on_progress=done.append
    )
    assert sum(done) == sum(corpus.manifest.splits[split].tokens for split in SPLITS)


def test_the_demo_records_its_python(tmp_path):
    changes = {"train_tokens": 1000, "held_out_tokens": 1000}
    manifest = write("demo", tmp_path / "out", **changes).manifest
    assert manifest.versions["python"] == sys.version.split()[0]
    assert (manifest.source, manifest.column) == ("demo", None)
    assert [manifest.splits[split].blocks for split in SPLITS] == [math.ceil(1000 / 16)] * 2
