#!/usr/bin/env python3
"""An hour or more in some minutes: devices report every second while collector and PostgreSQL are killed at random.

    python tests/soak.py --minutes 10

At the end every interval in which a device got a frame through must have its row, once. What a kill of the collector
in good times may cost is the second before it; the report counts these intervals apart from any other gap. Needs Linux.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import psycopg
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import Postgres, Running, minute_frame, wait_for  # noqa: E402


async def report(url: str, name: str, sent: dict[str, dict[int, float]]) -> None:
    """A device that comes back after each drop, and notes when it sent something in which interval."""
    while True:
        with contextlib.suppress(OSError, WebSocketException, TimeoutError):
            async with connect(url, ping_interval=None, close_timeout=0.1, open_timeout=2) as websocket:
                while True:
                    now = time.time()
                    await websocket.send(json.dumps(minute_frame(name, apower=round(now % 1000, 3))))
                    sent[name].setdefault(int(now), now)
                    await asyncio.sleep(0.25)
        await asyncio.sleep(0.05)


async def disturb(running: Running, postgres: Postgres, rnd: random.Random, kills: list[tuple[float, str]]) -> None:
    """One random fault, and its end."""
    fault = rnd.choice(["kill collector", "stop collector", "crash database", "hang database", "both"])
    kills.append((time.time(), fault))
    if fault in ("crash database", "both"):
        await asyncio.to_thread(postgres.crash)
    if fault == "hang database":
        postgres.signal_all(signal.SIGSTOP)
    if fault != "kill collector":
        await asyncio.sleep(rnd.uniform(0.5, 8))
    if fault in ("kill collector", "both"):
        kills.append((time.time(), "kill"))
        running.process.kill()
        await asyncio.to_thread(running.process.wait)
        await running.again()
    if fault == "stop collector":
        status, took = await running.stop()
        assert status == 0 and took < 3.5, (status, took)
        await running.again()
    if fault in ("crash database", "both"):
        await asyncio.to_thread(postgres.start)
    if fault == "hang database":
        postgres.signal_all(signal.SIGCONT)


async def soak(minutes: float, devices: int, seed: int) -> int:
    rnd, sent, kills = random.Random(seed), {f"d{n:03}": {} for n in range(devices)}, []
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        postgres = Postgres(Path(folder) / "own")
        running = Running(Path(folder), {"DATABASE_URL": postgres.url, "THROTTLE_INTERVAL_SECONDS": "1"})
        try:
            await running.ready()
            living = [asyncio.create_task(report(running.url, name, sent)) for name in sent]
            end = time.monotonic() + minutes * 60
            while time.monotonic() < end:
                await asyncio.sleep(rnd.uniform(1, 15))
                await disturb(running, postgres, rnd, kills)
                print(f"\r{len(kills)} faults, {sum(map(len, sent.values()))} intervals", end="", flush=True)
            await asyncio.sleep(3)
            for task in living:
                task.cancel()

            async def settled() -> bool:
                health = await running.health()
                return health.get("database") == "connected" and health.get("rows waiting") == "0"

            await wait_for(settled, 60)
            await asyncio.sleep(1)
            return judge(postgres.url, sent, kills, running)
        finally:
            running.process.terminate()
            with contextlib.suppress(psutil.NoSuchProcess):
                postgres.stop()


def judge(url: str, sent: dict[str, dict[int, float]], kills: list[tuple[float, str]], running: Running) -> int:
    """Compare what was sent with what is in the table; the exit status."""
    with psycopg.connect(url) as conn:
        rows = conn.execute("SELECT device_id, extract(epoch FROM timestamp)::float FROM power_logs").fetchall()
    found: dict[str, list[int]] = {}
    for name, when in rows:
        found.setdefault(name, []).append(round(when))
    deaths = [when for when, what in kills if what.startswith("kill")]
    doubles = sum(len(times) - len(set(times)) for times in found.values())
    in_hand, lost = 0, []
    for name, intervals in sent.items():
        for interval, when in intervals.items():
            if interval in found.get(name, ()) or (interval + 1 in found.get(name, ()) and when % 1 > 0.99):
                continue
            if any(0 <= death - when <= 1.5 for death in deaths):
                in_hand += 1
            else:
                lost.append((name, interval))
    counts: dict[str, Any] = {}
    for _, what in kills:
        counts[what] = counts.get(what, 0) + 1
    print(
        f"\nfaults: {counts}\nintervals reported: {sum(map(len, sent.values()))}, rows: {len(rows)}, doubles: {doubles}"
    )
    print(f"missing within 1.5 s before a kill -9: {in_hand}, missing otherwise: {len(lost)} {lost[:10]}")
    print(f"tracebacks in the log: {running.log.count('Traceback')}, lines: {running.log.count(chr(10))}")
    return 1 if lost or doubles or "Traceback" in running.log else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    sys.exit(asyncio.run(soak(args.minutes, args.devices, args.seed)))


if __name__ == "__main__":
    main()
