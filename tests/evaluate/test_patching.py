"""Patched runs: what they compute, against the definitions, and what they leave out."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, linear

from pipeline.evaluate.held_out import read_held_out
from pipeline.evaluate.patching import Patcher, compare_rows, make_reference
from pipeline.model import Unembedding, load_model
from pipeline.upper import find_lower_blocks
from tests.checkpoints import save_gpt2
from tests.evaluate.few_blocks import CONTEXT, VOCAB, FewBlocks

D_MODEL = 16
HOOK = "blocks.1.hook_resid_post"
LENGTHS = (12, 7, 12, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    return load_model(save_gpt2(folder, n_layers=3, context=CONTEXT, vocab=VOCAB))


@pytest.mark.parametrize("chunk_bytes", [1, 4 * VOCAB * 5, 10**6])
@pytest.mark.parametrize("biased", [False, True])
def test_divergence_from_sums_of_logits_equals_the_definition(chunk_bytes, biased):
    generator = torch.Generator().manual_seed(0)
    weight, hidden, moved = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((VOCAB, D_MODEL), (23, D_MODEL), (23, D_MODEL))
    )
    bias = torch.randn(VOCAB, generator=generator, dtype=torch.float64) if biased else None
    targets = torch.randint(VOCAB, (23,), generator=generator)
    unembedding = Unembedding(weight, bias)
    reference = make_reference(hidden, targets, unembedding, chunk_bytes=chunk_bytes)
    loss, kl = compare_rows(moved, reference, unembedding, chunk_bytes=chunk_bytes)
    log_p, log_q = (linear(h, weight, bias).log_softmax(-1) for h in (hidden, moved))
    expected = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(loss, cross_entropy(log_q, targets, reduction="none"))
    assert kl.min() > 1e-3


@pytest.mark.parametrize(
    ("hook", "n_lower"),
    [
        ("blocks.1.hook_resid_post", 2),
        ("blocks.1.hook_resid_pre", 1),
        ("blocks.1.hook_resid_mid", None),
        ("blocks.1.hook_mlp_out", None),
        ("ln_final.hook_out", None),
    ],
)
def test_which_hooks_need_the_blocks_above_them_alone(hook, n_lower):
    assert find_lower_blocks(hook) == n_lower


def test_only_the_blocks_above_the_hook_run(model):
    read = read_held_out(
        model, FewBlocks(LENGTHS), HOOK, exclude_positions=(0,), n_tokens=None, batch_blocks=4
    )
    batch, patcher, ran = next(iter(read)), Patcher(model, HOOK), []
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(model.bridge.blocks)
    ]
    patcher.patch(batch, patcher.look(batch), batch.acts)
    for handle in handles:
        handle.remove()
    assert ran == [2, 2]
