"""A dask worker's side: what it may use, how it proves what it sees, and its setup.

Nothing here decides what is computed.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from dask.system import CPU_COUNT
from distributed import Worker, WorkerPlugin
from distributed.system import MEMORY_LIMIT

from pipeline.config import RunConfig
from pipeline.device import pick_device, pin_device
from pipeline.errors import PipelineError
from pipeline.proof import (
    Job,
    WorkerFacts,
    describe_refused,
    expect_facts,
    find_differences,
    gather_facts,
)


class WorkerShare(NamedTuple):
    """What one worker of several on a machine may use."""

    threads: int  # of torch
    memory_bytes: int  # above it the worker is started again


def plan_share(run: RunConfig, n_workers: int, *, n_cores: int, memory_bytes: int) -> WorkerShare:
    """Cores and memory of a machine, shared equally unless `run` says otherwise. Pure."""
    memory = run.worker_memory_gb * 10**9 if run.worker_memory_gb else memory_bytes / n_workers
    return WorkerShare(run.threads or max(1, n_cores // n_workers), int(memory))


class WorkerSetup(WorkerPlugin):
    """Makes a worker ready for a job, or closes it if it does not see what the driver sees."""

    def __init__(
        self,
        run: RunConfig,
        job: Job,
        token: Path,
        proven: Mapping[str, WorkerFacts],
    ) -> None:
        self.name = f"gsae-{token.name}"
        self.expected = expect_facts(job)
        self.run, self.job, self.token = run, job, token
        self.proven = frozenset(proven)
        self.workers_of = Counter(facts.host for facts in proven.values())

    async def setup(self, worker: Worker) -> None:
        # Dask takes torch's memory for a leak: it would pause a healthy worker for good.
        worker.memory_manager.memory_pause_fraction = False
        worker.memory_manager.memory_spill_fraction = False
        # The thread that computes is the one whose number of threads and GPU count.
        executor = worker.executors["default"]
        try:
            await asyncio.get_running_loop().run_in_executor(
                executor, self._prepare, worker.address, worker.name, worker.state.nthreads
            )
        except BaseException:
            worker.loop.add_callback(worker.close, reason="gsae-refused")
            raise

    def _prepare(self, address: str, name: object, tasks_at_once: int) -> None:
        host = self.expected.host
        if address not in self.proven:
            facts = gather_facts(self.job, self.token, tasks_at_once)
            if different := find_differences(self.expected, facts):
                raise PipelineError(describe_refused(address, 1, {address: different}))
            host = facts.host
        share = plan_share(
            self.run,
            max(1, self.workers_of[host]),
            n_cores=CPU_COUNT,
            memory_bytes=MEMORY_LIMIT,
        )
        torch.set_num_threads(share.threads)
        device = pin_device(
            pick_device(self.job.device),
            worker=name,
            n_gpus=torch.cuda.device_count(),
            shared=self.run.scheduler is None or "CUDA_VISIBLE_DEVICES" not in os.environ,
        )
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # what "cuda" means to this thread from now on
        self.job.prepare()


def gather_on_worker(job: Job, token: Path, dask_worker: Worker | None = None) -> WorkerFacts:
    assert dask_worker is not None  # dask fills it in, by its name
    return gather_facts(job, token, dask_worker.state.nthreads)
