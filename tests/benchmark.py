#!/usr/bin/env python3
"""Measure what the collector costs.

    python tests/benchmark.py            # all but village, some ten minutes
    python tests/benchmark.py fleet      # one of them

    stream   processor time per frame: minute frames and deltas as fast as they are
             taken, nearly all of them throttled
    idle     memory per connected device, the client offering compression
    start    from the start of the process until GET / answers 200, and the memory it
             then has
    burst    20,000 rows at once, until the last is visible
    latency  one frame at a time, from the send until its row is visible
    fleet    100, 1,000 and 10,000 devices of four channels, and as many as descriptors
             allow, that all report at the full minute
    table    speed of inserts, of "one channel, last 24 h" and of newest_rows() with one
             channel dead for 44 days, in a table of 1 and 5 million rows, and bytes per
             row; and the page's questions about 45 days of one device
    village  the page's questions over HTTP, from quarters and from rows, the best of
             five: forty devices and --days, one device and three years, 1,000 devices
             and a day, each in a database of its own that fill.py fills; some ten
             minutes

The first three are measured beside a bare websockets server that only counts frames,
which shows the library's own limit. Its rounds and the collector's take turns, as the
machine may be shared; the report shows medians.

Where there are two cores or more, the collector runs on the first, and the load on the
others. Needs Linux.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import psutil
import psycopg
from psycopg import sql
from websockets.asyncio.client import ClientConnection, connect

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fill  # noqa: E402
import raw_client  # noqa: E402
from raw_client import (  # noqa: E402
    CHANNELS_OF_A_DEVICE,
    connect_many,
    delta,
    hang_up,
    minute_frame,
    push,
    this_minute,
)

import answers  # noqa: E402
from outbox import BATCH_SIZE  # noqa: E402
from settings import read_settings  # noqa: E402
from shelly_collector import FIRST_ROW_WINS, INSERT  # noqa: E402
from support import Postgres, free_port  # noqa: E402

CORES = psutil.cpu_count() or 1
PORT = free_port()

BARE_SERVER = f"""
import asyncio
from websockets.asyncio.server import serve

frames = 0

async def count(websocket):
    global frames
    async for frame in websocket:
        frames += 1

def answer(connection, request):
    if request.path == "/":
        return connection.respond(200, f"{{frames}}\\n")

async def main():
    options = dict(compression=None, process_request=answer)
    async with serve(count, "127.0.0.1", {PORT}, **options) as server:
        await server.serve_forever()

asyncio.run(main())
"""

# What a scenario measured: a value by the name of its figure.
Figures = dict[str, float]


# ---- Servers -----------------------------------------------------------------
class Server:
    """The collector or the bare server, as a process on the first core."""

    def __init__(self, process: subprocess.Popen[bytes], ready_s: float) -> None:
        self.process = psutil.Process(process.pid)
        self.ready_s = ready_s

    def cpu(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def rss(self) -> int:
        return self.process.memory_info().rss

    def has_devices(self) -> bool:
        return any(
            connection.status == "ESTABLISHED" and connection.laddr.port == PORT
            for connection in self.process.net_connections()
        )


def make_table(conn: psycopg.Connection) -> None:
    """Make an empty power_logs, whatever was there before."""
    conn.execute("DROP TABLE IF EXISTS power_logs")
    conn.execute("DROP TABLE IF EXISTS power_quarters, quarter_marks CASCADE")
    conn.execute((ROOT / "schema.sql").read_bytes())


@contextlib.contextmanager
def server(name: str, dsn: str, interval_s: float = 60) -> Iterator[Server]:
    """Start the `collector` with an empty table, or the `bare` server."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        make_table(conn)
        conn.execute("CHECKPOINT")
    with server_of_table(name, dsn, interval_s) as one:
        yield one


@contextlib.contextmanager
def server_of_table(name: str, dsn: str, interval_s: float = 60) -> Iterator[Server]:
    """Start the same with the table as it is."""
    if name == "bare":
        command = [sys.executable, "-c", BARE_SERVER]
        stderr = subprocess.DEVNULL
    else:
        command = [sys.executable, str(ROOT / "shelly_collector.py")]
        stderr = None
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "DATABASE_URL": dsn,
            "PORT": str(PORT),
            "HOST": "127.0.0.1",
            "DATA_DIR": folder,
            "THROTTLE_INTERVAL_SECONDS": str(interval_s),
            "LOG_LEVEL": "ERROR",
        }
        began = time.perf_counter()
        process = subprocess.Popen(command, env=env, cwd=folder, stderr=stderr)
        try:
            if CORES > 1:
                psutil.Process(process.pid).cpu_affinity([0])
            while not health_has(""):
                if process.poll() is not None:
                    raise SystemExit(f"the {name} server has ended")
                time.sleep(0.003)
            ready_s = time.perf_counter() - began
            while name == "collector" and not health_has("database: connected"):
                time.sleep(0.01)
            yield Server(process, ready_s)
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server; a collector that many devices have just left needs its time."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def health_has(text: str) -> bool:
    """Return whether GET / answers 200, with `text` in its body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=2) as response:
            return response.status == 200 and text in response.read().decode()
    except (urllib.error.URLError, OSError):
        return False


async def reached(dsn: str, query: str, want: int, limit_s: float = 120) -> None:
    """Return once the number that `query` gives is as large as `want`."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        end = time.perf_counter() + limit_s
        number = 0
        while time.perf_counter() < end:
            cursor = await conn.execute(query.encode())
            (number,) = await cursor.fetchone() or (0,)
            if number >= want:
                return
            await asyncio.sleep(0.01)
    raise SystemExit(f"only {number} of {want} rows came")


