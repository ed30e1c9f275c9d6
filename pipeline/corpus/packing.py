"""Token ids → blocks: pure arithmetic on arrays.

A block is context_length rows and one token more, the target of its last row. Its first `length`
rows have a target.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

Ids = Int32[np.ndarray, " n_tokens"]
BlockTokens = Int32[np.ndarray, "n_blocks context_and_one"]


class Packing(NamedTuple):
    """How documents become blocks."""

    kind: Literal["packed", "per_document"]
    context_length: int  # rows per block
    separator: int  # precedes every packed document that was text, and pads per_document blocks
    bos: int | None  # begins every block, where one is to


def cut_stream(stream: Ids, packing: Packing) -> tuple[BlockTokens, Int32[np.ndarray, " n_rest"]]:
    """Cut the joined documents into whole blocks; the rest begins the next stream.

        without bos: block i = stream[i c : i c + c + 1]     (neighbours share a token)
        with bos:    block i = bos, stream[i c : i c + c]    c = context_length

    Either way each token of the stream is a target once (without bos, all but the very first).
    """
    context = packing.context_length
    if packing.bos is None:
        n_blocks = max(0, len(stream) - 1) // context
        blocks = stream[np.arange(n_blocks)[:, None] * context + np.arange(context + 1)]
    else:
        n_blocks = len(stream) // context
        blocks = _prepend(stream[: n_blocks * context].reshape(n_blocks, context), packing.bos)
    return blocks, stream[n_blocks * context :]


def cut_document(ids: Ids, packing: Packing) -> tuple[BlockTokens, int]:
    """One block [1, context_length + 1] of one document, cut or padded on the right; its length.

    A document without a row (fewer than two tokens, counting bos) gives no block and length 0.
    """
    begun = ids if packing.bos is None else _prepend(ids[None], packing.bos)[0]
    begun = begun[: packing.context_length + 1]
    if len(begun) < 2:
        return np.empty((0, packing.context_length + 1), np.int32), 0
    block = np.full((1, packing.context_length + 1), packing.separator, np.int32)
    block[0, : len(begun)] = begun
    return block, len(begun) - 1


def _prepend(
    rows: Int32[np.ndarray, "rows width"], token: int
) -> Int32[np.ndarray, "rows width_and_one"]:
    return np.concatenate([np.full((len(rows), 1), token, np.int32), rows], axis=1)


class SplitPacker:
    """Documents of one split in, blocks out, until there are as many rows as asked (None: never).

    Whether and where it stops depends on the documents alone, not on how they were batched.
    """

    def __init__(self, packing: Packing, asked: int | None):
        self.packing = packing
        self.asked = asked
        self.is_full = False
        self.documents = 0  # that gave tokens
        self.tokens = 0  # rows
        self.blocks = 0
        self.dropped_documents = 0  # empty, or under per_document without a row
        self._cut_tokens = 0
        self._rest = np.empty(0, np.int32)  # of the joined documents, not yet a whole block

    @property
    def dropped_tokens(self) -> int:
        """Tokens of the documents taken so far, separators included, that are in no block."""
        is_shared = self.packing.bos is None and self.blocks > 0 and len(self._rest) > 0
        return self._cut_tokens + len(self._rest) - is_shared

    def add(
        self, ids: Ids, *, is_text: bool = True
    ) -> tuple[BlockTokens, Int32[np.ndarray, " n_blocks"]]:
        """Take a document; returns the blocks it completed and their lengths."""
        assert not self.is_full
        blocks, lengths = (
            self._join(ids, is_text) if self.packing.kind == "packed" else self._keep(ids)
        )
        if self.asked is not None and self.tokens + lengths.sum() >= self.asked:
            n_kept = int(np.searchsorted(self.tokens + np.cumsum(lengths), self.asked)) + 1
            self._cut_tokens += int(lengths[n_kept:].sum())
            blocks, lengths, self.is_full = blocks[:n_kept], lengths[:n_kept], True
        self.tokens += int(lengths.sum())
        self.blocks += len(blocks)
        return blocks, lengths

    def _join(self, ids: Ids, is_text: bool) -> tuple[BlockTokens, Int32[np.ndarray, " n_blocks"]]:
        if len(ids):
            self.documents += 1
            separator = np.full(int(is_text), self.packing.separator, np.int32)
            blocks, self._rest = cut_stream(
                np.concatenate([self._rest, separator, ids]), self.packing
            )
        else:
            self.dropped_documents += 1
            blocks = np.empty((0, self.packing.context_length + 1), np.int32)
        return blocks, np.full(len(blocks), self.packing.context_length, np.int32)

    def _keep(self, ids: Ids) -> tuple[BlockTokens, Int32[np.ndarray, " n_blocks"]]:
        block, length = cut_document(ids, self.packing)
        self.documents += len(block)
        self.dropped_documents += 1 - len(block)
        n_kept = length + (self.packing.bos is None) if length else 0
        self._cut_tokens += len(ids) - n_kept
        return block, np.full(len(block), length, np.int32)
