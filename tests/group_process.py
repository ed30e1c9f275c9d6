"""One process of a group, as torchrun would start it: what tests have it do."""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.cli import main
from pipeline.distributed import open_group
from pipeline.end_to_end import make_step
from pipeline.errors import PipelineError
from pipeline.member import plan_members, start_member, step_member
from pipeline.model import load_model
from pipeline.sae import ARCHITECTURES
from pipeline.sae.group import Group
from pipeline.sae.learning import DEAD_AFTER_TOKENS, Objective
from store.blocks import BlockBatch
from store.shuffle import slice_rank
from tests.checkpoints import save_gpt2
from tests.test_member import make_config

N_STEPS, N_ROWS, D_MODEL, N_TOKENS = 20, 67, 8, 5  # neither 2 nor 3 ranks have equal parts of 67
TIMEOUT_S = 3.0
N_BLOCKS, CONTEXT = 7, 12

# What is trained, by name: changes to the configuration.
CASES: dict[str, dict[str, Any]] = {
    **{name: {"architectures": (name,)} for name in ARCHITECTURES},
    **{
        f"{name}-beta": {"architectures": (name,), "betas": (20.0,)}
        for name, architecture in ARCHITECTURES.items()
        if architecture.selects
    },
    "bfloat16": {"betas": (20.0,), "precision": "bfloat16"},
    "clipped": {"betas": (20.0,), "max_grad_norm": 0.05},
    "averaged": {"average_decay": 0.9},
    "auxk": {"aux_weight": 0.5, "aux_k": 4},
    "scaled": {"input_scaling": "mean_norm", "b_dec_start": "geometric_median"},
    "end_to_end": {
        "architectures": ("end_to_end",),
        "betas": (20.0,),
        "input_scaling": "mean_norm",
        "aux_weight": 0.5,
        "aux_k": 4,
    },
}
FEW = (
    "topk-beta",
    "auxk",
    "end_to_end",
    *(f"{name}-beta" for name in ("batch_topk", "tokenized", "switch")),
)


def list_cases(world_size: int) -> tuple[str, ...]:
    """All of them for two processes; for three, those that send most kinds of messages."""
    return tuple(CASES) if world_size == 2 else tuple(name for name in FEW if name in CASES)


class Part(NamedTuple):
    """A process's rows of a batch."""

    acts: Tensor
    grads: Tensor
    tokens: Tensor
    objective: Objective | None = None


def draw_rows(group: Group) -> Iterator[Part]:
    generator = torch.Generator().manual_seed(0)
    own = slice_rank(N_ROWS, group.rank, group.world_size)
    for _ in range(N_STEPS):
        acts, grads = (torch.randn(N_ROWS, D_MODEL, generator=generator) for _ in range(2))
        tokens = torch.randint(N_TOKENS, (N_ROWS,), generator=generator)
        yield Part(*(whole[own.start : own.stop] for whole in (acts, grads, tokens)))


def draw_blocks(group: Group) -> Iterator[Part]:
    """Of blocks of all lengths, without position 0: every third time the last process has no row,
    and every third time one process of three has no block.
    """
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_gpt2(Path(folder), n_layers=2, d_model=D_MODEL, context=CONTEXT)
        model = load_model(Path(folder))
    for step in range(N_STEPS):
        n_blocks = 2 if step % 3 == 1 else N_BLOCKS
        lengths = torch.randint(2, CONTEXT + 1, (n_blocks,), generator=generator, dtype=torch.int32)
        if step % 3 == 0:
            lengths[3:] = 1
        acts, grads = torch.randn(2, n_blocks, CONTEXT, D_MODEL, generator=generator)
        tokens = torch.randint(64, (n_blocks, CONTEXT), generator=generator, dtype=torch.int32)
        whole = BlockBatch(
            *(acts, grads, tokens, acts[..., 0], torch.arange(n_blocks).int(), lengths)
        )
        own = slice_rank(n_blocks, group.rank, group.world_size)
        part = BlockBatch(*(column[own.start : own.stop] for column in whole))
        yield Part(*make_step(model, part, n_lower=1, exclude_positions=(0,), group=group))


class Trained(NamedTuple):
    """What a process has at the end."""

    tensors: dict[str, Tensor]  # weights, buffers, averages and idle_tokens
    metrics: list[dict[str, Any]]  # of each step


def train_case(case: str, group: Group) -> Trained:
    config = make_config(**CASES[case])
    draw = draw_blocks if case == "end_to_end" else draw_rows
    member, metrics = None, []
    for acts, grads, tokens, objective in draw(group):
        if member is None:
            spec = plan_members(config)[0]
            member = start_member(spec, config, acts, n_tokens=N_TOKENS, group=group)
            # All are on the brink, and those that this keeps low will be dead.
            member.learner.idle_tokens.fill_(DEAD_AFTER_TOKENS - 1)
            with torch.no_grad():
                member.learner.sae.encoder_bias[:6] -= 4.0
        part = (acts, grads, tokens)
        step = step_member(member, *part, config=config, lr=0.01, objective=objective, full=True)
        metrics.append(step._asdict())
    assert member is not None
    averages = member.learner.average or []
    tensors = {
        **member.learner.sae.state_dict(),
        "idle_tokens": member.learner.idle_tokens,
        **{f"average-{i}": average for i, average in enumerate(averages)},
    }
    return Trained({name: tensor.detach().clone() for name, tensor in tensors.items()}, metrics)


def save(trained: Trained, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in trained.tensors.items()}, folder / "tensors")
    (folder / "metrics.json").write_text(json.dumps(trained.metrics))


def load(folder: Path) -> Trained:
    metrics = json.loads((folder / "metrics.json").read_text())
    return Trained(load_file(folder / "tensors"), metrics)


def run(out: Path, deed: str) -> None:
    """train: all cases; die, stall: rank 1 does so before its second message."""
    with open_group("cpu", timeout_s=TIMEOUT_S if deed == "stall" else 60.0) as (group, device):
        assert device == "cpu"
        name = f"{group.world_size}-{group.rank}"
        if deed == "train":
            save(Trained(send_odd_shapes(group), []), out / "odd" / name)
            for case in list_cases(group.world_size):
                save(train_case(case, group), out / case / name)
            return
        group.sum(torch.ones(3))
        if group.rank == 1 and deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if group.rank == 1:
            time.sleep(60)
        group.sum(torch.ones(3))


def send_odd_shapes(group: Group) -> dict[str, Tensor]:
    across = torch.full((2, 3), float(group.rank + 1)).T
    assert not across.is_contiguous()
    assert group.sum(across) is across
    return {
        "across": across,
        "count": group.sum(torch.tensor(2**40 + group.rank)),  # no float32 could hold it
        "rows": group.gather(torch.arange(group.rank).repeat(3, 1).T + 10 * group.rank),
    }


def start(variables: dict[str, str], out: Path, deed: str, *args: str) -> None:
    """What a forked process does; it prints to `out`/<rank>.out and .err."""
    os.environ |= variables
    sys.stdout, sys.stderr = (
        (out / f"{variables['RANK']}.{kind}").open("w", buffering=1) for kind in ("out", "err")
    )
    if deed == "command":
        os.chdir(out)
        main(list(args))
        return
    try:
        run(out, deed)
    except PipelineError as error:
        sys.exit(f"Error: {error}")
