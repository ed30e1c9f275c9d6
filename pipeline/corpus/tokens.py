"""Documents → token ids, in batches that the fast tokenizer spreads over the cores."""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from pipeline.corpus.text import Document
from pipeline.errors import CorpusError

BATCH_BYTES = 4 * 2**20  # of text; its tokenization takes some 30 times as much memory
BATCH_DOCUMENTS = 1024


class TokenDocument(NamedTuple):
    """One tokenised document."""

    id: str  # the document's
    ids: Int32[np.ndarray, " n_tokens"]
    is_text: bool  # False where the source gave token ids; nothing is inserted between those


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the tokenizer's canonical JSON, less padding and truncation, which calls switch."""
    state = json.loads(_backend(tokenizer).to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(
        json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def find_separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id before every packed document: end of text, or beginning where there is no end."""
    for separator in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(separator, int):
            return separator
    raise CorpusError(
        f"tokenizer {tokenizer.name_or_path}: expected an EOS or BOS token to separate documents,"
        " got neither. Choose another model with `--model NAME`."
    )


def find_bos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every block under `prepend_bos`."""
    if isinstance(tokenizer.bos_token_id, int):
        return tokenizer.bos_token_id
    raise CorpusError(
        f"tokenizer {tokenizer.name_or_path}: expected a BOS token for corpus.prepend_bos, got"
        " none. Run again with `--set corpus.prepend_bos=false`."
    )


def tokenize_documents(
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    wanted: Callable[[str], bool],
) -> Iterator[TokenDocument]:
    """Tokenise the documents whose id is `wanted`, in order.

    No special tokens are added, nothing is cut, and the name of a special token inside a text is
    ordinary text: no document can forge the separator. Raises CorpusError for token ids outside the
    tokenizer's vocabulary.
    """
    for batch in _draw_batches(documents, wanted):
        texts = [document.content for document in batch if isinstance(document.content, str)]
        encoded = iter(_tokenize(texts, tokenizer) if texts else [])
        for document in batch:
            if isinstance(document.content, str):
                yield TokenDocument(
                    document.id, np.asarray(next(encoded), dtype=np.int32), is_text=True
                )
            else:
                yield TokenDocument(
                    document.id, _check_range(document, len(tokenizer)), is_text=False
                )


def _draw_batches(
    documents: Iterator[Document], wanted: Callable[[str], bool]
) -> Iterator[list[Document]]:
    """Group documents by bytes and count; unwanted ones count, so that none is read far ahead."""
    batch, n_bytes = [], 0
    for n_seen, document in enumerate(documents, start=1):
        if wanted(document.id):
            batch.append(document)
            n_bytes += len(document.content)
        if n_bytes >= BATCH_BYTES or n_seen % BATCH_DOCUMENTS == 0:
            yield batch
            batch, n_bytes = [], 0
    yield batch


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def _check_range(document: Document, vocab_size: int) -> Int32[np.ndarray, " n_tokens"]:
    ids = np.asarray(document.content)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise CorpusError(
            f"token id at {document.where}: expected 0 to {vocab_size - 1}, the tokenizer's"
            f" vocabulary, got {bad}. Choose the model whose tokenizer wrote the corpus with"
            " `--model NAME`."
        )
    return ids.astype(np.int32)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CorpusError(
            f"tokenizer {tokenizer.name_or_path}: expected a fast tokenizer (tokenizer.json), got"
            f" {type(tokenizer).__name__}. Choose another model with `--model NAME`."
        )
    return backend
