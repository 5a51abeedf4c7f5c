"""What the tests share: frames, collectors as processes, devices on sockets, PostgreSQL
servers, and doors to the code.

Where a name of the product moves, this file follows it, and the tests stay."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import pwd
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import psycopg
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.server import ServerProtocol

from asking import ENABLE_NOTIFICATIONS, GET_STATUS, Requests
from local_postgres import (
    child_options,
    conninfo,
    make_ready,
    open_for_passing,
    programs,
    server_command,
    server_user,
)
from outbox import Outbox, Row
from settings import Settings, read_settings
from shelly_collector import (
    Collector,
    DeviceConnection,
    ask_silent_devices,
    make_collector,
    release_complete_rows,
    take_frame,
    take_message,
)

ROOT = Path(__file__).parents[1]
# For names and ports that no other test uses.
NUMBERS = itertools.count(1)


# ---- Frames
NOON = 1_795_435_200.0  # a full minute
DEVICE = "shellypro4pm-a1b2c3d4e5f6"


def minute_frame(
    device: str = DEVICE, channel: int = 0, apower: float = 433.8, **fields: Any
) -> dict[str, Any]:
    """What a Pro 4PM sends at the full minute, here without the minute's name, as before
    it has the time. `fields` replace its own; None removes one."""
    component = {
        "aenergy": {
            "by_minute": [7035.312, 7161.568, 7514.251],
            "total": 1234.567,
        },
        "apower": apower,
        "aprtpower": 438.0,
        "current": 2.631,
        "freq": 50.0,
        "pf": 0.8,
        "ret_aenergy": {
            "by_minute": [0.0, 0.0, 0.0],
            "total": 0.0,
        },
        "voltage": 228.2,
    }
    component = {
        name: value for name, value in (component | fields).items() if value is not None
    }
    return notify({f"switch:{channel}": component}, device)


def notify(
    components: dict[str, Any], device: str = DEVICE, method: str = "NotifyStatus"
) -> dict[str, Any]:
    """A notification of these components."""
    params = {"ts": 1795437480.01, **components}
    return {"src": device, "dst": "ws", "method": method, "params": params}


# ---- Frames of clamps and three-phase meters: power and counters are two components
METER = "shellypro3em-a1b2c3d4e5f6"

# What a Pro 3EM says. Phase b feeds power back, phase c has no wire.
EM = {
    "id": 0,
    "a_act_power": 2166.2,
    "a_aprt_power": 2175.9,
    "a_current": 9.592,
    "a_freq": 49.9,
    "a_pf": 0.99,
    "a_voltage": 227.0,
    "b_act_power": -318.4,
    "b_aprt_power": 330.1,
    "b_current": 1.435,
    "b_freq": 49.9,
    "b_pf": 0.96,
    "b_voltage": 230.0,
    "c_act_power": 0,
    "c_aprt_power": 0,
    "c_current": 0.027,
    "c_freq": 198,
    "c_pf": 1,
    "c_voltage": 0,
    "n_current": None,
    "total_act_power": 1847.8,
    "total_aprt_power": 2506.0,
    "total_current": 11.054,
}
EMDATA = {
    "id": 0,
    "a_total_act_energy": 3105576.42,
    "a_total_act_ret_energy": 0.0,
    "b_total_act_energy": 195765.72,
    "b_total_act_ret_energy": 131881.85,
    "c_total_act_energy": 0,
    "c_total_act_ret_energy": 0,
    "total_act": 3301342.14,
    "total_act_ret": 131881.85,
}
# The rows that these make, without time and device.
PHASES = [
    ("em:0:a", 2166.2, 227.0, 9.592, 3105576.42, 0.0),
    ("em:0:b", -318.4, 230.0, 1.435, 195765.72, 131881.85),
    ("em:0:c", 0.0, 0.0, 0.027, 0.0, 0.0),
]


class MeterChannel(NamedTuple):
    """A channel of a meter, and where its device puts the values."""

    # The key of the component with its power.
    component: str
    # The key of the one with its counters.
    data_component: str
    # The start of each field's name.
    prefix: str
    channel: str

    def says(
        self, method: str | None = "NotifyStatus", **fields: Any
    ) -> dict[str, Any]:
        """A frame with these fields, each in its component. With method=None it's an
        answer to Shelly.GetStatus."""
        components: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            key = self.component
            if name.startswith("total_"):
                key = self.data_component
            components.setdefault(key, {"id": 0})[self.prefix + name] = value
        if method is not None:
            return notify(components, METER, method)
        return {"id": 2, "src": METER, "dst": "collector", "result": components}


POWER = {"act_power": 100.0, "voltage": 230.0, "current": 0.5}
COUNTER = {"total_act_energy": 1000.0, "total_act_ret_energy": 50.0}
CLAMP = MeterChannel("em1:1", "em1data:1", "", "em1:1")
PHASE = MeterChannel("em:0", "emdata:0", "b_", "em:0:b")
of_both_kinds = pytest.mark.parametrize("meter", [CLAMP, PHASE], ids=["clamp", "phase"])


# ---- Waiting
async def wait_for(condition: Callable[[], Any], timeout_s: float = 15) -> Any:
    """Call `condition`, which may be a coroutine function, until its result is true.
    Return that result; fail after the timeout."""
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
    """A port that stays free until it's used: below the range from which the system takes
    ports for outgoing connections."""
    for number in NUMBERS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = 10_000 + (os.getpid() * 97 + number) % 20_000
            probe.bind(("127.0.0.1", port))
            return port


class Running:
    """A collector in a process and a folder of its own."""

    def __init__(
        self, folder: Path, env: dict[str, str], user: str | None = None
    ) -> None:
        self.folder = folder
        self.as_user: dict[str, Any] = {}
        if user is not None:
            self.as_user = {"user": user, "group": user, "extra_groups": []}
        self.port = int(env.get("PORT") or free_port())
        base = {}
        for name in ("PATH", "HOME"):
            if name in os.environ:
                base[name] = os.environ[name]
        quiet = {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            # With an interval of a day, no new interval starts during a test and adds a
            # row. A test about intervals sets its own.
            "THROTTLE_INTERVAL_SECONDS": "86400",
        }
        self.env = base | quiet | env
        self.log_path = folder / f"log-{next(NUMBERS)}.txt"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(ROOT / "shelly_collector.py")]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                **self.as_user,
            )

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def get(
        self, path: str = "/", method: str = "GET", **headers: str
    ) -> tuple[int, str]:
        """The status and text of an HTTP answer."""
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()

    async def health(self) -> dict[str, str]:
        """The lines of the health page by name; none while it does not answer yet."""
        try:
            _, text = await asyncio.to_thread(self.get)
        except OSError:
            assert self.process.poll() is None, self.log
            return {}
        return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)

    async def ready(self, database: str = "connected") -> "Running":
        """Wait until the health page says this of the database."""

        async def has_it() -> bool:
            return (await self.health()).get("database", "").startswith(database)

        await wait_for(has_it, 30)
        return self

    async def stop(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Send it a signal. Return its exit status and the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        status = await asyncio.to_thread(self.process.wait, 20)
        return status, time.monotonic() - began

    async def again(self) -> "Running":
        """Start it once more, in the same folder and on the same port."""
        self.process = self.start()
        return self


@contextlib.contextmanager
def starting_collectors(
    folders: pytest.TempPathFactory,
) -> Iterator[Callable[..., Running]]:
    """A function that starts collectors. At the end they are killed, and none may have
    logged a traceback."""
    started: list[Running] = []

    def start(
        folder: Path | None = None, user: str | None = None, **env: str
    ) -> Running:
        folder = folder or folders.mktemp("collector")
        started.append(Running(folder, env, user))
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
        assert "Traceback" not in running.log or "EXPECTED_BUG" in running.log, (
            running.log
        )


async def run_script(
    folder: Path, *arguments: str, **env: str
) -> tuple[int | None, str, str]:
    """Run the collector's script until it ends. Return its exit status, standard output
    and standard error."""
    base = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        ROOT / "shelly_collector.py",
        *arguments,
        cwd=folder,
        env=base | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, out.decode(), err.decode()


# ---- Devices, and a bare server for them
class Peer:
    """A device's end of a socket."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket

    async def send(self, *frames: Any) -> None:
        """Send frames; text and bytes go out as they are."""
        for frame in frames:
            if not isinstance(frame, str | bytes):
                frame = json.dumps(frame)
            await self.websocket.send(frame)


