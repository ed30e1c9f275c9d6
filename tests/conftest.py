"""Shapes are checked at run time, in tests only; where CI is set, a skipped test is a failure."""

import os
import signal

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(["pipeline", "store"], "beartype.beartype")

settings.register_profile("steady", deadline=None)  # a busy machine is no failure
settings.load_profile("steady")


# A job in the background has SIGINT ignored, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):  # noqa: ARG001
    report = yield
    if report.skipped and os.environ.get("CI") and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def cached(tmp_path_factory):
    """A tiny project with corpus and store, for tests to copy."""
    from tests.tiny import make_project, run_cli  # which import what the hook above must see first

    folder = make_project(tmp_path_factory.mktemp("cached"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_cli("cache") == 0
    return folder
