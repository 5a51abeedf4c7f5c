#!/usr/bin/env python3
"""Shelly collector: keeps one row per metered channel per minute in PostgreSQL.

The path of a reading:

    device ── wss ──▶ handle_device ─▶ take_frame ─▶ decode_frame ─▶ merge into
                                                                    known status
                                                                         │
    write_batches ◀── outbox ◀── release_complete_rows ◀── should_write ◀┘
          │
          └─ one INSERT per batch ─▶ power_logs ─▶ SQL functions ─▶ answers.py ─▶ owner
                                         │              ▲
                                         └─▶ quarters ──┘

frame      one JSON text message of a device, e.g.
           {"src":"shellypro4pm-a1b2c3d4e5f6","method":"NotifyStatus","params":{…}}
component  a part of a device, by its key: switch:2
channel    a metered component of one device: shellypro4pm-a1b2c3d4e5f6 switch:2; each
           phase of a three-phase meter is one: em:0:a
reading    what a frame says of one channel: {"apower":433.8,"current":2.631}
counter    energy in Wh since the device was new: aenergy.total
minute     the frame that a device sends each full minute, with its counter and the
frame      minute that it means (minute_ts)
whole      all fields of a device: NotifyFullStatus, or the answer to Shelly.GetStatus;
status     any other frame has only what has changed
interval   THROTTLE_INTERVAL_SECONDS, normally a minute of the clock
row        what is known of a channel at its first reading of an interval
outbox     rows on their way to the table: in memory while PostgreSQL answers, on disk
           while it does not
quarters   sums of the rows of a quarter of an hour, for questions about long times
filter     a program between device and collector, such as worker/, that lets only some
           frames pass, and may hold frames back
"""

import argparse
import asyncio
import contextlib
import errno
import gc
import logging
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple
from urllib.parse import parse_qsl, unquote

import msgspec
import psycopg
from msgspec import UNSET, Meta, Raw, UnsetType
from psycopg_pool import AsyncConnectionPool
from websockets import (
    CloseCode,
    ConnectionClosed,
    Request,
    Response,
    Server,
    ServerConnection,
    broadcast,
    serve,
)

import database
import local_postgres
from answers import has_token, header, respond
from asking import (
    ENABLE_NOTIFICATIONS,
    GET_CONFIG,
    GET_CONFIG_ID,
    GET_STATUS,
    GET_STATUS_ID,
    Requests,
    moment_of,
)
from backup import MAX_BACKUPS, backup
from check import check, print_device_link
from complaints import Complaints
from database import CONNECTION, DATABASE_ERRORS, one_line, refuses_row, utc, within
from outbox import Batch, BatchSize, Outbox, Row
from process import (
    handle_signals,
    log_loop_error,
    raise_descriptor_limit,
    start_log,
)
from quarters import Quarters, keep_making_quarters
from refusals import Refusals
from settings import (
    Settings,
    links,
    page_token,
    read_env_file,
    read_settings,
    unknown_names,
)
from silence import DAY, NewestRow, follow_newest_rows
from upkeep import Configs, maintain_table
from version import VERSION

log = logging.getLogger("shelly_collector")

# ---- What the protocol fixes, and the limits. Times are seconds. ----

# A minute frame names its minute by the device's clock, which may differ from the
# server's by this much.
MAX_CLOCK_ERROR = 20.0
# Firmware before 1.5 rarely sends the voltage, and some devices rarely send their
# counter. If one is older than this, the device is asked for its whole status.
MAX_AGE = 300.0
# A field that two whole statuses lack, at least this long apart, is one that the device
# does not have. Soon after a boot a field may only be late.
BOOT_TIME = 60.0
# How often to check which devices must be asked.
ASK_TICK = 1.0
# A frame that a filter held back for longer is refused.
MAX_HELD_BACK = 25 * 3600
# Held-back frames that are further apart belong to different outages.
MAX_HELD_BACK_GAP = 300.0
# The numbers of components that are read, unless CHANNELS names some.
ALL_CHANNELS = range(128)
# Devices per connection, against invented ids.
MAX_DEVICES = 1_000
# Channels kept in memory, of about 0.8 kB each.
MAX_CHANNELS = 50_000
# What may wait to be sent to a device.
MAX_UNREAD_BYTES = 2**20
# Rows wait this long in memory before they go to disk. This, and the tick of the task
# that brings them there, is what a kill -9 may cost. Rows that still wait for a value
# are lost, too.
SAVE_AFTER = 0.5
SAVE_TICK = 0.25
# A database that takes longer counts as away.
ANSWER_TIMEOUT = 5.0
# For connecting, and for attempts after a failure: it may be slow, or the table locked.
PATIENT_TIMEOUT = 30.0
# Between two attempts, and between two looks of an idle task at its work.
RETRY = 2.0
# For a peer that does not answer a close. Some platforms allow 3 s for a stop in all.
CLOSE_TIMEOUT = 1.0

SERVE_OPTIONS: dict[str, Any] = {
    # No device compresses, and this would take 40 KiB for each.
    "compression": None,
    # The largest whole status has a few kB.
    "max_size": 2**18,
    # Hosts cut idle connections after 55 s.
    "ping_interval": 25,
    "ping_timeout": 25,
    "close_timeout": CLOSE_TIMEOUT,
}

# ---- Frames: from a text to what a device says; nothing here keeps state ----

# null means that the meter has no value now, UNSET that the frame does not mention it.
# No meter exceeds these bounds, and an average over 1e200 W would overflow.
Measured = Annotated[float, Meta(ge=-1e9, le=1e9)] | UnsetType | None
Counted = Annotated[float, Meta(ge=-1e12, le=1e12)] | UnsetType | None


class Energy(msgspec.Struct, gc=False):
    # Wh
    total: Counted = UNSET
    # The start of the minute that goes on, by the device's clock, in seconds since
    # 1970.
    minute_ts: float | None = None


class Meter(msgspec.Struct, gc=False):
    """A switch, and whatever has its fields."""

    apower: Measured = UNSET
    voltage: Measured = UNSET
    current: Measured = UNSET
    aenergy: Energy | UnsetType | None = UNSET
    # What was given back (solar).
    ret_aenergy: Energy | UnsetType | None = UNSET


class Clamp(msgspec.Struct, gc=False):
    """An em1. Its counters come in a component of their own, em1data."""

    apower: Measured = msgspec.field(default=UNSET, name="act_power")
    voltage: Measured = UNSET
    current: Measured = UNSET
    aenergy: ClassVar[UnsetType] = UNSET
    ret_aenergy: ClassVar[UnsetType] = UNSET


class ClampData(msgspec.Struct, gc=False):
    """An em1data: the counters of the em1 of the same number."""

    apower: ClassVar[UnsetType] = UNSET
    voltage: ClassVar[UnsetType] = UNSET
    current: ClassVar[UnsetType] = UNSET
    aenergy: Counted = msgspec.field(default=UNSET, name="total_act_energy")
    ret_aenergy: Counted = msgspec.field(default=UNSET, name="total_act_ret_energy")


Component = Meter | Clamp | ClampData

# The metered components, by the part of their key before the number. The two halves of
# a clamp, em1 and em1data, are one channel, em1.
COMPONENTS: dict[str, type[Component]] = {
    "switch": Meter,
    "pm1": Meter,
    "cover": Meter,
    "light": Meter,
    "rgb": Meter,
    "rgbw": Meter,
    "cct": Meter,
    "rgbcct": Meter,
    "em1": Clamp,
    "em1data": ClampData,
}
# Three clamps in one component, whose fields begin with the letter of their phase. Each
# phase is a channel: em:0:a.
PHASE_COMPONENTS: dict[str, type[Component]] = {
    "em": Clamp,
    "emdata": ClampData,
}


