"""Make a corpus: stream documents, tokenise, split, cut into blocks, and write them part by part.

Nothing of a corpus is at its path before all of it is: parts grow in a hidden folder beside it,
which is renamed.
"""

import fcntl
import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config import CorpusConfig
from pipeline.corpus.packing import Packing, SplitPacker
from pipeline.corpus.reader import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    Corpus,
    CorpusManifest,
    Split,
    SplitRecord,
    fingerprint_of,
    open_corpus,
    read_manifest,
)
from pipeline.corpus.sources import find_source, open_documents
from pipeline.corpus.text import one_line
from pipeline.corpus.tokens import find_bos, find_separator, hash_tokenizer, tokenize_documents
from pipeline.corpus.writer import GROUP_BLOCKS, PartWriter, sync
from pipeline.demo.library import hash_fraction
from pipeline.errors import CorpusError
from pipeline.files import write_text

_PACKAGES = ("datasets", "pyarrow", "tokenizers", "transformers")


def write_corpus(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Write the corpus that `config` describes to the folder `out`, and open it.

    Documents are split by the hash of their ids, so none changes sides when others come or go. Each
    split ends with the smallest number of whole blocks that hold the tokens (rows) asked for; null
    takes all. Memory is bounded by a batch of documents and a row group of blocks. The result is a
    function of source, settings, tokenizer and versions.

    `out` may hold the same corpus, which is replaced, or with `overwrite` another one.
    `on_progress` is called with the number of rows just cut. Raises CorpusError if text cannot be
    read or there is too little of it, or if `out` cannot be written; what `out` held is then still
    there.
    """
    packing = Packing(
        config.packing,
        config.context_length,
        separator=find_separator(tokenizer),
        bos=find_bos(tokenizer) if config.prepend_bos else None,
    )
    settings = describe_corpus(config, tokenizer)
    _refuse_other(out, {} if overwrite else settings)
    with _growing_folder(out) as folder:
        splits = _write_splits(config, packing, tokenizer, folder, on_progress or (lambda _: None))
        manifest = _finish_manifest(settings, splits)
        if not overwrite:
            _refuse_other(out, {"fingerprint": manifest.fingerprint})
        write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        _publish(folder, out)
    return open_corpus(out)


def draw_split(document_id: str, held_out_fraction: float) -> Split:
    """Which side of the split a document is on: a function of its id alone."""
    return (
        "held_out" if hash_fraction(document_id, salt="held-out") < held_out_fraction else "train"
    )


def describe_corpus(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The manifest's fields that are known before any text is read."""
    kind = find_source(config.source)
    same = (
        "source",
        "context_length",
        "packing",
        "prepend_bos",
        "held_out_fraction",
        "train_tokens",
        "held_out_tokens",
    )
    return {name: getattr(config, name) for name in same} | {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "subset": config.subset if kind == "hub" else None,
        "split": config.split if kind == "hub" else None,
        "column": None if kind == "demo" else config.column,
        "tokenizer_hash": hash_tokenizer(tokenizer),
        "blocks_per_group": GROUP_BLOCKS,
    }


def _finish_manifest(settings: dict[str, Any], splits: dict[Split, SplitRecord]) -> CorpusManifest:
    versions = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }
    unsealed = CorpusManifest.model_construct(**settings, splits=splits, versions=versions)
    return CorpusManifest(
        **settings,
        splits=splits,
        versions=versions,
        fingerprint=fingerprint_of(unsealed.identity()),
    )


