"""The text policy, in one place.

Text is UTF-8; invalid bytes and NUL characters are errors that name the file and the byte. A
byte-order mark at the start of a file is dropped. Line ends stay as they are: CRLF is two
characters that the tokenizer sees. A document longer than `max_document_mb` (10^6 bytes each; a
line of .jsonl counts whole, a token id as 4) is an error, found before it is in memory.
"""

from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import CorpusError


class Document(NamedTuple):
    """One document of a source."""

    id: str  # stable name, by which the split is drawn: relative file name, row numbers from 0
    content: str | np.ndarray  # text, or token ids [n_tokens] int64 where the source has those
    where: str  # file and row, for messages


def check_value(value: Any, where: str, limit: int) -> str | np.ndarray:
    """A row's value as text or token ids; raises CorpusError for anything else."""
    if isinstance(value, str):
        value = _encode(value, where)
    if isinstance(value, bytes):
        if len(value) > limit:
            raise too_long(where, 0, limit)
        return decode_text(value, where, 0)
    if isinstance(value, list | np.ndarray):
        return _check_ids(value, where, limit)
    raise CorpusError(
        f"row at {where}: expected text or a list of integers, got"
        f" {'null' if value is None else type(value).__name__}. Remove the row, or choose another"
        " column with `--set corpus.column=NAME`."
    )


def decode_text(data: bytes, where: str, offset: int) -> str:
    """Decode UTF-8 strictly; `offset` is where in the file `data` begins."""
    if (position := data.find(b"\0")) >= 0:
        raise CorpusError(
            f"text at {where}, byte {offset + position}: expected UTF-8 text, got a NUL byte."
            " Remove it, or convert the file if it is UTF-16: `iconv -f UTF-16 -t UTF-8`."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"text at {where}, byte {offset + error.start}: expected UTF-8, got"
            f" 0x{data[error.start]:02x} ({error.reason}). Convert it, for example with"
            " `iconv -f LATIN1 -t UTF-8`."
        ) from None


def too_long(where: str, offset: int, limit: int) -> CorpusError:
    return CorpusError(
        f"document at {where}, byte {offset}: expected at most corpus.max_document_mb ="
        f" {limit // 10**6} MB, got more. Split the document, or raise the limit with"
        " `--set corpus.max_document_mb=N`."
    )


def no_column(column: str, known: list[str], where: str) -> CorpusError:
    return CorpusError(
        f"column {column!r} at {where}: expected one of {', '.join(map(repr, known))}."
        " Choose one with `--set corpus.column=NAME`."
    )


def one_line(error: BaseException) -> str:
    """A foreign error's message as one short line without its full stop."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _encode(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"text at {where}, character {error.start}: expected Unicode text, got half of a"
            " surrogate pair. Correct the row."
        ) from None


def _check_ids(value: list | np.ndarray, where: str, limit: int) -> np.ndarray:
    try:
        ids = np.asarray(value)
    except ValueError:  # ragged
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise CorpusError(
            f"row at {where}: expected text or a list of integers, got a list of something else."
            " Correct the row, or choose another column with `--set corpus.column=NAME`."
        )
    if 4 * ids.size > limit:
        raise too_long(where, 0, limit)
    return ids.astype(np.int64)