@contextlib.asynccontextmanager
async def device(url: str, **options: Any) -> Any:
    """A connected device that has read the collector's two requests."""
    defaults = {"ping_interval": None, "compression": None, "close_timeout": 2}
    async with connect(url, **(defaults | options)) as websocket:
        assert await websocket.recv() == ENABLE_NOTIFICATIONS
        assert await websocket.recv() == GET_STATUS
        yield Peer(websocket)


@contextlib.asynccontextmanager
async def listening(
    frames: list[Any], ends: Callable[[], bool] = lambda: False
) -> AsyncIterator[str]:
    """The URL of a bare server that sends both requests and appends what comes to
    `frames`. It hangs up when `ends` says so."""

    async def take(websocket: ServerConnection) -> None:
        for number, method in (2, "Shelly.GetStatus"), (3, "Shelly.GetConfig"):
            request = {"id": number, "src": "collector", "method": method}
            await websocket.send(json.dumps(request))
        async for text in websocket:
            frames.append(json.loads(text))
            if ends():
                return

    async with serve(take, "127.0.0.1", 0, compression=None) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"


# ---- PostgreSQL
def let_server_pass(folder: Path) -> pwd.struct_passwd | None:
    """Let the server's user reach `folder` and the programs. Return that user."""
    user = server_user(folder)
    if user is not None:
        open_for_passing(folder, user.pw_uid)
        open_for_passing(programs(), user.pw_uid)
    return user


