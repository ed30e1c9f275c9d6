"""BatchTopK against a dense version that sees the whole batch at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.member import finish_member, plan_members, start_member, step_member
from pipeline.sae.base import TrainingPass
from pipeline.sae.batch_topk import _SAMPLE_STRIDE, THRESHOLD_DECAY, BatchTopKSAE
from pipeline.sae.group import Group
from pipeline.sae.selection import ROW_BLOCK, Latents
from pipeline.schedules import find_k
from tests.test_member import make_config

BETA_PER_TOKEN = 1.5


def make_sae(
    *, d_model: int = 6, d_sae: int = 20, k: int = 3, scale: float = 0.7, seed: int = 0
) -> BatchTopKSAE:
    sae = BatchTopKSAE(d_model=d_model, d_sae=d_sae, k=k, beta=2 * BETA_PER_TOKEN, loss_tokens=2)
    generator = torch.Generator().manual_seed(seed)
    sae.double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
        sae.input_scale.fill_(scale)
    return sae


def draw(n: int = 50, d_model: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    acts, grads = torch.randn(2, n, d_model, generator=generator).double()
    return acts * 3, grads


def score_dense(sae: BatchTopKSAE, acts: Tensor, grads: Tensor | None) -> tuple[Tensor, Tensor]:
    """z and the scores."""
    z = (acts * sae.input_scale - sae.b_dec) @ sae.W_enc + sae.b_enc
    return z, z if grads is None else z * (1 + BETA_PER_TOKEN * (grads @ sae.W_dec.T).abs())


def run_dense(sae: BatchTopKSAE, acts: Tensor, grads: Tensor | None) -> tuple[Tensor, Tensor]:
    """Latents [batch, d_sae] and reconstruction in training."""
    z, scores = score_dense(sae, acts, grads)
    lowest = scores.flatten().sort(descending=True).values[len(acts) * sae.k - 1]
    y = torch.where(scores >= lowest, z, 0.0).relu()
    return y, (y @ sae.W_dec + sae.b_dec) / sae.input_scale


def widen(latents: Latents, d_sae: int) -> Tensor:
    return torch.zeros(len(latents.values), d_sae, dtype=latents.values.dtype).scatter_add(
        1, latents.indices, latents.values
    )


def differentiate(sae: BatchTopKSAE, acts: Tensor, recon: Tensor) -> list[Tensor]:
    loss = (recon - acts.detach()).square().sum(dim=1).mean() + recon.sin().sum()
    return list(torch.autograd.grad(loss, [acts, *sae.parameters()]))


def assert_same_gradients(sae: BatchTopKSAE, acts: Tensor, got: Tensor, expected: Tensor) -> None:
    names = ["acts", *(name for name, _ in sae.named_parameters())]
    pairs = zip(differentiate(sae, acts, got), differentiate(sae, acts, expected), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=40)
@given(
    batch=st.integers(1, 20),
    d_model=st.integers(1, 8),
    d_sae=st.integers(1, 24),
    share=st.floats(0, 1),
    steered=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_values_and_gradients_equal_the_dense_ones(
    batch: int, d_model: int, d_sae: int, share: float, steered: bool, seed: int
) -> None:
    sae = make_sae(d_model=d_model, d_sae=d_sae, k=max(1, round(share * d_sae)), seed=seed)
    acts, grads = draw(batch, d_model, seed=seed + 1)
    acts.requires_grad_()
    weights = grads if steered else None

    passed = sae.train_forward(acts, weights)
    expected, recon = run_dense(sae, acts, weights)

    torch.testing.assert_close(widen(passed.latents, d_sae), expected)
    torch.testing.assert_close(passed.recon, recon)
    got = differentiate(sae, acts, passed.recon)
    for name, a, b in zip(
        ["a", "We", "be", "Wd", "bd"], got, differentiate(sae, acts, recon), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)


# rows around the block size: one block, exactly one, one more, a partial third
@pytest.mark.parametrize("batch", [ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK + 7])
@pytest.mark.parametrize("later_are_larger", [True, False])
def test_row_blocks_do_not_change_the_selection(batch: int, later_are_larger: bool) -> None:
    sae, (acts, grads) = make_sae(), draw(batch)
    growth = torch.linspace(0.1, 3.0, batch).double()[:, None]
    acts = acts * (growth if later_are_larger else growth.flip(0))

    passed = sae.train_forward(acts, grads)

    assert int((passed.latents.values > 0).sum()) == batch * sae.k
    expected, recon = run_dense(sae, acts, grads)
    torch.testing.assert_close(widen(passed.latents, sae.d_sae), expected)
    torch.testing.assert_close(passed.recon, recon)


def test_a_misleading_sample_does_not_change_the_selection() -> None:
    sae, (acts, grads) = make_sae(d_sae=_SAMPLE_STRIDE), draw(ROW_BLOCK + 50)
    with torch.no_grad():
        sae.b_enc[0] = 1e3  # of which alone the sample consists

    expected, _ = run_dense(sae, acts, grads)

    assert int((expected[:, 1:] > 0).sum()) > 0
    torch.testing.assert_close(widen(sae.train_forward(acts, grads).latents, sae.d_sae), expected)


def test_inference_and_its_gradients_equal_the_dense_ones() -> None:
    sae, (acts, grads) = make_sae(), draw(2 * ROW_BLOCK + 3)
    acts.requires_grad_()
    sae.threshold.fill_(2.0)
    sae.steered_threshold.fill_(30.0)

    for weights, threshold in ((None, 2.0), (grads, 30.0)):
        z, scores = score_dense(sae, acts, weights)
        y = torch.where(scores > threshold, z, 0.0)
        assert 0 < int((y > 0).sum()) < y.numel() / 2
        recon = (y @ sae.W_dec + sae.b_dec) / sae.input_scale
        got = sae(acts, weights)
        torch.testing.assert_close(widen(got.latents, sae.d_sae), y)
        torch.testing.assert_close(got.recon, recon)
        assert_same_gradients(sae, acts, got.recon, recon)


def test_a_row_takes_what_others_leave() -> None:
    sae, (acts, _) = make_sae(), draw()
    acts[7] *= 100

    kept = sae.train_forward(acts).latents

    l0 = (kept.values > 0).sum(dim=1)
    assert int(l0.sum()) == 50 * 3
    assert int(l0[7]) == kept.values.shape[1] == int((score_dense(sae, acts, None)[0][7] > 0).sum())
    assert int(l0.min()) < 3


def test_each_threshold_is_the_running_mean_of_the_smallest_score_kept() -> None:
    sae = make_sae()
    expected = {"threshold": 0.0, "steered_threshold": 0.0}
    for step in range(3):
        acts, grads = draw(seed=step)
        sae.train_forward(acts, grads)
        sae.after_loss()
        for name, weights in (("threshold", None), ("steered_threshold", grads)):
            scores = score_dense(sae, acts, weights)[1].flatten()
            smallest = scores.sort(descending=True).values[50 * 3 - 1].item()
            decay = THRESHOLD_DECAY if step else 0.0
            expected[name] = decay * expected[name] + (1 - decay) * smallest

    assert sae.threshold.item() == pytest.approx(expected["threshold"])
    assert sae.steered_threshold.item() == pytest.approx(expected["steered_threshold"])
    assert expected["steered_threshold"] > 1.5 * expected["threshold"]


def test_both_thresholds_keep_k_latents_on_average() -> None:
    sae = make_sae(d_model=16, d_sae=100, k=10)
    for step in range(30):
        sae.train_forward(*draw(200, 16, seed=step))
        sae.after_loss()

    acts, grads = draw(2000, 16, seed=99)
    for weights in (None, grads):
        l0 = (sae.encode(acts, weights).values > 0).sum() / len(acts)
        assert l0.item() == pytest.approx(10, rel=0.05)


def test_batches_with_too_few_positive_latents_keep_those() -> None:
    sae, (acts, grads) = make_sae(k=20), draw()

    passed = sae.train_forward(acts, grads)
    sae.after_loss()

    z, scores = score_dense(sae, acts, grads)
    torch.testing.assert_close(widen(passed.latents, 20), z.relu())
    smallest = scores[scores > 0].min().item()
    assert sae.steered_threshold.item() == pytest.approx(smallest)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    before = sae.threshold.item()
    passed = sae.train_forward(acts, grads)
    sae.after_loss()
    assert passed.latents.values.shape == (50, 1)
    torch.testing.assert_close(passed.recon, (sae.b_dec / sae.input_scale).expand(50, 6))
    assert sae.threshold == before


def test_without_beta_the_gradient_changes_nothing() -> None:
    acts, grads = draw()
    plain, given = make_sae(), make_sae()
    plain.beta = given.beta = 0.0

    assert torch.equal(plain.train_forward(acts).recon, given.train_forward(acts, grads).recon)
    plain.after_loss()
    given.after_loss()
    assert (
        0 < plain.threshold == plain.steered_threshold == given.threshold == given.steered_threshold
    )
    assert torch.equal(plain(acts).recon, given(acts, grads).recon)


def test_bfloat16_products_keep_nearly_the_same_latents() -> None:
    sae, (acts, grads) = make_sae(), draw(200)
    exact = widen(sae.train_forward(acts, grads).latents, 20) > 0
    sae.product_dtype = torch.bfloat16

    passed = sae.train_forward(acts, grads)

    assert passed.recon.dtype == torch.float64
    rough = widen(passed.latents, 20) > 0
    assert 0.97 < (rough & exact).sum() / exact.sum() < 1


class ThreadGroup(Group):
    """Processes played by threads."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, box: list) -> None:
        self.rank, self.world_size, self.barrier, self.box = rank, world_size, barrier, box

    def gather(self, tensor: Tensor) -> Tensor:
        self.box[self.rank] = tensor
        self.barrier.wait(timeout=20)
        joined = torch.cat(list(self.box))
        self.barrier.wait(timeout=20)
        return joined

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.gather(tensor[None]).sum(dim=0))


