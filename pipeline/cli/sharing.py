"""`pipeline store pull` and `pipeline store gc`: copies of remote stores, and their cache."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.progress import byte_progress

if TYPE_CHECKING:
    from store.pull import PullPlan


class ShardRange(click.ParamType):
    """FIRST:STOP, or one shard's number."""

    name = "range"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d+)(?::(\d+))?", value)
        if found is None:
            self.fail(f"expected FIRST:STOP such as 0:10, got {value}.", param, ctx)
        first = int(found[1])
        stop = int(found[2]) if found[2] else first + 1
        if first >= stop:
            self.fail(f"expected FIRST < STOP such as 0:10, got {value}.", param, ctx)
        return first, stop


class FiniteFloat(click.FloatRange):
    """A number, neither nan nor inf."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value}.", param, ctx)
        return number


@click.command()
@click.argument("where", metavar="STORE")
@click.option(
    "--shards", type=ShardRange(), metavar="FIRST:STOP", help="Only these; STOP is not included."
)
@click.option("--layer", type=int, help="Only the hook of this layer.")
@click.option("--hook", help="Only this hook, by its full name.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the copy.  [default: stores/<last part of STORE>]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def pull(
    where: str,
    shards: tuple[int, int] | None,
    layer: int | None,
    hook: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Copy a store or some of its shards from a URL or path, every file verified.

    Run it again to go on after an interruption, or to add shards.
    """
    from store.pull import plan_pull, pull_store
    from store.reader import open_files

    if layer is not None and hook is not None:
        raise click.UsageError("--layer and --hook: expected one of them, got both.")
    source = open_files(where)
    out = out or Path("stores") / source.where.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    plan = plan_pull(source, shards=shards, layer=layer, hook=hook)
    with byte_progress("pull", plan.bytes) as advance:
        pulled = pull_store(source, out, plan, on_progress=advance)
    n_shards = len(plan.manifest.shards)
    if as_json:
        result = {
            "store": source.where,
            "out": str(out),
            "fingerprint": plan.manifest.fingerprint,
            "shards": list(plan.shards),
            "n_shards": n_shards,
            "hook": plan.hook,
            **pulled._asdict(),
        }
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(
        f"{len(plan.shards)} of {n_shards} shards in {out}: {pulled.files} files copied "
        f"({pulled.bytes / 1e6:,.1f} MB), {pulled.kept} kept"
    )
    click.echo(f"next: {_name_training(out, plan, layer)}")


def _name_training(out: Path, plan: "PullPlan", layer: int | None) -> str:
    """The command that trains on what was pulled."""
    words = ["pipeline", "train", "--store", str(out)]
    if layer is not None:
        words += ["--layer", str(layer)]
    elif plan.hook is not None:
        words += ["--hook", plan.hook]
    if len(plan.shards) < len(plan.manifest.shards):
        words.append("--allow-partial")
    return shlex.join(words)


@click.command()
@click.option("--max-gb", type=FiniteFloat(min=0), help="Keep this much.  [default: 50]")
@click.option("--all", "everything", is_flag=True, help="Keep nothing.")
@click.option(
    "--cache",
    "root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Its folder.  [default: GSAE_SHARD_CACHE, else in the user's cache folder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def gc(max_gb: float | None, everything: bool, root: Path | None, as_json: bool) -> None:
    """Shrink the cache of remote stores' shards, least recently used first."""
    from store.shard_cache import ShardCache

    if everything and max_gb is not None:
        raise click.UsageError("--all and --max-gb: expected one of them, got both.")
    cache = ShardCache(root, None if max_gb is None else int(max_gb * 1e9))
    collected = cache.collect(0 if everything else cache.limit_bytes)
    if as_json:
        click.echo(json.dumps({"cache": str(cache.root), **collected._asdict()}, indent=1))
        return
    click.echo(
        f"{cache.root}: removed {collected.files} files ({collected.bytes / 1e6:,.1f} MB), "
        f"kept {collected.kept_bytes / 1e6:,.1f} MB"
    )
