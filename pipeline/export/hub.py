"""An export as a repository on the Hugging Face hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, PipelineError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_repo(repo: str) -> None:
    """Raise ConfigError unless this is OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo}: expected OWNER/NAME. {error}") from None
    if repo.count("/") != 1:
        raise ConfigError(f"--push {repo}: expected OWNER/NAME, got no owner.")


def push_export(folder: Path, repo: str, *, api: "HfApi | None" = None) -> str:
    """Upload every file of an export; returns the commit's URL.

    A repository that is not there is made, private. Raises PipelineError if the hub refuses or
    cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi() if api is None else api
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Export from gsae-pipeline"
        )
    except Exception as error:  # the hub's HTTP library has a tree of its own
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise PipelineError(
            f"push to {repo}: expected the hub to take {folder}, got {type(error).__name__}: "
            f"{reason}. The export is whole; run `hf auth login`, then `hf upload {repo} {folder}`."
        ) from error
    return commit.commit_url
