"""SAELens folders: what is in them, what of theirs is folded on reading, and what is refused."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import TrainError
from pipeline.export import load_saelens, plan_export, run_export
from tests.export.examples import (
    BETA,
    D_MODEL,
    D_SAE,
    HOOK,
    K,
    encode_dense,
    make_inputs,
    make_sae,
    write_run,
)

SHAPES = {
    "W_enc": (D_MODEL, D_SAE),
    "b_enc": (D_SAE,),
    "W_dec": (D_SAE, D_MODEL),
    "b_dec": (D_MODEL,),
}
LATENTS = {"b_enc": (D_SAE,), "threshold": (D_SAE,)}
GATED = dict.fromkeys(("b_gate", "b_mag", "r_mag"), (D_SAE,))
MATRICES = {name: SHAPES[name] for name in ("W_enc", "W_dec", "b_dec")}
TENSORS = {  # our architecture -> theirs, and exactly these tensors
    "topk": ("topk", SHAPES),
    "relu": ("standard", SHAPES),
    "batch_topk": ("jumprelu", SHAPES | LATENTS),
    "jumprelu": ("jumprelu", SHAPES | LATENTS),
    "gated": ("gated", MATRICES | GATED),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("run"), tuple(TENSORS))
    run_export(plan_export(run, to="saelens"), run.parent / "saelens")
    return run.parent / "saelens"


@pytest.fixture
def folder(tmp_path):
    """A topk SAE as sae-lens saves one."""
    run = write_run(tmp_path / "run")
    run_export(plan_export(run, ["topk"], to="saelens"), tmp_path / "export")
    return tmp_path / "export" / "topk"


def change(folder, **changes):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("architecture", TENSORS)
def test_an_export_has_exactly_their_tensors_and_keys(exported, architecture):
    name, shapes = TENSORS[architecture]
    tensors = load_file(exported / architecture / "sae_weights.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    config = json.loads((exported / architecture / "cfg.json").read_text())
    assert config["architecture"] == name
    assert (config["d_in"], config["d_sae"], config["dtype"]) == (D_MODEL, D_SAE, "float32")
    assert config["apply_b_dec_to_input"] is True
    assert config["normalize_activations"] == config["reshape_activations"] == "none"
    assert config.get("k") == (K if name == "topk" else None)


def test_the_metadata_say_how_it_was_trained(exported):
    metadata = json.loads((exported / "gsae" / "cfg.json").read_text())["metadata"]
    for key, value in {
        "model_name": "openai-community/gpt2",
        "hook_name": HOOK,
        "context_size": 128,
        "prepend_bos": True,
        "dataset_path": "texts (local)",
        "beta": BETA,
        "loss_tokens": 255,
        "k": K,
        "training_architecture": "topk",
        "selects_with_gradient": False,
        "exclude_positions": [0],
    }.items():
        assert metadata[key] == value


@pytest.mark.parametrize("architecture", TENSORS)
@torch.no_grad()
def test_an_export_comes_back_with_the_same_latents(exported, architecture):
    sae, loaded, acts = make_sae(architecture), load_saelens(exported / architecture), make_inputs()
    assert loaded.input_scale == 1
    assert loaded.k == K
    torch.testing.assert_close(
        encode_dense(loaded, acts), encode_dense(sae, acts), atol=2e-6, rtol=0
    )
    torch.testing.assert_close(loaded(acts).recon, sae(acts).recon, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "relu", "gated", "jumprelu"])
@torch.no_grad()
def test_a_b_dec_that_is_not_subtracted_is_folded(exported, architecture, tmp_path):
    """Theirs with apply_b_dec_to_input false is theirs with true at x + b_dec."""
    folder = tmp_path / "sae"
    folder.mkdir()
    for path in (exported / architecture).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder, apply_b_dec_to_input=False)
    plain, folded, acts = load_saelens(exported / architecture), load_saelens(folder), make_inputs()
    torch.testing.assert_close(
        encode_dense(folded, acts), encode_dense(plain, acts + plain.b_dec), atol=2e-6, rtol=0
    )


@torch.no_grad()
def test_selection_by_decoder_norm_is_folded(folder):
    change(folder, rescale_acts_by_decoder_norm=True)
    p, acts = load_file(folder / "sae_weights.safetensors"), make_inputs()
    norms = p["W_dec"].norm(dim=1)
    scaled = ((acts - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * norms
    kept = scaled.topk(K, dim=1)
    latents = torch.zeros_like(scaled).scatter(1, kept.indices, kept.values.relu())

    loaded = load_saelens(folder)
    torch.testing.assert_close(encode_dense(loaded, acts), latents, atol=2e-6, rtol=1e-5)
    recon = latents / norms @ p["W_dec"] + p["b_dec"]
    torch.testing.assert_close(loaded(acts).recon, recon, atol=5e-6, rtol=1e-5)


@torch.no_grad()
def test_a_threshold_below_zero_is_a_relu(exported, tmp_path):
    path = exported / "jumprelu" / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file(
        tensors | {"threshold": torch.full((D_SAE,), -1.0)}, tmp_path / "sae_weights.safetensors"
    )
    (tmp_path / "cfg.json").write_bytes(path.with_name("cfg.json").read_bytes())
    z = (make_inputs() - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    latents = encode_dense(load_saelens(tmp_path), make_inputs())
    torch.testing.assert_close(latents, z.relu(), atol=2e-6, rtol=0)


# change of cfg.json -> what the message says
REFUSED = [
    ({"architecture": "temporal"}, "architecture at .*expected one of topk, standard.*'temporal'"),
    ({"normalize_activations": "layer_norm"}, "normalize_activations at .*expected 'none'"),
    ({"reshape_activations": "hook_z"}, "reshape_activations at .*expected 'none', got 'hook_z'"),
    ({"metadata": {"sae_lens_version": "5.9.1"}}, "expected sae_lens_version 6.0.0 .*got 5.9.1"),
    ({"metadata": {}}, "expected sae_lens_version 6.0.0 or newer, got none"),
    ({"d_sae": 25}, r"W_dec at .*expected \[25, 8\] by cfg.json, got \[24, 8\]"),
    ({"d_sae": 10**15}, "W_dec at"),  # nothing of that size is allocated
    ({"d_in": "8"}, "d_in at .*expected a positive integer, got '8'"),
    ({"k": 25}, "cfg.json: k at TopKSAE: expected 1 to d_sae = 24, got 25"),
    ({"k": "three"}, "k at .*expected a positive integer, got 'three'"),
    ({"metadata": "none"}, "metadata at .*expected an object"),
    ({"architecture": ["topk"]}, r"architecture at .*got \['topk'\]"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_has_no_counterpart_is_refused(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(TrainError, match=message):
        load_saelens(folder)


@pytest.mark.parametrize("k", [2.5, "three", True, 0])
def test_a_recorded_k_of_no_use_is_refused(exported, tmp_path, k):
    shutil.copytree(exported / "relu", tmp_path / "relu")
    metadata = json.loads((tmp_path / "relu" / "cfg.json").read_text())["metadata"]
    change(tmp_path / "relu", metadata=metadata | {"k": k})
    with pytest.raises(TrainError, match=f"k at .*expected a positive integer, got {k!r}"):
        load_saelens(tmp_path / "relu")


def test_tensors_that_are_not_floating_point_are_refused(folder):
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    for dtype in (torch.int64, torch.complex64):
        save_file(tensors | {"W_enc": tensors["W_enc"].to(dtype)}, path)
        with pytest.raises(TrainError, match=f"W_enc at .*expected floating point, got {dtype}"):
            load_saelens(folder)


@torch.no_grad()
def test_norms_scale_topk_alone_and_a_decoder_row_may_be_zero(exported, folder, tmp_path):
    shutil.copytree(exported / "gated", tmp_path / "gated")
    change(tmp_path / "gated", rescale_acts_by_decoder_norm=True)
    same, plain = load_saelens(tmp_path / "gated"), load_saelens(exported / "gated")
    assert torch.equal(same(make_inputs()).recon, plain(make_inputs()).recon)

    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["W_dec"][3] = 0
    save_file(tensors, path)
    change(folder, rescale_acts_by_decoder_norm=True)
    assert load_saelens(folder).W_dec.isfinite().all()


def test_damaged_and_foreign_files_are_refused(folder):
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"scaling_factor": torch.ones(D_SAE)}, path)
    with pytest.raises(TrainError, match=r"scaling_factor at .*expected no such tensor"):
        load_saelens(folder)
    path.write_bytes(pickle.dumps(tensors))
    with pytest.raises(TrainError, match="expected safetensors"):
        load_saelens(folder)
    path.unlink()
    with pytest.raises(TrainError, match="expected safetensors"):
        load_saelens(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(TrainError, match="expected an object"):
        load_saelens(folder)