def _write_splits(
    config: CorpusConfig,
    packing: Packing,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    on_progress: Callable[[int], None],
) -> dict[Split, SplitRecord]:
    asked: dict[Split, int | None] = {
        "train": config.train_tokens,
        "held_out": config.held_out_tokens,
    }
    packers: dict[Split, SplitPacker] = {
        split: SplitPacker(packing, asked[split]) for split in SPLITS
    }

    def split_of(document_id: str) -> Split:
        return draw_split(document_id, config.held_out_fraction)

    def is_wanted(document_id: str) -> bool:
        return not packers[split_of(document_id)].is_full

    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(PartWriter(folder, split, config.context_length))
            for split in SPLITS
        }
        for document in tokenize_documents(open_documents(config), tokenizer, wanted=is_wanted):
            split = split_of(document.id)
            if packers[split].is_full:  # since its batch was drawn
                continue
            blocks, lengths = packers[split].add(document.ids, is_text=document.is_text)
            writers[split].write(blocks, lengths)
            on_progress(int(lengths.sum()))
            if all(packer.is_full for packer in packers.values()):
                break
        _check_enough(config, packers)
        return {split: _record(packers[split], writers[split]) for split in SPLITS}


def _record(packer: SplitPacker, writer: PartWriter) -> SplitRecord:
    parts, content_sha256 = writer.finish()
    return SplitRecord(
        documents=packer.documents,
        tokens=packer.tokens,
        blocks=packer.blocks,
        dropped_documents=packer.dropped_documents,
        dropped_tokens=packer.dropped_tokens,
        content_sha256=content_sha256,
        parts=parts,
    )


def _check_enough(config: CorpusConfig, packers: dict[Split, SplitPacker]) -> None:
    """Refuse a corpus that is empty, lacks a side, or is shorter than a block or than asked.

    But the demo's may be shorter than asked: how much there is, is this Python's to say.
    """
    where = f"corpus source {config.source}"
    n_documents = sum(packer.documents + packer.dropped_documents for packer in packers.values())
    if not any(packer.documents for packer in packers.values()):
        raise CorpusError(
            f"{where}: expected text, got {n_documents} documents and nothing in them to predict."
            " Choose another source with `--set corpus.source=PATH`."
        )
    for split, packer in packers.items():
        name = split.replace("_", "-")
        if not packer.documents:
            raise CorpusError(
                f"{where}: expected {name} documents, got none of {n_documents} (each goes by the"
                f" hash of its name, {config.held_out_fraction:.0%} to held-out). Give more and"
                " shorter documents, or set `--set corpus.held_out_fraction=F`."
            )
        if not packer.blocks:
            raise CorpusError(
                f"{where}: expected at least one {name} block of {config.context_length} + 1"
                f" tokens, got {packer.dropped_tokens} tokens. Give more text, or lower it with"
                " `--set corpus.context_length=N`."
            )
        if packer.asked is not None and not packer.is_full and config.source != "demo":
            raise CorpusError(
                f"{where}: expected corpus.{split}_tokens = {packer.asked:,} {name} tokens, got"
                f" {packer.tokens:,}. Give more text, or take all there is with `--set"
                f" corpus.{split}_tokens=null`."
            )


def _refuse_other(out: Path, expected: dict[str, Any]) -> None:
    """Raise CorpusError unless `out` is free or a corpus with these manifest fields.

    What is no corpus at all is never replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    found = read_manifest(out)
    different = [
        f"{name}: expected {value}, got {getattr(found, name)}"
        for name, value in expected.items()
        if getattr(found, name) != value
    ]
    if different:
        raise CorpusError(
            f"corpus at {out}: {'; '.join(different)}. Replace it with `pipeline corpus"
            " --overwrite`, or write elsewhere with `--out FOLDER`."
        )


@contextmanager
def _growing_folder(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`, this process's alone; removed unless it was renamed."""
    folder = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _lock(out.with_name(f".{out.name}.lock")):
            shutil.rmtree(folder, ignore_errors=True)  # a killed run's
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise CorpusError(
            f"corpus at {out}: expected a folder that can be written and a disk with room, got"
            f" {one_line(error)}. Choose another with `--out FOLDER`, or make room."
        ) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` for this process; the system lets go of it whatever way the process ends."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CorpusError(
                f"corpus lock {path}: expected to write alone, got another writer,"
                f" {file.read().strip()}. Wait for it, or choose another folder with `--out"
                " FOLDER`."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _publish(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; what was there is moved aside first and then removed."""
    sync(folder)
    aside = out.with_name(f".{out.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    folder.rename(out)
    sync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)
