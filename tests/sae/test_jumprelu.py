import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.sae import ARCHITECTURES
from tests.sae.steered import (
    BANDWIDTH,
    clone_parameters,
    compare,
    differentiate_training,
    draw,
    make_random,
    recover,
)


def run_slowly(
    p: dict[str, Tensor], acts: Tensor, *, s: float
) -> tuple[Tensor, Tensor, float, dict[str, Tensor]]:
    """y, x̂, the penalty 0.4 e + e² for k = 3 and all gradients, by hand, one latent of one row at
    a time."""
    p = {name: tensor.detach() for name, tensor in p.items()}
    grads = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    latents = torch.zeros(len(acts), len(p["W_dec"]), dtype=torch.float64)
    recons, n = [], len(acts)
    theta = [float(t) for t in p["log_threshold"].exp()]
    z = [
        [
            float((s * row - p["b_dec"]) @ p["W_enc"][:, i] + p["b_enc"][i])
            for i in range(len(theta))
        ]
        for row in acts
    ]
    excess = (
        sum(z_i > theta_i for zs in z for z_i, theta_i in zip(zs, theta, strict=True)) / n / 3 - 1
    )
    for r, row in enumerate(acts):
        centred = s * row - p["b_dec"]
        recon = p["b_dec"].clone()
        for i in range(latents.shape[1]):
            if z[r][i] > theta[i]:
                latents[r, i] = z[r][i]
                recon += z[r][i] * p["W_dec"][i]
        recons.append(recon / s)

        towards_recon = 2 * (recon / s - row) / s / n  # of the loss, for x̂ s
        grads["b_dec"] += towards_recon
        for i in range(latents.shape[1]):
            towards_y = float(towards_recon @ p["W_dec"][i])
            grads["W_dec"][i] += towards_recon * latents[r, i]
            if z[r][i] > theta[i]:
                grads["b_enc"][i] += towards_y
                grads["W_enc"][:, i] += towards_y * centred
                grads["b_dec"] -= towards_y * p["W_enc"][:, i]
            if -BANDWIDTH / 2 < z[r][i] - theta[i] < BANDWIDTH / 2:
                towards_theta = (
                    -theta[i] / BANDWIDTH * towards_y - (0.4 + 2 * excess) / 3 / BANDWIDTH / n
                )
                grads["log_threshold"][i] += towards_theta * theta[i]
    return latents, torch.stack(recons), 0.4 * excess + excess**2, grads


def test_values_and_gradients_are_those_of_loops_over_rows_and_latents() -> None:
    sae, acts = make_random("jumprelu"), draw()
    latents, recon, penalty, expected = run_slowly(clone_parameters(sae), acts, s=0.7)

    passed, grads = differentiate_training(sae, acts)

    torch.testing.assert_close(passed.latents.values, latents)
    torch.testing.assert_close(passed.recon, recon)
    assert passed.penalty.item() == pytest.approx(penalty)
    torch.testing.assert_close(sae(acts).recon, recon)
    compare(grads, expected)
    assert grads["log_threshold"].count_nonzero() > 6


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_that_is_not_positive_is_refused(bandwidth: float) -> None:
    with pytest.raises(ConfigError, match="bandwidth at JumpReluSAE: expected a positive number"):
        ARCHITECTURES["jumprelu"](d_model=4, d_sae=8, k=2, bandwidth=bandwidth)


def test_it_recovers_known_sparse_features_at_the_l0_wanted() -> None:
    found = recover("jumprelu", n_steps=1000)
    assert found.before < 0.6
    assert found.after >= 0.9
    assert found.l0 == pytest.approx(3, rel=0.05)
