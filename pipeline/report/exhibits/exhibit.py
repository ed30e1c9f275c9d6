"""What a measurement shows on the report: charts, a table, and the words that go with them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.charts import Chart

Rows = Sequence[Mapping[str, Any]]  # of a CSV file that evaluation wrote
Tables = Mapping[str, Rows]  # by the file's name, without its suffix


class Figures(NamedTuple):
    """A small table, as text."""

    columns: tuple[str, ...]  # the first names the row
    rows: tuple[tuple[str, ...], ...]


class Exhibit(NamedTuple):
    """One figure or table of the paper, measured here."""

    id: str  # anchor on the page
    title: str
    source: str  # what of the paper it repeats: "Fig. 2", or "" for a control of ours
    reading: str  # two sentences: how to read it
    protocol: str  # what was done: samples, positions, sizes
    label_seen: str  # which of its figures see the label, and which do not
    paper: str  # the paper's value beside ours, or why they cannot be compared
    charts: tuple[Chart, ...]
    figures: tuple[Figures, ...]
    data: tuple[str, ...]  # names of the tables behind it
