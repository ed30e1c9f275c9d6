"""Which SAEs no other of their kind beats on two counts at once (Olmo et al. 2024, Fig. 4)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

KINDS = ("architecture", "beta", "gradient", "mode")  # what a front's SAEs have in common


class Panel(NamedTuple):
    """One of the figure's three; low is better on both axes."""

    name: str
    x: str  # column of saes.csv
    y: str
    fixed: str  # column that is equal within a panel


PANELS = (
    Panel("latents_loss", "d_sae", "loss_added", "k"),
    Panel("l0_nmse", "l0", "nmse", "d_sae"),
    Panel("l0_loss", "l0", "loss_added", "d_sae"),
)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that none beats, in the order of x, then y.

    A point is beaten by one that is lower on one axis and not higher on the other; of equal points
    none beats another.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=points.__getitem__):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def list_fronts(saes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every SAE in every panel, from the rows of saes.csv, with whether it is on its kind's front.

    Columns: panel, fixed and fixed_value (the k or d_sae that the panel holds), sae, architecture,
    beta, gradient, mode, seed, x, y, y_low, y_high, on_front. L0 is as measured. A front is over
    all of a kind's seeds. A row without a finite x and y is
    left out.

    Differs: the paper does not say which points its fronts are of; ours are of one architecture,
    beta and gradient, with and without the gradient at inference apart.
    """
    rows = [row for panel in PANELS for sae in saes if (row := _place(panel, sae)) is not None]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("panel", "fixed_value", *KINDS))
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        for i in pareto_front([(row["x"], row["y"]) for row in group]):
            group[i]["on_front"] = True
    return rows


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _place(panel: Panel, sae: Mapping[str, Any]) -> dict[str, Any] | None:
    if not all(_is_finite(sae.get(axis)) for axis in (panel.x, panel.y)):
        return None
    return {
        "panel": panel.name,
        "fixed": panel.fixed,
        "fixed_value": sae.get(panel.fixed),
        "sae": sae["sae"],
        **{name: sae.get(name) for name in KINDS},
        "seed": sae.get("seed"),
        "x": float(sae[panel.x]),
        "y": float(sae[panel.y]),
        "y_low": sae.get(f"{panel.y}_low"),
        "y_high": sae.get(f"{panel.y}_high"),
        "on_front": False,
    }
