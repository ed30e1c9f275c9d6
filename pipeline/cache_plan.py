"""What caching will do, decided before anything runs: identity, layout, shards and disk."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.config import CacheConfig, Config
from pipeline.corpus.build import describe_corpus
from pipeline.corpus.reader import Corpus, open_corpus, read_manifest
from pipeline.device import pick_device
from pipeline.errors import ConfigError, CorpusError
from pipeline.model import (
    ModelFacts,
    hash_weights,
    load_tokenizer,
    locate_checkpoint,
    read_facts,
    resolve_hooks,
)
from store.adoption import list_adoptable
from store.disk import free_bytes
from store.identity import diff_identities
from store.layout import ShardSpec, StoreLayout, plan_shards
from store.manifest import FORMAT_VERSION, StoreSpec
from store.publication import find_published
from store.work import committed_shards, locate_work
from store.writer import required_bytes

BYTES_PER_NUMBER = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


class CaptureSettings(NamedTuple):
    """All that a worker needs beside the shard's number."""

    work: Path  # the work folder with the growing store
    corpus: Path
    corpus_fingerprint: str
    checkpoint: Path
    weights_hash: str
    weight_processing: str
    loss: str  # full | own
    precision: str
    batch_blocks: int
    device: str  # of a cluster's workers as it was asked for: auto is what each of them has

    @property
    def inputs(self) -> dict[str, str]:
        """What a worker has to find: see pipeline.proof.Job, which this is."""
        return {"weights": self.weights_hash, "corpus": self.corpus_fingerprint}

    def find_inputs(self) -> dict[str, Callable[[], str]]:
        return {
            "weights": lambda: hash_weights(self.checkpoint),
            "corpus": lambda: read_manifest(self.corpus).fingerprint,
        }

    def prepare(self) -> None:
        from pipeline.cache import prepare_worker

        prepare_worker(self)


class CachePlan(NamedTuple):
    """What caching will do, decided before anything runs."""

    spec: StoreSpec
    settings: CaptureSettings
    out: Path
    missing: tuple[ShardSpec, ...]  # not committed, nor in a damaged store at `out`
    store_bytes: int  # on disk for the whole store
    needed_bytes: int  # on disk for the missing shards
    free_bytes: int


def plan_cache(
    config: Config, corpus_folder: Path, out: Path, *, overwrite: bool = False
) -> CachePlan:
    """Decide identity, layout and work of a corpus's store; a corpus not yet made is planned for.

    Raises ModelError for a hook or layer that the model lacks, ConfigError for a context that it
    cannot hold, CorpusError for a corpus made with other settings, and StoreMismatch if `out` holds
    another store and is not to be overwritten.
    """
    checkpoint = locate_checkpoint(config.model.name, config.model.revision)
    facts = read_facts(checkpoint)
    hooks = resolve_hooks(config.cache.hook, config.cache.layers, facts)
    check_context(config, facts)
    lengths, corpus_fingerprint = _read_lengths(config, corpus_folder, checkpoint)
    layout = plan_layout(config.cache, lengths, config.corpus.context_length, facts.d_model)
    weights_hash = hash_weights(checkpoint)
    identity = identify(config, corpus_fingerprint, hooks, layout, weights_hash)
    spec = StoreSpec(
        identity=identity,
        hooks=hooks,
        d_model=facts.d_model,
        context_length=config.corpus.context_length,
        acts_dtype=config.cache.acts_dtype,
        grads_dtype=config.cache.grads_dtype,
        compression=config.cache.compression,
        seed=config.cache.seed,
        layout=layout,
    )
    work = locate_work(out, spec.fingerprint)
    missing: tuple[ShardSpec, ...] = ()
    if find_published(spec, out, overwrite=overwrite) is None:
        committed = {*committed_shards(work, spec)}
        committed |= {record.index for record in list_adoptable(out, spec)}
        missing = tuple(shard for shard in layout.shards if shard.index not in committed)
    missing_rows = sum(shard.n_rows for shard in missing)
    store_bytes = required_bytes(spec)
    device = pick_device(config.run.device) if config.run.scheduler is None else config.run.device
    return CachePlan(
        spec=spec,
        settings=CaptureSettings(
            work=work,
            corpus=corpus_folder.absolute(),
            corpus_fingerprint=corpus_fingerprint,
            checkpoint=checkpoint,
            weights_hash=weights_hash,
            weight_processing=config.model.weight_processing,
            loss=config.cache.loss,
            precision=config.cache.precision,
            batch_blocks=config.cache.batch_blocks,
            device=device,
        ),
        out=out,
        missing=missing,
        store_bytes=store_bytes,
        needed_bytes=store_bytes * missing_rows // max(layout.n_rows, 1),
        free_bytes=free_bytes(out),
    )


