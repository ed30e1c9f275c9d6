"""Where training starts; see test_topk.py for init_weights itself."""

import pytest
import torch
from torch import Tensor

from pipeline.errors import TrainError
from pipeline.sae import TopKSAE, init_weights
from pipeline.sae.init import find_geometric_median


def find_slowly(points: Tensor) -> Tensor:
    """Descend the summed distance by its definition, with ever shorter steps."""
    median, best = points.mean(dim=0), torch.tensor(torch.inf)
    found = median
    for step in range(4000):
        offsets = median - points
        distances = offsets.norm(dim=1, keepdim=True)
        if distances.sum() < best:
            best, found = distances.sum(), median
        direction = (offsets / distances.clamp_min(1e-12)).sum(dim=0)
        median = median - 0.997**step * direction / direction.norm().clamp_min(1e-12)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_geometric_median_is_the_point_of_the_smallest_summed_distance(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(30, 3, generator=generator).double()
    points[:5] *= 50  # outliers, which the mean follows

    median = find_geometric_median(points)

    torch.testing.assert_close(median, find_slowly(points), rtol=0, atol=1e-3)
    assert (median - points.mean(dim=0)).norm() > 0.5


# points -> their median
KNOWN = [
    # on a line: the middle one
    ([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]], [1.0, 0.0]),
    # the corners of a square, whatever order they come in
    ([[0.0, 0.0], [2.0, 2.0], [2.0, 0.0], [0.0, 2.0]], [1.0, 1.0]),
    # a point that more than half of the points share
    ([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [50.0, 0.0], [-7.0, 9.0]], [3.0, 1.0]),
    # the iteration starts at the mean, 0, which is a point but not the median
    ([[0.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]], [-1.0, 0.0]),
    # one point, and several that are one
    ([[4.0, -2.0]], [4.0, -2.0]),
    ([[4.0, -2.0], [4.0, -2.0], [4.0, -2.0]], [4.0, -2.0]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("points", "median"), KNOWN)
def test_known_geometric_medians(
    points: list[list[float]], median: list[float], dtype: torch.dtype
) -> None:
    found = find_geometric_median(torch.tensor(points, dtype=dtype), n_iterations=1000)
    torch.testing.assert_close(found, torch.tensor(median, dtype=dtype), rtol=0, atol=1e-3)


def test_b_dec_starts_where_it_is_told() -> None:
    acts = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 3
    acts[0] *= 100
    sae = TopKSAE(d_model=6, d_sae=20, k=4)
    centres = {
        "mean": acts.mean(dim=0),
        "geometric_median": find_geometric_median(acts),
        "zero": torch.zeros(6),
    }
    for name, centre in centres.items():
        init_weights(sae, acts, seed=0, scale_input=True, b_dec=name)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(sae.b_dec, centre * sae.input_scale)
    assert (centres["mean"] - centres["geometric_median"]).norm() > 5


def test_a_first_batch_of_zeros_has_no_scale() -> None:
    sae = TopKSAE(d_model=6, d_sae=20, k=4)
    with pytest.raises(TrainError, match="rows with a norm to scale, got zeros alone"):
        init_weights(sae, torch.zeros(40, 6), seed=0, scale_input=True)
    init_weights(sae, torch.zeros(40, 6), seed=0, scale_input=False)
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_first_batch_that_is_not_finite_is_refused(bad: float) -> None:
    acts = torch.ones(40, 6).index_fill(0, torch.tensor([3]), bad)
    with pytest.raises(TrainError, match="expected finite rows"):
        init_weights(TopKSAE(d_model=6, d_sae=20, k=4), acts, seed=0, scale_input=False)
