"""The page's summary: which of the paper's claims hold here."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.exhibits.exhibit import Rows, Tables
from pipeline.report.figures import as_number
from pipeline.report.tables import format_short, minus, show

SYMBOLS = {  # of each verdict, as evaluation writes it
    "holds": "✓",
    "does not hold": "✗",
    "not decided": "~",
    "not measured": "·",
}
_MIXED = "±"
_NO_VALUE = {"label_share": "no gain to share"}  # why an undecided claim has none, by id
_MOST_OPEN = 40  # comparisons that the page shows unfolded


class Verdict(NamedTuple):
    """Never by colour alone: words, a symbol, and a CSS class for the colour."""

    words: str
    symbol: str
    kind: str


class Comparison(NamedTuple):
    """One comparison of a claim, as text."""

    verdict: Verdict
    words: str  # what was compared
    value: str
    interval: str
    seeds: str  # the range over seeds, where several were trained
    paper: str  # the paper's own value
    sees_label: bool


class Claim(NamedTuple):
    """One claim of the paper, or of a control, and all that speaks for or against it."""

    verdict: Verdict
    statement: str
    source: str  # where the paper claims it
    measure: str  # what the values are
    comparisons: tuple[Comparison, ...]


class Claims(NamedTuple):
    by_claim: str  # how many have each verdict, in a sentence
    by_comparison: str
    claims: tuple[Claim, ...]
    unfolded: bool


def show_claims(tables: Tables) -> Claims | None:
    """The claims in their order, each with its comparisons; None where none was looked at."""
    rows = tables.get("claims")
    if not rows:
        return None
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return Claims(
        by_claim=count_claims([_list_verdicts(group) for group in groups.values()]),
        by_comparison=count_comparisons(rows),
        claims=tuple(_read_claim(group) for group in groups.values()),
        unfolded=len(rows) <= _MOST_OPEN,
    )


def count_claims(verdicts: Sequence[Sequence[str]]) -> str:
    """How many claims have each verdict in all of their comparisons; one's are a sequence."""
    counts = Counter(_sum_up(group).kind for group in verdicts)
    told = [
        f"{n} {one if n == 1 else several}"
        for kind, one, several in (
            ("holds", "holds", "hold"),
            ("does-not-hold", "does not hold", "do not hold"),
            ("mixed", "differs between comparisons", "differ between comparisons"),
            ("not-decided", "is not decided", "are not decided"),
            ("not-measured", "is not measured", "are not measured"),
        )
        if (n := counts[kind]) or kind != "not-measured"
    ]
    return f"Of {len(verdicts)} claims {', '.join(told[:-1])} and {told[-1]}"


def count_comparisons(rows: Rows) -> str:
    """How many comparisons have each verdict, and how many of those that hold see the label."""
    found = [row for row in rows if row["verdict"] != "not measured"]
    holding = [row for row in found if row["verdict"] == "holds"]
    seeing = sum(row.get("sees_label") is True for row in holding)
    against, open_ = (
        sum(row["verdict"] == verdict for row in found)
        for verdict in ("does not hold", "not decided")
    )
    return (
        f"Of {len(found)} comparisons {len(holding)} hold{'s' * (len(holding) == 1)}"
        f"{f' ({seeing} by seeing the label)' if seeing else ''}, "
        f"{against} do{'es' * (against == 1)} not hold, "
        f"{open_} {'is' if open_ == 1 else 'are'} not decided."
    )


def _list_verdicts(rows: Rows) -> list[str]:
    return [row["verdict"] for row in rows if row["verdict"] != "not measured"]


def _read_claim(rows: Rows) -> Claim:
    measures = {str(row.get("measure") or "") for row in rows}
    one = len(measures) == 1
    return Claim(
        verdict=_sum_up(_list_verdicts(rows)),
        statement=str(rows[0].get("statement") or ""),
        source=str(rows[0].get("source") or ""),
        measure=measures.pop() if one else "",
        comparisons=tuple(_read_comparison(row, with_measure=not one) for row in rows),
    )


def _sum_up(verdicts: Sequence[str]) -> Verdict:
    """The verdict on which all comparisons agree, or in how many of them the claim holds."""
    if len(set(verdicts)) <= 1:
        return _judge(verdicts[0] if verdicts else "not measured")
    told = "holds" if "holds" in verdicts else "does not hold"
    words = "fails" if told == "does not hold" else told
    return Verdict(f"{words} in {verdicts.count(told)} of {len(verdicts)}", _MIXED, "mixed")


def _judge(verdict: str) -> Verdict:
    return Verdict(verdict, SYMBOLS[verdict], verdict.replace(" ", "-"))


def _read_comparison(row: Mapping[str, Any], *, with_measure: bool) -> Comparison:
    numbers = [row.get(key) for key in ("value", "low", "high", "seeds_low", "seeds_high")]
    value, *ends = _format_together(*numbers)
    words = [row.get("comparison"), row.get("measure") if with_measure else ""]
    undecided = row.get("value") is None and row["verdict"] == "not decided"
    several = (as_number(row.get("n_seeds")) or 0) > 1
    return Comparison(
        verdict=_judge(row["verdict"]),
        words="; ".join(str(part) for part in words if part),
        value=_NO_VALUE.get(row["id"], value) if undecided else value,
        interval=" to ".join(ends[:2]) if "–" not in ends[:2] else "",
        seeds=" to ".join(ends[2:]) if several and "–" not in ends[2:] else "",
        paper=_say(row.get("paper")),
        sees_label=row.get("sees_label") is True,
    )


def _format_together(*values: Any) -> Iterator[str]:
    """Numbers with as many decimals as give the largest of them three digits."""
    largest = max((abs(v) for value in values if (v := as_number(value)) is not None), default=0.0)
    if not 1e-5 <= largest < 1e4:
        return (show(value, format_short) for value in values)
    decimals = max(0, 2 - math.floor(math.log10(largest)))
    return (show(value, lambda v: minus(f"{v:,.{decimals}f}")) for value in values)


def _say(value: Any) -> str:
    return minus(value) if value and isinstance(value, str) else show(value, format_short)
