"""End-to-end training against full runs of the model and plain autograd, in float64."""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from pipeline.capture import capture
from pipeline.config import load_config
from pipeline.end_to_end import (
    count_lower_blocks,
    make_step,
    plan_blocks,
    row_divergences,
    stream_end_to_end,
)
from pipeline.errors import TrainError
from pipeline.model import LanguageModel, Unembedding, load_model, name_site
from pipeline.sae import TopKSAE, init_weights, start_learning, take_step
from pipeline.sae.group import Group
from pipeline.training import plan_courses, plan_training
from pipeline.upper import run_upper
from store.blocks import BlockBatch
from store.reader import open_store
from tests.checkpoints import save_gpt2, save_llama, save_neox

N_LAYERS, CONTEXT, VOCAB, D_MODEL = 3, 12, 64, 16
KINDS = {
    "gpt2": save_gpt2,
    "neox": save_neox,
    "neox_in_sequence": lambda folder, **shape: save_neox(folder, parallel=False, **shape),
    "llama": save_llama,
}
HOOK = "blocks.1.hook_resid_post"
ENDS = [
    (name_site(layer, site), layer + (site == "resid_post"))
    for layer in range(N_LAYERS)
    for site in ("resid_pre", "resid_post")
]


@pytest.fixture(scope="module", params=list(KINDS))
def model(request, tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp(request.param)
    save = KINDS[request.param]
    return load_model(
        save(folder, n_layers=N_LAYERS, context=CONTEXT, vocab=VOCAB), dtype=torch.float64
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("plain")
    return load_model(save_gpt2(folder, n_layers=N_LAYERS, context=CONTEXT), dtype=torch.float64)


def draw_blocks(model: LanguageModel, lengths: tuple[int, ...] = (CONTEXT, 7, 4)) -> BlockBatch:
    """Blocks as a store would give them, but for float64."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (len(lengths), CONTEXT + 1), generator=generator)
    padding = torch.tensor(lengths)
    captured = capture(model, tokens, [HOOK], lengths=padding)
    real = torch.arange(CONTEXT) < padding[:, None]
    return BlockBatch(
        acts=captured.acts[HOOK] * real[..., None],
        grads=captured.grads[HOOK],
        tokens=(tokens[:, :-1] * real).int(),
        loss=captured.loss,
        block=torch.arange(len(lengths)).int(),
        lengths=padding.int(),
    )


def full_logits(model: LanguageModel, tokens: Tensor, residual: Tensor | None = None) -> Tensor:
    """Logits of the whole model; with a residual, HOOK's value is replaced by it."""

    def put(value: Tensor, **_: object) -> Tensor | None:
        del value
        return residual

    return model.bridge.run_with_hooks(tokens.long(), fwd_hooks=[(HOOK, put)], use_cache=False)


def slow_divergence(
    model: LanguageModel, batch: BlockBatch, recon: Tensor, exclude: tuple[int, ...]
) -> Tensor:
    """The objective from two whole runs, one row after another."""
    residual, rows, i = batch.acts.clone(), [], 0
    for block, length in enumerate(batch.lengths.tolist()):
        for position in range(length):
            if position not in exclude:
                residual[block, position] = recon[i]
                i += 1
    with torch.no_grad():
        log_p = full_logits(model, batch.tokens).log_softmax(-1)
    log_q = full_logits(model, batch.tokens, residual).log_softmax(-1)
    for block, length in enumerate(batch.lengths.tolist()):
        for position in range(length):
            at = (block, position)
            rows.append(kl_div(log_q[at], log_p[at], log_target=True, reduction="sum"))
    return torch.stack(rows).mean()


@pytest.mark.parametrize(("hook", "n_lower"), ENDS)
def test_upper_part_alone_gives_the_whole_model_s_logits(model, hook, n_lower):
    assert count_lower_blocks(hook) == n_lower
    tokens = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []

    def keep(value: Tensor, **_: object) -> None:
        seen.append(value)

    expected = model.bridge.run_with_hooks(tokens, fwd_hooks=[(hook, keep)])
    hidden = run_upper(model, tokens, seen[0], n_lower=n_lower)
    logits = hidden @ model.unembedding.weight.T
    if model.unembedding.bias is not None:
        logits = logits + model.unembedding.bias

    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    moved = run_upper(model, tokens, seen[0].flip(-1), n_lower=n_lower)
    assert (moved - hidden).abs().max() > 1e-3, "the residual is not what the blocks read"


def test_lower_blocks_do_not_run_and_are_back_afterwards(model):
    ran: list[int] = []
    handles = []
    for i, block in enumerate(model.bridge.blocks):
        handles.append(block.attn.register_forward_hook(lambda *_, i=i: ran.append(i)))
        handles.append(block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)))
    tokens = torch.randint(VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    before = model.bridge(tokens)
    assert sorted(ran) == [0, 0, 1, 1, 2, 2]
    ran.clear()

    run_upper(model, tokens, torch.zeros(1, CONTEXT, D_MODEL), n_lower=2)
    assert ran == [2, 2]
    ran.clear()
    with pytest.raises(RuntimeError):  # of another width
        run_upper(model, tokens, torch.zeros(1, CONTEXT, D_MODEL + 1), n_lower=1)
    ran.clear()

    torch.testing.assert_close(model.bridge(tokens), before, rtol=0, atol=0)
    assert sorted(ran) == [0, 0, 1, 1, 2, 2]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("exclude", [(), (0,), (0, 3)])
def test_objective_and_its_gradient_equal_whole_runs(model, exclude):
    batch = draw_blocks(model)
    step = make_step(model, batch, n_lower=2, exclude_positions=exclude)
    noise = torch.randn(step.acts.shape, generator=torch.Generator().manual_seed(2)).double()

    fast, slow = ((step.acts + noise).requires_grad_() for _ in range(2))
    got = step.objective(fast)
    expected = slow_divergence(model, batch, slow, exclude)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    assert expected > 0.01

    got.backward()
    expected.backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-8, atol=1e-12)
    assert step.objective(step.acts).abs() < 1e-12


