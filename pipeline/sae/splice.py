"""An SAE in place of the activations of a running language model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.sae.base import SparseAutoencoder

Hook = Callable[[Tensor, Any], Tensor]


def splice(sae: SparseAutoencoder, *, keep_positions: Sequence[int] = ()) -> Hook:
    """A TransformerLens hook that replaces activations by their reconstruction.

        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.7.hook_resid_post", splice(sae))])

    Without a gradient at hand the selection is plain TopK's. keep_positions are left as the model
    made them; name those that training left out.
    """

    def replace(
        acts: Float[Tensor, "batch position d_model"],
        hook: Any,  # noqa: ARG001  TransformerLens passes its hook point
    ) -> Float[Tensor, "batch position d_model"]:
        recon = sae(acts.flatten(0, 1)).recon.view_as(acts).to(acts.dtype)
        kept = torch.zeros(acts.shape[1], dtype=torch.bool, device=acts.device)
        kept[list(keep_positions)] = True
        return torch.where(kept[None, :, None], acts, recon)

    return replace
