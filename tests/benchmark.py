#!/usr/bin/env python3
"""What the collector costs, measured beside a bare websockets server that only counts: the library's own limit.

    python tests/benchmark.py            # all scenarios, about five minutes
    python tests/benchmark.py fleet      # one of them

    stream   processor time per frame: minute frames and deltas as fast as they are taken, nearly all throttled
    idle     memory per connected device, the client offering compression
    start    from the start of the process until GET / answers 200, and the memory it then has
    burst    20,000 rows at once, until the last is visible
    latency  one frame at a time, from the send until its row is visible
    fleet    100, 1,000 and 10,000 devices of four channels that all report at the full minute
    table    speed of inserts, of "one channel, last 24 h" and of newest_rows() with one channel dead for 44 days, in a
             table of 1 and 5 million rows, bytes per row; and the page's questions about 45 days of one device

Collector and load each have a core where there are two. The rounds of collector and bare server take turns, as the
machine may be shared; the table shows medians. Needs Linux.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import psycopg

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import shelly_collector as sc  # noqa: E402
from support import Postgres  # noqa: E402

PORT = 5733
BARE = f"""
import asyncio
from websockets.asyncio.server import serve
frames = 0
async def count(websocket):
    global frames
    async for frame in websocket:
        frames += 1
def answer(connection, request):
    return connection.respond(200, f"{{frames}}\\n") if request.path == "/" else None
async def main():
    async with serve(count, "127.0.0.1", {PORT}, compression=None, process_request=answer) as server:
        await server.serve_forever()
asyncio.run(main())
"""


def masked(text: str) -> bytes:
    """A client's text frame as it goes over the wire."""
    payload, mask = text.encode(), b"\x11\x22\x33\x44"
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
    key = (mask * (len(payload) // 4 + 1))[: len(payload)]
    body = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return b"\x81" + size + mask + body.to_bytes(len(payload), "big")


def minute_frame(device: str, channels: tuple[int, ...], rnd: random.Random) -> bytes:
    minute = int(time.time()) // 60 * 60
    component = {
        "aenergy": {
            "by_minute": [7035.312, 7161.568, 7514.251],
            "minute_ts": minute,
            "total": round(rnd.random() * 9999, 3),
        },
        "apower": round(rnd.uniform(11, 2000), 1),
        "aprtpower": 438.0,
        "current": round(rnd.random() * 9, 3),
        "freq": 50.0,
        "pf": 0.8,
        "ret_aenergy": {"by_minute": [0.0, 0.0, 0.0], "minute_ts": minute, "total": 0.0},
        "voltage": 228.2,
    }
    params = {"ts": time.time(), **{f"switch:{channel}": component for channel in channels}}
    return masked(json.dumps({"src": device, "dst": "ws", "method": "NotifyStatus", "params": params}))


def delta(device: str, channel: int, rnd: random.Random) -> bytes:
    component = {"apower": round(rnd.uniform(11, 2000), 1), "current": round(rnd.random() * 9, 3)}
    params = {"ts": time.time(), f"switch:{channel}": component}
    return masked(json.dumps({"src": device, "dst": "ws", "method": "NotifyStatus", "params": params}))


class Server:
    """The collector or the bare server, as a process on the first core."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], ready_s: float) -> None:
        self.name, self.process, self.ready_s = name, psutil.Process(process.pid), ready_s

    def cpu(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def rss(self) -> int:
        return self.process.memory_info().rss


@contextlib.contextmanager
def server(name: str, dsn: str, interval_s: float = 60) -> Iterator[Server]:
    """A started server; for the collector the table is made anew before."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("DROP TABLE IF EXISTS power_logs")
        conn.execute((ROOT / "schema.sql").read_bytes())
        conn.execute("CHECKPOINT")
    command = [sys.executable, "-c", BARE] if name == "bare" else [sys.executable, str(ROOT / "shelly_collector.py")]
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"DATABASE_URL": dsn, "PORT": str(PORT), "HOST": "127.0.0.1", "DATA_DIR": folder}
        env |= {"THROTTLE_INTERVAL_SECONDS": str(interval_s), "LOG_LEVEL": "ERROR"}
        began = time.perf_counter()
        process = subprocess.Popen(command, env=env, cwd=folder, stderr=subprocess.DEVNULL if name == "bare" else None)
        try:
            if CORES > 1:
                psutil.Process(process.pid).cpu_affinity([0])
            while not answers():
                time.sleep(0.003)
            ready_s = time.perf_counter() - began
            while name == "collector" and not answers("database: connected"):
                time.sleep(0.01)
            yield Server(name, process, ready_s)
        finally:
            process.terminate()
            process.wait(20)


def answers(text: str = "") -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=2) as response:
            return response.status == 200 and text in response.read().decode()
    except (urllib.error.URLError, OSError):
        return False