# the split's sizes, and how much larger the second part's rows are
@pytest.mark.parametrize(
    ("sizes", "growth"), [((25, 25), 1.0), ((10, 40), 9.0), ((5, 20, 25), 0.1)]
)
def test_several_processes_select_as_one(sizes: tuple[int, ...], growth: float) -> None:
    acts, grads = draw()
    acts[sizes[0] :] *= growth
    whole = make_sae()
    expected = whole.train_forward(acts, grads)
    whole.after_loss()

    barrier, box = threading.Barrier(len(sizes)), [None] * len(sizes)
    saes = [make_sae() for _ in sizes]
    for rank, sae in enumerate(saes):
        sae.group = ThreadGroup(rank, len(sizes), barrier, box)

    def run(rank: int) -> TrainingPass:
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        return saes[rank].train_forward(acts[rows], grads[rows])

    with ThreadPoolExecutor(len(sizes)) as pool:
        passes = list(pool.map(run, range(len(sizes))))

    torch.testing.assert_close(torch.cat([p.recon for p in passes]), expected.recon)
    got = torch.cat([widen(p.latents, 20) for p in passes])
    torch.testing.assert_close(got, widen(expected.latents, 20))
    for sae in saes:
        sae.after_loss()
        assert sae.threshold == whole.threshold > 0
        assert sae.steered_threshold == whole.steered_threshold


