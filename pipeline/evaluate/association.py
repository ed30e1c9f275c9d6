"""Which tokens a direction of the residual stream raises, read straight off the unembedding."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.errors import ConfigError, ModelError
from pipeline.model import LanguageModel

_LARGE = 1e3  # a probe beside which the norm's epsilon is nothing
_ROWS_AT_ONCE = 64  # 64 rows of GPT-2's vocabulary are 13 MB


def check_tokens(model: LanguageModel, n: int) -> None:
    """Raise ConfigError unless n associated tokens leave others in the model's vocabulary."""
    d_vocab = len(model.unembedding.weight)
    if n >= d_vocab:
        raise ConfigError(
            f"evidence.steering_tokens: expected fewer than the {d_vocab} tokens of "
            f"{model.facts.name}, got {n}. Run with `--set evidence.steering_tokens=<tokens>`."
        )


def find_norm(model: LanguageModel) -> nn.Module:
    """The norm before the unembedding; raises ModelError where there is none by its name."""
    norm = getattr(model.bridge, "ln_final", None)
    if norm is None:
        raise ModelError(
            f"final norm of {model.facts.name}: expected ln_final, got none. Leave steering out "
            "with `--set evidence.steering_latents=0`."
        )
    return norm


@torch.no_grad()
def read_direct_map(model: LanguageModel) -> Float[Tensor, "d_model d_vocab"]:
    """W_U with the final norm in it, centred: what a direction adds to the logits, but for the
    norm's division by the residual stream's size.

        W[m, v] = g_m W_U[v, m]                  g: the final norm's weight
        W[m, v] -= mean over m of W[m, v]        where that norm subtracts the mean (LayerNorm)
        W[m, v] -= mean over v of W[m, v]        a constant on all logits changes no probability

    (Olmo et al. 2024, Fig. 5, whose W_U TransformerLens has folded and centred.) The norm is
    measured, not looked up: LayerNorm, RMSNorm and those already folded give the same map.

    Float32, or the model's own numbers where those are wider. Raises what `find_norm` does.
    """
    gain, centres = _probe_norm(find_norm(model), model)
    direct = model.unembedding.weight.to(gain.dtype).T * gain[:, None]
    if centres:
        direct = direct - direct.mean(0)
    return direct - direct.mean(1, keepdim=True)


def associate(
    W_dec: Float[Tensor, "latents d_model"],
    direct: Float[Tensor, "d_model d_vocab"],
    n: int,
) -> Int[Tensor, "latents n"]:
    """The n tokens with the largest (W^T d_i)_v for each row d_i of W_dec, largest first.

    W is `read_direct_map`'s. (Olmo et al. 2024, Fig. 5, which leaves n open.)
    """
    pieces = W_dec.detach().to(direct.dtype).split(_ROWS_AT_ONCE)
    return torch.cat([(rows @ direct).topk(n, dim=-1).indices for rows in pieces])


def _probe_norm(norm: nn.Module, model: LanguageModel) -> tuple[Tensor, bool]:
    """The weight of a norm, and whether it subtracts the mean.

    At x = ±c in turns, mean 0 and root mean square c, a norm is g x / c + b; adding a constant to x
    changes nothing where the mean is subtracted.
    """
    width = model.facts.d_model
    assert width % 2 == 0, "signs in turns have mean 0 only where they pair up"
    sign = torch.ones(width, device=model.device, dtype=model.dtype)
    sign[1::2] = -1
    up, down, shifted = (
        norm(_LARGE * probe[None, None])[0, 0] for probe in (sign, -sign, sign + 0.5)
    )
    gain = (up - down) / 2 * sign
    centres = torch.allclose(up, shifted, rtol=1e-2, atol=1e-2 * gain.abs().max().item())
    return gain.to(torch.promote_types(gain.dtype, torch.float32)), centres
