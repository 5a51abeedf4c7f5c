#!/usr/bin/env python3
"""Fill power_logs with houses that have long been measured: for benchmarks, and for
pictures of the page.

    python tests/fill.py --days 45 --devices 40 postgresql://…
    python tests/fill.py --days 14 --devices 1 --outage 7 --reset --solar

Without a URL, and without DATABASE_URL, it takes the database of the collector that runs
in this folder. The rows go past the collector, straight into the table. They are added to
those that are there; if one of them is there already, nothing is written.

Each device is a house with a well pump, a heater, a fridge and all the rest, and has a
row per channel and minute. The power of a row lasts until the next minute, and the
counter of the next row has risen by exactly that. The day is one of UTC. The same --seed
and --until give the same rows, and a house is the same however many there are.

`--outage 7` leaves out the rows of seven hours in the middle, during which the counters
go on. `--reset` lets the counter of the first device's first channel start again at 0,
after three quarters of the time. With `--solar` the last channel of each device is a
meter at the grid, pm1:0, of a house with panels: its total counts both directions.

The devices' ids hold a1b2c3, as those of simulated devices do, and are removed in the
same way (README.md).
"""

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import psycopg

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from local_postgres import conninfo, folder_in  # noqa: E402

MINUTE = timedelta(minutes=1)
MINUTES_OF_A_DAY = 1440

# The watts of a channel, minute after minute.
Load = Iterator[float]


class Plan(NamedTuple):
    """What is to be written."""

    days: float
    devices: int
    channels: int
    # The rows end before this full minute.
    until: datetime
    seed: int
    outage_hours: float = 0.0
    reset: bool = False
    solar: bool = False


# ---- Loads -------------------------------------------------------------------
# Each begins at a minute, counted from a midnight, and goes on for ever. All are called
# in the same way, so some have no use for the minute.
def steady(rnd: random.Random, watts: float, minutes: int) -> Load:
    """Yield about the same power for some minutes."""
    for _ in range(minutes):
        yield round(watts * (0.98 + 0.04 * rnd.random()), 1)


def off(minutes: int) -> Load:
    for _ in range(minutes):
        yield 0.0


def well_pump(rnd: random.Random, minute: int) -> Load:
    """Runs of 10 to 25 minutes, several times a day."""
    while True:
        yield from off(rnd.randint(120, 360))
        yield from steady(rnd, 810, rnd.randint(10, 25))


def heater(rnd: random.Random, minute: int) -> Load:
    """The cycles of a thermostat, most of them at night."""
    while True:
        hour = minute % MINUTES_OF_A_DAY // 60
        pause = rnd.randint(15, 40)
        if 6 <= hour < 22:
            pause = rnd.randint(180, 360)
        run = rnd.randint(8, 20)
        yield from off(pause)
        yield from steady(rnd, 2000, run)
        minute += pause + run


def fridge(rnd: random.Random, minute: int) -> Load:
    while True:
        yield from steady(rnd, 90, rnd.randint(14, 22))
        yield from steady(rnd, 1.5, rnd.randint(25, 45))


def house(rnd: random.Random, minute: int) -> Load:
    """A base load, and a peak around half past seven in the evening."""
    day = [180 + 900 * evening(minute_of_day) for minute_of_day in range(1440)]
    while True:
        yield round(day[minute % MINUTES_OF_A_DAY] * (0.8 + 0.4 * rnd.random()), 1)
        minute += 1


def evening(minute_of_day: int) -> float:
    """Return from 0 to 1 how much of the evening peak there is."""
    return math.exp(-(((minute_of_day - 1170) / 90) ** 2))


def grid(rnd: random.Random, minute: int) -> Load:
    """What a house draws less what its panels make: below 0 around noon."""
    sun = [3000 * daylight(minute_of_day) for minute_of_day in range(1440)]
    clearness = rnd.uniform(0.2, 1)
    for drawn_w in house(rnd, minute):
        minute_of_day = minute % MINUTES_OF_A_DAY
        if minute_of_day == 0:
            clearness = rnd.uniform(0.2, 1)
        yield round(drawn_w - clearness * sun[minute_of_day], 1)
        minute += 1


