"""Stage one: run the model once over the corpus; write activations and gradients, shard by shard.

`plan_cache` (pipeline.cache_plan) decides everything beforehand; `run_cache` maps one idempotent
function over the missing shards. The mapper is an argument: `map` in this process, that of
pipeline.cluster on dask. A task is a few paths and integers; the worker that runs it loads the
model once and keeps it.
"""

import functools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pipeline.cache_plan import CachePlan, CaptureSettings
from pipeline.capture import capture
from pipeline.corpus.reader import Corpus, open_corpus
from pipeline.device import pick_device
from pipeline.errors import CorpusError, ModelError
from pipeline.model import LanguageModel, hash_weights, load_model
from store.adoption import adopt_shards
from store.disk import check_room
from store.layout import ShardSpec
from store.lock import lock_work
from store.manifest import Manifest, StoreSpec
from store.publication import find_published, publish, sweep_aside
from store.work import committed_shards, read_commits, sweep
from store.writer import ShardRows, prepare_work, write_shard

Mapper = Callable[[Callable[[ShardSpec], int], Iterable[ShardSpec]], Iterable[int]]


def run_cache(
    plan: CachePlan,
    workers: AbstractContextManager[Mapper] | None = None,
    *,
    provenance: dict,
    overwrite: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Compute the missing shards and publish the store.

    A finished store of equal fingerprint is left as it is, or adopted from the work folder; of a
    damaged one the good shards are kept, by hash, and the others computed. Holds
    the work folder's lock throughout: StoreLocked names whoever else does. `workers` (none: this
    process) is entered only with that lock held, if shards are missing, and left before it is
    released. Killed at any moment, a second call computes only the shards that were not committed.
    """
    published = find_published(plan.spec, plan.out, overwrite=overwrite)
    work = plan.settings.work
    if published is not None:
        sweep_aside(work, plan.spec, plan.out)
        return published
    with lock_work(work):
        prepare_work(work, plan.spec)
        sweep(work)
        committed = committed_shards(work, plan.spec)
        missing = [shard for shard in plan.spec.layout.shards if shard.index not in committed]
        adopted = adopt_shards(plan.out, work, plan.spec, [shard.index for shard in missing])
        missing = [shard for shard in missing if shard.index not in adopted]
        if missing:
            check_room(work, plan.needed_bytes)
            compute = functools.partial(compute_shard, plan.settings, plan.spec)
            with workers or nullcontext(map) as mapper:
                for n_rows in mapper(compute, missing):
                    if on_progress:
                        on_progress(n_rows)
        return publish(work, plan.spec, plan.out, provenance=provenance, overwrite=overwrite)


def estimate_seconds(plan: CachePlan) -> float:
    """Time that the missing shards take on this machine, from one small batch of random tokens."""
    if not plan.missing:
        return 0.0
    settings, n_blocks = plan.settings, min(plan.settings.batch_blocks, 4)
    model = _load_model(settings)
    tokens = torch.randint(model.facts.d_vocab, (n_blocks, plan.spec.context_length + 1))
    run = functools.partial(capture, precision=settings.precision, loss=settings.loss)
    run(model, tokens, plan.spec.hooks)  # warms up
    started = time.perf_counter()
    run(model, tokens, plan.spec.hooks)
    seconds = time.perf_counter() - started
    n_rows = sum(shard.n_rows for shard in plan.missing)
    return seconds * n_rows / (n_blocks * plan.spec.context_length)


def compute_shard(settings: CaptureSettings, spec: StoreSpec, shard: ShardSpec) -> int:
    """Capture one shard's blocks and commit them; returns its number of rows. Idempotent."""
    if read_commits(settings.work, spec, (shard,)):  # by a worker that died before it could say so
        return shard.n_rows
    started = time.monotonic()
    settings = settings._replace(device=pick_device(settings.device))  # auto: as it is here
    model, corpus = prepare_worker(settings)
    rows = capture_shard(model, corpus, spec, shard, settings)
    facts = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(torch.empty(0, device=settings.device).device),
        "threads": torch.get_num_threads(),
        "batch_blocks": settings.batch_blocks,
        "seconds": round(time.monotonic() - started, 3),
    }
    write_shard(settings.work, spec, shard, rows, facts=facts)
    return shard.n_rows


