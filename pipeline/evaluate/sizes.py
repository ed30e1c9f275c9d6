"""What the settings ask of the model and of the held-out text, checked before anything is measured.

Nothing here runs the model or reads text: the measurements' own plans are made from the blocks'
lengths, and those that cannot be made say so.
"""

from collections.abc import Sequence

from pipeline.config import Config, EvidenceConfig
from pipeline.corpus.reader import Corpus
from pipeline.errors import ConfigError, CorpusError, ModelError
from pipeline.evaluate.association import check_tokens, find_norm
from pipeline.evaluate.held_out import draw_blocks
from pipeline.evaluate.perturbation import choose_sequences, list_sites
from pipeline.evaluate.sensitivity import choose_rows
from pipeline.evaluate.steering import choose_blocks
from pipeline.model import LanguageModel, name_site


def check_model(evidence: EvidenceConfig, model: LanguageModel) -> None:
    """Raise ConfigError or ModelError for what this model lacks."""
    if evidence.steering_latents:
        find_norm(model)
        check_tokens(model, evidence.steering_tokens)
    n_layers = model.facts.n_layers
    lacking = [i for i in range(n_layers) if name_site(i, "resid_post") not in model.sites]
    if evidence.sensitivity_rows and lacking:
        raise ModelError(
            f"sensitivity of {model.facts.name}: expected resid_post in all of its {n_layers} "
            f"blocks, got none in {', '.join(map(str, lacking))}. Leave it out with `--set "
            "evidence.sensitivity_rows=0`."
        )
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
    _check_rows(corpus, config.evaluate.tokens, exclude_positions)
    if evidence.sensitivity_rows:
        choose_rows(corpus, evidence.sensitivity_rows, exclude_positions)
    if evidence.perturbation_samples and list_sites(model, evidence.perturbation_layers):
        n, context = evidence.perturbation_samples, evidence.perturbation_context
        choose_sequences(corpus, n, context, exclude_positions)
    if evidence.steering_latents:
        n, context = evidence.steering_sequences, evidence.steering_context
        choose_blocks(corpus, n, context, exclude_positions)


def _check_rows(corpus: Corpus, n_tokens: int | None, exclude_positions: Sequence[int]) -> None:
    """Raise CorpusError unless the SAEs have a row to reconstruct."""
    lengths = corpus.lengths("held_out")[draw_blocks(corpus, n_tokens)]
    longest = int(lengths.max(initial=0))
    if set(range(longest)) <= set(exclude_positions):
        raise CorpusError(
            f"held-out text at {corpus.folder}: expected a row that training did not leave out, "
            f"got none in {len(lengths)} blocks (evaluate.tokens). Set evaluate.tokens to null, or "
            "make a larger corpus with `pipeline corpus`."
        )