class Postgres:
    """A server from the wheel's programs that a test may crash, freeze and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = let_server_pass(folder)
        make_ready(folder, self.user)
        self.url = conninfo(folder)
        self.start()

    def start(self) -> None:
        make_ready(self.folder, self.user)
        options = child_options(self.user, subprocess.DEVNULL)
        self.server = psutil.Popen(server_command(self.folder), **options)
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
    """A TCP proxy in front of a server's socket, which can be slow, or swallow what it
    should pass on, as a network does that drops every packet."""

    def __init__(self, socket_path, delay_s=0.0):
        self.socket_path = socket_path
        self.delay_s = delay_s
        # Connections that never answer again.
        self.holes = set()
        # Whatever passes from now on is swallowed.
        self.black = False
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
        """Let new connections through. Those that lost data never answer again."""
        self.black = False

    async def carry(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        self.writers.append(writer)
        there, back = await asyncio.open_unix_connection(self.socket_path)
        self.writers.append(back)
        await asyncio.gather(
            self.pump(task, reader, back), self.pump(task, there, writer)
        )

    async def pump(self, carrier, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.black:
                    self.holes.add(carrier)
                if self.delay_s:
                    asyncio.get_running_loop().call_later(
                        self.delay_s, writer.write, data
                    )
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


def query(database: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """The rows that a statement returns."""
    with psycopg.connect(database, autocommit=True) as conn:
        return conn.execute(statement, values or None).fetchall()


def read_rows(
    database: str, columns: str = "*", order: str = "device_id, channel, timestamp"
) -> list[tuple[Any, ...]]:
    """The rows of power_logs; none as long as there is no table."""
    with psycopg.connect(database, autocommit=True) as conn:
        try:
            return conn.execute(
                f"SELECT {columns} FROM power_logs ORDER BY {order}"
            ).fetchall()
        except psycopg.errors.UndefinedTable:
            return []


VALUES = "device_id, channel, apower_w, voltage_v, current_a, energy_total_wh"
ALL_VALUES = VALUES + ", energy_returned_wh"


async def wait_for_rows(
    database: str, count: int, timeout_s: float = 15
) -> list[tuple[Any, ...]]:
    """Wait until there are `count` rows, and return their VALUES."""
    await wait_for(lambda: len(read_rows(database, "1", "1")) >= count, timeout_s)
    rows = read_rows(database, VALUES)
    assert len(rows) == count, rows
    return rows


def sql_of_docs(page: str, heading: str) -> str:
    """The first SQL below a heading of a page of the docs, as an owner copies it."""
    _, _, section = (ROOT / "docs" / page).read_text().partition(f"# {heading}\n")
    _, _, block = section.partition("```sql\n")
    return block.partition("```")[0]


def join_ids(old_id: str, new_id: str) -> str:
    """What the docs say to run for a device that has a new id, with these ids."""
    statement = sql_of_docs("table.md", "A device that has a new id")
    for name, value in (("old_id", old_id), ("new_id", new_id)):
        statement, count = re.subn(
            f"{name} TEXT := '.*'", f"{name} TEXT := '{value}'", statement
        )
        assert count == 1
    return statement


# The table of the first system, which this collector has taken over.
ORIGINAL_TABLE = """
CREATE TABLE power_logs (id SERIAL PRIMARY KEY, timestamp TIMESTAMPTZ NOT NULL, device_id VARCHAR(100) NOT NULL,
 channel VARCHAR(20) NOT NULL, apower_w FLOAT NOT NULL, voltage_v FLOAT NOT NULL, current_a FLOAT NOT NULL,
 energy_total_wh FLOAT NOT NULL, created_at TIMESTAMPTZ DEFAULT NOW());
