#!/usr/bin/env python3
"""An hour or more in some minutes: devices report every second while collector and PostgreSQL are killed at random.

    python tests/soak.py --minutes 10

At the end every interval in which a device got a frame through must have its row, once: one that the collector's pong
confirms, within the interval. What a kill of the collector in good times may cost is the second before it; the report
counts these intervals apart from any other gap. Needs Linux.
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
from pathlib import Path

import psycopg
from websockets.exceptions import WebSocketException

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import Postgres, Running, device, minute_frame, wait_for  # noqa: E402

FAULTS = "kill collector, stop collector, crash database, kill server, hang database, lock table, both".split(", ")
EARLY = 1 / 240  # a frame that comes this early means the second that begins


async def report(url: str, name: str, sent: dict[str, dict[int, float]]) -> None:
    """A device that comes back after each drop, and notes when it first got something through in which interval."""
    while True:
        with contextlib.suppress(OSError, WebSocketException):
            async with device(url, close_timeout=0.1, open_timeout=2) as peer:
                while True:
                    now = time.time()
                    await peer.send(minute_frame(name, apower=round(now % 1000, 3)))
                    await (await peer.websocket.ping())
                    # The collector's clock said something between these two; if they differ, nobody knows what.
                    if int(now + EARLY) == int(time.time() + EARLY):
                        sent[name].setdefault(int(now + EARLY), now)
                    await asyncio.sleep(0.25)
        await asyncio.sleep(0.05)


async def disturb(running: Running, postgres: Postgres, fault: str, seconds: float, deaths: list[float]) -> None:
    """One fault, and its end."""
    if fault in ("crash database", "both"):
        await asyncio.to_thread(postgres.crash)
    if fault == "kill server":
        postgres.server.kill()
        await asyncio.to_thread(postgres.server.wait)
    if fault == "hang database":
        postgres.signal_all(signal.SIGSTOP)
    if fault == "lock table":
        locker = await psycopg.AsyncConnection.connect(postgres.url)
        await locker.execute("LOCK TABLE power_logs")
    if fault != "kill collector":
        await asyncio.sleep(seconds)
    if fault in ("kill collector", "both"):
        deaths.append(time.time())
        running.process.kill()
        await asyncio.to_thread(running.process.wait)
        await running.again()
    if fault == "stop collector":
        status, took = await running.stop()
        assert status == 0 and took < 3.5, (status, took)
        await running.again()
    if fault in ("crash database", "kill server", "both"):
        await asyncio.to_thread(postgres.start)
    if fault == "hang database":
        postgres.signal_all(signal.SIGCONT)
    if fault == "lock table":
        await locker.rollback()
        await locker.close()


async def soak(minutes: float, devices: int, seed: int) -> int:
    rnd, faults, deaths = random.Random(seed), Counter[str](), list[float]()
    sent: dict[str, dict[int, float]] = {f"d{n:03}": {} for n in range(devices)}
    with tempfile.TemporaryDirectory() as folder:
        postgres = Postgres(Path(folder) / "own")
        running = Running(Path(folder), {"DATABASE_URL": postgres.url, "THROTTLE_INTERVAL_SECONDS": "1"})
        try:
            await running.ready()
            living = [asyncio.create_task(report(running.url, name, sent)) for name in sent]
            end = time.monotonic() + minutes * 60
            while time.monotonic() < end:
                await asyncio.sleep(rnd.uniform(1, 15))
                fault = rnd.choice(FAULTS)
                faults[fault] += 1
                await disturb(running, postgres, fault, rnd.uniform(0.5, 8), deaths)
                print(f"\r{faults.total()} faults, {sum(map(len, sent.values()))} intervals", end="", flush=True)
            await asyncio.sleep(3)
            for task in living:
                task.cancel()

            async def settled() -> bool:
                health = await running.health()
                return health.get("database") == "connected" and health.get("rows waiting") == "0"

            await wait_for(settled, 60)
            await asyncio.sleep(1)
            print(f"\nfaults: {dict(faults)}")
            return judge(postgres.url, sent, deaths, running.log)
        finally:
            running.process.kill()
            running.process.wait()
            postgres.stop()


def judge(url: str, sent: dict[str, dict[int, float]], deaths: list[float], log: str) -> int:
    """Compare what was sent with what is in the table; the exit status."""
    with psycopg.connect(url) as conn:
        rows = conn.execute(
            "SELECT device_id, extract(epoch FROM timestamp)::float, count(*) FROM power_logs GROUP BY 1, 2"
        )
        found = {(name, when): count for name, when, count in rows}
    doubles = [place for place, count in found.items() if count > 1]
    in_hand, lost = 0, []
    for name, intervals in sent.items():
        for interval, when in intervals.items():
            if (name, interval) in found:
                continue
            if any(0 <= death - when <= 1.5 for death in deaths):
                in_hand += 1
            else:
                lost.append((name, interval, when))
    reported = sum(map(len, sent.values()))
    print(f"intervals reported: {reported}, in the table: {len(found)}, doubles: {len(doubles)} {doubles[:10]}")
    print(f"missing within 1.5 s before a kill -9: {in_hand}, missing otherwise: {len(lost)} {lost[:10]}")
    print(f"tracebacks in the log: {log.count('Traceback')}, lines: {log.count(chr(10))}")
    failed = bool(lost or doubles or "Traceback" in log)
    if failed:
        print(log)
    return int(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    sys.exit(asyncio.run(soak(args.minutes, args.devices, args.seed)))


if __name__ == "__main__":
    main()
