"""Which device to run on."""

from typing import Literal

import torch

from pipeline.errors import ConfigError


def pick_device(name: str) -> str:
    """The device named, or for `auto` cuda where there is one, else cpu.

    Raises ConfigError if there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=name).device.type not in ("cpu", "cuda"):
            raise RuntimeError("nothing here runs there")
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"run.device: expected auto, cpu, or a cuda device that is here, got {name} "
            f"({reason:.80})."
        ) from None
    return name


def pick_precision(
    name: Literal["float32", "bfloat16", "auto"], device: str | torch.device
) -> Literal["float32", "bfloat16"]:
    """The precision named, or for `auto` bfloat16 where the hardware multiplies it fast.

    That is CUDA from compute capability 8 on, and a CPU with AMX or AVX512-BF16.
    """
    if name != "auto":
        return name
    if torch.device(device).type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


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
