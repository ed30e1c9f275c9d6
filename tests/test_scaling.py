"""The simulation of docs/scaling.md against what can be worked out by hand."""

import pytest

from tests.benchmarks.scaling import Setting, simulate

CALM = Setting(
    n_shards=120,
    shard_bytes=10.0,
    seconds=(8.0,),
    straggler_fraction=0.0,
    straggler_factor=1.0,
    mtbf_s=1e12,
    restart_s=0.0,
    retries=2,
    bandwidth=1e9,
    client_bandwidth=5.0,
    overhead_s=0.0,
    verify_rate=100.0,
)


@pytest.mark.parametrize(
    ("changes", "n_workers", "map_s"),
    [
        ({}, 1, 120 * (8 + 2)),
        ({}, 12, 10 * (8 + 2)),
        ({"bandwidth": 20.0}, 12, 10 * (8 + 6)),  # twelve write at once, at 20 / 12 each
        ({"overhead_s": 20.0}, 12, 120 * 20 + 10),  # the scheduler hands out one in 20 s
        ({"straggler_fraction": 1.0, "straggler_factor": 3.0}, 12, 10 * (24 + 2)),
    ],
)
def test_undisturbed_runs(changes, n_workers, map_s):
    outcome = simulate(CALM._replace(**changes), n_workers)
    assert outcome.map_s == pytest.approx(map_s)
    assert outcome.verify_s == pytest.approx(1200 / min(100, changes.get("bandwidth", 100)))
    assert (outcome.deaths, outcome.given_up, outcome.lost) == (0, 0, 0)


def test_deaths_cost_time_and_work():
    calm = simulate(CALM, 12)
    outcome = simulate(CALM._replace(mtbf_s=100.0, restart_s=5.0, retries=1000), 12)
    assert outcome.map_s > calm.map_s
    assert 0.01 < outcome.lost < 0.3
    assert outcome.deaths > 0
    assert outcome.given_up == 0


def test_a_shard_is_given_up_after_its_tries():
    outcome = simulate(CALM._replace(mtbf_s=1.0, retries=2), 4)
    assert outcome.given_up == pytest.approx(120, abs=20)  # ten seconds need ten lucky ones
    assert outcome.deaths >= 3 * outcome.given_up
