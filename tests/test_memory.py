"""Memory that is freed and asked for again."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from pipeline.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def fill():
    torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

faults = [fill() for _ in range(24)]
print(min(after - before for before, after in zip(faults[-5:], faults[-4:])))
"""


@pytest.mark.parametrize(("call", "large_pages"), [("kept", "1"), ("kept", "0"), ("", "1")])
def test_memory_is_used_again_without_page_faults(call, large_pages):
    """By default such a piece is mapped anew, in 16,384 small pages or 32 large ones; one that is
    kept is found again after some times.
    """
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": large_pages}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, call],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (int(found.stdout) < 16) == (call == "kept" and large_pages == "1")
