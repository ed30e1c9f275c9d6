"""Exports give the same latents and reconstructions in the libraries that they are for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.export import load_saelens, plan_export, run_export
from pipeline.export.formats import FORMATS
from pipeline.sae import load_sae
from tests.export.examples import encode_dense, make_inputs, write_run
from tests.export.peers import run_in_peers

SCRIPT = Path(__file__).with_name("load_in_peers.py")
LIBRARIES = [name for name, form in FORMATS.items() if form.pack]
CASES = [(to, name) for to in LIBRARIES for name in (*FORMATS[to].names, "gsae")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), tuple(FORMATS["saelens"].names))


@pytest.fixture(scope="module")
def exports(run: Path) -> Path:
    """One export for each library of all that it holds."""
    for to in LIBRARIES:
        names = [name for library, name in CASES if library == to]
        run_export(plan_export(run, names, to=to), run.parent / "exports" / to)
    return run.parent / "exports"


@pytest.fixture(scope="module")
def theirs(exports: Path) -> dict[str, torch.Tensor]:
    """What the libraries make of `make_inputs()`."""
    inputs, outputs = exports / "inputs.safetensors", exports / "outputs.safetensors"
    save_file({"acts": make_inputs()}, inputs)
    run_in_peers(SCRIPT, inputs, outputs, *(f"{to}={exports / to}" for to in LIBRARIES))
    return load_file(outputs)


@pytest.mark.parametrize(("to", "name"), CASES)
def test_latents_and_reconstructions_are_ours(run: Path, theirs, to: str, name: str) -> None:
    sae = load_sae(run / name)
    with torch.no_grad():
        latents = encode_dense(sae, make_inputs())
        recon = sae(make_inputs()).recon
    assert 0 < latents.count_nonzero() < latents.numel()  # else nothing was compared
    if (to, name) == ("dictionary-learning", "relu"):  # in units of the activations there
        latents = latents * sae.W_dec.detach().norm(dim=1) / sae.input_scale
    torch.testing.assert_close(theirs[f"{to}/{name}/latents"], latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs[f"{to}/{name}/recon"], recon, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for to, name in CASES if to == "saelens"])
def test_a_saelens_export_comes_back(exports: Path, theirs, name: str) -> None:
    sae = load_saelens(exports / "saelens" / name)
    with torch.no_grad():
        latents, recon = encode_dense(sae, make_inputs()), sae(make_inputs()).recon
    torch.testing.assert_close(theirs[f"saelens/{name}/latents"], latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs[f"saelens/{name}/recon"], recon, atol=1e-5, rtol=0)