def prepare_worker(settings: CaptureSettings) -> tuple[LanguageModel, Corpus]:
    """Model and corpus, loaded once per process. Raises ModelError or CorpusError for others than
    were planned for.
    """
    corpus = _open_corpus_once(settings.corpus, settings.corpus_fingerprint)
    return _load_model(settings), corpus


def capture_shard(
    model: LanguageModel,
    corpus: Corpus,
    spec: StoreSpec,
    shard: ShardSpec,
    settings: CaptureSettings,
) -> ShardRows:
    """The shard's rows in block-major order: every real position of its blocks."""
    parts = list(_capture_batches(model, corpus, spec, shard, settings))
    return ShardRows(
        acts={hook: torch.cat([part.acts[hook] for part in parts]) for hook in spec.hooks},
        grads={hook: torch.cat([part.grads[hook] for part in parts]) for hook in spec.hooks},
        tokens=torch.cat([part.tokens for part in parts]),
        loss=torch.cat([part.loss for part in parts]),
        block=torch.cat([part.block for part in parts]),
        position=torch.cat([part.position for part in parts]),
    )


def _capture_batches(
    model: LanguageModel,
    corpus: Corpus,
    spec: StoreSpec,
    shard: ShardSpec,
    settings: CaptureSettings,
) -> Iterator[ShardRows]:
    end = shard.first_block + shard.n_blocks
    for first in range(shard.first_block, end, settings.batch_blocks):
        blocks = corpus.read_blocks("train", first, min(settings.batch_blocks, end - first))
        tokens = torch.from_numpy(blocks.tokens).long().to(settings.device)
        lengths = torch.from_numpy(blocks.lengths).to(settings.device)
        captured = capture(
            model,
            tokens,
            spec.hooks,
            lengths=lengths,
            precision=settings.precision,
            loss=settings.loss,
        )
        position = torch.arange(spec.context_length).expand(len(tokens), -1)
        real = position < lengths.cpu()[:, None]
        block = (first + torch.arange(len(tokens)))[:, None].expand_as(position)
        yield ShardRows(
            acts={hook: captured.acts[hook].cpu()[real] for hook in spec.hooks},
            grads={hook: captured.grads[hook].cpu()[real] for hook in spec.hooks},
            tokens=tokens[:, :-1].cpu()[real].int(),
            loss=captured.loss.cpu()[real].float(),
            block=block[real].int(),
            position=position[real].int(),
        )


def _load_model(settings: CaptureSettings) -> LanguageModel:
    return _load_model_once(
        settings.checkpoint,
        settings.weights_hash,
        settings.weight_processing,
        pick_device(settings.device),
    )


@functools.lru_cache(maxsize=1)
def _load_model_once(
    checkpoint: Path, weights_hash: str, weight_processing: str, device: str
) -> LanguageModel:
    """The model whose weights were planned for: a worker may see another file at the same path."""
    found = hash_weights(checkpoint)
    if found != weights_hash:
        raise ModelError(
            f"weights at {checkpoint} on {socket.gethostname()}: expected hash "
            f"{weights_hash[:16]}, got {found[:16]}. Give every worker the same checkpoint."
        )
    return load_model(checkpoint, weight_processing=weight_processing, device=device)


@functools.lru_cache(maxsize=1)
def _open_corpus_once(folder: Path, fingerprint: str) -> Corpus:
    corpus = open_corpus(folder)
    if corpus.manifest.fingerprint != fingerprint:
        raise CorpusError(
            f"corpus at {folder} on {socket.gethostname()}: expected fingerprint "
            f"{fingerprint[:16]}, got {corpus.manifest.fingerprint[:16]}. Give all workers one."
        )
    return corpus
