"""What a result was made with: versions and settings, recorded beside it and never part of its
identity.
"""

import importlib.metadata
import platform
from typing import Any

from pipeline.config import Config

_PACKAGES = (
    "gsae-pipeline",
    "torch",
    "transformers",
    "transformer-lens",
    "datasets",
    "numpy",
    "zarr",
    "distributed",
)


def describe_run(profile: str, config: Config) -> dict[str, Any]:
    """Profile, resolved configuration and versions, as JSON can hold them."""
    return {
        "profile": profile,
        "config": config.model_dump(mode="json"),
        "versions": find_versions(),
    }


def find_versions() -> dict[str, str]:
    """Versions of python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }
