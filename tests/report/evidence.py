"""Made-up evidence: claims, and exhibits of every kind of figure; no number in it is measured."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.report.charts import Chart, Key
from pipeline.report.exhibits.exhibit import Exhibit, Figures, Rows, Tables
from pipeline.report.figures import (
    MARKERS,
    Estimate,
    Line,
    draw_estimates,
    draw_lines,
    plan_linear,
    plan_positive,
    series_style,
)

WITH, WITHOUT = "with ∇ at inference", "without ∇ at inference"


def make_claim(
    id_: str,
    statement: str,
    verdict: str,
    figures: tuple[float | None, float | None, float | None] = (None, None, None),
    **more: Any,
) -> dict[str, Any]:
    """A row of claims.csv."""
    value, low, high = figures
    defaults = {
        "source": "",
        "comparison": "g-SAE against TopK",
        "measure": "difference of loss added, a fraction of the model’s loss",
        "n_seeds": None if value is None else 1,
        "seeds_low": value,
        "seeds_high": value,
        "paper": "",
        "sees_label": False,
    }
    known = {"id": id_, "statement": statement, "verdict": verdict}
    return known | defaults | {"value": value, "low": low, "high": high} | more


def _pair(mode: str) -> dict[str, Any]:
    words = f"g-SAE against TopK; k = 32, d_sae = 2048, β = 3e4; {mode}"
    return {"comparison": words, "sees_label": mode == WITH}


_DEAD, _LESS = "Fewer latents are dead", "Less loss is added"
_STEER = "Latents steer the tokens that they stand for more strongly"
CLAIMS: list[dict[str, Any]] = [
    make_claim(
        "dead",
        _DEAD,
        "holds",
        (-0.0413, -0.0592, -0.0231),
        source="Table 1",
        measure="difference of the fraction of dead latents",
        paper="-0.09 (0.34 against 0.43)",
        **_pair(WITH),
    ),
    make_claim(
        "dead",
        _DEAD,
        "holds",
        (-0.0353, -0.0501, -0.0203),
        source="Table 1",
        measure="difference of the fraction of dead latents",
        paper="-0.09 (0.34 against 0.43)",
        **_pair(WITHOUT),
    ),
    make_claim(
        "loss_added",
        _LESS,
        "holds",
        (-0.0212, -0.0257, -0.0171),
        source="Fig. 4",
        n_seeds=3,
        seeds_low=-0.0241,
        seeds_high=-0.0193,
        **_pair(WITH),
    ),
    make_claim(
        "loss_added",
        _LESS,
        "not decided",
        (0.00061, -0.0009, 0.0021),
        source="Fig. 4",
        **_pair(WITHOUT),
    ),
    make_claim(
        "own", "Gradients of all later losses help more than each token’s own", "not measured"
    ),
    make_claim(
        "steering",
        _STEER,
        "does not hold",
        (0.91, 0.85, 0.97),
        source="Figs. 5 and 6",
        measure="ratio of the associated tokens’ gain in probability",
        paper="over 5",
    ),
]


def make_tables(saes: Mapping[str, Mapping[str, Any]]) -> Tables:
    """CSV files of a results folder; a series per SAE."""
    return {
        "claims": CLAIMS,
        "saes": [{"sae": name, "k": sae["k"], "beta": sae["beta"]} for name, sae in saes.items()],
        "firing": _curve_rows(saes),
        "curves": _curve_rows(saes),
    }


def _curve_rows(saes: Mapping[str, Any]) -> Rows:
    return [
        {"sae": name, "x": x, "y": y, "y_low": y - 0.04 - 0.02 * x, "y_high": y + 0.04 + 0.02 * x}
        for i, name in enumerate(saes)
        for x in (0.25, 0.5, 1, 2, 4)
        for y in [0.1 + (0.8 - 0.07 * (i % 5)) * math.tanh(x / 2) + 0.015 * i]
    ]


def show_curves(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:
    """Lines with bands, markers alone, intervals by row, and a small table."""
    rows = tables.get("curves")
    if not rows:
        return None
    names = list(dict.fromkeys(row["sae"] for row in rows))
    own = {name: [row for row in rows if row["sae"] == name] for name in names}
    lines = [
        Line(
            name,
            styles[name],
            [(row["x"], row["y"]) for row in own[name]],
            marker=MARKERS[i % len(MARKERS)],
            band=[(row["x"], row["y_low"], row["y_high"]) for row in own[name]],
        )
        for i, name in enumerate(names)
    ]
    points = [line._replace(joined=False, band=()) for line in lines]
    charts = []
    for title, drawn in (("Lines with intervals", lines), ("Markers alone", points)):
        svg = draw_lines(
            drawn,
            x=plan_positive([row["x"] for row in rows], label=lambda v: f"{v:g}"),
            y=plan_linear([row["y_high"] for row in rows], label=lambda v: f"{v:g}", zero=True),
            describe=title,
        )
        keys = tuple(Key(line.label, line.style, line.marker, line.joined) for line in drawn)
        charts.append(Chart(title, "effect", "α", svg, keys))
    return _exhibit("curves", "Curves", tuple(charts), data=("curves", "absent"))


def show_intervals(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:
    """A row per SAE with its interval, and a table."""
    rows = [row for row in tables.get("curves", ()) if row["x"] == 1]
    if not rows:
        return None
    middle = 0.45
    estimates = [
        Estimate(
            r["sae"], styles[r["sae"]], *(r[f"y{end}"] - middle for end in ("", "_low", "_high"))
        )
        for r in rows
    ]
    estimates.append(Estimate("not measured", series_style(len(rows)), None, None, None))
    svg = draw_estimates(
        estimates,
        label=lambda v: f"{v:.3f}".replace("-", "−"),
        tick=lambda v: f"{v:g}".replace("-", "−"),
        describe="Differences with intervals",
    )
    table = Figures(
        ("SAE", "Effect", "Interval"),
        tuple((r["sae"], f"{r['y']:.3f}", f"{r['y_low']:.3f} to {r['y_high']:.3f}") for r in rows),
    )
    chart = Chart("Differences", "effect, less 0.45", "effect", svg)
    return _exhibit("intervals", "Intervals", (chart,), figures=(table,), data=("curves",))


def _exhibit(id_: str, title: str, charts: tuple[Chart, ...], **more: Any) -> Exhibit:
    return Exhibit(
        id=id_,
        title=title,
        source="Fig. 5",
        reading=(
            "A latent’s direction is added to the residual stream, and the curves show how much "
            "probability its tokens gain by that. Higher is better, and a flat line does nothing."
        ),
        protocol="10 sequences of 64 tokens, 100 latents per SAE, all positions but the first.",
        label_seen="None of these figures sees the label.",
        paper="Over 5 times TopK on GPT-2 small, layer 7; not comparable with another model.",
        charts=charts,
        figures=more.get("figures", ()),
        data=more["data"],
    )


def write_tables(folder: Path, tables: Tables) -> None:
    """The tables as the CSV files of a results folder."""
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
