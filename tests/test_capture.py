"""Capture against plain re-implementations of GPT-2, GPT-NeoX and Llama, in float64."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from pipeline.capture import Captured, capture, patched_loss
from pipeline.errors import CaptureError, ModelError
from pipeline.model import Unembedding, load_model, name_site, row_losses
from pipeline.model.unembed import reduce_precision
from tests.checkpoints import save_gpt2, save_llama, save_neox
from tests.reference_models import reference_gradients, run_reference

N_LAYERS, CONTEXT, VOCAB = 3, 12, 64
KINDS = {
    "gpt2": save_gpt2,
    "neox": save_neox,
    "neox_in_sequence": lambda folder, **shape: save_neox(folder, parallel=False, **shape),
    "llama": save_llama,
}
SEQUENTIAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
PARALLEL = ("resid_pre", "resid_post", "attn_out", "mlp_out")


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    shape = {"n_layers": N_LAYERS, "context": CONTEXT, "vocab": VOCAB}
    return KINDS[kind](tmp_path_factory.mktemp(kind), **shape)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens():
    return draw_tokens(4)


@pytest.fixture(scope="module")
def everything(model, tokens) -> Captured:
    """All sites of all layers, from one pass."""
    return capture(model, tokens, sorted(model.sites))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A float32 GPT-2, for what does not depend on the architecture."""
    folder = save_gpt2(tmp_path_factory.mktemp("plain"), n_layers=N_LAYERS, context=CONTEXT)
    return load_model(folder)


def draw_tokens(n_blocks: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (n_blocks, CONTEXT + 1), generator=generator)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


def test_every_site_is_offered(model, kind):
    sites = PARALLEL if kind == "neox" else SEQUENTIAL
    assert model.sites == {name_site(layer, site) for layer in range(N_LAYERS) for site in sites}


def test_values_and_gradients_equal_the_reference(everything, folder, tokens):
    reference = run_reference(folder, tokens)
    grads = reference_gradients(reference)
    assert everything.acts.keys() == everything.grads.keys() == reference.sites.keys()
    assert relative_error(everything.loss, reference.loss.detach()) < 1e-9
    for hook, acts in everything.acts.items():
        assert relative_error(acts, reference.sites[hook].detach()) < 1e-9, hook
        assert relative_error(everything.grads[hook], grads[hook]) < 1e-9, hook


def test_gradients_predict_finite_differences(everything, model, tokens):
    generator = torch.Generator().manual_seed(1)
    hooks = sorted(model.sites)
    step = 1e-4
    for i in range(20):
        hook = hooks[i * 7 % len(hooks)]
        acts = everything.acts[hook]
        direction = torch.randn(acts.shape, generator=generator, dtype=torch.float64)
        up, down = (
            patched_loss(model, tokens, hook, acts + sign * step * direction).sum()
            for sign in (1, -1)
        )
        slope = (everything.grads[hook] * direction).sum()
        assert ((up - down) / (2 * step)).item() == pytest.approx(slope.item(), rel=1e-4), hook


def test_patching_in_what_was_there_changes_nothing(everything, model, tokens):
    for hook, acts in everything.acts.items():
        loss = patched_loss(model, tokens, hook, acts)
        assert relative_error(loss, everything.loss) < 1e-12, hook


def test_patching_equals_the_reference(everything, model, folder, tokens):
    generator = torch.Generator().manual_seed(2)
    for hook, acts in everything.acts.items():
        noise = torch.randn(acts.shape, generator=generator, dtype=torch.float64)
        expected = run_reference(folder, tokens, {hook: acts + noise}).loss.detach()
        got = patched_loss(model, tokens, hook, acts + noise)
        assert relative_error(expected, everything.loss) > 1e-3, "the patch does nothing"
        assert relative_error(got, expected) < 1e-9, hook


def test_hooks_in_one_pass_equal_one_at_a_time(everything, model, tokens):
    for hook in everything.acts:
        alone = capture(model, tokens, [hook])
        assert relative_error(everything.acts[hook], alone.acts[hook]) < 1e-12, hook
        assert relative_error(everything.grads[hook], alone.grads[hook]) < 1e-12, hook


def test_order_of_hooks_is_immaterial(everything, model, tokens):
    backwards = capture(model, tokens, sorted(model.sites, reverse=True))
    assert list(backwards.acts) == sorted(model.sites, reverse=True)
    for hook, grads in everything.grads.items():
        assert relative_error(backwards.acts[hook], everything.acts[hook]) < 1e-12, hook
        assert relative_error(backwards.grads[hook], grads) < 1e-12, hook


