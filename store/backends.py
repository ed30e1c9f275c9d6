"""The file systems behind a store's URL: how each is reached, and what to say of it.

Each is an fsspec file system, whose calls run on fsspec's own thread and may come from any.
Retries are left to `store.download`, so the libraries' own are off where they can be.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from fsspec.callbacks import Callback

from store.errors import ShardCorrupt, StoreError
from store.manifest import FileRecord

CONNECT_S, SILENCE_S = 10, 30  # a server that says nothing for so long is taken for gone
_DVC_URL = re.compile(r"dvc\+(?P<repo>.+)@(?P<rev>[^@:]+):(?P<folder>[^:@]+)")
_PIECE_BYTES = 2**20


class Remote(NamedTuple):
    """What is known of a URL before anything is fetched."""

    where: str  # without credentials
    address: Callable[[str], str]  # of a file in the store, as the file system wants it
    connect: Callable[[], Any]  # makes the file system
    download: Callable[[Any, str, Path, FileRecord], None]  # from the file system; an address
    credentials: str  # how they are found, as advice
    reconnect: bool = False  # a failure may have broken the connection for good


def strip_url(url: str) -> str:
    """The URL without what may be secret: user information, query and fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def plan_http(parts: SplitResult) -> Remote:
    base = parts._replace(path=parts.path.rstrip("/"), fragment="")

    def connect() -> Any:
        aiohttp = _import("aiohttp", "aiohttp")
        http = _import("fsspec.implementations.http", "aiohttp")
        silence = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        return http.HTTPFileSystem(
            encoded=True,  # a signature holds for the URL's very bytes
            client_kwargs={
                "timeout": silence,
                "trust_env": True,  # proxies, ~/.netrc
                "headers": {"Accept-Encoding": "identity"},
            },
            skip_instance_cache=True,
        )

    return Remote(
        strip_url(parts.geturl()),
        lambda path: urlunsplit(base._replace(path=f"{base.path}/{path}")),
        connect,
        _get_file,
        "Use a URL whose signature has not expired, or put user and password into ~/.netrc.",
    )


def plan_s3(parts: SplitResult) -> Remote:
    where = strip_url(parts.geturl())
    if "@" in parts.netloc or parts.query:
        raise StoreError(
            f"store at {where}: expected s3://bucket/folder, got more than that. Put credentials "
            "into ~/.aws or the environment."
        )

    def connect() -> Any:
        s3fs = _import("s3fs", "gsae-pipeline[s3]")
        system = s3fs.S3FileSystem(
            config_kwargs={
                "retries": {"total_max_attempts": 1},  # those of try_often are enough
                "connect_timeout": CONNECT_S,
                "read_timeout": SILENCE_S,
            },
            max_concurrency=1,  # one request for each file; several files come at once
            skip_instance_cache=True,
        )
        system.retries = 1
        return system

    return Remote(
        where,
        lambda path: f"{where}/{path}",
        connect,
        _get_file,
        "Name credentials that may read it: AWS_PROFILE, AWS_ACCESS_KEY_ID with "
        "AWS_SECRET_ACCESS_KEY, or `aws sso login` where they have expired.",
    )


def plan_ssh(parts: SplitResult, port: int | None) -> Remote:
    options = {
        "port": port,
        "username": parts.username and unquote(parts.username),
        "password": parts.password and unquote(parts.password),
    }

    def connect() -> Any:
        sshfs = _import("sshfs", "gsae-pipeline[ssh]")
        return sshfs.SSHFileSystem(
            parts.hostname,
            known_hosts=(),  # ssh's own files; None, the default, would trust any host
            connect_timeout=CONNECT_S,
            login_timeout=SILENCE_S,
            keepalive_interval=CONNECT_S,
            skip_instance_cache=True,
            **{name: value for name, value in options.items() if value},
        )

    return Remote(
        strip_url(parts.geturl()),
        lambda path: f"{unquote(parts.path).rstrip('/')}/{path}",
        connect,
        _get_file,
        "Check that `ssh` reaches that host: its key in ~/.ssh/known_hosts, yours in ssh-agent or "
        "~/.ssh.",
        reconnect=True,
    )


def plan_dvc(url: str) -> Remote:
    found = _DVC_URL.fullmatch(url)
    if found is None:
        raise StoreError(
            "store's URL: expected dvc+<git repository>@<revision>:<folder>, got another form. "
            "Write for example dvc+https://host/team/repo@v1:stores/demo."
        )
    repo, rev, folder = found["repo"], found["rev"], found["folder"].strip("/")
    shown = strip_url(repo) if "://" in repo else repo

    def connect() -> Any:
        dvc = _import("dvc.api", "dvc")
        try:
            system = dvc.DVCFileSystem(url=repo, rev=rev)
            system.repo  # noqa: B018  # clones now, not in several threads at once
        except Exception as error:  # of DVC or git, whose text may quote a URL with its password
            if complaint := _explain_clone(error, shown, rev):
                raise StoreError(complaint) from None
            raise
        return system

    return Remote(
        f"dvc+{shown}@{rev}:{folder}",
        lambda path: f"{folder}/{path}",
        connect,
        _stream_file,
        "Check that git reaches the repository, and DVC its remote (`dvc remote modify --local`).",
    )


def _explain_clone(error: BaseException, repo: str, rev: str) -> str | None:
    """Why a repository cannot be used, where trying again cannot help; None for other reasons."""
    names: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        names |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__
    if "RevError" in names:
        return (
            f"revision of the repository at {repo}: expected a branch, tag or commit, got {rev}, "
            "which it has not. Correct the URL."
        )
    if names & {"CloneError", "SCMError", "NotDvcRepoError"}:
        return (
            f"repository at {repo}: expected one that `git clone` can clone and that DVC tracks, "
            "got none. Correct the URL, or check that git reaches it."
        )
    return None


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise StoreError(
            f"library for this kind of URL: expected {module}, got none. "
            f"Run `pip install '{package}'`."
        ) from None


class _SizeLimit(Callback):
    """Stops a download that has become longer than its file."""

    def __init__(self, where: str, expected: int) -> None:
        super().__init__()
        self._where, self._expected = where, expected

    def call(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self.value > self._expected:
            raise ShardCorrupt(
                f"shard file {self._where}: expected {self._expected} bytes, got more. "
                "Who publishes it should upload it again."
            )


def _get_file(system: Any, address: str, partial: Path, file: FileRecord) -> None:
    where = urlsplit(address).path
    system.get_file(address, str(partial), callback=_SizeLimit(where, file.bytes))


def _stream_file(system: Any, address: str, partial: Path, file: FileRecord) -> None:
    """DVC's own `get_file` may make a link into its cache instead of a copy."""
    with system.open(address, "rb") as source, partial.open("wb") as target:
        while target.tell() <= file.bytes and (piece := source.read(_PIECE_BYTES)):
            target.write(piece)
