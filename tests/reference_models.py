"""GPT-2, GPT-NeoX and Llama written out from their equations, reading a checkpoint's safetensors.

Slow, plain torch in float64, with the graph kept from the embeddings to the loss. Says what the
activation and the gradient at a site are; shares no code with transformers, TransformerLens or the
package.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor


class ReferenceRun(NamedTuple):
    """One forward pass."""

    sites: dict[
        str, Tensor
    ]  # "blocks.0.hook_resid_pre" ...: [batch, context, d_model], in the graph
    loss: Tensor  # [batch, context], nats, in the graph


class _Weights:
    """The checkpoint's tensors in float64, and its configuration."""

    def __init__(self, folder: Path) -> None:
        self.tensors = {
            name: value.double() for name, value in load_file(folder / "model.safetensors").items()
        }
        self.config = json.loads((folder / "config.json").read_text())

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x W^T + b, with W stored [out, in]; no b where there is none."""
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def conv1d(self, x: Tensor, name: str) -> Tensor:
        """x W + b, with W stored [in, out] as GPT-2 does."""
        return x @ self[f"{name}.weight"] + self[f"{name}.bias"]

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return centred / scale * self[f"{name}.weight"] + self[f"{name}.bias"]

    def rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self[f"{name}.weight"]


class _Sites:
    """Puts replacements in place and notes the value at every site."""

    def __init__(self, patches: dict[str, Tensor]) -> None:
        self.patches = patches
        self.values: dict[str, Tensor] = {}

    def at(self, layer: int, site: str, value: Tensor) -> Tensor:
        name = f"blocks.{layer}.hook_{site}"
        # + 0 gives each site a node of its own: resid_post of a block is resid_pre of the next.
        self.values[name] = self.patches[name] if name in self.patches else value + 0.0
        return self.values[name]


def run_reference(
    folder: Path, tokens: Tensor, patches: dict[str, Tensor] | None = None
) -> ReferenceRun:
    """Sites and losses of tokens [batch, context + 1], with activations in `patches` replaced."""
    weights, sites = _Weights(folder), _Sites(patches or {})
    forward = {"gpt2": _gpt2, "gpt_neox": _neox, "llama": _llama}[weights.config["model_type"]]
    logits = forward(weights, tokens[:, :-1], sites)
    picked = logits.gather(-1, tokens[:, 1:, None])[..., 0]
    return ReferenceRun(sites.values, logits.logsumexp(-1) - picked)


def reference_gradients(run: ReferenceRun, real: Tensor | None = None) -> dict[str, Tensor]:
    """The gradient of the summed loss, over rows where `real`, at every site."""
    loss = run.loss if real is None else run.loss[real]
    grads = torch.autograd.grad(loss.sum(), list(run.sites.values()))
    return dict(zip(run.sites, grads, strict=True))


def _gpt2(w: _Weights, inputs: Tensor, sites: _Sites) -> Tensor:
    c, prefix = w.config, "transformer"
    embedding = w[f"{prefix}.wte.weight"].requires_grad_()
    x = embedding[inputs] + w[f"{prefix}.wpe.weight"][: inputs.shape[1]]
    for layer in range(c["n_layer"]):
        block, eps = f"{prefix}.h.{layer}", c["layer_norm_epsilon"]

        def attend(x: Tensor, block: str = block, eps: float = eps) -> Tensor:
            qkv = w.conv1d(w.layer_norm(x, f"{block}.ln_1", eps), f"{block}.attn.c_attn")
            q, k, v = (_split_heads(part, c["n_head"]) for part in qkv.chunk(3, -1))
            return w.conv1d(_attention(q, k, v), f"{block}.attn.c_proj")

        def mlp(x: Tensor, block: str = block, eps: float = eps) -> Tensor:
            hidden = w.conv1d(w.layer_norm(x, f"{block}.ln_2", eps), f"{block}.mlp.c_fc")
            inner = (2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)
            return w.conv1d(0.5 * hidden * (1 + inner.tanh()), f"{block}.mlp.c_proj")

        x = _block(x, layer, attend, mlp, sites)
    return w.layer_norm(x, f"{prefix}.ln_f", c["layer_norm_epsilon"]) @ embedding.T


def _neox(w: _Weights, inputs: Tensor, sites: _Sites) -> Tensor:
    c, eps = w.config, w.config["layer_norm_eps"]
    n_heads, d_head = c["num_attention_heads"], c["hidden_size"] // c["num_attention_heads"]
    cos, sin = _rotary(inputs.shape[1], int(d_head * c["rotary_pct"]), c["rotary_emb_base"])
    x = w["gpt_neox.embed_in.weight"].requires_grad_()[inputs]
    for layer in range(c["num_hidden_layers"]):
        block = f"gpt_neox.layers.{layer}"

        def attend(x: Tensor, block: str = block) -> Tensor:
            normed = w.layer_norm(x, f"{block}.input_layernorm", eps)
            qkv = w.linear(normed, f"{block}.attention.query_key_value")
            # Per head its query, key and value lie together: [batch, context, head, 3 * d_head].
            q, k, v = qkv.unflatten(-1, (n_heads, 3 * d_head)).transpose(1, 2).chunk(3, -1)
            z = _attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
            return w.linear(z, f"{block}.attention.dense")

        def mlp(x: Tensor, block: str = block) -> Tensor:
            normed = w.layer_norm(x, f"{block}.post_attention_layernorm", eps)
            hidden = w.linear(normed, f"{block}.mlp.dense_h_to_4h")
            activated = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            return w.linear(activated, f"{block}.mlp.dense_4h_to_h")

        x = _block(x, layer, attend, mlp, sites, parallel=c["use_parallel_residual"])
    return w.linear(w.layer_norm(x, "gpt_neox.final_layer_norm", eps), "embed_out")


def _llama(w: _Weights, inputs: Tensor, sites: _Sites) -> Tensor:
    c, eps = w.config, w.config["rms_norm_eps"]
    n_heads, n_kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    cos, sin = _rotary(inputs.shape[1], c["hidden_size"] // n_heads, c["rope_theta"])
    x = w["model.embed_tokens.weight"].requires_grad_()[inputs]
    for layer in range(c["num_hidden_layers"]):
        block = f"model.layers.{layer}"

        def attend(x: Tensor, block: str = block) -> Tensor:
            normed = w.rms_norm(x, f"{block}.input_layernorm", eps)
            q = _split_heads(w.linear(normed, f"{block}.self_attn.q_proj"), n_heads)
            k = _split_heads(w.linear(normed, f"{block}.self_attn.k_proj"), n_kv_heads)
            v = _split_heads(w.linear(normed, f"{block}.self_attn.v_proj"), n_kv_heads)
            shared = n_heads // n_kv_heads  # query heads 0 .. shared - 1 read key head 0, and so on
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
            z = _attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
            return w.linear(z, f"{block}.self_attn.o_proj")

        def mlp(x: Tensor, block: str = block) -> Tensor:
            normed = w.rms_norm(x, f"{block}.post_attention_layernorm", eps)
            gate = w.linear(normed, f"{block}.mlp.gate_proj")
            up = w.linear(normed, f"{block}.mlp.up_proj")
            return w.linear(gate * gate.sigmoid() * up, f"{block}.mlp.down_proj")

        x = _block(x, layer, attend, mlp, sites)
    return w.linear(w.rms_norm(x, "model.norm", eps), "lm_head")


def _block(
    x: Tensor,
    layer: int,
    attend: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
    sites: _Sites,
    *,
    parallel: bool = False,
) -> Tensor:
    """Attention, then an MLP that reads the sum (in sequence) or the block's input (parallel)."""
    before = sites.at(layer, "resid_pre", x)
    attn_out = sites.at(layer, "attn_out", attend(before))
    between = before + attn_out if parallel else sites.at(layer, "resid_mid", before + attn_out)
    mlp_out = sites.at(layer, "mlp_out", mlp(before if parallel else between))
    return sites.at(layer, "resid_post", between + mlp_out)


def _split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[batch, context, n_heads * d_head] to [batch, n_heads, context, d_head]."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [batch, n_heads, context, d_head], heads joined in what it returns."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


def _rotary(context: int, d_rotary: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [context, d_rotary]; angles in float32, as these models' own code has them."""
    frequency = 1.0 / base ** (torch.arange(0, d_rotary, 2).float() / d_rotary)
    angle = torch.arange(context).float()[:, None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos().double(), angle.sin().double()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d_rotary / 2) of each head's first d_rotary numbers."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, kept], -1)