def test_result_does_not_depend_on_the_batch(everything, model, tokens):
    for block in range(len(tokens)):
        alone = capture(model, tokens[block : block + 1], sorted(model.sites))
        assert relative_error(alone.loss[0], everything.loss[block]) < 1e-12
        for hook, grads in everything.grads.items():
            assert relative_error(alone.acts[hook][0], everything.acts[hook][block]) < 1e-12, hook
            assert relative_error(alone.grads[hook][0], grads[block]) < 1e-12, hook


def test_every_row_has_a_gradient(everything):
    for hook, grads in everything.grads.items():
        assert grads.norm(dim=-1).min() > 1e-3, hook  # the last position's target counts too


def test_padding_counts_for_nothing(model, folder, tokens):
    lengths = torch.tensor([CONTEXT, 5, 1, 0])
    real = torch.arange(CONTEXT) < lengths[:, None]
    padded = tokens.clone()
    padded[1, 6:], padded[2, 2:], padded[3] = -1, VOCAB - 1, 7
    hooks = sorted(model.sites)
    got = capture(model, padded, hooks, lengths=lengths)
    reference = run_reference(folder, tokens)
    grads = reference_gradients(reference, real)
    assert (got.loss[~real] == 0).all()
    assert relative_error(got.loss[real], reference.loss.detach()[real]) < 1e-9
    for hook in hooks:
        assert (got.grads[hook][~real] == 0).all()
        acts = reference.sites[hook].detach()
        assert relative_error(got.acts[hook][real], acts[real]) < 1e-9
        assert relative_error(got.grads[hook][real], grads[hook][real]) < 1e-9
        patched = patched_loss(model, padded, hook, acts, lengths=lengths)
        assert relative_error(patched, got.loss) < 1e-9


def test_bfloat16_stays_close(folder, tokens):
    model = load_model(folder)
    hooks = sorted(model.sites)
    exact, rough = (capture(model, tokens, hooks, precision=p) for p in ("float32", "bfloat16"))
    assert (exact.loss - rough.loss).abs().max() < 0.3
    assert abs((exact.loss - rough.loss).mean()) < 0.02
    for hook in hooks:
        assert rough.acts[hook].dtype == rough.grads[hook].dtype == torch.float32
        exact_grads, rough_grads = exact.grads[hook].flatten(), rough.grads[hook].flatten()
        assert cosine_similarity(exact_grads, rough_grads, 0) > 0.995, hook
        assert not torch.equal(exact_grads, rough_grads)
        assert relative_error(rough.acts[hook], exact.acts[hook]) < 0.02, hook


def test_no_graph_below_the_first_hook(model, tokens):
    graph = {}

    def note(layer):
        def hook(value, **_):
            graph[layer] = value.requires_grad

        return (name_site(layer, "mlp_out"), hook)

    with model.bridge.hooks(fwd_hooks=[note(layer) for layer in range(N_LAYERS)]):
        capture(model, tokens, [name_site(1, "resid_post")])
    assert graph == {0: False, 1: False, 2: True}


def test_capture_leaves_nothing_behind(model, tokens):
    hook = name_site(1, "resid_post")
    first, second = (capture(model, tokens, [hook]) for _ in range(2))
    assert torch.equal(first.acts[hook], second.acts[hook])
    assert torch.equal(first.grads[hook], second.grads[hook])
    temporary = [
        handle
        for point in model.bridge.hook_dict.values()
        for handle in point.fwd_hooks
        if not handle.is_permanent
    ]
    assert temporary == []
    assert not first.acts[hook].requires_grad
    assert not first.grads[hook].requires_grad


@pytest.mark.parametrize("hook", ["blocks.1.ln1.hook_out", "blocks.1.hook_in", "ln_final.hook_out"])
def test_other_hooks_of_the_models_width(gpt2, hook):
    tokens = draw_tokens(2)
    captured = capture(gpt2, tokens, [hook])
    loss = patched_loss(gpt2, tokens, hook, captured.acts[hook])
    assert relative_error(loss, captured.loss) < 1e-6
    assert captured.grads[hook].any()


def test_folding_keeps_losses_and_gradients_and_centres_the_residual(tmp_path):
    folder = save_gpt2(tmp_path, n_layers=2, context=CONTEXT)
    raw, folded = (load_model(folder, weight_processing=kind) for kind in ("raw", "folded"))
    tokens, hook = draw_tokens(2), name_site(0, "resid_post")
    a, b = (capture(model, tokens, [hook]) for model in (raw, folded))
    assert relative_error(b.loss, a.loss) < 1e-5
    centred = a.acts[hook] - a.acts[hook].mean(-1, keepdim=True)
    assert relative_error(b.acts[hook], centred) < 1e-5
    assert relative_error(b.acts[hook], a.acts[hook]) > 0.05
    assert relative_error(b.grads[hook], a.grads[hook]) < 1e-4
    weight = folded.unembedding.weight
    assert weight.mean(0).abs().max() < 1e-6
    assert (folded.bridge.blocks[0].ln1.weight == 1).all()