# ---- One server and some devices ---------------------------------------------
async def stream(one: Server, dsn: str) -> Figures:
    devices = 50
    pushes = 20
    frames = 200
    rnd = random.Random(1)
    clients = await connect_many(devices, PORT)
    loads = [stream_load(number, frames, rnd) for number in range(devices)]
    before = one.cpu()
    for _ in range(pushes):
        await push(clients, loads)
    await hang_up(clients)
    busy = await cpu_when_done(one)
    return {
        "processor time per frame, µs": (busy - before)
        / (devices * pushes * frames)
        * 1e6
    }


def stream_load(number: int, frames: int, rnd: random.Random) -> bytes:
    """Return what one device sends: all channels first, then a minute frame in ten."""
    device = f"shellypro4pm-{number:012x}"
    load = [minute_frame(device, CHANNELS_OF_A_DEVICE, rnd, this_minute())]
    for count in range(1, frames):
        channel = count % 4
        if count % 10 == 0:
            load.append(minute_frame(device, (channel,), rnd, this_minute()))
        else:
            load.append(delta(device, channel, rnd))
    return b"".join(load)


async def cpu_when_done(one: Server) -> float:
    """Return the processor time once the server has read all, and seen the end."""
    busy = -1.0
    while one.cpu() != busy or one.has_devices():
        busy = one.cpu()
        await asyncio.sleep(0.2)
    return busy


async def idle(one: Server, dsn: str) -> Figures:
    devices = 2000
    before = one.rss()
    clients = await connect_many(devices, PORT, deflate=True)
    loads = []
    for number in range(devices):
        device = f"shellypro4pm-{number:012x}"
        rnd = random.Random(number)
        loads.append(minute_frame(device, CHANNELS_OF_A_DEVICE, rnd, this_minute()))
    await push(clients, loads)
    await asyncio.sleep(4)
    memory = one.rss() - before
    await hang_up(clients)
    return {"memory per idle connection, KiB": memory / devices / 1024}


async def start(one: Server, dsn: str) -> Figures:
    await asyncio.sleep(1)
    return {
        "start until GET / is 200, ms": one.ready_s * 1000,
        "memory at start, MiB": one.rss() / 2**20,
    }


async def burst(one: Server, dsn: str) -> Figures:
    rows = 20_000
    rnd = random.Random(1)
    clients = await connect_many(50, PORT)
    loads = []
    for client in range(50):
        devices = [f"burst-{client}-{number}" for number in range(100)]
        frames = [
            minute_frame(device, CHANNELS_OF_A_DEVICE, rnd, this_minute())
            for device in devices
        ]
        loads.append(b"".join(frames))
    began = time.perf_counter()
    await push(clients, loads)
    await reached(dsn, "SELECT count(*) FROM power_logs", rows)
    took = time.perf_counter() - began
    await hang_up(clients)
    return {"rows per second, burst of 20,000": rows / took}


async def latency(one: Server, dsn: str) -> Figures:
    query = "SELECT 1 FROM power_logs WHERE device_id = %s"
    clients = await connect_many(1, PORT)
    took = []
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        for number in range(200):
            device = f"latency-{number}"
            frame = minute_frame(device, (0,), random.Random(number), this_minute())
            began = time.perf_counter()
            await push(clients, [frame])
            row = None
            while row is None:
                cursor = await conn.execute(query, [device])
                row = await cursor.fetchone()
            took.append(time.perf_counter() - began)
            await asyncio.sleep(0.01)
    await hang_up(clients)
    return {"from send to visible row, median, ms": statistics.median(took) * 1000}


# ---- A fleet -----------------------------------------------------------------
FLEETS = [100, 1_000, 10_000]

# Five intervals of 10 s are two rounds of the collector's pings, one every 25 s.
FLEET_INTERVALS = 5

