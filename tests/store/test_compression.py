"""Compressed chunks: the same numbers back, the same bytes again, and nothing else accepted."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.compression import COMPRESSIONS, compress, decompress, list_codecs

COMPRESSED = [name for name in COMPRESSIONS if name != "none"]
NUMBERS = np.random.default_rng(0).standard_normal((300, 64)).astype("<f2")


def as_bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


@pytest.mark.parametrize("name", COMPRESSED)
@settings(deadline=None)
@given(
    n_bytes=st.sampled_from([4, 8, 200, 255, 256, 300, 70_000, 200_000]),  # every header's form
    dtype=st.sampled_from(["i1", "<f2", "<f4"]),
    spread=st.integers(1, 255),
)
def test_round_trip(name, n_bytes, dtype, spread):
    raw = np.random.default_rng(spread).integers(0, spread, n_bytes // 4 * 4, dtype=np.uint8)
    found = decompress(as_bytes(compress(raw.view(dtype), name)), name, len(raw))
    assert np.array_equal(found, raw)
    assert found.flags.writeable


@pytest.mark.parametrize("name", COMPRESSED)
def test_same_numbers_same_bytes(name):
    """From any thread, whatever blosc's own number of threads."""
    import numcodecs.blosc as blosc

    large = np.tile(NUMBERS, (40, 1))
    expected = compress(large, name)
    before = blosc.set_nthreads(4)
    try:
        found = [compress(large, name) for _ in range(5)]
        thread = threading.Thread(target=lambda: found.append(compress(large, name)))
        thread.start()
        thread.join()
    finally:
        blosc.set_nthreads(before)
    assert found == [expected] * 6


def test_numbers_become_smaller():
    small = (NUMBERS * 10).astype(np.int8)
    for name in COMPRESSED:
        assert len(compress(small, name)) < small.nbytes
    # Of floating-point numbers, only the exponents repeat: the shuffle brings them together.
    assert len(compress(NUMBERS, "blosc")) < 0.95 * NUMBERS.nbytes


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("n_bytes", [0, 1, NUMBERS.nbytes - 1, NUMBERS.nbytes + 1, 10**15])
def test_another_size_is_refused_before_it_is_allocated(name, n_bytes):
    content = as_bytes(compress(NUMBERS, name))
    with pytest.raises(ValueError, match=f"{name} chunk of {n_bytes} bytes, got {NUMBERS.nbytes}"):
        decompress(content, name, n_bytes)


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"",
        lambda content: content[:5],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content * 2,
        lambda content: b"\0" * len(content),
        lambda content: content[:20] + b"\xff" * 40 + content[60:],
    ],
)
def test_other_content_is_refused(name, change):
    content = as_bytes(change(compress(NUMBERS, name)))
    with pytest.raises(ValueError, match=f"{name} chunk of {NUMBERS.nbytes} bytes"):
        decompress(content, name, NUMBERS.nbytes)


def test_a_stream_without_its_size_is_refused():
    """As `zstd` writes from a pipe: it would have to be decompressed to know its size."""
    header = bytes.fromhex("28b52ffd") + bytes([0, 0x58])  # no size, then the window
    with pytest.raises(ValueError, match="got None"):
        decompress(as_bytes(header + bytes.fromhex("010000")), "zstd", 0)


def test_none_has_no_codec():
    assert list_codecs("none", 4) == []
