"""Made-up tables of every measurement, with the columns that evaluation writes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.report.exhibits.exhibit import Rows, Tables
from tests.report.evidence import CLAIMS

Saes = Mapping[str, Mapping[str, Any]]
MODES = ("with_gradient", "without_gradient")
LAYERS = tuple(range(12))


def make_all(saes: Saes) -> Tables:
    """Every table of a results folder, of these SAEs."""
    rows = list(_list_saes(saes))
    return {
        "claims": CLAIMS,
        "saes": rows,
        "sensitivity": list(_list_sensitivity()),
        "perturbation": list(_list_perturbation()),
        "fronts": list(_list_fronts(rows)),
        "dead": list(_list_dead(saes)),
        "steering": list(_list_steering(saes)),
        "steering_latents": list(_list_latents(saes)),
        "firing": list(_list_firing(saes)),
        "density_medians": list(_list_medians(saes)),
        "splitting": list(_list_cosines(saes)),
        "splitting_summary": list(_list_summary(saes)),
        "splitting_gradients": list(_list_gradients(saes)),
        "controls": list(_list_controls(saes)),
    }


def add_interval(name: str, value: float, half: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def _list_saes(saes: Saes) -> Iterator[dict[str, Any]]:
    for name, sae in saes.items():
        for mode in MODES:
            facts = {key: sae.get(key) for key in ("k", "beta", "d_sae", "seed")}
            figures = dict(sae[mode])
            for key in ("loss_added", "nmse", "kl"):
                figures |= add_interval(key, sae[mode][key], 0.004)
            about = {"sae": name, "architecture": "topk", "gradient": "full", "mode": mode}
            yield about | facts | figures


def _list_sensitivity() -> Iterator[dict[str, Any]]:
    strengths = {"difference": 2.1, "other_difference": 1.9, "covariance": 1.3, "isotropic": 0.7}
    for layer in LAYERS:
        for name, strength in strengths.items():
            mean = strength * (0.4 + 0.1 * layer) * 1e-2
            against = {
                f"ratio_to_{other}": strength / strengths[other]
                for other in ("isotropic", "covariance")
            }
            row = {"layer": layer, "direction": name, "n_rows": 8192, "n_blocks": 128}
            for key, value in (("mean", mean), ("gradient_norm", 0.2), *against.items()):
                row |= add_interval(key, value, 0.06 * value)
            yield row


def _list_perturbation() -> Iterator[dict[str, Any]]:
    for site in ("resid_post", "mlp_out"):
        for layer in LAYERS[1::2]:
            for size in (0.03, 0.1, 0.3):
                good = 0.95 - 0.4 * size - 0.01 * layer
                row = {"site": site, "layer": layer, "size": size, "n": 64, "context": 64}
                row |= {"norm": 25 * size, "change": size / 10, "spread": 1.6}
                row |= add_interval("rho_gradient", good, 0.08)
                row |= add_interval("rho_norm", 0.3, 0.2) | add_interval("rho_steepness", 0.5, 0.2)
                yield row | add_interval("rho_difference", good - 0.3, 0.2)


def _list_fronts(saes: Rows) -> Iterator[dict[str, Any]]:
    panels = (
        ("latents_loss", "d_sae", "loss_added", "k"),
        ("l0_nmse", "l0", "nmse", "d_sae"),
        ("l0_loss", "l0", "loss_added", "d_sae"),
    )
    for panel, x, y, fixed in panels:
        for sae in saes:
            about = {key: sae[key] for key in ("sae", "architecture", "gradient", "beta", "seed")}
            where = {"panel": panel, "fixed": fixed, "fixed_value": sae[fixed], "x": sae[x]}
            front = {"mode": sae["mode"], "on_front": True, "x_name": x, "y_name": y}
            yield about | where | front | add_interval("y", sae[y], 0.004)


def _list_dead(saes: Saes) -> Iterator[dict[str, Any]]:
    for name, sae in saes.items():
        for mode in MODES:
            row = {"sae": name, "mode": mode, "k": sae["k"]}
            row |= add_interval("dead_paper", sae[mode]["dead_fraction"], 0.02)
            yield row | add_interval("dead_held_out", sae[mode]["dead_fraction_held_out"], 0.02)


def _list_steering(saes: Saes) -> Iterator[dict[str, Any]]:
    for i, name in enumerate([*saes, "random directions"]):
        for alpha in (0.25, 0.5, 1, 2, 4):
            effect = 0.4 * math.tanh(alpha / 2) * (1 + 0.1 * i)
            row = {"sae": name, "alpha": float(alpha), "alpha_absolute": 25.9 * alpha}
            row |= {"n_latents": 100, "n_sequences": 10, "context": 64}
            row |= {"n_positions": 63, "n_tokens": 10}
            row |= add_interval("associated", effect, 0.03)
            row |= add_interval("others", -effect, 0.03)
            yield row | add_interval("others_absolute", 1.4 * effect, 0.05)


def _list_latents(saes: Saes) -> Iterator[dict[str, Any]]:
    for i, name in enumerate([*saes, "random directions"]):
        for latent in range(40):
            effect = 0.18 + 0.02 * i + 0.1 * math.sin(7.1 * latent + i)
            row = {"sae": name, "latent": latent, "alpha": 1.0, "associated": effect}
            yield row | {"others_absolute": 0.3 + effect}


def _list_firing(saes: Saes) -> Iterator[dict[str, Any]]:
    for i, name in enumerate(saes):
        for mode in MODES:
            for q in range(101):
                frequency = 0.0 if q < 30 else 1e-5 * 10 ** ((q - 30) / 18) * (1 + 0.2 * i)
                row = {"sae": name, "mode": mode, "fraction_of_latents": q / 100}
                yield row | {"firing_frequency": frequency}


def _list_medians(saes: Saes) -> Iterator[dict[str, Any]]:
    for name, sae in saes.items():
        for mode in MODES:
            row = {"sae": name, "mode": mode, "k": sae["k"], "live": 1450, "d_sae": sae["d_sae"]}
            row |= add_interval("median_live", 0.0024, 0.0003)
            yield row | add_interval("median_all", 0.0011, 0.0002)


def _list_cosines(saes: Saes) -> Iterator[dict[str, Any]]:
    for i, name in enumerate(saes):
        for j in range(24):
            low = 0.1 + 0.025 * j
            fraction = math.exp(-(((low - 0.3 - 0.01 * i) / 0.08) ** 2)) / 5
            yield {"sae": name, "bin_low": low, "bin_high": low + 0.025, "fraction": fraction}


def _list_summary(saes: Saes) -> Iterator[dict[str, Any]]:
    for name, sae in saes.items():
        row = {"sae": name, "live": 1450, "d_sae": sae["d_sae"]}
        row |= {"cosine_q05": 0.21, "cosine_median": 0.33, "cosine_q95": 0.61}
        row |= add_interval("ratio", 1.2, 0.15)
        yield row | add_interval("ratio_active", 1.3, 0.2)


def _list_gradients(saes: Saes) -> Iterator[dict[str, Any]]:
    for i, name in enumerate(saes):
        for j, group in enumerate(("left", "middle", "right")):
            row = {"sae": name, "group": group, "n": 30, "blocks": 60, "rows": 15300}
            row |= {"loss_tokens": 8160}
            row |= add_interval("gradient", (2.1 + 0.3 * j + 0.05 * i) * 1e-5, 1e-6)
            yield row | add_interval("gradient_active", (5 + j) * 1e-5, 6e-6)


def _list_controls(saes: Saes) -> Iterator[dict[str, Any]]:
    for k in sorted({sae["k"] for sae in saes.values()}):
        for name, kind, of, modes in (
            (f"k{k}-beta0 + gradient at beta 1e5", "gradient at inference only", "k", MODES[:1]),
            (f"random-k{k}-d2048", "random decoder", None, MODES),
            (f"pca-k{k}", "PCA", None, MODES[1:]),
        ):
            for mode in modes:
                row = {"control": name, "kind": kind, "of": of, "k": k, "mode": mode}
                row |= {"sees_label": mode == MODES[0], "beta": 0.0, "d_sae": 2048}
                row |= add_interval("loss_added", 0.31, 0.01) | add_interval("kl", 0.7, 0.02)
                row |= {"ce_recovered_mean": 0.8, "ce_recovered_zero": 0.9}
                yield row | add_interval("nmse", 0.5, 0.01)


def list_data_links(page: str, names: Sequence[str]) -> dict[str, int]:
    """How often the page links each table."""
    return {name: page.count(f'href="demo/{name}.csv"') for name in names}
