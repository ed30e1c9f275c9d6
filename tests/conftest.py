"""Shapes are checked at run time, in tests only; where CI is set, a skipped test is a failure."""

import os

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(["pipeline", "store"], "beartype.beartype")

settings.register_profile("steady", deadline=None)  # a busy machine is no failure
settings.load_profile("steady")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):  # noqa: ARG001
    report = yield
    if report.skipped and os.environ.get("CI") and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"
    return report
