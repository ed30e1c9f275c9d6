"""Which device to run on."""

import torch

from pipeline.errors import ConfigError


def pick_device(name: str) -> str:
    """The device named, or for `auto` cuda where there is one, else cpu.

    Raises ConfigError if there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"run.device: expected auto, cpu, or a cuda device that is here, got {name} "
            f"({reason:.80})."
        ) from None
    return name
