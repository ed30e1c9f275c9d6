"""A language model from a Hugging Face checkpoint, through TransformerLens.

folder   what is known without weights: where the checkpoint is, its facts, hash and tokenizer
sites    what a hook's name stands for, by plan (config.json) and as measured (one tiny pass)
unembed  cross-entropy over the vocabulary and its gradient, in row chunks
load     the loaded model, frozen, checked against the plain transformers one
"""

from pipeline.model.folder import (
    ModelFacts,
    hash_weights,
    list_weights,
    load_tokenizer,
    locate_checkpoint,
    read_facts,
)
from pipeline.model.load import LanguageModel, check_hooks, load_model
from pipeline.model.sites import SITES, final_hidden, name_site, resolve_hooks
from pipeline.model.unembed import Unembedding, row_losses

__all__ = [
    "SITES",
    "LanguageModel",
    "ModelFacts",
    "Unembedding",
    "check_hooks",
    "final_hidden",
    "hash_weights",
    "list_weights",
    "load_model",
    "load_tokenizer",
    "locate_checkpoint",
    "name_site",
    "read_facts",
    "resolve_hooks",
    "row_losses",
]
