"""Progress on a terminal: one bar with rate and time left; in a log file, a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0  # between lines where there is no terminal


@contextmanager
def byte_progress(label: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n_bytes)`; shows the MB done, MB/s and the time left."""
    with token_progress(label, n_bytes / 1e6, unit="MB") as advance:
        yield lambda n_bytes: advance(n_bytes / 1e6)


@contextmanager
def token_progress(
    label: str, total: int | float | None, unit: str = "tokens", *, since: float | None = None
) -> Iterator[Callable[..., None]]:
    """Yield `advance(n_tokens, note="", skipped=False, total=None)`; shows the tokens done,
    tokens/s, the time left and the note. Skipped ones are done, but do not count in tokens/s;
    a total takes the place of the one before. `since` is when it began, by time.monotonic().
    """
    started = time.monotonic() if since is None else since
    if not sys.stderr.isatty():
        yield _LinePrinter(label, total, unit, started)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn(f"{{task.completed:,.0f}} {unit}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, rate="", note="")
        done = 0

        def advance(
            n_tokens: int | float,
            note: str = "",
            *,
            skipped: bool = False,
            total: int | float | None = None,
        ) -> None:
            nonlocal done
            done += 0 if skipped else n_tokens
            rate = f"{done / (time.monotonic() - started):,.0f} {unit}/s"
            progress.update(task, advance=n_tokens, total=total, rate=rate, note=note)

        yield advance


class _LinePrinter:
    def __init__(self, label: str, total: int | float | None, unit: str, started: float) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._started, self._printed = 0.0, started, -LINE_EVERY_S
        self._skipped = 0.0

    def __call__(
        self,
        n_tokens: int | float,
        note: str = "",
        *,
        skipped: bool = False,
        total: int | float | None = None,
    ) -> None:
        self._done += n_tokens
        self._total = self._total if total is None else total
        if skipped:
            self._skipped += n_tokens
            return
        now = time.monotonic()
        if self._done != self._total and now - self._printed < LINE_EVERY_S:
            return
        self._printed = now
        rate = (self._done - self._skipped) / max(now - self._started, 1e-9)
        of_total = ""
        if self._total:
            left = max(self._total - self._done, 0) / rate if rate else 0.0
            of_total = f" of {self._total:,.0f}, {left:.0f} s left"
        click.echo(
            f"{self._label}: {self._done:,.0f} {self._unit}{of_total}, "
            f"{rate:,.0f} {self._unit}/s {note}".rstrip(),
            err=True,
        )
