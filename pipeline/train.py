"""Stage two: train every combination of beta, k and seed from one pass over cached activations.

    <out>/config.json     settings, steps, and what the caller says of the input
    <out>/summary.json    last metrics, by member
    <out>/<member>/       sae.safetensors, config.json, history.parquet
    <out>/live/<member>/  the same history as DVCLive writes it

Neither the language model nor the corpus is needed. A member's weights depend on its own settings
and the stream alone, never on which others train beside it, and on a CPU they are the same bit for
bit in every run.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from pipeline.config import TrainConfig
from pipeline.errors import TrainError
from pipeline.files import write_json
from pipeline.history import History
from pipeline.member import Member, plan_members, start_member, step_member
from pipeline.sae import StepMetrics, save_sae
from store.stream import Batch


class StepReport(NamedTuple):
    """Progress after one step of all members."""

    step: int  # from 1
    n_steps: int
    tokens: int  # rows read so far
    lr: float
    tokens_per_s: float  # rows per second, all members together, since the last logged step
    logged: bool  # on logged steps the metrics hold overlap and gradient_weight
    metrics: dict[str, StepMetrics]  # by member


def plan_steps(config: TrainConfig, n_rows: int) -> int:
    """Number of whole batches in config.tokens, or if that is null in config.epochs of n_rows.

    n_rows is what the store holds without exclude_positions. Raises TrainError where more tokens
    are asked for than that gives, or too few for one batch.
    """
    available = n_rows * config.epochs
    wanted = available if config.tokens is None else config.tokens
    if wanted > available:
        raise TrainError(
            f"train.tokens: expected at most {available} ({config.epochs} epochs of {n_rows} "
            f"rows), got {wanted}. Lower --tokens, raise train.epochs or cache more."
        )
    if wanted < config.batch_size:
        raise TrainError(
            f"train.batch_size: expected at most the {wanted} rows to train on, "
            f"got {config.batch_size}. Lower it or cache more."
        )
    return wanted // config.batch_size


def plan_lr(step: int, n_steps: int, *, lr: float, warmup: float, decay: float) -> float:
    """Learning rate of one step, counted from 0; warmup and decay are fractions of n_steps."""
    n_warmup, n_decay = round(n_steps * warmup), round(n_steps * decay)
    # 1) linear warm-up, short of lr while it lasts
    if step < n_warmup:
        return lr * (step + 1) / (n_warmup + 1)
    # 2) linear decay, which would be zero one step after the last
    if step >= n_steps - n_decay:
        return lr * (n_steps - step) / (n_decay + 1)
    # 3) between them, constant
    return lr


def train(
    config: TrainConfig,
    batches: Iterable[Batch],
    *,
    d_model: int,
    n_steps: int,
    out: Path,
    device: str | torch.device = "cpu",
    provenance: Mapping[str, Any] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> dict[str, StepMetrics]:
    """Train all members on the first n_steps batches and write the run to `out`.

    Returns the last metrics, by member. Loss: see `reconstruction_loss`; Adam with betas (0.9,
    0.999). `provenance` (hook, store, versions) goes into the configs as it is. Everything is
    written to a sibling of `out` that is renamed at the end, so that a run that fails leaves a
    former one as it was.

    Differs: smol-sae decays the learning rate along a cosine, and does not keep decoder rows at
    unit norm.

    Raises TrainError for a NaN or infinite loss, a batch that is not finite or not d_model wide,
    too few batches, an `out` that is no run folder or not writable, and another training run into
    `out`.
    """
    specs = plan_members(config)
    with _open_run(out) as work:
        members: list[Member] = []
        histories = [History(work / "live" / spec.name) for spec in specs]
        metrics: dict[str, StepMetrics] = {}
        step = tokens = tokens_at_log = 0
        time_at_log = time.perf_counter()

        for step, batch in enumerate(_take(batches, n_steps), start=1):
            _check_batch(batch, d_model=d_model, step=step)
            acts = batch.acts.to(device, torch.float32)
            grads = batch.grads.to(device, torch.float32)
            if not members:
                members = [start_member(spec, config, acts) for spec in specs]
            tokens += len(acts)
            logged = step == 1 or step % config.log_every == 0 or step == n_steps
            lr = plan_lr(
                step - 1,
                n_steps,
                lr=config.lr,
                warmup=config.lr_warmup_fraction,
                decay=config.lr_decay_fraction,
            )
            for member in members:
                metrics[member.spec.name] = step_member(
                    member, acts, grads, config=config, lr=lr, full=logged
                )

            tokens_per_s = (tokens - tokens_at_log) / (time.perf_counter() - time_at_log)
            report = StepReport(step, n_steps, tokens, lr, tokens_per_s, logged, dict(metrics))
            if logged:
                tokens_at_log, time_at_log = tokens, time.perf_counter()
                for spec, history in zip(specs, histories, strict=True):
                    history.log(_describe(report, spec.name))
            if on_step:
                on_step(report)

        if step < max(n_steps, 1):
            raise TrainError(
                f"activations for {out}: expected {n_steps} batches, got {step} ({tokens} rows). "
                f"Lower --tokens or cache more."
            )
        for member, history in zip(members, histories, strict=True):
            folder = work / member.spec.name
            save_sae(
                member.learner.sae, folder, training=_explain(member, config, n_steps, provenance)
            )
            history.close(folder / "history.parquet")
        write_json(work / "summary.json", {n: m._asdict() for n, m in metrics.items()})
        write_json(
            work / "config.json",
            {
                "train": config.model_dump(mode="json"),
                "members": [spec.name for spec in specs],
                "d_model": d_model,
                "n_steps": n_steps,
                "tokens": tokens,
                **(provenance or {}),
            },
        )
    return metrics


def _check_batch(batch: Batch, *, d_model: int, step: int) -> None:
    for name in ("acts", "grads"):
        tensor = getattr(batch, name)
        if tensor.ndim != 2 or tensor.shape[1] != d_model:
            raise TrainError(
                f"{name} at step {step}: expected [batch, {d_model}], got {list(tensor.shape)}."
            )
        bad = ~torch.isfinite(tensor).all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise TrainError(
                f"{name} at step {step}, block {int(batch.block[row])}, position "
                f"{int(batch.position[row])}: expected finite values, got NaN or Inf. "
                f"Cache these activations again with pipeline cache."
            )


def _take(batches: Iterable[Batch], n: int) -> Iterator[Batch]:
    """The first n, without asking for one more: the stream would read it from disk."""
    return (batch for _, batch in zip(range(n), batches, strict=False))


def _is_run(folder: Path) -> bool:
    """Whether `folder` holds what `train` writes and may therefore be replaced."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return all((folder / name / "config.json").is_file() for name in config["members"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _open_run(out: Path) -> Iterator[Path]:
    """Yield an empty sibling of `out` to write to; on success it takes the place of `out`.

    Where the body raises, the sibling stays, for a look at its live metrics, until the next run.
    """
    foreign = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if foreign and not _is_run(out):
        raise TrainError(
            f"run folder at {out}: expected an earlier run, an empty folder or nothing, got other "
            f"files, which would be lost. Choose another --out."
        )
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    work, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except Timeout:
        raise TrainError(
            f"run folder at {out}: expected no other writer, got one that holds {lock.lock_file}. "
            f"Wait for it, or choose another --out."
        ) from None
    except OSError as error:
        raise TrainError(f"run folder at {out}: expected a writable place, got: {error}.") from None
    try:
        yield work
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        work.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        lock.release()


def _describe(report: StepReport, name: str) -> dict[str, Any]:
    head = {"step": report.step, "tokens": report.tokens, "lr": report.lr}
    return head | {"tokens_per_s": report.tokens_per_s} | report.metrics[name]._asdict()


def _explain(
    member: Member, config: TrainConfig, n_steps: int, provenance: Mapping[str, Any] | None
) -> dict[str, Any]:
    settings = config.model_dump(
        mode="json", exclude={"betas", "ks", "seeds", "d_sae", "loss_tokens"}
    )
    return {**settings, "seed": member.spec.seed, "n_steps": n_steps, **(provenance or {})}
