"""The model card of an export: README.md as the Hugging Face hub reads it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from pipeline.export.facts import Facts
from pipeline.paths import format_number
from pipeline.report.tables import format_one, format_percent, format_ratio, format_share, show

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")
_FIGURES = (  # key in a mode of an SAE's metrics, format
    ("nmse", format_ratio),
    ("loss_added", format_percent),
    ("ce_recovered_zero", format_percent),
    ("l0", format_one),
    ("dead_fraction", format_share),
)
_LIBRARIES = {"dictionary-learning": "dictionary_learning", "safetensors": "gsae-pipeline"}
_LABELS = {"with_gradient": "with ∇", "without_gradient": "without ∇"}
_NO_BETA = "plain"  # the two are the same


def render_card(to: str, saes: Sequence[Facts], *, repo: str | None) -> str:
    """The card of an export with these SAEs, which come from one run.

    `to` is the format, `repo` the repository on the hub it is to stand in, or None.
    """
    first = saes[0]
    return _load_template().render(
        to=to,
        library=_LIBRARIES.get(to, to),
        repo=repo,
        saes=saes,
        first=first,
        hub_model=_on_hub(first.model),
        hub_dataset=_on_hub(first.dataset),
        steered=any(facts.sae.beta for facts in saes),
        relu=any(facts.sae.architecture == "relu" for facts in saes),
        tokenized=any(facts.sae.architecture == "tokenized" for facts in saes),
        format_number=format_number,
        measured=[row for facts in saes for row in _measure(facts)],
    )


def _measure(facts: Facts) -> list[tuple[str, ...]]:
    """A row for each way of selecting that was measured; plain SAEs have one way."""
    labels = _LABELS if facts.sae.beta else {"without_gradient": _NO_BETA}
    return [
        (facts.name, label, *_format(facts.measured[mode]))
        for mode, label in labels.items()
        if mode in facts.measured
    ]


def _format(figures: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(show(figures.get(key), form) for key, form in _FIGURES)


def _on_hub(name: str | None) -> str | None:
    """The name, if it can be one on the hub."""
    return name if name and name != "demo" and _HUB_NAME.fullmatch(name) else None


def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__.rpartition(".")[0], "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md")
