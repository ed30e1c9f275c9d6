"""All measurements of one evaluation, each to its table: what the report's exhibits show."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.config import Config
from pipeline.corpus.reader import Corpus
from pipeline.evaluate.claims import decide_claims
from pipeline.evaluate.controls import list_controls
from pipeline.evaluate.density import list_firing_curves, measure_dead, measure_medians
from pipeline.evaluate.faithfulness import MODES
from pipeline.evaluate.fronts import list_fronts
from pipeline.evaluate.measure import Measured
from pipeline.evaluate.pairs import Evidence
from pipeline.evaluate.perturbation import list_sites, measure_perturbation
from pipeline.evaluate.sensitivity import measure_sensitivity
from pipeline.evaluate.splitting import measure_splitting
from pipeline.evaluate.steering import measure_steering
from pipeline.model import LanguageModel
from pipeline.sae import SparseAutoencoder

Rows = list[dict[str, Any]]


class Scene(NamedTuple):
    """What is measured, and what the first pass over the text found."""

    model: LanguageModel
    corpus: Corpus
    saes: Mapping[str, SparseAutoencoder]
    hook: str
    exclude_positions: tuple[int, ...]
    measured: Measured


def list_tables(scene: Scene, config: Config, *, tell: Callable[[str], None]) -> dict[str, Rows]:
    """Every table by name; those of a measurement whose size is 0 have no rows."""
    measured, draws = scene.measured, config.evidence.bootstrap_draws
    ks = {name: sae.k for name, sae in scene.saes.items()}
    saes = list_saes(measured.metrics["saes"])
    tables = {
        "saes": saes,
        "controls": list_controls(measured.metrics["controls"]),
        "fronts": list_fronts(saes),
        "firing": list_firing_curves(measured.activities),
        "density_medians": measure_medians(measured.activities, ks, draws=draws),
        "dead": measure_dead(measured.activities, ks, draws=draws),
    }
    for name, (size, measure) in _MEASUREMENTS.items():
        if getattr(config.evidence, size):
            tell(name)
            tables |= measure(scene, config)
    tables = {name: _empty_unknown(rows) for name, rows in tables.items()}
    tables["claims"] = [
        claim._asdict()
        for claim in decide_claims(
            Evidence(
                saes=measured.metrics["saes"],
                controls=measured.metrics["controls"],
                sums=measured.sums,
                activities=measured.activities,
                tables={name: rows for name, rows in tables.items() if rows},
                alpha=config.evidence.steering_alpha,
                draws=draws,
                documents=measured.documents,
            )
        )
    ]
    return tables


def _empty_unknown(rows: Rows) -> Rows:
    """None in place of what is not finite, as the ends of an interval of too few units."""
    return [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        for row in rows
    ]


def list_saes(saes: Mapping[str, Mapping[str, Any]]) -> Rows:
    """One row per SAE and mode, of metrics["saes"], for `dvc plots` and spreadsheets."""
    facts = ("architecture", "k", "beta", "d_sae", "gradient", "seed")
    return [
        {"sae": name, **{key: sae[key] for key in facts}, "mode": mode, **sae[mode]}
        for name, sae in saes.items()
        for mode in MODES
    ]


def _measure_sensitivity(scene: Scene, config: Config) -> dict[str, Rows]:
    rows = measure_sensitivity(
        scene.model,
        scene.corpus,
        exclude_positions=scene.exclude_positions,
        n_rows=config.evidence.sensitivity_rows,
        batch_blocks=config.evaluate.batch_blocks,
        draws=config.evidence.bootstrap_draws,
    )
    return {"sensitivity": rows}


def _measure_perturbation(scene: Scene, config: Config) -> dict[str, Rows]:
    evidence = config.evidence
    sites = list_sites(scene.model, evidence.perturbation_layers)
    if not sites:
        return {}
    rows = measure_perturbation(
        scene.model,
        scene.corpus,
        sites=sites,
        layers=evidence.perturbation_layers,
        sizes=evidence.perturbation_sizes,
        n_samples=evidence.perturbation_samples,
        context=evidence.perturbation_context,
        exclude_positions=scene.exclude_positions,
        draws=evidence.bootstrap_draws,
    )
    return {"perturbation": rows}


def _measure_steering(scene: Scene, config: Config) -> dict[str, Rows]:
    evidence = config.evidence
    return measure_steering(
        scene.model,
        scene.corpus,
        scene.saes,
        {name: live.nonzero()[:, 0] for name, live in _find_live(scene).items()},
        hook=scene.hook,
        exclude_positions=scene.exclude_positions,
        n_latents=evidence.steering_latents,
        n_sequences=evidence.steering_sequences,
        context=evidence.steering_context,
        n_tokens=evidence.steering_tokens,
        alphas=evidence.steering_alphas,
        alpha=evidence.steering_alpha,
        draws=evidence.bootstrap_draws,
    )


def _measure_splitting(scene: Scene, config: Config) -> dict[str, Rows]:
    evidence = config.evidence
    found = measure_splitting(
        scene.model,
        scene.corpus,
        scene.saes,
        _find_live(scene),
        hook=scene.hook,
        exclude_positions=scene.exclude_positions,
        n_latents=evidence.splitting_latents,
        n_blocks=evidence.splitting_blocks,
        batch_blocks=config.evaluate.batch_blocks,
        draws=evidence.bootstrap_draws,
    )
    return {
        "splitting": found.histogram,
        "splitting_gradients": found.gradients,
        "splitting_summary": found.summary,
    }


def _find_live(scene: Scene) -> dict[str, Tensor]:
    """Which latents of each SAE fired on held-out text without the gradient, so that what is then
    measured of them has not seen the label: bool [d_sae].
    """
    activities = scene.measured.activities
    return {name: modes[MODES[1]].firings > 0 for name, modes in activities.items()}


# By name: the setting that is its size, and what measures it.
_MEASUREMENTS: dict[str, tuple[str, Callable[[Scene, Config], dict[str, Rows]]]] = {
    "sensitivity": ("sensitivity_rows", _measure_sensitivity),
    "perturbation": ("perturbation_samples", _measure_perturbation),
    "steering": ("steering_latents", _measure_steering),
    "splitting": ("splitting_latents", _measure_splitting),
}
