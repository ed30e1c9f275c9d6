"""Many workers: what each may use, what each must prove, and what their deaths may cost."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from distributed import Client, default_client
from distributed.chaos import KillWorker

from pipeline.cache import run_cache
from pipeline.cache_plan import plan_cache
from pipeline.cli.options import invoke
from pipeline.cluster import open_workers
from pipeline.device import pin_device
from pipeline.errors import ConfigError, PipelineError
from pipeline.proof import describe_refused, expect_facts, find_differences, gather_facts
from pipeline.worker import plan_share
from store import open_store
from store.errors import NumberRangeError
from tests.tiny import REPOSITORY, kill_group, make_project, read_tree, run_cli, spawn_cli

RETRIES = 1
START_S = 60  # for a process with torch on a busy machine


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with corpus and store, the store made by one process and undisturbed."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of two workers has: another number may round differently
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_cli("cache") == 0
        yield folder
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def mapper(project):
    """Two workers of this machine, ready for that project."""
    run = configure(workers=2, retries=RETRIES, worker_memory_gb=3, threads=1)
    with open_workers(run, plan(project / "made/by/nobody").settings) as mapper:
        yield mapper


def configure(**run):
    changes = tuple(f"run.{key}={value}" for key, value in run.items())
    return invoke(None, {}, changes).config.run


def plan(out: Path):
    return plan_cache(invoke(None, {}, ()).config, Path("data/tiny"), out)


def cache(out: Path, mapper, function=None, *args):
    """Cache with every shard computed by `function(*args, compute, shard)`."""
    wrapped = nullcontext(
        lambda compute, shards: mapper(
            functools.partial(function, *args, compute) if function else compute, shards
        )
    )
    run_cache(plan(out), wrapped, provenance={})


def commits(out: Path) -> list[dict]:
    paths = sorted(out.parent.glob(".work/*/commits/*.json"))
    return [json.loads(path.read_text()) for path in paths]


# What runs on the workers.


def die_once(token: Path, compute, shard):
    """SIGKILL inside shard 3, once: its files are written, its commit record is not."""
    if shard.index == 3:
        os.environ |= {"STORE_CRASH_POINT": "before-commit", "STORE_CRASH_TOKEN": str(token)}
    return compute(shard)


def kill_worker(index: int, compute, shard):
    if shard.index == index:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(shard)


def refuse(index: int, tries: Path, compute, shard):
    if shard.index == index:
        with tries.open("a") as file:
            file.write("tried\n")
        raise NumberRangeError("shard 5: expected finite values, got NaN. Look at it.")
    return compute(shard)


def take_time(seconds: float, compute, shard):
    time.sleep(seconds)
    return compute(shard)


def describe_worker(dask_worker):
    memory = dask_worker.memory_manager
    return {
        "limit": memory.memory_limit,
        "thresholds": (
            memory.memory_target_fraction,
            memory.memory_spill_fraction,
            memory.memory_pause_fraction,
        ),
        # asked in the thread that computes
        "threads": dask_worker.executors["default"].submit(torch.get_num_threads).result(),
        "tasks": dask_worker.state.nthreads,
        "malloc": os.environ.get("MALLOC_TRIM_THRESHOLD_"),
    }


# Planned, as tables.


@pytest.mark.parametrize(
    ("device", "worker", "n_gpus", "shared", "pinned"),
    [
        ("cpu", 1, 0, True, "cpu"),
        ("cuda:1", 0, 4, True, "cuda:1"),  # as it was asked for
        ("cuda", 0, 4, True, "cuda:0"),
        ("cuda", 3, 4, True, "cuda:3"),
        ("cuda", 5, 4, True, "cuda:1"),  # more workers than GPUs
        ("cuda", "2", 4, True, "cuda:2"),  # dask worker --name 2
        ("cuda", "tcp://10.0.0.1:3412", 4, True, "cuda:0"),  # without a number
        ("cuda", 3, 4, False, "cuda:0"),  # dask-cuda: its own comes first
    ],
)
def test_a_gpu_for_each_worker(device, worker, n_gpus, shared, pinned):
    assert pin_device(device, worker=worker, n_gpus=n_gpus, shared=shared) == pinned


@pytest.mark.parametrize(
    ("settings", "n_workers", "n_cores", "threads", "memory_bytes"),
    [
        ({}, 1, 8, 8, 64 * 10**9),
        ({}, 2, 8, 4, 32 * 10**9),
        ({}, 3, 8, 2, 64 * 10**9 // 3),
        ({}, 16, 8, 1, 4 * 10**9),  # never none
        ({"threads": 5}, 2, 8, 5, 32 * 10**9),
        ({"worker_memory_gb": 1.5}, 2, 8, 4, 1.5e9),
    ],
)
@pytest.mark.usefixtures("project")
def test_share_of_a_machine(settings, n_workers, n_cores, threads, memory_bytes):
    run = configure(**settings)
    share = plan_share(run, n_workers, n_cores=n_cores, memory_bytes=64 * 10**9)
    assert share == (threads, memory_bytes)


@pytest.mark.usefixtures("project")
def test_every_difference_of_every_worker_is_named(tmp_path):
    settings = plan(tmp_path / "store").settings
    expected = expect_facts(settings)
    assert find_differences(expected, expected._replace(host="elsewhere", pid=1)) == []
    token = tmp_path / "token"
    token.write_text("token")
    assert find_differences(expected, gather_facts(settings, token, 1)) == []
    blind = gather_facts(
        settings._replace(corpus=tmp_path / "a", checkpoint=tmp_path / "b"),
        tmp_path / "no/token",
        4,
    )
    lines = find_differences(expected, blind)
    names = ["corpus", "reads_work", "tasks_at_once", "weights", "writes_work"]
    assert [line.split(":")[0] for line in lines] == names
    assert "tasks_at_once: expected 1, got 4" in lines
    older = expected._replace(versions=expected.versions | {"torch": "1.0"})
    (line,) = find_differences(expected, older)
    assert line.startswith("versions.torch: expected '2.")
    message = describe_refused("tcp://s", 3, {"tcp://a": [line], "tcp://b": lines})
    assert "expected 3 that see what this process sees, got 2 that do not" in message
    assert "tcp://a" in message
    assert "tcp://b" in message


# Processes of this machine.


@pytest.mark.usefixtures("mapper")
def test_each_worker_is_set_up():
    found = default_client().run(describe_worker)
    wanted = {
        "limit": 3 * 10**9,
        "thresholds": (False, False, False),
        "threads": 1,
        "tasks": 1,
        "malloc": None,  # dask's own value makes torch on a CPU slow
    }
    assert list(found.values()) == [wanted, wanted]


def test_9_a_worker_killed_inside_a_shard(project, mapper, tmp_path, capfd):
    token = tmp_path / "token"
    token.touch()
    out = project / "killed/tiny"
    cache(out, mapper, die_once, token)
    assert not token.exists()  # it died
    assert read_tree(out) == read_tree(project / "stores/tiny")
    assert len({commit["facts"]["pid"] for commit in commits(out)}) > 1
    assert capfd.readouterr().err == ""


def test_a_shard_given_to_two_workers_is_written_once(project, mapper):
    out = project / "twice/tiny"

    def twice(compute, shards):
        yield from list(mapper(compute, [shard for shard in shards for _ in range(2)]))[::2]

    run_cache(plan(out), nullcontext(twice), provenance={})
    assert read_tree(out) == read_tree(project / "stores/tiny")


def test_an_error_of_ours_is_not_tried_again(project, mapper, tmp_path):
    out = project / "refused/tiny"
    with pytest.raises(NumberRangeError, match="shard 5: expected finite values, got NaN"):
        cache(out, mapper, refuse, 5, tmp_path / "tries")
    assert (tmp_path / "tries").read_text() == "tried\n"
    assert not out.exists()


def test_10_a_shard_that_kills_every_worker(project, mapper):
    out = project / "poisoned/tiny"
    with pytest.raises(PipelineError, match=r"^shard 3 in .* run the same command again"):
        cache(out, mapper, kill_worker, 3)
    n_shards = len(plan(out).spec.layout.shards)
    kept = [commit["record"]["index"] for commit in commits(out)]
    assert kept == [index for index in range(n_shards) if index != 3]
    computed = []
    run_cache(plan(out), provenance={}, on_progress=computed.append)  # here it does no harm
    assert len(computed) == 1
    assert read_tree(out) == read_tree(project / "stores/tiny")


def test_workers_that_die_at_random(project, mapper, capfd):
    out = project / "chaos/tiny"
    client = default_client()
    client.cluster.scheduler.allowed_failures = 100  # two deaths may meet one shard
    before = client.run(os.getpid)
    chaos = KillWorker(delay="0.5 s", mode="segfault")
    chaos.name = "chaos"
    client.register_plugin(chaos)
    client.unregister_worker_plugin("chaos")  # its clocks run on; new workers get none
    cache(out, mapper, take_time, 0.5)  # 2.5 s each, undisturbed: exp(-10) that both live
    assert set(before.values()) != set(client.run(os.getpid).values())
    assert read_tree(out) == read_tree(project / "stores/tiny")
    assert capfd.readouterr().err == ""


def test_all_workers_left(project, mapper):
    """The last to use these workers."""
    client = default_client()
    client.cluster.scheduler.no_workers_timeout = 1
    for nanny in client.cluster.workers.values():
        nanny.close_gracefully()
    with pytest.raises(PipelineError, match=r"expected at least one, got none for 1 s"):
        cache(project / "left/tiny", mapper, kill_worker, 0)


# A cluster that runs already.


@contextmanager
def spawn(*command: str, **environment: str):
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_group(process)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    file = tmp_path_factory.mktemp("scheduler") / "scheduler.json"
    dask = (sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0")
    with spawn(*dask, "--no-dashboard", "--scheduler-file", str(file)):
        deadline = time.monotonic() + START_S
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield json.loads(file.read_text())["address"]


def worker_command(scheduler: str, name: str) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "dask", "worker", scheduler, "--name", name),
        *("--nthreads", "1", "--no-dashboard", "--death-timeout", "60"),
    )


@pytest.fixture(scope="module")
def other_torch(tmp_path_factory):
    """Environment of a process that finds another version of torch installed."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\n"
        "found = metadata.version\n"
        "metadata.version = lambda name: '1.0' if name == 'torch' else found(name)\n"
    )
    return {"PYTHONPATH": str(folder)}


