"""PCA against a singular value decomposition of all rows at once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.baselines import fit_pca, read_rows, reconstruct_pca
from pipeline.errors import PipelineError
from tests.store.small_store import HOOK, PADDED, make_spec, write_store


@pytest.fixture(scope="module")
def acts() -> Tensor:
    """Correlated rows whose mean is a hundred times their spread."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(10, 10, generator=generator) * torch.linspace(1, 0.1, 10)
    return torch.randn(500, 10, generator=generator) @ mixing.T + 300 * torch.randn(
        10, generator=generator
    )


@pytest.mark.parametrize("sizes", [(500,), (1, 99, 400)])
@pytest.mark.parametrize("k", [1, 4, 9, 10, 32])
def test_reconstruction_equals_the_decomposition_s(acts, sizes, k):
    pca = fit_pca(acts.split(list(sizes)))
    rows = acts.double().numpy()
    mean = rows.mean(0)
    u, s, vt = np.linalg.svd(rows - mean, full_matrices=False)
    expected = mean + (u[:, :k] * s[:k]) @ vt[:k]
    got = reconstruct_pca(pca, acts, k=k)
    np.testing.assert_allclose(got, expected, atol=3e-3)
    assert pca.n_rows == 500
    np.testing.assert_allclose(pca.variances, s**2 / 500, rtol=1e-3, atol=1e-4)
    if k < 10:
        assert np.abs(expected - rows).max() > 0.05


def test_no_linear_code_of_equal_k_is_better(acts):
    pca = fit_pca([acts])
    best = (reconstruct_pca(pca, acts, k=3) - acts).square().sum()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        nudged, _ = torch.linalg.qr(
            pca.components[:, :3] + 0.1 * torch.randn(10, 3, generator=generator)
        )
        centred = acts - pca.mean
        assert (centred @ nudged @ nudged.T - centred).square().sum() > best


def test_batches_without_rows_change_nothing(acts):
    none = acts[:0]
    with_none, without = fit_pca([none, acts[:100], none, acts[100:]]), fit_pca(acts.split(100))
    torch.testing.assert_close(
        with_none.components.abs(), without.components.abs(), atol=1e-3, rtol=1e-3
    )
    with pytest.raises(PipelineError, match="expected some, got none"):
        fit_pca([none])


@pytest.mark.parametrize("exclude", [(), (0, 2)])
@pytest.mark.parametrize("max_rows", [10**6, 40, 3])
def test_rows_come_from_every_shard_without_the_positions_left_out(tmp_path, exclude, max_rows):
    opened = write_store(tmp_path / "store", make_spec(PADDED))
    got = torch.cat(list(read_rows(opened, HOOK, exclude_positions=exclude, max_rows=max_rows)))

    per_shard, left, expected = -(-max_rows // len(opened.shards)), max_rows, []
    for shard in opened.shards:
        n = min(per_shard, shard.n_rows, left)
        left -= n
        rows = opened.read_slots(shard.index, 0, shard.n_rows, HOOK)
        expected += [
            rows.acts[slot] for slot in range(n) if int(rows.position[slot]) not in exclude
        ]
    assert torch.equal(got, torch.stack(expected))
    assert len(got) <= max_rows
    if max_rows == 10**6:
        kept = sum(length - sum(p < length for p in exclude) for length in PADDED.tolist())
        assert len(got) == kept


def test_rows_in_pieces_are_the_same_rows(tmp_path, monkeypatch):
    opened = write_store(tmp_path / "store", make_spec(PADDED))
    whole = torch.cat(list(read_rows(opened, HOOK)))
    monkeypatch.setattr("pipeline.baselines._ROWS_AT_ONCE", 5)
    pieces = list(read_rows(opened, HOOK))
    assert torch.equal(torch.cat(pieces), whole)
    assert max(map(len, pieces)) == 5