# The kinds of components that are read, and kinds that may report a power but are not
# meters: breakers, batteries and sensors.
KNOWN_KINDS = {
    *COMPONENTS,
    *PHASE_COMPONENTS,
    "cb",
    "bm",
    "voltmeter",
    "bthomesensor",
    "input",
}
# Whatever else a key is, it should not get into the log.
COMPONENT_KEY = re.compile(r"([a-z0-9_]{1,20}):[0-9]{1,3}")
# A power in the text of a component that is not read: "total_power":433.8
POWER = re.compile(rb'power"\s*:\s*-?[0-9]')


class Frame(msgspec.Struct, gc=False):
    src: str
    # In an answer: the id of the request. A Wall Display's notifications have one, too.
    id: Raw = Raw(b"")
    # Only if a filter held the frame back: when it received it, seconds since 1970.
    received: float | None = None
    method: str | None = None
    # Components by key, and more.
    params: dict[str, Raw] | None = None
    # The same, of an answer.
    result: dict[str, Raw] | None = None
    error: Raw | UnsetType = UNSET


# Raises msgspec.DecodeError, which is a ValueError.
decode_frame: Callable[[str | bytes], Frame] = msgspec.json.Decoder(Frame).decode


Decode = Callable[[Raw], Component]


class ChannelDecoder(NamedTuple):
    """How to read what a component says of one channel."""

    # The channel's key in the table.
    key: str
    # Raises ValueError.
    decode: Decode


def make_decoders(numbers: Collection[int]) -> dict[str, list[ChannelDecoder]]:
    """The decoders of each metered component by its key, such as switch:2."""
    decoders: dict[str, list[ChannelDecoder]] = {}
    for kind, struct in COMPONENTS.items():
        channel = kind.removesuffix("data")
        decode = make_decode(struct)
        for number in numbers:
            decoder = ChannelDecoder(f"{channel}:{number}", decode)
            decoders[f"{kind}:{number}"] = [decoder]
    for kind, struct in PHASE_COMPONENTS.items():
        channel = kind.removesuffix("data")
        phases = {phase: make_decode(prefixed(f"{phase}_", struct)) for phase in "abc"}
        for number in numbers:
            decoders[f"{kind}:{number}"] = [
                ChannelDecoder(f"{channel}:{number}:{phase}", decode)
                for phase, decode in phases.items()
            ]
    return decoders


def make_decode(struct: type[Component]) -> Decode:
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(struct)
    return decoder.decode


def prefixed(prefix: str, struct: type[Component]) -> Any:
    """The same struct for JSON in which each field's name begins with a prefix."""
    fields = []
    for f in msgspec.structs.fields(struct):
        renamed = msgspec.field(default=UNSET, name=prefix + f.encode_name)
        fields.append((f.name, f.type, renamed))
    return msgspec.defstruct(struct.__name__, fields, bases=(struct,), gc=False)


def time_of_held_back(received: float, now: float) -> float:
    """The time that a held-back frame counts for. Raises ValueError."""
    if now - received > MAX_HELD_BACK:
        raise ValueError("received more than 25 hours ago")
    # If the filter's clock runs ahead, this means now.
    return min(now, received)


def is_whole(frame: Frame) -> bool:
    """Whether a frame holds the whole status of a device, not only what has changed."""
    if frame.method is None:
        return bytes(frame.id) == GET_STATUS_ID
    return frame.method == "NotifyFullStatus"


def components_of(frame: Frame) -> dict[str, Raw]:
    """A frame's components by key, none for a frame without readings. Raises
    ValueError."""
    if frame.error is not UNSET:
        return {}
    if frame.method is None:
        components = frame.result
    elif frame.method in ("NotifyStatus", "NotifyFullStatus"):
        # This is looked at before the id: a Wall Display's notifications have one, too.
        components = frame.params
    else:
        return {}
    if components is None:
        raise ValueError("neither a notification nor an answer")
    return components


# ---- State: what main makes and hands on ----
# Times are seconds since 1970 by the server's clock, or the filter's for a frame that
# it held back; those marked monotonic are not.


@dataclass(slots=True)
class PendingRow:
    """A row that may wait for values that the device has not said yet (None)."""

    # When it goes on without them (monotonic).
    deadline: float
    # The start of the interval that it stands for.
    interval: float
    apower_w: float
    voltage_v: float | None
    current_a: float | None
    energy_total_wh: float | None
    energy_returned_wh: float | None


@dataclass(slots=True)
class Channel:
    """The known status of a channel: what the device has said so far (None:
    nothing)."""

    device_id: str
    # The component's key; that of a phase has its letter.
    key: str
    apower_w: float | None = None
    voltage_v: float | None = None
    current_a: float | None = None
    energy_total_wh: float | None = None
    energy_returned_wh: float | None = None
    # When a reading with any value last came.
    heard: float = 0.0
    # The start of its newest interval that has a row in the table.
    newest_row: float = 0.0
    # When a reading last had the voltage, or the counter, even as null.
    voltage_time: float = 0.0
    counter_time: float = 0.0
    # When it was last in a whole status.
    whole_time: float = 0.0
    # Columns that whole statuses lack, with the time of the first one that did.
    lacking: dict[str, float] = field(default_factory=dict)
    # The start of the interval that the newest reading counts for.
    heard_interval: float = 0.0
    # The start of the interval that the newest row stands for.
    last_interval: float = 0.0
    # The device's latest whole status does not have it, as after a change of profile.
    gone: bool = False
    # It is in Collector.held_back.
    held_back: bool = False
    # The newest row was above MIN_POWER_W.
    running: bool = False
    # The log has said which values never came.
    warned: bool = False
    pending: list[PendingRow] = field(default_factory=list)


@dataclass(slots=True)
class Collector:
    """What handlers, writer and health page share."""

    settings: Settings
    outbox: Outbox
    # By component key.
    decoders: dict[str, list[ChannelDecoder]]
    # The keys of all channels that are kept.
    channel_keys: set[str]
    # What devices say of their names, until the table has it.
    configs: Configs
    # For warnings that may come again and again.
    complaints: Complaints
    refusals: Refusals
    quarters: Quarters
    interval_s: float
    # How far from the minute that it names a frame may come. Beyond that the name is
    # ignored.
    clock_error_s: float
    # A frame with a counter that names no minute, and comes at most this long before an
    # interval, counts for that interval.
    early_s: float
    # By channel_id: the device's and the channel's key, without anything between.
    channels: dict[str, Channel] = field(default_factory=dict)
    # The same by device and key.
    devices: dict[str, dict[str, Channel]] = field(default_factory=dict)
    # Frames that a filter held back must not overwrite newer values, so they have a
    # known status of their own.
    held_back: dict[str, Channel] = field(default_factory=dict)
    # The connections of devices.
    links: set["DeviceConnection"] = field(default_factory=set)
    # The embedded server.
    postgres: asyncio.subprocess.Process | None = None
    # None until the database has answered and the table is ready.
    pool: AsyncConnectionPool | None = None
    query_pool: AsyncConnectionPool | None = None
    # The secret of the page's link.
    page_token: str = ""
    # The statement that fits the table, empty until that is known.
    insert: str = ""
    # schema.sql is being applied, which takes long on a long table.
    preparing: bool = False
    # Failures since the last success; a timeout counts as two. Two make an outage.
    failures: int = 0
    # When the first of them came.
    down_since: float = 0.0
    outages: int = 0
    frames: int = 0
    frames_passed_over: int = 0
    rows_written: int = 0
    last_write: float | None = None
    stopping: bool = False


