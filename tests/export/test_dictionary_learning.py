"""dictionary_learning's folders, computed with as its classes do."""

import json

import pytest
import torch

from pipeline.export import plan_export, run_export
from pipeline.export.dictionary_learning import NAMES
from tests.export.examples import (
    D_MODEL,
    D_SAE,
    HOOK,
    K,
    encode_dense,
    make_inputs,
    make_sae,
    write_run,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("run"), tuple(NAMES))
    run_export(plan_export(run, to="dictionary-learning"), run.parent / "dictionaries")
    return run.parent / "dictionaries"


def encode_theirs(name, p, x):
    """Each class's encode in a line, for inference."""
    if name == "JumpReluAutoEncoder":
        z = x @ p["W_enc"] + p["b_enc"]
        return z.relu() * (z > p["threshold"])
    if name == "GatedAutoEncoder":
        z = (x - p["decoder_bias"]) @ p["encoder.weight"].T
        return (z + p["gate_bias"] > 0) * (z * p["r_mag"].exp() + p["mag_bias"]).relu()
    b_dec = p["bias"] if name == "AutoEncoder" else p["b_dec"]
    y = ((x - b_dec) @ p["encoder.weight"].T + p["encoder.bias"]).relu()
    if name == "BatchTopKSAE":
        return y * (y > p["threshold"])
    if name == "AutoEncoderTopK":
        kept = y.topk(int(p["k"]), dim=1)
        return torch.zeros_like(y).scatter(1, kept.indices, kept.values)
    return y


def decode_theirs(p, latents):
    W_dec = p["W_dec"] if "W_dec" in p else p["decoder.weight"].T
    return latents @ W_dec + next(p[key] for key in ("b_dec", "bias", "decoder_bias") if key in p)


@pytest.mark.parametrize("architecture", NAMES)
@torch.no_grad()
def test_their_formula_gives_our_latents(exported, architecture):
    sae, acts, name = make_sae(architecture), make_inputs(), NAMES[architecture]
    tensors = torch.load(exported / architecture / "ae.pt", weights_only=True)  # tensors only
    latents, wanted = encode_theirs(name, tensors, acts), encode_dense(sae, acts)
    if name == "AutoEncoder":
        wanted = wanted * sae.W_dec.norm(dim=1) / sae.input_scale
    torch.testing.assert_close(latents, wanted, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(
        decode_theirs(tensors, latents), sae(acts).recon, atol=5e-6, rtol=1e-5
    )


def test_a_relu_dictionary_has_unit_columns(exported):
    """Loading scales them to norm 1 otherwise, and says so."""
    tensors = torch.load(exported / "relu" / "ae.pt", weights_only=True)
    norms = tensors["decoder.weight"].norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(D_SAE), atol=1e-6, rtol=0)


def test_k_and_threshold_are_stored_as_they_store_them(exported):
    tensors = torch.load(exported / "gsae" / "ae.pt", weights_only=True)
    assert (tensors["k"].dtype, int(tensors["k"])) == (torch.int32, K)
    assert (tensors["threshold"].dtype, float(tensors["threshold"])) == (torch.float32, -1)
    tensors = torch.load(exported / "batch_topk" / "ae.pt", weights_only=True)
    assert tensors["threshold"] == make_sae("batch_topk").threshold


@pytest.mark.parametrize("architecture", NAMES)
def test_the_configuration_names_their_class(exported, architecture):
    config = json.loads((exported / architecture / "config.json").read_text())
    assert config["trainer"] == {
        "dict_class": NAMES[architecture],
        "k": K,
        "activation_dim": D_MODEL,
        "dict_size": D_SAE,
        "layer": 7,
        "lm_name": "openai-community/gpt2",
        "submodule_name": HOOK,
    }
    assert config["buffer"] == {"ctx_len": 128}
