"""What progress says in a log file."""

import time

import pytest

from pipeline.cli import progress
from pipeline.cli.training import step_progress
from pipeline.train import StepReport


def report(step: int, tokens: int) -> StepReport:
    return StepReport(step, 4, tokens, 0.1, 1.0, logged=False, metrics={})


def test_each_pass_has_a_total_and_a_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that goes on after step 2, of batches that differ in their rows."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with step_progress() as show:
        for step in range(1, 5):
            now += 2
            show(report(step, 100 * step))
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
        for step, tokens in ((3, 270), (4, 350)):
            now += 2
            show(report(step, tokens))
    assert capsys.readouterr().err.splitlines() == [
        "train: 100 tokens of 400, 6 s left, 50 tokens/s",
        "train: 400 tokens of 400, 0 s left, 50 tokens/s",
        "train: 270 tokens of 360, 2 s left, 45 tokens/s",
        "train: 350 tokens of 350, 0 s left, 42 tokens/s",
    ]