# A process of clients with more devices than that would be short of the ports of its
# loopback address, some 28,000, or of its descriptors.
MOST_DEVICES_PER_PROCESS = 10_000

# What the collector and the clients need beside a descriptor for each device.
OTHER_DESCRIPTORS = 100

# The largest fleet unless --devices says more: the clients need memory, too.
LARGEST_FLEET = 30_000


async def fleet(one: Server, dsn: str, devices: int, interval_s: int) -> Figures:
    """Measure a fleet that reports, a frame per channel, all at the same moment."""
    rows_per_interval = devices * len(CHANNELS_OF_A_DEVICE)
    sent_after: list[float] = []
    visible_after: list[float] = []
    busy: list[float] = []
    async with client_processes(devices) as processes:
        first_moment = await prepare(processes, interval_s)
        moment = first_moment
        cpu_at_first = one.cpu()
        for turn in range(1, FLEET_INTERVALS + 1):
            if turn > 1:
                moment = await prepare(processes, interval_s)
            cpu_before = one.cpu()
            await tell(processes, "send", "sent")
            sent_after.append(time.time() - moment)
            await all_rows_visible(dsn, turn * rows_per_interval)
            visible_after.append(time.time() - moment)
            busy.append(one.cpu() - cpu_before)
        await asyncio.sleep(moment + interval_s - time.time())
        observed_s = time.time() - first_moment
        busy_beside_rows = one.cpu() - cpu_at_first - sum(busy)
        memory = one.rss()
    return {
        "rows per interval": rows_per_interval,
        "until the clients have sent all, s": statistics.median(sent_after),
        "until the last row is visible, s": statistics.median(visible_after),
        "processor time per interval, s": statistics.median(busy),
        "core busy with rows, one interval a minute, %": statistics.median(busy)
        / 60
        * 100,
        "core busy with pings, %": busy_beside_rows / observed_s * 100,
        "memory, MiB": memory / 2**20,
    }


def most_devices() -> int:
    """Return how many devices the collector has descriptors for, in thousands."""
    return (raw_client.use_all_descriptors() - OTHER_DESCRIPTORS) // 1000 * 1000


@contextlib.asynccontextmanager
async def client_processes(
    devices: int,
) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Start as many processes of raw_client.py as the fleet takes."""
    processes: list[asyncio.subprocess.Process] = []
    try:
        for first in range(0, devices, MOST_DEVICES_PER_PROCESS):
            options = {
                "--port": PORT,
                "--address": f"127.0.0.{len(processes) + 2}",
                "--first": first,
                "--count": min(MOST_DEVICES_PER_PROCESS, devices - first),
            }
            words = [str(word) for option in options.items() for word in option]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                raw_client.__file__,
                *words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            processes.append(process)
            await hear(process, "connected")
        yield processes
        for process in processes:
            process.stdin.close()
            await process.wait()
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def hear(process: asyncio.subprocess.Process, answer: str) -> None:
    line = await process.stdout.readline()
    if line.decode().strip() != answer:
        raise SystemExit("the clients ended before their time")


async def tell(
    processes: list[asyncio.subprocess.Process], command: str, answer: str
) -> None:
    """Give all processes a command; return when all have done it."""
    for process in processes:
        process.stdin.write(f"{command}\n".encode())
    for process in processes:
        await hear(process, answer)


async def prepare(
    processes: list[asyncio.subprocess.Process], interval_s: int
) -> float:
    """Have the next interval's frames made; return the moment at which it starts."""
    ahead_s = 1
    while True:
        moment = (int(time.time()) + ahead_s) // interval_s * interval_s + interval_s
        await tell(processes, f"prepare {moment}", "ready")
        if time.time() < moment:
            return moment
        # They were not ready in time, which would be measured as the collector's delay.
        ahead_s *= 2


async def all_rows_visible(dsn: str, rows: int) -> None:
    # To count the rows of a large fleet over and over would slow their insertion. Where
    # the numbers of rows have come to is known at once.
    await reached(dsn, "SELECT last_value FROM power_logs_id_seq", rows)
    await reached(dsn, "SELECT count(*) FROM power_logs", rows)


# ---- A long table ------------------------------------------------------------
TABLE_CHANNELS = 400
TABLE_START = 1_700_000_040

FILL_TABLE = """
INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a,
                        energy_total_wh, energy_returned_wh)
SELECT to_timestamp(%(start)s + 60 * minute),
       'shellypro4pm-' || lpad(to_hex(c / 4), 12, '0'), 'switch:' || c %% 4,
       433.8 + c, 228.2, 2.631, minute, 0
FROM generate_series(0, %(minutes)s - 1) minute,
     generate_series(0, %(channels)s - 1) c
-- The last channel died early.
WHERE c < %(channels)s - 1 OR minute < %(minutes_of_the_dead)s
"""

