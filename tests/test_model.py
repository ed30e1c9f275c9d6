"""Loading, and hooks by name: what works and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.model import (
    SITES,
    ModelFacts,
    check_hooks,
    hash_weights,
    list_weights,
    load_model,
    load_tokenizer,
    name_site,
    read_facts,
    resolve_hooks,
)
from pipeline.model.sites import _consistent_sites
from tests.checkpoints import save_gpt2
from tests.refusals import refuse


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("pristine"), n_layers=3)


@pytest.fixture
def gpt2(pristine, tmp_path):
    """A GPT-2 checkpoint to spoil."""
    return shutil.copytree(pristine, tmp_path / "gpt2")


@pytest.fixture(scope="module")
def loaded(pristine):
    return load_model(pristine)


def split_weights(folder: Path) -> None:
    """Turn model.safetensors into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_several_files(gpt2, loaded):
    split_weights(gpt2)
    first, second = list_weights(gpt2)
    assert torch.equal(load_model(gpt2).unembedding.weight, loaded.unembedding.weight)
    second.unlink()
    refuse("expected its 2 files, got 1 missing .*00002-of-00002", load_model, gpt2)
    first.unlink()
    refuse("got 2 missing", hash_weights, gpt2)


def test_loading_freezes_and_says_nothing(gpt2, capfd):
    model = load_model(gpt2)
    modules = list(model.bridge.modules())
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    assert len(parameters) > 20
    assert not any(parameter.requires_grad for parameter in parameters)
    assert not any(module.training for module in modules)
    assert model.facts == read_facts(gpt2)
    assert model.weight_processing == "raw"
    assert model.sites == {name_site(layer, site) for layer in range(3) for site in SITES}
    assert capfd.readouterr() == ("", "")


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


