"""Which SAEs share a chart: few, if k and size part them, so that lines can be told apart."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.report.exhibits.exhibit import Rows, Tables
from pipeline.report.figures import N_STYLES, series_style

_PARTS = {"k": "k\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{}", "d_sae": "{:,}\N{NO-BREAK SPACE}latents"}


class Group(NamedTuple):
    """SAEs that share charts."""

    words: str  # what they have in common: "k = 32, 2,048 latents"; empty where all are together
    names: tuple[str, ...]


def group_saes(saes: Mapping[str, Mapping[str, Any]]) -> list[Group]:
    """All in one group; those of equal k, and then of equal d_sae too, where one has too many.

    Those that are equal in both, such as seeds, stay together, however many.
    """
    varying = [part for part in _PARTS if len({sae.get(part) for sae in saes.values()}) > 1]
    groups = {"": list(saes)}
    for n_parts in range(1, len(varying) + 1):
        if max(map(len, groups.values())) <= N_STYLES:
            break
        groups = {}
        for name, sae in saes.items():
            words = [_PARTS[part].format(sae.get(part)) for part in varying[:n_parts]]
            groups.setdefault(", ".join(words), []).append(name)
    return [Group(words, tuple(names)) for words, names in groups.items()]


def plan_styles(saes: Mapping[str, Mapping[str, Any]], others: Iterable[str]) -> dict[str, str]:
    """CSS classes by name: no two of a group have the same, nor have any two of `others`."""
    groups = group_saes(saes)
    styles = {name: series_style(i) for group in groups for i, name in enumerate(group.names)}
    first = max((len(group.names) for group in groups), default=0)
    return styles | {name: series_style(i) for i, name in enumerate(others, start=first)}


def split_rows(rows: Rows, tables: Tables) -> Iterator[tuple[str, Rows]]:
    """A table's rows about the SAEs of each group, with its words; those about none are in all."""
    saes = {row["sae"]: row for row in tables.get("saes") or ()}
    for words, names in group_saes(saes):
        yield words, [row for row in rows if row["sae"] in names or row["sae"] not in saes]