def test_rows_of_a_step_are_the_patched_ones_in_order(gpt2):
    batch = draw_blocks(gpt2)
    step = make_step(gpt2, batch, n_lower=2, exclude_positions=(0, 3))
    rows = [
        (block, position)
        for block, length in enumerate(batch.lengths.tolist())
        for position in range(length)
        if position not in (0, 3)
    ]
    for part in ("acts", "grads", "tokens"):
        expected = torch.stack([getattr(batch, part)[row] for row in rows])
        assert torch.equal(getattr(step, part), expected.to(getattr(step, part).dtype)), part


def test_two_processes_losses_weighed_by_rows_are_one_process_s(gpt2):
    """Two processes with blocks of other lengths, which leave out a position each."""

    class Half(Group):
        world_size = 2

        def sum(self, tensor: Tensor) -> Tensor:
            assert tensor.shape == (2,)
            return tensor.copy_(torch.tensor([9 + 5 + 6, 12 + 7 + 9]))

    whole = draw_blocks(gpt2, (12, 7, 9))
    exclude = (0, 3, 8)
    parts = [BlockBatch(*(column[rows] for column in whole)) for rows in ([0], [1, 2])]
    steps = [
        make_step(gpt2, part, n_lower=2, exclude_positions=exclude, group=Half()) for part in parts
    ]
    alone = make_step(gpt2, whole, n_lower=2, exclude_positions=exclude)
    noise = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(3)).double()
    expected = alone.objective(alone.acts + noise)
    got = sum(
        step.objective(step.acts + part) * len(part) / 20
        for step, part in zip(steps, noise.split([9, 11]), strict=True)
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("chunk_bytes", [1, 5 * 4 * 50, 2**20])
@pytest.mark.parametrize("with_bias", [True, False])
def test_divergence_equals_plain_autograd_in_every_chunking(chunk_bytes, with_bias):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(50, 8, generator=generator).double()
    bias = torch.randn(50, generator=generator).double() if with_bias else None
    original = torch.randn(13, 8, generator=generator).double()
    upstream = torch.randn(13, generator=generator).double()
    fast, slow = (
        (original + 0.3 * torch.randn(13, 8, generator=torch.Generator().manual_seed(5)))
        .detach()
        .requires_grad_()
        for _ in range(2)
    )
    log_p, log_q = (
        torch.log_softmax(part @ weight.T + (0 if bias is None else bias), -1)
        for part in (original, slow)
    )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    got = row_divergences(fast, original, Unembedding(weight, bias), chunk_bytes=chunk_bytes)

    torch.testing.assert_close(got, expected)
    got.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(fast.grad, slow.grad)


def test_bfloat16_divergence_is_near_float32_s(tmp_path):
    model = load_model(save_gpt2(tmp_path, n_layers=N_LAYERS, context=CONTEXT))
    batch = draw_blocks(model)
    noise = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(6))
    losses = [
        step.objective(step.acts + noise).item()
        for step in (
            make_step(model, batch, n_lower=2, exclude_positions=(0,), precision=precision)
            for precision in ("float32", "bfloat16")
        )
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"])
def test_a_branch_cannot_be_trained_end_to_end(hook):
    with pytest.raises(TrainError, match="expected resid_pre or resid_post, got"):
        count_lower_blocks(hook)


def test_a_batch_without_rows_to_patch_is_refused(gpt2):
    batch = draw_blocks(gpt2, (1, 1))
    with pytest.raises(TrainError, match=r"beyond train.exclude_positions, got none in any"):
        make_step(gpt2, batch, n_lower=2, exclude_positions=(0,))


def test_a_process_without_rows_to_patch_has_a_part_that_is_zero(gpt2):
    class Second(Group):
        def sum(self, tensor: Tensor) -> Tensor:
            return tensor + torch.tensor([3, 4])  # of the first process

    whole = draw_blocks(gpt2, (1, 1))
    for n_blocks in (2, 0):
        batch = BlockBatch(*(column[:n_blocks] for column in whole))
        step = make_step(gpt2, batch, n_lower=2, exclude_positions=(0,), group=Second())
        assert step.acts.shape == step.grads.shape == (0, D_MODEL)
        recon = step.acts.clone().requires_grad_()
        loss = step.objective(recon)
        loss.backward()
        assert loss == 0


def test_a_batch_with_fewer_blocks_than_processes_is_refused(cached):
    changes = {"train.architectures": ["end_to_end"], "train.batch_size": 47}
    config = load_config(cached / "configs" / "tiny.yaml", changes)
    plan = plan_training(config.train, cached / "stores" / "tiny")
    group = Group()
    plan_all = functools.partial(
        plan_courses, plan, config.train, device="cpu", model=config.model, group=group
    )
    group.world_size = 2
    assert plan_all()
    group.world_size = 3
    with pytest.raises(TrainError, match="a block of 16 positions for each of 3 processes"):
        plan_all()


@pytest.fixture(scope="module")
def project(cached) -> tuple[LanguageModel, object]:
    """The tiny project's model, and its store."""
    (folder,) = (cached / "stores").glob("*/manifest.json")
    return load_model(cached / "model"), open_store(folder.parent)


def train_end_to_end(project, *, n_steps: int, beta: float = 0.0):
    model, store = project
    plan = plan_blocks(store, batch_size=512, epochs=20)
    sae = TopKSAE(d_model=16, d_sae=64, k=4, beta=beta)
    learner = None
    metrics = []
    steps = stream_end_to_end(
        model,
        store,
        hook=store.hooks[0],
        batch_blocks=plan.batch_blocks,
        epochs=20,
        seed=0,
        exclude_positions=(0,),
    )
    for step, _ in zip(steps, range(n_steps), strict=False):
        if learner is None:
            init_weights(sae, step.acts, seed=0, scale_input=True)
            learner = start_learning(sae)
        metrics.append(
            take_step(
                learner,
                step.acts,
                step.grads,
                step.tokens,
                lr=3e-3,
                objective=step.objective,
                full=True,
            )
        )
    return sae, metrics


def test_training_from_a_store_lowers_the_divergence(project):
    _, metrics = train_end_to_end(project, n_steps=60)
    first, last = (sum(m.loss for m in part) / 5 for part in (metrics[:5], metrics[-5:]))
    assert last < 0.6 * first
    assert all(m.l0 <= 4 for m in metrics)


def test_the_cached_gradient_steers_the_selection(project):
    plain, plain_metrics = train_end_to_end(project, n_steps=2)
    steered, metrics = train_end_to_end(project, n_steps=2, beta=1e4)
    assert plain_metrics[0].overlap == 1
    assert metrics[0].overlap is not None
    assert metrics[0].overlap < 1
    assert metrics[0].loss != plain_metrics[0].loss
    assert not torch.equal(plain.W_enc, steered.W_enc)


def test_streaming_from_a_later_batch_gives_the_same_steps(project):
    model, store = project
    batch_blocks = store.manifest.n_blocks // 4
    arguments = {"hook": store.hooks[0], "batch_blocks": batch_blocks, "epochs": 1, "seed": 0}
    whole = list(stream_end_to_end(model, store, **arguments))
    later = list(stream_end_to_end(model, store, first_batch=2, **arguments))
    assert len(whole) == len(later) + 2 > 3
    for expected, got in zip(whole[2:], later, strict=True):
        assert torch.equal(got.acts, expected.acts)
        assert got.objective(got.acts * 0.9) == expected.objective(expected.acts * 0.9)


@pytest.mark.parametrize(
    ("batch_size", "batch_blocks"),
    [(16, 1), (31, 1), (32, 2), (4, 1)],  # positions of blocks of 16
)
def test_steps_have_whole_blocks(project, batch_size, batch_blocks):
    _, store = project
    plan = plan_blocks(store, batch_size=batch_size, epochs=3)
    assert plan.batch_blocks == batch_blocks
    assert plan.n_batches == 3 * store.manifest.n_blocks // batch_blocks
