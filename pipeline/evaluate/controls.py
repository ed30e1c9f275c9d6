"""Controls that the paper lacks: what of a g-SAE's gain other things explain.

gradient at inference only   a TopK SAE, trained without the gradient, that selects with it: how
                             much of the gain is the selection seeing the label
random decoder               an SAE as training finds it, never trained
PCA                          the k first principal components of every row
PCA, TopK                    the k components of each row that matter most: a sparse code without
                             learning
"""

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.baselines import LinearPCA, reconstruct_pca
from pipeline.evaluate.faithfulness import MODES
from pipeline.paths import format_number
from pipeline.sae import SparseAutoencoder, TopKSAE, init_weights

Baseline = Callable[[Float[Tensor, "rows d_model"]], Float[Tensor, "rows d_model"]]  # acts → recon

# With a threshold fitted to its own scores, steering would change how many latents fire.
_NOT_K_PER_ROW = ("batch_topk",)


class Control(NamedTuple):
    """What SAEs are compared with."""

    code: SparseAutoencoder | Baseline
    modes: tuple[str, ...]  # in which it is measured; what knows no gradient has one
    facts: dict[str, Any]  # kind, k, d_sae, beta, loss_tokens, of (the SAE it is made from)


def make_controls(
    saes: Mapping[str, SparseAutoencoder],
    *,
    architectures: Mapping[str, str],
    pca: LinearPCA,
    seed: int = 0,
) -> dict[str, Control]:
    """All controls of these SAEs, by name; `architectures` as trained, so that end_to_end is apart.

    Where SAEs of the same k were trained with a gradient, the random decoder and the PCA dictionary
    are also given it, at the largest of their betas.
    """
    controls = _steer_plain(saes, architectures)
    device = next((sae.W_dec.device for sae in saes.values()), pca.mean.device)
    for k, d_sae in sorted({(sae.k, sae.d_sae) for sae in saes.values()}):
        same = [sae for sae in saes.values() if (sae.k, sae.d_sae) == (k, d_sae)]
        random = make_random_sae(pca.mean, d_sae=d_sae, k=k, seed=seed).to(device)
        controls[f"random-k{k}-d{d_sae}"] = _control("random decoder", random, _steer(random, same))
    for k in sorted({sae.k for sae in saes.values()}):
        same = [sae for sae in saes.values() if sae.k == k]
        facts = {"kind": "PCA", "k": k, "d_sae": None, "beta": 0.0, "of": None}
        project = partial(reconstruct_pca, pca, k=k)
        controls[f"pca-k{k}"] = Control(project, MODES[1:], facts | {"fitted_rows": pca.n_rows})
        sparse = make_pca_sae(pca, k=k).to(device)
        controls[f"pca-topk-k{k}"] = _control(
            "PCA, TopK", sparse, _steer(sparse, same), fitted_rows=pca.n_rows
        )
    return controls


def with_beta(sae: SparseAutoencoder, beta: float, loss_tokens: int) -> SparseAutoencoder:
    """The same parameters, shared, selecting with another weight of the gradient."""
    steered = copy(sae)
    steered.beta, steered.loss_tokens = beta, loss_tokens
    return steered


@torch.no_grad()
def make_random_sae(
    mean: Float[Tensor, " d_model"], *, d_sae: int, k: int, seed: int
) -> SparseAutoencoder:
    """A TopK SAE as `init_weights` leaves it: unit random decoder, its transpose as encoder."""
    sae = TopKSAE(d_model=len(mean), d_sae=d_sae, k=k).to(mean.device)
    init_weights(sae, mean[None], seed=seed, scale_input=False)
    return sae


@torch.no_grad()
def make_pca_sae(pca: LinearPCA, *, k: int) -> SparseAutoencoder:
    """A TopK SAE whose 2 d_model latents are the principal components, each with both signs.

        z = [V, -V]^T (x - m)        x̂ = m + sum over the k largest z_i of z_i d_i

    The components being orthonormal, no k of them reconstruct a row better. All of them where k is
    larger than d_model.
    """
    d_model = len(pca.mean)
    sae = TopKSAE(d_model=d_model, d_sae=2 * d_model, k=min(k, d_model)).to(pca.mean.device)
    sae.W_dec.copy_(torch.cat([pca.components.T, -pca.components.T]))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.copy_(pca.mean)
    return sae


def list_controls(controls: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per control and mode, of metrics["controls"]."""
    return [
        {
            "control": name,
            **{key: control[key] for key in ("kind", "of", "k", "d_sae", "beta")},
            "mode": mode,
            "sees_label": mode == MODES[0],
            **control[mode],
        }
        for name, control in controls.items()
        for mode in MODES
        if mode in control
    ]


def _steer_plain(
    saes: Mapping[str, SparseAutoencoder], architectures: Mapping[str, str]
) -> dict[str, Control]:
    """Each selecting SAE of beta 0 with every gradient weight that its like was trained with."""
    controls = {}
    for name, sae in saes.items():
        if not sae.selects or sae.beta or architectures[name] in _NOT_K_PER_ROW:
            continue
        like = [
            (other.beta, other.loss_tokens)
            for other_name, other in saes.items()
            if architectures[other_name] == architectures[name]
            and (other.k, other.d_sae) == (sae.k, sae.d_sae)
            and other.beta
        ]
        for beta, loss_tokens in sorted(set(like)):
            steered = with_beta(sae, beta, loss_tokens)
            apart = f" over {loss_tokens} tokens" if len({b for _, b in like}) > 1 else ""
            controls[f"{name} + gradient at beta {format_number(beta)}{apart}"] = _control(
                "gradient at inference only", sae, steered, of=name
            )
    return controls


def _steer(sae: SparseAutoencoder, like: list[SparseAutoencoder]) -> SparseAutoencoder:
    """With the largest gradient weight among `like`."""
    strongest = max(like, key=lambda other: other.beta_per_token)
    return with_beta(sae, strongest.beta, strongest.loss_tokens)


def _control(
    kind: str,
    plain: SparseAutoencoder,
    steered: SparseAutoencoder,
    *,
    of: str | None = None,
    **facts: Any,
) -> Control:
    """What is made from an SAE is measured with the gradient alone: without, it is that SAE."""
    modes = MODES[:1] if of else MODES if steered.beta else MODES[1:]
    described = {"kind": kind, "k": plain.k, "d_sae": plain.d_sae, "beta": steered.beta, "of": of}
    return Control(steered, modes, described | {"loss_tokens": steered.loss_tokens} | facts)