CREATE INDEX idx_power_logs_timestamp ON power_logs(timestamp);
CREATE INDEX idx_power_logs_device_channel ON power_logs(device_id, channel);
"""


# ---- Doors to the code: settings, frames in, rows out
def settings(**env: str) -> Settings:
    """Settings from these environment variables."""
    return read_settings(env)


def new_collector(**env: str) -> Collector:
    """A collector's state, without server and writer, for these environment
    variables."""
    return make_collector(settings(**env))


class Link(DeviceConnection):
    """A connection that is not open, so what it is asked goes nowhere."""

    def __init__(self) -> None:
        super().__init__(ServerProtocol(), None)  # type: ignore[arg-type]
        self.name = "127.0.0.1"
        self.devices = set()
        self.requests = Requests()


def exchange(collector: Collector, link: Link, frame: Any, now: float) -> bool:
    """Let the collector take a device's frame. Return whether it asks for the status."""
    take_message(collector, link, json.dumps(frame), now)
    return link.requests.sent_at.get(GET_STATUS) == now


def look(collector: Collector, link: Link, now: float) -> bool:
    """Look, as the collector does every second, whether a device is to be asked for its
    status. Return whether it is asked."""
    collector.links = {link}
    ask_silent_devices(collector, now)
    return link.requests.sent_at.get(GET_STATUS) == now


def feed(collector: Collector, frame: Any, now: float, link: Any = None) -> bool:
    """Let the collector take a frame when the server's clock says `now`. Return whether
    it would then ask the device for something."""
    text = frame
    if not isinstance(frame, str | bytes):
        text = json.dumps(frame)
    request = take_frame(collector, link or Link(), text, now)
    return request is not None


def taken(collector: Collector) -> list[Row]:
    """Take the rows that have come out since the last call."""
    return drain(collector.outbox)


def values_taken(collector: Collector) -> list[tuple[Any, ...]]:
    """The same as seconds since NOON and the five values."""
    return [(row.time - NOON, *row[3:]) for row in taken(collector)]


def expire(collector: Collector, now: float = math.inf) -> None:
    """Release the rows whose deadline (monotonic) has come by `now`, as the collector
    itself does four times a second."""
    for channel in collector.channels.values():
        release_complete_rows(collector, channel, now)


def assert_nothing_waits(collector: Collector) -> None:
    """Fail if a row still waits for a value."""
    expire(collector)
    assert not taken(collector)


async def stop_writer(collector: Collector, task: "asyncio.Task[None]") -> None:
    """Stop write_batches as the end of the process does, and close what it has open."""
    collector.stopping = True
    collector.outbox.arrived.set()
    ended, _ = await asyncio.wait({task}, timeout=5)
    task.cancel()
    assert ended and task.exception() is None
    await close_pools(collector)
    collector.outbox.close()


async def close_pools(collector: Collector) -> None:
    """Close the connections to the database. Left open, their tasks would be reported in
    a later test."""
    for pool in (collector.pool, collector.query_pool):
        if pool is not None:
            await pool.close()


def known_channels(collector: Collector) -> set[tuple[str, str]]:
    """The device and name of each channel that the collector knows values of."""
    known = collector.channels.values()
    return {(channel.device_id, channel.key) for channel in known}


def replace_names(monkeypatch: Any, **values: Any) -> None:
    """Replace constants or functions of the product for one test, in each module that
    has the name."""
    modules = [module for module in sys.modules.values() if is_product(module)]
    for name, value in values.items():
        owners = [module for module in modules if hasattr(module, name)]
        assert owners, f"no module of the product has {name}"
        for module in owners:
            monkeypatch.setattr(module, name, value)


def is_product(module: Any) -> bool:
    return Path(getattr(module, "__file__", None) or "/").parent == ROOT


# ---- Rows on their way
ROWS = [
    Row(60.0 * n, "device", "switch:0", float(n), 230.0, 0.5, 9.0) for n in range(5000)
]


def fill(outbox: Outbox, rows: Iterable[Row]) -> Outbox:
    """Append rows to an outbox, and return it."""
    for row in rows:
        outbox.append(row)
    return outbox


def drain(outbox: Outbox, limit: int = 1000) -> list[Row]:
    """Take all rows out of an outbox, batch by batch as the writer does."""
    rows: list[Row] = []
    while outbox:
        batch = outbox.oldest(limit)
        rows += batch.rows
        outbox.remove(batch)
    return rows


# The outbox file of a version that did not know returned energy.
OLD_OUTBOX = """
PRAGMA auto_vacuum = FULL;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA user_version = 1;
CREATE TABLE IF NOT EXISTS rows (
    id INTEGER PRIMARY KEY,
    time, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh
)
"""
OLD_ROWS = [
    (NOON + 60.0 * n, "old", "switch:0", float(n), 230.0, 0.5, 9.0) for n in range(20)
]
# Rows of a device that says now and then what was given back.
RETURNED_WH = [None, 7.0, 0.0, None] * 5
RETURNED_ROWS = [
    Row(NOON + 60.0 * n, "new", "em1:0", float(n), 230.0, 0.5, 9.0, wh)
    for n, wh in enumerate(RETURNED_WH)
]


def old_outbox(folder: Path) -> sqlite3.Connection:
    """Make such a file with OLD_ROWS. Return the connection to it, which is still
    open."""
    folder.mkdir(exist_ok=True)
    file = sqlite3.connect(folder / "outbox.sqlite3", isolation_level=None)
    file.executescript(OLD_OUTBOX)
    file.executemany("INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", OLD_ROWS)
    return file


@contextlib.contextmanager
def open_outbox(folder: Path, rows: Iterable[Row] = ()) -> Iterator[Outbox]:
    """Claim a folder for an outbox with these rows, and close it at the end."""
    outbox = Outbox(folder)
    outbox.claim()
    try:
        yield fill(outbox, rows)
    finally:
        outbox.close()