def make_collector(settings: Settings) -> Collector:
    interval_s = settings.throttle_interval_seconds
    decoders = make_decoders(settings.channels or ALL_CHANNELS)
    complaints = Complaints()
    return Collector(
        settings=settings,
        outbox=Outbox(Path(settings.data_dir)),
        decoders=decoders,
        channel_keys={
            decoder.key
            for of_component in decoders.values()
            for decoder in of_component
        },
        configs=Configs(decoders),
        complaints=complaints,
        refusals=Refusals(complaints),
        quarters=Quarters(),
        interval_s=interval_s,
        clock_error_s=min(MAX_CLOCK_ERROR, interval_s / 3),
        early_s=min(0.25, interval_s / 240),
    )


# ---- Known status: a delta is merged into it, a whole status replaces it ----


def merge(channel: Channel, component: Component, full: bool, now: float) -> bool:
    """Merge a reading into the known status, and return whether it has any value.

    null clears a value. A field that is absent keeps its value, except in a `full`
    status, where it is cleared. An energy given back alone is no value, as no row waits
    for it."""
    if full:
        note_lacking(channel, component, now)
        forget(channel, component)
    has_value = False
    apower = component.apower
    if apower is not UNSET:
        channel.apower_w = apower
        has_value = apower is not None
    voltage = component.voltage
    if voltage is not UNSET:
        channel.voltage_v = voltage
        channel.voltage_time = now
        has_value = has_value or voltage is not None
    current = component.current
    if current is not UNSET:
        channel.current_a = current
        has_value = has_value or current is not None
    if component.aenergy is not UNSET:
        drawn = total_of(component.aenergy)
        if drawn is not UNSET:
            channel.energy_total_wh = drawn
            channel.counter_time = now
            has_value = has_value or drawn is not None
    if component.ret_aenergy is not UNSET:
        returned = total_of(component.ret_aenergy)
        if returned is not UNSET:
            channel.energy_returned_wh = returned
    return has_value


def total_of(counter: Energy | Counted) -> Counted:
    """The Wh of a counter, which a meter sends in an object and a clamp as a number."""
    if isinstance(counter, Energy):
        return counter.total
    return counter


def forget(channel: Channel, component: Component) -> None:
    """Clear what this kind of component reports. The other half of a clamp reports the
    rest."""
    if not isinstance(component, ClampData):
        channel.apower_w = None
        channel.voltage_v = None
        channel.current_a = None
    if not isinstance(component, Clamp):
        channel.energy_total_wh = None
        channel.energy_returned_wh = None


# The fields that a row waits for, and their columns.
WAITED_FOR = {
    "voltage": "voltage_v",
    "current": "current_a",
    "aenergy": "energy_total_wh",
}


def note_lacking(channel: Channel, component: Component, now: float) -> None:
    """Note which fields a whole status does not have, such as the voltage of a bulb."""
    channel.whole_time = now
    for name, column in WAITED_FOR.items():
        if name not in component.__struct_fields__:
            # The other half of a clamp reports it.
            continue
        if getattr(component, name) is not UNSET:
            channel.lacking.pop(column, None)
        elif getattr(channel, column) is not None:
            # It has come in the meantime, so this counts as the first.
            channel.lacking[column] = now
        else:
            channel.lacking.setdefault(column, now)


def may_come(channel: Channel, column: str) -> bool:
    """Whether the device may have a value for a column."""
    since = channel.lacking.get(column)
    return since is None or channel.whole_time - since < BOOT_TIME


# ---- Throttle: which readings become rows, and when a row is complete ----


def take_frame(
    collector: Collector, link: "DeviceConnection", text: str | bytes, now: float
) -> str | None:
    """Take a frame's readings, and put the rows that are due into the outbox.

    Returns the request that should be sent next, or None. Raises ValueError."""
    frame = decode_frame(text)
    if frame.received is not None:
        now = time_of_held_back(frame.received, now)
    components = components_of(frame)
    if not components:
        return None
    if frame.src not in link.devices:
        add_device(link, frame.src)
    if frame.method is None and bytes(frame.id) == GET_CONFIG_ID:
        collector.configs.keep(frame.src, components)
        return None
    due, interval = update_channels(collector, frame, components, now)
    incomplete = False
    # This comes after all components are merged: a clamp's counter may follow its
    # power.
    for channel in due:
        if starts_interval(collector, interval, channel.last_interval, now):
            incomplete = incomplete or needs_status(channel)
            if should_write(collector, channel):
                add_pending_row(collector, channel, interval)
        release_complete_rows(collector, channel, expired_by=0.0)
    if frame.method is None:
        link.requests.unanswered = 0
        return GET_CONFIG
    if incomplete:
        return GET_STATUS
    return None


def should_write(collector: Collector, channel: Channel) -> bool:
    """Whether this reading becomes the row of its interval.

    It needs a power, and MIN_POWER_W must let it through."""
    if channel.apower_w is None:
        return False
    # The row after a run tells "off" from "no data".
    return is_running(collector, channel.apower_w) or channel.running


def is_running(collector: Collector, apower_w: float) -> bool:
    floor_w = collector.settings.min_power_w
    return floor_w is None or abs(apower_w) > floor_w


def needs_status(channel: Channel) -> bool:
    """Whether a row would lack a value that the device may have."""
    return (
        channel.apower_w is None
        or (channel.voltage_v is None and may_come(channel, "voltage_v"))
        or (channel.current_a is None and may_come(channel, "current_a"))
        or (channel.energy_total_wh is None and may_come(channel, "energy_total_wh"))
    )


def update_channels(
    collector: Collector, frame: Frame, components: dict[str, Raw], now: float
) -> tuple[list[Channel], float]:
    """Merge a frame's components into the known status.

    Returns the channels that may get a row or have a pending one (a clamp may be listed
    twice), and the start of the interval that the frame counts for."""
    full = is_whole(frame)
    interval = now // collector.interval_s * collector.interval_s
    due = []
    is_read = False
    for key, text in components.items():
        for decoder in collector.decoders.get(key, ()):
            try:
                component = decoder.decode(text)
            except ValueError as exc:
                pass_over(collector, f"{frame.src} {key}", text, exc)
                continue
            is_read = True
            # A counter decides which interval the whole frame counts for.
            if component.aenergy is not UNSET and not full:
                interval = interval_of(collector, component.aenergy, now)
            # A live frame of a known channel, as nearly every one is, needs no more.
            channel = collector.channels.get(frame.src + decoder.key)
            if channel is None or frame.received is not None:
                channel = find_channel(collector, frame, decoder.key, now)
            if not merge(channel, component, full, now):
                continue
            channel.heard = now
            if interval != channel.last_interval or channel.pending:
                remember(collector, channel)
                note_interval(collector, channel, interval, now)
                due.append(channel)
    if full:
        note_gone(collector, frame, components)
    if full or not is_read:
        name_unread_meters(collector, frame.src, components)
    return due, interval


def pass_over(collector: Collector, about: str, text: Raw, exc: ValueError) -> None:
    """Name a component that cannot be read; null is no news."""
    if bytes(text) != b"null":
        collector.complaints.log(about, "%s: passed over: %s", about, exc)


