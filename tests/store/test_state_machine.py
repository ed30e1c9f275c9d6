"""Write, kill, resume, damage, verify, repair, pull and read in any order: exact bytes or an error.

More of it than the suite runs:

    python -m tests.store.test_state_machine --steps 10000 --seed 0
"""

import argparse
import json
import time
import traceback
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.store.state_machine import StoreMachine

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}

TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=12, stateful_step_count=30, derandomize=True, **QUIET
)


def run_extended(n_steps: int, first_seed: int) -> dict:
    """Run machines of up to 50 steps with one seed after another until there are `n_steps`.

    What fails is printed as it is: shrinking it would take more steps than the run.
    """
    StoreMachine.counts.clear()
    started, failures, number = time.monotonic(), 0, first_seed
    while count_steps(StoreMachine.counts) < n_steps:
        options = settings(
            max_examples=100, stateful_step_count=50, phases=[Phase.generate], **QUIET
        )
        try:
            run_state_machine_as_test(
                seed(number)(type("M", (StoreMachine,), {})), settings=options
            )
        except Exception:
            traceback.print_exc()
            failures += 1
        number += 1
    seconds = time.monotonic() - started
    steps = count_steps(StoreMachine.counts)
    return {
        "name": "state machine",
        "steps": steps,
        "seed": first_seed,
        "failures": failures,
        "counts": dict(sorted(StoreMachine.counts.items())),
        "seconds": round(seconds, 1),
        "steps_per_s": round(steps / seconds, 1),
    }


def count_steps(counts: Counter[str]) -> int:
    """Rules that did something; what they met is counted beside them."""
    return sum(count for name, count in counts.items() if ":" not in name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = run_extended(arguments.steps, arguments.seed)
    print(json.dumps(result))  # noqa: T201
    raise SystemExit(1 if result["failures"] else 0)
