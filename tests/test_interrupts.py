"""Ctrl-C and SIGTERM: one line, and an exit status of their own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.cli import _interrupts

STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}
TOLD = "Interrupted. Run the same command again.\n"
# Ends only at the second signal.
STUBBORN = """
import time
from pipeline.cli import _interrupts
with _interrupts():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("unwinding", flush=True)
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in STOPS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt(number, unwound):
    with _interrupts():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            unwound.append(number)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_unwinds(capfd, number):
    unwound = []
    with pytest.raises(SystemExit) as stopped:
        interrupt(number, unwound)
    assert stopped.value.code == STOPS[number]
    assert unwound == [number]
    assert capfd.readouterr().err == TOLD


def test_handlers_are_put_back(handlers):
    with _interrupts():
        assert all(signal.getsignal(number) != handlers[number] for number in STOPS)
    assert {number: signal.getsignal(number) for number in STOPS} == handlers


@pytest.mark.parametrize("number", STOPS)
def test_a_second_signal_ends_the_process_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    for told in ("ready", "unwinding"):
        assert process.stdout.readline().strip() == told
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (STOPS[number], TOLD)