def interval_of(
    collector: Collector, counter: Energy | float | None, now: float
) -> float:
    """The start of the interval that a frame with a counter counts for. A minute frame
    says which minute it means."""
    # Just before a minute, a counter belongs to the minute that is about to begin.
    moment = now + collector.early_s
    if isinstance(counter, Energy):
        minute_ts = counter.minute_ts
        # Firmware 1.0 and 1.1 say something else than a full minute.
        if minute_ts is not None and minute_ts % 60 == 0:
            if abs(minute_ts - now) <= collector.clock_error_s:
                moment = minute_ts
    return moment // collector.interval_s * collector.interval_s


def starts_interval(
    collector: Collector, interval: float, newest: float, now: float
) -> bool:
    """Whether a reading counts for another interval than the newest one so far.

    A minute frame may come before its minute begins. What still comes of the minute
    before does not go back to that."""
    if interval == newest:
        return False
    is_earlier = interval < newest
    # A newest interval this far ahead means that the clock was set back since.
    clock_was_set_back = newest > now + collector.clock_error_s
    return not is_earlier or clock_was_set_back


def note_interval(
    collector: Collector, channel: Channel, interval: float, now: float
) -> None:
    """Note the interval for which a channel was heard last."""
    if starts_interval(collector, interval, channel.heard_interval, now):
        channel.heard_interval = interval


def find_channel(
    collector: Collector, frame: Frame, channel_key: str, now: float
) -> Channel:
    """The channel that a reading is merged into. A new one is not stored until
    `remember`.

    A held-back frame belongs to the live channel. If that has heard something newer, it
    belongs to a channel of held-back frames alone."""
    channel_id = frame.src + channel_key
    live = collector.channels.get(channel_id)
    if live is None:
        return Channel(frame.src, channel_key)
    if frame.received is None or live.heard <= now:
        return live
    forget_other_outage(collector, channel_id, now)
    earlier = collector.held_back.get(channel_id)
    if earlier is None:
        return Channel(frame.src, channel_key, held_back=True)
    return earlier


def forget_other_outage(collector: Collector, channel_id: str, now: float) -> None:
    """Drop the channel of held-back frames of another outage, whose values must not mix
    with those of this one. Its rows go out first."""
    earlier = collector.held_back.get(channel_id)
    if earlier is None or 0 <= now - earlier.heard <= MAX_HELD_BACK_GAP:
        return
    del collector.held_back[channel_id]
    release_complete_rows(collector, earlier, expired_by=float("inf"))


def remember(collector: Collector, channel: Channel) -> None:
    """Store a channel as the most recent one; it is no longer gone.

    Beyond MAX_CHANNELS the least recent one is forgotten, with its pending rows."""
    channel.gone = False
    channels = collector.channels
    if channel.held_back:
        channels = collector.held_back
    else:
        of_device = collector.devices.setdefault(channel.device_id, {})
        of_device[channel.key] = channel
    channel_id = channel.device_id + channel.key
    # A dict keeps the order of insertion.
    channels.pop(channel_id, None)
    channels[channel_id] = channel
    if len(channels) > MAX_CHANNELS:
        forget_least_recent(collector, channels)


def forget_least_recent(collector: Collector, channels: dict[str, Channel]) -> None:
    first = channels.pop(next(iter(channels)))
    if first.held_back:
        return
    of_device = collector.devices[first.device_id]
    del of_device[first.key]
    if not of_device:
        del collector.devices[first.device_id]


def note_gone(collector: Collector, frame: Frame, components: dict[str, Raw]) -> None:
    """Note which of a device's channels its whole status lacks, or has again."""
    if frame.received is not None:
        # It was held back, so it may be older than what is known.
        return
    present = set()
    for key in components:
        for decoder in collector.decoders.get(key, ()):
            present.add(decoder.key)
    for channel in collector.devices.get(frame.src, {}).values():
        channel.gone = channel.key not in present


def name_unread_meters(
    collector: Collector, src: str, components: dict[str, Raw]
) -> None:
    """Log, once, which components of a device have a power and are of no known kind."""
    for key, text in components.items():
        match = COMPONENT_KEY.fullmatch(key)
        if match is None or match[1] in KNOWN_KINDS or not POWER.search(text):
            continue
        collector.complaints.log_once(
            f"{src} sends {key} with a power, which is not kept"
        )


def add_pending_row(collector: Collector, channel: Channel, interval: float) -> None:
    """Add the row of an interval. It waits for missing values, one interval at most."""
    assert channel.apower_w is not None
    channel.running = is_running(collector, channel.apower_w)
    channel.last_interval = interval
    channel.pending.append(
        PendingRow(
            time.monotonic() + collector.interval_s,
            interval,
            channel.apower_w,
            channel.voltage_v,
            channel.current_a,
            channel.energy_total_wh,
            channel.energy_returned_wh,
        )
    )


def release_complete_rows(
    collector: Collector, channel: Channel, expired_by: float
) -> None:
    """Put a channel's rows that wait for nothing more into the outbox, and those whose
    deadline (monotonic) is at most `expired_by`: 0 for none, inf for all."""
    waiting = []
    for pending in channel.pending:
        missing = fill_in(pending, channel)
        waits = any(may_come(channel, column) for column in missing)
        if waits and pending.deadline > expired_by:
            waiting.append(pending)
            continue
        if missing and not channel.warned:
            channel.warned = warn_of_missing(collector, channel, missing)
        collector.outbox.append(make_row(pending, channel))
    channel.pending = waiting


def fill_in(pending: PendingRow, channel: Channel) -> list[str]:
    """Take what the device has said since. Returns the columns that are still
    missing."""
    missing = []
    if pending.voltage_v is None:
        pending.voltage_v = channel.voltage_v
        if pending.voltage_v is None:
            missing.append("voltage_v")
    if pending.current_a is None:
        pending.current_a = channel.current_a
        if pending.current_a is None:
            missing.append("current_a")
    if pending.energy_total_wh is None:
        pending.energy_total_wh = channel.energy_total_wh
        if pending.energy_total_wh is None:
            missing.append("energy_total_wh")
    if pending.energy_returned_wh is None:
        pending.energy_returned_wh = channel.energy_returned_wh
    return missing


def warn_of_missing(collector: Collector, channel: Channel, missing: list[str]) -> bool:
    fields = ", ".join(missing)
    text = f"{channel.device_id} {channel.key} reports no {fields}: stored as 0"
    return collector.complaints.log(text, "%s", text)


def make_row(pending: PendingRow, channel: Channel) -> Row:
    """The row to write. What never came is stored as 0, as the columns are NOT NULL."""
    return Row(
        pending.interval,
        channel.device_id,
        channel.key,
        pending.apower_w or 0.0,
        pending.voltage_v or 0.0,
        pending.current_a or 0.0,
        pending.energy_total_wh or 0.0,
        pending.energy_returned_wh,
    )


async def release_and_save_periodically(collector: Collector) -> None:
    """Release rows whose deadline has come, and save rows that the database does not
    take."""
    while True:
        await asyncio.sleep(SAVE_TICK)
        now = time.monotonic()
        for channel in [*collector.channels.values(), *collector.held_back.values()]:
            if channel.pending:
                release_complete_rows(collector, channel, now)
        if collector.outbox.should_save(SAVE_AFTER):
            collector.outbox.save()


# ---- Database: rows go in by batches, one statement each ----

