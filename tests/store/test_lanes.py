"""What a stream's lanes read: runs of kept rows, scales of several shards, memory used again."""

import queue
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from store.lanes import MIN_RUN_ROWS, Part, ReusedMemory, decode_parts, find_cuts

# name: (kept slots, rows of a chunk, where runs begin after the first)
CUTS = {
    "whole": (range(48), 48, []),
    "chunks": (range(48), 16, [16, 32]),
    "first slots left out": (range(5, 48), 48, []),
    "one hole": ([*range(20), *range(21, 48)], 48, [20]),
    "a hole where a chunk ends": ([*range(23), *range(24, 48)], 24, [23]),
    "a whole chunk left out": ([*range(16), *range(32, 48)], 16, [16]),
    "too many holes": (range(0, 48, 2), 16, [8, 16]),  # so rows are picked from each chunk
    "nothing kept": ([], 16, []),
}


@pytest.mark.parametrize("name", CUTS)
def test_cuts(name):
    slots, rows_per_chunk, expected = CUTS[name]
    found = find_cuts(np.array(slots, np.int32), rows_per_chunk)
    assert [cut for cut in found if cut > 0] == expected


@given(st.sets(st.integers(0, 99)), st.integers(1, 20))
def test_runs_are_in_one_chunk_and_few(kept, rows_per_chunk):
    slots = np.array(sorted(kept), np.int32)
    cuts = find_cuts(slots, rows_per_chunk)
    runs = np.split(slots, cuts)
    assert all(len({slot // rows_per_chunk for slot in run}) <= 1 for run in runs)
    n_chunks = len({slot // rows_per_chunk for slot in kept})
    assert len(cuts) <= max(len(kept) / MIN_RUN_ROWS, n_chunks)


def test_each_part_has_its_own_shards_scales():
    parts, expected = [], []
    for size in (3, 1, 5):
        values = torch.randint(-127, 128, (size, 4), dtype=torch.int8)
        rows, channels = torch.rand(size, 1), torch.rand(4)
        parts.append(Part(values, rows, channels))
        expected.append(values.float() * rows * channels)
    out = torch.full((9, 4), torch.nan)
    decode_parts(parts, out)
    assert torch.equal(out, torch.cat(expected))


HOLDERS = {
    "the array": lambda array: array,
    "a view": lambda array: array[1::2],
    "a batch": lambda array: torch.from_numpy(array).view(torch.float16).view(6, 8),
    "a tensor": torch.from_numpy,
    "a row of a tensor": lambda array: torch.from_numpy(array)[1],
    "numpy's view of a tensor": lambda array: torch.from_numpy(array)[::3].numpy(),
    "a detached tensor": lambda array: torch.from_numpy(array).detach(),
    "the storage": lambda array: torch.from_numpy(array).untyped_storage(),
    "a graph": lambda array: (
        torch.ones(24, requires_grad=True) * torch.from_numpy(array.view(np.float32))
    ),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_memory_that_is_held_is_not_used_again(name):
    memory = ReusedMemory(4 * 6 * 4)
    held = HOLDERS[name](memory.take())
    other = memory.take().ctypes.data
    assert memory.take().ctypes.data == other  # nobody holds that one
    both = [memory.take(), memory.take()]
    assert len({array.ctypes.data for array in both}) == 2  # neither of them is `held`'s
    del held, both
    free = [memory.take() for _ in range(3)]
    assert len(memory._arrays) == 3 == len({array.ctypes.data for array in free})


def test_memory_of_three_consumers_never_changes_under_them():
    """One thread takes and fills, three hold views for a while and let go of them."""
    memory, filled, wrong = ReusedMemory(64 * 8), queue.Queue(4), []

    def consume():
        held = []
        while (item := filled.get()) is not None:
            number, view = item
            held = [*held[-3:], (number, view)]
            wrong.extend(number for number, view in held if not bool((view == number).all()))
            del item, view

    consumers = [threading.Thread(target=consume) for _ in range(3)]
    for consumer in consumers:
        consumer.start()
    for number in range(3000):
        array = memory.take().view(np.int64)
        array[:] = number
        filled.put((number, torch.from_numpy(array)[::3]))
    for _ in consumers:
        filled.put(None)
    for consumer in consumers:
        consumer.join()
    assert not wrong
    assert len(memory._arrays) < 30
