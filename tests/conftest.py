"""Real parts for the tests: a PostgreSQL, collectors as processes, devices on sockets."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from websockets.asyncio.client import ClientConnection, connect

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import shelly_collector as sc  # noqa: E402

DEVICE = "shellypro4pm-a1b2c3d4e5f6"
NUMBERS = itertools.count(1)


async def wait_for(condition: Callable[[], Any], timeout_s: float = 15) -> Any:
    """The first true value of `condition`, a function or a coroutine function; fails after the timeout."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"not within {timeout_s} s: {condition}"
        await asyncio.sleep(0.01)


def minute_frame(device: str = DEVICE, channel: int = 0, apower: float = 433.8, **fields: Any) -> dict[str, Any]:
    """A Pro 4PM's frame at the full minute; `fields` replace or, if None, take away."""
    component = {
        "aenergy": {"by_minute": [7035.312, 7161.568, 7514.251], "minute_ts": 1795437480, "total": 1234.567},
        "apower": apower,
        "aprtpower": 438.0,
        "current": 2.631,
        "freq": 50.0,
        "pf": 0.8,
        "ret_aenergy": {"by_minute": [0.0, 0.0, 0.0], "minute_ts": 1795437480, "total": 0.0},
        "voltage": 228.2,
    }
    component = {name: value for name, value in (component | fields).items() if value is not None}
    return notify({f"switch:{channel}": component}, device)


def notify(components: dict[str, Any], device: str = DEVICE, method: str = "NotifyStatus") -> dict[str, Any]:
    return {"src": device, "dst": "ws", "method": method, "params": {"ts": 1795437480.01, **components}}


def free_port() -> int:
    """A port that stays free until it is used: none that the system gives to whoever asks for any, or calls out."""
    for number in NUMBERS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = 10_000 + (os.getpid() * 97 + number) % 20_000
            probe.bind(("127.0.0.1", port))
            return port


class Running:
    """A collector as its own process, in a folder of its own."""

    def __init__(self, folder: Path, env: dict[str, str], user: str | None = None) -> None:
        self.folder, self.as_user = folder, {"user": user, "group": user, "extra_groups": []} if user else {}
        self.port = int(env.get("PORT") or free_port())
        base = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        # An interval of a day, unless a test says otherwise: no full minute falls into a test and adds a row.
        quiet = {"HOST": "127.0.0.1", "PORT": str(self.port), "THROTTLE_INTERVAL_SECONDS": "86400"}
        self.env = base | quiet | env
        self.log_path = folder / f"log-{next(NUMBERS)}.txt"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            command = [sys.executable, str(ROOT / "shelly_collector.py")]
            return subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=log, **self.as_user)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def get(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str]:
        """Status and text of an HTTP answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()

    async def health(self) -> dict[str, str]:
        try:
            _, text = await asyncio.to_thread(self.get)
        except OSError:
            assert self.process.poll() is None, self.log
            return {}
        return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)

    async def ready(self, database: str = "connected") -> "Running":
        async def has_it() -> bool:
            return (await self.health()).get("database", "").startswith(database)

        await wait_for(has_it, 30)
        return self

    async def stop(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Exit status and seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        status = await asyncio.to_thread(self.process.wait, 20)
        return status, time.monotonic() - began

    async def again(self) -> "Running":
        """Start it once more, in the same folder and on the same port."""
        self.process = self.start()
        return self


class Peer:
    """A device's end of a socket."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket

    async def send(self, *frames: Any) -> None:
        for frame in frames:
            await self.websocket.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))


@contextlib.asynccontextmanager
async def device(url: str, **options: Any) -> Any:
    """A connected device that has read the collector's two requests."""
    async with connect(
        url, **({"ping_interval": None, "compression": None, "close_timeout": 2} | options)
    ) as websocket:
        assert await websocket.recv() == sc.ENABLE_NOTIFICATIONS
        assert await websocket.recv() == sc.GET_STATUS
        yield Peer(websocket)