LAST_DAY_OF_A_CHANNEL = """
SELECT timestamp, apower_w FROM power_logs
WHERE device_id = %s AND channel = %s AND timestamp > to_timestamp(%s)
"""


def table(dsn: str, millions: int) -> Figures:
    """Measure a table that has a row a minute of each channel.

    It is filled by SQL, then used as the collector and its reader do.
    The last channel has been dead for 44 days; where the table is shorter than that,
    this channel has the first few rows only.
    """
    minutes = millions * 1_000_000 // TABLE_CHANNELS
    with psycopg.connect(dsn, autocommit=True) as conn:
        make_table(conn)
        values = {
            "start": TABLE_START,
            "minutes": minutes,
            "channels": TABLE_CHANNELS,
            "minutes_of_the_dead": max(10, minutes - 44 * 1440),
        }
        rows = conn.execute(FILL_TABLE, values).rowcount
        conn.execute("VACUUM ANALYZE power_logs")
        cursor = conn.execute("SELECT pg_total_relation_size('power_logs')")
        (size,) = cursor.fetchone() or (0,)
        end = TABLE_START + 60 * minutes
        inserts_s: list[float] = []
        last_day_s: list[float] = []
        for turn in range(50):
            inserts_s.append(time_of_insert(conn, turn, end))
            last_day_s.append(time_of_last_day(conn, turn, end, minutes))
        newest_s = [time_of_newest_rows(conn) for _ in range(11)]
    return {
        "inserts, rows per second": BATCH_SIZE / statistics.median(inserts_s),
        "one channel, last 24 h, ms": statistics.median(last_day_s) * 1000,
        "newest row of 400 channels, one long dead, ms": statistics.median(newest_s)
        * 1000,
        "bytes per row with indexes": size / rows,
        "a year of a four-channel device, GB": size / rows * 4 * 525_600 / 1e9,
    }


def time_of_insert(conn: psycopg.Connection, turn: int, end: int) -> float:
    """Insert the next batch of rows behind the table's end, as the collector does."""
    living = TABLE_CHANNELS - 1
    batch = []
    for number in range(turn * BATCH_SIZE, (turn + 1) * BATCH_SIZE):
        minute, channel = divmod(number, living)
        device = f"shellypro4pm-{channel // 4:012x}"
        values = (1.0, 2.0, 3.0, 4.0, 0.0)
        batch.append((end + 60 * minute, device, f"switch:{channel % 4}", *values))
    columns = [array_text(column) for column in zip(*batch, strict=True)]
    began = time.perf_counter()
    conn.execute(INSERT + FIRST_ROW_WINS, columns)
    return time.perf_counter() - began


def array_text(values: tuple[object, ...]) -> str:
    """Return PostgreSQL's text of an array: JSON's, in other brackets."""
    return "{" + msgspec.json.encode(values)[1:-1].decode() + "}"


def time_of_last_day(
    conn: psycopg.Connection, turn: int, end: int, minutes: int
) -> float:
    device = f"shellypro4pm-{turn:012x}"
    began = time.perf_counter()
    cursor = conn.execute(LAST_DAY_OF_A_CHANNEL, [device, "switch:1", end - 86400])
    rows = cursor.fetchall()
    took = time.perf_counter() - began
    assert len(rows) >= min(1440, minutes) - 1
    return took


def time_of_newest_rows(conn: psycopg.Connection) -> float:
    began = time.perf_counter()
    rows = conn.execute("SELECT * FROM newest_rows()").fetchall()
    took = time.perf_counter() - began
    assert len(rows) == TABLE_CHANNELS
    return took


# ---- The page's questions ----------------------------------------------------
DAYS = 45
WINDOW = {"since": "2026-01-01 00:00+00", "until": "2026-02-15 00:00+00"}

# About one device of four channels, as the page asks.
QUESTIONS = {
    "runs of a device, ms": "power_cycles(since => %(since)s, until => %(until)s)",
    "chart of its power, ms": "power_series(since => %(since)s, until => %(until)s)",
    "its energy per day, ms": (
        "energy_by_day(since => %(since)s, until => %(until)s, zone => 'Europe/Paris')"
    ),
    "what is missing of it, ms": "coverage(since => %(since)s, until => %(until)s)",
}

# Each channel runs for 18 minutes of every hour, not all of them at the same time.
FILL_DAYS = """
INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a,
                        energy_total_wh, energy_returned_wh)
SELECT %(since)s::timestamptz + m * INTERVAL '1 minute',
       'shellypro4pm-' || lpad(to_hex(c / 4), 12, '0'), 'switch:' || c %% 4,
       CASE WHEN minute_of_hour < 18 THEN 800 + c ELSE 0 END,
       226 + m %% 9,
       CASE WHEN minute_of_hour < 18 THEN 3.5 ELSE 0 END,
       ((m + c * 7) / 60 * 18 + least(minute_of_hour, 18)) * (800.0 + c) / 60,
       0
FROM generate_series(0, %(minutes)s - 1) m,
     generate_series(0, %(channels)s - 1) c,
     LATERAL (SELECT (m + c * 7) %% 60) o (minute_of_hour)
"""