# The arrays come as text: msgspec writes them ten times as fast as the driver.
INSERT = """
INSERT INTO power_logs (
    timestamp, device_id, channel,
    apower_w, voltage_v, current_a, energy_total_wh, energy_returned_wh)
SELECT to_timestamp(t), d, c, p, v, a, e, r
FROM unnest(
    %s::float8[], %s::text[], %s::text[],
    %s::float8[], %s::float8[], %s::float8[], %s::float8[], %s::float8[]
) AS reading (t, d, c, p, v, a, e, r)
"""
# For a table of an earlier version, to which this role may not add the column.
INSERT_WITHOUT_RETURNED = """
INSERT INTO power_logs (
    timestamp, device_id, channel,
    apower_w, voltage_v, current_a, energy_total_wh)
SELECT to_timestamp(t), d, c, p, v, a, e
FROM unnest(
    %s::float8[], %s::text[], %s::text[],
    %s::float8[], %s::float8[], %s::float8[], %s::float8[], %s::float8[]
) AS reading (t, d, c, p, v, a, e, r)
"""
# The first row of an interval wins. Name the conflict: a duplicate id, e.g. after a
# careless import, must stay an error, or the row would vanish silently.
FIRST_ROW_WINS = "ON CONFLICT (device_id, channel, timestamp) DO NOTHING"


async def write_batches(collector: Collector) -> None:
    """Write the oldest rows to the table, a batch at a time, until a stop finds
    none."""
    outbox = collector.outbox
    size = BatchSize()
    while len(outbox) > 0 or not collector.stopping:
        batch = Batch([], 0)
        try:
            claim_if_needed(outbox)
            await connect_if_needed(collector)
            batch = outbox.oldest(size.limit)
            await write(collector, batch.rows)
        except DATABASE_ERRORS as exc:
            if len(batch.rows) != 1 or not refuses_row(exc):
                await handle_failure(collector, batch, size, exc)
                continue
            drop_row(collector, batch.rows[0], exc)
        note_success(collector)
        outbox.remove(batch)
        size.widen(batch)
        if not batch.rows:
            await outbox.wait_for_rows(RETRY)


async def handle_failure(
    collector: Collector, batch: Batch, size: BatchSize, exc: Exception
) -> None:
    """Go on with smaller batches if a row may be the reason; recover if it is not."""
    refused = len(batch.rows) > 1 and refuses_row(exc)
    if refused or isinstance(exc, TimeoutError):
        size.narrow(batch)
    if not refused:
        await recover(collector, exc)


def claim_if_needed(outbox: Outbox) -> None:
    """Take DATA_DIR if it was in use, or could not be written. No batch is in
    flight."""
    if outbox.file is None:
        with contextlib.suppress(sqlite3.Error, OSError):
            outbox.claim()


async def connect_if_needed(collector: Collector) -> None:
    if collector.pool is None:
        collector.pool = await open_database(collector)
    elif collector.postgres is not None and collector.postgres.returncode is not None:
        # If no row is due, nobody would notice for long.
        raise OSError("the embedded PostgreSQL has ended")


async def write(collector: Collector, rows: list[Row]) -> None:
    if not rows:
        return
    assert collector.pool is not None
    timeout_s = ANSWER_TIMEOUT
    if collector.failures:
        timeout_s = PATIENT_TIMEOUT
    writing = write_rows(collector, collector.pool, rows)
    collector.rows_written += await within(timeout_s, writing)
    collector.last_write = time.time()


async def write_rows(
    collector: Collector, pool: AsyncConnectionPool, rows: list[Row]
) -> int:
    """Returns how many rows were new."""
    columns = [array_text(column) for column in zip(*rows, strict=True)]
    async with pool.connection() as conn:
        cursor = await conn.execute(collector.insert, columns)
        return cursor.rowcount


def array_text(values: Iterable[Any]) -> str:
    """A PostgreSQL array as text, in which quotes and backslashes are as in JSON."""
    return "{" + msgspec.json.encode(values)[1:-1].decode() + "}"


def drop_row(collector: Collector, row: Row, exc: Exception) -> None:
    collector.outbox.dropped += 1
    about = f"{row.device_id} {row.channel}"
    text = "row dropped, the database says: %s: %s"
    collector.complaints.log(about, text, one_line(exc), row)


def note_success(collector: Collector) -> None:
    """An outage ends with a batch that is written, or with a connection if none
    waits."""
    if collector.failures > 1:
        duration_s = time.time() - collector.down_since
        waiting = len(collector.outbox)
        log.warning("database back after %.1f s, %d rows waited", duration_s, waiting)
    collector.failures = 0


async def recover(collector: Collector, exc: Exception) -> None:
    """Drop the pool, which must not outlive a failure, and wait.

    After a first failure try again at once: connections may only have been closed, or
    the table altered. After a timeout or a second failure wait first."""
    before = collector.failures
    if before == 0:
        collector.down_since = time.time()
    collector.failures += 1
    if isinstance(exc, TimeoutError):
        collector.failures += 1
    pool = collector.pool
    collector.pool = None
    if pool is not None:
        # If it hangs it is left alone.
        closing = asyncio.create_task(pool.close(timeout=0))
        await asyncio.wait({closing}, timeout=0.2)
    if before < 2 <= collector.failures:
        collector.outages += 1
        log.error("%s", database.outage_line(exc))
    if collector.failures > 1:
        await asyncio.sleep(RETRY)


async def open_database(collector: Collector) -> AsyncConnectionPool:
    """Start the embedded server if there is to be one, prepare the table, and open the
    query pool. Returns the pool for rows."""
    settings = collector.settings
    conninfo = settings.database_url or await start_embedded(collector)
    conn = await within(PATIENT_TIMEOUT, database.connect(conninfo))
    try:
        table = await prepare_table(collector, conn)
    finally:
        await conn.close()
    choose_insert(collector, table)
    if collector.query_pool is None:
        collector.query_pool = database.make_query_pool(conninfo)
        await collector.query_pool.open()
    pool = AsyncConnectionPool(
        conninfo,
        kwargs=CONNECTION,
        open=False,
        configure=database.configure,
        min_size=settings.db_pool_min_size,
        max_size=settings.db_pool_max_size,
    )
    await pool.open(wait=True, timeout=PATIENT_TIMEOUT)
    if collector.failures == 0:
        log.info("database connected")
    return pool


async def start_embedded(collector: Collector) -> str:
    """Start the embedded server unless it runs. Returns how to connect to it."""
    folder = local_postgres.folder_in(collector.settings.data_dir)
    ended = collector.postgres is not None and collector.postgres.returncode is not None
    if ended and collector.failures < 2:
        log.warning("the embedded PostgreSQL has ended: it is started again")
    if collector.postgres is None or ended:
        collector.postgres = await local_postgres.start(folder, open_parents=True)
        await local_postgres.wait_until_ready(collector.postgres, folder)
    return local_postgres.conninfo(folder)


async def prepare_table(
    collector: Collector, conn: psycopg.AsyncConnection[Any]
) -> database.Table:
    """Apply schema.sql if there is no table, or, only at the start, an older one.

    There is no deadline: an index of a long table takes its time."""
    table = await within(ANSWER_TIMEOUT, database.read_table(conn))
    # No table has been prepared yet.
    at_start = collector.insert == ""
    is_current = table.version >= database.SCHEMA_VERSION
    if table.exists and (is_current or not at_start):
        return table
    collector.preparing = True
    try:
        await database.apply_schema(conn)
    except psycopg.Error as exc:
        if conn.closed or not table.exists:
            raise
        # The role lacks a right, or the table differs from ours. Rows can still be
        # written.
        text = "power_logs is used as it is, not all of schema.sql could be applied: %s"
        log.warning(text, one_line(exc))
    finally:
        collector.preparing = False
    return await within(ANSWER_TIMEOUT, database.read_table(conn))