def test_a_scheduler_without_workers(project, scheduler, monkeypatch):
    monkeypatch.setattr("pipeline.cluster._CONNECT_TIMEOUT_S", 1)
    run = configure(scheduler=scheduler)
    with (
        pytest.raises(PipelineError, match=r"expected at least one, got none\. Start some with"),
        open_workers(run, plan(project / "none/tiny").settings),
    ):
        pass


def test_no_scheduler(project, monkeypatch):
    monkeypatch.setattr("pipeline.cluster._CONNECT_TIMEOUT_S", 1)
    run = configure(scheduler="tcp://127.0.0.1:9")
    with (
        pytest.raises(ConfigError, match="expected a running dask scheduler"),
        open_workers(run, plan(project / "none/tiny").settings),
    ):
        pass


def test_workers_of_a_cluster_prove_themselves(project, scheduler, other_torch):
    out = project / "cluster/tiny"
    settings = plan(out).settings
    settings.work.mkdir(parents=True)
    run = configure(scheduler=scheduler, threads=3)
    hidden = f"mount -t tmpfs none {settings.work} && exec "
    with spawn(*worker_command(scheduler, "0")) as good:
        with (
            spawn(*worker_command(scheduler, "1"), **other_torch),
            spawn(
                *("unshare", "-m", "sh", "-c"),
                hidden + " ".join(worker_command(scheduler, "2")),
            ),
        ):
            await_workers(scheduler, 3)
            with pytest.raises(PipelineError) as refused, open_workers(run, settings):
                pass
            message = str(refused.value)
            assert "expected 3 that see what this process sees, got 2 that do not" in message
            assert "versions.torch: expected '2." in message
            assert "reads_work: expected 'yes', got \"FileNotFoundError" in message
        await_workers(scheduler, 1)
        with open_workers(run, settings) as mapper:
            with spawn(*worker_command(scheduler, "3"), **other_torch) as late:
                output, _ = late.communicate(timeout=START_S)  # it leaves by itself
                assert "versions.torch: expected '2." in output
            cache(out, mapper)
            (worker,) = default_client().run(describe_worker).values()
            assert worker["threads"] == 3  # though dask sets OMP_NUM_THREADS=1
            assert worker["thresholds"][1:] == (False, False)
        assert good.poll() is None
    assert {commit["facts"]["threads"] for commit in commits(out)} == {3}
    assert open_store(out).manifest.fingerprint == plan(out).spec.fingerprint
    assert list((settings.work / "scratch").iterdir()) == []


def await_workers(scheduler: str, n: int) -> None:
    with Client(scheduler) as client:
        deadline = time.monotonic() + START_S
        while len(client.scheduler_info(n_workers=-1)["workers"]) != n:
            assert time.monotonic() < deadline
            time.sleep(0.1)


# Ctrl-C.


@pytest.mark.parametrize("times", [1, 2])
def test_11_ctrl_c_with_workers(project, times):
    out = project / f"interrupted{times}/tiny"
    process = spawn_cli(
        "cache", "--workers", "2", "--set", "run.threads=1", "--out", str(out), cwd=project
    )
    deadline = time.monotonic() + 2 * START_S
    while not commits(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    started = time.monotonic()
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        time.sleep(0.02)
    _, err = process.communicate(timeout=START_S)
    assert process.returncode == 130
    assert time.monotonic() - started < 10
    lines = [line for line in err.splitlines() if line and not line.startswith("cache:")]
    assert lines == ["Interrupted. Run the same command again."]
    assert not out.exists()
    run_cache(plan(out), provenance={})  # the lock is free
    assert read_tree(out) == read_tree(project / "stores/tiny")