def check_context(config: Config, facts: ModelFacts) -> None:
    """Raise ConfigError if the blocks are longer than the model's context."""
    if facts.context_length and config.corpus.context_length > facts.context_length:
        raise ConfigError(
            f"corpus.context_length for model {config.model.name}: expected at most "
            f"{facts.context_length}, got {config.corpus.context_length}."
        )


def check_corpus(config: Config, corpus: Corpus, checkpoint: Path) -> None:
    """Raise CorpusError, field by field, if the corpus was made with other settings."""
    wanted = describe_corpus(config.corpus, load_tokenizer(checkpoint))
    found = {name: getattr(corpus.manifest, name) for name in wanted}
    if different := diff_identities(wanted, found):
        raise CorpusError(
            f"corpus at {corpus.folder}: {'; '.join(different)}. "
            "Name another with --corpus, or make one with `pipeline corpus --out`."
        )


def _read_lengths(config: Config, folder: Path, checkpoint: Path) -> tuple[np.ndarray, str]:
    """Real rows of every training block and the corpus's fingerprint; as planned where it is not
    yet made.
    """
    if folder.exists():
        corpus = open_corpus(folder)
        check_corpus(config, corpus, checkpoint)
        return corpus.lengths("train"), corpus.manifest.fingerprint
    if config.corpus.train_tokens is None:
        raise CorpusError(
            f"corpus at {folder}: expected token blocks, got nothing. Run `pipeline corpus`."
        )
    n_blocks = -(-config.corpus.train_tokens // config.corpus.context_length)
    return np.full(n_blocks, config.corpus.context_length, dtype=np.int32), "not yet made"


def plan_layout(
    config: CacheConfig, lengths: np.ndarray, context_length: int, d_model: int
) -> StoreLayout:
    """Shards of about `shard_mb` of activations each, at least eight."""
    return plan_shards(
        lengths,
        context_length=context_length,
        bytes_per_row=BYTES_PER_NUMBER[config.acts_dtype] * d_model,
        shard_bytes=config.shard_mb * 10**6,
    )


def identify(
    config: Config,
    corpus_fingerprint: str,
    hooks: tuple[str, ...],
    layout: StoreLayout,
    weights: str,
) -> dict:
    """All that decides the store's bytes on given hardware; its hash is the fingerprint."""
    return {
        "format_version": FORMAT_VERSION,
        "weights_hash": weights,
        "weight_processing": config.model.weight_processing,
        "corpus": corpus_fingerprint,
        "hooks": list(hooks),
        "context_length": config.corpus.context_length,
        "loss": config.cache.loss,  # stores without this field are "full"
        "loss_reduction": "sum",
        "precision": config.cache.precision,
        "batch_blocks": config.cache.batch_blocks,
        "acts_dtype": config.cache.acts_dtype,
        "grads_dtype": config.cache.grads_dtype,
        "compression": config.cache.compression,
        "seed": config.cache.seed,
        "rows_per_chunk": layout.rows_per_chunk,
        "rows_per_shard": layout.rows_per_shard,
    }