class Postgres:
    """A server from the wheel's programs that a test may crash, freeze and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.child = sc.CHILD | {"env": os.environ | {"LC_ALL": "C"}} | sc.server_user(folder, open_ways=True)
        sc.make_ready(folder, self.child)
        self.url = sc.server_conninfo(folder)
        self.start()

    def start(self) -> None:
        options = [f"--{option}" for option in sc.SERVER_OPTIONS.split()]
        command = [str(sc.PROGRAMS / "postgres"), "-D", str(self.folder), *options]
        sc.make_ready(self.folder, self.child)
        self.server = psutil.Popen(command, stdout=subprocess.DEVNULL, **self.child)
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url).close()
                return
            assert self.server.poll() is None
            time.sleep(0.02)

    def signal_all(self, number: int) -> None:
        for process in [self.server, *self.server.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def crash(self) -> None:
        processes = [self.server, *self.server.children(recursive=True)]
        self.signal_all(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=5)

    def stop(self) -> None:
        if self.server.poll() is None:
            self.signal_all(signal.SIGCONT)
            self.server.send_signal(signal.SIGINT)
            self.server.wait(20)


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


@contextlib.contextmanager
def fresh_database() -> Iterator[str]:
    postgres_url = os.environ["TEST_DATABASE_URL"]
    name = f"test_{os.getpid()}_{next(NUMBERS)}"
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name}")
        yield psycopg.conninfo.make_conninfo(postgres_url, dbname=name)
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)")


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


class Wire:
    """A TCP way to a server's socket, perhaps a slow one; `swallow` makes a black hole of the connections there are."""

    def __init__(self, socket_path, delay_s=0.0):
        self.socket_path, self.delay_s = socket_path, delay_s
        self.holes = set()  # connections that never answer again
        self.black = False  # what new connections bring is swallowed, too
        self.writers = []
        self.tasks = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.carry, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def swallow(self):
        self.black = True

    def mend(self):
        """New connections get through; the old ones stay swallowed for good."""
        self.black = False

    async def carry(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        self.writers.append(writer)
        there, back = await asyncio.open_unix_connection(self.socket_path)
        self.writers.append(back)
        await asyncio.gather(self.pump(task, reader, back), self.pump(task, there, writer))

    async def pump(self, carrier, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.black:
                    self.holes.add(carrier)
                if self.delay_s:
                    asyncio.get_running_loop().call_later(self.delay_s, writer.write, data)
                elif carrier not in self.holes:
                    writer.write(data)
                    await writer.drain()
        if carrier not in self.holes:
            writer.close()


def execute(database: str, *statements: Any) -> None:
    with psycopg.connect(database, autocommit=True) as conn:
        for statement in statements:
            conn.execute(statement)


def read_rows(database: str, columns: str = "*", order: str = "device_id, channel, timestamp") -> list[tuple[Any, ...]]:
    """What power_logs holds; no rows as long as there is no table."""
    with psycopg.connect(database, autocommit=True) as conn:
        try:
            return conn.execute(f"SELECT {columns} FROM power_logs ORDER BY {order}").fetchall()
        except psycopg.errors.UndefinedTable:
            return []


VALUES = "device_id, channel, apower_w, voltage_v, current_a, energy_total_wh"


async def wait_for_rows(database: str, count: int, timeout_s: float = 15) -> list[tuple[Any, ...]]:
    """The rows' values once there are as many as `count`."""
    await wait_for(lambda: len(read_rows(database, "1", "1")) >= count, timeout_s)
    rows = read_rows(database, VALUES)
    assert len(rows) == count, rows
    return rows


def settings(**env: str) -> sc.Settings:
    return sc.read_settings(env)


@pytest.fixture
async def make(tmp_path: Path) -> Callable[..., sc.Collector]:
    """Makes the state of a collector, without server and writer, for settings given as in the environment."""
    return lambda **env: sc.make_collector(settings(**({"DATA_DIR": str(tmp_path)} | env)))


class Link:
    """What a frame changes of its connection."""

    def __init__(self) -> None:
        self.name, self.devices = "127.0.0.1", set[str]()


def feed(collector: sc.Collector, frame: Any, now: float, link: Any = None) -> bool:
    """Take one frame at a time of the server's clock; whether the device should be asked for something."""
    text = frame if isinstance(frame, str | bytes) else json.dumps(frame)
    return bool(sc.take_frame(collector, link or Link(), text, now))


def taken(collector: sc.Collector) -> list[sc.Row]:
    """The rows that were queued since the last call."""
    rows = list(collector.outbox.memory)
    collector.outbox.memory.clear()
    return rows


def expire(collector: sc.Collector, now: float = math.inf) -> None:
    """Let the rows go on whose deadline has come by `now`, as keep_house does."""
    for channel in collector.channels.values():
        sc.settle_rows(collector, channel, now)
