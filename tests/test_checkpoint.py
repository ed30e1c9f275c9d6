"""Checkpoints on disk: exact, the last two kept, damage passed over, pickles refused."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pipeline import checkpoint as module
from pipeline.checkpoint import (
    Checkpoint,
    check_room,
    name_training,
    read_newest,
    write_checkpoint,
)
from pipeline.errors import TrainError
from pipeline.member import Member, plan_members, start_member, step_member
from pipeline.member_state import collect_state, find_not_finite, resume_member
from pipeline.sae import ARCHITECTURES
from store.stream_plan import StreamState
from tests.store.test_disk import run_on_mount
from tests.test_history import make_row
from tests.test_member import draw, make_config

OURS, OTHER = name_training({"lr": 1}), name_training({"lr": 2})


def make_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        tokens=64 * step,
        stream=StreamState("order", step),
        failed={"k3-beta9": "loss of k3-beta9 at step 1: got nan"},
        tensors={
            "k3-beta0/W": torch.full((4, 3), 1 / 3 + step),
            "k3-beta0/idle_tokens": torch.tensor([2**40, 0]),
            "rng": torch.arange(200, dtype=torch.uint8),
        },
        rows={"k3-beta0": [make_row(1), make_row(step)], "k3-beta9": []},
        versions={"python": "3.11.1", "gsae-pipeline": "0.1.0"},
    )


def write(folder: Path, *steps: int, training: str = OURS) -> None:
    for step in steps:
        write_checkpoint(folder, make_checkpoint(step), training=training)


def read(folder: Path, training: str = OURS) -> tuple[Checkpoint | None, list[str]]:
    said: list[str] = []
    return read_newest(folder, training=training, tell=said.append), said


def check_same(got: Checkpoint | None, step: int) -> None:
    wanted = make_checkpoint(step)
    assert got is not None
    assert got._replace(tensors={}) == wanted._replace(tensors={})
    assert got.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert torch.equal(got.tensors[name], tensor)


def test_a_checkpoint_comes_back_as_it_went(tmp_path: Path) -> None:
    write(tmp_path, 7)
    got, said = read(tmp_path)
    check_same(got, 7)
    assert said == []
    assert read(tmp_path / "none") == (None, [])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 9, 10, 11)
    assert sorted(path.name[9:] for path in tmp_path.iterdir()) == ["00000010", "00000011"]
    check_same(read(tmp_path)[0], 11)


def test_another_training_does_not_go_on_from_it_and_leaves_it(tmp_path: Path) -> None:
    write(tmp_path, 5)
    got, said = read(tmp_path, OTHER)
    assert got is None
    assert "got those of other settings" in said[0]
    assert "starts from step 1" in said[0]
    write(tmp_path, 2, 3, 4, training=OTHER)
    check_same(read(tmp_path)[0], 5)
    check_same(read(tmp_path, OTHER)[0], 4)


@pytest.mark.parametrize(
    "name",
    ["state.safetensors", "state.json", "history/k3-beta0.parquet", "history/k3-beta9.parquet"],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_one_falls_back_to_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path, 5, 6)
    path = tmp_path / f"{OURS[:8]}-00000006" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    new = {"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b"", "remove": None}[damage]
    path.unlink()
    if new is not None:
        path.write_bytes(new)

    got, said = read(tmp_path)
    check_same(got, 5)
    assert len(said) == 1
    assert str(path.parents[name.count("/")]) in said[0]
    assert "goes on from an earlier one" in said[0]

    shutil.rmtree(tmp_path / f"{OURS[:8]}-00000005")
    got, said = read(tmp_path)
    assert got is None
    assert "starts from step 1" in said[-1]


@pytest.mark.parametrize("name", ["checkpoint.pt", "abcd-00000001/state.bin"])
def test_8_a_pickle_is_refused_unopened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save({"step": 1}, path)
    with pytest.raises(TrainError, match=r"expected safetensors, got a pickle.*never loaded"):
        read(tmp_path)


def test_8_a_pickle_under_the_name_of_tensors_is_damage(tmp_path: Path) -> None:
    write(tmp_path, 5, 6)
    torch.save({"step": 1}, tmp_path / f"{OURS[:8]}-00000006" / "state.safetensors")
    check_same(read(tmp_path)[0], 5)


POINTS = ["before-write", "after-write", "before-rename", "after-rename"]


@pytest.mark.parametrize("point", POINTS)
def test_26_killed_while_writing(tmp_path: Path, point: str) -> None:
    """The one before, or the new one whole; what is left over is swept by the next."""
    code = f"from tests.test_checkpoint import *; write(Path({str(tmp_path)!r}), 5, 6)"
    killed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"STORE_CRASH_POINT": f"{point}:checkpoint", "STORE_CRASH_SKIP": "1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    got, said = read(tmp_path)
    check_same(got, 6 if point == "after-rename" else 5)
    assert said == []
    write(tmp_path, 7)
    assert not list(tmp_path.glob(".*"))
    check_same(read(tmp_path)[0], 7)


def test_damaged_ones_of_later_steps_make_way(tmp_path: Path) -> None:
    write(tmp_path, 20, 30)
    for path in tmp_path.iterdir():
        (path / "state.json").write_text("{}")
    write(tmp_path, 10)
    assert [path.name[9:] for path in tmp_path.iterdir()] == ["00000010"]
    check_same(read(tmp_path)[0], 10)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_a_full_disk_names_the_bytes_and_spares_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write(tmp_path, 5)

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "save_file", refuse)
    with pytest.raises(TrainError, match=r"expected [\d,]+ bytes free.*last checkpoint"):
        write(tmp_path, 6)
    assert not list(tmp_path.glob(".*"))
    check_same(read(tmp_path)[0], 5)


FULL = """
import sys
from tests.test_checkpoint import *
folder = Path(sys.argv[1])
write(folder, 5)
tensors = {"W": torch.zeros(1000, 1000)}
try:
    write_checkpoint(folder, make_checkpoint(6)._replace(tensors=tensors), training=OURS)
