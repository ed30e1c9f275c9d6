"""Capture against the plain forward pass of the same model in one run: `python -m
tests.benchmarks.capture`.

A random checkpoint of GPT-2 small's shape (12 layers, 768, vocabulary 50257), 8 blocks of 256
tokens, layer 7. The baseline is transformers' own forward pass to the logits, in inference mode.
Prints the median rates, peak memory, and one JSON line last.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from pipeline.capture import capture
from pipeline.model import load_model
from tests.checkpoints import save_gpt2

N_BLOCKS, CONTEXT = 8, 256
HOOK = "blocks.7.hook_resid_post"


def tokens_per_second(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median rate of each; the functions take turns, so that a slow spell hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: N_BLOCKS * CONTEXT / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="capture only, for its peak memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_gpt2(
            Path(scratch) / "model",
            n_layers=12,
            d_model=768,
            n_heads=12,
            context=1024,
            vocab=50257,
        )
        model = load_model(folder)
        plain = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(
        50257, (N_BLOCKS, CONTEXT + 1), generator=torch.Generator().manual_seed(0)
    )

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return plain(tokens[:, :-1], use_cache=False).logits

    def at(precision: str) -> Callable[[], object]:
        return lambda: capture(model, tokens, (HOOK,), precision=precision)

    if arguments.memory:
        del plain
        at("float32")()
    else:
        rates = tokens_per_second(
            {"forward": forward, "float32": at("float32"), "bfloat16": at("bfloat16")},
            arguments.repeats,
        )
        for name, rate in rates.items():
            ratio = rate / rates["forward"]
            print(f"{name:>10}  {rate:8.1f} tokens/s  {ratio:.2f} of the forward pass")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process: {peak:.2f} GiB, {torch.get_num_threads()} threads")
    if not arguments.memory:
        print(
            json.dumps(
                {
                    "name": "capture, GPT-2 small's shape, layer 7, bfloat16",
                    "value": round(rates["bfloat16"], 1),
                    "unit": "tokens/s",
                    "against": "plain float32 forward pass",
                    "ratio": round(rates["bfloat16"] / rates["forward"], 3),
                    "ratio_float32": round(rates["float32"] / rates["forward"], 3),
                }
            )
        )


if __name__ == "__main__":
    main()
