"""A small store of two layers, served over HTTP.

Imports happen in the fixtures: those of tests/conftest.py must see the packages first.
"""

import pytest


@pytest.fixture(scope="module")
def spec():
    from tests.store.published import HOOKS
    from tests.store.small_store import make_spec

    return make_spec(hooks=HOOKS)


@pytest.fixture(scope="module")
def folder(spec, tmp_path_factory):
    """A folder with a store called `small`."""
    from tests.store.small_store import write_store

    root = tmp_path_factory.mktemp("published")
    write_store(root / "small", spec)
    return root


@pytest.fixture
def server(folder):
    from tests.remotes import serve_http

    with serve_http(folder) as server:
        yield server
