#!/usr/bin/env python3
"""Kill, freeze and lock collector and PostgreSQL at random, and then count the rows.

    python tests/soak.py --minutes 10

Meanwhile devices report every second, so that some minutes are worth an hour or more.
At the end, every interval in which a device got a frame through must have its row, and
only one. A frame got through when the collector's pong, within the interval, says so.

Only a kill of the collector while all is well may cost something: the second before it.
The report counts these intervals apart from any other gap. Needs Linux.
"""

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from websockets.exceptions import WebSocketException

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import Postgres, Running, device, minute_frame, wait_for  # noqa: E402

# A frame that comes this early belongs to the second that begins.
EARLY_S = 1 / 240

# How long before its kill a collector may have taken a frame whose row is lost.
IN_HAND_S = 1.5


# ---- Devices -----------------------------------------------------------------
class SimulatedDevice:
    """A device that comes back after each drop, and notes what it got through."""

    def __init__(self, name: str) -> None:
        self.name = name
        # By interval: the time of the first frame in it that the collector took.
        self.reported: dict[int, float] = {}

    async def run(self, url: str) -> None:
        while True:
            with contextlib.suppress(OSError, WebSocketException):
                await self.report(url)
            await asyncio.sleep(0.05)

    async def report(self, url: str) -> None:
        """Report four times a second until the connection is lost."""
        async with device(url, close_timeout=0.1, open_timeout=2) as peer:
            while True:
                sent_at = time.time()
                power = round(sent_at % 1000, 3)
                await peer.send(minute_frame(self.name, apower=power))
                pong = await peer.websocket.ping()
                await pong
                # The collector's clock said something between these two. If they are in
                # different intervals, nobody knows which one the frame counts for.
                interval = interval_of(sent_at)
                if interval == interval_of(time.time()):
                    self.reported.setdefault(interval, sent_at)
                await asyncio.sleep(0.25)


def interval_of(moment: float) -> int:
    return int(moment + EARLY_S)


def count_reported(devices: list[SimulatedDevice]) -> int:
    return sum(len(one.reported) for one in devices)


# ---- Faults ------------------------------------------------------------------
class House:
    """A collector with a PostgreSQL, and what can happen to them."""

    def __init__(self, folder: Path) -> None:
        self.postgres = Postgres(folder / "own")
        env = {
            "DATABASE_URL": self.postgres.url,
            "THROTTLE_INTERVAL_SECONDS": "1",
        }
        self.collector = Running(folder, env)
        # When the collector was killed.
        self.deaths: list[float] = []

    async def kill_collector(self, seconds: float) -> None:
        self.deaths.append(time.time())
        self.collector.process.kill()
        await asyncio.to_thread(self.collector.process.wait)
        await self.collector.again()

    async def stop_collector(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        status, took_s = await self.collector.stop()
        assert status == 0, f"exit status {status}"
        assert took_s < 3.5, f"the stop took {took_s} s"
        await self.collector.again()

    async def crash_database(self, seconds: float) -> None:
        await asyncio.to_thread(self.postgres.crash)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.postgres.start)

    async def kill_server(self, seconds: float) -> None:
        """Kill the server's first process alone; its others find out by themselves."""
        self.postgres.server.kill()
        await asyncio.to_thread(self.postgres.server.wait)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.postgres.start)

    async def hang_database(self, seconds: float) -> None:
        self.postgres.signal_all(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.postgres.signal_all(signal.SIGCONT)

    async def lock_table(self, seconds: float) -> None:
        async with await psycopg.AsyncConnection.connect(self.postgres.url) as locker:
            await locker.execute("LOCK TABLE power_logs")
            await asyncio.sleep(seconds)

    async def crash_both(self, seconds: float) -> None:
        await asyncio.to_thread(self.postgres.crash)
        await asyncio.sleep(seconds)
        await self.kill_collector(0)
        await asyncio.to_thread(self.postgres.start)

    async def is_settled(self) -> bool:
        health = await self.collector.health()
        is_connected = health.get("database") == "connected"
        return is_connected and health.get("rows waiting") == "0"

    def end(self) -> None:
        self.collector.process.kill()
        self.collector.process.wait()
        self.postgres.stop()


FAULTS = {
    "kill collector": House.kill_collector,
    "stop collector": House.stop_collector,
    "crash database": House.crash_database,
    "kill server": House.kill_server,
    "hang database": House.hang_database,
    "lock table": House.lock_table,
    "both": House.crash_both,
}


async def disturb(
    house: House, devices: list[SimulatedDevice], minutes: float, rnd: random.Random
) -> None:
    """Let faults happen for as long as that, at random."""
    counts = Counter[str]()
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end:
        await asyncio.sleep(rnd.uniform(1, 15))
        fault = rnd.choice(list(FAULTS))
        counts[fault] += 1
        await FAULTS[fault](house, rnd.uniform(0.5, 8))
        intervals = count_reported(devices)
        print(f"\r{counts.total()} faults, {intervals} intervals", end="", flush=True)
    print(f"\nfaults: {dict(counts)}")


async def soak(minutes: float, device_count: int, seed: int) -> int:
    """Return the exit status: 0 if all rows are there."""
    devices = [SimulatedDevice(f"d{number:03}") for number in range(device_count)]
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder))
        try:
            await house.collector.ready()
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(one.run(house.collector.url)) for one in devices
                ]
                await disturb(house, devices, minutes, random.Random(seed))
                # Some seconds without a fault, which must not lose anything either.
                await asyncio.sleep(3)
                for task in tasks:
                    task.cancel()
            await wait_for(house.is_settled, 60)
            # Rows that still waited for a value follow within an interval.
            await asyncio.sleep(1)
            return judge(house, devices)
        finally:
            house.end()


