"""What the settings ask of the model and of the held-out text, checked before anything is measured.

Nothing here runs the model or reads text: the measurements' own plans are made from the blocks'
lengths, and those that cannot be made say so.
"""

from collections.abc import Sequence

from pipeline.config import Config, EvidenceConfig
from pipeline.corpus.reader import Corpus
from pipeline.errors import ConfigError
from pipeline.evaluate.association import check_tokens, find_norm
from pipeline.evaluate.held_out import draw_blocks
from pipeline.evaluate.perturbation import choose_sequences, list_sites
from pipeline.evaluate.sensitivity import choose_rows
from pipeline.evaluate.steering import choose_blocks
from pipeline.model import LanguageModel


def check_model(evidence: EvidenceConfig, model: LanguageModel) -> None:
    """Raise ConfigError or ModelError for what this model lacks."""
    if evidence.steering_latents:
        find_norm(model)
        check_tokens(model, evidence.steering_tokens)
    n_layers = model.facts.n_layers
    beyond = [layer for layer in evidence.perturbation_layers or () if layer >= n_layers]
    if evidence.perturbation_samples and beyond:
        raise ConfigError(
            f"evidence.perturbation_layers: expected 0 to {n_layers - 1} ({model.facts.name} has "
            f"{n_layers} blocks), got {beyond[0]}. Run with `--set "
            "evidence.perturbation_layers=null` for all of them."
        )


def check_text(
    config: Config, corpus: Corpus, model: LanguageModel, exclude_positions: Sequence[int]
) -> None:
    """Raise CorpusError, which names the setting, unless enough text is held out for everything
    that is to be measured. Perturbed sequences and the blocks of splitting may be fewer than asked
    for.
    """
    evidence = config.evidence
    draw_blocks(corpus, config.evaluate.tokens)
    if evidence.sensitivity_rows:
        choose_rows(corpus, evidence.sensitivity_rows, exclude_positions)
    if evidence.perturbation_samples and list_sites(model, evidence.perturbation_layers):
        n, context = evidence.perturbation_samples, evidence.perturbation_context
        choose_sequences(corpus, n, context, exclude_positions)
    if evidence.steering_latents:
        n, context = evidence.steering_sequences, evidence.steering_context
        choose_blocks(corpus, n, context)