async def connect(deflate: bool = False) -> asyncio.StreamWriter:
    """A connected device that ignores what it is sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    key = base64.b64encode(os.urandom(16)).decode()
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n" if deflate else ""
    writer.write(
        f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{PORT}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{offer}\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")

    async def drain() -> None:
        with contextlib.suppress(OSError):
            while await reader.read(65536):
                pass

    writer.draining = asyncio.create_task(drain())  # type: ignore[attr-defined]
    return writer


async def connect_many(count: int, deflate: bool = False) -> list[asyncio.StreamWriter]:
    writers: list[asyncio.StreamWriter] = []
    while len(writers) < count:
        writers += await asyncio.gather(*(connect(deflate) for _ in range(min(100, count - len(writers)))))
    return writers


async def push(writers: list[asyncio.StreamWriter], loads: list[bytes]) -> None:
    for writer, load in zip(writers, loads, strict=True):
        writer.write(load)
    await asyncio.gather(*(writer.drain() for writer in writers))


async def hang_up(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.close()
    await asyncio.gather(*(writer.draining for writer in writers))  # type: ignore[attr-defined]


async def rows_visible(dsn: str, sql: str, want: int, limit_s: float = 120) -> float:
    """The time at which a count reached what is wanted."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        end = time.perf_counter() + limit_s
        while time.perf_counter() < end:
            cursor = await conn.execute(sql)  # type: ignore[call-overload]
            (count,) = await cursor.fetchone()
            if count >= want:
                return time.perf_counter()
            await asyncio.sleep(0.01)
    raise SystemExit(f"only {count} of {want} rows came")


async def stream(one: Server, dsn: str) -> dict[str, float]:
    rnd, frames = random.Random(1), 200
    writers = await connect_many(50)
    loads = []
    for n in range(50):
        device = f"shellypro4pm-{n:012x}"
        load = [minute_frame(device, (0, 1, 2, 3), rnd)]
        for k in range(1, frames):
            load.append(minute_frame(device, (k % 4,), rnd) if k % 10 == 0 else delta(device, k % 4, rnd))
        loads.append(b"".join(load))
    before = one.cpu()
    for _ in range(20):
        await push(writers, loads)
    await hang_up(writers)  # the server has read all when it has seen the end
    busy = one.cpu()
    while (now := one.cpu()) != busy or (
        one.process.net_connections()
        and any(c.status == "ESTABLISHED" and c.laddr.port == PORT for c in one.process.net_connections())
    ):
        busy = now
        await asyncio.sleep(0.2)
    return {"processor time per frame, µs": (busy - before) / (50 * 20 * frames) * 1e6}


async def idle(one: Server, dsn: str) -> dict[str, float]:
    before, count = one.rss(), 2000
    writers = await connect_many(count, deflate=True)
    await push(writers, [minute_frame(f"shellypro4pm-{n:012x}", (0, 1, 2, 3), random.Random(n)) for n in range(count)])
    await asyncio.sleep(4)
    result = {"memory per idle connection, KiB": (one.rss() - before) / count / 1024}
    await hang_up(writers)
    return result


async def start(one: Server, dsn: str) -> dict[str, float]:
    await asyncio.sleep(1)
    return {"start until GET / is 200, ms": one.ready_s * 1000, "memory at start, MiB": one.rss() / 2**20}


