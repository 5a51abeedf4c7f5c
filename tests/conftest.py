"""Fixtures for the tests, and one PostgreSQL server for all of them."""

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support import (
    Collector,
    Postgres,
    Running,
    fresh_database,
    new_collector,
    replace_names,
    starting_collectors,
)

# In these files nearly every test starts a collector of its own, a browser or the
# Worker's runtime, which takes a second or more. Elsewhere such tests are marked one by
# one.
SLOW_FILES = {
    "test_backup.py",
    "test_dashboard.py",
    "test_embedded.py",
    "test_looking.py",
    "test_outage.py",
    "test_worker.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: Any) -> None:
    """Start one PostgreSQL for all tests and all their processes, unless
    TEST_DATABASE_URL names one."""
    if not hasattr(config, "workerinput") and not os.environ.get("TEST_DATABASE_URL"):
        config.own_folder = tempfile.TemporaryDirectory(prefix="shelly-tests-")
        config.own_postgres = Postgres(Path(config.own_folder.name, "data"))
        os.environ["TEST_DATABASE_URL"] = config.own_postgres.url


def pytest_unconfigure(config: Any) -> None:
    if hasattr(config, "own_postgres"):
        config.own_postgres.stop()
        config.own_folder.cleanup()


@pytest.fixture
def database() -> Iterator[str]:
    """The URL of a fresh database."""
    with fresh_database() as url:
        yield url


@pytest.fixture
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    server = Postgres(tmp_path_factory.mktemp("own") / "data")
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def collectors(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Running]]:
    """Start collectors. At the end they are killed, and none may have logged a
    traceback."""
    with starting_collectors(tmp_path_factory) as start:
        yield start


@pytest.fixture
async def make(tmp_path: Path) -> Callable[..., Collector]:
    """Make the state of a collector, without server and writer, for these environment
    variables."""
    defaults = {"DATA_DIR": str(tmp_path)}
    return lambda **env: new_collector(**(defaults | env))


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace constants or functions of the product, given as keywords."""
    return partial(replace_names, monkeypatch)
