"""The processes that train one SAE together; here the group of one, which needs no messages."""

import torch
from torch import Tensor


class Group:
    """One process alone. pipeline/distributed.py has the group of several."""

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place where there are several."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """All processes' tensors one after the other; their first axes may differ in length."""
        return tensor

    def meet(self) -> None:
        """Wait until all processes are here, and so until the first has written what it writes."""
        self.sum(torch.zeros(()))


ALONE = Group()
