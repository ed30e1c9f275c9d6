"""Sparse autoencoders: selection, sparse products, architectures, and their files."""

from pipeline.sae.io import SaeConfig, load_sae, read_sae_config, save_sae
from pipeline.sae.selection import Latents, select
from pipeline.sae.splice import splice
from pipeline.sae.topk import Reconstruction, TopKSAE, init_weights, reconstruction_loss

__all__ = [
    "Latents",
    "Reconstruction",
    "SaeConfig",
    "TopKSAE",
    "init_weights",
    "load_sae",
    "read_sae_config",
    "reconstruction_loss",
    "save_sae",
    "select",
    "splice",
]
