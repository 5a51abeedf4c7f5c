"""What the tests share: frames, collectors as processes, devices on sockets, PostgreSQL servers, and doors to the code."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
from shelly_collector import (
    CHILD,
    ENABLE_NOTIFICATIONS,
    GET_STATUS,
    PROGRAMS,
    SERVER_OPTIONS,
    Collector,
    Row,
    Settings,
    make_collector,
    make_ready,
    read_settings,
    server_conninfo,
    server_user,
    settle_rows,
    take_frame,
)
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import serve

ROOT = Path(__file__).parents[1]
NUMBERS = itertools.count(1)  # for names and ports that no other test uses


# ---- Frames
DEVICE = "shellypro4pm-a1b2c3d4e5f6"


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


# ---- Waiting
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


# ---- Collectors as processes of their own
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


async def run_script(folder, *arguments, **env):
    """Exit status, standard output and standard error."""
    base = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, ROOT / "shelly_collector.py", *arguments,
        cwd=folder, env=base | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, out.decode(), err.decode()


# ---- Devices, and a bare server for them
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
        assert await websocket.recv() == ENABLE_NOTIFICATIONS
        assert await websocket.recv() == GET_STATUS
        yield Peer(websocket)


@contextlib.asynccontextmanager
async def listening(frames, ends=lambda: False):
    """The URL of a bare server that asks for two answers and collects frames, until `ends` says to hang up."""

    async def take(websocket):
        for number, method in (2, "Shelly.GetStatus"), (3, "Shelly.GetConfig"):
            await websocket.send(json.dumps({"id": number, "src": "collector", "method": method}))
        async for text in websocket:
            frames.append(json.loads(text))
            if ends():
                return

    async with serve(take, "127.0.0.1", 0, compression=None) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"


# ---- PostgreSQL
class Postgres:
    """A server from the wheel's programs that a test may crash, freeze and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.child = CHILD | {"env": os.environ | {"LC_ALL": "C"}} | server_user(folder, open_ways=True)
        make_ready(folder, self.child)
        self.url = server_conninfo(folder)
        self.start()

    def start(self) -> None:
        options = [f"--{option}" for option in SERVER_OPTIONS.split()]
        command = [str(PROGRAMS / "postgres"), "-D", str(self.folder), *options]
        make_ready(self.folder, self.child)
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


@contextlib.contextmanager
def fresh_database() -> Iterator[str]:
    postgres_url = os.environ["TEST_DATABASE_URL"]
    name = f"test_{os.getpid()}_{next(NUMBERS)}"
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name}")
        yield psycopg.conninfo.make_conninfo(postgres_url, dbname=name)
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)")


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


ORIGINAL_TABLE = """
CREATE TABLE power_logs (id SERIAL PRIMARY KEY, timestamp TIMESTAMPTZ NOT NULL, device_id VARCHAR(100) NOT NULL,
 channel VARCHAR(20) NOT NULL, apower_w FLOAT NOT NULL, voltage_v FLOAT NOT NULL, current_a FLOAT NOT NULL,
 energy_total_wh FLOAT NOT NULL, created_at TIMESTAMPTZ DEFAULT NOW());
CREATE INDEX idx_power_logs_timestamp ON power_logs(timestamp);
CREATE INDEX idx_power_logs_device_channel ON power_logs(device_id, channel);
"""


# ---- Doors to the code: settings, frames in, rows out
def settings(**env: str) -> Settings:
    """Settings given as in the environment."""
    return read_settings(env)


def new_collector(**env: str) -> Collector:
    """The state of a collector, without server and writer, for settings given as in the environment."""
    return make_collector(settings(**env))


class Link:
    """What a frame changes of its connection."""

    def __init__(self) -> None:
        self.name, self.devices = "127.0.0.1", set[str]()


def feed(collector: Collector, frame: Any, now: float, link: Any = None) -> bool:
    """Take one frame at a time of the server's clock; whether the device should be asked for something."""
    text = frame if isinstance(frame, str | bytes) else json.dumps(frame)
    return bool(take_frame(collector, link or Link(), text, now))


def taken(collector: Collector) -> list[Row]:
    """The rows that were queued since the last call."""
    return drain(collector.outbox)


def expire(collector: Collector, now: float = math.inf) -> None:
    """Let the rows go on whose deadline has come by `now`, as keep_house does."""
    for channel in collector.channels.values():
        settle_rows(collector, channel, now)


def replace_names(monkeypatch: Any, **values: Any) -> None:
    """Replace names of the product for one test, in every module of it that has them."""
    modules = [module for module in sys.modules.values() if is_product(module)]
    for name, value in values.items():
        owners = [module for module in modules if hasattr(module, name)]
        assert owners, f"no module of the product has {name}"
        for module in owners:
            monkeypatch.setattr(module, name, value)


def is_product(module: Any) -> bool:
    return Path(getattr(module, "__file__", None) or "/").parent == ROOT


# ---- Rows on their way
ROWS = [Row(60.0 * n, "device", "switch:0", float(n), 230.0, 0.5, 9.0) for n in range(5000)]


def fill(outbox: Any, rows: Iterable[Row]) -> Any:
    """The outbox, with these rows appended."""
    for row in rows:
        outbox.append(row)
    return outbox


def drain(outbox: Any, limit: int = 1000) -> list[Row]:
    """All rows of an outbox, taken from it batch by batch as the writer does."""
    rows: list[Row] = []
    while outbox:
        batch = outbox.oldest(limit)
        rows += batch[0]
        outbox.remove(*batch)
    return rows


OLD_TABLE = (
    "CREATE TABLE rows (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, device_id TEXT,"
    " channel TEXT, apower_w REAL, voltage_v REAL, current_a REAL, energy_total_wh REAL)"
)


def old_spool(folder, rows, close=True):
    """As the version before this one left it; its lock's file is there, too."""
    (folder / "collector.lock").write_bytes(b"")
    spool = sqlite3.connect(folder / "spool.sqlite3", isolation_level=None)
    spool.execute("PRAGMA journal_mode = WAL")
    spool.execute(OLD_TABLE)
    spool.executemany("INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", [row[:7] for row in rows])
    if close:
        spool.close()
    return spool
