"""What each Zarr engine returns for a damaged store; docs/engines.md holds the tables.

`python -m tests.store.test_engines` writes them anew.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr

import store
from tests.store.small_store import HOOK, all_rows, make_spec, write_store

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "engines.md"
MARKS = "<!-- corruption: python -m tests.store.test_engines -->\n", "<!-- end -->\n"
ARRAY = f"{HOOK}/acts"
VICTIM, TWIN = f"{ARRAY}/c/1/0", f"{ARRAY}/c/2/0"
SPEC = make_spec(acts_dtype="float16")
ROWS_PER_CHUNK, ROWS_PER_SHARD = SPEC.layout.rows_per_chunk, SPEC.layout.rows_per_shard
N_SLOTS = SPEC.layout.n_slots
ROW_BYTES = 2 * SPEC.d_model
CHUNK_FILE_BYTES = SPEC.shard_format(SPEC.arrays()[ARRAY]).chunk_bytes + 4
MEMORY_BYTES = 16 * 2**30  # far more than a reader needs, far less than 10^15 rows

Read = Callable[[slice], np.ndarray]  # rows of the array, by slot


# Each opens the store and returns how to read rows of ARRAY.


def open_ours(path: Path) -> Read:
    opened = store.open_store(path)

    def read(rows: slice) -> np.ndarray:
        parts = []
        for shard in opened.shards:
            first = shard.index * ROWS_PER_SHARD
            start = min(max(rows.start - first, 0), shard.n_rows)
            stop = min(max(rows.stop - first, start), shard.n_rows)
            if start < stop:
                parts.append(opened.read_slots(shard.index, start, stop).acts.numpy())
        return np.concatenate(parts)

    return read


def open_zarr_python(path: Path) -> Read:
    array = zarr.open_array(path / ARRAY, mode="r")
    return lambda rows: np.asarray(array[rows])


def open_zarrs(path: Path) -> Read:
    with zarr.config.set(
        {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    ):
        array = zarr.open_array(path / ARRAY, mode="r")
    return lambda rows: np.asarray(array[rows])


def open_tensorstore(path: Path, *, fill_missing: bool) -> Read:
    import tensorstore

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path / ARRAY}/"},
        "fill_missing_data_reads": fill_missing,
    }
    array = tensorstore.open(spec, read=True).result()
    return lambda rows: np.asarray(array[rows.start : min(rows.stop, array.shape[0])])


ENGINES: dict[str, Callable[[Path], Read]] = {
    "ours": open_ours,
    "zarr-python": open_zarr_python,
    "zarrs": open_zarrs,
    "TensorStore": partial(open_tensorstore, fill_missing=True),
    "TensorStore, no fill": partial(open_tensorstore, fill_missing=False),
}


# Each damages the store at a path; `other` is another store of the same shape.


def edit(change: Callable[[bytes], bytes], file: str = VICTIM) -> Callable[[Path, Path], None]:
    def damage(path: Path, other: Path) -> None:  # noqa: ARG001
        content = (path / file).read_bytes()
        assert change(content) != content
        (path / file).write_bytes(change(content))

    return damage


def flip(place: int) -> Callable[[Path, Path], None]:
    def change(content: bytes) -> bytes:
        damaged = bytearray(content)
        damaged[place] ^= 16
        return bytes(damaged)

    return edit(change)


def swap_shards(path: Path, other: Path) -> None:  # noqa: ARG001
    first, second = (path / VICTIM).read_bytes(), (path / TWIN).read_bytes()
    assert first != second
    (path / VICTIM).write_bytes(second)
    (path / TWIN).write_bytes(first)


def swap_chunks(content: bytes) -> bytes:
    size = CHUNK_FILE_BYTES
    return content[size : 2 * size] + content[:size] + content[2 * size :]


def claim_rows(content: bytes) -> bytes:
    metadata = json.loads(content)
    metadata["shape"][0] = 10**15
    return json.dumps(metadata).encode()


FAULTS: dict[str, Callable[[Path, Path], object]] = {
    "nothing wrong": lambda _path, _other: None,
    "shard file missing": lambda path, _: (path / VICTIM).unlink(),
    "shard file cut to nothing": edit(lambda _: b""),
    "shard file cut to half": edit(lambda content: content[: len(content) // 2]),
    "shard file cut by one byte": edit(lambda content: content[:-1]),
    "a byte of junk appended": edit(lambda content: content + b"\1"),
    "shard file filled with zeros": edit(lambda content: bytes(len(content))),
    "one bit of a chunk flipped": flip(3 * ROW_BYTES + 1),  # in the rows that are read below
    "one bit of a chunk's checksum flipped": flip(CHUNK_FILE_BYTES - 2),
    "one bit of the shard's index flipped": flip(-20),
    "two chunks of a shard swapped": edit(swap_chunks),
    "two shards swapped": swap_shards,
    "a shard of another store": lambda path, other: shutil.copy(other / VICTIM, path / VICTIM),
    "zarr.json cut short": edit(lambda content: content[: len(content) // 2], f"{ARRAY}/zarr.json"),
    "zarr.json claims 10^15 rows": edit(claim_rows, f"{ARRAY}/zarr.json"),
    "manifest.json missing": lambda path, _: (path / "manifest.json").unlink(),
    "manifest.json of another store": lambda path, other: shutil.copy(
        other / "manifest.json", path / "manifest.json"
    ),
}

# Rows of the array to read. Faults hit shard 1; those in a chunk, its first chunk.
READS = {
    "every row": slice(0, 2 * N_SLOTS),  # and of those that do not exist, as many again
    "three rows of the damaged chunk": slice(ROWS_PER_SHARD + 2, ROWS_PER_SHARD + 5),
    "three rows of the other chunk in that shard": slice(
        ROWS_PER_SHARD + ROWS_PER_CHUNK + 2, ROWS_PER_SHARD + ROWS_PER_CHUNK + 5
    ),
}
TOUCHES_CHUNK = {"one bit of a chunk flipped", "one bit of a chunk's checksum flipped"}
TOUCHES_NO_SHARD = {"nothing wrong"}


def observe(path: Path, engine: str, rows: slice, expected: np.ndarray) -> str:
    """`exact`, the class of the error, or `WRONG` for other numbers than were written."""
    try:
        found = ENGINES[engine](path)(rows)
    except Exception as error:
        return type(error).__name__
    wanted = expected[rows]
    same = found.shape == wanted.shape and np.array_equal(found.astype(np.float32), wanted)
    return "exact" if same else "**WRONG**"


def observe_all(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """What every engine does, by read, fault and engine. Needs the two stores of `make_stores`."""
    expected = np.load(folder / "expected.npy")
    tables: dict[str, dict[str, dict[str, str]]] = {read: {} for read in READS}
    for number, (fault, damage) in enumerate(FAULTS.items()):
        path = Path(shutil.copytree(folder / "store", folder / f"fault-{number}"))
        damage(path, folder / "other")
        for read, rows in READS.items():
            tables[read][fault] = {
                engine: observe(path, engine, rows, expected) for engine in ENGINES
            }
    return tables


def make_stores(folder: Path) -> None:
    write_store(folder / "store", SPEC)
    write_store(folder / "other", make_spec(acts_dtype="float16", weights="w1", seed=4))
    order = [store.permute_rows(SPEC.seed, s.index, s.n_rows) for s in SPEC.layout.shards]
    first = [shard.first_block * SPEC.context_length for shard in SPEC.layout.shards]
    slots = np.concatenate([start + rows for start, rows in zip(first, order, strict=True)])
    np.save(folder / "expected.npy", all_rows(SPEC).acts.numpy()[slots])


def observe_in_a_child(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """In a process of its own with bounded memory and time, whatever an engine may do."""
    make_stores(folder)
    child = subprocess.run(
        [sys.executable, "-m", "tests.store.test_engines", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads((folder / "tables.json").read_text())


def render(tables: dict[str, dict[str, dict[str, str]]]) -> str:
    lines = []
    for read, table in tables.items():
        lines += ["", f"### {read.capitalize()}", ""]
        lines += ["| fault | " + " | ".join(ENGINES) + " |", "|---" * (len(ENGINES) + 1) + "|"]
        lines += [f"| {fault} | " + " | ".join(row.values()) + " |" for fault, row in table.items()]
    return "\n".join([*lines[1:], "", ""])


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return observe_in_a_child(tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("read", READS)
def test_ours_is_exact_or_raises(tables, read, fault):
    found = tables[read][fault]["ours"]
    undamaged = fault in TOUCHES_NO_SHARD or (fault in TOUCHES_CHUNK and "other" in read)
    if undamaged:
        assert found == "exact"
    else:
        assert issubclass(getattr(store, found), store.StoreError)


def test_every_engine_reads_a_whole_store(tables):
    for table in tables.values():
        assert set(table["nothing wrong"].values()) == {"exact"}


def test_page_has_these_tables(tables):
    page = re.search(f"{MARKS[0]}(.*){MARKS[1]}", PAGE.read_text(), re.S)
    assert page
    assert page[1] == render(tables), "run `python -m tests.store.test_engines`"


def main() -> None:
    if len(sys.argv) == 2:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        folder = Path(sys.argv[1])
        (folder / "tables.json").write_text(json.dumps(observe_all(folder)))
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tables = render(observe_in_a_child(Path(folder)))
    head, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(head + MARKS[0] + tables + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
