"""Which latent stands for a concept: one that raises a token, or one that fires on a text.

Latents are compared on reference text: held-out blocks where there is a corpus, else a few built-in
sentences.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.corpus.reader import Corpus
from pipeline.errors import ConfigError
from pipeline.evaluate.activity import list_fired
from pipeline.evaluate.steering import draw_sequences
from pipeline.model import LanguageModel, final_hidden
from pipeline.sae import SparseAutoencoder

_SEQUENCES = 64  # of reference text
_AT_ONCE = 16  # sequences in a model batch
_BUILT_IN_CONTEXT = 32
_BUILT_IN = (
    "The first thing that she saw in the morning was the sea, and the boats that came back to the "
    "harbour with the tide. Nobody in the town could say how old the lighthouse was.\n"
    "def read_lines(path, limit=None):\n    with open(path) as file:\n        lines = file.read()."
    "split('\\n')\n    return lines if limit is None else lines[:limit]\n"
    "In 1969 the government of the country raised its taxes, and the price of bread doubled within "
    "a year. What would happen next was a question for the courts.\n"
)


class Reference(NamedTuple):
    """Text on which all latents are compared."""

    tokens: Int[Tensor, "sequences context"]
    source: str  # "held-out text" or "built-in text"


class Firing(NamedTuple):
    """What the latents of an SAE do on some text."""

    mean: Float[
        Tensor, " d_sae"
    ]  # mean activation over rows, 0 where it does not fire; SAE's units
    frequency: Float[Tensor, " d_sae"]  # fraction of rows on which it fires


class Found(NamedTuple):
    """A latent, and why it was chosen."""

    latent: int
    score: float | None  # None for a latent that was named
    why: str  # a sentence without its full stop


def read_reference(corpus: Corpus | None, tokenizer: Any, *, context: int, seed: int) -> Reference:
    """Up to 64 sequences of `context` tokens from random held-out blocks; of built-in text, at most
    32 tokens long, where there is no corpus. Raises CorpusError if no block is that long.
    """
    if corpus is not None:
        long_enough = int((corpus.lengths("held_out") >= context).sum())
        n = min(_SEQUENCES, max(long_enough, 1))
        return Reference(draw_sequences(corpus, n, context, seed=seed), "held-out text")
    tokens = torch.tensor(tokenizer.encode(_BUILT_IN, add_special_tokens=False))
    context = min(context, _BUILT_IN_CONTEXT)
    n = len(tokens) // context
    return Reference(tokens[: n * context].view(n, context), "built-in text")


@torch.no_grad()
def measure_firing(
    model: LanguageModel,
    sae: SparseAutoencoder,
    tokens: Int[Tensor, "sequences context"],
    *,
    hook: str,
    exclude_positions: Sequence[int],
) -> Firing:
    """What fires on whole sequences, without the gradient, at positions that training did not leave
    out.
    """
    counts, sums = torch.zeros(2, sae.d_sae, dtype=torch.float64)
    n_rows = 0
    for some in tokens.to(model.device).split(_AT_ONCE):
        kept: list[Tensor] = []
        final_hidden(model.bridge, some, [(hook, lambda value, hook: kept.append(value))])  # noqa: ARG005, B023
        counted = _counted(some.shape[1], exclude_positions).to(model.device)
        acts = kept[0][:, counted].flatten(0, 1).float()
        latents = sae.encode(acts, None, some[:, counted].flatten())
        fired = list_fired(latents)[1].cpu()
        values = latents.values[latents.values > 0].double().cpu()
        counts += torch.bincount(fired, minlength=sae.d_sae)
        sums += torch.bincount(fired, values, minlength=sae.d_sae)
        n_rows += len(acts)
    return Firing(sums / max(n_rows, 1), counts / max(n_rows, 1))


def find_by_token(
    W_dec: Float[Tensor, "d_sae d_model"],
    direct: Float[Tensor, "d_model d_vocab"],
    token: int,
    candidates: Bool[Tensor, " d_sae"],
) -> Found:
    """The candidate whose direction raises the token most, compared with what it does to others.

        score_i = (W^T d_i)_token / (standard deviation over v of (W^T d_i)_v)

    W is `read_direct_map`'s, whose logits have mean 0 over the vocabulary; the length of d_i does
    not matter.
    """
    direct = direct.cpu()
    rows = W_dec.detach().cpu().to(direct.dtype)
    # The variance over the vocabulary without the d_sae x d_vocab logits.
    spread = torch.einsum("id,de,ie->i", rows, direct @ direct.T / direct.shape[1], rows).sqrt()
    scores = (rows @ direct[:, token] / spread).nan_to_num(-torch.inf)
    scores[~candidates] = -torch.inf
    latent = int(scores.argmax())
    logits = rows[latent] @ direct
    rank = int((logits > logits[token]).sum()) + 1
    score = scores[latent].item()
    return Found(
        latent, score, f"raises that token by {score:.1f} standard deviations (its rank: {rank})"
    )


def find_by_text(on_text: Firing, elsewhere: Firing) -> Found:
    """The latent that fires most on a text, compared with how it fires elsewhere.

        score_i = a_i / max(b_i + mean over j of b_j, eps)

    a and b are mean activations on the text and on reference text; the mean over all latents keeps
    those that barely fire at all from winning by that, and eps, float64's, is for reference text on
    which none fires. Raises ConfigError if none fires on the text.
    """
    usual = elsewhere.mean + elsewhere.mean.mean()
    scores = on_text.mean / usual.clamp(min=torch.finfo(usual.dtype).eps)
    if not scores.any():
        raise ConfigError(
            "--text: expected text on which a latent fires, got none that does. Give a longer one."
        )
    latent = int(scores.argmax())
    why = (
        f"fires with {on_text.mean[latent]:.3g} on the mean of the text's tokens, "
        f"{elsewhere.mean[latent]:.3g} elsewhere"
    )
    return Found(latent, scores[latent].item(), why)


def name_latent(latent: int, d_sae: int) -> Found:
    """A latent by its number; raises ConfigError beyond the last."""
    if not 0 <= latent < d_sae:
        raise ConfigError(f"--latent: expected 0 to {d_sae - 1}, got {latent}.")
    return Found(latent, None, "was named")


def encode_token(tokenizer: Any, text: str) -> int:
    """The id of text that is one token; raises ConfigError naming its pieces otherwise."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.unk_token_id
    if len(ids) == 1 and (ids[0] != unknown or text == tokenizer.unk_token):
        return ids[0]
    pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "none"
    raise ConfigError(
        f"--token {text!r}: expected one token of the model's, got {len(ids)}: {pieces}. Give one "
        "of them (a leading space belongs to a token), or use --text."
    )


def encode_text(
    tokenizer: Any, text: str, *, context: int | None, exclude_positions: Sequence[int]
) -> Int[Tensor, "one tokens"]:
    """A text's tokens, cut at the model's context; raises ConfigError if no position is left."""
    ids = tokenizer.encode(text, add_special_tokens=False)[:context]
    if not _counted(len(ids), exclude_positions).any():
        raise ConfigError(
            f"--text {text!r:.40}: expected tokens beyond the positions that training left out "
            f"({', '.join(map(str, exclude_positions))}), got {len(ids)} tokens. Give a longer one."
        )
    return torch.tensor([ids])


def describe_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as its text."""
    return [tokenizer.decode([i]) for i in ids]


def _counted(n: int, exclude_positions: Sequence[int]) -> Bool[Tensor, " n"]:
    return ~torch.isin(torch.arange(n), torch.tensor([*exclude_positions]))
