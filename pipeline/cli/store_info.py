"""All that `pipeline store info` says of a store."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.cli.store_damage import sort_damage

if TYPE_CHECKING:
    from pipeline.config import TrainConfig
    from store.files import StoreFiles


def describe_store(files: "StoreFiles", train: "TrainConfig") -> dict[str, Any]:
    """All of `info`, as JSON holds it."""
    from store.files import LocalFiles
    from store.manifest import PROVENANCE_NAME
    from store.reader import read_manifest
    from store.summary import count_bytes, summarize_arrays
    from store.verify import verify_quick

    manifest = read_manifest(files)
    local = isinstance(files, LocalFiles)
    damage = sort_damage(manifest, verify_quick(files) if local else [])
    damaged = {file.shard for file in damage.files if file.shard is not None}
    absent = sorted(damaged | set(damage.shards))
    n_bytes = count_bytes(manifest)
    try:
        provenance = json.loads(files.read_bytes(PROVENANCE_NAME))
    except (OSError, ValueError):
        provenance = None
    return {
        "store": files.where,
        "fingerprint": manifest.fingerprint,
        "hooks": list(manifest.hooks),
        "d_model": manifest.d_model,
        "context_length": manifest.context_length,
        "n_tokens": manifest.n_rows,
        "n_blocks": manifest.n_blocks,
        "acts_dtype": manifest.acts_dtype,
        "grads_dtype": manifest.grads_dtype,
        "compression": manifest.compression,
        "bytes": n_bytes,
        "bytes_per_token": n_bytes / manifest.n_rows,
        "n_shards": len(manifest.shards),
        "n_present": len(manifest.shards) - len(absent) if local else None,
        "missing_hooks": list(damage.hooks),
        "missing_or_cut": absent,
        "broken_metadata": [file.path for file in damage.files if file.shard is None],
        "statistics": {
            path: summary._asdict() for path, summary in summarize_arrays(manifest).items()
        },
        "stream": _describe_stream(files, train, damage.hooks),
        "identity": manifest.identity,
        "provenance": provenance,
    }


def _describe_stream(
    files: "StoreFiles", train: "TrainConfig", missing_hooks: Sequence[str]
) -> dict[str, Any]:
    """How training would read the store's first hook that is here; why not, where it cannot."""
    from store.errors import StoreError
    from store.reader import open_store, read_manifest
    from store.stream_plan import find_mixedness, plan_stream, stream_memory_bytes

    try:
        hooks = read_manifest(files).hooks
        hook = next(hook for hook in hooks if hook not in missing_hooks)
        store = open_store(files, hook=hook, allow_partial=True)
        plan = plan_stream(
            store,
            hook=hook,
            batch_size=train.batch_size,
            epochs=1,
            seed=train.shuffle_seed,
            window=train.window_shards,
            exclude_positions=train.exclude_positions,
        )
    except StoreError as error:
        return {"error": str(error)}
    return {
        "batch_size": plan.batch_size,
        "n_batches": plan.n_batches,
        "memory_bytes": stream_memory_bytes(store, plan),
        "mixedness": find_mixedness(store, plan)._asdict(),
    }


def list_facts(description: Mapping[str, Any]) -> list[str]:
    d = description
    facts = [
        ("store", d["store"]),
        ("fingerprint", d["fingerprint"]),
        ("hooks", ", ".join(d["hooks"])),
        ("tokens", f"{d['n_tokens']:,} of width {d['d_model']}, in {d['n_blocks']:,} blocks"),
        (
            "formats",
            f"acts {d['acts_dtype']}, grads {d['grads_dtype']}, compression {d['compression']}",
        ),
        ("disk", f"{d['bytes'] / 1e6:,.1f} MB, {d['bytes_per_token']:,.1f} bytes per token"),
        ("shards", _count_shards(d)),
    ]
    facts += [("not here", f"hook {hook}") for hook in d["missing_hooks"]]
    if d["missing_or_cut"]:
        named = name_shards(d["missing_or_cut"])
        facts.append(("not whole", f"{named}; see `pipeline store verify {d['store']}`"))
    facts += [("damaged", path) for path in d["broken_metadata"]]
    facts.append(("batches", _print_stream(d["stream"])))
    for path, statistics in d["statistics"].items():
        facts.append(
            (
                path,
                f"rms {statistics['rms']:.4g}, largest {statistics['max_abs']:.4g}, "
                f"saturated {statistics['saturated']}, underflowed {statistics['underflowed']}",
            )
        )
    facts += [(key, json.dumps(value)) for key, value in d["identity"].items()]
    facts += _list_origin(d["provenance"])
    width = max(len(name) for name, _ in facts)
    return [f"{name:>{width}}  {value}" for name, value in facts]


def _count_shards(d: Mapping[str, Any]) -> str:
    if d["n_present"] is None:
        return f"{d['n_shards']}; presence not checked on a remote: `pipeline store verify --quick`"
    return f"{d['n_present']} of {d['n_shards']} present"


def _print_stream(stream: Mapping[str, Any]) -> str:
    if "error" in stream:
        return f"none: {stream['error']}"
    mixed = stream["mixedness"]
    return (
        f"{stream['n_batches']:,} of {stream['batch_size']:,} an epoch, from {mixed['window']} "
        f"shards at once, in at most {stream['memory_bytes'] / 1e6:,.0f} MB; distinct blocks "
        f"against an i.i.d. draw: {mixed['start']:.2f} at the start, {mixed['steady']:.2f} in the "
        f"steady state, {mixed['unshuffled']:.2f} for a reader that does not shuffle"
    )


def _list_origin(provenance: Any) -> list[tuple[str, str]]:
    """Where a store came from; the configuration is left to `--json`."""
    if not isinstance(provenance, dict):
        return [("made by", "unknown: provenance.json is missing or cut")]
    facts = [
        (f"made with {key}", json.dumps(value))
        for key, value in provenance.items()
        if key not in ("config", "shards")
    ]
    shards = [shard for shard in provenance.get("shards", []) if isinstance(shard, dict)]
    for key in ("host", "device", "threads"):
        values = sorted({str(shard[key]) for shard in shards if key in shard})
        if values:
            facts.append((f"made on {key}", ", ".join(values)))
    return facts


def name_shards(shards: Sequence[int]) -> str:
    listed = ", ".join(map(str, shards[:10])) + (", ..." if len(shards) > 10 else "")
    return f"{len(shards)} shards ({listed})" if len(shards) != 1 else f"shard {listed}"
