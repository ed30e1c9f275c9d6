"""The gradient of a row's own loss, against one backward pass per position through plain models."""

import shutil

import pytest
import torch

from pipeline import attention
from pipeline.capture import Captured, capture
from pipeline.errors import ModelError
from pipeline.model import load_model, name_site
from store.reader import open_store
from tests.checkpoints import save_gpt2, save_llama, save_neox
from tests.reference_models import ReferenceRun, run_reference
from tests.tiny import run_cli

N_LAYERS, CONTEXT, VOCAB = 2, 7, 64
KINDS = {
    "gpt2": save_gpt2,
    "neox": save_neox,
    "neox_in_sequence": lambda folder, **shape: save_neox(folder, parallel=False, **shape),
    "llama": save_llama,  # two query heads share a key head
}
LENGTHS = torch.tensor([CONTEXT, 4, 1])
REAL = torch.arange(CONTEXT) < LENGTHS[:, None]


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    shape = {"n_layers": N_LAYERS, "context": CONTEXT, "vocab": VOCAB}
    return KINDS[request.param](tmp_path_factory.mktemp(request.param), **shape)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB, (3, CONTEXT + 1), generator=generator)


@pytest.fixture(scope="module")
def full(model, tokens) -> Captured:
    return capture(model, tokens, sorted(model.sites), lengths=LENGTHS)


@pytest.fixture(scope="module")
def own(model, tokens) -> Captured:
    return capture(model, tokens, sorted(model.sites), lengths=LENGTHS, loss="own")


def gradients_one_by_one(run: ReferenceRun) -> dict[str, torch.Tensor]:
    """Row i of the gradient of row i's loss, by a backward pass for each real row."""
    grads = {hook: torch.zeros_like(value) for hook, value in run.sites.items()}
    for block, i in REAL.nonzero().tolist():
        for hook, value in run.sites.items():
            (grad,) = torch.autograd.grad(run.loss[block, i], value, retain_graph=True)
            grads[hook][block, i] = grad[block, i]
    return grads


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


def test_every_site_equals_one_backward_pass_per_position(own, full, folder, tokens):
    expected = gradients_one_by_one(run_reference(folder, tokens))
    assert own.grads.keys() == expected.keys()
    for hook, grads in expected.items():
        assert relative_error(own.grads[hook], grads) < 1e-9, hook
    below = name_site(0, "resid_pre")
    assert relative_error(own.grads[below], full.grads[below]) > 0.05


def test_values_are_those_of_the_full_loss(own, full):
    assert torch.equal(own.loss, full.loss)
    for hook in full.acts:
        assert torch.equal(own.acts[hook], full.acts[hook]), hook


def test_the_last_position_has_no_later_losses(own, full):
    last = (LENGTHS - 1).long()
    for hook, grads in full.grads.items():
        row = torch.arange(len(last))
        assert relative_error(own.grads[hook][row, last], grads[row, last]) < 1e-9, hook


def test_above_all_attention_there_is_nothing_to_cut(own, full):
    hook = name_site(N_LAYERS - 1, "resid_post")
    assert torch.equal(own.grads[hook], full.grads[hook])


def test_padding_has_no_gradient(own):
    for hook, grads in own.grads.items():
        assert (grads[~REAL] == 0).all(), hook
        assert grads[REAL].norm(dim=-1).min() > 1e-3, hook


def test_folded_weights_and_sixteen_bits(folder, tokens):
    model = load_model(folder, weight_processing="folded")
    hook = name_site(0, "resid_post")
    exact = capture(model, tokens, [hook], lengths=LENGTHS, loss="own")
    expected = gradients_one_by_one(run_reference(folder, tokens))[hook]
    assert relative_error(exact.grads[hook], expected.float()) < 1e-3
    rough = capture(model, tokens, [hook], lengths=LENGTHS, loss="own", precision="bfloat16")
    assert relative_error(rough.grads[hook], exact.grads[hook]) < 0.1
    assert not torch.equal(rough.grads[hook], exact.grads[hook])


def test_the_full_loss_is_left_as_it_was(model, tokens, own, full):
    hook = name_site(0, "resid_post")
    after = capture(model, tokens, [hook], lengths=LENGTHS)
    assert torch.equal(after.grads[hook], full.grads[hook])
    assert not torch.equal(own.grads[hook], full.grads[hook])


def test_no_graph_below_the_first_hook(model, tokens):
    graph = {}

    def note(layer):
        def hook(value, **_):
            graph[layer] = value.requires_grad

        return (name_site(layer, "mlp_out"), hook)

    with model.bridge.hooks(fwd_hooks=[note(layer) for layer in range(N_LAYERS)]):
        capture(model, tokens, [name_site(0, "resid_post")], loss="own")
    assert graph == {0: False, 1: True}


@pytest.fixture
def plain(tmp_path):
    return load_model(save_gpt2(tmp_path, n_layers=N_LAYERS, context=CONTEXT, vocab=VOCAB))


def test_attention_of_another_scale_is_refused(plain, tokens):
    plain.bridge.blocks[1].attn.original_component.scaling *= 2
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel .* relative error .* `--loss full`"):
        capture(plain, tokens, [name_site(0, "resid_post")], loss="own")


def test_attention_without_hooks_is_refused(plain, tokens):
    del plain.bridge.blocks[1].attn.original_component.scaling
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel .* in block 1"):
        capture(plain, tokens, [name_site(0, "resid_post")], loss="own")


def test_a_model_is_measured_once(plain, tokens, monkeypatch):
    measured = []
    check = attention._check_exact
    monkeypatch.setattr(attention, "_check_exact", lambda *a: (measured.append(1), check(*a)))
    for _ in range(2):
        capture(plain, tokens, [name_site(0, "resid_post")], loss="own")
    assert measured == [1]


def test_an_unknown_loss_is_a_mistake(plain, tokens):
    with pytest.raises(ValueError, match="expected full or own, got 'later'"):
        capture(plain, tokens, [name_site(0, "resid_post")], loss="later")


def test_cache_stores_it_beside_the_full_loss(cached, tmp_path, monkeypatch, capsys):
    shutil.copytree(cached, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    assert run_cli("cache", "--loss", "own", "--dry-run") == 0
    assert "    loss  own\n" in capsys.readouterr().out
    assert run_cli("cache", "--loss", "own") == 0
    full, own = (open_store(path) for path in ("stores/tiny", "stores/tiny+loss=own"))
    assert full.manifest.identity["loss"] == "full"
    assert own.manifest.identity["loss"] == "own"
    assert own.manifest.fingerprint != full.manifest.fingerprint
    a, b = (store.read_shard(0) for store in (full, own))
    assert torch.equal(a.acts, b.acts)
    assert torch.equal(a.loss, b.loss)
    assert relative_error(b.grads, a.grads) > 0.05
    last = a.position == full.manifest.context_length - 1
    assert torch.allclose(a.grads[last], b.grads[last], rtol=2e-3, atol=1e-4)  # float16
    capsys.readouterr()
    assert run_cli("store", "info", "stores/tiny+loss=own") == 0
    assert 'loss  "own"\n' in capsys.readouterr().out
