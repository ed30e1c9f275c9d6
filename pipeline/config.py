"""One strict, frozen section per stage, read from configs/<profile>.yaml.

Every setting is a key of a profile, and profiles are complete. `load_config` reads one, applies
dotted overrides (`{"train.betas": [0, 1e5]}`) and raises ConfigError naming the key and the file
before any model loads.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from pipeline.errors import ConfigError

# What torch has numbers for: int64, and float32 with room for products.
_MOST, _LARGEST = 2**63 - 1, 1e30
Count = Annotated[int, Field(gt=0, le=_MOST)]
Index = Annotated[int, Field(ge=0, le=_MOST)]
Rate = Annotated[FiniteFloat, Field(gt=0, le=_LARGEST)]
Weight = Annotated[FiniteFloat, Field(ge=0, le=_LARGEST)]
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
OpenFraction = Annotated[FiniteFloat, Field(gt=0, lt=1)]
NumberFormat = Literal["float32", "float16", "bfloat16", "int8"]


def _all_different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected different values, got {list(values)}")
    return values


# YAML gives lists where these want tuples, so strictness holds for their items only.
_Items = Field(strict=False, fail_fast=True)
Different = AfterValidator(_all_different)
Counts = Annotated[tuple[Count, ...], _Items, Field(min_length=1), Different]
Indices = Annotated[tuple[Index, ...], _Items, Different]
Weights = Annotated[tuple[Weight, ...], _Items, Field(min_length=1), Different]
Architecture = Literal[
    "topk", "batch_topk", "relu", "gated", "jumprelu", "tokenized", "switch", "end_to_end"
]
Architectures = Annotated[tuple[Architecture, ...], _Items, Field(min_length=1), Different]
Gradients = Annotated[
    tuple[Literal["cached", "shuffled"], ...], _Items, Field(min_length=1), Different
]
Loggers = Annotated[tuple[Literal["wandb", "tensorboard"], ...], _Items, Different]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys and converts nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelConfig(Section):
    """Which language model."""

    name: str  # "demo", a hub name such as "gpt2", or a folder with a Hugging Face checkpoint
    revision: str | None  # a hub revision; null is the newest
    weight_processing: Literal["raw", "folded"]  # folded: layer norms folded, weights centred


class CorpusConfig(Section):
    """Which text, and how it becomes token blocks."""

    source: str  # "demo", a hub dataset, or a file or folder of .txt, .jsonl or .parquet
    subset: str | None  # the hub dataset's configuration, such as "en"
    split: str  # the hub dataset's split
    column: str  # the column or key with the text, or with token ids where those are integers
    context_length: Count  # rows per block; a block has one token more, its last target
    packing: Literal["packed", "per_document"]  # documents joined, or one cut and padded per block
    prepend_bos: bool  # begin every block with the beginning-of-text token
    train_tokens: Count | None  # stop after this many; null takes all there are
    held_out_tokens: Count | None  # the same for the held-out split
    held_out_fraction: OpenFraction  # of documents, by hash of their id
    max_document_mb: Count  # a longer document is an error, for it would have to fit in memory


class CacheConfig(Section):
    """Which activations and gradients, and in which numbers."""

    hook: str  # resid_pre, resid_mid, resid_post, attn_out, mlp_out, or a TransformerLens hook name
    layers: Annotated[Indices, Field(min_length=1)]  # all from one pass over the model
    loss: Literal["full", "own"]  # whose gradient: of a token's own and all later losses, or own
    acts_dtype: NumberFormat  # float32, float16, bfloat16, or int8 with scales
    grads_dtype: NumberFormat  # the same, for gradients
    compression: Literal["none", "zstd", "blosc"]  # of every chunk; blosc: bit-shuffle, then zstd
    precision: Literal["float32", "bfloat16"]  # of the forward and backward pass
    batch_blocks: Count  # blocks per model batch
    shard_mb: Count  # target size of one shard's activations
    seed: Index  # of the row order inside each shard


class TrainConfig(Section):
    """Which SAEs, and how they train; betas x gradients x ks x d_saes x seeds share one pass."""

    hook: str | None  # which of the store's hooks; null where it has only one
    architectures: Architectures  # all of them, with every beta (if they select), k, d_sae and seed
    betas: Weights  # weight of the gradient in the selection; 0 is TopK
    gradients: Gradients  # cached: each row's own; shuffled: another row's, a control for beta > 0
    ks: Counts  # latents kept per row, or the mean number wanted of an architecture without k
    seeds: Annotated[Indices, Field(min_length=1)]  # of the decoder's start
    d_saes: Counts  # latents
    loss_tokens: Count  # beta / loss_tokens weighs the gradient of the summed loss
    n_experts: Count  # of a switch SAE
    jumprelu_bandwidth: Rate  # in units of the scaled input, for the thresholds' gradient
    aux_weight: Weight  # of the AuxK loss, which revives dead latents; 0 is without
    aux_k: Count | None  # dead latents that AuxK keeps per row; null: d_model / 2
    k_start: Count | None  # k at the first step, falling linearly to k; null: k from the start
    k_anneal_fraction: Fraction  # of the steps, until k is reached
    decoder_norm: Literal["unit", "free"]  # unit: rows of W_dec kept at norm 1
    b_dec_start: Literal["mean", "geometric_median", "zero"]  # of the first batch
    input_scaling: Literal["none", "mean_norm"]  # mean_norm: to a mean row norm of sqrt(d_model)
    precision: Literal["float32", "bfloat16", "auto"]  # of the encoder's products; weights: float32
    batch_size: Count  # rows
    epochs: Count  # passes over the store
    tokens: Count | None  # stop after this many; null is all epochs
    steps: Count | None  # stop after this many; null is all epochs
    lr: Rate  # Adam's
    lr_warmup_fraction: Fraction  # of the steps
    lr_decay_fraction: Fraction  # of the steps, at the end
    lr_decay: Literal["linear", "cosine"]  # shape of that decay
    lr_end_fraction: Fraction  # of lr, one step after the last
    max_grad_norm: Rate | None  # gradients are clipped to it; null: never
    average_decay: OpenFraction | None  # save exponential moving averages; null: last weights
    exclude_positions: Indices  # positions of a block that training leaves out
    window_shards: Count | None  # shards interleaved at once; null: as many as mix 0.9 of i.i.d.
    allow_partial: bool  # train on the shards that are there where others are missing
    shuffle_seed: Index  # of the stream's order
    log_every: Count  # steps between logged rows
    checkpoint_every: Count  # steps between checkpoints, of which the last two are kept
    loggers: Loggers  # wandb, tensorboard; beside DVCLive and Parquet

    @model_validator(mode="after")
    def _agree(self) -> "TrainConfig":
        self._check_sizes()
        if self.tokens is not None and self.steps is not None:
            raise ValueError("steps: expected null where tokens is set, got both")
        if self.lr_warmup_fraction + self.lr_decay_fraction > 1:
            raise ValueError("lr_warmup_fraction + lr_decay_fraction: expected at most 1 together")
        return self

    def _check_sizes(self) -> None:
        """Every k fits every d_sae and, of a switch SAE, every expert."""
        largest, smallest = max(self.ks), min(self.d_saes)
        if largest > smallest:
            raise ValueError(f"ks: expected at most d_sae = {smallest}, got {largest}")
        if self.k_start is not None and not largest <= self.k_start <= smallest:
            raise ValueError(
                f"k_start: expected {largest} (the largest of ks) to d_sae = {smallest}, "
                f"got {self.k_start}"
            )
        if (self.k_start is None) != (self.k_anneal_fraction == 0):
            raise ValueError(
                f"k_start: expected a k where k_anneal_fraction is above 0, else null, "
                f"got {self.k_start} and {self.k_anneal_fraction:g}"
            )
        if "switch" not in self.architectures:
            return
        for d_sae in self.d_saes:
            if d_sae % self.n_experts or largest > d_sae // self.n_experts:
                raise ValueError(
                    f"n_experts: expected a divisor of d_sae = {d_sae} that leaves each expert at "
                    f"least k = {largest} latents, got {self.n_experts}"
                )
        expert = smallest // self.n_experts
        if (self.k_start or 0) > expert:
            raise ValueError(
                f"k_start: expected at most d_sae / n_experts = {expert} for switch, "
                f"got {self.k_start}"
            )


class EvaluateConfig(Section):
    """How much held-out text, in what batches."""

    tokens: Count | None  # null is all that the corpus holds out
    batch_blocks: Count  # blocks per model batch
    loss_tokens: Counts  # beta * |a| / loss_tokens is reported for each


class EvidenceConfig(Section):
    """How much of each of the paper's experiments is repeated; see docs/evidence.md."""

    bootstrap_draws: Count  # resamplings behind each interval
    sensitivity_rows: Index  # held-out rows per layer (Fig. 2); 0 leaves the measurement out
    perturbation_layers: Indices | None  # layers perturbed (Fig. 3); null: all
    perturbation_sizes: Weights  # mean norms, as fractions of the site's mean norm
    perturbation_samples: Index  # perturbed sequences per site, layer and size; 0 leaves it out
    perturbation_context: Count  # tokens of each sequence
    steering_latents: Index  # live latents per SAE (Figs. 5 and 6); 0 leaves it out
    steering_sequences: Count  # sequences that each of them steers
    steering_context: Count  # tokens of each sequence
    steering_tokens: Count  # associated tokens of a latent
    steering_alphas: Weights  # Fig. 5's lengths, in units of the mean norm of the activations
    steering_alpha: Rate  # Fig. 6's, in the same units
    splitting_latents: Index  # latents in each tail and the middle (Table 2); 0 leaves it out
    splitting_blocks: Count  # held-out blocks for their gradients