except TrainError as error:
    print(error)
print(*sorted(path.name[9:] for path in folder.iterdir()))
"""


def test_15_a_disk_that_fills_up(tmp_path: Path) -> None:
    said, left = run_on_mount(tmp_path, "size=1m", FULL).splitlines()
    assert said.startswith(f"disk for checkpoints at {tmp_path}: expected 4,000,000 bytes free")
    assert left == "00000005"


def test_room_is_that_of_three_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"W": torch.zeros(10, 10), "n": torch.zeros(5, dtype=torch.int64)}
    monkeypatch.setattr(module, "free_bytes", lambda _: 3 * 440)
    check_room(tmp_path, tensors)
    monkeypatch.setattr(module, "free_bytes", lambda _: 3 * 440 - 1)
    with pytest.raises(TrainError, match="expected 1,320 bytes free, got 1,319"):
        check_room(tmp_path, tensors)


def run_steps(member: Member, first: int, last: int) -> list[float]:
    """Each step has its own batch."""
    config = make_config(average_decay=0.9, aux_weight=0.1, max_grad_norm=1.0)
    losses = []
    for step in range(first, last):
        acts, grads = draw(seed=step)
        tokens = torch.arange(64) % 5
        metrics = step_member(member, acts, grads, tokens, config=config, lr=0.01, full=True)
        losses.append(metrics.loss)
    return losses


@pytest.mark.parametrize("architecture", ["end_to_end", *ARCHITECTURES])
def test_a_resumed_member_goes_on_bit_for_bit(tmp_path: Path, architecture: str) -> None:
    config = make_config(architectures=(architecture,), average_decay=0.9, n_experts=4)
    (spec,) = plan_members(config)
    member = start_member(spec, config, draw()[0], n_tokens=5)
    run_steps(member, 0, 4)
    write_checkpoint(
        tmp_path,
        make_checkpoint(4)._replace(tensors=collect_state([member])),
        training=OURS,
    )
    losses = run_steps(member, 4, 9)

    saved, _ = read(tmp_path)
    assert saved is not None
    resumed = resume_member(spec, config, saved.tensors, 8, "cpu", n_tokens=5)
    assert run_steps(resumed, 4, 9) == losses
    wanted, got = collect_state([member]), collect_state([resumed])
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), name
        assert tensor.stride() == got[name].stride(), name
        assert got[name].data_ptr() != tensor.data_ptr()


def test_what_is_not_finite_is_found_wherever_it_is() -> None:
    config = make_config(betas=(0.0, 1.0))
    members = [start_member(spec, config, draw()[0]) for spec in plan_members(config)]
    for member in members:
        run_steps(member._replace(learner=member.learner._replace(average=None)), 0, 1)
    assert find_not_finite(members) == {}
    for name, tensor in collect_state(members[1:]).items():
        if tensor.is_floating_point():
            first = (0,) * tensor.ndim
            before = tensor.data[first].clone()
            tensor.data[first] = torch.nan
            assert find_not_finite(members) == {members[1].spec.name: name}
            tensor.data[first] = before
