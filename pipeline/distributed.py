"""One SAE trained by several processes, as torchrun starts them; each gives its rows of a batch.

    torchrun --nproc-per-node 2 -m pipeline train

Gloo carries the messages between CPUs, NCCL those between GPUs. A process that ends, for whatever
reason, ends the others: their next message fails, and torchrun stops them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import ConfigError, TrainError
from pipeline.sae.group import ALONE, Group

# A process waits so long for one that reads a slow remote, or writes a checkpoint.
_TIMEOUT_S = 600
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets


class Place(NamedTuple):
    """Where this process stands."""

    group: Group  # the processes that train together
    device: str  # of this process


class DistributedGroup(Group):
    """The processes of torch.distributed's default group, which is open.

    All methods wait for all processes, which have to call them in the same order, and raise
    TrainError where another one has ended or does not answer in time.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place, the same bits in each of them."""
        packed = tensor.contiguous()
        with _explain_failure(f"process {self.rank} of {self.world_size}"):
            dist.all_reduce(packed)
        return tensor if packed is tensor else tensor.copy_(packed)

    def gather(self, tensor: Tensor) -> Tensor:
        """All processes' tensors one after the other; their first axes may differ in length."""
        lengths = torch.zeros(self.world_size, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = len(tensor)
        n_rows: list[int] = self.sum(lengths).tolist()
        padded = tensor.new_zeros(max(n_rows), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in n_rows]
        with _explain_failure(f"process {self.rank} of {self.world_size}"):
            dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, n_rows, strict=True)])


@contextmanager
def open_group(device: str, *, timeout_s: float = _TIMEOUT_S) -> Iterator[Place]:
    """The group that torchrun's environment variables describe; without them, this process alone.

    `cuda` becomes the GPU of LOCAL_RANK. A message that takes longer than `timeout_s` is an error.
    Raises ConfigError for more processes than GPUs, TrainError if not all processes arrive.
    """
    if not is_launched():
        yield Place(ALONE, device)
        return
    device = _pick_own_device(device)
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    with _explain_failure(f"process {rank} of {world_size}"):
        # With both, a number on a CPU can be summed without waiting for a GPU's queue.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
            timeout=timedelta(seconds=timeout_s),
        )
    try:
        yield Place(DistributedGroup(), device)
    finally:
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether torchrun started this process together with others."""
    return all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def _pick_own_device(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    local, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device != "cuda" or local >= n_gpus:
        raise ConfigError(
            f"run.device for process {local} of this machine: expected cuda and a GPU for each "
            f"process, got {device} and {n_gpus} GPUs. Lower --nproc-per-node, or pass --device "
            "cuda."
        )
    torch.cuda.set_device(local)  # what NCCL uses
    return f"cuda:{local}"


@contextmanager
def _explain_failure(where: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of torch.distributed, whose own errors are RuntimeErrors too
        reason = str(error).splitlines()[0]
        raise TrainError(
            f"{where}: expected messages from the others, got none ({reason:.160}). Run the same "
            "command again: it goes on from the last checkpoint."
        ) from error
