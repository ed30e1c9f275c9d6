"""What the report says of the data and the settings: labels and values from manifests as they are.

Manifests may lack keys: what is there is shown.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.figures import as_number
from pipeline.report.tables import format_bytes, format_count, format_short, show

Facts = list[tuple[str, str]]  # label and value

_CORPUS = {
    "source": "Source",
    "subset": "Subset",
    "split": "Split",
    "column": "Column",
    "versions.python": "Python",
    "packing": "Packing",
    "context_length": "Context length",
    "prepend_bos": "Begins with BOS",
    "held_out_fraction": "Held out, of documents",
    "tokenizer_hash": "Tokenizer hash",
    "fingerprint": "Fingerprint",
}
_STORE = {
    "hooks": "Hooks",
    "n_rows": "Tokens",
    "n_blocks": "Blocks",
    "context_length": "Context length",
    "d_model": "d_model",
    "acts_dtype": "Activations in",
    "grads_dtype": "Gradients in",
    "rows_per_shard": "Rows per shard",
    "rows_per_chunk": "Rows per chunk",
    "seed": "Seed of the row order",
}
_STATISTICS = {
    "mean_row_norm": "Mean row norm",
    "rms": "RMS",
    "mean": "Mean",
    "max_abs": "Largest",
    "saturated": "Saturated",
    "underflowed": "Underflowed",
}


class Statistics(NamedTuple):
    """One row per array of a store."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]  # array and its values


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, in order."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_settings(settings: Mapping[str, Any]) -> Facts:
    """Dotted keys as they are written, and their values as JSON."""
    return [(key, json.dumps(value, ensure_ascii=False)) for key, value in flatten(settings)]


def describe_sections(config: Mapping[str, Any]) -> list[tuple[str, Facts]]:
    """The profile's sections in a run's config.json, or what sections it has itself."""
    profile = config.get("config")
    sections = profile if isinstance(profile, Mapping) else config
    return [
        (name, describe_settings(section))
        for name, section in sections.items()
        if isinstance(section, Mapping) and name not in ("versions", "store_identity")
    ]


def describe_corpus(manifest: Mapping[str, Any]) -> Facts:
    """Source, packing, tokenizer and fingerprint of a corpus."""
    flat = dict(flatten({key: value for key, value in manifest.items() if key != "splits"}))
    return [
        (label, show_value(flat[key]))
        for key, label in _CORPUS.items()
        if flat.get(key) is not None
    ]


def describe_splits(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Split, documents, tokens and blocks."""
    return [
        (split, *(show(counts.get(key), format_count) for key in ("documents", "tokens", "blocks")))
        for split, counts in (manifest.get("splits") or {}).items()
        if isinstance(counts, Mapping)
    ]


def describe_store(manifest: Mapping[str, Any]) -> Facts:
    """Hooks, sizes, number formats, shards, bytes and fingerprint of a store."""
    facts = [(label, show_value(manifest[key])) for key, label in _STORE.items() if key in manifest]
    shards = manifest.get("shards") or ()
    if shards:
        facts.append(("Shards", format_count(len(shards))))
    sizes = [file.get("bytes", 0) for shard in shards for file in shard.get("files", {}).values()]
    if sizes:
        facts.append(("Size", f"{format_bytes(sum(sizes))} ({format_count(sum(sizes))} bytes)"))
    if "fingerprint" in manifest:
        facts.append(("Fingerprint", show_value(manifest["fingerprint"])))
    return facts


def describe_statistics(manifest: Mapping[str, Any]) -> Statistics:
    """Each array's statistics over all shards; counts with their fraction of the array's values.

    A root mean square is the root of the row-weighted mean of squares, the largest value that over
    shards; counts are added, and means are weighted by rows.
    """
    parts: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for shard in manifest.get("shards") or ():
        for array, statistics in (shard.get("statistics") or {}).items():
            parts.setdefault(array, []).append((shard.get("n_rows", 0), statistics))
    found = {key for shards in parts.values() for _, statistics in shards for key in statistics}
    keys = [key for key in _STATISTICS if key in found]
    width = manifest.get("d_model")
    return Statistics(
        names=tuple(_STATISTICS[key] for key in keys),
        rows=tuple(
            (array, tuple(_combine(key, shards, width if "/" in array else 1) for key in keys))
            for array, shards in parts.items()
        ),
    )


def show_value(value: Any) -> str:
    """A setting as people read it: counts with separators, lists by commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return format_count(value)
    if isinstance(value, list):
        return ", ".join(map(show_value, value))
    return str(value)


def _combine(key: str, shards: Sequence[tuple[int, Mapping[str, Any]]], width: int | None) -> str:
    read = ((n, as_number(statistics.get(key))) for n, statistics in shards)
    values = [(n, value) for n, value in read if value is not None]
    n_rows = sum(n for n, _ in values)
    if not n_rows:
        return "–"
    if key == "max_abs":
        return format_short(max(value for _, value in values))
    if key in ("saturated", "underflowed"):
        count = sum(value for _, value in values)
        share = f" ({format_short(100 * count / (n_rows * width))}%)" if count and width else ""
        return format_count(count) + share
    if key == "rms":
        return format_short(math.sqrt(math.fsum(n * value**2 for n, value in values) / n_rows))
    return format_short(math.fsum(n * value for n, value in values) / n_rows)
