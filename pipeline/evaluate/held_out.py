"""Held-out text, block by block, with all that the language model says about it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.capture import capture
from pipeline.corpus.reader import Corpus
from pipeline.corpus.tokens import find_separator
from pipeline.errors import CorpusError
from pipeline.model import LanguageModel

_BLOCKS_AT_ONCE = 4096  # that are read to find where documents begin


class HeldOut(NamedTuple):
    """One batch of held-out blocks with all that the model says about it."""

    tokens: Int[Tensor, "blocks context_and_one"]  # the last is only a target
    lengths: Int[Tensor, " blocks"]  # real rows of each block
    acts: Float[Tensor, "blocks context d_model"]
    grads: Float[Tensor, "blocks context d_model"]  # of the summed loss
    loss: Float[Tensor, "blocks context"]  # nats
    real: Bool[Tensor, "blocks context"]  # rows that have a target
    patched: Bool[Tensor, "blocks context"]  # real rows whose position training did not leave out


def read_held_out(
    model: LanguageModel,
    corpus: Corpus,
    hook: str,
    *,
    exclude_positions: tuple[int, ...],
    n_tokens: int | None,
    batch_blocks: int,
) -> Iterator[HeldOut]:
    """Held-out blocks in a fixed random order, so that `n_tokens` of them are a sample of all
    documents. Raises CorpusError if fewer are held out.
    """
    order = draw_blocks(corpus, n_tokens)
    for tokens, lengths in read_batches(corpus, order, batch_blocks=batch_blocks):
        yield look_at(
            model,
            tokens.to(model.device),
            lengths.to(model.device),
            hook,
            exclude_positions=exclude_positions,
        )


def read_batches(
    corpus: Corpus, blocks: np.ndarray, *, batch_blocks: int
) -> Iterator[tuple[Int[Tensor, "blocks context_and_one"], Int[Tensor, " blocks"]]]:
    """Tokens and lengths of these held-out blocks, in this order, batch_blocks at a time."""
    for i in range(0, len(blocks), batch_blocks):
        read = [corpus.read_blocks("held_out", int(j), 1) for j in blocks[i : i + batch_blocks]]
        tokens = torch.from_numpy(np.concatenate([b.tokens for b in read])).long()
        yield tokens, torch.from_numpy(np.concatenate([b.lengths for b in read]))


def look_at(
    model: LanguageModel,
    tokens: Int[Tensor, "blocks context_and_one"],
    lengths: Int[Tensor, " blocks"],
    hook: str,
    *,
    exclude_positions: tuple[int, ...],
) -> HeldOut:
    """One forward and backward pass."""
    captured = capture(model, tokens, (hook,), lengths=lengths)
    position = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    real = position < lengths[:, None]
    kept = ~torch.isin(position, torch.tensor(exclude_positions, device=tokens.device))
    return HeldOut(
        tokens,
        lengths,
        captured.acts[hook],
        captured.grads[hook],
        captured.loss,
        real,
        real & kept,
    )


def draw_blocks(corpus: Corpus, n_tokens: int | None) -> np.ndarray:
    """Held-out blocks in a fixed random order: the first with n_tokens real rows, or all of them.

    Any first part of the order is a sample of all documents. Raises CorpusError if fewer rows are
    held out; of the demo's text all are taken then, for how much there is, is this Python's to say.
    """
    lengths = corpus.lengths("held_out")
    available = int(lengths.sum())
    if n_tokens is not None and n_tokens > available and corpus.manifest.source != "demo":
        raise CorpusError(
            f"held-out text at {corpus.folder}: expected at least {n_tokens:,} tokens "
            f"(evaluate.tokens), got {available:,}. Set evaluate.tokens to null, or make a larger "
            "corpus with `pipeline corpus`."
        )
    order = np.random.default_rng(0).permutation(len(lengths))
    if n_tokens is None:
        return order
    return order[: int(np.searchsorted(np.cumsum(lengths[order]), n_tokens)) + 1]


def label_documents(
    model: LanguageModel, corpus: Corpus, blocks: np.ndarray
) -> Int[Tensor, " blocks"]:
    """The document that each of these held-out blocks begins in, numbered as they are in the split.

    Of packed text it is the number of separators up to the block's first token, so that text whose
    source gave token ids without any is one document. Otherwise every block is a document's own.
    """
    manifest = corpus.manifest
    if manifest.packing == "per_document":
        return torch.from_numpy(blocks.astype(np.int64))
    separator, n_blocks = find_separator(model.bridge.tokenizer), corpus.n_blocks("held_out")
    begins, counts = [], []
    for first in range(0, n_blocks, _BLOCKS_AT_ONCE):
        n = min(_BLOCKS_AT_ONCE, n_blocks - first)
        tokens = corpus.read_blocks("held_out", first, n).tokens
        # A block's own tokens of the stream: without bos its last is the next one's first.
        own = (tokens[:, 1:] if manifest.prepend_bos else tokens[:, :-1]) == separator
        begins.append(own[:, 0])
        counts.append(own.sum(1))
    count = np.concatenate(counts)
    documents = np.cumsum(count) - count + np.concatenate(begins)
    return torch.from_numpy(documents[blocks].astype(np.int64))