def questions(dsn: str, millions: float) -> Figures:
    """Measure questions about one device, in a table with so many others beside it."""
    rows_of_a_device = DAYS * 1440 * 4
    devices = max(1, round(millions * 1_000_000 / rows_of_a_device))
    with psycopg.connect(dsn, autocommit=True) as conn:
        rows = fill_with_days(conn, devices)
        result = {"rows, millions": rows / 1e6}
        # As the collector sets them for the page's questions.
        conn.execute("SET jit = off")
        conn.execute("SET max_parallel_workers_per_gather = 0")
        conn.execute("SET work_mem = '32MB'")
        for name, call in QUESTIONS.items():
            took = []
            for number in range(5):
                device = f"shellypro4pm-{(number * 7 + 1) % devices:012x}"
                took.append(time_of_question(conn, call, device))
            result[name] = statistics.median(took) * 1000
    return result


def fill_with_days(conn: psycopg.Connection, devices: int) -> int:
    """Fill the table with 45 days of devices; return the number of rows."""
    make_table(conn)
    # Indexes are made when the rows are there, which is quicker.
    conn.execute("ALTER TABLE power_logs DROP CONSTRAINT power_logs_pkey")
    conn.execute("DROP INDEX idx_power_logs_timestamp")
    conn.execute("DROP INDEX idx_power_logs_device_channel")
    conn.execute("DROP INDEX power_logs_one_row_per_interval")
    conn.execute("SET maintenance_work_mem = '256MB'")
    values = {
        "since": WINDOW["since"],
        "minutes": DAYS * 1440,
        "channels": devices * 4,
    }
    rows = conn.execute(FILL_DAYS, values).rowcount
    conn.execute((ROOT / "schema.sql").read_bytes())
    conn.execute("VACUUM ANALYZE power_logs")
    return rows


def time_of_question(conn: psycopg.Connection, call: str, device: str) -> float:
    query = f"SELECT * FROM {call} WHERE device_id = %(device)s"
    began = time.perf_counter()
    rows = conn.execute(query.encode(), WINDOW | {"device": device}).fetchall()
    took = time.perf_counter() - began
    assert len(rows) >= 4
    return took


# ---- The largest answers -----------------------------------------------------
# Questions about MANY_RUNS, in which each row is a bucket and a run.
LARGEST_ANSWERS = {
    "power.json": "step=600",
    "power.csv": "step=600",
    "cycles.json": "min_duration=0&row_length=60",
    "cycles.csv": "min_duration=0&row_length=60",
}
MANY_RUNS = """
INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a,
                        energy_total_wh)
SELECT to_timestamp(1600000200 + 600 * n),
       'shellypro4pm-' || lpad(to_hex(device), 12, '0'), 'switch:0',
       433.8 + device + n * 0.1, 228.2, 2.631, n * 13.37
FROM generate_series(1, 10000) n, generate_series(1, 10) device
"""


async def largest_answer(one: Server, dsn: str, name: str) -> Figures:
    """Measure an answer of 100,000 rows of a collector that has just started."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(MANY_RUNS)
        conn.execute("VACUUM ANALYZE power_logs")
    parameters = f"token=look&since=2020-01-01&until=2024-01-01&{LARGEST_ANSWERS[name]}"
    url = f"http://127.0.0.1:{PORT}/data/{name}?{parameters}"
    device_url = f"ws://127.0.0.1:{PORT}/ws"
    async with connect(device_url, compression=None, ping_interval=None) as peer:
        pause = asyncio.create_task(asyncio.sleep(2))
        idle_s = await longest_ping(peer, pause)
        before = one.rss()
        began = time.perf_counter()
        fetching = asyncio.create_task(asyncio.to_thread(fetch, url))
        held_s = await longest_ping(peer, fetching)
        took_s = time.perf_counter() - began
    return {
        "size, MB": fetching.result() / 1e6,
        "time until it is there, s": took_s,
        "longest ping meanwhile, ms": held_s * 1000,
        "longest ping without a question, ms": idle_s * 1000,
        "memory that it takes, MB": (peak_rss(one) - before) / 1e6,
    }


async def longest_ping(peer: ClientConnection, work: "asyncio.Task[Any]") -> float:
    """Return the longest wait for an answer, asking every millisecond during `work`."""
    longest_s = 0.0
    while not work.done():
        began = time.perf_counter()
        await (await peer.ping())
        longest_s = max(longest_s, time.perf_counter() - began)
        await asyncio.sleep(0.001)
    return longest_s


def fetch(url: str) -> int:
    """Return how many bytes a URL answers."""
    with urllib.request.urlopen(url, timeout=20) as response:
        return len(response.read())


def peak_rss(one: Server) -> int:
    """Return the most memory that the process ever had, in bytes."""
    status = Path(f"/proc/{one.process.pid}/status").read_text()
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not say how much memory a process had")


# ---- A village ---------------------------------------------------------------
ZONE = ZoneInfo("Europe/Paris")
DAY = timedelta(days=1)
TRIES = 5


class PageQuestion(NamedTuple):
    """A question as the page asks it."""

    title: str
    # As in /data/NAME.json.
    name: str
    parameters: dict[str, str]


class VillageTable(NamedTuple):
    """A table, and what is asked about it."""

    title: str
    plan: fill.Plan
    questions: list[PageQuestion]


class Refused(Exception):
    """The collector did not answer with rows; the text says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def from_moment(time_: datetime) -> dict[str, str]:
    return {"since": time_.isoformat()}


