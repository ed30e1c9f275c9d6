"""Checkpoint folders: finding one, and all that can be known of it without loading weights."""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import ModelError

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "model"

# All that loading needs and nothing that could run code: no pickles, no modules.
_WANTED = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "spiece.model"]
_WANTED += ["vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
_UNWANTED = ["*/*", "consolidated*", "*.py"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")

_ALWAYS_PARALLEL = {"gptj", "codegen", "phi", "cohere", "cohere2"}


class ModelFacts(NamedTuple):
    """What config.json says."""

    name: str
    architecture: str  # the transformers class, such as GPT2LMHeadModel
    n_layers: int
    d_model: int
    context_length: int | None  # the most positions; None where the architecture sets no limit
    d_vocab: int
    parallel_blocks: bool  # attention and MLP read the same residual: there is no resid_mid


def locate_checkpoint(name: str, revision: str | None = None) -> Path:
    """The folder of "demo", of a path that exists, or of a name on the hub (into its cache).

    Only safetensors, JSON and tokenizer files are fetched. Raises ModelError if there is no such
    model, if the hub cannot be reached, or if the weights come only as a pickle.
    """
    folder = DEMO_FOLDER if name == "demo" else Path(name).expanduser()
    if name != "demo" and not folder.is_dir():
        if name.startswith((".", "/", "~")):
            raise ModelError(
                f"model at {folder}: expected a folder with config.json and safetensors, got none. "
                "Correct the folder, or run with `--model demo`."
            )
        folder = _fetch(name, revision)
    elif revision is not None:
        raise ModelError(
            f"revision at model.revision: expected null for the folder {folder}, got {revision!r}. "
            "Run with `--set model.revision=null`, or give a name on the hub."
        )
    list_weights(folder)
    return folder.resolve()


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    where = f"model {name!r} on the hub" + (f" at revision {revision!r}" if revision else "")
    try:
        with quiet(), _no_download_bars():
            return Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
                )
            )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{where}: expected access, got a gated model. Run `hf auth login`."
        ) from error
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ) as error:
        raise ModelError(
            f"{where}: expected it to exist, got none that you may see. Correct the name, or run "
            "`hf auth login`."
        ) from error
    except Exception as error:  # the hub's HTTP library has a tree of its own
        raise ModelError(
            f"{where}: expected a download or a copy in the cache, got neither "
            f"({type(error).__name__}). Connect and run again, give a checkpoint folder, or run "
            "with `--model demo`."
        ) from error


def list_weights(folder: Path) -> list[Path]:
    """The safetensors files with the weights, sorted. Raises ModelError if one is missing."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if names and not missing:
            return [folder / name for name in names]
        raise ModelError(
            f"weights at {index}: expected its {len(names)} files, got {len(missing)} missing "
            f"({', '.join(missing[:3])}). Copy or fetch the checkpoint again."
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"weights at {folder}: expected model.safetensors, got {', '.join(pickles[:3])}, and "
            "pickles are never loaded because they can run code. Convert it to safetensors with "
            "transformers' `save_pretrained`, if you trust it."
        )
    raise ModelError(
        f"weights at {folder}: expected model.safetensors, got none. Give a folder that "
        "transformers' `save_pretrained` wrote, or run with `--model demo`."
    )


def read_facts(folder: Path, *, name: str | None = None) -> ModelFacts:
    """Sizes and kind of the checkpoint's model, from config.json alone.

    Raises ModelError if that is unreadable or not the configuration of a causal language model.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    kind = _read_json(path).get("model_type")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        facts = ModelFacts(
            name=name or folder.name,
            architecture=(config.architectures or [f"{kind} (no architecture named)"])[0],
            n_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            context_length=getattr(config, "max_position_embeddings", None),
            d_vocab=config.vocab_size,
            parallel_blocks=_has_parallel_blocks(config),
        )
    except Exception as error:  # each architecture validates in its own way
        raise ModelError(
            f"model_type at {path}: expected a language model that transformers knows, got "
            f"{kind!r} ({one_line(error)}). Give another checkpoint with `--model`."
        ) from error
    if not facts.architecture.endswith(("LMHeadModel", "ForCausalLM")):
        raise ModelError(
            f"architectures at {path}: expected a causal language model, got "
            f"{facts.architecture}. Give another checkpoint with `--model`."
        )
    return facts


def _has_parallel_blocks(config: Any) -> bool:
    if config.model_type == "falcon":
        return bool(config.parallel_attn or config.new_decoder_architecture)
    parallel = getattr(config, "use_parallel_residual", False)
    return bool(parallel) or config.model_type in _ALWAYS_PARALLEL


def hash_weights(folder: Path) -> str:
    """sha256 over config.json and the safetensors files: names, sizes and contents, streamed.

    config.json belongs to it: the number of heads, epsilon and rotary base decide what the
    weights compute.
    """
    digest = hashlib.sha256()
    for path in [folder / "config.json", *list_weights(folder)]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, a transformers PreTrainedTokenizerBase.

    Raises ModelError if there is none or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(
            f"tokenizer at {folder}: expected tokenizer.json, got none. Save the model's tokenizer "
            "there with transformers' `save_pretrained`."
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(
            f"tokenizer at {folder}: expected one that transformers loads, got {one_line(error)}. "
            "Copy or fetch the checkpoint again."
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of an error that another library raised, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(". ")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and TransformerLens from writing to the terminal."""
    from transformers.utils import logging as transformers_logging

    bars, level = transformers_logging.is_progress_bar_enabled(), logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _no_download_bars() -> Iterator[None]:
    from huggingface_hub import utils

    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        what = type(content).__name__
    except (OSError, ValueError) as error:
        content, what = None, one_line(error)
    if not isinstance(content, dict):
        raise ModelError(
            f"checkpoint at {path}: expected a JSON object, got {what}. Copy or fetch the "
            "checkpoint again."
        )
    return content
