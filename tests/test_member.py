"""One optimizer step: beside an independent TopK SAE, and its metrics beside their definitions."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.member import plan_members, start_member
from pipeline.sae import Learner, StepMetrics, take_step

DEFAULTS = {
    "hook": None,
    "architectures": ("topk",),
    "betas": (0.0,),
    "ks": (3,),
    "gradients": ("cached",),
    "seeds": (0,),
    "d_saes": (24,),
    "loss_tokens": 10,
    "n_experts": 4,
    "jumprelu_bandwidth": 0.03,
    "aux_weight": 0.0,
    "aux_k": None,
    "k_start": None,
    "k_anneal_fraction": 0.0,
    "decoder_norm": "unit",
    "b_dec_start": "mean",
    "input_scaling": "none",
    "precision": "float32",
    "batch_size": 64,
    "epochs": 1,
    "tokens": None,
    "steps": None,
    "lr": 0.01,
    "lr_warmup_fraction": 0.0,
    "lr_decay_fraction": 0.0,
    "lr_decay": "linear",
    "lr_end_fraction": 0.0,
    "max_grad_norm": None,
    "average_decay": None,
    "exclude_positions": (),
    "window_shards": 1,
    "allow_partial": False,
    "shuffle_seed": 0,
    "log_every": 2,
    "checkpoint_every": 100,
    "loggers": (),
}


def make_config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate(DEFAULTS | changes)


def start(acts: Tensor, **changes: object) -> Learner:
    config = make_config(**changes)
    return start_member(plan_members(config)[0], config, acts).learner


def step(
    member: Learner, acts: Tensor, grads: Tensor, *, lr: float = 0.01, decoder_norm: str = "unit"
) -> StepMetrics:
    return take_step(member, acts, grads, lr=lr, decoder_norm=decoder_norm, full=True)


def draw(n: int = 64, d_model: int = 8, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(n, d_model, generator=generator) + 1
    return acts, torch.randn(n, d_model, generator=generator)


class PlainTopK(nn.Module):
    """TopK as in Gao et al. 2024, section 2.3, dense, with nn.Linear's layout."""

    def __init__(self, d_model: int, d_sae: int, k: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(d_model, d_sae)
        self.decoder = nn.Linear(d_sae, d_model, bias=False)
        self.b_pre = nn.Parameter(torch.zeros(d_model))
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x - self.b_pre)
        threshold = z.sort(dim=1, descending=True).values[:, self.k - 1 : self.k]
        return self.decoder(torch.where(z >= threshold, z, 0.0).relu()) + self.b_pre


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_beta_zero_trains_as_an_independent_topk_does(decoder_norm: str) -> None:
    acts, grads = draw()
    member = start(acts)
    other = PlainTopK(8, 24, 3)
    with torch.no_grad():
        other.encoder.weight.copy_(member.sae.W_enc.T)
        other.encoder.bias.copy_(member.sae.b_enc)
        other.decoder.weight.copy_(member.sae.W_dec.T)
        other.b_pre.copy_(member.sae.b_dec)
    adam = torch.optim.Adam(other.parameters())

    for i in range(20):
        lr = 0.01 / (i + 1)
        metrics = step(member, acts, grads, lr=lr, decoder_norm=decoder_norm)

        loss = ((other(acts) - acts) ** 2).sum() / len(acts)
        assert metrics.loss == pytest.approx(loss.item(), rel=1e-4)
        adam.zero_grad()
        loss.backward()
        columns = other.decoder.weight
        if decoder_norm == "unit":
            for j in range(24):
                direction = columns.data[:, j]
                columns.grad[:, j] -= (columns.grad[:, j] @ direction) * direction
        adam.param_groups[0]["lr"] = lr
        adam.step()
        if decoder_norm == "unit":
            columns.data /= columns.data.norm(dim=0)

    torch.testing.assert_close(member.sae.W_enc.T, other.encoder.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(member.sae.W_dec.T, other.decoder.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(member.sae.b_dec, other.b_pre, rtol=1e-3, atol=1e-4)


def test_unit_decoder_rows_stay_at_unit_norm_and_free_ones_do_not() -> None:
    acts, grads = draw()
    for decoder_norm, unit in (("unit", True), ("free", False)):
        member = start(acts)
        for _ in range(5):
            step(member, acts, grads, decoder_norm=decoder_norm)
        norms = member.sae.W_dec.norm(dim=1)
        assert torch.allclose(norms, torch.ones(24), atol=1e-6) is unit


def test_metrics_are_what_their_names_say() -> None:
    acts, grads = draw()
    member = start(acts, betas=(50.0,))
    recon, latents = member.sae(acts, grads)
    rows = [(x - r).norm().item() / x.norm().item() for x, r in zip(acts, recon, strict=True)]
    plain = member.sae.encode(acts).indices
    shared = [
        len(set(mine.tolist()) & set(theirs.tolist())) / 3
        for mine, theirs in zip(latents.indices, plain, strict=True)
    ]
    products = [
        (member.sae.W_dec[i] @ grads[row]).abs().item()
        for row in range(64)
        for i in latents.indices[row].tolist()
    ]

    metrics = step(member, acts, grads)

    assert metrics.loss == pytest.approx((acts - recon).square().sum().item() / 64, rel=1e-5)
    assert metrics.nmse == pytest.approx(sum(rows) / 64, rel=1e-5)
    assert metrics.nmse_squared == pytest.approx(sum(r * r for r in rows) / 64, rel=1e-5)
    assert metrics.l0 == pytest.approx((latents.values > 0).sum().item() / 64)
    assert metrics.overlap == pytest.approx(sum(shared) / 64)
    assert 0 < metrics.overlap < 1
    weight = 50.0 / 10 * sum(products) / len(products)
    assert metrics.gradient_weight == pytest.approx(weight, rel=1e-5)


def test_overlap_and_weight_of_beta_zero() -> None:
    acts, grads = draw()
    metrics = step(start(acts), acts, grads)
    assert (metrics.overlap, metrics.gradient_weight) == (1.0, 0.0)


def test_a_latent_is_dead_after_five_batches_of_4096_tokens_without_activation() -> None:
    acts, grads = draw(n=4096)
    member = start(acts, d_saes=(4,))  # k = 3
    dead = []
    for i in range(8):
        # latents 2 and 3 are always above zero; one of 0 and 1 is selected too, but is zero after
        # the ReLU, except for latent 0 in batch 2
        with torch.no_grad():
            member.sae.b_enc.copy_(
                torch.tensor([100.0 if i == 2 else -100.0, -100.0, 100.0, 100.0])
            )
        dead.append(step(member, acts, grads, lr=0.0).dead_latents)

    assert dead == [0, 0, 0, 0, 1, 1, 1, 2]


def test_input_scaling_is_the_same_training_on_scaled_input() -> None:
    acts, grads = draw()
    acts = acts * 40
    scaled = start(acts, betas=(5.0,), input_scaling="mean_norm")
    scale = scaled.sae.input_scale
    plain = start(acts * scale, betas=(5.0,))

    for _ in range(10):
        got, expected = step(scaled, acts, grads), step(plain, acts * scale, grads)
        assert got.loss == pytest.approx(expected.loss, rel=1e-4)
        assert got.nmse == pytest.approx(expected.nmse, rel=1e-4)

    torch.testing.assert_close(scaled.sae.W_dec, plain.sae.W_dec, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("d_sae", [64, 128])
def test_it_recovers_known_sparse_features(d_sae: int) -> None:
    generator = torch.Generator().manual_seed(1)  # not the seed of the decoder
    features = nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)

    def draw_rows() -> Tensor:
        chosen = torch.rand(512, 64, generator=generator).topk(3, dim=1).indices
        strength = torch.rand(512, 3, generator=generator) + 0.5
        return torch.zeros(512, 64).scatter(1, chosen, strength) @ features

    member = start(draw_rows(), d_saes=(d_sae,), input_scaling="mean_norm")

    def mean_cosine() -> float:
        return (features @ member.sae.W_dec.T).max(dim=1).values.mean().item()

    assert mean_cosine() < 0.6
    for i in range(400):
        rows = draw_rows()
        take_step(member, rows, lr=3e-3 * min(1.0, (400 - i) / 80))
    assert mean_cosine() >= 0.9


def test_names_of_members() -> None:
    config = make_config(betas=(0.0, 1e5, 2.5e4, 0.5), ks=(3, 4))
    assert [spec.name for spec in plan_members(config)] == [
        *("k3-beta0", "k3-beta1e5", "k3-beta2.5e4", "k3-beta0.5"),
        *("k4-beta0", "k4-beta1e5", "k4-beta2.5e4", "k4-beta0.5"),
    ]
    assert [spec.name for spec in plan_members(make_config(seeds=(0, 7)))] == [
        "k3-beta0-seed0",
        "k3-beta0-seed7",
    ]


def test_sizes_are_named_where_there_are_several() -> None:
    specs = plan_members(make_config(d_saes=(12, 24), ks=(3, 4), seeds=(0, 7)))
    assert [spec.name for spec in specs[:4]] == [
        *("k3-beta0-d12-seed0", "k3-beta0-d12-seed7", "k4-beta0-d12-seed0", "k4-beta0-d12-seed7"),
    ]
    assert [(spec.d_sae, spec.k, spec.seed) for spec in specs] == [
        (d_sae, k, seed) for d_sae in (12, 24) for k in (3, 4) for seed in (0, 7)
    ]
    acts, _ = draw()
    config = make_config(d_saes=(12, 24))
    saes = [start_member(spec, config, acts).learner.sae for spec in plan_members(config)]
    assert [sae.d_sae for sae in saes] == [12, 24]


# architecture, gradients, loss of the store -> names for betas 0 and 5
GRADIENTS = [
    ("topk", ("cached", "shuffled"), "full", ["k3-beta0", "k3-beta5", "k3-beta5-shuffled"]),
    ("topk", ("shuffled",), "full", ["k3-beta0", "k3-beta5-shuffled"]),
    # what does not look at the gradient has one member for all
    ("relu", ("cached", "shuffled"), "full", ["relu-k3-beta0"]),
    ("end_to_end", ("cached", "shuffled"), "full", [f"end_to_end-k3-beta{b}" for b in (0, 5)]),
    ("topk", ("cached",), "own", ["k3-beta0-own", "k3-beta5-own"]),
    ("topk", ("shuffled",), "own", ["k3-beta0-own", "k3-beta5-own-shuffled"]),
]


@pytest.mark.parametrize(("architecture", "gradients", "loss", "names"), GRADIENTS)
def test_only_steered_members_have_a_shuffled_twin(
    architecture: str, gradients: tuple[str, ...], loss: str, names: list[str]
) -> None:
    config = make_config(architectures=(architecture,), betas=(0.0, 5.0), gradients=gradients)
    specs = plan_members(config, loss=loss)
    assert [spec.name for spec in specs] == names
    assert [spec.shuffled for spec in specs] == [name.endswith("shuffled") for name in names]


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
def test_a_steered_sae_starts_at_the_k_of_the_first_step(architecture: str) -> None:
    acts, _ = draw(n=512)
    config = make_config(architectures=(architecture,), ks=(1,))
    (spec,) = plan_members(config)
    few, many = (start_member(spec, config, acts, k=k).learner.sae for k in (1, 3))
    wide = start_member(spec._replace(k=3), config, acts).learner.sae
    assert torch.equal(many.encode(acts).values, wide.encode(acts).values)
    ratio = (many.encode(acts).values > 0).sum() / (few.encode(acts).values > 0).sum()
    assert ratio > 2