def from_midnight(time_: datetime, zone: ZoneInfo = ZONE) -> dict[str, str]:
    """Return since when the page asks for energies: from midnight on."""
    midnight = time_.astimezone(zone).replace(hour=0, minute=0)
    return {"since": midnight.isoformat(), "zone": zone.key}


def late_zone(time_: datetime) -> ZoneInfo:
    """Return a zone in which it is after 23:00: there, today is nearly a whole day."""
    hours = 23 - time_.astimezone(UTC).hour
    if hours > 14:
        hours -= 24
    # The sign of these zones is the other way round.
    return ZoneInfo(f"Etc/GMT{-hours:+d}")


def many_devices(days: int) -> VillageTable:
    until = fill.this_minute()
    since = from_moment(until - days * DAY)
    since_midnight = from_midnight(until - days * DAY)
    device = {"device": fill.device_id_of(7)}
    # About as many buckets as the page has room for beside so many channels.
    step = {"step": str(days * 240)}
    return VillageTable(
        f"40 devices, {days} days",
        fill.Plan(days=days, devices=40, channels=4, until=until, seed=1),
        [
            PageQuestion("energy per day of all", "energy", since_midnight),
            PageQuestion("coverage of all", "coverage", since),
            PageQuestion("gaps of all", "gaps", since),
            PageQuestion("chart of all, no step", "power", since),
            PageQuestion("chart of all, a step of the page", "power", since | step),
            PageQuestion("energy per day of one", "energy", since_midnight | device),
            PageQuestion("coverage of one", "coverage", since | device),
            PageQuestion("chart of one, no step", "power", since | device),
        ],
    )


def many_years() -> VillageTable:
    until = fill.this_minute()
    days = 3 * 365
    return VillageTable(
        "one device, three years",
        fill.Plan(days=days, devices=1, channels=4, until=until, seed=1),
        [
            PageQuestion("months", "months", from_midnight(until - days * DAY)),
            PageQuestion("energy per day", "energy", from_midnight(until - days * DAY)),
            PageQuestion(
                "chart of a year, no step", "power", from_moment(until - 365 * DAY)
            ),
        ],
    )


def many_channels() -> VillageTable:
    until = fill.this_minute()
    return VillageTable(
        "1,000 devices, a day",
        fill.Plan(days=1, devices=1000, channels=4, until=until, seed=1),
        [
            PageQuestion("newest rows", "channels", {}),
            PageQuestion(
                "energy of today, late in the evening",
                "energy",
                from_midnight(until, late_zone(until)),
            ),
        ],
    )


def village(dsn: str, table: VillageTable) -> list[list[str]]:
    """Measure a table; return the report's lines: question, from quarters, from rows."""
    with own_database(dsn) as own_dsn:
        progress(f"{table.title}: filling")
        began = time.perf_counter()
        rows = fill.fill(own_dsn, table.plan)
        fill_s = time.perf_counter() - began
        with psycopg.connect(own_dsn, autocommit=True) as conn:
            conn.execute("VACUUM ANALYZE power_logs")
            conn.execute("CHECKPOINT")
        with server_of_table("collector", own_dsn):
            progress(f"{table.title}: waiting for the quarters")
            wait_for_quarters()
            from_quarters = best_of_each(own_dsn, table, "quarters")
            answer_from_rows(own_dsn)
            from_rows = best_of_each(own_dsn, table, "rows")
    filled = f"{rows / 1e6:.1f} million rows, filled in {fill_s:.0f} s"
    lines = [[f"**{table.title}**, {filled}", "", ""]]
    titles = [question.title for question in table.questions]
    for line in zip(titles, from_quarters, from_rows, strict=True):
        lines.append(list(line))
    return lines