# ---- The count ---------------------------------------------------------------
@dataclass
class Verdict:
    """What became of the reported intervals; each is named by device and second."""

    in_table: int
    doubles: list[tuple[str, int]]
    missing_in_hand: list[tuple[str, int]] = field(default_factory=list)
    missing_otherwise: list[tuple[str, int]] = field(default_factory=list)


def judge(house: House, devices: list[SimulatedDevice]) -> int:
    """Print the comparison of what was reported with the table; return the status."""
    verdict = compare(devices, count_rows(house.postgres.url), house.deaths)
    log = house.collector.log
    doubles = verdict.doubles
    missing = verdict.missing_otherwise
    print(f"intervals reported: {count_reported(devices)}")
    print(f"intervals in the table: {verdict.in_table}")
    print(f"intervals with more than one row: {len(doubles)} {doubles[:10]}")
    print(f"missing just before a kill -9: {len(verdict.missing_in_hand)}")
    print(f"missing otherwise: {len(missing)} {missing[:10]}")
    print(
        f"tracebacks in the log: {log.count('Traceback')}, lines: {log.count(chr(10))}"
    )
    if doubles or missing or "Traceback" in log:
        print(log)
        return 1
    return 0


def count_rows(url: str) -> dict[tuple[str, int], int]:
    """Return how many rows the table has, by device and interval."""
    query = """
        SELECT device_id, extract(epoch FROM timestamp)::bigint, count(*)
        FROM power_logs GROUP BY 1, 2
    """
    with psycopg.connect(url) as conn:
        rows = conn.execute(query).fetchall()
    return {(name, interval): count for name, interval, count in rows}


def compare(
    devices: list[SimulatedDevice],
    row_counts: dict[tuple[str, int], int],
    deaths: list[float],
) -> Verdict:
    doubles = [place for place, count in row_counts.items() if count > 1]
    verdict = Verdict(len(row_counts), doubles)
    for one in devices:
        for interval, sent_at in one.reported.items():
            place = (one.name, interval)
            if place in row_counts:
                continue
            if was_in_hand(sent_at, deaths):
                verdict.missing_in_hand.append(place)
            else:
                verdict.missing_otherwise.append(place)
    return verdict


def was_in_hand(sent_at: float, deaths: list[float]) -> bool:
    return any(0 <= death - sent_at <= IN_HAND_S for death in deaths)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    sys.exit(asyncio.run(soak(args.minutes, args.devices, args.seed)))


if __name__ == "__main__":
    main()
