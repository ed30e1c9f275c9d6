"""The report's figures: which numbers go into which chart."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.paths import format_number
from pipeline.report.figures import (
    Line,
    Pair,
    as_number,
    average_windows,
    draw_lines,
    draw_pairs,
    plan_betas,
    plan_linear,
    plan_positive,
    plan_progress,
)
from pipeline.report.tables import format_percent

History = Mapping[str, Sequence[Any]]  # columns of history.parquet, one value per logged step
MODES = ("with_gradient", "without_gradient")


class Key(NamedTuple):
    """One entry of a chart's key."""

    label: str
    style: str  # CSS classes
    marker: str  # as in figures.Line
    joined: bool = True  # False: markers alone


class Chart(NamedTuple):
    title: str
    unit: str  # what the vertical axis shows
    across: str  # what the horizontal axis shows
    svg: Markup
    keys: tuple[Key, ...] = ()


class Block(NamedTuple):
    """Charts that stand together."""

    keys: tuple[Key, ...] | None  # one for all of them, with its markers; None: each has its own
    charts: tuple[Chart, ...]


def block_charts(charts: Sequence[Chart]) -> list[Block]:
    """Charts in their order: neighbours with one key together, and those whose keys differ."""
    blocks: list[Block] = []
    for shares, run in groupby(charts, key=_list_series):
        run = tuple(run)
        keys = None
        if shares and len(run) > 1:
            keys = max((chart.keys for chart in run), key=_count_marks)
        if blocks and keys is None and blocks[-1].keys is None:
            run = (*blocks.pop().charts, *run)
        blocks.append(Block(keys, run))
    return blocks


def _list_series(chart: Chart) -> frozenset[tuple[str, str]]:
    return frozenset((key.label, key.style) for key in chart.keys)


def _count_marks(keys: Sequence[Key]) -> int:
    return sum(bool(key.marker) + key.joined for key in keys)


def chart_training(
    saes: Mapping[str, Mapping[str, Any]],
    histories: Mapping[str, History],
    styles: Mapping[str, str],
) -> list[Chart]:
    """Loss, NMSE, dead latents and overlap over the tokens trained on, one line per SAE.

    What end-to-end training minimises is no squared error, and has a chart of its own.
    """
    charts = []
    for title, unit, column, label in (
        ("Loss", "squared error, summed over d_model", "loss", _plain),
        ("Divergence", "KL of the logits, nats per token", "divergence", _plain),
        ("NMSE", "mean ‖x − x̂‖ / ‖x‖", "nmse", _plain),
        ("Dead latents", "of all latents, over the last 20,480 tokens", "dead_fraction", _percent),
        ("Overlap with plain TopK", "of the selected latents", "overlap", _percent),
    ):
        lines = [
            Line(name, styles[name], average_windows(_read_curve(histories[name], column, sae)))
            for name, sae in saes.items()
            if name in histories
        ]
        lines = [line for line in lines if any(y is not None for _, y in line.points)]
        heights = [y for line in lines for _, y in line.points if y is not None]
        if heights:
            tokens = [x for line in lines for x, _ in line.points]
            x = plan_progress(tokens, label=_tokens)
            shares = plan_linear(heights, label=label, zero=True)
            y = shares if label is _percent else plan_positive(heights, label=label)
            describe = f"{title} over tokens trained on, one line per SAE"
            svg = draw_lines(lines, x=x, y=y, describe=describe)
            keys = tuple(Key(line.label, line.style, line.marker) for line in lines)
            charts.append(Chart(title, unit, "tokens", svg, keys))
    return charts


def chart_modes(saes: Mapping[str, Mapping[str, Any]], styles: Mapping[str, str]) -> Markup | None:
    """Loss added with and without the gradient at inference, a row per SAE; None if not known."""
    pairs = [
        Pair(name, styles[name], *(_number(sae, mode, "loss_added") for mode in MODES))
        for name, sae in saes.items()
    ]
    if all(pair.filled is None and pair.hollow is None for pair in pairs):
        return None
    describe = "Loss added per SAE, with and without the gradient at inference"
    return draw_pairs(pairs, label=format_percent, tick=_percent, describe=describe)


def chart_betas(saes: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Loss added and NMSE against beta, a line for all that differ in beta alone, and mode.

    Only for those with at least three betas: two are told apart better by the table.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for sae in saes.values():
        if as_number(sae.get("beta")) is not None:
            groups.setdefault(_kind(sae), []).append(sae)
    groups = {key: group for key, group in groups.items() if len({s["beta"] for s in group}) > 2}
    names = _name_kinds(list(groups))
    charts = []
    for title, unit, metric, label in (
        ("Loss added against β", "of the model’s own loss", "loss_added", _percent),
        ("NMSE against β", "mean ‖x − x̂‖ / ‖x‖", "nmse", _plain),
    ):
        lines = [
            Line(
                f"{name}, {words}",
                f"c{i % 8} {dash}",
                [(float(sae["beta"]), _number(sae, mode, metric)) for sae in group],
                marker,
            )
            for i, (name, group) in enumerate(zip(names, groups.values(), strict=True))
            for mode, words, dash, marker in (
                ("with_gradient", "with ∇", "d0", "dot"),
                ("without_gradient", "without ∇", "d1", "ring"),
            )
        ]
        heights = [y for line in lines for _, y in line.points if y is not None]
        if heights:
            x = plan_betas((beta for line in lines for beta, _ in line.points), label=format_number)
            y = plan_linear(heights, label=label, zero=True)
            svg = draw_lines(lines, x=x, y=y, describe=f"{title}, with and without the gradient")
            keys = tuple(Key(line.label, line.style, line.marker) for line in lines)
            charts.append(Chart(title, unit, "β", svg, keys))
    return charts


def _kind(sae: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that an SAE is but its beta: k, then what is said only where it differs."""
    gradient = sae.get("gradient") or "full"
    return (
        sae.get("k"),
        sae.get("architecture", "topk"),
        sae.get("d_sae"),
        gradient if sae.get("beta") else "full",
        sae.get("seed"),
    )


def _name_kinds(kinds: Sequence[tuple[Any, ...]]) -> list[str]:
    words = ("k = {}", "{}", "{} latents", "{} ∇", "seed {}")
    varies = [len(set(column)) > 1 for column in zip(*kinds, strict=True)]
    return [
        ", ".join(
            word.format(part)
            for i, (word, part) in enumerate(zip(words, kind, strict=True))
            if i == 0 or varies[i]
        )
        for kind in kinds
    ]


def _read_curve(
    history: History, column: str, sae: Mapping[str, Any]
) -> list[tuple[float, float | None]]:
    """(tokens, value) of each logged step; dead latents as a fraction of all."""
    if column in ("loss", "divergence"):
        end_to_end = sae.get("architecture") == "end_to_end"
        column = "loss" if end_to_end == (column == "divergence") else ""
    values = [as_number(value) for value in history.get(column, ())]
    if column == "dead_fraction" and not values and sae.get("d_sae"):
        counts = map(as_number, history.get("dead_latents", ()))
        values = [None if count is None else count / sae["d_sae"] for count in counts]
    tokens = map(as_number, history.get("tokens", ()))
    return [(x, y) for x, y in zip(tokens, values, strict=False) if x is not None]


def _number(sae: Mapping[str, Any], mode: str, metric: str) -> float | None:
    return as_number((sae.get(mode) or {}).get(metric))


def _plain(value: float) -> str:
    return f"{value:,.6g}"


def _percent(value: float) -> str:
    return f"{100 * value:,.6g}%".replace("-", "−")


def _tokens(value: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"