async def burst(one: Server, dsn: str) -> dict[str, float]:
    rnd, tag = random.Random(1), f"b{random.randrange(10**9)}"
    writers = await connect_many(50)
    loads = [b"".join(minute_frame(f"{tag}-{n}-{k}", (0, 1, 2, 3), rnd) for k in range(100)) for n in range(50)]
    began = time.perf_counter()
    await push(writers, loads)
    done = await rows_visible(dsn, f"SELECT count(*) FROM power_logs WHERE device_id LIKE '{tag}-%'", 20_000)
    await hang_up(writers)
    return {"rows per second, burst of 20,000": 20_000 / (done - began)}


async def latency(one: Server, dsn: str) -> dict[str, float]:
    (writer,), tag, took = await connect_many(1), f"l{random.randrange(10**9)}", []
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        for n in range(200):
            frame = minute_frame(f"{tag}-{n}", (0,), random.Random(n))
            began = time.perf_counter()
            writer.write(frame)
            while not await (
                await conn.execute("SELECT 1 FROM power_logs WHERE device_id = %s", [f"{tag}-{n}"])
            ).fetchone():
                pass
            took.append(time.perf_counter() - began)
            await asyncio.sleep(0.01)
    await hang_up([writer])
    return {"from send to visible row, median, ms": statistics.median(took) * 1000}


async def fleet(one: Server, dsn: str, devices: int, interval_s: float) -> dict[str, float]:
    """Three intervals of a fleet of four-channel devices, a frame per channel, all at the same moment."""
    writers = await connect_many(devices)
    spent: list[float] = []
    late: list[float] = []
    for turn in range(3):
        rnd = random.Random(turn)
        names = [f"shellypro4pm-{n:012x}" for n in range(devices)]
        loads = [b"".join(minute_frame(name, (channel,), rnd) for channel in range(4)) for name in names]
        await asyncio.sleep(interval_s - time.time() % interval_s)
        full, before = time.perf_counter(), one.cpu()
        await push(writers, loads)
        late.append(await rows_visible(dsn, "SELECT count(*) FROM power_logs", 4 * devices * (turn + 1)) - full)
        spent.append(one.cpu() - before)
    result = {
        "rows per interval": 4.0 * devices,
        "until the last row is visible, s": statistics.median(late),
        "processor time per interval, s": statistics.median(spent),
        "core busy at a minute's interval, %": statistics.median(spent) / 60 * 100,
        "memory, MiB": one.rss() / 2**20,
    }
    await hang_up(writers)
    return result


def table(dsn: str, millions: int) -> dict[str, float]:
    """A table of channels with a row a minute each, filled by SQL, then used as the collector and its reader do.

    The last channel has been dead for 44 days; where the table is shorter it has its first few rows only.
    """
    channels = 4 * 100
    minutes, living = millions * 1_000_000 // channels, channels - 1
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("DROP TABLE IF EXISTS power_logs")
        conn.execute((ROOT / "schema.sql").read_bytes())
        rows = conn.execute(
            "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh,"
            " energy_returned_wh)"
            " SELECT to_timestamp(1700000040 + 60 * minute), 'shellypro4pm-' || lpad(to_hex(c / 4), 12, '0'),"
            " 'switch:' || c %% 4, 433.8 + c, 228.2, 2.631, minute, 0 FROM generate_series(0, %s) minute, generate_series(0, %s) c"
            " WHERE c < %s OR minute < %s",
            [minutes - 1, channels - 1, living, max(10, minutes - 44 * 1440)],
        ).rowcount
        conn.execute("VACUUM ANALYZE power_logs")
        size = conn.execute("SELECT pg_total_relation_size('power_logs')").fetchone()
        assert size is not None
        speeds, looks, newest, first = [], [], [], 1_700_000_040.0 + 60 * minutes
        for turn in range(50):
            batch = []
            for n in range(turn * sc.BATCH, (turn + 1) * sc.BATCH):
                minute, c = divmod(n, living)
                device, channel = f"shellypro4pm-{c // 4:012x}", f"switch:{c % 4}"
                batch.append(sc.Row(first + 60 * minute, device, channel, 1.0, 2.0, 3.0, 4.0, 0.0))
            columns = ["{" + msgspec.json.encode(column)[1:-1].decode() + "}" for column in zip(*batch, strict=True)]
            began = time.perf_counter()
            conn.execute(sc.INSERT, columns)
            speeds.append(sc.BATCH / (time.perf_counter() - began))
            began = time.perf_counter()
            found = conn.execute(
                "SELECT timestamp, apower_w FROM power_logs WHERE device_id = %s AND channel = %s AND timestamp > to_timestamp(%s)",
                [f"shellypro4pm-{turn:012x}", "switch:1", first - 86400],
            ).fetchall()
            looks.append(time.perf_counter() - began)
            assert len(found) >= min(1440, minutes) - 1
        for _ in range(11):
            began = time.perf_counter()
            found = conn.execute("SELECT * FROM newest_rows()").fetchall()
            newest.append(time.perf_counter() - began)
            assert len(found) == channels
    return {
        "inserts, rows per second": statistics.median(speeds),
        "one channel, last 24 h, ms": statistics.median(looks) * 1000,
        "newest row of 400 channels, one long dead, ms": statistics.median(newest) * 1000,
        "bytes per row with indexes": size[0] / rows,
        "a year of a four-channel device, GB": size[0] / rows * 4 * 525_600 / 1e9,
    }


