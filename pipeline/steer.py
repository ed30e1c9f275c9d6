"""One concept's latent (Olmo et al. 2024, Fig. 7): find it, steer with it, see what happens."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.concept import (
    Firing,
    Found,
    Reference,
    describe_tokens,
    encode_text,
    encode_token,
    find_by_text,
    find_by_token,
    measure_firing,
    name_latent,
    read_reference,
)
from pipeline.config import Config
from pipeline.corpus.reader import Corpus, open_corpus
from pipeline.device import pick_device
from pipeline.errors import ConfigError, TrainError
from pipeline.evaluate.association import associate, read_direct_map
from pipeline.evaluate.steering import Sequences, look_at_sequences, steer
from pipeline.generate import Generation, generate
from pipeline.model import (
    LanguageModel,
    hash_weights,
    load_model,
    load_tokenizer,
    locate_checkpoint,
)
from pipeline.runs import Run, read_run
from pipeline.sae import SaeConfig, SparseAutoencoder, load_sae, read_sae_config
from store.identity import diff_identities

_PROMPTS = 2  # of reference text, where none is given
_PROMPT_TOKENS = 12


class Wish(NamedTuple):
    """What to look for; one of the three."""

    token: str | None = None
    latent: int | None = None
    text: str | None = None


class Subject(NamedTuple):
    """One SAE of a run, and the model that it was trained on."""

    run: Run
    name: str
    sae: SparseAutoencoder
    model: LanguageModel
    tokenizer: Any


class TokenEffect(NamedTuple):
    token: str
    direct: float  # (W^T d)_token of the unit direction
    change: float  # of its mean probability


class Effect(NamedTuple):
    alpha: float  # in units of the mean norm
    associated: float
    others: float
    others_absolute: float


class Continuation(NamedTuple):
    prompt: str
    alpha: float  # 0: before
    text: str


class Steering(NamedTuple):
    """All that is shown of a latent."""

    sae: str
    latent: int
    why: str
    score: float | None
    hook: str
    fires: float  # fraction of reference tokens
    norm: float  # mean norm of the activations
    reference: str  # what text that is of, and how much
    alpha: float  # at which the tokens' change was taken
    tokens: tuple[TokenEffect, ...]
    effects: tuple[Effect, ...]
    texts: tuple[Continuation, ...]


def steer_run(
    config: Config,
    wish: Wish,
    generation: Generation,
    *,
    run_folder: Path,
    corpus_folder: Path | None,
    sae_name: str | None = None,
    alphas: Sequence[float] = (),
) -> Steering:
    """Find the latent and steer with it at each of `alphas`; by default at the profile's.

    Text is generated, and the tokens' change taken, at evidence.steering_alpha, or at each of the
    alphas that were given and at the largest of them. Raises ConfigError for a wish that no latent
    meets, TrainError where run, SAE, model or corpus do not belong together.
    """
    if not all(map(math.isfinite, alphas)):
        raise ConfigError(f"--alpha: expected finite numbers, got {', '.join(map(str, alphas))}.")
    evidence = config.evidence
    shown = tuple(sorted(set(alphas))) or (evidence.steering_alpha,)
    swept = tuple(sorted({*alphas} or {*evidence.steering_alphas, evidence.steering_alpha}))
    subject = open_subject(config, run_folder, sae_name)
    corpus = _open_corpus(subject.run, corpus_folder)
    limit = subject.model.facts.context_length or evidence.steering_context
    reference = read_reference(
        corpus, subject.tokenizer, context=min(evidence.steering_context, limit), seed=0
    )
    direct = read_direct_map(subject.model)
    firing = _measure(subject, reference.tokens)
    found = find_latent(subject, wish, direct, firing, every=corpus is None)
    sequences = reference.tokens[: evidence.steering_sequences].to(subject.model.device)
    excluded = subject.run.exclude_positions
    text = look_at_sequences(subject.model, sequences, subject.run.hook, exclude_positions=excluded)
    row = subject.sae.W_dec.detach()[found.latent].to(direct.device, direct.dtype)
    direction = row / row.norm()
    n = evidence.steering_tokens
    return Steering(
        sae=subject.name,
        latent=found.latent,
        why=found.why,
        score=found.score,
        hook=subject.run.hook,
        fires=firing.frequency[found.latent].item(),
        norm=text.norm,
        reference=f"{sequences.shape[0]} sequences of {sequences.shape[1]} tokens of "
        f"{reference.source}",
        alpha=shown[-1],
        tokens=list_tokens(subject, text, direction, direct, n=n, alpha=shown[-1]),
        effects=sweep(subject, text, direction, direct, n=n, alphas=swept),
        texts=continue_prompts(subject, reference, direction * text.norm, generation, shown),
    )


def open_subject(config: Config, folder: Path, wanted: str | None) -> Subject:
    """Load the SAE and its model; raises TrainError for another model, or no such SAE."""
    run = read_run(folder)
    configs = {name: read_sae_config(folder / name) for name in run.members}
    name = choose_sae(configs, wanted, where=folder)
    checkpoint = locate_checkpoint(config.model.name, config.model.revision)
    identity = run.config.get("store_identity") or {}
    found = {
        "weights_hash": hash_weights(checkpoint),
        "weight_processing": config.model.weight_processing,
    }
    if different := diff_identities({key: identity.get(key) for key in found}, found):
        raise TrainError(
            f"model for the SAEs at {folder}: {'; '.join(different)}. Run `pipeline steer` with "
            "the profile or --model that they were trained with."
        )
    device = pick_device(config.run.device)
    model = load_model(checkpoint, weight_processing=config.model.weight_processing, device=device)
    sae = load_sae(folder / name, device=device)
    return Subject(run, name, sae, model, load_tokenizer(checkpoint))


def choose_sae(configs: Mapping[str, SaeConfig], wanted: str | None, *, where: Path) -> str:
    """The SAE that was named; else the first with the highest beta among those that were trained on
    their own gradients, or the first of all. Raises ConfigError, listing what exists.
    """
    if wanted is not None:
        if wanted not in configs:
            raise ConfigError(
                f"--sae {wanted}: expected one of {', '.join(configs)} (at {where}), got none of "
                "them."
            )
        return wanted
    own = [n for n, c in configs.items() if c.training.get("gradient", "full") != "shuffled"]
    return max(own or configs, key=lambda name: configs[name].beta)


def find_latent(
    subject: Subject,
    wish: Wish,
    direct: Float[Tensor, "d_model d_vocab"],
    firing: Firing,
    *,
    every: bool,
) -> Found:
    """The latent wished for. A token's is looked for among those that fire on reference text, or
    among all with `every`.
    """
    if wish.latent is not None:
        return name_latent(wish.latent, subject.sae.d_sae)
    if wish.token is not None:
        token = encode_token(subject.tokenizer, wish.token)
        candidates = firing.frequency > 0
        if every or not candidates.any():
            candidates = torch.ones_like(candidates)
        return find_by_token(subject.sae.W_dec, direct, token, candidates)
    assert wish.text is not None
    tokens = encode_text(
        subject.tokenizer,
        wish.text,
        context=subject.model.facts.context_length,
        exclude_positions=subject.run.exclude_positions,
    )
    return find_by_text(_measure(subject, tokens), firing)


def list_tokens(
    subject: Subject, text: Sequences, direction: Tensor, direct: Tensor, *, n: int, alpha: float
) -> tuple[TokenEffect, ...]:
    """The n associated tokens of a unit direction, each with the change of its own mean probability
    at alpha.
    """
    ids = associate(direction[None], direct, n)[0]
    pushed = steer(
        subject.model,
        text,
        direction.expand(n, -1),
        ids[:, None],
        hook=subject.run.hook,
        length=alpha * text.norm,
    )
    values = direction @ direct[:, ids]
    names = describe_tokens(subject.tokenizer, ids.tolist())
    columns = zip(names, values.tolist(), pushed.associated.tolist(), strict=True)
    return tuple(TokenEffect(*column) for column in columns)


def sweep(
    subject: Subject,
    text: Sequences,
    direction: Tensor,
    direct: Tensor,
    *,
    n: int,
    alphas: Sequence[float],
) -> tuple[Effect, ...]:
    """What `pipeline.evaluate.steering.steer` says of the latent at each alpha."""
    ids = associate(direction[None], direct, n)
    effects = []
    for alpha in alphas:
        effect = steer(
            subject.model,
            text,
            direction[None],
            ids,
            hook=subject.run.hook,
            length=alpha * text.norm,
        )
        effects.append(Effect(alpha, *(column.item() for column in effect)))
    return tuple(effects)


def continue_prompts(
    subject: Subject,
    reference: Reference,
    push: Float[Tensor, " d_model"],
    generation: Generation,
    alphas: Sequence[float],
) -> tuple[Continuation, ...]:
    """Each prompt's continuation before steering and at each alpha; `push` is that of alpha 1."""
    begun = [ids[:_PROMPT_TOKENS].tolist() for ids in reference.tokens[:_PROMPTS]]
    given = [subject.tokenizer.encode(p, add_special_tokens=False) for p in generation.prompts]
    if not all(given):
        raise ConfigError("--prompt: expected at least one token, got none.")
    texts = []
    for prompt in given or begun:
        shown = subject.tokenizer.decode(prompt)
        deltas = torch.stack([alpha * push for alpha in (0.0, *alphas)])
        continued = generate(
            subject.model,
            prompt,
            deltas,
            hook=subject.run.hook,
            exclude_positions=subject.run.exclude_positions,
            how=generation,
        )
        for alpha, ids in zip((0.0, *alphas), continued, strict=True):
            texts.append(Continuation(shown, alpha, subject.tokenizer.decode(ids)))
    return tuple(texts)


def _measure(subject: Subject, tokens: Int[Tensor, "sequences context"]) -> Firing:
    run = subject.run
    return measure_firing(
        subject.model,
        subject.sae,
        tokens,
        hook=run.hook,
        exclude_positions=run.exclude_positions,
    )


def _open_corpus(run: Run, folder: Path | None) -> Corpus | None:
    """The corpus, checked to be the one that the SAEs were trained on; None without a folder."""
    if folder is None:
        return None
    corpus = open_corpus(folder)
    wanted = (run.config.get("store_identity") or {}).get("corpus")
    if corpus.manifest.fingerprint != wanted:
        raise TrainError(
            f"corpus at {folder}: expected the one that the SAEs at {run.folder} were trained on "
            f"({str(wanted)[:16]}), got {corpus.manifest.fingerprint[:16]}. Name theirs with "
            "--corpus."
        )
    return corpus
