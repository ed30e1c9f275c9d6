"""How the embedded model was made: `python -m pipeline.demo.recipe WORK_DIR` makes it again.

A GPT-2 of 12 layers and width 128 with a byte-level BPE of 4,096 tokens, trained from scratch on
the sources of Python's standard library and its tests, without the fifth of the library that the
demo caches (`library.is_unseen`). Files are joined by <|endoftext|> in a new random order each
epoch; windows start at a random offset.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.demo.library import is_unseen, list_library, list_library_tests, read_library

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT_LENGTH = 256
BATCH_SIZE = 32  # windows; 8,192 tokens a step
STEPS = 4000
LEARNING_RATE = 2e-3
WARMUP_STEPS = 150
WEIGHT_DECAY = 0.1
CHECKPOINT_EVERY = 100
SEED = 0


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in GPT-2's manner; spaces stay single bytes until merged, so indentation
    becomes tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
    )


def tokenize_files(tokenizer: PreTrainedTokenizerFast, names: list[str]) -> list[np.ndarray]:
    """Token ids of each file, each beginning with <|endoftext|>."""
    texts = [END_OF_TEXT + text for _, text in read_library(names)]
    return [np.asarray(ids, dtype=np.int64) for ids in tokenizer(texts)["input_ids"]]


def draw_batches(files: list[np.ndarray], *, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of windows [BATCH_SIZE, CONTEXT_LENGTH + 1]; each epoch joins the files in a
    new order.
    """
    rng = np.random.default_rng(seed)
    width = CONTEXT_LENGTH + 1
    while True:
        stream = np.concatenate([files[i] for i in rng.permutation(len(files))])
        stream = stream[rng.integers(CONTEXT_LENGTH) :]
        starts = np.arange(len(stream) // CONTEXT_LENGTH - 1) * CONTEXT_LENGTH
        rng.shuffle(starts)
        for i in range(0, len(starts) - BATCH_SIZE + 1, BATCH_SIZE):
            windows = starts[i : i + BATCH_SIZE, None] + np.arange(width)
            yield torch.from_numpy(stream[windows])


def learning_rate_at(step: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT_LENGTH,
        n_embd=128,
        n_layer=12,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(SEED)
    return GPT2LMHeadModel(config)


def build_optimizer(model: GPT2LMHeadModel) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def loss_of(model: Callable[..., Any], windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats over windows [batch, CONTEXT_LENGTH + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train_model(files: list[np.ndarray], held_out: torch.Tensor, work: Path) -> GPT2LMHeadModel:
    """Train, resuming from the last checkpoint in `work`; the loss of held-out windows goes to
    log.jsonl.
    """
    model = build_model()
    optimizer = build_optimizer(model)
    checkpoint = work / "checkpoint.pt"
    first_step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"]

    compiled = torch.compile(model)  # twice the eager rate at this width
    started, running = time.monotonic(), []
    for step, windows in enumerate(draw_batches(files, seed=SEED)):
        if step < first_step:
            continue
        if step == STEPS:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step)
        loss = loss_of(compiled, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.append(loss.item())

        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == STEPS:
            save_checkpoint(checkpoint, model, optimizer, step + 1)
            with torch.no_grad():
                held_out_loss = (
                    torch.stack([loss_of(compiled, w) for w in held_out.split(BATCH_SIZE)])
                    .mean()
                    .item()
                )
            line = {
                "step": step + 1,
                "train_loss": float(np.mean(running)),
                "held_out_loss": held_out_loss,
                "seconds": round(time.monotonic() - started),
            }
            running.clear()
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
    return model


def save_checkpoint(
    path: Path, model: GPT2LMHeadModel, optimizer: torch.optim.AdamW, step: int
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def main(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    library = list_library()
    seen = [name for name in library if not is_unseen(name)] + list_library_tests()
    unseen = [name for name in library if is_unseen(name)]

    tokenizer = train_tokenizer(text for _, text in read_library(seen))
    tokenizer.save_pretrained(work / "model")
    files = tokenize_files(tokenizer, seen)
    stream = np.concatenate(tokenize_files(tokenizer, unseen))
    windows = torch.from_numpy(stream[: len(stream) // 257 * 257].reshape(-1, 257))
    print(
        f"{sum(map(len, files)):,} tokens to train on, {len(stream):,} tokens unseen",
        flush=True,
    )

    model = train_model(files, windows[:: len(windows) // 128][:128], work)
    model.half().save_pretrained(work / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
