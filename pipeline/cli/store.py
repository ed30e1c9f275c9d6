"""`pipeline store`: look at a store, check it and mend it, without the model or the corpus."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import Invocation, takes
from pipeline.cli.sharing import gc, pull
from pipeline.cli.store_damage import advise, count_damage, list_damage, show, sort_damage
from pipeline.cli.store_info import describe_store, list_facts, name_shards

if TYPE_CHECKING:
    from pipeline.cli.store_damage import Damage
    from store.manifest import Manifest
    from store.repair import RepairReport
    from store.verify import DamagedFile

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)
store_argument = click.argument("where", metavar="STORE")


@click.group()
def store() -> None:
    """Look at a store (a path or URL), check it, mend it."""


@store.command()
@takes()
@store_argument
@json_option
def info(run: Invocation, where: str, as_json: bool) -> None:
    """What a store is, where it came from, its statistics, and how mixed its batches are.

    Batches are those of training with the profile's settings.
    """
    from store.reader import open_files

    description = describe_store(open_files(where), run.config.train)
    if as_json:
        click.echo(json.dumps(description, indent=1))
        return
    for line in list_facts(description):
        click.echo(line)


@store.command()
@store_argument
@click.option(
    "--quick/--full",
    default=False,
    help="Presence and sizes alone, or every hash and number.  [default: --full]",
)
@click.option("--allow-partial", is_flag=True, help="Exit with 0 where all that is there is good.")
@json_option
def verify(where: str, quick: bool, allow_partial: bool, as_json: bool) -> None:
    """List all that is damaged or missing of a store; exit with 1 if anything is.

    --quick asks a remote for every file's size; of a dvc+ URL, DVC's listing.
    """
    from pipeline.cli.progress import byte_progress
    from store.reader import open_files, read_manifest
    from store.summary import count_bytes
    from store.verify import list_foreign, verify_full, verify_quick

    files = open_files(where)
    manifest = read_manifest(files)
    if quick:
        found = verify_quick(files)
    else:
        with byte_progress("verify", count_bytes(manifest)) as advance:
            found = verify_full(files, advance)
    damage = sort_damage(manifest, found)
    foreign = list_foreign(files)
    if as_json:
        result = {
            "store": files.where,
            "fingerprint": manifest.fingerprint,
            "check": "quick" if quick else "full",
            "whole": not found,
            "n_shards": len(manifest.shards),
            "missing": list(damage.shards),
            "missing_hooks": list(damage.hooks),
            "damage": [_describe_file(file) for file in damage.files],
            "foreign": foreign,
        }
        click.echo(json.dumps(result, indent=1))
    else:
        _print_damage(files.where, manifest, damage, foreign, quick)
    nothing = len(damage.shards) == len(manifest.shards)
    if found and (nothing or not (allow_partial and damage.is_part)):
        sys.exit(1)


@store.command()
@store_argument
@click.option("--from", "source", metavar="STORE", help="Another copy of it: a path or URL.")
@json_option
def repair(where: str, source: str | None, as_json: bool) -> None:
    """Replace a store's damaged files by good copies, or have `pipeline cache` recompute them.

    Exits with 1 while shards are left to recompute.
    """
    import importlib.metadata

    import torch

    from pipeline.device import pick_device
    from store.errors import is_url
    from store.reader import open_files
    from store.repair import repair as mend

    if is_url(where):
        raise click.UsageError(
            f"store at {open_files(where).where}: expected a folder, got a URL, which cannot be "
            "mended from here. Tell its publisher, or pull from another copy."
        )
    path = Path(where)
    machine = {
        "device": pick_device("auto"),
        "threads": torch.get_num_threads(),
        "torch": importlib.metadata.version("torch"),
    }
    report = mend(path, source=open_files(source) if source else None, machine=machine)
    if as_json:
        result = {
            "store": str(path),
            "whole": not report.dropped,
            "manifest_restored": report.manifest_restored,
            "metadata": list(report.metadata),
            "shards": [shard._asdict() for shard in report.shards],
            "recompute": list(report.dropped),
            "notes": list(report.notes),
        }
        click.echo(json.dumps(result, indent=1))
    else:
        _print_repair(path, report)
    if report.dropped:
        sys.exit(1)


@store.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@json_option
def diff(first: str, second: str, as_json: bool) -> None:
    """Compare what two stores are, field by field; exit with 1 if they differ."""
    from store.identity import list_differences
    from store.reader import open_files, read_manifest

    manifests = [read_manifest(open_files(where)) for where in (first, second)]
    ours, theirs = manifests
    differences = list_differences(ours.identity, theirs.identity)
    other_bytes = [] if differences else _list_other_bytes(ours, theirs)
    if as_json:
        result = {
            "fingerprints": [manifest.fingerprint for manifest in manifests],
            "differences": [
                {"field": field, "a": mine, "b": other} for field, mine, other in differences
            ],
            "shards_of_other_bytes": other_bytes,
        }
        click.echo(json.dumps(result, indent=1))
    else:
        for field, mine, other in differences:
            click.echo(f"{field}: {show(mine)} in A, {show(other)} in B")
        if other_bytes:
            click.echo(f"equal settings, other bytes in {name_shards(other_bytes)}")
        if not differences and not other_bytes:
            click.echo(
                f"the same store by its manifest, fingerprint {ours.fingerprint}; "
                "`pipeline store verify` checks the bytes"
            )
    if differences or other_bytes:
        sys.exit(1)


def _print_damage(
    where: str,
    manifest: "Manifest",
    damage: "Damage",
    foreign: Sequence[str],
    quick: bool,
) -> None:
    for line in list_damage(damage):
        click.echo(line)
    for path in foreign:
        click.echo(f"foreign: {path}: no part of the store")
    n_shards = len(manifest.shards)
    if any(damage):
        click.echo(f"{where}: {count_damage(manifest, damage)}. {advise(where, damage)}")
    elif quick:
        click.echo(f"{where}: {n_shards} shards are there, in full size; --full reads them")
    else:
        click.echo(f"{where}: {n_shards} shards are exactly the bytes that were written")


def _print_repair(path: Path, report: "RepairReport") -> None:
    words = {
        "relinked": "taken from the work folder",
        "fetched": "fetched",
        "dropped": "left to recompute",
    }
    if report.manifest_restored:
        click.echo("manifest.json: written again")
    for name in report.metadata:
        click.echo(f"{name}: written again")
    for shard in report.shards:
        click.echo(f"shard {shard.shard}: {len(shard.files)} files {words[shard.done]}")
    for note in report.notes:
        click.echo(note)
    if report.dropped:
        click.echo(
            f"{path}: {name_shards(report.dropped)} left. Run `pipeline cache` with the settings "
            "that made the store, which computes these alone, or name a whole copy with --from."
        )
    else:
        click.echo(f"{path}: every byte is the one that was written")


def _list_other_bytes(ours: "Manifest", theirs: "Manifest") -> list[int]:
    """Shards of equal settings and other content: made on other hardware, say."""
    pairs = zip(ours.shards, theirs.shards, strict=True)
    return [mine.index for mine, other in pairs if mine != other]


def _describe_file(file: "DamagedFile") -> dict[str, Any]:
    return {"shard": file.shard, "path": file.path, "problem": file.problem}


store.add_command(pull)
store.add_command(gc)
