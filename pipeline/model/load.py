"""Loading: weights in, a frozen TransformerLens bridge out, checked against the plain model."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.model.folder import (
    ModelFacts,
    list_weights,
    load_tokenizer,
    one_line,
    quiet,
    read_facts,
)
from pipeline.model.sites import SITES, final_hidden, find_sites
from pipeline.model.unembed import Unembedding, reduce_precision, row_losses

# Nats per token; transformers' own softmax is float32 even in a float64 model.
_LOSS_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


class LanguageModel(NamedTuple):
    """A loaded model with frozen parameters, in evaluation mode."""

    bridge: Any  # transformer_lens TransformerBridge
    facts: ModelFacts
    unembedding: Unembedding
    sites: frozenset[str]  # names of the hooks at which it was seen to offer a site
    weight_processing: str  # raw | folded
    device: torch.device
    dtype: torch.dtype


def load_model(
    folder: Path,
    *,
    weight_processing: str = "raw",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """Load a checkpoint, freeze it, and check that its losses are those of the plain model.

    weight_processing "folded" does what HookedTransformer.from_pretrained did: layer norms are
    folded into the maps that read them, and the maps that write to the residual stream (of
    LayerNorm models; RMSNorm keeps the mean) and the unembedding are centred. With dtype float64
    all arithmetic is float64 but for rotary angles and the folding.

    Raises ModelError if weights are missing, damaged or not those of config.json, if
    TransformerLens does not know the architecture, or if what it (or the chunked cross-entropy)
    computes is not what transformers computes.
    """
    if weight_processing not in ("raw", "folded"):
        raise ValueError(f"weight_processing: expected raw or folded, got {weight_processing!r}")
    facts = read_facts(folder)
    device = torch.device(device)
    tokens = _draw_probe(facts).to(device)
    with quiet():
        plain = _load_plain(folder, facts, dtype).to(device)
        expected = _plain_losses(plain, tokens)
        _fuse_gelu(plain)
        bridge = _bridge(plain, folder, facts, weight_processing == "folded")
    for module in bridge.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    unembedding = _read_unembedding(bridge, folder, facts)
    _check_losses(_bridged_losses(bridge, unembedding, tokens), expected, dtype, folder, facts)
    sites = find_sites(bridge, tokens[:, :-1], n_layers=facts.n_layers, d_model=facts.d_model)
    return LanguageModel(bridge, facts, unembedding, sites, weight_processing, device, dtype)


def check_hooks(model: LanguageModel, hooks: Sequence[str]) -> None:
    """Raise ModelError, listing what exists, if the model lacks one of `hooks`.

    A hook with a site's name counts as lacking where the model was seen not to offer that site.
    """
    for hook in hooks:
        if hook in model.sites:
            continue
        existing = [name for name in model.bridge.hook_dict if not _names_site(name)]
        if hook in existing:
            continue
        block = ".".join(hook.split(".")[:2]) + "."
        sites = sorted(name for name in model.sites if name.startswith(block))
        offered = [*(sites or sorted(model.sites)), *difflib.get_close_matches(hook, existing)]
        raise ModelError(
            f"hook at cache.hook: expected one that {model.facts.name} offers "
            f"({', '.join(offered[:10])}), got {hook!r}. Run with `--hook resid_post`."
        )


def _names_site(hook: str) -> bool:
    return re.fullmatch(rf"blocks\.\d+\.hook_({'|'.join(SITES)})", hook) is not None


def _load_plain(folder: Path, facts: ModelFacts, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    for path in list_weights(folder):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"weights at {path}: expected a whole safetensors file, got {one_line(error)}. "
                "Copy or fetch the checkpoint again."
            ) from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",  # the one that TransformerLens reproduces
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # shapes, and each architecture's own checks
        raise _disagreement(folder, one_line(error)) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise _disagreement(folder, f"{len(missing)} missing, such as {missing[0]}")
    beyond = sorted(key for key in report["unexpected_keys"] if _layer_of(key) >= facts.n_layers)
    if beyond:
        raise _disagreement(folder, f"{len(beyond)} of further layers, such as {beyond[0]}")
    return model.eval()


def _disagreement(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"weights at {folder}: expected the tensors that config.json describes, got {what}. "
        "Copy or fetch the checkpoint again."
    )


def _layer_of(key: str) -> int:
    """The first number among a tensor's name parts, or -1."""
    return next((int(part) for part in key.split(".") if part.isdigit()), -1)