class RunConfig(Section):
    """Where to run; nothing here decides what is computed."""

    device: str  # "auto", "cpu", "cuda", "cuda:1"
    workers: Index  # dask workers on this machine; 0 runs in this process
    scheduler: str | None  # address of a running dask scheduler
    threads: Count | None  # torch threads of each dask worker; null: cores / workers
    worker_memory_gb: Rate | None  # a worker above it is restarted; null: the memory / workers
    retries: Index  # times that a shard is tried again after the death of its worker
    shard_cache: str | None  # folder for shards of remote stores; null: the user's cache folder
    shard_cache_gb: Rate  # its size is kept below this


class Config(Section):
    """A complete profile."""

    model: ModelConfig
    corpus: CorpusConfig
    cache: CacheConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    evidence: EvidenceConfig
    run: RunConfig


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a profile and apply dotted overrides; raises ConfigError naming the key and the file."""
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ConfigError(f"configuration at {path}: expected sections, got {settings!r:.80}.")
    for key, value in (overrides or {}).items():
        _override(settings, key, value, path)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, path))) from None


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; raises ConfigError if it is not there, not UTF-8 or not plain YAML."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration at {path}: {error}.") from None


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML 1.2, so that `1e5` is a number; tags, aliases and duplicate keys are refused."""
    try:
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(text)):
            raise ConfigError(f"YAML at {where}: expected plain values, got an alias (*name).")
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"YAML at {where}: {reason}") from None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a profile, such as `train.betas`."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _override(settings: dict[str, Any], key: str, value: Any, path: Path) -> None:
    if key not in set(known_keys()):
        raise ConfigError(f"setting {key} for {path}: unknown key.{_suggest(key)}")
    section, name = key.split(".")
    if not isinstance(settings.setdefault(section, {}), dict):
        raise ConfigError(f"configuration at {path}: {section}: expected keys, got a single value.")
    settings[section][name] = value


def _suggest(key: str) -> str:
    close = difflib.get_close_matches(key, list(known_keys()), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else f" Known keys: {', '.join(known_keys())}."


def _explain(error: ValidationError, path: Path) -> Iterator[str]:
    for problem in error.errors():
        if problem["type"] == "too_short" and problem["input"]:
            continue  # pydantic's echo of a bad item, which has its own line
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"configuration at {path}: {key}: unknown key.{_suggest(key)}"
        elif problem["type"] == "missing":
            yield f"configuration at {path}: {key}: missing. A profile lists every key."
        elif problem["type"] == "value_error":  # a check of ours, which says what it got
            dot = "." if len(problem["loc"]) == 1 else ": "  # a section's own names the key itself
            message = problem["msg"].removeprefix("Value error, ")
            yield f"configuration at {path}: {key}{dot}{message}."
        else:
            yield f"configuration at {path}: {key}: {problem['msg']}, got {problem['input']!r:.60}."
