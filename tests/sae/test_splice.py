from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import TrainError
from pipeline.sae import ARCHITECTURES, TopKSAE, init_weights, splice
from tests.checkpoints import save_gpt2

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def sae() -> TopKSAE:
    sae = TopKSAE(d_model=16, d_sae=40, k=4)
    acts = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    init_weights(sae, acts, seed=0, scale_input=True)
    return sae


def test_splice_replaces_each_row_by_its_reconstruction(sae: TopKSAE) -> None:
    acts = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))

    replaced = splice(sae, keep_positions=(0, 3))(acts, None)

    for block in range(3):
        expected = sae(acts[block]).recon
        expected[[0, 3]] = acts[block, [0, 3]]
        torch.testing.assert_close(replaced[block], expected)


def test_splice_gives_back_the_model_s_own_dtype(sae: TopKSAE) -> None:
    acts = torch.randn(1, 5, 16).bfloat16()
    assert splice(sae)(acts, None).dtype == torch.bfloat16


def test_an_sae_that_decodes_with_tokens_gets_each_row_s_own() -> None:
    sae = ARCHITECTURES["tokenized"](d_model=16, d_sae=40, k=4, n_tokens=7)
    generator = torch.Generator().manual_seed(0)
    init_weights(sae, torch.randn(30, 16, generator=generator), seed=0, scale_input=True)
    sae.state_dict()["lookup"].normal_(generator=generator)
    acts = torch.randn(3, 5, 16, generator=generator)
    tokens = torch.randint(7, (3, 5), generator=generator)

    replaced = splice(sae, tokens=tokens, keep_positions=(0,))(acts, None)

    for block in range(3):
        for position in range(5):
            act, token = acts[block, position], tokens[block, position]
            expected = sae(act[None], None, token[None]).recon[0] if position else act
            torch.testing.assert_close(replaced[block, position], expected)
    with pytest.raises(TrainError, match="expected the token ids of the rows, got none"):
        splice(sae)(acts, None)


def test_splice_into_a_transformer_lens_run(sae: TopKSAE, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(save_gpt2(tmp_path / "model")), device="cpu")
    tokens = torch.arange(10).view(1, 10)
    seen: dict[str, Tensor] = {}

    def look(acts: Tensor, hook: object) -> None:  # noqa: ARG001
        seen["acts"] = acts

    with torch.no_grad():
        plain = bridge(tokens)
        spliced = bridge.run_with_hooks(tokens, fwd_hooks=[(HOOK, splice(sae))])
        kept = bridge.run_with_hooks(
            tokens, fwd_hooks=[(HOOK, splice(sae, keep_positions=range(10))), (HOOK, look)]
        )
        recon = splice(sae)(seen["acts"], None)
        patched = bridge.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda _acts, hook: recon)])  # noqa: ARG005

    torch.testing.assert_close(kept, plain)
    torch.testing.assert_close(spliced, patched)
    assert (spliced - plain).abs().max() > 0.1
