"""Sparsify's folders."""

import json

import torch
from safetensors.torch import load_file

from pipeline.export import plan_export, run_export
from tests.export.examples import D_MODEL, D_SAE, K, encode_dense, make_inputs, make_sae, write_run


@torch.no_grad()
def test_an_export_has_their_tensors_and_gives_our_latents(tmp_path):
    run = write_run(tmp_path / "run")
    run_export(plan_export(run, to="sparsify"), tmp_path / "export")

    p = load_file(tmp_path / "export" / "topk" / "sae.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in p.items()} == {
        "encoder.weight": (D_SAE, D_MODEL),
        "encoder.bias": (D_SAE,),
        "W_dec": (D_SAE, D_MODEL),
        "b_dec": (D_MODEL,),
    }
    sae, acts = make_sae("topk"), make_inputs()
    kept = ((acts - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]).relu().topk(K, dim=1)
    latents = torch.zeros(len(acts), D_SAE).scatter(1, kept.indices, kept.values)
    torch.testing.assert_close(latents, encode_dense(sae, acts), atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(
        latents @ p["W_dec"] + p["b_dec"], sae(acts).recon, atol=5e-6, rtol=1e-5
    )

    config = json.loads((tmp_path / "export" / "topk" / "cfg.json").read_text())
    assert config.pop("gsae_pipeline")["training_architecture"] == "topk"
    assert config == {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": False,
        "num_latents": D_SAE,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_MODEL,
    }
