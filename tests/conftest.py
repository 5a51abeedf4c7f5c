"""Fixtures for the tests, and one PostgreSQL server for all of them."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import Collector, Postgres, Running, fresh_database, new_collector, replace_names


def pytest_configure(config: Any) -> None:
    """One server for all tests, and all processes that run them: TEST_DATABASE_URL, or one of the wheel's."""
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
def collectors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Starts collectors; at the end they are killed, and none may have shown a traceback."""
    started: list[Running] = []

    def start(folder: Path | None = None, user: str | None = None, **env: str) -> Running:
        started.append(Running(folder or tmp_path_factory.mktemp("collector"), env, user))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(5)
        running.process.kill()
        running.process.wait()
    for running in started:
        assert "Traceback" not in running.log or "EXPECTED_BUG" in running.log, running.log


@pytest.fixture
async def make(tmp_path: Path) -> Callable[..., Collector]:
    """Makes the state of a collector, without server and writer, for settings given as in the environment."""
    return lambda **env: new_collector(**({"DATA_DIR": str(tmp_path)} | env))


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces names of the product, given as keywords, for one test."""
    return partial(replace_names, monkeypatch)
