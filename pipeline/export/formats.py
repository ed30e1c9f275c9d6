"""The formats by the name that `--to` gives them, and which architectures each can hold."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import ConfigError
from pipeline.export import dictionary_learning, saelens, sparsify
from pipeline.export.facts import Facts
from pipeline.export.folding import Packed
from pipeline.sae import ARCHITECTURES, SparseAutoencoder


class Format(NamedTuple):
    """What one library can hold."""

    names: Mapping[str, str]  # our architecture -> what it is called there
    pack: Callable[[SparseAutoencoder, Facts], Packed] | None  # None: our own files, as they are


FORMATS = {
    "saelens": Format(saelens.NAMES, saelens.pack_saelens),
    "dictionary-learning": Format(
        dictionary_learning.NAMES, dictionary_learning.pack_dictionary_learning
    ),
    "sparsify": Format(sparsify.NAMES, sparsify.pack_sparsify),
    "safetensors": Format({name: name for name in ARCHITECTURES}, None),
}


def check_held(to: str, architectures: Mapping[str, str], run_folder: Path) -> None:
    """Raise ConfigError if a format cannot hold one of the SAEs (name -> architecture)."""
    names = FORMATS[to].names
    for name, architecture in architectures.items():
        if architecture not in names:
            others = [other for other, form in FORMATS.items() if architecture in form.names]
            raise ConfigError(
                f"{name} of {run_folder} for --to {to}: expected one of {', '.join(names)}, "
                f"got {architecture}. Export it with --to {' or '.join(others)}, "
                "or name other SAEs with --sae."
            )