def test_thresholds_begin_anew_with_each_k() -> None:
    sae, (acts, grads) = make_sae(k=5), draw()
    for _ in range(3):
        sae.set_k(5)
        sae.train_forward(acts, grads)
        sae.after_loss()
    wide = sae.threshold.clone(), sae.steered_threshold.clone()
    sae.set_k(2)
    sae.train_forward(acts, grads)
    sae.after_loss()
    fresh = make_sae(k=2)
    fresh.train_forward(acts, grads)
    fresh.after_loss()
    for found, wanted, before in zip(
        (sae.threshold, sae.steered_threshold),
        (fresh.threshold, fresh.steered_threshold),
        wide,
        strict=True,
    ):
        assert found == wanted > before
    sae.set_k(2)
    sae.train_forward(acts / 2, grads)
    sae.after_loss()
    assert fresh.threshold * 0.98 < sae.threshold < fresh.threshold  # a running mean again


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_after_annealing_inference_keeps_k_per_row(fraction: float) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(2000, 64, generator=generator)
    acts = codes.where(codes > 0.9, 0.0) @ torch.randn(64, 32, generator=generator)
    grads = torch.randn(acts.shape, generator=generator) / 100
    config = make_config(
        architectures=("batch_topk",),
        betas=(10.0,),
        ks=(4,),
        d_saes=(64,),
        k_start=32,
        k_anneal_fraction=fraction,
    )
    (spec,) = plan_members(config)
    member = start_member(spec, config, acts, k=32)
    for step in range(100):
        k = find_k(config, step, 100, k=4)
        step_member(member, acts, grads, config=config, lr=1e-3, k=k, full=False)
    sae = finish_member(member)
    for seen in (None, grads):
        l0 = (sae.encode(acts, seen).values > 0).sum(dim=1).double().mean().item()
        assert l0 == pytest.approx(4, rel=0.1)
