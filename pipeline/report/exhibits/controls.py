"""What the gradient buys: every SAE beside the controls that the paper lacks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.charts import Chart
from pipeline.report.exhibits.exhibit import Exhibit, Figures, Rows, Tables
from pipeline.report.exhibits.series import format_interval, name_kind
from pipeline.report.figures import Estimate, draw_estimates
from pipeline.report.tables import format_percent, format_ratio, format_short, show

_STEERED_PLAIN = "gradient at inference only"
_READING = (
    "The gain of a g-SAE with ∇ has two parts: at inference its selection sees the label, and in "
    "training the gradients shaped its dictionary. TopK given ∇ at inference has the first part "
    "alone, a g-SAE without ∇ the second alone, and one trained on shuffled gradients shows what "
    "the second owes to anything but what they say."
)
_PROTOCOL = (
    "Reconstructions are patched in at all positions but those that training left out. Shuffled "
    "gradients are permuted across the tokens of the training data. The random decoder is an "
    "untrained SAE: unit rows, their transpose as encoder, the mean activation as bias. PCA keeps "
    "the k first components of every row, “PCA, TopK” the k that are largest in each row; random "
    "decoder and PCA, TopK get ∇ at the strength of the g-SAEs. Intervals are 95%, from resampling "
    "blocks of text."
)
_LABEL = (
    "Filled marks and “yes” in the table see the label: the selection uses the gradient of the "
    "very loss that is then measured. Outlined marks and “no” do not, and are what an exported SAE "
    "does. Where an SAE knows no gradient, it has one row."
)
_PAPER = (
    "The paper measures with the gradient at inference alone and has none of these controls, so "
    "there is no value of its to compare."
)


class _Row(NamedTuple):
    """One SAE or control in one mode."""

    name: str
    kind: str
    learned: bool
    k: Any
    sees_label: bool
    figures: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name}, {'with' if self.sees_label else 'without'} ∇"


def show_controls(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:
    """Loss added of each with its interval, a chart per k, and all figures as a table; None without
    controls.
    """
    controls = tables.get("controls") or ()
    if not controls:
        return None
    rows = [*_read_saes(tables.get("saes") or ()), *_read_controls(controls)]
    rows.sort(key=lambda row: row.k)
    learned, others = ([row for row in rows if row.learned == wanted] for wanted in (True, False))
    return Exhibit(
        id="controls",
        title="What the gradient buys",
        source="",
        reading=_READING,
        protocol=_PROTOCOL,
        label_seen=_LABEL,
        paper=_PAPER,
        charts=(
            *_chart(learned, styles, "Loss added by trained dictionaries"),
            *_chart(others, styles, "Loss added by dictionaries that were not trained"),
        ),
        figures=(_tabulate(rows),),
        data=("saes", "controls"),
    )


def _read_saes(rows: Rows) -> Iterator[_Row]:
    """Without beta both modes are one."""
    for row in rows:
        steered = row["mode"] == "with_gradient"
        if row["beta"] or not steered:
            yield _Row(row["sae"], name_kind(row), True, row["k"], steered, row)


def _read_controls(rows: Rows) -> Iterator[_Row]:
    for row in rows:
        learned = row["kind"] == _STEERED_PLAIN
        yield _Row(row["control"], row["kind"], learned, row["k"], row["sees_label"], row)


def _chart(rows: Sequence[_Row], styles: Mapping[str, str], title: str) -> Iterator[Chart]:
    ks = sorted({row.k for row in rows})
    for k in ks:
        estimates = [
            Estimate(
                row.label,
                styles.get(row.name, "ink d2"),
                *(row.figures.get(f"loss_added{end}") for end in ("", "_low", "_high")),
                marker="dot" if row.sees_label else "ring",
            )
            for row in rows
            if row.k == k
        ]
        of_k = f"{title}, k = {k}" if len(ks) > 1 else title
        describe = f"{of_k}, with and without the gradient at inference, with intervals"
        svg = draw_estimates(estimates, label=format_percent, tick=_tick, describe=describe)
        yield Chart(of_k, "", "of the model’s own loss", svg)


def _tabulate(rows: Sequence[_Row]) -> Figures:
    columns = (
        "SAE or control",
        "kind",
        "sees the label",
        "loss added",
        "KL, nats per token",
        "CE recovered, mean",
        "CE recovered, zero",
        "NMSE",
    )
    return Figures(
        columns,
        tuple(
            (
                row.label,
                row.kind,
                "yes" if row.sees_label else "no",
                format_interval(row.figures, "loss_added", format_percent),
                format_interval(row.figures, "kl", format_short),
                show(row.figures.get("ce_recovered_mean"), format_percent),
                show(row.figures.get("ce_recovered_zero"), format_percent),
                format_interval(row.figures, "nmse", format_ratio),
            )
            for row in rows
        ),
    )


def _tick(value: float) -> str:
    return f"{100 * value:,.4g}%".replace("-", "−")
