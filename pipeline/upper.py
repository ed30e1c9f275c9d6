"""The blocks above a hook, run from an activation there; those below never are."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.model.load import LanguageModel
from pipeline.model.sites import final_hidden


def find_lower_blocks(hook: str) -> int | None:
    """How many blocks lie below a hook; None unless all that is above reads it alone.

    resid_mid, attn_out and mlp_out do not say what goes around them.
    """
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    return None if found is None else int(found[1]) + (found[2] == "post")


def run_upper(
    model: LanguageModel,
    tokens: Int[Tensor, "batch context"],
    residual: Float[Tensor, "batch context d_model"],
    *,
    n_lower: int,
) -> Float[Tensor, "batch context d_model"]:
    """What the unembedding reads if `residual` leaves the lowest n_lower blocks, which do not run.

    tokens give the positions, the mask and the embedding, which is thrown away. Where n_lower is 0
    the residual replaces the embedding. (TransformerLens's own start_at_layer runs all blocks.)
    """
    residual = residual.to(model.dtype)

    def put(value: Tensor, **_: Any) -> Tensor:
        del value
        return residual

    hooks = [] if n_lower else [("blocks.0.hook_resid_pre", put)]
    with _skip_blocks(list(model.bridge.blocks)[:n_lower], residual):
        return final_hidden(model.bridge, tokens, hooks)


@contextmanager
def _skip_blocks(blocks: Sequence[nn.Module], residual: Tensor) -> Iterator[None]:
    """Inside, calling one of `blocks` gives the residual and runs nothing."""

    def skip(*_: Any, **__: Any) -> Tensor:
        return residual

    for block in blocks:
        # A bridge hands plain assignments on to the module that it wraps.
        object.__setattr__(block, "forward", skip)
    try:
        yield
    finally:
        for block in blocks:
            object.__delattr__(block, "forward")
