"""One concept's latent (Olmo et al. 2024, Fig. 7): find it, steer with it, see what happens."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
from pipeline.config import Config, EvidenceConfig
from pipeline.errors import ConfigError
from pipeline.evaluate.association import associate, check_tokens, read_direct_map
from pipeline.evaluate.pushes import Sequences, SteeringEffect, look_at_sequences, steer
from pipeline.generate import Generation, generate
from pipeline.subject import Subject, open_own_corpus, open_subject

_PROMPTS = 2  # of reference text, where none is given
_PROMPT_TOKENS = 12


_LARGEST_ALPHA = 1e6  # beyond, float32 sums lose the activation


class Wish(NamedTuple):
    """What to look for; one of the three."""

    token: str | None = None
    latent: int | None = None
    text: str | None = None


class Push(NamedTuple):
    """A latent's direction, and the text that it is added to."""

    subject: Subject
    text: Sequences
    direction: Float[Tensor, " d_model"]  # of norm 1
    associated: Int[Tensor, " n"]  # tokens
    direct: Float[Tensor, " n"]  # (W^T d) of these


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
    evidence = config.evidence
    shown, swept = plan_alphas(evidence, alphas)
    subject = open_subject(config, run_folder, sae_name)
    run, model = subject.run, subject.model
    check_tokens(model, evidence.steering_tokens)
    corpus = open_own_corpus(run, corpus_folder)
    limit = model.facts.context_length or evidence.steering_context
    context = min(evidence.steering_context, limit)
    reference = read_reference(corpus, subject.tokenizer, context=context, seed=0)
    direct = read_direct_map(model)
    firing = _measure(subject, reference.tokens)
    found = find_latent(subject, wish, direct, firing, every=corpus is None)
    tokens = reference.tokens[: evidence.steering_sequences].to(model.device)
    text = look_at_sequences(model, tokens, run.hook, exclude_positions=run.exclude_positions)
    push = aim(subject, text, found.latent, direct, n=evidence.steering_tokens)
    return Steering(
        sae=subject.name,
        latent=found.latent,
        why=found.why,
        score=found.score,
        hook=run.hook,
        fires=firing.frequency[found.latent].item(),
        norm=text.norm,
        reference=f"{len(tokens)} sequences of {tokens.shape[1]} tokens of {reference.source}",
        alpha=shown[-1],
        tokens=list_tokens(push, alpha=shown[-1]),
        effects=sweep(push, alphas=swept),
        texts=continue_prompts(push, reference, generation, shown),
    )


def plan_alphas(
    evidence: EvidenceConfig, given: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """At which alphas text is generated, and at which effects are shown, from small to large."""
    if not all(abs(alpha) <= _LARGEST_ALPHA for alpha in given):  # NaN is not, either
        raise ConfigError(
            f"--alpha: expected numbers from -{_LARGEST_ALPHA:g} to {_LARGEST_ALPHA:g}, got "
            f"{', '.join(map(str, given))}."
        )
    shown = {*given} or {evidence.steering_alpha}
    swept = {*given} or {*evidence.steering_alphas, evidence.steering_alpha}
    return tuple(sorted(shown)), tuple(sorted(swept))


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


def aim(
    subject: Subject,
    text: Sequences,
    latent: int,
    direct: Float[Tensor, "d_model d_vocab"],
    *,
    n: int,
) -> Push:
    """Along a latent's decoder row; raises ConfigError for one of zeros, which has no direction."""
    row = subject.sae.W_dec.detach()[latent].to(direct.device, direct.dtype)
    if not row.any():
        raise ConfigError(
            f"latent {latent} of {subject.name}: expected a decoder row that is not zero, got "
            "zeros. Choose another with --latent."
        )
    direction = row / row.norm()
    associated = associate(direction[None], direct, n)[0]
    return Push(subject, text, direction, associated, direction @ direct[:, associated])


def list_tokens(push: Push, *, alpha: float) -> tuple[TokenEffect, ...]:
    """The associated tokens, each with the change of its own mean probability at alpha."""
    change = _steer(push, push.associated[:, None], alpha).associated
    names = describe_tokens(push.subject.tokenizer, push.associated.tolist())
    columns = zip(names, push.direct.tolist(), change.tolist(), strict=True)
    return tuple(TokenEffect(*column) for column in columns)


def sweep(push: Push, *, alphas: Sequence[float]) -> tuple[Effect, ...]:
    """What `pipeline.evaluate.pushes.steer` says of the latent at each alpha."""
    effects = [_steer(push, push.associated[None], alpha) for alpha in alphas]
    return tuple(
        Effect(alpha, *(column.item() for column in effect))
        for alpha, effect in zip(alphas, effects, strict=True)
    )


def continue_prompts(
    push: Push, reference: Reference, generation: Generation, alphas: Sequence[float]
) -> tuple[Continuation, ...]:
    """Each prompt's continuation before steering and at each alpha."""
    subject = push.subject
    begun = [ids[:_PROMPT_TOKENS].tolist() for ids in reference.tokens[:_PROMPTS]]
    given = [subject.tokenizer.encode(p, add_special_tokens=False) for p in generation.prompts]
    if not all(given):
        raise ConfigError("--prompt: expected at least one token, got none.")
    deltas = torch.stack([alpha * push.text.norm * push.direction for alpha in (0.0, *alphas)])
    texts = []
    for prompt in given or begun:
        shown = subject.tokenizer.decode(prompt)
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


def _steer(push: Push, associated: Int[Tensor, "copies n"], alpha: float) -> SteeringEffect:
    """The same push, once for each row of tokens."""
    return steer(
        push.subject.model,
        push.text,
        push.direction.expand(len(associated), -1),
        associated,
        hook=push.subject.run.hook,
        length=alpha * push.text.norm,
    )


def _measure(subject: Subject, tokens: Int[Tensor, "sequences context"]) -> Firing:
    run = subject.run
    return measure_firing(
        subject.model,
        subject.sae,
        tokens,
        hook=run.hook,
        exclude_positions=run.exclude_positions,
    )
