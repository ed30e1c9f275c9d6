"""The folded parameters compute the same latents and reconstructions, in float64 and to the bit's
last few.
"""

import pytest
import torch

from pipeline.errors import TrainError
from pipeline.export.folding import Packed, fold_scale, write_packed
from tests.export.examples import D_SAE, K, encode_dense, make_inputs, make_sae


def keep_largest(z, p):  # noqa: ARG001
    kept = z.topk(K, dim=1)
    return torch.zeros_like(z).scatter(1, kept.indices, kept.values.relu())


# architecture -> y from z = (x - b_dec) @ W_enc and the folded parameters, written for reading
ENCODERS = {
    "topk": lambda z, p: keep_largest(z + p["b_enc"], p),
    "batch_topk": lambda z, p: (z + p["b_enc"]) * (z + p["b_enc"] > p["threshold"]),
    "relu": lambda z, p: (z + p["b_enc"]).clamp(min=0),
    "jumprelu": lambda z, p: (z + p["b_enc"]) * (z + p["b_enc"] > p["threshold"]),
    "gated": lambda z, p: (z + p["b_gate"] > 0) * (z * p["r_mag"].exp() + p["b_mag"]).clamp(min=0),
}


@pytest.mark.parametrize("architecture", ENCODERS)
@torch.no_grad()
def test_folded_parameters_need_no_input_scale(architecture):
    sae, acts = make_sae(architecture).double(), make_inputs().double()
    p = fold_scale(sae)

    latents = ENCODERS[architecture]((acts - p["b_dec"]) @ p["W_enc"], p)
    wanted = encode_dense(sae, acts)
    assert 0 < wanted.count_nonzero() < wanted.numel()
    torch.testing.assert_close(latents, wanted, atol=1e-12, rtol=1e-12)
    recon = latents @ p["W_dec"] + p["b_dec"]
    torch.testing.assert_close(recon, sae(acts).recon, atol=1e-12, rtol=1e-12)


def test_folding_leaves_the_sae_alone():
    sae = make_sae("batch_topk")
    fold_scale(sae)["threshold"][0] = 7.0
    assert sae.threshold == make_sae("batch_topk").threshold
    assert torch.equal(sae.W_enc, make_sae("batch_topk").W_enc)


def test_a_threshold_comes_once_per_latent():
    assert fold_scale(make_sae("batch_topk"))["threshold"].shape == (D_SAE,)
    assert "threshold" not in fold_scale(make_sae("topk"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_that_is_not_finite_is_written(tmp_path, value):
    packed = Packed("cfg.json", {}, "sae.safetensors", {"b_dec": torch.tensor([0.0, value])})
    with pytest.raises(TrainError, match=r"b_dec for .*expected finite values"):
        write_packed(packed, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()
