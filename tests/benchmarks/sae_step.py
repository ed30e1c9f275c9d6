"""A whole optimizer step of TopK and g-SAE against a dense PyTorch step and the bare products:
`OMP_NUM_THREADS=2 python -m tests.benchmarks.sae_step`.

d_model 768, d_sae 15360, k 32, beta 1e5, batch 4096; forward, backward, optimizer and norm
constraint. `dense TopK` is the usual code: nn.Linear, topk, scatter, autograd, torch.optim.Adam as
it is by default, which on a CPU is not fused. `products` are the matrix products that a step cannot
do without: acts @ W_enc, and for a g-SAE grads @ W_dec^T too. Every variant has a process of its
own, as a training run has, and they take turns of three steps, of which the first is not counted;
medians over `--repeats` turns. Peak memory: weights, gradients and optimizer included, inputs not.

As in `pipeline train`, for all variants: torch asks for large pages (not with
THP_MEM_ALLOC_ENABLE=0 in the environment), and memory that is freed is kept.

Prints a table and one JSON line last. Wanted: TopK at most 1.5 products, g-SAE at most 1.3 in
float32 and 1.7 in bfloat16; TopK at least 3.5 times as fast as dense, bfloat16 g-SAE 4 times.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.memory import keep_freed_memory
from pipeline.sae import TopKSAE, init_weights, start_learning, take_step
from tests.benchmarks.stream import D_MODEL

BATCH, K, BETA, LR = 4096, 32, 1e5, 1e-4
STEPS = 3  # of one turn
DENSE = "dense TopK float32"


class Inputs(NamedTuple):
    """One batch."""

    acts: Tensor
    grads: Tensor


class Variant(NamedTuple):
    """A row of the table."""

    start: Callable[[Inputs, int], Callable[[], object]]  # inputs, d_sae -> one step
    n_products: int  # that it cannot do without
    floor: str | None = None  # the row to compare with


class DenseTopK(nn.Module):
    """TopK as a first version of it is written."""

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(D_MODEL, d_sae)
        self.decoder = nn.Linear(d_sae, D_MODEL)

    def forward(self, acts: Tensor) -> Tensor:
        pre_acts = self.encoder(acts - self.decoder.bias)
        values, indices = pre_acts.topk(K, dim=1)
        return self.decoder(torch.zeros_like(pre_acts).scatter(1, indices, values.relu()))


def start_dense(inputs: Inputs, d_sae: int, *, fused: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    sae = DenseTopK(d_sae).to(inputs.acts.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=fused or None)
    W_dec = sae.decoder.weight  # [d_model, d_sae]

    def step() -> float:
        optimizer.zero_grad()
        loss = (sae(inputs.acts) - inputs.acts).square().sum(dim=1).mean()
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=0, keepdim=True) * W_dec
            optimizer.step()
            W_dec.div_(W_dec.norm(dim=0, keepdim=True))
        return loss.item()

    return step


def start_sae(
    inputs: Inputs, d_sae: int, *, beta: float, dtype: torch.dtype | None
) -> Callable[[], object]:
    sae = TopKSAE(d_model=D_MODEL, d_sae=d_sae, k=K, beta=beta).to(inputs.acts.device)
    init_weights(sae, inputs.acts, seed=0, scale_input=True)
    sae.product_dtype = dtype
    learner = start_learning(sae)
    grads = inputs.grads if beta else None
    return lambda: take_step(learner, inputs.acts, grads, lr=LR)


def start_products(
    inputs: Inputs, d_sae: int, *, dtype: torch.dtype, n_products: int
) -> Callable[[], object]:
    left = [given.to(dtype) for given in inputs][:n_products]
    weights = torch.randn(2, D_MODEL, d_sae, device=left[0].device).to(dtype)
    right = [weights[0], weights[1].T.contiguous().T]
    out = left[0].new_empty(len(left[0]), d_sae)
    return lambda: [torch.mm(x, W, out=out) for x, W in zip(left, right[:n_products], strict=True)]


def list_variants() -> dict[str, Variant]:
    variants = {
        DENSE: Variant(lambda i, d: start_dense(i, d, fused=False), 1),
        f"{DENSE}, fused Adam": Variant(lambda i, d: start_dense(i, d, fused=True), 1),
    }
    for (name, dtype), n in itertools.product(
        {"float32": torch.float32, "bfloat16": torch.bfloat16}.items(), (1, 2)
    ):
        floor = f"{n} product{'s' * (n - 1)} {name}"
        variants[floor] = Variant(
            lambda i, d, t=dtype, n=n: start_products(i, d, dtype=t, n_products=n), n
        )
        variants[f"{'TopK' if n == 1 else 'g-SAE'} {name}"] = Variant(
            lambda i, d, t=dtype, n=n: start_sae(
                i, d, beta=BETA * (n - 1), dtype=None if t == torch.float32 else t
            ),
            n,
            floor,
        )
    return variants


def draw_inputs(device: str) -> Inputs:
    """Activations along a thousand directions, so that latents differ in how often they fire."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(BATCH, 1000, generator=generator).clamp_min_(1.5).sub_(1.5)
    acts = codes @ torch.randn(1000, D_MODEL, generator=generator)
    grads = torch.randn(BATCH, D_MODEL, generator=generator) / 1000
    return Inputs(acts.to(device), grads.to(device))


