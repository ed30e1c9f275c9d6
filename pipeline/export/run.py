"""Export SAEs of a run: check what can be checked, then write one folder, whole or not at all."""

import difflib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from pipeline.checkpoint import is_full
from pipeline.errors import ConfigError, TrainError
from pipeline.export.card import render_card
from pipeline.export.facts import Facts, publish_settings, read_facts
from pipeline.export.folding import write_packed
from pipeline.export.formats import FORMATS, check_held
from pipeline.files import name_beside, write_json, write_text
from pipeline.runs import Run, read_run
from pipeline.sae import load_sae, save_sae


class ExportPlan(NamedTuple):
    """What will be exported, decided before any weights are read."""

    run: Run
    to: str
    facts: tuple[Facts, ...]  # of each SAE


def plan_export(
    run_folder: Path,
    names: Sequence[str] = (),
    *,
    to: str,
    metrics: Mapping[str, Any] | None = None,
) -> ExportPlan:
    """Choose SAEs of a run by name, all of them where none is named.

    `metrics` is evaluation's metrics.json, if there is one. Raises ConfigError for a name that the
    run lacks and for an architecture that the format cannot hold, TrainError where there is no run.
    """
    run = read_run(run_folder)
    for name in names:
        if name not in run.members:
            close = difflib.get_close_matches(name, run.members, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"--sae for {run_folder}: expected one of {', '.join(run.members)}, "
                f"got {name}.{hint}"
            )
    chosen = tuple(dict.fromkeys(names)) or run.members
    facts = tuple(read_facts(run, name, metrics) for name in chosen)
    check_held(to, {each.name: each.sae.architecture for each in facts}, run_folder)
    return ExportPlan(run, to, facts)


def run_export(plan: ExportPlan, out: Path, *, repo: str | None = None) -> None:
    """Write <out>/<SAE>/... for every SAE and the card <out>/README.md.

    `repo` is the repository on the hub that the card names. As safetensors the folder is a run
    again, without its history. Raises TrainError where `out` has files or cannot be written, as on
    a full disk, or an SAE cannot be read.
    """
    pack = FORMATS[plan.to].pack
    with _open_export(out) as work:
        for facts in plan.facts:
            sae = load_sae(plan.run.folder / facts.name)
            if pack is None:
                trained = facts.training | {"trained_tokens": facts.tokens}
                save_sae(sae, work / facts.name, training=trained)
            else:
                write_packed(pack(sae, facts), work / facts.name)
        if pack is None:
            members = {"members": [facts.name for facts in plan.facts], "failed": {}}
            write_json(work / "config.json", publish_settings(plan.run.config) | members)
        write_text(work / "README.md", render_card(plan.to, plan.facts, repo=repo))


@contextmanager
def _open_export(out: Path) -> Iterator[Path]:
    """Yield an empty sibling of `out` that becomes `out` where the body ends well."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainError(
            f"export at {out}: expected an empty folder or nothing, got other files. "
            "Choose another --out, or remove it."
        )
    work = name_beside(out, "part", what="export")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        if out.exists():
            out.rmdir()
        work.rename(out)
    except (OSError, SafetensorError) as error:
        wanted, todo = "a writable place", "Choose"
        if is_full(error):
            wanted, todo = "room on the disk", "Make room, or choose"
        raise TrainError(
            f"export at {out}: expected {wanted}, got: {error}. {todo} another --out."
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