def daylight(minute_of_day: int) -> float:
    """Return from 0 to 1 how high the sun is, between six and six."""
    return max(0.0, math.sin(math.pi * (minute_of_day - 360) / 720))


class Kind(NamedTuple):
    name: str
    load: Callable[[random.Random, int], Load]


# The channels of a device; with more of them, they begin again.
KINDS = [
    Kind("Well pump", well_pump),
    Kind("Heater", heater),
    Kind("Fridge", fridge),
    Kind("House", house),
]
GRID = Kind("Grid", grid)


# ---- Devices -----------------------------------------------------------------
class Channel:
    """A channel as its device measures it. The counter is in Wh."""

    def __init__(
        self, device_id: str, key: str, name: str, kind: Kind, seed: int, minute: int
    ) -> None:
        rnd = random.Random(f"{seed} {device_id} {key}")
        self.device_id = device_id
        self.key = key
        self.name = name
        self.load = kind.load(rnd, minute)
        self.total_wh = rnd.uniform(10_000, 900_000)

    def row(self, time_text: str, voltage_v: float) -> str:
        """Return the row of the next minute as a line of COPY."""
        watts = next(self.load)
        amps = abs(watts) / voltage_v
        line = (
            f"{time_text}\t{self.device_id}\t{self.key}\t{watts}\t{voltage_v}\t"
            f"{amps:.3f}\t{self.total_wh:.3f}\t{self.returned_text()}\n"
        )
        self.count(watts / 60)
        return line

    def returned_text(self) -> str:
        """Return what COPY takes for NULL."""
        return "\\N"

    def count(self, energy_wh: float) -> None:
        self.total_wh += energy_wh


class GridChannel(Channel):
    """A pm1: its total counts what is given back, too, and another counter that alone."""

    returned_wh = 0.0

    def returned_text(self) -> str:
        return f"{self.returned_wh:.3f}"

    def count(self, energy_wh: float) -> None:
        self.total_wh += abs(energy_wh)
        self.returned_wh += max(0.0, -energy_wh)


def device_id_of(number: int) -> str:
    return f"shellypro4pm-a1b2c3{number:06x}"


class Device:
    """A device of some channels, on one wire."""

    def __init__(self, number: int, plan: Plan, minute: int) -> None:
        self.device_id = device_id_of(number)
        self.name = f"House {number + 1}"
        self.rnd = random.Random(f"{plan.seed} {self.device_id}")
        self.voltage_v = 230.0
        self.channels: list[Channel] = []
        for index in range(plan.channels):
            kind = KINDS[index % len(KINDS)]
            name = kind.name
            if index >= len(KINDS):
                name = f"{kind.name} {index // len(KINDS) + 1}"
            key = f"switch:{index}"
            self.channels.append(
                Channel(self.device_id, key, name, kind, plan.seed, minute)
            )
        if plan.solar:
            self.channels[-1] = GridChannel(
                self.device_id, "pm1:0", GRID.name, GRID, plan.seed, minute
            )

    def rows(self, time_text: str) -> list[str]:
        """Return the rows of the next minute, one of each channel."""
        drift = (230 - self.voltage_v) / 10 + self.rnd.uniform(-0.8, 0.8)
        self.voltage_v = round(self.voltage_v + drift, 1)
        return [channel.row(time_text, self.voltage_v) for channel in self.channels]


# ---- Rows --------------------------------------------------------------------
class House(NamedTuple):
    """The devices, and the minutes in question, counted from 1970."""

    devices: list[Device]
    first: int
    end: int
    outage: range
    # The minute at which a counter starts again, or None.
    reset_at: int | None


def prepare(plan: Plan) -> House:
    end = int(plan.until.timestamp()) // 60
    first = end - round(plan.days * MINUTES_OF_A_DAY)
    length = end - first
    outage_minutes = round(plan.outage_hours * 60)
    outage_start = first + (length - outage_minutes) // 2
    reset_at = None
    if plan.reset:
        reset_at = first + length * 3 // 4
    devices = [Device(number, plan, first) for number in range(plan.devices)]
    outage = range(outage_start, outage_start + outage_minutes)
    return House(devices, first, end, outage, reset_at)


