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


def pin_device(name: str, *, worker: object, n_gpus: int, shared: bool) -> str:
    """The device of one of several workers: `cuda` becomes the worker's own GPU, in turns.

    `shared`: the workers of a machine all see the same `n_gpus` and are told apart by their whole
    number; otherwise each sees its own GPU first, as dask-cuda arranges. A device with a number,
    or another kind of device, is what was asked for.
    """
    if name != "cuda":
        return name
    number = str(worker)
    own = int(number) % n_gpus if shared and number.isdecimal() and n_gpus else 0
    return f"cuda:{own}"