DAYS = 45
QUESTIONS = {  # about one device of four channels, as the page asks
    "runs of a device, ms": "power_cycles(since => %(since)s, until => %(until)s)",
    "chart of its power, ms": "power_series(since => %(since)s, until => %(until)s)",
    "its energy per day, ms": "energy_by_day(since => %(since)s, until => %(until)s, zone => 'Europe/Paris')",
    "what is missing of it, ms": "coverage(since => %(since)s, until => %(until)s)",
}


def questions(dsn: str, millions: float) -> dict[str, float]:
    """Questions about 45 days of one device, in a table of so many devices that it has these rows.

    Each channel runs 18 minutes of every hour. The indexes are made when the rows are there, which is quicker.
    """
    devices = max(1, round(millions * 1_000_000 / (DAYS * 1440 * 4)))
    window = {"since": "2026-01-01 00:00+00", "until": "2026-02-15 00:00+00"}
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("DROP TABLE IF EXISTS power_logs")
        conn.execute((ROOT / "schema.sql").read_bytes())
        conn.execute("ALTER TABLE power_logs DROP CONSTRAINT power_logs_pkey")
        for index in ("idx_power_logs_timestamp", "idx_power_logs_device_channel", "power_logs_one_row_per_interval"):
            conn.execute(f"DROP INDEX {index}")
        conn.execute("SET maintenance_work_mem = '256MB'")
        rows = conn.execute(
            "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh,"
            " energy_returned_wh)"
            " SELECT %s::timestamptz + m * INTERVAL '1 minute', 'shellypro4pm-' || lpad(to_hex(c / 4), 12, '0'), 'switch:' || c %% 4,"
            " CASE WHEN on_m < 18 THEN 800 + c ELSE 0 END, 226 + m %% 9, CASE WHEN on_m < 18 THEN 3.5 ELSE 0 END,"
            " ((m + c * 7) / 60 * 18 + least(on_m, 18)) * (800.0 + c) / 60, 0"
            " FROM generate_series(0, %s) m, generate_series(0, %s) c, LATERAL (SELECT (m + c * 7) %% 60) o (on_m)",
            [window["since"], DAYS * 1440 - 1, devices * 4 - 1],
        ).rowcount
        conn.execute((ROOT / "schema.sql").read_bytes())
        conn.execute("VACUUM ANALYZE power_logs")
        conn.execute(
            "SET jit = off; SET max_parallel_workers_per_gather = 0; SET work_mem = '32MB'"
        )  # as power_answer does
        result = {"rows, millions": rows / 1e6}
        for name, call in QUESTIONS.items():
            took = []
            for number in range(5):
                device = f"shellypro4pm-{(number * 7 + 1) % devices:012x}"
                began = time.perf_counter()
                found = conn.execute(
                    f"SELECT * FROM {call} WHERE device_id = %(device)s", window | {"device": device}
                ).fetchall()
                took.append(time.perf_counter() - began)
                assert len(found) >= 4
            result[name] = statistics.median(took) * 1000
    return result