@contextlib.contextmanager
def own_database(dsn: str) -> Iterator[str]:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE DATABASE village")
        try:
            yield psycopg.conninfo.make_conninfo(dsn, dbname="village")
        finally:
            conn.execute("DROP DATABASE village WITH (FORCE)")


def wait_for_quarters() -> None:
    """Return once the running collector has made the quarters of all rows."""
    while not health_has("quarters: all made"):
        time.sleep(1)


# What functions see of the quarters where a role may not read the table.
NO_QUARTERS = """
CREATE OR REPLACE VIEW readable_quarter_state AS
SELECT made_until AS usable_until, final_until FROM quarter_state WHERE false
"""


def answer_from_rows(dsn: str) -> None:
    """Have all questions answered from rows from now on."""
    with psycopg.connect(dsn) as conn:
        conn.execute(NO_QUARTERS)


def best_of_each(dsn: str, table: VillageTable, source: str) -> list[str]:
    """Return the best time of each question in ms, or why it was refused."""
    best = []
    for question in table.questions:
        progress(f"{table.title}, from {source}: {question.title}")
        try:
            best.append(best_of_tries(time_over_http, question))
        except Refused as exc:
            best.append(refused(dsn, question, exc))
    return best


def best_of_tries(measure_s: Callable[..., float], *arguments: Any) -> str:
    """Return the shortest time of all tries as a text, in ms."""
    return number_text(min(measure_s(*arguments) for _ in range(TRIES)) * 1000)


def refused(dsn: str, question: PageQuestion, exc: Refused) -> str:
    """Return why a question was refused, and how long it takes in SQL, once: it may be a
    minute."""
    if exc.status == 404:
        return "not there yet"
    in_sql = number_text(time_in_sql(dsn, question) * 1000)
    reason = str(exc).removeprefix("No answer: ").partition(":")[0]
    return f"{exc.status} {reason} ({in_sql} in SQL)"


def time_over_http(question: PageQuestion) -> float:
    """Return how long the whole answer takes to come; raises Refused."""
    query = urllib.parse.urlencode({"token": "look"} | question.parameters)
    url = f"http://127.0.0.1:{PORT}/data/{question.name}.json?{query}"
    began = time.perf_counter()
    try:
        fetch(url)
    except urllib.error.HTTPError as exc:
        with exc:
            raise Refused(exc.code, exc.read().decode().strip()) from None
    return time.perf_counter() - began


def time_in_sql(dsn: str, question: PageQuestion) -> float:
    """Return how long the very statement of the collector takes without its timeout.

    It keeps the collector's limit of rows: with another one, PostgreSQL may choose
    another plan."""
    values = answers.values_in_force(read_settings({})) | question.parameters
    call = answers.QUESTIONS[question.name].call
    query = answers.SELECT.format(sql.SQL(call))
    with psycopg.connect(dsn) as conn:
        conn.execute(answers.BEGIN_QUESTION)
        conn.execute("SET LOCAL statement_timeout = 0")
        began = time.perf_counter()
        conn.execute(query, values, prepare=False)
        return time.perf_counter() - began


# ---- The report --------------------------------------------------------------
def progress(text: str) -> None:
    """Show what is being measured, in a line that the next one overwrites."""
    print(f"\r{text:78}", end="", file=sys.stderr, flush=True)


