"""Training as a terminal or a log file sees it: progress, and Ctrl-C that saves first."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import Invocation
from pipeline.cli.progress import token_progress
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.grid import ShareResult
    from pipeline.runs import Run
    from pipeline.train import StepReport


_STOPS = (signal.SIGINT, signal.SIGTERM)
_STOPPING = b"\nStopping after this step. Ctrl-C again stops at once.\n"


def train_on_workers(run: Invocation, store: str | Path, out: Path, *, overwrite: bool) -> "Run":
    """Train a share of the grid on each of dask's workers."""
    from pipeline.cluster import open_workers
    from pipeline.distributed import is_launched
    from pipeline.grid import plan_grid, run_grid
    from pipeline.provenance import describe_run

    config, settings = run.config.train, run.config.run
    if is_launched():
        raise ConfigError(
            "run.workers under torchrun: expected one of the two, got both. Drop --workers and "
            "--scheduler, or torchrun."
        )
    plan, job = plan_grid(
        config,
        out,
        source=store,
        cache_root=settings.shard_cache,
        cache_bytes=int(settings.shard_cache_gb * 1e9),
        layers=run.config.cache.layers,
        device=settings.device,
        model=run.config.model,
        provenance=describe_run(run.profile, run.config),
    )
    debug = bool(click.get_current_context().obj)
    workers = open_workers(settings, job, part="share", debug=debug)
    with ask_to_stop(job.stop), token_progress("train", None) as advance:

        def show(result: "ShareResult") -> None:
            members = result.share.members
            n_tokens = plan.n_steps * config.batch_size * len(members)
            advance(n_tokens, note=f"finished {', '.join(members)}")

        return run_grid(
            *(plan, job, config, out, workers),
            overwrite=overwrite,
            on_share=show,
            tell=lambda text: click.echo(text, err=True),
        )


@contextmanager
def step_progress(*, shown: bool = True) -> Iterator[Callable[["StepReport"], None]]:
    """Yield what shows a step; steps that an earlier process took count as done, not as fast.

    The total is of the pass in hand, of which each has its own progress. Whole blocks differ in
    their rows: for end-to-end members it goes by the steps so far, and is exact at the last.
    """
    if not shown:
        yield lambda report: None  # noqa: ARG005
        return
    with ExitStack() as stack:
        advance = stack.enter_context(token_progress("train", None))
        step = done = 0
        shown_at = time.monotonic()

        def show(report: "StepReport") -> None:
            nonlocal advance, step, done, shown_at
            if report.step <= step:  # of another pass
                stack.close()
                again = token_progress("train", None, since=shown_at)
                advance, done = stack.enter_context(again), 0
            if not done and report.step > 1:
                done = report.tokens - report.tokens // report.step
                advance(done, skipped=True)
            total = report.tokens * report.n_steps // report.step
            advance(report.tokens - done, note=describe_step(report), total=total)
            step, done, shown_at = report.step, report.tokens, time.monotonic()

        yield show


def describe_step(report: "StepReport") -> str:
    """The members' figures: on the line where there is one, else a line for each."""
    lines = [
        f"{name}: loss {m.loss:.2f} NMSE {m.nmse:.3f} L0 {m.l0:.1f} dead {m.dead_latents}"
        for name, m in report.metrics.items()
    ]
    return lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


@contextmanager
def ask_to_stop(pass_on: Callable[[], object] | None = None) -> Iterator[Callable[[], bool]]:
    """Yield what says whether Ctrl-C was pressed, or SIGTERM sent, as schedulers do.

    `pass_on` is called then, for those who cannot see it. The answer is said at once, by the first
    process of several. A second signal of the kind is handled as without this.
    """
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        signal.signal(number, before[signal.Signals(number)])
        if not asked and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, _STOPPING)  # the signal may have come while Python was writing there
        asked = True
        if pass_on:
            pass_on()

    before = {number: signal.getsignal(number) for number in _STOPS}
    for number in _STOPS:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number in _STOPS:
            signal.signal(number, before[number])


@contextmanager
def tell_stopped() -> Iterator[None]:
    """End the command with 130 and what a training that saved first says of it."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if not stopped.args:
            raise
        click.echo(stopped.args[0], err=True)
        sys.exit(130)
