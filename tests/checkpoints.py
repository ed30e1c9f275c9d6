"""Makers of small random checkpoint folders as the hub has them: config, safetensors, tokenizer.

Weights are wide enough that attention, norms and biases all matter (an untrained model's 0.02
would leave blocks nearly linear), and the embeddings such that losses are a few nats at any width.
A folder is a pure function of the arguments.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

# Byte-level letters in the order in which a small vocabulary takes them.
_COMMON = "ĠetaoinshrdlucmfwypvbgkjqxzĊ.,0123456789"

_TEXT = (
    "def draw(self, value): return self.value if value is None else value\n"
    "the cat sat on the mat, and that was the end of the mat\n"
)


def save_gpt2(
    folder: Path,
    *,
    n_layers: int = 2,
    d_model: int = 16,
    n_heads: int = 2,
    context: int = 16,
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """GPT-2: learned positions, sequential blocks, LayerNorm, tied unembedding."""
    draw = _Draws(seed, dtype)
    tensors = {
        "transformer.wte.weight": draw.normal(vocab, d_model, scale=2 * d_model**-0.5),
        "transformer.wpe.weight": draw.normal(context, d_model, scale=d_model**-0.5),
        **draw.layer_norm("transformer.ln_f", d_model),
    }
    for layer in range(n_layers):
        block = f"transformer.h.{layer}"
        tensors |= draw.layer_norm(f"{block}.ln_1", d_model)
        tensors |= draw.layer_norm(f"{block}.ln_2", d_model)
        tensors |= draw.conv1d(f"{block}.attn.c_attn", d_model, 3 * d_model)
        tensors |= draw.conv1d(f"{block}.attn.c_proj", d_model, d_model)
        tensors |= draw.conv1d(f"{block}.mlp.c_fc", d_model, 4 * d_model)
        tensors |= draw.conv1d(f"{block}.mlp.c_proj", 4 * d_model, d_model)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": n_layers,
        "n_embd": d_model,
        "n_head": n_heads,
        "n_positions": context,
        "vocab_size": vocab,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return _save(folder, config, tensors, context=context)


def save_neox(
    folder: Path,
    *,
    n_layers: int = 2,
    d_model: int = 16,
    n_heads: int = 2,
    context: int = 16,
    vocab: int = 64,
    seed: int = 0,
    parallel: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """GPT-NeoX (Pythia): partial rotary positions, parallel or sequential blocks."""
    draw = _Draws(seed, dtype)
    tensors = {
        "gpt_neox.embed_in.weight": draw.normal(vocab, d_model),
        "embed_out.weight": draw.normal(vocab, d_model, scale=2 * d_model**-0.5),
        **draw.layer_norm("gpt_neox.final_layer_norm", d_model),
    }
    for layer in range(n_layers):
        block = f"gpt_neox.layers.{layer}"
        tensors |= draw.layer_norm(f"{block}.input_layernorm", d_model)
        tensors |= draw.layer_norm(f"{block}.post_attention_layernorm", d_model)
        tensors |= draw.linear(f"{block}.attention.query_key_value", d_model, 3 * d_model)
        tensors |= draw.linear(f"{block}.attention.dense", d_model, d_model)
        tensors |= draw.linear(f"{block}.mlp.dense_h_to_4h", d_model, 4 * d_model)
        tensors |= draw.linear(f"{block}.mlp.dense_4h_to_h", 4 * d_model, d_model)
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "num_hidden_layers": n_layers,
        "hidden_size": d_model,
        "num_attention_heads": n_heads,
        "intermediate_size": 4 * d_model,
        "max_position_embeddings": context,
        "vocab_size": vocab,
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.5,
        "rotary_emb_base": 10000,
        "use_parallel_residual": parallel,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return _save(folder, config, tensors, context=context)


def save_llama(
    folder: Path,
    *,
    n_layers: int = 2,
    d_model: int = 16,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    context: int = 16,
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Llama: rotary positions, grouped key and value heads, RMSNorm, gated MLP, no biases."""
    draw = _Draws(seed, dtype)
    d_head, d_mlp = d_model // n_heads, 3 * d_model
    tensors = {
        "model.embed_tokens.weight": draw.normal(vocab, d_model),
        "lm_head.weight": draw.normal(vocab, d_model, scale=2 * d_model**-0.5),
        **draw.rms_norm("model.norm", d_model),
    }
    for layer in range(n_layers):
        block = f"model.layers.{layer}"
        tensors |= draw.rms_norm(f"{block}.input_layernorm", d_model)
        tensors |= draw.rms_norm(f"{block}.post_attention_layernorm", d_model)
        for name, d_in, d_out in (
            ("self_attn.q_proj", d_model, n_heads * d_head),
            ("self_attn.k_proj", d_model, n_kv_heads * d_head),
            ("self_attn.v_proj", d_model, n_kv_heads * d_head),
            ("self_attn.o_proj", n_heads * d_head, d_model),
            ("mlp.gate_proj", d_model, d_mlp),
            ("mlp.up_proj", d_model, d_mlp),
            ("mlp.down_proj", d_mlp, d_model),
        ):
            tensors[f"{block}.{name}.weight"] = draw.matrix(d_out, d_in, fan_in=d_in)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": n_layers,
        "hidden_size": d_model,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "intermediate_size": d_mlp,
        "max_position_embeddings": context,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return _save(folder, config, tensors, context=context)


def save_tokenizer(folder: Path, *, vocab: int, context: int) -> Path:
    """A byte-level BPE of at most `vocab` tokens.

    Below 257 tokens it knows the commonest bytes only, and token 0 stands for all others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*_COMMON, *(letter for letter in alphabet if letter not in _COMMON)][: vocab - 1]
    ids = {END_OF_TEXT: 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if vocab > len(alphabet) + 1:
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def _save(folder: Path, config: dict, tensors: dict[str, torch.Tensor], *, context: int) -> Path:
    save_tokenizer(folder, vocab=config["vocab_size"], context=context)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class _Draws:
    """Random parameters from one seed, in the order in which they are asked for."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype)

    def matrix(self, *shape: int, fan_in: int) -> torch.Tensor:
        return self.normal(*shape, scale=1.2 * fan_in**-0.5)

    def linear(self, name: str, d_in: int, d_out: int) -> dict[str, torch.Tensor]:
        weight = self.matrix(d_out, d_in, fan_in=d_in)
        return {f"{name}.weight": weight, f"{name}.bias": self.normal(d_out, scale=0.2)}

    def conv1d(self, name: str, d_in: int, d_out: int) -> dict[str, torch.Tensor]:
        weight = self.matrix(d_in, d_out, fan_in=d_in)
        return {f"{name}.weight": weight, f"{name}.bias": self.normal(d_out, scale=0.2)}

    def layer_norm(self, name: str, d_model: int) -> dict[str, torch.Tensor]:
        return self.rms_norm(name, d_model) | {f"{name}.bias": self.normal(d_model, scale=0.3)}

    def rms_norm(self, name: str, d_model: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + self.normal(d_model, scale=0.3)}
