"""Run by the interpreter of .venv-peers: load exports with the libraries that they are for.

    python load_in_peers.py INPUTS OUTPUTS LIBRARY=EXPORT ...

Each EXPORT is a folder of SAEs with a card. Writes latents and reconstructions of `acts` in INPUTS,
named <library>/<SAE>/latents and .../recon, and runs the card's code.
"""

import contextlib
import os
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def load_saelens(folder, acts):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    latents = sae.encode(acts)
    return latents, sae.decode(latents)


def load_dictionary_learning(folder, acts):
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(folder), device="cpu")
    latents = sae.encode(acts)
    return latents, sae.decode(latents)


def load_sparsify(folder, acts):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    values, indices, _ = sae.encode(acts)
    latents = torch.zeros(len(acts), sae.num_latents).scatter_(1, indices, values)
    return latents, sae.decode(values, indices)


LOADERS = {
    "saelens": load_saelens,
    "dictionary-learning": load_dictionary_learning,
    "sparsify": load_sparsify,
}


@torch.no_grad()
def main(inputs, outputs, *exports):
    acts = load_file(inputs)["acts"]
    found = {}
    for library, export in (argument.split("=", 1) for argument in exports):
        for folder in sorted(path for path in Path(export).iterdir() if path.is_dir()):
            name = f"{library}/{folder.name}"
            found[f"{name}/latents"], found[f"{name}/recon"] = LOADERS[library](folder, acts)
        (code,) = re.findall(r"```python\n(.*?)```", (Path(export) / "README.md").read_text(), re.S)
        scope = {}
        with contextlib.chdir(export):
            exec(code, scope)
        assert scope["recon"].shape == scope["acts"].shape == (8, acts.shape[1])
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # some of them leave threads behind
