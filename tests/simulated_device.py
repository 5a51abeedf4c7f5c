#!/usr/bin/env python3
"""A Shelly Pro 4PM without the hardware: speaks to a collector as the real one does, quirks included.

    python tests/simulated_device.py ws://localhost:5000/ws --minute 1
    python tests/simulated_device.py ws://localhost:5000/ws --history 24h

It asks for subprotocol json-rpc and needs no answer, sends its whole status right after connecting, answers requests,
then sends one frame per channel at each full minute, deltas when a load changes, and what switching off and on brings.
After a drop it comes back. `--filter` puts the Cloudflare Worker of the README in between: only frames with a channel
above 10 W pass, and the connection opens with the first of them.

`--history 24h` makes it a house (a pump, a heater, a fridge, a spare output) that first plays its last hours within
seconds, each frame with the time it stands for as `received`, and then lives on. What it does depends on the time
alone, so a second run within days agrees with the first; only the 20 minutes without network lie elsewhere.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException

Frame = dict[str, Any]


class Switch:
    """One metered output; power in W, energy in Wh."""

    name: str | None = None
    spread = 0.1  # of the load

    def __init__(self, number: int, rnd: random.Random) -> None:
        self.number, self.rnd = number, rnd
        self.on = True
        self.load_w = rnd.uniform(20, 1500)
        self.apower = self.current = 0.0
        self.voltage = 230.0
        self.total = rnd.uniform(100, 9999)
        self.by_minute = [0.0, 0.0, 0.0]
        self.change_load()

    def change_load(self) -> None:
        self.apower = round(self.load_w * self.rnd.uniform(1 - self.spread, 1 + self.spread), 1) if self.on else 0
        self.voltage = round(self.rnd.uniform(226, 234), 1)
        self.current = round(self.apower / self.voltage * 1.02, 3) if self.on else 0

    def pass_minute(self, hour: int) -> None:
        self.total += self.apower / 60
        self.by_minute = [round(self.apower / 60 * 1000, 3), *self.by_minute[:2]]
        self.voltage = round(self.rnd.uniform(226, 234), 1)

    def energy(self, minute_ts: int) -> Frame:
        returned = {"by_minute": [0.0, 0.0, 0.0], "minute_ts": minute_ts, "total": 0.0}
        counted = {"by_minute": self.by_minute, "minute_ts": minute_ts, "total": round(self.total, 3)}
        return {"aenergy": counted, "ret_aenergy": returned}

    def measured(self) -> Frame:
        return {
            "apower": self.apower,
            "aprtpower": round(self.voltage * self.current, 1),
            "current": self.current,
            "freq": 50.0,
            "pf": 0.98 if self.apower else 0,
            "voltage": self.voltage,
        }

    def minute(self, minute_ts: int, old_firmware: bool) -> Frame:
        return self.energy(minute_ts) | ({} if old_firmware else self.measured())

    def status(self, minute_ts: int) -> Frame:
        rest = {"id": self.number, "source": "init", "output": self.on, "temperature": {"tC": 41.2, "tF": 106.2}}
        return rest | self.energy(minute_ts) | self.measured()


def pump(rnd: random.Random, hour: int) -> list[float]:
    """The power of the next minutes, as for the loads below: a run every hour or so of a morning or evening."""
    begins = rnd.random() < (1 / 60 if hour in {6, 7, 8, 9, 17, 18, 19, 20} else 1 / 360)
    return [812.0] * rnd.randint(8, 25) + [0.0] * 30 if begins else [0.0]


def heater(rnd: random.Random, hour: int) -> list[float]:
    wanted = hour in {6, 7, 8, 17, 18, 19, 20, 21}
    stage = rnd.choice([1250.0, 1600.0, 1900.0])
    return [stage] * rnd.randint(6, 14) + [0.0] * rnd.randint(4, 10) if wanted else [0.0]


def fridge(rnd: random.Random, hour: int) -> list[float]:
    return [90.0] * 12 + [2.0] * rnd.randint(25, 31)


# Name, power, and whether the output is what switches it.
LOADS: list[tuple[str, Callable[[random.Random, int], list[float]], bool]] = [
    ("Well pump", pump, True),
    ("Heater", heater, False),
    ("Fridge", fridge, False),
    ("Spare", lambda rnd, hour: [0.0], True),
]


class Load(Switch):
    """An output of a house: its power follows a plan, from minute to minute."""

    spread = 0.015

    def __init__(self, number: int, rnd: random.Random) -> None:
        super().__init__(number, rnd)
        again, kind = divmod(number, len(LOADS))
        name, self.plan, self.switched = LOADS[kind]
        self.name = f"{name} {again + 1}" if again else name
        ahead = self.plan(rnd, 0)
        self.ahead = ahead[rnd.randrange(len(ahead)) :]  # not all fridges at once

    def pass_minute(self, hour: int) -> None:
        super().pass_minute(hour)
        self.ahead = self.ahead or self.plan(self.rnd, hour)
        self.load_w = self.ahead.pop(0)
        self.on = self.load_w > 0 or not self.switched
        self.change_load()


class Device:
    """The frames of one device; `sent` keeps those that went out, the newest last."""

    name: str | None = None
    at: float | None = None  # the time in the past that frames are made for

    def __init__(self, device_id: str, channels: int = 4, old_firmware: bool = False, seed: int = 1) -> None:
        self.rnd = random.Random(seed)
        self.id, self.old_firmware = device_id, old_firmware
        self.switches: list[Switch] = [Switch(n, self.rnd) for n in range(channels)]
        self.booted = time.time()
        self.synced = False  # before the first NTP answer ts is the uptime
        self.sent: list[Frame] = []

    def now(self) -> float:
        return self.at or round(time.time() - (0 if self.synced else self.booted), 2)

    def notify(self, components: Frame, method: str = "NotifyStatus") -> Frame:
        frame = {"src": self.id, "dst": "ws", "method": method, "params": {"ts": self.now(), **components}}
        return frame | {"received": self.at} if self.at else frame

    def components(self) -> Frame:
        minute_ts = int(time.time()) // 60 * 60
        switches = {f"switch:{s.number}": s.status(minute_ts) for s in self.switches}
        rest = {
            "ble": {},
            "cloud": {"connected": True},
            "input:0": {"id": 0, "state": False},
            "mqtt": {"connected": False},
            "sys": {
                "mac": self.id[-12:].upper(),
                "unixtime": int(time.time()),
                "uptime": int(time.time() - self.booted),
            },
            "wifi": {"sta_ip": "192.168.1.20", "status": "got ip", "rssi": -58},
            "ws": {"connected": True},
        }
        return rest | switches

    def full_status(self) -> Frame:
        return self.notify(self.components(), "NotifyFullStatus")

    def config(self) -> Frame:
        rest = {"in_mode": "follow", "initial_state": "match_input", "auto_on": False, "auto_off": False}
        switches = {f"switch:{s.number}": {"id": s.number, "name": s.name, **rest} for s in self.switches}
        return {"sys": {"device": {"name": self.name, "mac": self.id[-12:].upper(), "discoverable": True}}} | switches

    def answer(self, request: Frame) -> Frame:
        reply = {"id": request.get("id"), "src": self.id, "dst": request.get("src")}
        if request.get("method") == "Shelly.GetStatus":
            return reply | {"result": self.components()}
        if request.get("method") == "Shelly.GetConfig":
            return reply | {"result": self.config()}
        return reply | {"error": {"code": 404, "message": f"No handler for {request.get('method')}"}}

    def minute(self) -> list[Frame]:
        """One frame per channel, also while off."""
        minute_ts = int(self.at or time.time()) // 60 * 60
        hour = time.localtime(minute_ts).tm_hour
        for switch in self.switches:
            switch.pass_minute(hour)
        return [self.notify({f"switch:{s.number}": s.minute(minute_ts, self.old_firmware)}) for s in self.switches]

    def change(self) -> list[Frame]:
        """What happens between two minutes: a load that changes, or an output that is switched."""
        switch = self.rnd.choice(self.switches)
        key = f"switch:{switch.number}"
        if self.rnd.random() < 0.2:
            switch.on = not switch.on
            switch.change_load()
            return self.switched(switch)
        switch.change_load()
        delta = {"current": switch.current}
        return [self.notify({key: delta if self.rnd.random() < 0.3 else {"apower": switch.apower, **delta}})]

    def switched(self, switch: Switch) -> list[Frame]:
        key, source = f"switch:{switch.number}", {"output": switch.on, "source": "SHC"}
        if switch.on:  # the power follows
            power = {"apower": switch.apower, "current": switch.current}
            return [self.notify({key: source}), self.notify({key: power})]
        return [self.notify({key: {"apower": 0, "current": 0, "pf": 0, **source}})]


class House(Device):
    """A device with loads that follow the hours of the day, and with a past of some minutes until that is played."""

    def __init__(self, number: int, channels: int, old_firmware: bool, minutes: int) -> None:
        super().__init__(f"simulated-house-{number}", channels, old_firmware, seed=number)
        self.name = "House" if number == 1 else f"House {number}"
        self.number, self.minutes = number, minutes
        self.past: list[Frame] = []
        self.lived_s = 0  # the start of the minute in which the past ends

    def minute(self) -> list[Frame]:
        """Loads change at full minutes: what that switched comes after the frames, and no row is made of it."""
        before = [switch.on for switch in self.switches]
        frames = super().minute()
        for switch, was_on in zip(self.switches, before, strict=True):
            frames += self.switched(switch) if switch.on != was_on else []
        return frames

    def change(self) -> list[Frame]:
        return []

    def remember(self) -> None:
        """Live from the start of a week, the same for every run, up to this minute, and keep the last hours' frames."""
        self.switches = [Load(s.number, random.Random(f"{self.number}/{s.number}")) for s in self.switches]
        self.lived_s, week_s = int(time.time()) // 60 * 60, 7 * 86400
        first = self.lived_s - self.minutes * 60
        silent = first + int(self.minutes * self.rnd.uniform(0.3, 0.6)) * 60
        without_network = range(silent, silent + min(20, self.minutes // 3) * 60)
        self.past = []
        for minute in range((self.lived_s - 86400) // week_s * week_s, self.lived_s + 60, 60):
            self.at = round(minute + self.rnd.uniform(0, 0.02), 2)
            frames = self.minute()
            if first <= minute < self.lived_s and minute not in without_network:
                self.past += frames
        self.at = None


def passes_filter(frame: Frame) -> bool:
    """What the Worker forwards: a frame whose params hold one of the first three switches above 10 W."""
    params = frame.get("params") or {}
    powers = (params.get(f"switch:{n}", {}).get("apower") for n in range(3))
    return any(isinstance(power, int | float) and power > 10 for power in powers)


class Line:
    """A device's way to the collector; behind a filter it opens with the first frame that passes."""

    def __init__(self, device: Device, url: str, filtered: bool, show: Callable[[str], None]) -> None:
        self.device, self.url, self.filtered, self.show = device, url, filtered, show
        self.websocket: ClientConnection | None = None
        self.reader: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self.websocket = await connect(self.url, subprotocols=["json-rpc"], compression=None, ping_interval=None)
        self.reader = asyncio.create_task(self.answer_requests(self.websocket))

    async def send(self, *frames: Frame) -> None:
        """Send frames; raises WebSocketException or OSError when the line is down."""
        for frame in frames:
            if self.filtered and not passes_filter(frame):
                continue
            if self.websocket is None:
                await self.open()
            assert self.websocket is not None
            text = json.dumps(frame, separators=(",", ":"))
            await self.websocket.send(text)
            self.device.sent.append(frame)
            if "received" not in frame:
                shown = text if len(text) < 160 else f"{text[:150]} … {len(text)} bytes"
                self.show(f"{self.device.id} {shown}")

    async def answer_requests(self, websocket: ClientConnection) -> None:
        with contextlib.suppress(WebSocketException, OSError):
            async for text in websocket:
                await self.send(self.device.answer(json.loads(text)))

    async def close(self) -> None:
        if self.reader is not None:
            self.reader.cancel()
        if self.websocket is not None:
            await self.websocket.close()
        self.websocket = None


async def play_past(line: Line, house: House) -> None:
    """Play what a house remembers; if the line drops meanwhile, it will be remembered and played anew."""
    for frame in house.past:
        await line.send(frame)
        await asyncio.sleep(0)  # questions are answered meanwhile
    line.show(f"{house.id} -- played {house.minutes} minutes of the past")
    house.minutes = 0
    for _ in range(house.lived_s, int(time.time()) // 60 * 60, 60):  # full minutes that came meanwhile
        await line.send(*house.minute())


async def play(line: Line, minute_s: float, minutes: int | None) -> None:
    """Live through a number of minutes on one connection; raises WebSocketException or OSError when it drops."""
    device = line.device
    if isinstance(device, House) and device.minutes:
        device.remember()
    if not line.filtered:
        await line.open()
    await asyncio.sleep(0.1 * min(1, minute_s))
    await line.send(device.full_status())
    device.synced = True
    await line.send(device.notify({"ws": {"connected": True}}), device.notify({"cloud": {"connected": True}}))
    if isinstance(device, House) and device.minutes:
        await play_past(line, device)
    done = 0
    while minutes is None or done < minutes:
        till_minute = minute_s - time.time() % minute_s
        if till_minute > 0.3 * minute_s:
            await asyncio.sleep(till_minute * device.rnd.uniform(0.2, 0.6))
            await line.send(*device.change())
            continue
        await asyncio.sleep(till_minute + device.rnd.uniform(0, 0.02) * min(1, minute_s))
        await line.send(*device.minute())
        done += 1


async def live(line: Line, minute_s: float, minutes: int | None) -> None:
    """Play, and come back after a drop: the wait is 1 to 60 s on a real device, of its minutes."""
    while True:
        try:
            await play(line, minute_s, minutes)
            return
        except (BrokenPipeError, InvalidURI):
            raise
        except (WebSocketException, InvalidHandshake, OSError) as exc:
            wait_s = line.device.rnd.uniform(1, 28) / 60 * minute_s
            line.show(f"{line.device.id} -- {str(exc) or type(exc).__name__}; back in {wait_s:.1f} s")
            await line.close()
            await asyncio.sleep(wait_s)
        finally:
            await line.close()


def read_history(text: str) -> int:
    """Minutes of `90m` or `24h`."""
    found = re.fullmatch("([0-9]{1,4})([mh])", text)
    minutes = int(found[1]) * (60 if found[2] == "h" else 1) if found else 0
    if not 0 < minutes <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text!r} is nothing like 90m or 24h, which is the most")
    return minutes


async def main() -> None:
    parser = argparse.ArgumentParser(description="A Shelly Pro 4PM without the hardware.")
    parser.add_argument("url", nargs="?", default="ws://localhost:5000/ws", help="default: %(default)s")
    parser.add_argument("--devices", type=int, default=1, help="how many")
    parser.add_argument("--channels", type=int, default=4, help="of each device")
    parser.add_argument("--minute", type=float, default=60.0, metavar="S", help="seconds that a minute takes, e.g. 1")
    parser.add_argument("--minutes", type=int, metavar="N", help="stop after so many; default: never")
    parser.add_argument("--history", type=read_history, metavar="TIME", help="play so much past first, e.g. 24h or 90m")
    parser.add_argument("--old-firmware", action="store_true", help="before 1.5: minute frames hold aenergy alone")
    parser.add_argument("--filter", action="store_true", help="send what the filter in front lets pass")
    parser.add_argument("--quiet", action="store_true", help="do not show what is sent")
    args = parser.parse_args()
    if not args.minute > 0:
        parser.error("--minute must be above 0")

    def show(text: str) -> None:
        if not args.quiet:
            print(text, flush=True)

    devices = [
        House(n + 1, args.channels, args.old_firmware, args.history)
        if args.history
        else Device(f"shellypro4pm-a1b2c3{n:06x}", args.channels, args.old_firmware, seed=n)
        for n in range(args.devices)
    ]
    lines = [Line(device, args.url, args.filter, show) for device in devices]
    lives = asyncio.gather(*(live(line, args.minute, args.minutes) for line in lines))
    for name in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C ends it all the same
            asyncio.get_running_loop().add_signal_handler(name, lives.cancel)
    try:
        await lives
    except InvalidURI as exc:
        raise SystemExit(str(exc)) from None
    except BrokenPipeError:  # `… | head`: nobody reads on, not even what is still to be flushed at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except asyncio.CancelledError:
        show("stopped")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
