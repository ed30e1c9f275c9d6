"""Compression of a chunk: none, zstd, or blosc (bit-shuffle, then zstd).

The compressed bytes are those of the Zarr codecs of the same names, and a function of the numbers
alone: one thread compresses a chunk.
"""

from typing import Any

import numpy as np

COMPRESSIONS = ("none", "zstd", "blosc")
_ZSTD = {"level": 3, "checksum": False}
_BLOSC = {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
_ZSTD_MAGIC = bytes.fromhex("28b52ffd")


def list_codecs(compression: str, item_bytes: int) -> list[dict[str, Any]]:
    """Zarr's codecs between `bytes` and `crc32c`, for numbers of `item_bytes` bytes."""
    if compression == "zstd":
        return [{"name": "zstd", "configuration": _ZSTD}]
    if compression == "blosc":
        return [{"name": "blosc", "configuration": {"typesize": item_bytes} | _BLOSC}]
    assert compression == "none"
    return []


def compress(chunk: np.ndarray, compression: str) -> bytes:
    """A chunk's numbers, smaller."""
    return bytes(_load_codec(compression, chunk.itemsize).encode(chunk.reshape(-1)))


def decompress(content: np.ndarray, compression: str, n_bytes: int) -> np.ndarray:
    """The numbers of a compressed chunk (uint8) as the `n_bytes` bytes (uint8) that they must be.

    Allocates no more than that. Raises ValueError where the content is anything else.
    """
    found = _read_size(content, compression)
    if found != n_bytes:
        raise ValueError(f"a {compression} chunk of {n_bytes} bytes, got {found}")
    numbers = np.empty(n_bytes, np.uint8)
    try:
        _load_codec(compression, 1).decode(content, out=numbers)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"a {compression} chunk of {n_bytes} bytes, got {error}") from None
    return numbers


def _load_codec(compression: str, item_bytes: int) -> Any:
    if compression == "zstd":
        from numcodecs.zstd import Zstd

        return Zstd(**_ZSTD)
    import numcodecs.blosc as blosc

    blosc.use_threads = False  # several would write their blocks in the order in which they end
    assert compression == "blosc"
    return blosc.Blosc(**_BLOSC | {"shuffle": blosc.BITSHUFFLE}, typesize=item_bytes)


def _read_size(content: np.ndarray, compression: str) -> int | None:
    """The size that a chunk's header states for the numbers, None where it is no such header."""
    header = content[:18].tobytes()
    if compression == "blosc":  # version, version, flags, typesize, nbytes, blocksize, cbytes
        sizes = np.frombuffer(header[:16], "<u4") if len(header) >= 16 else np.zeros(4, "<u4")
        return int(sizes[1]) if sizes[3] == len(content) else None
    if header[:4] != _ZSTD_MAGIC or len(header) < 6:
        return None
    flags = header[4]  # RFC 8878, section 3.1.1.1: window, dictionary and content size follow
    in_one_segment = flags >> 5 & 1
    start = 5 + (1 - in_one_segment) + (0, 1, 2, 4)[flags & 3]
    length = (in_one_segment, 2, 4, 8)[flags >> 6]
    size = int.from_bytes(header[start : start + length], "little")
    return size + (256 if length == 2 else 0) if length else None
