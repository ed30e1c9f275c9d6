"""Loss added over models of several sizes (Fig. 9)."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from pipeline.errors import PipelineError
from pipeline.report.axes import plan_betas, plan_linear
from pipeline.report.charts import Chart
from pipeline.report.exhibits.exhibit import Exhibit, Figures, Rows, Tables
from pipeline.report.exhibits.series import (
    MODES,
    format_interval,
    group_rows,
    list_band,
    list_keys,
    mark_kind,
    name_apart,
    name_kind,
)
from pipeline.report.figures import Line, draw_lines
from pipeline.report.tables import format_count, format_percent, format_ratio, show

DEPTH_TOLERANCE = 0.1  # GPT-2 small's 8 blocks of 12 and GPT-2 XL's 36 of 48 differ by 0.08

_MODEL_FACTS = ("name", "n_layers", "layer", "d_model")


def relate_models(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per SAE and mode of several metrics.json, from the smallest model to the largest.

        relative_depth = blocks run before the hook's value exists / n_layers

    Columns: result (which of `results`, from 0), model, hook, n_layers, layer, relative_depth,
    same_depth, d_model, n_parameters, sae, architecture, beta, gradient, k, d_sae, seed, mode,
    loss_added with its interval. same_depth says whether the depth is within DEPTH_TOLERANCE of the
    first result's; only such rows are joined in the figure. Size is n_parameters, or
    n_layers * d_model^2 where any is unknown.

    Raises PipelineError where a result does not say which model it is of.
    """
    rows = [
        {"result": i, **row} for i, metrics in enumerate(results) for row in _list_rows(metrics)
    ]
    for row in rows:
        difference = abs(row["relative_depth"] - rows[0]["relative_depth"])
        row["same_depth"] = difference <= DEPTH_TOLERANCE + 1e-9
    known = all(row["n_parameters"] is not None for row in rows)
    return sorted(rows, key=lambda row: _measure_size(row, known=known))


