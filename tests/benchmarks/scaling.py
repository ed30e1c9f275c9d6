"""What a run of many workers costs, simulated: `python -m tests.benchmarks.scaling`.

A discrete-event simulation of pipeline.cluster, without sleeping. A shard is computed by a worker
and then written over a file system that all writers share equally; the scheduler hands out one
shard after the other; workers die and start again, and a shard is given up after `--retries` more
tries. Last, the driver reads every byte once. Seconds of a shard are measured (`--store`: those in
its provenance.json, scaled to the mean) or spread like a lognormal; the scheduler's time per shard
is measured with `--measure`. Prints a table over numbers of workers and one JSON line last.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

GB = 1e9


class Setting(NamedTuple):
    """What a simulated run is given."""

    n_shards: int
    shard_bytes: float  # of all its files
    seconds: tuple[float, ...]  # of computing a shard on one worker: drawn from these
    straggler_fraction: float  # of tries, that take `straggler_factor` times as long
    straggler_factor: float
    mtbf_s: float  # mean time between failures of one worker
    restart_s: float  # from a worker's death until it takes shards again
    retries: int
    bandwidth: float  # of the shared file system, bytes/s
    client_bandwidth: float  # of one worker's durable writes, bytes/s
    overhead_s: float  # of the scheduler, per shard, one after the other
    verify_rate: float  # bytes/s of the driver's last check


class Outcome(NamedTuple):
    """What came of it."""

    map_s: float  # until the last shard is committed
    verify_s: float
    lost: float  # work of dead workers, of all work
    written_s: float  # that a shard waited for its writing, mean
    tail_s: float  # from the first worker without another shard until the end
    deaths: int
    given_up: int  # shards that killed too many workers

    @property
    def total_s(self) -> float:
        return self.map_s + self.verify_s


class _Link:
    """A file system that its writers share equally, each up to a rate of its own.

    `served` is what every writer has had since the start: who began at s and wants b is done when
    it reaches s + b.
    """

    def __init__(self, bandwidth: float, client_bandwidth: float) -> None:
        self._bandwidth, self._client = bandwidth, client_bandwidth
        self._served, self._now = 0.0, 0.0
        self._waiting: list[tuple[float, int, int]] = []  # goal, worker, its life
        self._gone: set[tuple[int, int]] = set()

    def _rate(self) -> float:
        return min(self._client, self._bandwidth / max(1, self._n_writers()))

    def _n_writers(self) -> int:
        return len(self._waiting) - len(self._gone)

    def advance(self, now: float) -> None:
        self._served += (now - self._now) * self._rate()
        self._now = now

    def start(self, worker: int, life: int, n_bytes: float) -> None:
        heapq.heappush(self._waiting, (self._served + n_bytes, worker, life))

    def stop(self, worker: int, life: int) -> None:
        self._gone.add((worker, life))

    def next_end(self) -> float:
        while self._waiting and self._waiting[0][1:] in self._gone:
            self._gone.discard(heapq.heappop(self._waiting)[1:])
        if not self._waiting:
            return math.inf
        return self._now + max(0.0, self._waiting[0][0] - self._served) / self._rate()

    def pop(self) -> tuple[int, int]:
        return heapq.heappop(self._waiting)[1:]


def simulate(setting: Setting, n_workers: int, seed: int = 0) -> Outcome:
    """Run the clock from event to event until every shard is committed or given up."""
    draw = random.Random(seed)
    link = _Link(setting.bandwidth, setting.client_bandwidth)
    queue = deque(range(setting.n_shards))
    deaths_of = [0] * setting.n_shards
    life = [0] * n_workers  # counts a worker's deaths: events of a former life are stale
    holds: list[int | None] = [None] * n_workers
    since, writes_since = [0.0] * n_workers, [math.inf] * n_workers
    events: list[tuple[float, int, str, int, int]] = []  # time, order, what, worker, life
    order = itertools.count()
    idle: set[int] = set()
    now = free_at = done_work = lost_work = write_time = 0.0
    finished = given_up = deaths = 0
    first_idle = math.inf

    def at(when: float, what: str, worker: int) -> None:
        heapq.heappush(events, (when, next(order), what, worker, life[worker]))

    def hand_out(worker: int) -> None:
        nonlocal free_at, first_idle
        if not queue:
            idle.add(worker)
            first_idle = min(first_idle, now)
            return
        free_at = max(free_at, now) + setting.overhead_s
        holds[worker], since[worker] = queue.popleft(), free_at
        seconds = draw.choice(setting.seconds)
        if draw.random() < setting.straggler_fraction:
            seconds *= setting.straggler_factor
        at(free_at + seconds, "computed", worker)

    for worker in range(n_workers):
        hand_out(worker)
        at(draw.expovariate(1 / setting.mtbf_s), "dies", worker)
    while finished + given_up < setting.n_shards:
        end = link.next_end()
        if events and events[0][0] <= end:
            now, _, what, worker, lived = heapq.heappop(events)
            link.advance(now)
            if lived != life[worker]:
                continue
        else:
            now = end
            link.advance(now)
            (worker, lived), what = link.pop(), "written"
        shard = holds[worker]
        if what == "computed":
            writes_since[worker] = now
            link.start(worker, lived, setting.shard_bytes)
        elif what == "written":
            finished += 1
            done_work += now - since[worker]
            write_time += now - writes_since[worker]
            holds[worker], writes_since[worker] = None, math.inf
            hand_out(worker)
        elif what == "dies":
            deaths += 1
            if writes_since[worker] < math.inf:
                link.stop(worker, lived)
                writes_since[worker] = math.inf
            if shard is not None:
                lost_work += max(0.0, now - since[worker])
                deaths_of[shard] += 1
                if deaths_of[shard] > setting.retries:
                    given_up += 1
                else:
                    queue.append(shard)
                holds[worker] = None
            idle.discard(worker)
            life[worker] += 1
            at(now + setting.restart_s, "ready", worker)
            at(now + setting.restart_s + draw.expovariate(1 / setting.mtbf_s), "dies", worker)
            if queue and idle:
                hand_out(idle.pop())
        else:
            hand_out(worker)
    n_bytes = finished * setting.shard_bytes
    return Outcome(
        map_s=now,
        verify_s=n_bytes / min(setting.verify_rate, setting.bandwidth),
        lost=lost_work / max(done_work + lost_work, 1e-9),
        written_s=write_time / max(finished, 1),
        tail_s=max(0.0, now - first_idle),
        deaths=deaths,
        given_up=given_up,
    )


def read_seconds(store: Path) -> list[float]:
    """What the shards of a store took, the first of each process, which loads a model, aside."""
    shards = json.loads((store / "provenance.json").read_text())["shards"]
    seen, seconds = set(), []
    for shard in shards:
        if shard["pid"] in seen:
            seconds.append(shard["seconds"])
        seen.add(shard["pid"])
    return seconds


def draw_seconds(mean: float, spread: float) -> list[float]:
    """Lognormal with that mean and relative standard deviation: 1,000 draws."""
    sigma = math.sqrt(math.log(1 + spread**2))
    draw = random.Random(0)
    return [mean * math.exp(draw.gauss(-(sigma**2) / 2, sigma)) for _ in range(1000)]


def measure_overhead(n_tasks: int) -> float:
    """Seconds per task that does nothing, on two workers."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.gather(client.map(abs, range(100), pure=False))
        started = time.perf_counter()
        client.gather(client.map(abs, range(n_tasks), pure=False))
        return (time.perf_counter() - started) / n_tasks


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--bytes-per-token", type=float, default=6416, help="GPT-2 XL, one layer")
    parser.add_argument("--shard-tokens", type=int, default=79_872)
    parser.add_argument("--rate", type=float, default=10_000, help="tokens/s of a worker")
    parser.add_argument("--spread", type=float, default=0.1, help="of a shard's seconds")
    parser.add_argument("--store", type=Path, help="take the spread that its shards had")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--stragglers", type=float, default=0.01)
    parser.add_argument("--straggler-factor", type=float, default=10)
    parser.add_argument("--mtbf-hours", type=float, default=24)
    parser.add_argument("--restart-s", type=float, default=60)
    parser.add_argument("--retries", type=int, default=2)
    parser.add_argument("--bandwidth", type=float, default=2.0, help="GB/s of the file system")
    parser.add_argument("--client-bandwidth", type=float, default=0.5, help="GB/s of one worker")
    parser.add_argument("--overhead-ms", type=float, default=1.0, help="of the scheduler per shard")
    parser.add_argument("--verify-rate", type=float, default=1.0, help="GB/s of one process")
    parser.add_argument("--measure", action="store_true", help="measure the scheduler's time")
    arguments = parser.parse_args()
    overhead = measure_overhead(2000) if arguments.measure else arguments.overhead_ms / 1000
    mean = arguments.shard_tokens / arguments.rate
    seconds = draw_seconds(mean, arguments.spread)
    if arguments.store:
        seconds = read_seconds(arguments.store)
        seconds = [mean * value * len(seconds) / sum(seconds) for value in seconds]
    setting = Setting(
        n_shards=math.ceil(arguments.tokens / arguments.shard_tokens),
        shard_bytes=arguments.bytes_per_token * arguments.shard_tokens,
        seconds=tuple(seconds),
        straggler_fraction=arguments.stragglers,
        straggler_factor=arguments.straggler_factor,
        mtbf_s=arguments.mtbf_hours * 3600,
        restart_s=arguments.restart_s,
        retries=arguments.retries,
        bandwidth=arguments.bandwidth * GB,
        client_bandwidth=arguments.client_bandwidth * GB,
        overhead_s=overhead,
        verify_rate=arguments.verify_rate * GB,
    )
    alone = setting.n_shards * (mean + setting.shard_bytes / setting.client_bandwidth)
    print(
        f"{setting.n_shards:,} shards of {setting.shard_bytes / 1e6:,.0f} MB, {mean:.1f} s each to "
        f"compute; scheduler {overhead * 1000:.2f} ms per shard; one undisturbed worker: "
        f"{alone / 3600:.1f} h"
    )
    print(
        f"{'workers':>8}{'shards, h':>11}{'check, h':>10}{'efficiency':>12}{'with check':>12}"
        f"{'lost':>8}{'deaths':>8}{'given up':>9}{'write, s':>10}{'tail, s':>9}"
    )
    outcomes = {n: simulate(setting, n) for n in arguments.workers}
    for n, outcome in outcomes.items():
        print(
            f"{n:8,}{outcome.map_s / 3600:11.2f}{outcome.verify_s / 3600:10.2f}"
            f"{alone / n / outcome.map_s:12.2f}{alone / n / outcome.total_s:12.2f}"
            f"{outcome.lost:8.2%}{outcome.deaths:8}{outcome.given_up:9}"
            f"{outcome.written_s:10.2f}{outcome.tail_s:9.0f}"
        )
    n, last = max(outcomes.items())
    print(
        json.dumps(
            {
                "name": f"simulated run of {n} workers, {arguments.tokens:.0e} tokens",
                "value": round(last.total_s / 3600, 3),
                "unit": "h",
                "against": "one undisturbed worker, shared equally",
                "ratio": round(alone / n / last.total_s, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
