"""Sites: the activations that a hook name stands for, defined by what the model computes.

A hook's name is no proof of what it taps. In TransformerLens 4.3 GPT-2's hook_resid_mid carries
only the branch into the MLP (replacing it leaves the skip path alone), and where a norm follows
the sum, the outputs of attention and MLP are not what is added. Here a site is the whole value
that the equations name, and a loaded model offers it only if they hold:

    resid_mid = resid_pre + attn_out    resid_post = resid_mid + mlp_out      blocks in sequence
    resid_post = resid_pre + attn_out + mlp_out             parallel blocks, without a resid_mid
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.model.folder import ModelFacts

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")

# A name, and function(value, hook=...) that may return a replacement.
Hook = tuple[str, Callable[..., Tensor | None]]

_OUTSIDE_BLOCKS = {"embed", "pos_embed", "hook_embed", "hook_pos_embed", "ln_final", "unembed"}
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def name_site(layer: int, site: str) -> str:
    """The TransformerLens name that stands for a site: blocks.7.hook_resid_post."""
    return f"blocks.{layer}.hook_{site}"


def resolve_hooks(hook: str, layers: Sequence[int], facts: ModelFacts) -> tuple[str, ...]:
    """Canonical TransformerLens names of `hook` at `layers`, in the order given, without repeats.

    `hook` is a site (resid_post), a name inside a block (hook_resid_post, ln1.hook_out), a full
    name (blocks.7.hook_resid_post, with layers (7,)) or one outside the blocks (ln_final.hook_out,
    whatever the layers). Raises ModelError, listing what exists, for a layer, site or hook that
    config.json shows the model to lack; what only the loaded model knows, `check_hooks` checks.
    """
    if hook.split(".")[0] in _OUTSIDE_BLOCKS:
        return (hook,)
    full = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if full and tuple(layers) not in ((), (int(full[1]),)):
        raise ModelError(
            f"hook at cache.hook: expected a name in layer {', '.join(map(str, layers))}, got "
            f"{hook!r}. Run with `--layer {full[1]}`, or with `--hook {full[2]}`."
        )
    layers, inside = ([int(full[1])], full[2]) if full else (list(dict.fromkeys(layers)), hook)
    for layer in layers:
        if not 0 <= layer < facts.n_layers:
            last = facts.n_layers - 1
            raise ModelError(
                f"layer at cache.layers: expected 0 to {last} ({facts.name} has {facts.n_layers} "
                f"blocks), got {layer}. Run with `--layer {last}`, for example."
            )
    _check_inside(inside, facts)
    name = inside if "hook_" in inside else f"hook_{inside}"
    return tuple(f"blocks.{layer}.{name}" for layer in layers)


def _check_inside(inside: str, facts: ModelFacts) -> None:
    site = inside.removeprefix("hook_")
    offered = [name for name in SITES if name != "resid_mid" or not facts.parallel_blocks]
    if site in offered or (site not in SITES and "hook_" in inside):
        return
    why = "its blocks are parallel, so " if site in SITES else ""
    guess = difflib.get_close_matches(site, offered, n=1) or ["resid_post"]
    raise ModelError(
        f"hook at cache.hook: {why}expected {', '.join(offered)} or a TransformerLens hook name, "
        f"got {inside!r}. Run with `--hook {guess[0]}`."
    )


def final_hidden(
    bridge: Any, tokens: Int[Tensor, "batch context"], hooks: Sequence[Hook] = ()
) -> Float[Tensor, "batch context d_model"]:
    """Run the blocks under `hooks`; returns what the unembedding reads.

    The unembedding itself gets the last position only: the logits of all are the memory peak.
    """
    kept: list[Tensor] = []

    def keep(hidden: Tensor, **_: Any) -> Tensor:
        kept.append(hidden)
        return hidden[:, -1:]

    with bridge.hooks(fwd_hooks=[*hooks, ("unembed.hook_in", keep)]):
        bridge(tokens, return_type=None, use_cache=False)
    assert len(kept) == 1, f"the unembedding ran {len(kept)} times"
    return kept[0]


def find_sites(
    bridge: Any, tokens: Int[Tensor, "batch context"], *, n_layers: int, d_model: int
) -> frozenset[str]:
    """Names of the sites, of all layers, at which the model's values satisfy the equations."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(value: Tensor, **_: Any) -> None:
            if value.shape == (*tokens.shape, d_model):
                seen[name] = value

        return hook

    existing = bridge.hook_dict
    names = [name_site(layer, site) for layer in range(n_layers) for site in SITES]
    with torch.no_grad():
        final_hidden(bridge, tokens, [(name, keep(name)) for name in names if name in existing])
    found: set[str] = set()
    for layer in range(n_layers):
        values = {site: seen.get(name_site(layer, site)) for site in SITES}
        found |= {name_site(layer, site) for site in _consistent_sites(**values)}
    return frozenset(found)


def _consistent_sites(
    resid_pre: Tensor | None,
    resid_mid: Tensor | None,
    resid_post: Tensor | None,
    attn_out: Tensor | None,
    mlp_out: Tensor | None,
) -> list[str]:
    if resid_pre is None or resid_post is None:
        return []
    ends = ["resid_pre", "resid_post"]
    if attn_out is None or mlp_out is None:
        return ends
    if not _close(resid_pre + attn_out + mlp_out, resid_post):
        return ends
    if resid_mid is None:
        return [*ends, "attn_out", "mlp_out"]
    return [*SITES] if _close(resid_pre + attn_out, resid_mid) else ends


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE.get(b.dtype, 2e-2) * b.abs().max())
