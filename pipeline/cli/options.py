"""From the command line to a checked configuration: profile, flags and `--set`, in that order."""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click

import pipeline
from pipeline.config import Architecture, Config, load_config, parse_yaml, read_yaml
from pipeline.errors import ConfigError
from pipeline.paths import DefaultPaths, plan_paths


class Flag(NamedTuple):
    """A common setting's own option; every other setting is reached by `--set`."""

    keys: tuple[str, ...]  # the configuration keys that it sets
    type: Any  # bool: an option without a value
    help: str
    repeats: bool = False
    clears: tuple[str, ...] = ()  # keys that it sets to null, where they are not given too


FLAGS = {
    "model": Flag(("model.name",), str, "Language model: demo, a hub name, or a folder."),
    "source": Flag(("corpus.source",), str, "Text: demo, a hub dataset, or a file or folder."),
    "corpus-tokens": Flag(("corpus.train_tokens",), int, "Tokens of the training split."),
    "layer": Flag(("cache.layers",), int, "Layer to cache; repeat for several.", repeats=True),
    "hook": Flag(
        ("cache.hook",), str, "resid_pre|resid_mid|resid_post|attn_out|mlp_out or a hook's name."
    ),
    "loss": Flag(
        ("cache.loss",),
        click.Choice(["full", "own"]),
        "Gradient of a token's own and all later losses, or of its own alone.",
    ),
    "dtype": Flag(
        ("cache.acts_dtype", "cache.grads_dtype"),
        click.Choice(["float32", "float16", "bfloat16", "int8"]),
        "Number format of the store.",
    ),
    "cache-seed": Flag(("cache.seed",), int, "Seed of the row order inside each shard."),
    "architecture": Flag(
        ("train.architectures",),
        click.Choice([*get_args(Architecture)]),
        "What kind of SAE; repeat for a grid.",
        repeats=True,
    ),
    "train-hook": Flag(("train.hook",), str, "Which of the store's hooks to train on."),
    "beta": Flag(
        ("train.betas",),
        float,
        "Weight of the gradient; 0 is TopK; repeat for a grid.",
        repeats=True,
    ),
    "k": Flag(("train.ks",), int, "Latents kept per token; repeat for a grid.", repeats=True),
    "d-sae": Flag(("train.d_saes",), int, "Latents of an SAE; repeat for a grid.", repeats=True),
    "train-tokens": Flag(
        ("train.tokens",), int, "Stop after this many tokens.", clears=("train.steps",)
    ),
    "steps": Flag(("train.steps",), int, "Stop after this many steps.", clears=("train.tokens",)),
    "epochs": Flag(
        ("train.epochs",),
        int,
        "Passes over the store.",
        clears=("train.tokens", "train.steps"),
    ),
    "lr": Flag(("train.lr",), float, "Adam's learning rate."),
    "batch-size": Flag(("train.batch_size",), int, "Tokens of a step."),
    "precision": Flag(
        ("train.precision",),
        click.Choice(["float32", "bfloat16", "auto"]),
        "Numbers of the encoder's products; weights stay float32.",
    ),
    "logger": Flag(
        ("train.loggers",),
        click.Choice(["wandb", "tensorboard"]),
        "Log there too, beside DVCLive and Parquet; repeat for both.",
        repeats=True,
    ),
    "train-seed": Flag(("train.seeds",), int, "Seed of the SAE; repeat for several.", repeats=True),
    "allow-partial": Flag(
        ("train.allow_partial",),
        bool,
        "Train on the shards that are there where others are missing.",
    ),
    "evaluate-tokens": Flag(("evaluate.tokens",), int, "Held-out tokens to measure on."),
    "store-layer": Flag(("cache.layers",), int, "Layer(s) that the store holds.", repeats=True),
    "store-hook": Flag(("cache.hook",), str, "Hook that the store holds."),
    "workers": Flag(("run.workers",), int, "Dask workers on this machine; 0 runs in this process."),
    "train-workers": Flag(
        ("run.workers",),
        int,
        "Dask workers on this machine, each for a share of the grid; 0: none.",
    ),
    "scheduler": Flag(("run.scheduler",), str, "Address of a running dask scheduler (tcp://...)."),
    "device": Flag(("run.device",), str, "auto, cpu, cuda or cuda:N."),
}


class Invocation(NamedTuple):
    """What a command was asked to do."""

    profile: str
    config: Config
    paths: DefaultPaths  # where each stage reads and writes unless told


def takes(**flags: str) -> Callable:
    """Give a command `--profile`, `--set` and the named flags, and pass it one Invocation.

    `takes(tokens="corpus-tokens")` names the option `--tokens` and fills it from
    FLAGS["corpus-tokens"].
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def command(profile: str | None, settings: tuple[str, ...], **options: Any) -> Any:
            given = {FLAGS[flags[name]]: options.pop(name) for name in flags}
            return function(invoke(profile, given, settings), **options)

        for name, key in reversed(flags.items()):
            flag = FLAGS[key]
            command = click.option(
                f"--{name.replace('_', '-')}",
                name,
                type=flag.type,
                is_flag=flag.type is bool,
                default=None,
                multiple=flag.repeats,
                help=flag.help,
            )(command)
        command = click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set any key, such as train.lr=3e-4.",
        )(command)
        return click.option(
            "--profile", help="configs/<profile>.yaml  [default: params.yaml's, or demo]"
        )(command)

    return decorate


def invoke(profile: str | None, flags: Mapping[Flag, Any], settings: tuple[str, ...]) -> Invocation:
    """Resolve the profile and apply flags and `--set`; raises ConfigError."""
    overrides: dict[str, Any] = {
        key: list(value) if flag.repeats else value
        for flag, value in flags.items()
        if value not in (None, ())
        for key in flag.keys
    }
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE.")
        if key.strip() in overrides:
            raise ConfigError(f"--set {setting}: expected {key.strip()} once, got it twice.")
        overrides[key.strip()] = parse_yaml(value, where=f"--set {key}")
    for flag, value in flags.items():
        for key in flag.clears if value is not None else ():
            overrides.setdefault(key, None)
    profile = selected_profile(Path("params.yaml")) if profile is None else profile
    path = find_profile(profile)
    config = load_config(path, overrides)
    return Invocation(profile, config, plan_paths(profile, config, load_config(path)))


def selected_profile(params: Path) -> str:
    """The profile that params.yaml selects, so that `pipeline` and `dvc repro` agree; demo without
    one.
    """
    if not params.exists():
        return "demo"
    selected = read_yaml(params)
    if not isinstance(selected, dict) or not isinstance(selected.get("profile"), str):
        raise ConfigError(
            f"configuration at {params}: expected `profile: <name>`, got {selected!r:.60}."
        )
    return selected["profile"]


def find_profile(profile: str) -> Path:
    """configs/<profile>.yaml in this folder, else the one that ships with the package."""
    if not re.fullmatch(r"[\w][\w.-]*", profile):
        raise ConfigError(f"profile {profile!r}: expected a name such as demo.")
    folders = [Path("configs"), *packaged_config_folders()]
    for folder in folders:
        if (folder / f"{profile}.yaml").is_file():
            return folder / f"{profile}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(
        f"profile {profile}: expected one of {', '.join(known)}, or a file configs/{profile}.yaml."
    )


def packaged_config_folders() -> list[Path]:
    """configs/ inside an installed wheel, or beside the package in a checkout."""
    package = Path(pipeline.__file__).parent
    return [
        folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()
    ]