class Worker:
    """A process that holds one variant, as a training run does, and takes steps when asked."""

    def __init__(self, name: str, *, d_sae: int, device: str) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.sae_step", "--serve", name]
        command += ["--d-sae", str(d_sae), "--device", device]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()  # that it is ready

    def take_steps(self, n_steps: int) -> list[float]:
        """Seconds of each."""
        assert self._process.stdin
        print(n_steps, file=self._process.stdin, flush=True)
        return self._read()

    def stop(self) -> int:
        """End it; returns the bytes that it held at most, beside its inputs."""
        assert self._process.stdin
        self._process.stdin.close()
        peak = self._read()
        self._process.wait()
        return peak

    def _read(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def serve(name: str, *, d_sae: int, device: str) -> None:
    """Be a Worker's process."""
    inputs = draw_inputs(device)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    if device == "cuda":
        before = torch.cuda.memory_allocated()
    step = list_variants()[name].start(inputs, d_sae)
    print("true", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            wait(device)
            started = time.perf_counter()
            step()
            wait(device)
            seconds.append(time.perf_counter() - started)
        print(json.dumps(seconds), flush=True)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else read_status("VmHWM")
    print(peak - before, flush=True)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def read_status(field: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def time_turns(
    names: Sequence[str], *, d_sae: int, repeats: int, device: str
) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of a step, and peak bytes, of each variant; they take turns."""
    workers = {name: Worker(name, d_sae=d_sae, device=device) for name in names}
    for worker in workers.values():
        worker.take_steps(1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, worker in workers.items():
            seconds[name] += worker.take_steps(STEPS)[1:]
    peaks = {name: worker.stop() for name, worker in workers.items()}
    return {name: statistics.median(found) for name, found in seconds.items()}, peaks


def report(seconds: dict[str, float], peaks: dict[str, int], *, d_sae: int) -> None:
    variants = list_variants()
    print("| step | ms | of its products | dense / it | peak MiB | TFLOP/s | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for name, found in seconds.items():
        floor = variants[name].floor
        of_floor = f"{found / seconds[floor]:.2f}" if floor in seconds else ""
        speed = f"{seconds[DENSE] / found:.2f}" if DENSE in seconds else ""
        peak = f"{peaks[name] / 2**20:.0f}"
        # Of the products alone: what is done beside them does not count as work.
        flops = variants[name].n_products * 2 * BATCH * D_MODEL * d_sae / found
        print(
            f"| {name} | {found * 1e3:.1f} | {of_floor} | {speed} | {peak}"
            f" | {flops / 1e12:.3f} | {BATCH / found:,.0f} |"
        )


def describe(seconds: dict[str, float], peaks: dict[str, int], *, device: str) -> dict:
    """The JSON line."""
    variants = list_variants()
    name = "g-SAE bfloat16"
    return {
        "name": f"{name} step against a dense float32 TopK step, {device}",
        "value": seconds[name],
        "unit": "s",
        "against": seconds[DENSE],
        "ratio": seconds[name] / seconds[DENSE],
        "of_products": {
            key: round(found / seconds[floor], 3)
            for key, found in seconds.items()
            if (floor := variants[key].floor)
        },
        "faster_than_dense": {
            key: round(seconds[DENSE] / found, 2)
            for key, found in seconds.items()
            if variants[key].floor
        },
        "peak_bytes": peaks,
    }


def main() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the pipeline command does
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--d-sae", type=int, default=15360)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=list(list_variants()), help="rows of the table; no JSON line"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    d_sae, device = arguments.d_sae, arguments.device
    keep_freed_memory()
    if arguments.serve:
        serve(arguments.serve, d_sae=d_sae, device=device)
    else:
        compare_steps(arguments.only, d_sae=d_sae, repeats=arguments.repeats, device=device)


def compare_steps(only: list[str] | None, *, d_sae: int, repeats: int, device: str) -> None:
    print(f"{device}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    names = only or list(list_variants())
    seconds, peaks = time_turns(names, d_sae=d_sae, repeats=repeats, device=device)
    report(seconds, peaks, d_sae=d_sae)
    if not only:
        print(json.dumps(describe(seconds, peaks, device=device)))


if __name__ == "__main__":
    main()
