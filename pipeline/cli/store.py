"""`pipeline store`: look at a store without the model or the corpus."""

import json
from pathlib import Path

import click


@click.group()
def store() -> None:
    """Look at a store."""


@store.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def info(path: Path, as_json: bool) -> None:
    """What a store is, where it came from, and its statistics."""
    from store import open_store

    manifest = open_store(path).manifest
    if as_json:
        click.echo(json.dumps(manifest.as_dict(), indent=1))
        return
    n_bytes = sum(file.bytes for shard in manifest.shards for file in shard.files.values())
    for name, value in (
        ("fingerprint", manifest.fingerprint),
        ("hooks", ", ".join(manifest.hooks)),
        (
            "rows",
            f"{manifest.n_rows:,} of width {manifest.d_model}, in {manifest.n_blocks:,} blocks",
        ),
        ("formats", f"acts {manifest.acts_dtype}, grads {manifest.grads_dtype}"),
        ("shards", f"{len(manifest.shards)}, {n_bytes / 1e6:,.0f} MB"),
    ):
        click.echo(f"{name:>12}  {value}")
    for key, value in manifest.identity.items():
        click.echo(f"{key:>22}  {json.dumps(value)}")


@store.command()
@click.argument("path", type=click.Path(path_type=Path))
def verify(path: Path) -> None:
    """Check every byte of a store against the hashes in its manifest."""
    from store import open_store

    opened = open_store(path)
    opened.verify()
    click.echo(
        f"{path}: {len(opened.manifest.shards)} shards are exactly the bytes that were written"
    )