# What is done to the folder, what the message says.
SPOILED = {
    "empty": (lambda f: cut(f / "model.safetensors", 0), "expected a whole safetensors file"),
    "half": (lambda f: cut(f / "model.safetensors", 9000), "expected a whole safetensors file"),
    "a byte short": (lambda f: cut(f / "model.safetensors", -1), "a whole safetensors file"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle" * 9),
        "a whole safetensors file",
    ),
    "a tensor missing": (
        lambda f: change_tensors(f, lambda t: t.pop("transformer.h.1.mlp.c_fc.weight")),
        r"1 missing, such as transformer\.h\.1\.mlp\.c_fc\.weight",
    ),
    "NaN": (
        lambda f: change_tensors(f, lambda t: t["transformer.ln_f.weight"].fill_(torch.nan)),
        "expected finite losses, got NaN or Inf",
    ),
    "more layers": (lambda f: change_config(f, n_layer=4), r"missing, such as transformer\.h\.3"),
    "fewer layers": (lambda f: change_config(f, n_layer=2), r"further layers, .*transformer\.h\.2"),
    "other width": (lambda f: change_config(f, n_embd=32), "expected the tensors that config.json"),
    "other vocabulary": (lambda f: change_config(f, vocab_size=65), "expected the tensors that"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer at .*got none"),
    "bad tokenizer": (
        lambda f: cut(f / "tokenizer.json", 99),
        "tokenizer at .* transformers loads",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_checkpoints_are_refused(gpt2, case, capfd):
    spoil, words = SPOILED[case]
    spoil(gpt2)
    refuse(words, load_model, gpt2)
    assert capfd.readouterr() == ("", "")


def save_with_transformers(config, folder: Path, scale: float = 1.0) -> Path:
    """A randomly initialised model of any architecture, with a tokenizer beside it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.get_input_embeddings().weight.data.mul_(scale)
    save_gpt2(folder)
    model.save_pretrained(folder)
    return folder


def test_architectures_without_a_bridge_are_refused(tmp_path):
    from transformers import CTRLConfig

    config = CTRLConfig(vocab_size=64, n_positions=16, n_embd=16, dff=32, n_layer=2, n_head=2)
    folder = save_with_transformers(config, tmp_path)
    refuse("expected one that TransformerLens bridges, got CTRLLMHeadModel", load_model, folder)


def test_capped_logits_are_refused(tmp_path):
    """The chunked cross-entropy knows plain logits only; found by comparing losses."""
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
        final_logit_softcapping=1.0,
    )
    folder = save_with_transformers(config, tmp_path, scale=50)
    refuse("losses of Gemma2ForCausalLM .*scaled or capped", load_model, folder)


def test_norms_after_attention_and_mlp_keep_their_sites(tmp_path):
    """OLMo 2 norms what it adds; attn_out and mlp_out are then the normed values."""
    from transformers import Olmo2Config

    config = Olmo2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = load_model(save_with_transformers(config, tmp_path))
    assert model.sites == {name_site(layer, site) for layer in range(2) for site in SITES}


def test_a_site_whose_values_do_not_add_up_is_not_offered():
    pre, attn, mlp = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    mid, post = pre + attn, pre + attn + mlp
    ends = ["resid_pre", "resid_post"]
    table = [
        # resid_pre, resid_mid, resid_post, attn_out, mlp_out -> what is offered
        ((pre, mid, post, attn, mlp), [*SITES]),
        ((pre, None, post, attn, mlp), [*ends, "attn_out", "mlp_out"]),  # parallel blocks
        ((pre, mid, post / post.norm(), attn, mlp), ends),  # a norm after the sum
        ((pre, mid, post, 2 * attn, mlp), ends),  # attn_out before it is scaled
        ((pre, attn, post, attn, mlp), ends),  # resid_mid taps something else
        ((pre, mid, post, None, mlp), ends),  # a layer without attention
        ((None, mid, post, attn, mlp), []),
    ]
    for values, offered in table:
        assert _consistent_sites(*values) == offered


def test_tokenizer_comes_with_the_checkpoint(gpt2):
    tokenizer = load_tokenizer(gpt2)
    ids = tokenizer("the cat sat")["input_ids"]
    assert tokenizer.decode(ids) == "the cat sat"
    assert tokenizer.bos_token_id == 0


# Hooks by name ----------------------------------------------------------------------------------

FACTS = ModelFacts("gpt2", "GPT2LMHeadModel", 12, 768, 1024, 50257, False)
# hook, layers, names.
RESOLVED = [
    ("resid_post", (7,), ("blocks.7.hook_resid_post",)),
    ("resid_mid", (3, 0, 3), ("blocks.3.hook_resid_mid", "blocks.0.hook_resid_mid")),
    ("hook_attn_out", (11,), ("blocks.11.hook_attn_out",)),
    ("ln1.hook_out", (1, 2), ("blocks.1.ln1.hook_out", "blocks.2.ln1.hook_out")),
    ("blocks.7.hook_mlp_out", (7,), ("blocks.7.hook_mlp_out",)),
    ("blocks.7.mlp_out", (7,), ("blocks.7.hook_mlp_out",)),
    ("blocks.7.hook_mlp_out", (), ("blocks.7.hook_mlp_out",)),
    ("ln_final.hook_out", (7,), ("ln_final.hook_out",)),
]


@pytest.mark.parametrize(("hook", "layers", "names"), RESOLVED)
def test_hooks_resolve_to_canonical_names(hook, layers, names):
    assert resolve_hooks(hook, layers, FACTS) == names


# hook, layers, what the message says.
UNRESOLVED = [
    ("resid_post", (12,), "expected 0 to 11 .gpt2 has 12 blocks., got 12.*--layer 11"),
    ("resid_post", (3, -1), "expected 0 to 11 .*got -1"),
    ("blocks.12.hook_resid_post", (12,), "expected 0 to 11"),
    ("blocks.12.hook_resid_post", (), "expected 0 to 11"),
    ("blocks.7.hook_resid_post", (3,), "expected a name in layer 3, got .*--layer 7"),
    ("blocks.7.hook_resid_post", (7, 8), "expected a name in layer 7, 8"),
    ("resid_pots", (7,), "resid_pre, resid_mid, resid_post, attn_out, mlp_out.*--hook resid_post"),
    ("attn-out", (7,), "got 'attn-out'.*--hook attn_out"),
    ("", (7,), "got ''"),
]


@pytest.mark.parametrize(("hook", "layers", "words"), UNRESOLVED)
def test_hooks_that_do_not_exist_fail_when_planned(hook, layers, words):
    refuse(words, resolve_hooks, hook, layers, FACTS)


@pytest.mark.parametrize("hook", ["resid_mid", "hook_resid_mid", "blocks.7.hook_resid_mid"])
def test_parallel_blocks_have_no_resid_mid(hook):
    facts = FACTS._replace(parallel_blocks=True)
    message = refuse("its blocks are parallel", resolve_hooks, hook, (7,), facts)
    assert "resid_pre, resid_post, attn_out, mlp_out" in message
    assert resolve_hooks("mlp_out", (7,), facts) == ("blocks.7.hook_mlp_out",)


def test_loaded_model_knows_the_other_names(loaded):
    check_hooks(loaded, ["blocks.1.hook_resid_mid", "blocks.2.ln1.hook_out", "ln_final.hook_out"])
    message = refuse("got 'blocks.1.ln1.hook_uot'", check_hooks, loaded, ["blocks.1.ln1.hook_uot"])
    assert "blocks.1.hook_resid_post" in message
    assert "blocks.1.ln1.hook_out" in message
    without = loaded._replace(sites=loaded.sites - {"blocks.1.hook_attn_out"})
    refuse("got 'blocks.1.hook_attn_out'", check_hooks, without, ["blocks.1.hook_attn_out"])
