"""Many workers, by dask.distributed: processes of this machine, or of a cluster that runs already.

`open_workers` yields a mapper for pipeline.cache.run_cache and pipeline.grid.run_grid. A worker
proves what it sees (pipeline.proof), then loads its inputs once; so does one that joins later or is
started again after its death. Nothing here decides what is computed.
"""

import logging
import multiprocessing.resource_tracker
import os
import signal
import sys
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import dask.config
from dask.system import CPU_COUNT
from distributed import Client, KilledWorker, LocalCluster, as_completed
from distributed.scheduler import NoWorkerError
from distributed.system import MEMORY_LIMIT
from distributed.utils import LoopRunner, silence_logging_cmgr

from pipeline.config import RunConfig
from pipeline.errors import ConfigError, PipelineError
from pipeline.proof import (
    Job,
    WorkerFacts,
    confirm_copy,
    describe_refused,
    expect_facts,
    find_differences,
    offer_token,
)
from pipeline.worker import WorkerSetup, gather_on_worker, plan_share

_CONNECT_TIMEOUT_S = 10  # for a scheduler to answer, and for its first worker
_CLOSE_TIMEOUT_S = 10
_NO_WORKERS_S = 300  # without any worker of this machine; each is started again when it dies


@runtime_checkable
class Numbered(Protocol):
    """A part of a job, such as a shard."""

    @property
    def index(self) -> int: ...


P = TypeVar("P", bound=Numbered)
R = TypeVar("R")


@contextmanager
def open_workers(
    run: RunConfig, job: Job, *, part: str = "shard", debug: bool = False
) -> Iterator["Workers"]:
    """A mapper over `run.workers` processes here, or over the cluster at `run.scheduler`.

    On leaving with an error or Ctrl-C, processes of this machine are killed at once; tasks of a
    cluster are withdrawn, and those in hand end by themselves, which harms nothing. Raises
    ConfigError if no scheduler answers, PipelineError if it has no workers or if any of them sees
    other packages, inputs or another work folder. Messages call a part of the job `part`.
    """
    with ExitStack() as stack:
        stack.enter_context(silence_logging_cmgr(logging.WARNING if debug else logging.CRITICAL))
        token = stack.enter_context(offer_token(job.work))
        if run.scheduler is None:
            client = stack.enter_context(_start_cluster(run, debug=debug))
        else:
            client = stack.enter_context(_connect(run.scheduler))
        setup = _prove(client, run, job, token)
        client.register_plugin(setup)
        if run.scheduler is not None:
            stack.callback(client.unregister_worker_plugin, setup.name)
        yield Workers(client, job.work, part, n_workers=len(setup.proven))


class Workers:
    """A mapper: one task per part of a job, on a client's workers."""

    def __init__(self, client: Client, work: Path, part: str, *, n_workers: int) -> None:
        self.n_workers = n_workers  # at the start
        self._client, self._work, self._part = client, work, part

    def __call__(self, function: Callable[[P], R], parts: Iterable[P]) -> Iterator[R]:
        """Results as they come. An error of a task ends all; a dead worker's parts are tried
        again, and one that keeps killing workers is reported when all others are done.
        """
        deadly = yield from self._run(function, list(parts))
        if len(deadly) > 1:  # dask blames every part that a dead worker had been given
            alone = deadly
            deadly = []
            for part in alone:
                deadly += yield from self._run(function, [part])
        if deadly:
            indices = ", ".join(str(part.index) for part in deadly)
            raise PipelineError(
                f"{self._part} {indices} in {self._work}: expected a worker that survives it, got "
                f"none in every try that run.retries allows. The other {self._part}s are kept: run "
                "the same command again, with fewer --workers or more run.worker_memory_gb if "
                "memory was short."
            )

    def _run(self, function: Callable[[P], R], parts: list[P]) -> Generator[R, None, list[P]]:
        """Yields results; returns the parts whose workers died too often."""
        # A scheduler knows tasks by their keys, those of other runs too.
        keys = {f"{self._part}-{part.index:05d}-{uuid.uuid4().hex}": part for part in parts}
        futures = set(self._client.map(function, list(keys.values()), key=list(keys), pure=False))
        deadly = []
        try:
            for future in as_completed(futures):
                try:
                    result = future.result()
                except KilledWorker:
                    deadly.append(keys[future.key])
                except NoWorkerError as error:
                    raise PipelineError(
                        f"workers of {self._work}: expected at least one, got none for "
                        f"{error.timeout:.0f} s. Run the same command again: what is done is kept."
                    ) from None
                else:
                    yield result
                finally:  # else dask computes it again if the worker that keeps the result dies
                    futures.discard(future)
                    future.release()
        finally:
            for future in futures:
                future.release()
        return deadly


