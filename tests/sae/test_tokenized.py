"""Tokenized against TopK and a table kept by a plain loop."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError, TrainError
from pipeline.sae import TopKSAE, init_weights, load_sae, save_sae, start_learning, take_step
from pipeline.sae.group import Group
from pipeline.sae.tokenized import MIN_STEP, TokenizedSAE

N_TOKENS = 9


def make_pair(scale: float = 0.5) -> tuple[TokenizedSAE, TopKSAE]:
    """A tokenized SAE with a random table, and the TopK SAE that it is without."""
    settings = {"d_model": 6, "d_sae": 20, "k": 3, "beta": 3.0, "loss_tokens": 2}
    sae, plain = TokenizedSAE(n_tokens=N_TOKENS, **settings).double(), TopKSAE(**settings).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, other in zip(sae.parameters(), plain.parameters(), strict=True):
            own.copy_(torch.randn(own.shape, generator=generator))
            other.copy_(own)
        sae.input_scale.fill_(scale)
        plain.input_scale.fill_(scale)
        sae.lookup.copy_(torch.randn(sae.lookup.shape, generator=generator))
    return sae, plain


def draw(n: int = 40, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    acts, grads = torch.randn(2, n, 6, generator=generator).double()
    return acts * 3, grads, torch.randint(0, N_TOKENS - 1, (n,), generator=generator)


@pytest.mark.parametrize("steered", [True, False])
def test_values_and_gradients_are_topk_s_beside_the_table(steered: bool) -> None:
    (sae, plain), (acts, grads, tokens) = make_pair(), draw()
    weights = grads if steered else None

    passed = sae.train_forward(acts, weights, tokens)
    expected = plain(acts, weights)
    recon = torch.stack([expected.recon[i] + sae.lookup[t] / 0.5 for i, t in enumerate(tokens)])

    assert torch.equal(passed.latents.indices, expected.latents.indices)
    torch.testing.assert_close(passed.recon, recon)
    torch.testing.assert_close(sae(acts, weights, tokens).recon, recon)
    got = torch.autograd.grad((passed.recon - acts).square().sum(), list(sae.parameters()))
    dense = torch.autograd.grad((recon - acts).square().sum(), list(plain.parameters()))
    for a, b in zip(got, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def move_slowly(table: Tensor, seen: list[int], errors: Tensor, tokens: Tensor) -> Tensor:
    """T after a batch; `seen` counts its batches."""
    table = table.clone()
    for token in range(N_TOKENS):
        rows = [row for row, t in enumerate(tokens.tolist()) if t == token]
        if rows:
            seen[token] += 1
            step = max(1 / seen[token], MIN_STEP)
            table[token] += step * torch.stack([errors[row] for row in rows]).mean(dim=0)
    return table


def test_the_table_moves_as_stated_and_no_other_row_of_it() -> None:
    sae, _ = make_pair()
    seen = [0] * N_TOKENS
    for step in range(4):
        acts, grads, tokens = draw(seed=step)
        recon = sae.train_forward(acts, grads, tokens).recon
        expected = move_slowly(sae.lookup, seen, (acts - recon).detach() * 0.5, tokens)
        untouched = sae.lookup[N_TOKENS - 1].clone()
        sae.after_step(3.0)
        torch.testing.assert_close(sae.lookup, expected)
        assert torch.equal(sae.lookup[N_TOKENS - 1], untouched)
    assert sae.n_batches.tolist() == seen


def test_the_first_step_is_the_whole_way_down_and_later_ones_do_not_go_up() -> None:
    sae, _ = make_pair()
    acts, grads, tokens = draw()

    def measure() -> float:
        return (sae(acts, grads, tokens).recon - acts).square().sum().item()

    errors = [measure()]
    for _ in range(3):
        sae.train_forward(acts, grads, tokens)
        sae.after_step(3.0)
        errors.append(measure())
    assert errors[1] < 0.95 * errors[0]
    assert errors[2:] == pytest.approx([errors[1]] * 2)
    left = (acts - sae(acts, grads, tokens).recon).detach()
    for token in tokens.unique():
        torch.testing.assert_close(left[tokens == token].mean(dim=0), torch.zeros(6).double())


def test_a_token_often_seen_still_moves_by_the_least_step() -> None:
    sae, _ = make_pair()
    acts, _, _ = draw(1)
    tokens = torch.tensor([2])
    sae.n_batches[2] = 10_000
    error = (acts - sae.train_forward(acts, None, tokens).recon).detach()[0] * 0.5
    before = sae.lookup[2].clone()
    sae.after_step(3.0)
    torch.testing.assert_close(sae.lookup[2] - before, MIN_STEP * error)


class OtherHalf(Group):
    """The first of two processes; what the second would send is known."""

    world_size = 2

    def __init__(self, *sent: Tensor) -> None:
        self.sent = list(sent)

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, self.sent.pop(0)])


def test_several_processes_move_the_table_as_one() -> None:
    (whole, _), (half, _) = make_pair(), make_pair()
    acts, grads, tokens = draw()
    recon = whole.train_forward(acts, grads, tokens).recon.detach()
    whole.after_step(3.0)

    half.group = OtherHalf(tokens[15:], (acts - recon)[15:] * 0.5)
    half.train_forward(acts[:15], grads[:15], tokens[:15])
    half.after_step(3.0)

    torch.testing.assert_close(half.lookup, whole.lookup)
    assert torch.equal(half.n_batches, whole.n_batches)


def test_encoding_needs_no_tokens_and_decoding_says_what_it_lacks() -> None:
    (sae, _), (acts, grads, tokens) = make_pair(), draw()
    latents = sae.encode(acts, grads)
    assert torch.equal(latents.values, sae.encode(acts, grads, tokens).values)
    for run in (lambda: sae.decode(latents), lambda: sae(acts), lambda: sae.train_forward(acts)):
        with pytest.raises(TrainError, match=r"TokenizedSAE: expected the token ids .*, got none"):
            run()


def test_the_optimizer_holds_no_table_and_the_file_does(tmp_path: Path) -> None:
    sae = TokenizedSAE(n_tokens=N_TOKENS, d_model=6, d_sae=20, k=3)
    acts, _, tokens = draw(200)
    acts, tokens = acts.float(), tokens.clone()
    init_weights(sae, acts, seed=0, scale_input=True)
    learner = start_learning(sae)
    for _ in range(3):
        take_step(learner, acts, None, tokens, lr=1e-3)

    held = [p for group in learner.optimizer.param_groups for p in group["params"]]
    assert max(len(p) for p in held) == 20
    assert sae.lookup.abs().max() > 0
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.n_tokens == N_TOKENS  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(loaded(acts, None, tokens).recon, sae(acts, None, tokens).recon)
    init_weights(sae, acts, seed=0, scale_input=True)
    assert not sae.lookup.any()
    assert not sae.n_batches.any()


def test_a_token_beyond_the_table_adds_nothing_and_is_not_trained_on() -> None:
    (sae, plain), (acts, grads, _) = make_pair(), draw(3)
    tokens = torch.tensor([N_TOKENS, 2, -1])

    recon, expected = sae(acts, grads, tokens).recon, plain(acts, grads).recon
    expected[1] += sae.lookup[2] / 0.5
    torch.testing.assert_close(recon, expected)
    with pytest.raises(TrainError, match=f"below n_tokens = {N_TOKENS}, got -1 to {N_TOKENS}"):
        sae.train_forward(acts, grads, tokens)


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="n_tokens at TokenizedSAE: expected a positive"):
        TokenizedSAE(n_tokens=0, d_model=6, d_sae=20, k=3)
