"""What is not here and what is damaged, in as few lines as say it: a part of a store is no ruin."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from store.manifest import Manifest
    from store.verify import DamagedFile


class Damage(NamedTuple):
    """What verify found, sorted by what a user does about it."""

    hooks: tuple[str, ...]  # of which no shard is here
    shards: tuple[int, ...]  # of which, apart from those hooks, no file is here
    files: tuple["DamagedFile", ...]  # all else

    @property
    def is_part(self) -> bool:
        """Whether all that is here is good, and something lacks."""
        return bool(self.hooks or self.shards) and not self.files


def sort_damage(manifest: "Manifest", damage: Sequence["DamagedFile"]) -> Damage:
    """Where everything is missing, all shards are, and no hook is named."""
    from store.manifest import locate_shard

    missing = {file.path for file in damage if file.problem == "missing"}

    def lacks(shard: int, arrays: Sequence[str]) -> bool:
        return all(locate_shard(array, shard) in missing for array in arrays)

    arrays = list(manifest.shards[0].files)
    of_hook = {
        hook: [array for array in arrays if array.startswith(f"{hook}/")] for hook in manifest.hooks
    }
    shards = range(len(manifest.shards))
    hooks = tuple(
        hook for hook in manifest.hooks if all(lacks(shard, of_hook[hook]) for shard in shards)
    )
    if len(hooks) == len(manifest.hooks):
        hooks = ()
    rest = [array for array in arrays if not any(array in of_hook[hook] for hook in hooks)]
    gone = tuple(shard for shard in shards if lacks(shard, rest))
    files = tuple(
        file
        for file in damage
        if file.shard is None
        or (file.shard not in gone and not any(file.path.startswith(f"{hook}/") for hook in hooks))
    )
    return Damage(hooks, gone, files)


def list_damage(damage: Damage) -> list[str]:
    """A line per hook that is not here, per run of missing shards, and per damaged file."""
    lines = [f"hook {hook}: not here" for hook in damage.hooks]
    lines += [f"{name_run(run)}: missing" for run in find_runs(damage.shards)]
    for file in damage.files:
        name = "metadata" if file.shard is None else f"shard {file.shard}"
        lines.append(f"{name}: {file.path}: {file.problem}")
    return lines


def count_damage(manifest: "Manifest", damage: Damage) -> str:
    """In one phrase, such as 2 of 9 shards missing, 1 zarr.json damaged."""
    n_shards = len(manifest.shards)
    damaged = {file.shard for file in damage.files if file.shard is not None}
    metadata = sum(file.shard is None for file in damage.files)
    counts = [
        (len(damage.hooks), f"of {len(manifest.hooks)} hooks not here"),
        (len(damage.shards), f"of {n_shards} shards missing"),
        (len(damaged), f"of {n_shards} shards damaged"),
        (metadata, "zarr.json damaged"),
    ]
    return ", ".join(f"{count} {words}" for count, words in counts if count)


def advise(where: str, damage: Damage) -> str:
    """The command to run next."""
    from store.errors import is_url

    if is_url(where):
        return "Tell its publisher, or pull from another copy."
    if damage.is_part:
        return (
            "Train on this part with --allow-partial, or fetch the rest with "
            f"`pipeline store repair {where} --from STORE`."
        )
    return f"Run `pipeline store repair {where}`."


def find_runs(shards: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers, which are in ascending order."""
    if not shards:
        return []
    breaks = [(left, right) for left, right in pairwise(shards) if right != left + 1]
    firsts = [shards[0], *(right for _, right in breaks)]
    return list(zip(firsts, [*(left for left, _ in breaks), shards[-1]], strict=True))


def name_run(run: tuple[int, int]) -> str:
    first, last = run
    return f"shard {first}" if first == last else f"shards {first} to {last}"


def show(value: Any) -> str:
    """A field's value for a message; None stands for a field that is not there."""
    if value is None:
        return "nothing"
    return value if isinstance(value, str) else json.dumps(value)
