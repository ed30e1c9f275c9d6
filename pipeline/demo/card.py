"""How good the embedded model is: `python -m pipeline.demo.card` measures it and writes its model
card.

Losses are over whole files in windows of one context, beside a unigram model with the training
tokens' frequencies and gzip on the same text. Seen files are every fourth file of the library that
the model was trained on, so that both samples are of about one size.
"""

import gzip
import json
import math
import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.demo import recipe
from pipeline.demo.library import is_unseen, list_library, list_library_tests, read_library
from pipeline.model import load_tokenizer, locate_checkpoint

BATCH_WINDOWS = 64


class Measured(NamedTuple):
    """One sample of text and how well each predictor does on it."""

    files: int
    bytes: int
    tokens: int
    nats_per_token: float
    bits_per_byte: float
    unigram_nats_per_token: float
    unigram_bits_per_byte: float
    gzip_bits_per_byte: float


def measure_files(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    names: list[str],
    unigram: np.ndarray,
) -> Measured:
    """Losses of the files `names`; `unigram` [vocab] are log-probabilities in nats."""
    texts = [text for _, text in read_library(names)]
    n_bytes = sum(len(text.encode()) for text in texts)
    stream = np.concatenate(recipe.tokenize_files(tokenizer, names))
    n_windows = (len(stream) - 1) // recipe.CONTEXT_LENGTH
    starts = np.arange(n_windows)[:, None] * recipe.CONTEXT_LENGTH
    windows = torch.from_numpy(stream[starts + np.arange(recipe.CONTEXT_LENGTH + 1)])
    nats = mean_loss(model, windows)
    unigram_nats = -unigram[windows[:, 1:].numpy()].mean()
    tokens_per_byte = len(stream) / n_bytes
    return Measured(
        files=len(texts),
        bytes=n_bytes,
        tokens=len(stream),
        nats_per_token=round(nats, 4),
        bits_per_byte=round(nats * tokens_per_byte / math.log(2), 4),
        unigram_nats_per_token=round(float(unigram_nats), 4),
        unigram_bits_per_byte=round(float(unigram_nats) * tokens_per_byte / math.log(2), 4),
        gzip_bits_per_byte=round(8 * len(gzip.compress("".join(texts).encode(), 9)) / n_bytes, 4),
    )


@torch.no_grad()
def mean_loss(model: GPT2LMHeadModel, windows: torch.Tensor) -> float:
    """Mean next-token cross-entropy in nats, float32, over windows [n, CONTEXT_LENGTH + 1]."""
    total = 0.0
    for batch in windows.split(BATCH_WINDOWS):
        logits = model(batch[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / windows[:, 1:].numel()


def count_unigrams(files: list[np.ndarray]) -> np.ndarray:
    """Log-probabilities [vocab] of the training tokens, each token counted once more than it
    occurs.
    """
    counts = np.bincount(np.concatenate(files), minlength=recipe.VOCAB_SIZE) + 1
    return np.log(counts / counts.sum())


def write_card(folder: Path, seen: Measured, unseen: Measured, n_training_tokens: int) -> None:
    facts = {
        "python": platform.python_version(),
        "steps": recipe.STEPS,
        "tokens_per_step": recipe.BATCH_SIZE * recipe.CONTEXT_LENGTH,
        "training_tokens": n_training_tokens,
        "seen": seen._asdict(),
        "unseen": unseen._asdict(),
    }
    (folder / "measured.json").write_text(json.dumps(facts, indent=2) + "\n")
    rows = "\n".join(
        f"| {label} | {m.files} | {m.tokens:,} | {m.nats_per_token:.3f} | {m.bits_per_byte:.3f} "
        f"| {m.unigram_nats_per_token:.3f} | {m.unigram_bits_per_byte:.3f} "
        f"| {m.gzip_bits_per_byte:.3f} |"
        for label, m in (("unseen by the model", unseen), ("seen in training", seen))
    )
    card = (
        Path(__file__)
        .with_name("card_template.md")
        .read_text()
        .format(
            rows=rows,
            python=facts["python"],
            steps=recipe.STEPS,
            per_step=facts["tokens_per_step"],
            total=recipe.STEPS * facts["tokens_per_step"],
            corpus=n_training_tokens,
            epochs=recipe.STEPS * facts["tokens_per_step"] / n_training_tokens,
            gap=unseen.nats_per_token - seen.nats_per_token,
        )
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    folder = locate_checkpoint("demo", None)
    tokenizer = load_tokenizer(folder)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    library = list_library()
    seen = [name for name in library if not is_unseen(name)]
    training_files = recipe.tokenize_files(tokenizer, seen + list_library_tests())
    unigram = count_unigrams(training_files)
    write_card(
        folder,
        seen=measure_files(model, tokenizer, seen[::4], unigram),
        unseen=measure_files(model, tokenizer, [n for n in library if is_unseen(n)], unigram),
        n_training_tokens=sum(map(len, training_files)),
    )


if __name__ == "__main__":
    main()