def say(text: str) -> None:
    print(f"\r{text:78}", end="", file=sys.stderr, flush=True)


def beside_bare(dsn: str, scenario: Any, rounds: int) -> list[list[str]]:
    """Rows of the report: figure, collector, bare server, median ratio of the rounds."""
    measured: dict[str, list[tuple[float, float | None]]] = {}
    for number in range(rounds):
        found: dict[str, dict[str, float]] = {"bare": {}}
        for name in ("collector",) if scenario in (burst, latency) else ("bare", "collector"):
            say(f"{scenario.__name__}, round {number + 1} of {rounds}: {name}")
            with server(name, dsn) as one:
                found[name] = asyncio.run(scenario(one, dsn))
        for figure, value in found["collector"].items():
            measured.setdefault(figure, []).append((value, found["bare"].get(figure)))
    report = []
    for figure, pairs in measured.items():
        bare = [there for _, there in pairs if there is not None]
        ratio = f"{statistics.median(here / there for here, there in pairs if there):.2f}" if bare else ""
        collected = statistics.median(here for here, _ in pairs)
        report.append([figure, number_text(collected), number_text(statistics.median(bare)) if bare else "", ratio])
    return report


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(head: list[str], report: list[list[str]]) -> None:
    """A table that can be pasted into docs/measured.md."""
    say("")
    print("\r| " + " | ".join(head) + " |\n|---|" + "---:|" * (len(head) - 1))
    for line in report:
        print("| " + " | ".join(line) + " |")
    print(flush=True)


def side_by_side(columns: dict[str, dict[str, float]]) -> list[list[str]]:
    figures = next(iter(columns.values()))
    return [[figure, *(number_text(column[figure]) for column in columns.values())] for figure in figures]


def machine() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(': ')[2]}, {CORES} cores, Python {platform.python_version()}"
    return f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}"


def measure(chosen: str, dsn: str, args: argparse.Namespace) -> None:
    scenarios = {"stream": stream, "idle": idle, "start": start, "burst": burst, "latency": latency}
    report = []
    for name, scenario in scenarios.items():
        if chosen in (name, "all"):
            report += beside_bare(dsn, scenario, args.rounds)
    if report:
        show(["", "collector", "bare server", "ratio"], report)
    if chosen in ("fleet", "all"):
        columns = {}
        for devices in args.devices:
            say(f"fleet of {devices:,} devices")
            with server("collector", dsn, args.interval) as one:
                columns[f"{devices:,} devices"] = asyncio.run(fleet(one, dsn, devices, args.interval))
        show(["", *columns], side_by_side(columns))
    if chosen in ("table", "all"):
        columns = {}
        for millions in args.millions:
            say(f"table of {millions} million rows")
            columns[f"{millions} million rows"] = table(dsn, millions)
        show(["", *columns], side_by_side(columns))
        columns = {}
        for millions in args.millions:
            say(f"{DAYS} days in a table of {millions} million rows")
            columns[f"{millions} million rows"] = questions(dsn, millions)
        show([f"the last {DAYS} days", *columns], side_by_side(columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["all", "stream", "idle", "start", "burst", "latency", "fleet", "table"]
    parser.add_argument("scenario", nargs="?", default="all", choices=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1_000, 10_000], help="for fleet")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds, for fleet")
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 5], help="of rows, for table")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        say("starting PostgreSQL")
        postgres = Postgres(Path(folder) / "postgres")
        try:
            if CORES > 1:
                psutil.Process().cpu_affinity([1])
            show([machine()], [])
            measure(args.scenario, postgres.url, args)
        finally:
            postgres.stop()


CORES = psutil.cpu_count() or 1

if __name__ == "__main__":
    main()