def format_models(rows: Rows) -> str:
    """The rows of `relate_models` as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def show_scaling(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:
    del styles  # a series is a kind of SAE over models, not one SAE
    rows = tables.get("scaling")
    if not rows:
        return None
    several = any(row["result"] for row in rows)
    alone = (
        " Only one model is here: run the stages on others with --model, --layers and folders of "
        "their own, then `pipeline report --beside RESULTS` for each."
    )
    return Exhibit(
        id="scaling",
        title="Scaling",
        source="Fig. 9",
        reading=(
            "Lower is better: each line is a kind of SAE over models, the smallest on the left; of "
            "one model there are marks alone. "
            "The paper’s claim is that the g-SAE stays below TopK at every size."
        ),
        protocol=(
            "Loss added as in the headline table, 95% intervals over blocks. A line joins SAEs "
            "of equal kind, k and number of latents per dimension, of models whose hooks lie "
            f"equally deep within {DEPTH_TOLERANCE} of all blocks; others stand alone, as marks. "
            "Several seeds are averaged. The figures are those of each model’s metrics.json."
            + alone
            * (not several)
        ),
        label_seen="Series with ∇ see the label (filled marks); series without ∇ and TopK do not.",
        paper=(
            "The paper shows GPT-2 small, medium, large and XL about 3/4 deep, without "
            "numbers: what compares is the order of the kinds."
        ),
        charts=(_chart(rows),),
        figures=(_tabulate(rows),),
        data=("scaling",) if several else ("saes",),
    )


def _list_rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    model, hook = metrics["model"], str(metrics.get("hook"))
    missing = [name for name in _MODEL_FACTS if model.get(name) is None]
    if missing:
        raise PipelineError(
            f"measurements of {model.get('name') or 'a model'} at {hook}: expected "
            f"{', '.join(_MODEL_FACTS)} of the model, got no {', '.join(missing)}. Run `pipeline "
            "evaluate` again with this version."
        )
    n_run = model["layer"] + (not hook.endswith("resid_pre"))
    for name, sae in metrics["saes"].items():
        for mode in MODES:
            figures = sae.get(mode) or {}
            if figures.get("loss_added") is None:
                continue
            yield {
                "model": model["name"],
                "hook": hook,
                "n_layers": model["n_layers"],
                "layer": model["layer"],
                "relative_depth": n_run / model["n_layers"],
                "same_depth": True,
                "d_model": model["d_model"],
                "n_parameters": model.get("n_parameters"),
                "sae": name,
                **{key: sae.get(key) for key in ("architecture", "beta", "gradient")},
                **{key: sae.get(key) for key in ("k", "d_sae", "seed")},
                "mode": mode,
                "loss_added": figures["loss_added"],
                "loss_added_low": figures.get("loss_added_low"),
                "loss_added_high": figures.get("loss_added_high"),
            }


def _measure_size(row: Mapping[str, Any], *, known: bool) -> int:
    return row["n_parameters"] if known else row["n_layers"] * row["d_model"] ** 2


def _chart(rows: Rows) -> Chart:
    known = all(row["n_parameters"] is not None for row in rows)
    sized = [
        {**row, "size": float(_measure_size(row, known=known))}
        for row in rows
        if row["mode"] == "with_gradient" or row["beta"]  # without beta the modes are one
    ]
    models = group_rows(sized, lambda row: row["size"])
    names = {size: dict.fromkeys(row["model"] for row in rows) for size, rows in models.items()}
    x = plan_betas(names, label=lambda size: ", ".join(names[size]))
    heights = (row[f"loss_added{end}"] for row in sized for end in ("", "_low", "_high"))
    y = plan_linear(heights, label=format_percent, zero=True)
    lines = [line for joined in (True, False) for line in _list_lines(sized, joined=joined)]
    svg = draw_lines(lines, x=x, y=y, describe="Loss added over models, a line per kind of SAE")
    keys = list_keys(lines)
    return Chart("Loss added over models", "of the model’s own loss", "model, by size", svg, keys)


def _list_lines(rows: Rows, *, joined: bool) -> list[Line]:
    kinds = list(dict.fromkeys(name_kind(row) for row in rows))
    groups = group_rows([row for row in rows if row["same_depth"] == joined], _series)
    names = name_apart(list(groups), ("k = {}", "{:g} latents per dimension")) if groups else []
    lines = []
    for name, group in zip(names, groups.values(), strict=True):
        style, marker = mark_kind(kinds.index(name_kind(group[0])), group[0]["mode"])
        label = name if joined else f"{name}, at another depth"
        of_seeds = group_rows(group, lambda row: (row["size"], row["result"])).values()
        points = [_average(seeds) for seeds in of_seeds]
        band = list_band(points, "size", "loss_added") if joined else ()
        places = [(point["size"], point["loss_added"]) for point in points]
        lines.append(Line(label, style, places, marker, joined=joined, band=band))
    return lines


def _series(row: Mapping[str, Any]) -> tuple[str, int, float]:
    name = f"{name_kind(row)}, {MODES[row['mode']]}" if row["beta"] else name_kind(row)
    return name, row["k"], row["d_sae"] / row["d_model"]


def _average(rows: Rows) -> dict[str, Any]:
    """Means over seeds, of one result; the interval is one SAE's, and none of several."""
    one = rows[0] if len(rows) == 1 else {}
    ends = {f"loss_added{end}": one.get(f"loss_added{end}") for end in ("_low", "_high")}
    mean = fmean(row["loss_added"] for row in rows)
    return {"size": rows[0]["size"], "loss_added": mean, **ends}


def _tabulate(rows: Rows) -> Figures:
    lines = []
    for sae in group_rows(rows, lambda row: (row["result"], row["sae"])).values():
        modes = {row["mode"]: row for row in sae}
        facts = sae[0]
        lines.append(
            (
                str(facts["model"]),
                show(facts["n_parameters"], format_count),
                f"{facts['layer']} of {facts['n_layers']}",
                format_ratio(facts["relative_depth"]),
                facts["sae"],
                *(format_interval(modes.get(m, {}), "loss_added", format_percent) for m in MODES),
            )
        )
    titles = (f"loss added, {words}" for words in MODES.values())
    columns = ("Model", "parameters", "layer", "relative depth", "SAE", *titles)
    return Figures(columns, tuple(lines))
