"""Steering many latents at one length: `OMP_NUM_THREADS=2 python -m tests.benchmarks.steering`.

1000 directions at layer 7 of the embedded model push 10 sequences of 64 tokens. Prints one JSON
line: seconds, the median of the repeats, and beside it the floor, seconds of the matrix products
alone (the upper blocks' linear maps, attention and the unembedding) on as many rows.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from pipeline.evaluate.association import associate, read_direct_map
from pipeline.evaluate.pushes import look_at_sequences, steer
from pipeline.model import LanguageModel, load_model, locate_checkpoint

HOOK, LAYER = "blocks.7.hook_resid_post", 7
N_TOKENS = 10
FLOOR_LATENTS = 8  # in one batch of products; the blocks' activations stay near the cache


def time_median(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def multiply_alone(model: LanguageModel, *, n_latents: int, n_sequences: int, context: int) -> None:
    """The products of one batch, on numbers that mean nothing."""
    width, n_heads = model.facts.d_model, model.bridge.cfg.n_heads
    batch = n_latents * n_sequences
    x = torch.randn(batch * context, width)
    maps = [torch.randn(size) for size in ((3 * width, width), (width, width))]
    into, out_of = torch.randn(4 * width, width), torch.randn(width, 4 * width)
    heads = x.view(batch, context, n_heads, -1).transpose(1, 2).contiguous()
    for _ in range(model.facts.n_layers - 1 - LAYER):
        for weight in maps:
            x @ weight.T
        (heads @ heads.transpose(-1, -2)) @ heads
        (x @ into.T) @ out_of.T
    for rows in x.split(64):
        rows @ model.unembedding.weight.T


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latents", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=10)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = load_model(locate_checkpoint("demo"))
    generator = torch.Generator().manual_seed(0)
    shape = (args.sequences, args.context)
    tokens = torch.randint(model.facts.d_vocab, shape, generator=generator)
    text = look_at_sequences(model, tokens, HOOK, exclude_positions=(0,))
    directions = torch.randn(args.latents, model.facts.d_model, generator=generator)
    associated = associate(directions, read_direct_map(model), N_TOKENS)

    def run() -> None:
        steer(model, text, directions, associated, hook=HOOK, length=text.norm)

    sizes = {"n_sequences": args.sequences, "context": args.context}
    seconds = time_median(run, args.repeats)
    floor = time_median(
        lambda: multiply_alone(model, n_latents=FLOOR_LATENTS, **sizes), max(3, args.repeats)
    )
    figures = {
        "benchmark": "steering",
        "seconds": round(seconds, 2),
        "floor_s": round(floor * args.latents / FLOOR_LATENTS, 2),
        "latents": args.latents,
        "sequences": args.sequences,
        "context": args.context,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
