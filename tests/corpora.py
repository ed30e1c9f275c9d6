"""What the tests of the corpus share: settings, a tokenizer of one token per byte, documents."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import pipeline.corpus.build
import pipeline.corpus.writer
from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus, write_corpus
from tests.checkpoints import save_tokenizer

VOCAB = 257  # every byte, and <|endoftext|> as 0

_SETTINGS = {
    "subset": None,
    "split": "train",
    "column": "text",
    "context_length": 16,
    "packing": "packed",
    "prepend_bos": False,
    "train_tokens": None,
    "held_out_tokens": None,
    "held_out_fraction": 0.3,
    "max_document_mb": 1,
}


def corpus_config(source: str | Path, **changes: Any) -> CorpusConfig:
    return CorpusConfig(source=str(source), **(_SETTINGS | changes))


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), vocab=VOCAB, context=16)
        return AutoTokenizer.from_pretrained(folder)


def write_jsonl(path: Path, values: list[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return path


def some_texts(n: int = 40) -> list[str]:
    """Texts of 1 to 97 characters, every one different."""
    return [(f"text {i} " * 14)[: 1 + (i * 37) % 97] for i in range(n)]


def write(source: str | Path, out: Path, **changes: Any) -> Corpus:
    return write_corpus(corpus_config(source, **changes), byte_tokenizer(), out)


def shrink_groups(patch: pytest.MonkeyPatch) -> None:
    """Row groups of 4 blocks and parts of 3 groups, so that a small corpus has many."""
    for module in (pipeline.corpus.build, pipeline.corpus.writer):
        patch.setattr(module, "GROUP_BLOCKS", 4)
    patch.setattr(pipeline.corpus.writer, "PART_BYTES", 3 * 4 * 4 * 17)
