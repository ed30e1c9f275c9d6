"""A source's name → a stream of documents, in an order that never changes.

    "demo"      the standard library's files that the embedded model did not see
    a path      a file or folder of .txt (a document each), .jsonl (one per line) or .parquet (one
                per row)
    a name      anything else is a dataset on the Hugging Face hub, streamed

A folder is read in the order of its files' relative names; other suffixes and hidden files are not
read. A column or key that holds lists of integers is taken as token ids.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import CorpusConfig
from pipeline.corpus.text import Document, check_value, decode_text, no_column, one_line, too_long
from pipeline.demo.library import is_unseen, list_library, read_library
from pipeline.errors import CorpusError

SUFFIXES = (".txt", ".jsonl", ".parquet")

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_READ_BYTES = 2**20  # of a Parquet column at a time, where its pages allow it


def find_source(source: str) -> Literal["demo", "files", "hub"]:
    """What a source's name means; an existing path wins over the hub, a missing one is an error."""
    if source == "demo":
        return "demo"
    if os.path.exists(os.path.expanduser(source)):  # unlike pathlib's, these never raise
        return "files"
    if (
        source.startswith((".", "/", "~"))
        or source.lower().endswith(SUFFIXES)
        or not _HUB_NAME.fullmatch(source)
    ):
        raise CorpusError(
            f"corpus source {source!r}: expected 'demo', an existing file or folder, or a hub"
            " dataset such as allenai/c4, got no such path. Set it with `--set"
            " corpus.source=PATH`."
        )
    return "hub"


def open_documents(config: CorpusConfig) -> Iterator[Document]:
    """Stream the documents of `config.source`; raises CorpusError where one breaks the policy."""
    limit = config.max_document_mb * 10**6
    kind = find_source(config.source)
    if kind == "demo":
        return _read_demo(limit)
    if kind == "hub":
        return _read_hub(config, limit)
    return _read_files(Path(config.source).expanduser(), config.column, limit)


def _read_demo(limit: int) -> Iterator[Document]:
    with _reading("the standard library"):
        for name, text in read_library([name for name in list_library() if is_unseen(name)]):
            yield Document(name, check_value(text, name, limit), name)


def _read_files(source: Path, column: str, limit: int) -> Iterator[Document]:
    for path, name in _list_files(source):
        with _reading(str(path)):
            match path.suffix.lower():
                case ".txt":
                    yield _read_txt(path, name, limit)
                case ".jsonl":
                    yield from _read_jsonl(path, name, column, limit)
                case _:
                    yield from _read_parquet(path, name, column, limit)


def _list_files(source: Path) -> list[tuple[Path, str]]:
    """Files to read, each with its name relative to the source, in the order of those names."""
    if source.is_dir():
        paths = {path.relative_to(source): path for path in source.rglob("*") if path.is_file()}
        visible = {
            name: path
            for name, path in paths.items()
            if not any(part.startswith(".") for part in name.parts)
        }
    else:
        visible = {Path(source.name): source}
    files = [
        (path, name.as_posix()) for name, path in visible.items() if name.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise CorpusError(
            f"corpus source at {source}: expected {', '.join(SUFFIXES)} files, got none."
            " Set it with `--set corpus.source=PATH`."
        )
    return sorted(files, key=lambda file: file[1])


def _read_txt(path: Path, name: str, limit: int) -> Document:
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise too_long(str(path), 0, limit)
    text = data.removeprefix(codecs.BOM_UTF8)
    return Document(name, decode_text(text, str(path), len(data) - len(text)), str(path))


def _read_jsonl(path: Path, name: str, column: str, limit: int) -> Iterator[Document]:
    """Rows are numbered by line, blank ones included."""
    offset = 0
    with path.open("rb") as file:
        for row, line in enumerate(iter(lambda: file.readline(limit + 1), b"")):
            if len(line) > limit:
                raise too_long(str(path), offset, limit)
            skipped = len(codecs.BOM_UTF8) if row == 0 and line.startswith(codecs.BOM_UTF8) else 0
            text = decode_text(line[skipped:], str(path), offset + skipped)
            where = f"{path} line {row + 1} (byte {offset})"
            offset += len(line)
            if text.strip():
                yield Document(
                    f"{name}:{row}",
                    check_value(_parse_row(text, column, where), where, limit),
                    where,
                )


def _parse_row(text: str, column: str, where: str) -> Any:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"JSON at {where}: expected one object, got {one_line(error)}. Correct the line."
        ) from None
    if not isinstance(row, dict):
        raise CorpusError(
            f"JSON at {where}: expected an object, got {type(row).__name__}. Correct the line."
        )
    if column not in row:
        raise no_column(column, list(row), where)
    return row[column]


def _read_parquet(path: Path, name: str, column: str, limit: int) -> Iterator[Document]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
        if column not in file.schema_arrow.names:
            raise no_column(column, file.schema_arrow.names, str(path))
        kind = file.schema_arrow.field(column).type
        row_bytes = _count_column_bytes(file, column) / max(1, file.metadata.num_rows)
        batch_rows = int(min(1024, max(1, _READ_BYTES / max(1, row_bytes))))
        row = 0
        for batch in file.iter_batches(batch_rows, columns=[column], use_threads=False):
            for value in _arrow_values(batch.column(0), kind, str(path)):
                where = f"{path} row {row}"
                yield Document(f"{name}:{row}", check_value(value, where, limit), where)
                row += 1


def _count_column_bytes(file: pq.ParquetFile, column: str) -> int:
    groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.split(".")[0] == column
    )


def _arrow_values(
    values: pa.Array, kind: pa.DataType, where: str
) -> Iterator[bytes | np.ndarray | None]:
    """Text as its bytes, so that Arrow decodes nothing; lists of integers as arrays."""
    if isinstance(kind, pa.DictionaryType):
        kind, values = kind.value_type, values.dictionary_decode()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        yield from values.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    elif hasattr(kind, "value_type") and pa.types.is_integer(kind.value_type):
        yield from (
            row.values.to_numpy(zero_copy_only=False) if row.is_valid else None for row in values
        )
    else:
        raise CorpusError(
            f"column at {where}: expected text or lists of integers, got {kind}."
            " Choose another with `--set corpus.column=NAME`."
        )


def _read_hub(config: CorpusConfig, limit: int) -> Iterator[Document]:
    """Rows of a hub dataset in its own order; whatever goes wrong there is one CorpusError."""
    import datasets  # takes a second to import, which no other source needs

    name = f"{config.source}/{config.subset or 'default'}/{config.split}/"
    try:
        rows = datasets.load_dataset(
            config.source, config.subset, split=config.split, streaming=True
        )
        for i, row in enumerate(rows):
            where = f"{name}{i}"
            if config.column not in row:
                raise no_column(config.column, list(row), where)
            yield Document(where, check_value(row[config.column], where, limit), where)
    except CorpusError:
        raise
    except Exception as error:  # a score of classes, from four libraries
        raise CorpusError(
            f"hub dataset {config.source} (subset {config.subset}, split {config.split}): cannot"
            f" be read: {one_line(error)}. Check the name, the network and `hf auth whoami`, or"
            " choose with `--set corpus.subset=NAME --set corpus.split=NAME`, or give a local"
            " file with `--set corpus.source=PATH`."
        ) from error


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"text at {where}: expected a readable file, got {one_line(error)}. Mend or remove it,"
            " then run again."
        ) from None
