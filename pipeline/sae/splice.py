"""An SAE in place of the activations of a running language model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.sae.base import SparseAutoencoder

Hook = Callable[[Tensor, Any], Tensor]


def splice(
    sae: SparseAutoencoder,
    *,
    tokens: Int[Tensor, "batch position"] | None = None,
    keep_positions: Sequence[int] = (),
) -> Hook:
    """A TransformerLens hook that replaces activations by their reconstruction.

        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.7.hook_resid_post", splice(sae))])

    Without a gradient at hand the selection is that of beta 0. keep_positions are left as the model
    made them; name those that training left out. A hook sees no token ids: where the SAE decodes
    with them (TokenizedSAE), give the very tokens of the run, `splice(sae, tokens=tokens)`, once
    for each run. Running the hook raises TrainError for such an SAE without them.
    """

    def replace(
        acts: Float[Tensor, "batch position d_model"],
        hook: Any,  # noqa: ARG001  TransformerLens passes its hook point
    ) -> Float[Tensor, "batch position d_model"]:
        ids = None if tokens is None else tokens.to(acts.device).flatten()
        recon = sae(acts.flatten(0, 1), None, ids).recon.view_as(acts).to(acts.dtype)
        kept = torch.zeros(acts.shape[1], dtype=torch.bool, device=acts.device)
        kept[list(keep_positions)] = True
        return torch.where(kept[None, :, None], acts, recon)

    return replace
