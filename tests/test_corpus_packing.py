"""Packing against a slow packer written for reading."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus import draw_split
from pipeline.corpus.packing import Packing, SplitPacker, cut_stream

SEPARATOR, BOS = 100, 101

documents_of = st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12)
packings = st.builds(
    Packing,
    kind=st.sampled_from(["packed", "per_document"]),
    context_length=st.integers(1, 7),
    separator=st.just(SEPARATOR),
    bos=st.sampled_from([None, BOS]),
)


class Packed(NamedTuple):
    blocks: list[list[int]]
    lengths: list[int]
    documents: int
    dropped_documents: int
    dropped_tokens: int


def pack_slowly(documents: list[list[int]], packing: Packing, asked: int | None) -> Packed:
    """Take documents one by one and pack all of those taken again, until there is enough."""
    pack = _join if packing.kind == "packed" else _keep_apart
    result = pack([], packing)
    for n in range(1, len(documents) + 1):
        result = pack(documents[:n], packing)
        if asked is not None and sum(result.lengths) >= asked:
            break
    while asked is not None and sum(result.lengths[:-1]) >= asked:
        result = result._replace(
            blocks=result.blocks[:-1],
            lengths=result.lengths[:-1],
            dropped_tokens=result.dropped_tokens + result.lengths[-1],
        )
    return result


def _join(documents, packing):
    context = packing.context_length
    stream = [token for ids in documents if ids for token in [SEPARATOR, *ids]]
    if packing.bos is None:
        blocks = [stream[i : i + context + 1] for i in range(0, len(stream), context)]
        blocks = [block for block in blocks if len(block) == context + 1]
        n_used = len(blocks) * context + 1 if blocks else 0
    else:
        blocks = [[BOS, *stream[i : i + context]] for i in range(0, len(stream), context)]
        blocks = [block for block in blocks if len(block) == context + 1]
        n_used = len(blocks) * context
    n_empty = sum(not ids for ids in documents)
    lengths = [context] * len(blocks)
    return Packed(blocks, lengths, len(documents) - n_empty, n_empty, len(stream) - n_used)


def _keep_apart(documents, packing):
    blocks, lengths, dropped_documents, dropped_tokens = [], [], 0, 0
    for ids in documents:
        start = [] if packing.bos is None else [BOS]
        room = packing.context_length + 1 - len(start)
        kept = start + ids[:room]
        if not ids or len(kept) < 2:
            dropped_documents += 1
            dropped_tokens += len(ids)
            continue
        dropped_tokens += len(ids[room:])
        lengths.append(len(kept) - 1)
        blocks.append(kept + [SEPARATOR] * (packing.context_length + 1 - len(kept)))
    return Packed(blocks, lengths, len(blocks), dropped_documents, dropped_tokens)


@given(documents_of, packings, st.none() | st.integers(1, 40))
def test_packing_agrees_with_the_slow_packer(documents, packing, asked):
    packer = SplitPacker(packing, asked)
    blocks, lengths = [], []
    for ids in documents:
        if packer.is_full:
            break
        new_blocks, new_lengths = packer.add(np.array(ids, np.int32))
        blocks += new_blocks.tolist()
        lengths += new_lengths.tolist()
    expected = pack_slowly(documents, packing, asked)
    assert blocks == expected.blocks
    assert lengths == expected.lengths
    assert packer.blocks == len(expected.blocks)
    assert packer.tokens == sum(expected.lengths)
    assert packer.documents == expected.documents
    assert packer.dropped_documents == expected.dropped_documents
    assert packer.dropped_tokens == expected.dropped_tokens
    assert packer.is_full == (asked is not None and sum(expected.lengths) >= asked)


@given(st.lists(st.integers(0, 99), max_size=60), st.integers(1, 9), st.sampled_from([None, BOS]))
def test_every_token_of_the_stream_is_predicted_once(stream, context, bos):
    packing = Packing("packed", context, SEPARATOR, bos)
    blocks, rest = cut_stream(np.array(stream, np.int32), packing)
    first = 0 if bos is not None else 1
    assert blocks[:, 1:].flatten().tolist() == stream[first : len(blocks) * context + first]
    assert rest.tolist() == stream[len(blocks) * context :]
    if bos is None:
        assert blocks[:-1, -1].tolist() == blocks[1:, 0].tolist()
    else:
        assert (blocks[:, 0] == bos).all()


@pytest.mark.parametrize(
    ("is_text", "expected"),
    [
        (True, [[100, 1, 2, 100], [100, 3, 4, 100]]),
        (False, [[1, 2, 3, 4]]),  # token ids are joined as they are
    ],
)
def test_separators_precede_text_only(is_text, expected):
    packer = SplitPacker(Packing("packed", 3, SEPARATOR, None), None)
    ids = [np.array(ids, np.int32) for ids in ([1, 2], [3, 4], [5])]
    assert [row for i in ids for row in packer.add(i, is_text=is_text)[0].tolist()] == expected


def test_the_split_depends_on_the_name_alone():
    names = [f"folder/{i}.txt" for i in range(4000)]
    held_out = {name for name in names if draw_split(name, 0.1) == "held_out"}
    assert 300 < len(held_out) < 500
    assert held_out < {name for name in names if draw_split(name, 0.2) == "held_out"}
    # Pinned: a change would move documents of every existing corpus across the split.
    assert sorted(held_out)[:3] == [f"folder/{i}.txt" for i in (1044, 1051, 1056)]
