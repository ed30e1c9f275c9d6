"""Attention that passes values as ever and gradients only from a position to itself.

The gradient of the loss summed over a block holds, at position i, the effect of x_i on its own
target and, through the keys and values that later positions read, on all of theirs. With the paths
between positions cut, one backward pass gives every position's own part alone.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from pipeline.errors import ModelError
from pipeline.model import LanguageModel, final_hidden
from pipeline.model.sites import Hook

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_NEEDED = ("hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z")
_exact: WeakSet[Any] = WeakSet()  # bridges whose own gradients were seen to be exact


def own_loss_hooks(model: LanguageModel) -> list[Hook]:
    """Hooks under which the backward pass of sum over i of L_i gives d L_i / d x_i at row i.

        scores_ij = scale q_i · R_i^T R_j sg(k_j)  +  [i = j] scale q_i · R_i^T R_i (k_i - sg(k_i))
        z_i       = sum over j of p_ij sg(v_j)  +  p_ii (v_i - sg(v_i))

    in every head of every block; sg stops gradients, and what is added is 0. L_i reads x_j, j < i,
    only through k_j and v_j, and these do not depend on x_i: as constants they change nothing of
    d L_i / d x_i, and what is left of the sum at x_i is L_i. R_i is the rotary matrix, whose
    R_i^T R_i is diag(cos_i² + sin_i²): 1, but for the rounding of float32 angles (or a scale of the
    architecture's own); without rotary positions it is 1.

    That this is the model's attention is measured on a few tokens when a model is first seen.
    Raises ModelError, naming the architecture, where it is not.
    """
    hooks: list[Hook] = []
    for layer, block in enumerate(model.bridge.blocks):
        name = f"blocks.{layer}.attn."
        inner = getattr(getattr(block, "attn", None), "original_component", None)
        scale = getattr(inner, "scaling", None)
        offered = [hook for hook in _NEEDED if name + hook in model.bridge.hook_dict]
        if not isinstance(scale, float) or len(offered) < len(_NEEDED):
            raise _not_offered(model, f"{', '.join(offered) or 'no hooks'} in block {layer}")
        hooks += _cut_attention(name, scale, name + "hook_cos" in model.bridge.hook_dict)
    if model.bridge not in _exact:
        _check_exact(model, hooks)
        _exact.add(model.bridge)
    return hooks


def _cut_attention(name: str, scale: float, rotary: bool) -> list[Hook]:
    """One block's hooks; they do nothing below the first tap, where there is no graph."""
    seen: dict[str, Tensor] = {}

    def keep(part: str) -> Callable[..., None]:
        def hook(value: Tensor, **_: Any) -> None:
            seen[part] = value.detach()

        return hook

    def cut(part: str) -> Callable[..., Tensor | None]:
        def hook(value: Tensor, **_: Any) -> Tensor | None:
            if not value.requires_grad:
                return None
            seen[part] = value - value.detach()
            return value.detach()

        return hook

    def add_own_keys(scores: Tensor, **_: Any) -> Tensor | None:
        q = seen.pop("q")
        if "k" not in seen:
            return None
        if rotary:
            q = q * _rotate_twice(seen.pop("cos"), seen.pop("sin"), q.shape[-1])
        own = scale * (q * _per_query_head(seen.pop("k"), q.shape[2])).sum(-1)
        return scores + own.transpose(1, 2).to(scores.dtype).diag_embed()

    def add_own_values(z: Tensor, **_: Any) -> Tensor | None:
        pattern = seen.pop("pattern")
        if "v" not in seen:
            return None
        own = pattern.diagonal(dim1=-2, dim2=-1).transpose(1, 2)[..., None]
        return z + own.to(z.dtype) * _per_query_head(seen.pop("v"), z.shape[2])

    rotation = ("cos", "sin") if rotary else ()
    return [
        *((f"{name}hook_{part}", keep(part)) for part in rotation),
        (f"{name}hook_q", keep("q")),
        (f"{name}hook_k", cut("k")),
        (f"{name}hook_v", cut("v")),
        (f"{name}hook_attn_scores", add_own_keys),
        (f"{name}hook_pattern", keep("pattern")),
        (f"{name}hook_z", add_own_values),
    ]


def _rotate_twice(
    cos: Float[Tensor, "blocks context d_rotary"],
    sin: Float[Tensor, "blocks context d_rotary"],
    d_head: int,
) -> Float[Tensor, "blocks context 1 d_head"]:
    """The diagonal of R_i^T R_i; channels that are not rotated have 1."""
    return pad(cos.square() + sin.square(), (0, d_head - cos.shape[-1]), value=1.0)[:, :, None]


def _per_query_head(
    values: Float[Tensor, "batch context kv_heads d_head"], n_heads: int
) -> Float[Tensor, "batch context heads d_head"]:
    """Keys or values as the query heads of their group read them."""
    return values.repeat_interleave(n_heads // values.shape[2], dim=2)


@torch.enable_grad()
def _check_exact(model: LanguageModel, hooks: list[Hook]) -> None:
    """Compare with one backward pass per position through the unchanged model, below all blocks."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.facts.d_vocab, (1, 5), generator=generator).to(model.device)
    start, hidden = _run_from_leaf(model, tokens, [])
    weights = torch.randn(hidden.shape, generator=generator).to(hidden)
    expected = torch.zeros_like(start)
    for i, value in enumerate((hidden * weights).sum(-1)[0]):
        expected[:, i] = torch.autograd.grad(value, start, retain_graph=True)[0][:, i]
    start, cut_hidden = _run_from_leaf(model, tokens, hooks)
    (got,) = torch.autograd.grad(cut_hidden, start, weights)
    error = ((got - expected).norm() / expected.norm()).item()
    if not (torch.equal(cut_hidden, hidden) and error <= _TOLERANCE.get(model.dtype, 5e-2)):
        raise _not_offered(model, f"hooks that give a relative error of {error:.2g}")


def _run_from_leaf(
    model: LanguageModel, tokens: Int[Tensor, "batch context"], hooks: list[Hook]
) -> tuple[Tensor, Tensor]:
    leaf: list[Tensor] = []

    def tap(value: Tensor, **_: Any) -> Tensor:
        leaf.append(value.detach().requires_grad_())
        return leaf[0]

    with torch.enable_grad():
        hidden = final_hidden(model.bridge, tokens, [("blocks.0.hook_resid_pre", tap), *hooks])
    return leaf[0], hidden


def _not_offered(model: LanguageModel, what: str) -> ModelError:
    return ModelError(
        f"own loss of {model.facts.architecture} at {model.facts.name}: expected TransformerLens "
        f"hooks on queries, keys, values, scores, pattern and z that cut attention between "
        f"positions, got {what}. Run with `--loss full`."
    )
