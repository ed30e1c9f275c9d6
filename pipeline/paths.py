"""Where each stage reads and writes when it is not told: pure functions of the profile and what
overrides it.

    data/<label>     corpus         stores/<label>   store
    runs/<label>     trained SAEs   results/<label>  measurements and report

The label is the profile's name, followed by every setting that decides the folder's content and
differs from the profile: `pipeline cache --layer 3` writes stores/demo+layers=3 and so never
touches stores/demo, which DVC tracks.
"""

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Config

_LONGEST = 150
_DECIDES = {
    "data": ("model", "corpus"),
    "stores": ("model", "corpus", "cache"),
    "runs": ("model", "corpus", "cache", "train"),
    "results": ("model", "corpus", "cache", "train", "evaluate", "evidence"),
}


class DefaultPaths(NamedTuple):
    corpus: Path
    store: Path
    run: Path
    results: Path


def plan_paths(profile: str, config: Config, unchanged: Config) -> DefaultPaths:
    """Default folders for `config`, where `unchanged` is the profile without overrides."""
    return DefaultPaths(
        *(
            Path(kind) / _label(profile, config, unchanged, sections)
            for kind, sections in _DECIDES.items()
        )
    )


def _label(profile: str, config: Config, unchanged: Config, sections: tuple[str, ...]) -> str:
    every = [key for section in _DECIDES["results"] for key, _ in getattr(config, section)]
    changed = [
        f"+{key if every.count(key) == 1 else f'{section}.{key}'}={_slug(value)}"
        for section in sections
        for key, value in getattr(config, section)
        if value != getattr(getattr(unchanged, section), key)
    ]
    label = profile + "".join(changed)
    if len(label) > _LONGEST:  # file systems stop at 255 bytes
        label = f"{label[:_LONGEST]}+{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return label


def _slug(value: Any) -> str:
    """A value as it may stand in a file name: lists by commas, whole floats without their point."""
    if isinstance(value, tuple):
        return ",".join(_slug(item) for item in value)
    if isinstance(value, float):
        return format_number(value)
    return re.sub(r"[^\w.,=-]+", "_", str(value)).strip("_")


def format_number(value: float) -> str:
    """A number as people write it: 0, 32, 0.001, 1e5, 2.5e6."""
    if value == int(value) and abs(value) < 10_000:
        return str(int(value))
    text = f"{value:e}" if abs(value) >= 10_000 else repr(float(value))
    mantissa, _, exponent = text.partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return mantissa + (f"e{int(exponent)}" if exponent else "")