def number_text(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def show(head: list[str], lines: list[list[str]]) -> None:
    """Print a table that can be pasted into a Markdown file."""
    progress("")
    print()
    print("| " + " | ".join(head) + " |")
    print("|---|" + "---:|" * (len(head) - 1))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print(flush=True)


def show_columns(title: str, columns: dict[str, Figures]) -> None:
    """Print figures side by side, a column for each size that was measured."""
    names = next(iter(columns.values()))
    lines = []
    for name in names:
        values = [number_text(figures[name]) for figures in columns.values()]
        lines.append([name, *values])
    show([title, *columns], lines)


def machine() -> str:
    processor = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(": ")[2]
                break
    return f"{processor}, {CORES} cores, Python {platform.python_version()}"


# ---- Rounds, and main --------------------------------------------------------
Scenario = Callable[[Server, str], Coroutine[None, None, Figures]]

SCENARIOS: dict[str, Scenario] = {
    "stream": stream,
    "idle": idle,
    "start": start,
    "burst": burst,
    "latency": latency,
}

# The bare server has no rows.
OF_THE_COLLECTOR_ALONE = ("burst", "latency")


def rounds_of(name: str, dsn: str, rounds: int) -> list[list[str]]:
    """Run a scenario; return the report's lines: figure, collector, bare, ratio."""
    collector: list[Figures] = []
    bare: list[Figures] = []
    for number in range(1, rounds + 1):
        if name not in OF_THE_COLLECTOR_ALONE:
            progress(f"{name}, round {number} of {rounds}: bare")
            with server("bare", dsn) as one:
                bare.append(asyncio.run(SCENARIOS[name](one, dsn)))
        progress(f"{name}, round {number} of {rounds}: collector")
        with server("collector", dsn) as one:
            collector.append(asyncio.run(SCENARIOS[name](one, dsn)))
    lines = []
    for figure in collector[0]:
        values = [figures[figure] for figures in collector]
        bare_values = [figures[figure] for figures in bare]
        lines.append([figure, *compared(values, bare_values)])
    return lines


def compared(values: list[float], bare_values: list[float]) -> list[str]:
    """Return the median of both, and of their ratios, round by round."""
    text = number_text(statistics.median(values))
    if not bare_values:
        return [text, "", ""]
    pairs = zip(values, bare_values, strict=True)
    ratio = statistics.median(value / bare_value for value, bare_value in pairs)
    return [text, number_text(statistics.median(bare_values)), f"{ratio:.2f}"]


def measure(chosen: str, dsn: str, args: argparse.Namespace) -> None:
    lines = []
    for name in SCENARIOS:
        if chosen in (name, "all"):
            lines += rounds_of(name, dsn, args.rounds)
    if lines:
        show(["", "collector", "bare server", "ratio"], lines)
    if chosen in ("fleet", "all"):
        measure_fleets(dsn, args.devices, args.interval)
    if chosen in ("table", "all"):
        measure_tables(dsn, args.millions)
    if chosen in ("answers", "all"):
        measure_answers(dsn, args.rounds)
    if chosen == "village":
        measure_village(dsn, args.days)


def measure_fleets(dsn: str, sizes: list[int], interval_s: int) -> None:
    columns = {}
    for devices in sizes:
        progress(f"fleet of {devices:,} devices")
        with server("collector", dsn, interval_s) as one:
            figures = asyncio.run(fleet(one, dsn, devices, interval_s))
        columns[f"{devices:,} devices"] = figures
    show_columns("", columns)


def measure_tables(dsn: str, sizes: list[int]) -> None:
    columns = {}
    for millions in sizes:
        progress(f"table of {millions} million rows")
        columns[f"{millions} million rows"] = table(dsn, millions)
    show_columns("", columns)
    columns = {}
    for millions in sizes:
        progress(f"{DAYS} days in a table of {millions} million rows")
        columns[f"{millions} million rows"] = questions(dsn, millions)
    show_columns(f"the last {DAYS} days", columns)


def measure_answers(dsn: str, rounds: int) -> None:
    """Measure the largest answers; each has a collector of its own."""
    os.environ["DASHBOARD_TOKEN"] = "look"
    columns = {}
    for name in LARGEST_ANSWERS:
        measured = []
        for number in range(rounds):
            progress(f"answers, round {number + 1} of {rounds}: {name}")
            with server("collector", dsn) as one:
                measured.append(asyncio.run(largest_answer(one, dsn, name)))
        columns[name] = {
            figure: statistics.median(figures[figure] for figures in measured)
            for figure in measured[0]
        }
    show_columns("100,000 rows", columns)


def measure_village(dsn: str, days: int) -> None:
    """Measure three tables, one after the other; each has a collector of its own."""
    os.environ["DASHBOARD_TOKEN"] = "look"
    lines = village(dsn, many_devices(days))
    lines += village(dsn, many_years())
    lines += village(dsn, many_channels())
    show(["ms, the best of five", "from quarters", "from rows"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["all", *SCENARIOS, "fleet", "table", "answers", "village"]
    parser.add_argument("scenario", nargs="?", default="all", choices=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, nargs="+", help="for fleet")
    parser.add_argument("--interval", type=int, default=10, help="seconds, for fleet")
    parser.add_argument(
        "--millions", type=int, nargs="+", default=[1, 5], help="of rows, for table"
    )
    parser.add_argument("--days", type=int, default=45, help="for village")
    args = parser.parse_args()
    if args.devices is None:
        largest = min(LARGEST_FLEET, most_devices())
        smaller = [devices for devices in FLEETS if devices < largest]
        args.devices = [*smaller, largest]
    if max(args.devices) > most_devices():
        parser.error(f"descriptors (ulimit -n) are enough for {most_devices()} devices")
    with tempfile.TemporaryDirectory() as folder:
        progress("starting PostgreSQL")
        postgres = Postgres(Path(folder) / "postgres")
        try:
            if CORES > 1:
                psutil.Process().cpu_affinity(list(range(1, CORES)))
            show([machine()], [])
            measure(args.scenario, postgres.url, args)
        finally:
            postgres.stop()


if __name__ == "__main__":
    main()
