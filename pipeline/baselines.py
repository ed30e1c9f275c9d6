"""What an SAE is compared with: the best linear code of as many numbers per row.

PCA keeps the same k directions for every row, each with any sign; a k-sparse SAE chooses its k of
d_sae anew for each row.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import PipelineError
from store.reader import ActivationStore

MAX_ROWS = 2**18  # of the store, that a baseline is fitted on; at d_model 768 about 3 s of products
_ROWS_AT_ONCE = 4096


class LinearPCA(NamedTuple):
    """Principal components of activations."""

    mean: Float[Tensor, " d_model"]
    components: Float[Tensor, "d_model n"]  # orthonormal columns, by falling variance
    variances: Float[Tensor, " n"]  # of the rows along each
    n_rows: int  # that it was fitted on


def fit_pca(batches: Iterable[Float[Tensor, "_ d_model"]]) -> LinearPCA:
    """Eigenvectors of the rows' covariance (Jolliffe 2002, chapter 1), from one pass over them.

        C = 1/n Σ (x - m)(x - m)^T = 1/n Σ (x - x0)(x - x0)^T - (m - x0)(m - x0)^T

    x0 is the first batch's mean: centred there, products in the batches' own precision lose nothing
    to a large mean. Sums are in float64. Raises PipelineError if there is no row.
    """
    n_rows, origin = 0, torch.empty(0)
    total = outer = torch.zeros((), dtype=torch.float64)
    for acts in batches:
        if not n_rows:
            origin = acts.mean(dim=0)
        centred = acts - origin
        total = total + centred.sum(dim=0, dtype=torch.float64).cpu()
        outer = outer + (centred.T @ centred).double().cpu()
        n_rows += len(acts)
    if not n_rows:
        raise PipelineError(
            "rows to fit PCA on: expected some, got none. Cache activations with `pipeline cache`."
        )
    shift = total / n_rows
    variances, components = torch.linalg.eigh(outer / n_rows - shift.outer(shift))
    return LinearPCA(
        mean=origin + shift.to(origin),
        components=components.flip(1).to(origin),
        variances=variances.flip(0).clamp_min(0).to(origin),
        n_rows=n_rows,
    )


def reconstruct_pca(
    pca: LinearPCA, acts: Float[Tensor, "batch d_model"], *, k: int
) -> Float[Tensor, "batch d_model"]:
    """x̂ = m + V V^T (x - m), V the first k components; all there are where k is larger."""
    kept = pca.components[:, :k].to(acts)
    mean = pca.mean.to(acts)
    return mean + (acts - mean) @ kept @ kept.T


def read_rows(
    store: ActivationStore,
    hook: str,
    *,
    exclude_positions: Sequence[int] = (),
    max_rows: int = MAX_ROWS,
) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Activations of at most max_rows rows, as many from each present shard, in stored order.

    A shard's rows are shuffled, so that its first ones are a sample of it. Rows at
    exclude_positions count among max_rows but are left out.
    """
    per_shard = -(-max_rows // len(store.present))
    left_out = torch.tensor(list(exclude_positions), dtype=torch.int64)
    for shard in store.present:
        n_rows = min(per_shard, store.shards[shard].n_rows, max_rows)
        max_rows -= n_rows
        for start in range(0, n_rows, _ROWS_AT_ONCE):
            rows = store.read_slots(shard, start, min(start + _ROWS_AT_ONCE, n_rows), hook)
            yield rows.acts[~torch.isin(rows.position.long(), left_out)]