def choose_insert(collector: Collector, table: database.Table) -> None:
    """Choose the statement that fits the table, and warn of what the table lacks."""
    insert = INSERT
    lacks = []
    if not table.has_returned_column:
        insert = INSERT_WITHOUT_RETURNED
        lacks.append("the column energy_returned_wh")
    if table.has_unique_rule:
        insert += FIRST_ROW_WINS
    else:
        lacks.append("the rule that keeps doubles out")
    if lacks and insert != collector.insert:
        text = "power_logs lacks %s of schema.sql: apply that file by hand, and restart"
        log.warning(text, " and ".join(lacks))
    collector.insert = insert


def query_pool(collector: Collector) -> AsyncConnectionPool | None:
    """The pool for everything but rows, None while the database is away."""
    if collector.pool is None or collector.failures:
        return None
    return collector.query_pool


# ---- Device handler ----


class DeviceConnection(ServerConnection):
    """A device's connection. Each text message goes to `take` as it arrives: with
    recv(), a frame would cost a quarter more processor time."""

    # What the log calls it: its address until a frame names the device.
    name = ""
    devices: set[str]
    requests: Requests
    # take_message, once the device has been asked.
    take: Callable[[bytes, float], None] | None = None

    def __init__(
        self, *args: Any, refusals: Refusals | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.refusals = refusals

    def data_received(self, data: bytes) -> None:
        # TLS begins with these two bytes: the device speaks wss:// to our ws:// port.
        # websockets would wait for a line of HTTP. After that, there is a request.
        if self.request is None and data.startswith(b"\x16\x03"):
            if self.refusals is not None:
                self.refusals.note(address_of(self), "tls")
            self.transport.abort()
            return
        super().data_received(data)

    def process_event(self, event: Any) -> Any:
        if self.take is not None and event.opcode == 1 and event.fin:  # a text
            return self.take(event.data, time.time())
        super().process_event(event)
        # Pongs pile up if a device pings and never reads.
        if self.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self.transport.abort()


async def handle_device(collector: Collector, link: DeviceConnection) -> None:
    """Ask a device for its status, then take its frames for as long as it stays."""
    assert link.request is not None and link.response is not None
    link.name = address_of(link)
    link.devices = set()
    link.requests = Requests()
    collector.links.add(link)
    began = time.monotonic()
    try:
        await link.send(ENABLE_NOTIFICATIONS)
        ask(link, GET_STATUS, time.time())
        link.take = partial(take_message, collector, link)
        # Nobody reads these again, and a device stays for months.
        link.request.headers.clear()
        link.response.headers.clear()
        # What came before that, messages in fragments, and binary ones.
        async for message in link:
            if isinstance(message, bytes):
                # This is no JSON, so it is passed over, with a warning.
                message = "a binary frame"
            take_message(collector, link, message, time.time())
    except ConnectionClosed:
        pass
    finally:
        collector.links.discard(link)
        # At a stop all of them leave.
        if link.devices and link.server.is_serving():
            duration = timedelta(seconds=round(time.monotonic() - began))
            log.info("%s left after %s: %s", link.name, duration, why_left(link))


def why_left(link: DeviceConnection) -> str:
    """Why a connection has ended."""
    if link.protocol.close_rcvd is not None:
        return "it closed the connection"
    close = link.protocol.close_sent
    if close is None:
        return "the connection broke"
    if close.code == CloseCode.INTERNAL_ERROR:
        # websockets says so when a ping got no answer.
        return "it no longer answers"
    if close.reason == "":
        return f"the collector closed it, {close.code}"
    return f"the collector closed it, {close.reason}"


def take_message(
    collector: Collector, link: DeviceConnection, text: str | bytes, now: float
) -> None:
    """Take a device's frame, or pass over a malformed one; ask for what is missing."""
    collector.frames += 1
    try:
        request = take_frame(collector, link, text, now)
    except (ValueError, RecursionError) as exc:
        collector.frames_passed_over += 1
        reason = one_line(exc)
        log_text = "%s: frame passed over: %s: %.60r"
        collector.complaints.log(link.name, log_text, link.name, reason, text)
        return
    if request is not None and link.requests.may_send(request, now):
        ask(link, request, now)


def add_device(link: DeviceConnection, src: str) -> None:
    """Note that a connection speaks for a device.

    Raises ValueError for an id that cannot be used, and beyond MAX_DEVICES."""
    # It must fit the table's column, in any encoding, and a line of the log.
    if not 0 < len(src.encode()) <= 100 or not src.isprintable():
        raise ValueError("src is no device id")
    if len(link.devices) >= MAX_DEVICES:
        raise ValueError(f"one connection speaks for at most {MAX_DEVICES} devices")
    if not link.devices:
        log.info("%s connected from %s", src, link.name)
        link.name = src
        link.requests.ask_after = moment_of(src)
    link.devices.add(src)


def ask(link: DeviceConnection, request: str, now: float) -> None:
    link.requests.note_sent(request, now)
    # Unlike send(), this never waits for a slow device.
    broadcast([link], request)


async def ask_periodically(collector: Collector) -> None:
    while True:
        await asyncio.sleep(ASK_TICK)
        ask_silent_devices(collector, time.time())


def ask_silent_devices(collector: Collector, now: float) -> None:
    """Ask each device that has been silent since the interval began, or whose voltage
    or counter is old.

    Each is looked at once per interval, or once a minute if intervals are shorter."""
    length_s = max(60.0, collector.interval_s)
    start = now // length_s * length_s
    fraction = (now - start) / length_s
    for link in collector.links:
        if not link.requests.is_look_due(start, fraction):
            continue
        link.requests.looked_interval = start
        if needs_asking(collector, link, start, now):
            ask(link, GET_STATUS, now)


def needs_asking(
    collector: Collector, link: DeviceConnection, start: float, now: float
) -> bool:
    """Whether a channel of a connection is stale, and its device has not been asked
    since `start`."""
    if link.requests.was_sent_within(now - start, GET_STATUS, now):
        return False
    return any(
        is_stale(collector, channel, start, now)
        for src in link.devices
        for channel in collector.devices.get(src, {}).values()
    )


def is_stale(collector: Collector, channel: Channel, start: float, now: float) -> bool:
    """Whether a channel has not been heard since `start`, or its voltage or counter has
    not been reported for MAX_AGE."""
    if channel.gone:
        return False
    ended_before = channel.heard_interval + collector.interval_s <= start
    clock_was_set_back = channel.heard_interval > now + collector.clock_error_s
    if ended_before or clock_was_set_back:
        return True
    oldest = now - MAX_AGE
    old_voltage = not oldest <= channel.voltage_time <= now
    old_counter = not oldest <= channel.counter_time <= now
    return (old_voltage and may_come(channel, "voltage_v")) or (
        old_counter and may_come(channel, "energy_total_wh")
    )


def address_of(connection: ServerConnection) -> str:
    if not connection.remote_address:
        return "?"
    return str(connection.remote_address[0])


# ---- HTTP: health, who may connect, and the owner's questions ----

SECONDS_PATTERN = "[0-9]{1,9}"
# Channels that /health names.
MAX_NAMED = 100
NOT_FOUND = "Not found: devices connect to /ws.\n"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def process_request(
    collector: Collector, connection: ServerConnection, request: Request
) -> Response | None:
    """The answer to an HTTP request, or None to go on to the WebSocket."""
    response = await route(collector, connection, request)
    if response is None:
        return None
    if request.method == "HEAD":
        # Only the headers are sent.
        response.body = b""
    return response


async def route(
    collector: Collector, connection: ServerConnection, request: Request
) -> Response | None:
    path, _, query = request.path.partition("?")
    if path == "/ws":
        return admit(collector, connection, request)
    if is_upgrade(request):
        shown_path = shown_without_tokens(collector, path)
        collector.refusals.note(address_of(connection), "path", shown_path)
        return connection.respond(404, NOT_FOUND)
    if request.method not in ("GET", "HEAD"):
        return connection.respond(404, NOT_FOUND)
    devices = len(connection.server.connections)
    if path == "/health":
        error = error_in_health_query(query)
        if error is not None:
            return connection.respond(400, f"{error}\n")
    if path in ("/", "/health"):
        status, text = health(collector, devices, query)
        return connection.respond(status, text)
    if path == "/metrics":
        response = connection.respond(200, metrics(collector, devices))
        # Otherwise there would be two of them.
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = METRICS_TYPE
        return response
    if path == "/dashboard" or path.startswith(("/page/", "/data")):
        return await respond(
            request,
            collector.settings,
            collector.page_token,
            query_pool(collector),
            collector.refusals,
        )
    return connection.respond(404, NOT_FOUND)


def admit(
    collector: Collector, connection: ServerConnection, request: Request
) -> Response | None:
    """None if a device may connect; otherwise the reason why not."""
    if not header(request, "Upgrade"):
        response = connection.respond(426, "This is a WebSocket endpoint.\n")
        response.headers["Upgrade"] = "websocket"
        return response
    token = collector.settings.collector_token
    if token is not None:
        _, _, query = request.path.partition("?")
        if has_token(query, token):
            return None
        collector.refusals.note(address_of(connection), "token")
        return connection.respond(401, "The URL lacks the right ?token=\n")
    # Only a browser sends an Origin.
    origin = header(request, "Origin").lower()
    _, _, origin_host = origin.partition("://")
    if origin and origin_host != header(request, "Host").lower():
        collector.refusals.note(address_of(connection), "site")
        return connection.respond(403, "No page of another site may send rows.\n")
    return None


def shown_without_tokens(collector: Collector, path: str) -> str:
    """A path as log and page may show it. A token may be a part of it (/ws/TOKEN), or
    come behind a & in place of the ?, where the path is cut off."""
    shown = unquote(path)
    for token in (collector.settings.collector_token, collector.page_token):
        if token:
            shown = shown.replace(token, "…")
    harmless = re.match(r"[\w/.…-]{0,60}", shown)
    # The pattern also matches nothing.
    assert harmless is not None
    if harmless[0] != shown:
        return f"{harmless[0]}…"
    return shown


def is_upgrade(request: Request) -> bool:
    return "websocket" in header(request, "Upgrade").lower()


def health(collector: Collector, devices: int, query: str) -> tuple[int, str]:
    """Status and text: how things stand; with silent=SECONDS, 503 if a channel is
    silent for longer.

    Anybody may ask, so it does not say why the database is away, and names channels
    only to whoever has the page's token."""
    last_write = "never"
    if collector.last_write is not None:
        last_write = utc(collector.last_write)
    lines = [
        "Shelly WS collector running",
        f"database: {database_state(collector)}",
        f"devices connected: {devices}",
        f"rows written: {collector.rows_written}",
        f"rows waiting: {len(collector.outbox)}",
        f"last write: {last_write}",
        f"rows dropped: {collector.outbox.dropped}",
        f"quarters: {collector.quarters.summary()}",
    ]
    status = 200
    seconds = dict(parse_qsl(query)).get("silent", "")
    # / takes anything, so that the check of a platform never fails by its parameters.
    if re.fullmatch(SECONDS_PATTERN, seconds):
        count = count_silent(collector, int(seconds))
        if count > 0:
            status = 503
            lines.append(f"channels silent: {count}")
            if has_token(query, collector.page_token):
                silent = silent_channels(collector, int(seconds))
                lines += [silent_line(channel) for channel in silent[:MAX_NAMED]]
            elif "token=" in query:
                lines.append("This is not the page's token, so they are not named.")
    return status, "\n".join(lines) + "\n"


def error_in_health_query(query: str) -> str | None:
    """What makes no sense in the query of /health; None if everything does."""
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in ("silent", "token"):
            return f"{name} is no parameter of /health, which takes silent=SECONDS"
        if name == "silent" and not re.fullmatch(SECONDS_PATTERN, text):
            return "silent makes no sense: it is a number of seconds"
    return None


def database_state(collector: Collector) -> str:
    if collector.preparing:
        return "preparing the table"
    if collector.failures:
        return f"unreachable since {utc(collector.down_since)}"
    if collector.pool is None:
        return "connecting"
    return "connected"


def silent_channels(collector: Collector, seconds: int) -> list[Channel]:
    """The channels whose last sign of life is more than `seconds` but less than a day
    old."""
    now = time.time()
    silent = []
    for channel in collector.channels.values():
        age_s = now - last_sign(channel)
        if channel.gone or age_s <= seconds or age_s >= DAY:
            continue
        # While the database is away, another collector may hear it and write no row.
        is_known_by_row = channel.newest_row > channel.heard
        if is_known_by_row and collector.failures > 0:
            continue
        silent.append(channel)
    return silent


def count_silent(collector: Collector, seconds: int) -> int:
    return len(silent_channels(collector, seconds))


def silent_line(channel: Channel) -> str:
    since = utc(last_sign(channel))
    return f"silent since {since}: {channel.device_id} {channel.key}"


def last_sign(channel: Channel) -> float:
    """When a channel was last heard, or had a row in the table."""
    return max(channel.heard, channel.newest_row)


def note_newest_row(collector: Collector, row: NewestRow) -> None:
    """Note a channel's newest row in the table. A channel that has one is expected,
    even if it has not been heard since the start."""
    channel = collector.channels.get(row.device_id + row.channel)
    if channel is None:
        # CHANNELS may leave it out.
        is_collected = row.channel in collector.channel_keys
        if not is_collected or len(collector.channels) >= MAX_CHANNELS:
            return
        channel = Channel(row.device_id, row.channel)
        remember(collector, channel)
    channel.newest_row = max(channel.newest_row, row.timestamp)


class Metric(NamedTuple):
    name: str
    help: str
    value: float
    labels: str = ""


def metrics(collector: Collector, devices: int) -> str:
    """The numbers of health, and a few more, as Prometheus reads them."""
    is_up = collector.pool is not None and collector.failures == 0
    values = [
        Metric("frames_total", "Frames that devices sent", collector.frames),
        Metric(
            "frames_passed_over_total",
            "Frames that could not be read",
            collector.frames_passed_over,
        ),
        Metric("rows_written_total", "New rows in the table", collector.rows_written),
        Metric("rows_dropped_total", "Rows that are lost", collector.outbox.dropped),
        Metric("rows_waiting", "Rows on their way to the table", len(collector.outbox)),
        Metric("devices_connected", "Open connections", devices),
        Metric("database_up", "Whether the database takes rows", int(is_up)),
        Metric(
            "last_write_timestamp_seconds",
            "When rows were last written",
            collector.last_write or 0,
        ),
        Metric("outages_total", "Outages of the database", collector.outages),
        Metric("info", "Version", 1, f'{{version="{VERSION}"}}'),
    ]
    return "".join(metric_text(metric) for metric in values)


def metric_text(metric: Metric) -> str:
    name = f"shelly_collector_{metric.name}"
    kind = "gauge"
    if name.endswith("_total"):
        kind = "counter"
    return (
        f"# HELP {name} {metric.help}\n# TYPE {name} {kind}\n"
        f"{name}{metric.labels} {metric.value}\n"
    )


# ---- main ----


def claim_data_dir(collector: Collector) -> None:
    """Take DATA_DIR for this process. Raises SystemExit if it is needed, and in use."""
    folder = collector.settings.data_dir
    try:
        collector.outbox.claim()
    except (sqlite3.Error, OSError) as exc:
        reason = f"cannot be used: {one_line(exc)}"
        if "locked" in str(exc):
            reason = "is in use by another collector, and each needs one of its own"
        if collector.settings.database_url is None:
            text = "DATA_DIR %s %s"
            log.critical(text, folder, reason)
            raise SystemExit(1) from None
        text = "DATA_DIR %s %s; in an outage rows wait in memory only"
        log.warning(text, folder, reason)


def log_startup(collector: Collector) -> None:
    """Log what an owner should know at the start."""
    settings = collector.settings
    log.info("Shelly collector %s", VERSION)
    if settings.database_url is None:
        data_dir = Path(settings.data_dir).absolute()
        log.info("no DATABASE_URL: using an embedded PostgreSQL in %s", data_dir)
    if len(collector.outbox) > 0:
        log.warning("%d rows of an earlier outage wait on disk", len(collector.outbox))
    is_local = settings.host in ("127.0.0.1", "::1", "localhost")
    if settings.collector_token is None and not is_local:
        log.warning(
            "no COLLECTOR_TOKEN: whoever reaches the port can send rows;"
            " set one if that is not only you"
        )
    urls = links(settings, page_token=collector.page_token)
    # A token that the owner has set is never logged.
    shown_by_check = "shelly_collector.py --check shows"
    if settings.collector_token is None:
        log.info("paste into the device: %s", urls.device)
    else:
        log.info("paste into the device: the URL that %s", shown_by_check)
    if settings.dashboard_token is None:
        log.info("look at: %s", urls.page)
    else:
        log.info("look at: the link that %s", shown_by_check)
    if settings.retention_days is not None:
        log.info(
            "rows older than %d days are deleted (RETENTION_DAYS)",
            settings.retention_days,
        )


async def run(settings: Settings) -> int:
    """Collect until a signal or a bug, then end the process. Returns 1 if it cannot
    listen."""
    collector = make_collector(settings)
    stop = asyncio.Event()
    handle_signals(stop)
    asyncio.get_running_loop().set_exception_handler(
        partial(log_loop_error, collector.complaints)
    )
    raise_descriptor_limit()
    try:
        server = await serve(
            partial(handle_device, collector),
            settings.host,
            settings.port,
            # websockets only calls it, so it need not be a class.
            create_connection=partial(  # type: ignore[arg-type]
                DeviceConnection, refusals=collector.refusals
            ),
            process_request=partial(process_request, collector),
            **SERVE_OPTIONS,
        )
    except (OSError, UnicodeError) as exc:
        host = settings.host or "all addresses"
        reason = str(exc)
        if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
            reason = "it is taken. Does a collector run already? If not, set PORT"
        log.critical("cannot listen on %s, port %d: %s", host, settings.port, reason)
        return 1
    # Nothing has been awaited since, so no frame has come before DATA_DIR is ours.
    claim_data_dir(collector)
    collector.page_token = page_token(settings, make=True)
    log_startup(collector)
    writer = asyncio.create_task(write_batches(collector))
    tasks = [
        writer,
        asyncio.create_task(release_and_save_periodically(collector)),
        asyncio.create_task(ask_periodically(collector)),
        asyncio.create_task(
            maintain_table(
                partial(query_pool, collector),
                collector.configs,
                settings.retention_days,
                collector.complaints,
            )
        ),
        asyncio.create_task(
            keep_making_quarters(
                partial(query_pool, collector), collector.quarters, collector.complaints
            )
        ),
        asyncio.create_task(
            follow_newest_rows(
                partial(query_pool, collector),
                partial(note_newest_row, collector),
                collector.interval_s,
                collector.complaints,
            )
        ),
        asyncio.create_task(stop.wait()),
    ]
    ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await finish(collector, server, writer)
    status = 0
    for task in ended:
        bug = task.exception()
        if bug is not None:
            log.critical("stopped by a bug: %r", bug, exc_info=bug)
            status = 1
    # asyncio.run would wait for a thread that hangs, as one that looks up the
    # database's name may.
    os._exit(status)


async def finish(
    collector: Collector, server: Server, writer: "asyncio.Task[None]"
) -> None:
    """Bring the rows in hand to the table or else to disk, and stop the embedded
    server.

    It takes a second as a rule. Rows that still wait for a value are lost."""
    # After "too many open files" asyncio tries, a second later, to listen again. The
    # socket is closed by then, and the error means nothing.
    server.get_loop().set_exception_handler(lambda loop, context: None)
    server.close()
    closed = asyncio.create_task(server.wait_closed())
    await asyncio.wait({closed}, timeout=CLOSE_TIMEOUT + 0.2)
    collector.stopping = True
    outbox = collector.outbox
    outbox.arrived.set()
    timeout_s = 0.7
    if collector.failures:
        timeout_s = 0
    await asyncio.wait({writer}, timeout=timeout_s)
    writer.cancel()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait(others, timeout=0.3)
    outbox.save()
    await local_postgres.stop(collector.postgres)
    level = logging.INFO
    if outbox.memory:
        level = logging.CRITICAL
    pending = count_pending(collector)
    if pending > 0:
        log.info("%d rows that still lacked a value are dropped", pending)
    text = "stopped, %d rows wait on disk, %d are lost"
    log.log(level, text, outbox.saved, len(outbox.memory))
    outbox.close()


def count_pending(collector: Collector) -> int:
    """Count the rows that still wait for a value."""
    channels = [*collector.channels.values(), *collector.held_back.values()]
    return sum(len(channel.pending) for channel in channels)


def folder_argument(text: str) -> Path:
    """Raises argparse.ArgumentTypeError."""
    if text == "":
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def read_arguments() -> argparse.Namespace:
    """The command line's. Raises SystemExit, with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        description="Keeps one row per metered channel per minute in PostgreSQL.",
        epilog="Settings come from the environment or .env; see .env.example.",
    )
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument(
        "--check",
        action="store_true",
        help="show the settings, the newest rows, and the URLs for device and page",
    )
    commands.add_argument(
        "--link",
        metavar="DEVICE",
        help="show a link that opens this device's data only",
    )
    commands.add_argument(
        "--backup",
        metavar="FOLDER",
        type=folder_argument,
        help=f"write the whole database into a new file in it; {MAX_BACKUPS} are kept",
    )
    commands.add_argument(
        "--version", action="version", version=f"Shelly collector {VERSION}"
    )
    return parser.parse_args()


def main() -> int:
    """Returns the exit status of a command: 0 for success, 1 for a failure, 2 for a
    setting or an argument that makes no sense."""
    arguments = read_arguments()
    try:
        env_file = read_env_file(Path(".env"))
        settings = read_settings(env_file | dict(os.environ))
    except (ValueError, OSError) as exc:
        print(f"shelly_collector: {one_line(exc)}", file=sys.stderr)
        return 2
    start_log(settings.log_level)
    for line in unknown_names(env_file):
        log.warning(".env: %s", line)
    # A full garbage collection of all modules would hold the event loop for 24 ms.
    gc.freeze()
    if arguments.backup is not None:
        return asyncio.run(backup(settings, arguments.backup))
    if arguments.link is not None:
        return asyncio.run(print_device_link(settings, arguments.link))
    if arguments.check:
        return asyncio.run(check(settings))
    return asyncio.run(run(settings))


if __name__ == "__main__":
    sys.exit(main())