def _prove(client: Client, run: RunConfig, job: Job, token: Path) -> WorkerSetup:
    """Let every worker prove what it sees; raises PipelineError with all that differs."""
    where = run.scheduler or "this machine"
    expected = expect_facts(job)
    answers: Any = client.run(gather_on_worker, job, token, on_error="return")
    if not answers:
        raise PipelineError(
            f"workers at {where}: expected at least one, got none. Start some with "
            f"`dask worker {where} --nthreads 1`, then run the same command again."
        )
    proven, refused = {}, {}
    for address, answer in answers.items():
        if not isinstance(answer, WorkerFacts):
            refused[address] = [f"{type(answer).__name__}: {answer}"]
            continue
        facts = confirm_copy(token, answer)
        proven[address] = facts
        if different := find_differences(expected, facts):
            refused[f"{address} on {facts.host}"] = different
    if refused:
        raise PipelineError(describe_refused(where, len(answers), refused))
    return WorkerSetup(run, job, token, proven)


@contextmanager
def _start_cluster(run: RunConfig, *, debug: bool) -> Iterator[Client]:
    share = plan_share(run, run.workers, n_cores=CPU_COUNT, memory_bytes=MEMORY_LIMIT)
    settings: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": run.retries,
        "distributed.scheduler.worker-saturation": 1.0,  # blame only the shard in hand
        "distributed.scheduler.no-workers-timeout": f"{_NO_WORKERS_S}s",
        # Dask has malloc return every freed tensor to the kernel: 30 times the page faults, and
        # half as much processor time again as without (a small model on a CPU).
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
    }
    loop = _start_loop()
    try:
        with dask.config.set(settings):
            cluster = LocalCluster(
                n_workers=run.workers,
                threads_per_worker=1,
                memory_limit=share.memory_bytes,
                dashboard_address=":0",
                silence_logs=logging.WARNING if debug else logging.CRITICAL,
                loop=loop.loop,
            )
        client = Client(cluster)
        try:
            yield client
        except BaseException:
            _kill_workers(cluster)
            raise
        finally:
            client.close(timeout=_CLOSE_TIMEOUT_S)
            try:
                cluster.close(timeout=_CLOSE_TIMEOUT_S)
            except TimeoutError:  # a worker that is just starting does not answer; all is computed
                _kill_workers(cluster)
    finally:
        loop.stop()


def _start_loop() -> LoopRunner:
    """Dask's event loop, in a thread that does not take SIGINT; nor do processes started from it.

    Ctrl-C goes to the whole process group. It is this process's: a worker would print a traceback,
    and while it still imports its libraries only an inherited mask can keep it from that.
    """
    _start_resource_tracker()
    loop = LoopRunner()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        loop.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return loop


def _start_resource_tracker() -> None:
    """Multiprocessing's helper, which would lift the mask of the thread that starts it.

    Without a word for the user if this process is ended at once: it cleans up all the same.
    """
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # inherited by what it starts
    try:
        multiprocessing.resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()


def _kill_workers(cluster: LocalCluster) -> None:
    """A worker asked to close would finish its shard first."""
    for nanny in cluster.workers.values():
        nanny.close_gracefully(reason="gsae-stopped")  # it starts no other
        if nanny.pid:
            os.kill(nanny.pid, signal.SIGKILL)


@contextmanager
def _connect(scheduler: str) -> Iterator[Client]:
    try:
        client = Client(scheduler, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        raise ConfigError(
            f"run.scheduler at {scheduler}: expected a running dask scheduler such as "
            f"tcp://host:8786, got {type(error).__name__}. Start one with `dask scheduler`."
        ) from None
    with client:
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=_CONNECT_TIMEOUT_S)
        yield client