def rows_of(house: House, minute: int) -> list[str]:
    """Return the rows of the next minute, device after device, as they would arrive."""
    if minute == house.reset_at:
        house.devices[0].channels[0].total_wh = 0.0
    time_text = datetime.fromtimestamp(minute * 60, UTC).isoformat()
    rows = []
    for device in house.devices:
        rows += device.rows(time_text)
    # The devices go on during the outage; nobody writes down what they say.
    if minute in house.outage:
        return []
    return rows


# ---- The database ------------------------------------------------------------
COPY = """
COPY power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a,
                 energy_total_wh, energy_returned_wh) FROM STDIN
"""

# A statement should not write millions of rows: a trigger may keep a list of them.
ROWS_OF_A_STATEMENT = 200_000

NAME = """
INSERT INTO channel_names (device_id, channel, device_says) VALUES (%s, %s, %s)
ON CONFLICT (device_id, channel) DO UPDATE SET device_says = excluded.device_says
"""


def fill(dsn: str, plan: Plan) -> int:
    """Write all rows and names in one transaction; return the number of rows."""
    house = prepare(plan)
    rows_of_a_minute = plan.devices * plan.channels
    minutes_of_a_statement = 1 + ROWS_OF_A_STATEMENT // rows_of_a_minute
    written = 0
    with psycopg.connect(dsn) as conn:
        make_table_if_absent(conn)
        for first in range(house.first, house.end, minutes_of_a_statement):
            end = min(first + minutes_of_a_statement, house.end)
            written += copy(conn, house, range(first, end))
        write_names(conn, house.devices)
        conn.execute("ANALYZE power_logs")
    return written


def make_table_if_absent(conn: psycopg.Connection) -> None:
    cursor = conn.execute("SELECT to_regclass('power_logs') IS NULL")
    if cursor.fetchone() == (True,):
        # The file begins and commits a transaction of its own.
        conn.rollback()
        conn.autocommit = True
        conn.execute((ROOT / "schema.sql").read_bytes())
        conn.autocommit = False


def copy(conn: psycopg.Connection, house: House, minutes: range) -> int:
    """Write the rows of these minutes with one statement; return their number."""
    with conn.cursor() as cursor:
        with cursor.copy(COPY) as stream:
            for minute in minutes:
                stream.write("".join(rows_of(house, minute)))
        return cursor.rowcount


def write_names(conn: psycopg.Connection, devices: list[Device]) -> None:
    names = []
    for device in devices:
        names.append((device.device_id, "", device.name))
        for channel in device.channels:
            names.append((device.device_id, channel.key, channel.name))
    with conn.cursor() as cursor:
        cursor.executemany(NAME, names)


# ---- The command -------------------------------------------------------------
def full_minute(text: str) -> datetime:
    """Return the minute of a time, which is one of UTC if it does not say its zone."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.replace(second=0, microsecond=0)


def this_minute() -> datetime:
    return datetime.now(UTC).replace(second=0, microsecond=0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--days", type=float, required=True)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--channels", type=int, default=4, help="of each device")
    parser.add_argument(
        "--until", type=full_minute, default=this_minute(), help="without it: now"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--outage", type=float, default=0.0, metavar="HOURS")
    parser.add_argument("--reset", action="store_true")
    parser.add_argument("--solar", action="store_true")
    parser.add_argument("database_url", nargs="?", metavar="DATABASE_URL")
    args = parser.parse_args(arguments)
    plan = Plan(
        args.days,
        args.devices,
        args.channels,
        args.until,
        args.seed,
        args.outage,
        args.reset,
        args.solar,
    )
    dsn = args.database_url or os.environ.get("DATABASE_URL")
    if not dsn:
        dsn = conninfo(folder_in(str(ROOT / "data")))
    began = time.perf_counter()
    rows = fill(dsn, plan)
    print(f"{rows:,} rows written in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
