import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import TrainError
from pipeline.sae import TopKSAE, init_weights, load_sae, read_sae_config, save_sae


@pytest.fixture
def sae() -> TopKSAE:
    sae = TopKSAE(d_model=6, d_sae=20, k=4, beta=1e5, loss_tokens=255)
    acts = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    init_weights(sae, acts, seed=0, scale_input=True)
    return sae


@pytest.fixture
def folder(sae: TopKSAE, tmp_path: Path) -> Path:
    save_sae(sae, tmp_path / "member", training={"hook": "blocks.7.hook_resid_post"})
    return tmp_path / "member"


def test_a_saved_sae_comes_back_bit_for_bit(sae: TopKSAE, folder: Path) -> None:
    loaded = load_sae(folder)

    expected, got = sae.state_dict(), loaded.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    for setting in ("d_model", "d_sae", "k", "beta", "loss_tokens"):
        assert getattr(loaded, setting) == getattr(sae, setting)
    assert read_sae_config(folder).training == {"hook": "blocks.7.hook_resid_post"}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sae.safetensors"]


class Bomb:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["ae.pt", "model.pth", "pytorch_model.bin", "sae.pkl"])
@pytest.mark.parametrize("inside_folder", [True, False])
def test_a_pickle_is_refused_unread(tmp_path: Path, name: str, inside_folder: bool) -> None:
    path, trace = tmp_path / "foreign" / name, tmp_path / "trace"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Bomb(trace)))

    with pytest.raises(TrainError, match=f"{name}, which is never loaded.* safetensors"):
        load_sae(path.parent if inside_folder else path)
    assert not trace.exists()


def test_pickled_bytes_under_the_right_name_are_refused_unread(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "sae.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))

    with pytest.raises(TrainError, match="expected safetensors"):
        load_sae(folder)
    assert not (tmp_path / "trace").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"nowhere: expected .*sae.safetensors, got nothing"):
        load_sae(tmp_path / "nowhere")


# change of config.json -> what the message says
BROKEN_CONFIGS = [
    ({"gamma": 1}, "gamma: Extra inputs"),
    ({"k": None}, "k: Field required"),
    ({"k": 21}, "config.json: k at TopKSAE: expected 1 to d_sae = 20"),
    ({"k": "four"}, "k: Input should be a valid integer"),
    ({"architecture": "sparse"}, "architecture: expected one of topk"),
    ({"beta": -1.0}, "beta: Input should be greater"),
    ({"d_sae": 21}, r"W_dec at .*expected \[21, 6\] by config.json, got \[20, 6\]"),
    ({"d_sae": 10**15}, "W_dec at"),  # nothing of that size is allocated
    ({"d_sae": 10**18}, "config.json: Storage size"),  # more bytes than can be counted
]


@pytest.mark.parametrize(("change", "message"), BROKEN_CONFIGS)
def test_a_config_that_disagrees_is_refused(folder: Path, change: dict, message: str) -> None:
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    with pytest.raises(TrainError, match=message):
        load_sae(folder)


def test_a_config_that_is_missing_or_no_json_is_refused(folder: Path) -> None:
    for text in ("{", "[" * 100_000, '{"k": ' + "1" * 5000 + "}"):
        (folder / "config.json").write_text(text)
        with pytest.raises(TrainError, match=r"config.json: expected JSON"):
            load_sae(folder)
    (folder / "config.json").unlink()
    with pytest.raises(TrainError, match=r"config.json: expected JSON"):
        load_sae(folder)


def test_weights_with_a_tensor_too_many_or_too_few_are_refused(folder: Path) -> None:
    path = folder / "sae.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"W_gate": torch.ones(2)}, path)
    with pytest.raises(TrainError, match=r"W_gate at .*expected no such tensor .*got \[2\]"):
        load_sae(folder)
    del tensors["b_enc"]
    save_file(tensors, path)
    with pytest.raises(TrainError, match=r"b_enc at .*expected \[20\] .*got no such tensor"):
        load_sae(folder)


@pytest.mark.parametrize("n_bytes", [0, 7, 300, -1])
def test_weights_cut_short_are_refused(folder: Path, n_bytes: int) -> None:
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(TrainError, match="expected safetensors"):
        load_sae(folder)


def test_nan_is_not_written_over_a_good_file(sae: TopKSAE, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan

    with pytest.raises(TrainError, match="W_enc of the SAE"):
        save_sae(sae, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float16])
def test_a_tensor_of_another_dtype_than_the_others_is_refused(
    folder: Path, dtype: torch.dtype
) -> None:
    path = folder / "sae.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"W_dec": tensors["W_dec"].to(dtype)}, path)
    with pytest.raises(TrainError, match=f"W_dec at .*expected torch.float32, got {dtype}"):
        load_sae(folder)


def test_float64_weights_come_back_as_they_are(sae: TopKSAE, tmp_path: Path) -> None:
    save_sae(sae.double(), tmp_path / "double")
    assert {p.dtype for p in load_sae(tmp_path / "double").parameters()} == {torch.float64}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    path = folder / "sae.safetensors"
    tensors = load_file(path)
    tensors["b_dec"][2] = value
    save_file(tensors, path)
    with pytest.raises(TrainError, match=r"b_dec at .*expected finite values, got NaN or Inf"):
        load_sae(folder)
