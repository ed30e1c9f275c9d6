"""Sparse autoencoders: selection, sparse products, architectures, training, and their files."""

from pipeline.sae.architectures import ARCHITECTURES
from pipeline.sae.base import Reconstruction, SparseAutoencoder, TrainingPass
from pipeline.sae.init import init_weights
from pipeline.sae.io import SaeConfig, load_sae, read_sae_config, save_sae
from pipeline.sae.learning import (
    Learner,
    LossNotFinite,
    StepMetrics,
    start_learning,
    take_step,
)
from pipeline.sae.losses import auxk_loss, reconstruction_loss
from pipeline.sae.selection import Latents, select
from pipeline.sae.splice import splice
from pipeline.sae.topk import TopKSAE

__all__ = [
    "ARCHITECTURES",
    "Latents",
    "Learner",
    "LossNotFinite",
    "Reconstruction",
    "SaeConfig",
    "SparseAutoencoder",
    "StepMetrics",
    "TopKSAE",
    "TrainingPass",
    "auxk_loss",
    "init_weights",
    "load_sae",
    "read_sae_config",
    "reconstruction_loss",
    "save_sae",
    "select",
    "splice",
    "start_learning",
    "take_step",
]