def _bridge(plain: Any, folder: Path, facts: ModelFacts, folded: bool) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    boot = TransformerBridge.boot_transformers  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = load_tokenizer(folder)
    try:
        bridge = boot(
            str(folder.resolve()),
            hf_model=plain,
            tokenizer=tokenizer,
            device=str(plain.device),
            dtype=plain.dtype,
        )
        if folded:
            bridge.process_weights()
    except Exception as error:  # each adapter refuses in its own way
        raise ModelError(
            f"architecture at {folder}: expected one that TransformerLens bridges, got "
            f"{facts.architecture} ({one_line(error)}). Give another checkpoint with `--model`."
        ) from error
    if plain.dtype == torch.float64:
        _widen_to_float64(bridge)
    _drop_patterns(bridge)
    return bridge.eval()


def _fuse_gelu(plain: Any) -> None:
    """One kernel for GPT-2's activation instead of eight."""
    from transformers.activations import NewGELUActivation

    for module in plain.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _widen_to_float64(bridge: Any) -> None:
    """Compute in float64 the norms and softmax that are float32 in any model (Llama's are)."""
    from transformer_lens.model_bridge import AttentionBridge, NormalizationBridge

    for module in bridge.modules():
        if isinstance(module, NormalizationBridge):
            module.use_native_layernorm_autograd = False
        if isinstance(module, AttentionBridge):
            module._masked_softmax = _softmax  # pyright: ignore[reportAttributeAccessIssue]


def _softmax(scores: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ARG001
    return scores.softmax(-1)


def _drop_patterns(bridge: Any) -> None:
    """Let go of each layer's attention pattern, which a bridge keeps until the next forward pass.

    [batch, heads, context, context] per layer: 300 MB for GPT-2 small at 8 x 256.
    """
    from transformer_lens.model_bridge import AttentionBridge

    def drop_after(attention: Any) -> None:
        def drop(_: Tensor, hook: Any) -> None:  # noqa: ARG001
            attention._pattern = None

        attention.hook_out.add_perma_hook(drop)

    for module in bridge.modules():
        if isinstance(module, AttentionBridge):
            drop_after(module)


def _read_unembedding(bridge: Any, folder: Path, facts: ModelFacts) -> Unembedding:
    layer = getattr(getattr(bridge, "unembed", None), "original_component", None)
    if not isinstance(layer, nn.Linear) or layer.in_features != facts.d_model:
        raise ModelError(
            f"unembedding at {folder}: expected one linear map from {facts.d_model} to the "
            f"vocabulary, got {layer}. Give another checkpoint with `--model`."
        )
    bias = layer.bias.detach() if layer.bias is not None and layer.bias.any() else None
    unembedding = Unembedding(layer.weight.detach(), bias)
    narrow = layer.weight.itemsize < 4
    return reduce_precision(unembedding, layer.weight.dtype) if narrow else unembedding


def _draw_probe(facts: ModelFacts) -> Tensor:
    context = min(8, facts.context_length or 8)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(facts.d_vocab, (2, context + 1), generator=generator)


def _plain_losses(plain: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = plain(tokens[:, :-1], use_cache=False).logits
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]


def _bridged_losses(bridge: Any, unembedding: Unembedding, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = final_hidden(bridge, tokens[:, :-1])
    targets = tokens[:, 1:]
    return row_losses(hidden.flatten(0, 1), targets.flatten(), unembedding).loss.view_as(targets)


def _check_losses(
    losses: Tensor, expected: Tensor, dtype: torch.dtype, folder: Path, facts: ModelFacts
) -> None:
    if not expected.isfinite().all():
        raise ModelError(
            f"weights at {folder}: expected finite losses, got NaN or Inf. Copy or fetch the "
            "checkpoint again."
        )
    tolerance = _LOSS_TOLERANCE.get(dtype, 0.2)
    difference = (losses - expected).abs().max().item()
    if not difference <= tolerance:
        raise ModelError(
            f"losses of {facts.architecture} at {folder}: expected transformers' to {tolerance} "
            f"nats, got a difference of {difference:.3g} (scaled or capped logits are not "
            "supported). Give another checkpoint with `--model`."
        )