# What is wrong, the message's words.
BAD_CALLS = [
    ({"hooks": ["blocks.9.hook_resid_post"]}, ModelError, "blocks.0.hook_resid_post"),
    ({"hooks": ["blocks.1.hook_nonsense"]}, ModelError, "blocks.1.hook_resid_mid"),
    ({"hooks": ["blocks.1.attn.hook_pattern"]}, ModelError, "width at blocks.1.attn.hook_pattern"),
    ({"hooks": ["blocks.1.mlp.hook_post"]}, ModelError, r"\[2, 12, 64\]"),
    ({"tokens": torch.full((1, CONTEXT + 1), VOCAB)}, CaptureError, "expected 0 to 63"),
    ({"tokens": torch.full((1, CONTEXT + 1), -1)}, CaptureError, "expected 0 to 63"),
    ({"tokens": torch.zeros(1, 40, dtype=torch.int64)}, CaptureError, "expected 1 to 12 .* got 39"),
    ({"tokens": torch.zeros(1, 1, dtype=torch.int64)}, CaptureError, "got 0"),
    (
        {"lengths": torch.tensor([3, CONTEXT + 1])},
        CaptureError,
        "expected 0 to 12 rows, got 3 to 13",
    ),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD_CALLS)
def test_bad_calls_are_refused(gpt2, changes, error, words):
    call = {"tokens": draw_tokens(2), "hooks": [name_site(1, "resid_post")], **changes}
    with pytest.raises(error, match=words) as caught:
        capture(gpt2, call.pop("tokens"), call.pop("hooks"), **call)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_named(gpt2):
    hook, tokens = name_site(1, "resid_post"), draw_tokens(2)
    weight = gpt2.unembedding.weight.clone()
    weight[0, 0] = torch.nan
    broken = gpt2._replace(unembedding=Unembedding(weight, None))
    with pytest.raises(CaptureError, match=r"loss at the head, block 0 .*, position 0: .* NaN"):
        capture(broken, tokens, [hook])

    def spoil(value, **_):
        value = value.clone()
        value[1, 5, 3] = torch.inf
        return value

    with (
        gpt2.bridge.hooks(fwd_hooks=[(name_site(1, "mlp_out"), spoil)]),
        pytest.raises(CaptureError, match=f"activation at {hook}, block 1 .*, position 5"),
    ):
        capture(gpt2, tokens, [hook])


def test_a_gradient_that_is_zero_everywhere_is_refused(gpt2):
    blind = gpt2._replace(unembedding=Unembedding(torch.zeros_like(gpt2.unembedding.weight), None))
    with pytest.raises(CaptureError, match=r"gradient at blocks\.1\.hook_resid_post.*got 0"):
        capture(blind, draw_tokens(2), [name_site(1, "resid_post")])


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7, 100])
def test_row_losses_equal_autograd_whatever_the_chunk(rows_per_chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 5), (11, 5), (11,))
    )
    targets = torch.randint(11, (7,), generator=generator)
    leaf = hidden.clone().requires_grad_()
    loss = cross_entropy(leaf @ weight.T + bias, targets, reduction="none")
    (grads,) = torch.autograd.grad(loss.sum(), leaf)
    unembedding = Unembedding(weight, bias)
    chunk_bytes = 4 * 11 * rows_per_chunk
    got = row_losses(hidden, targets, unembedding, with_grads=True, chunk_bytes=chunk_bytes)
    assert got.grads is not None
    assert relative_error(got.loss, loss.detach()) < 1e-13
    assert relative_error(got.grads, grads) < 1e-13
    assert row_losses(hidden, targets, unembedding).grads is None


def test_sixteen_bits_survive_logits_far_from_zero():
    """GPT-2's logits lie near -100; rounding them there would cost tenths of a nat per token."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((64, 32), (100, 32)))
    hidden[:, 0] = 10.0
    weight[:, 0] = -10.0 + 0.1 * weight[:, 0]
    targets = torch.randint(100, (64,), generator=generator)
    exact = row_losses(hidden, targets, Unembedding(weight, None)).loss
    centred = reduce_precision(Unembedding(weight, None), torch.bfloat16)
    plain = Unembedding(weight.bfloat16(), None)
    error, plain_error = (
        (row_losses(hidden, targets, head).loss - exact).abs().mean() for head in (centred, plain)
    )
    assert error < 0.03
    assert error < plain_error / 4
