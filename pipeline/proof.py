"""What a worker must prove before it computes: the driver's packages, inputs and folder.

`gather_facts` runs on a worker and never raises: what it cannot find becomes a fact. Comparing is
pure. The work folder is proved both ways by a token: the driver's file, which the worker reads, and
a copy of it by the worker, which the driver reads back.
"""

import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pipeline.errors import PipelineError
from pipeline.provenance import find_versions
from store.disk import make_folder
from store.errors import StoreError
from store.identity import diff_identities

_YES = "yes"


@runtime_checkable
class Job(Protocol):
    """What workers are to do, as far as it concerns their proof and setup; sent to each of them."""

    @property
    def work(self) -> Path:
        """The work folder, which all write to."""
        ...

    @property
    def device(self) -> str:
        """As it was asked for: auto is what each worker has."""
        ...

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of all that is read, by name, as the driver sees them."""
        ...

    def find_inputs(self) -> dict[str, Callable[[], str]]:
        """How this process finds each of them."""
        ...

    def prepare(self) -> None:
        """Load what one process loads once."""
        ...


class WorkerFacts(NamedTuple):
    """What a worker sees; of what it does not see, the reason."""

    host: str
    pid: int
    versions: dict[str, str]  # of the packages that decide the numbers, and of python
    inputs: dict[str, str]  # fingerprints of a job's inputs, by name
    reads_work: str  # "yes": the driver's token in the work folder
    writes_work: str  # "yes": its copy of the token
    tasks_at_once: int  # of this process; each would want the model's memory and all threads


@contextmanager
def offer_token(work: Path) -> Iterator[Path]:
    """A file in the work folder whose name is its content; removed with the workers' copies."""
    token = work / "scratch" / uuid.uuid4().hex
    make_folder(token.parent)
    token.write_text(token.name)
    try:
        yield token
    finally:
        for file in token.parent.glob(f"{token.name}*"):
            file.unlink(missing_ok=True)


def expect_facts(job: Job) -> WorkerFacts:
    """What every worker must see."""
    return WorkerFacts(
        host=socket.gethostname(),
        pid=os.getpid(),
        versions=find_versions(),
        inputs=job.inputs,
        reads_work=_YES,
        writes_work=_YES,
        tasks_at_once=1,
    )


def gather_facts(job: Job, token: Path, tasks_at_once: int) -> WorkerFacts:
    """What this process sees of `job`'s inputs; leaves its copy of the token beside it."""
    host, pid = socket.gethostname(), os.getpid()
    return WorkerFacts(
        host=host,
        pid=pid,
        versions=find_versions(),
        inputs={name: _explain(find) for name, find in job.find_inputs().items()},
        reads_work=_explain(lambda: _check_token(token, token)),
        writes_work=_explain(lambda: _write_copy(token, host, pid)),
        tasks_at_once=tasks_at_once,
    )


def confirm_copy(token: Path, facts: WorkerFacts) -> WorkerFacts:
    """On the driver: the facts, corrected by what is seen here of the worker's copy."""
    copy = _name_copy(token, facts.host, facts.pid)
    return facts._replace(writes_work=_explain(lambda: _check_token(copy, token)))


def find_differences(expected: WorkerFacts, found: WorkerFacts) -> list[str]:
    """One line for every fact that is not as expected; who and where the worker is aside. Pure."""
    return diff_identities(_list_facts(expected), _list_facts(found))


def describe_refused(where: str, n_workers: int, refused: Mapping[str, list[str]]) -> str:
    """The one line that names every refused worker and how it differs. Pure."""
    workers = "; ".join(f"{name} ({', '.join(lines)})" for name, lines in refused.items())
    return (
        f"workers at {where}: expected {n_workers} that see what this process sees, got "
        f"{len(refused)} that do not: {workers}. Give them this environment and the same folders "
        "at the same paths, then run the same command again."
    )


def _list_facts(facts: WorkerFacts) -> dict[str, Any]:
    aside = ("host", "pid", "inputs")
    listed = {name: value for name, value in facts._asdict().items() if name not in aside}
    return listed | facts.inputs


def _check_token(file: Path, token: Path) -> str:
    return _YES if file.read_text() == token.name else f"another content of {file}"


def _write_copy(token: Path, host: str, pid: int) -> str:
    _name_copy(token, host, pid).write_text(token.name)
    return _YES


def _name_copy(token: Path, host: str, pid: int) -> Path:
    return token.with_name(f"{token.name}-{host}-{pid}")


def _explain(find: Callable[[], str]) -> str:
    try:
        return find()
    except (OSError, PipelineError, StoreError) as error:
        return f"{type(error).__name__}: {error}"
