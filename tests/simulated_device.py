#!/usr/bin/env python3
"""A Shelly without the hardware, a Pro 4PM by default: speaks to a collector as the real one does, quirks included.

    python tests/simulated_device.py ws://localhost:5000/ws --minute 1
    python tests/simulated_device.py ws://localhost:5000/ws --history 24h
    python tests/simulated_device.py ws://localhost:5000/ws --model pro3em

It asks for subprotocol json-rpc and needs no answer, sends its whole status right after connecting, answers requests,
then sends one frame per channel at each full minute, deltas when a load changes, and what switching off and on brings.
After a drop it comes back. `--filter` puts the Cloudflare Worker of docs/filter.md in between: only frames with a channel
above 10 W pass, and the connection opens with the first of them.

`--model pro3em` is a three-phase meter: its powers come every few seconds (em:0), its counters at each full minute
(emdata:0). Phase c has solar panels, which give back by day; `--unconnected b` leaves a phase without a wire, which
tells 0 V. `--model proem50` has two clamps, the second around the panels' wire, and a relay without a meter.

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


# What a device is made of, each by itself. All tell their status, their configuration and the one frame of a full minute
# as components by key, and what happens between two minutes as a list of such.
class Switch:
    """One metered output; power in W, energy in Wh."""

    name: str | None = None
    spread = 0.1  # of the load

    def __init__(self, number: int, rnd: random.Random, old_firmware: bool = False) -> None:
        self.number, self.rnd, self.old_firmware = number, rnd, old_firmware
        self.key = f"switch:{number}"
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

    def minute(self, minute_ts: int) -> Frame:
        return {self.key: self.energy(minute_ts) | ({} if self.old_firmware else self.measured())}

    def status(self, minute_ts: int) -> Frame:
        rest = {"id": self.number, "source": "init", "output": self.on, "temperature": {"tC": 41.2, "tF": 106.2}}
        return {self.key: rest | self.energy(minute_ts) | self.measured()}

    def config(self) -> Frame:
        rest = {"in_mode": "follow", "initial_state": "match_input", "auto_on": False, "auto_off": False}
        return {self.key: {"id": self.number, "name": self.name, **rest}}

    def change(self) -> list[Frame]:
        """A load that changes, or an output that is switched."""
        if self.rnd.random() < 0.2:
            self.on = not self.on
            self.change_load()
            return self.turned()
        self.change_load()
        delta = {"current": self.current}
        return [{self.key: delta if self.rnd.random() < 0.3 else {"apower": self.apower, **delta}}]

    def turned(self) -> list[Frame]:
        source = {"output": self.on, "source": "SHC"}
        if self.on:  # the power follows
            return [{self.key: source}, {self.key: {"apower": self.apower, "current": self.current}}]
        return [{self.key: {"apower": 0, "current": 0, "pf": 0, **source}}]


class Relay:
    """An output without a meter."""

    def __init__(self, number: int, rnd: random.Random) -> None:
        self.number, self.rnd, self.key, self.on = number, rnd, f"switch:{number}", True

    def pass_minute(self, hour: int) -> None:
        pass

    def minute(self, minute_ts: int) -> Frame:
        return {}

    def status(self, minute_ts: int) -> Frame:
        return {
            self.key: {"id": self.number, "source": "init", "output": self.on, "temperature": {"tC": 40, "tF": 104}}
        }

    def config(self) -> Frame:
        return {self.key: {"id": self.number, "name": None, "initial_state": "off"}}

    def change(self) -> list[Frame]:
        self.on = not self.on
        return [{self.key: {"id": self.number, "output": self.on, "source": "SHC"}}]


class Wire:
    """What a clamp sees of one wire; power in W, negative when it flows back, and two counters in Wh that only rise."""

    def __init__(self, rnd: random.Random, solar: bool = False, connected: bool = True) -> None:
        self.rnd, self.solar, self.connected = rnd, solar, connected
        self.load_w = rnd.uniform(50, 2500)
        self.drawn = rnd.uniform(1e5, 9e6) if connected else 0.0
        self.returned = rnd.uniform(1e5, 9e6) if solar and connected else 0.0
        self.measure()

    def measure(self) -> None:
        hour, power = time.localtime().tm_hour, self.load_w
        if self.solar:  # at night the inverter itself takes a little
            power = -self.load_w if 7 <= hour < 19 else 4.0
        self.power = round(power * self.rnd.uniform(0.9, 1.1), 1) if self.connected else 0.0
        self.voltage = round(self.rnd.uniform(226, 234), 1) if self.connected else 0.0
        self.current = round(abs(self.power) / self.voltage * 1.02, 3) if self.connected else 0.027

    def pass_minute(self) -> None:
        self.drawn += max(self.power, 0) / 60
        self.returned += max(-self.power, 0) / 60

    def measured(self, phase: str = "") -> Frame:
        values = {
            "act_power": self.power,
            "aprt_power": round(self.voltage * self.current, 1),
            "current": self.current,  # has no sign
            "freq": 50.0 if self.connected else 198,  # noise
            "pf": 0.98 if self.connected else 1,
            "voltage": self.voltage,
        }
        return {phase + name: value for name, value in values.items()}

    def counted(self, phase: str = "") -> Frame:
        values = {"total_act_energy": self.drawn, "total_act_ret_energy": self.returned}
        return {phase + name: round(value, 2) for name, value in values.items()}


class Clamp:
    """A meter of one wire: power in em1:N, counters in em1data:N."""

    def __init__(self, number: int, rnd: random.Random, name: str, solar: bool = False) -> None:
        self.number, self.rnd, self.name, self.wire = number, rnd, name, Wire(rnd, solar)

    def pass_minute(self, hour: int) -> None:
        self.wire.pass_minute()

    def minute(self, minute_ts: int) -> Frame:
        return {f"em1data:{self.number}": {"id": self.number, **self.wire.counted()}}

    def status(self, minute_ts: int) -> Frame:
        measured = {"id": self.number, **self.wire.measured(), "calibration": "factory"}
        return {f"em1:{self.number}": measured} | self.minute(minute_ts)

    def config(self) -> Frame:
        rest = {"reverse": False, "ct_type": "50A"}
        return {f"em1:{self.number}": {"id": self.number, "name": self.name, **rest}, f"em1data:{self.number}": {}}

    def change(self) -> list[Frame]:
        """Mostly all that it measures; sometimes the voltage has stayed within its threshold."""
        before = self.wire.voltage
        self.wire.measure()
        measured = self.wire.measured()
        if self.rnd.random() < 0.3:
            self.wire.voltage = before
            measured = {name: measured[name] for name in ("act_power", "current")}
        return [{f"em1:{self.number}": {"id": self.number, **measured}}]


class ThreePhase:
    """A meter of three wires: their powers in em:0, their counters in emdata:0."""

    name = "House"

    def __init__(self, rnd: random.Random, unconnected: str | None = None) -> None:
        self.wires = {phase: Wire(rnd, phase == "c", phase != unconnected) for phase in "abc"}

    def pass_minute(self, hour: int) -> None:
        for wire in self.wires.values():
            wire.pass_minute()

    def measured(self) -> Frame:
        values: Frame = {"id": 0}
        for phase, wire in self.wires.items():
            values |= wire.measured(f"{phase}_")
        sums = {
            name: sum(values[f"{phase}_{name}"] for phase in "abc") for name in ("act_power", "aprt_power", "current")
        }
        return values | {"n_current": None} | {f"total_{name}": round(value, 3) for name, value in sums.items()}

    def minute(self, minute_ts: int) -> Frame:
        values: Frame = {"id": 0}
        for phase, wire in self.wires.items():
            values |= wire.counted(f"{phase}_")
        for total, counter in ("total_act", "total_act_energy"), ("total_act_ret", "total_act_ret_energy"):
            values[total] = round(sum(values[f"{phase}_{counter}"] for phase in "abc"), 2)
        return {"emdata:0": values}

    def status(self, minute_ts: int) -> Frame:
        return {"em:0": self.measured() | {"user_calibrated_phase": []}} | self.minute(minute_ts)

    def config(self) -> Frame:
        rest = {"monitor_phase_sequence": False, "phase_selector": "all", "reverse": {}, "ct_type": "120A"}
        return {"em:0": {"id": 0, "name": self.name, **rest}, "emdata:0": {}}

    def change(self) -> list[Frame]:
        for wire in self.wires.values():
            wire.measure()
        return [{"em:0": self.measured()}]


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

    def __init__(self, number: int, rnd: random.Random, old_firmware: bool = False) -> None:
        super().__init__(number, rnd, old_firmware)
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
    """The frames of one device, a Pro 4PM unless told otherwise; `sent` keeps those that went out, the newest last."""

    name: str | None = None
    at: float | None = None  # the time in the past that frames are made for
    pauses = (0.2, 0.5)  # between two changes, in minutes

    def __init__(self, device_id: str, channels: int = 4, old_firmware: bool = False, seed: int = 1) -> None:
        self.rnd = random.Random(seed)
        self.id, self.old_firmware = device_id, old_firmware
        self.parts: list[Any] = [Switch(n, self.rnd, old_firmware) for n in range(channels)]
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
        components = {
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
        for part in self.parts:
            components |= part.status(minute_ts)
        return dict(sorted(components.items()))

    def full_status(self) -> Frame:
        return self.notify(self.components(), "NotifyFullStatus")

    def config(self) -> Frame:
        config = {"sys": {"device": {"name": self.name, "mac": self.id[-12:].upper(), "discoverable": True}}}
        for part in self.parts:
            config |= part.config()
        return config

    def answer(self, request: Frame) -> Frame:
        reply = {"id": request.get("id"), "src": self.id, "dst": request.get("src")}
        if request.get("method") == "Shelly.GetStatus":
            return reply | {"result": self.components()}
        if request.get("method") == "Shelly.GetConfig":
            return reply | {"result": self.config()}
        return reply | {"error": {"code": 404, "message": f"No handler for {request.get('method')}"}}

    def minute(self) -> list[Frame]:
        """One frame per part that has a meter, also while off."""
        minute_ts = int(self.at or time.time()) // 60 * 60
        hour = time.localtime(minute_ts).tm_hour
        for part in self.parts:
            part.pass_minute(hour)
        return [self.notify(components) for part in self.parts if (components := part.minute(minute_ts))]

    def change(self) -> list[Frame]:
        """What happens between two minutes."""
        return [self.notify(components) for components in self.rnd.choice(self.parts).change()]


class Pro3EM(Device):
    """A three-phase meter."""

    pauses = (0.03, 0.1)

    def __init__(self, device_id: str, unconnected: str | None = None, seed: int = 1) -> None:
        super().__init__(device_id, seed=seed)
        self.parts = [ThreePhase(self.rnd, unconnected)]


class ProEM50(Device):
    """Two clamps, the second one around the wire of solar panels, and a relay without a meter."""

    pauses = (0.03, 0.1)

    def __init__(self, device_id: str, seed: int = 1) -> None:
        super().__init__(device_id, seed=seed)
        self.parts = [Clamp(0, self.rnd, "Mains"), Clamp(1, self.rnd, "Panels", solar=True), Relay(0, self.rnd)]


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
        before = [switch.on for switch in self.parts]
        frames = super().minute()
        for switch, was_on in zip(self.parts, before, strict=True):
            frames += [self.notify(components) for components in switch.turned() if switch.on != was_on]
        return frames

    def change(self) -> list[Frame]:
        return []

    def remember(self) -> None:
        """Live from the start of a week, the same for every run, up to this minute, and keep the last hours' frames."""
        rnds = [random.Random(f"{self.number}/{n}") for n in range(len(self.parts))]
        self.parts = [Load(n, rnd, self.old_firmware) for n, rnd in enumerate(rnds)]
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
        till_minute, pause = minute_s - time.time() % minute_s, minute_s * device.rnd.uniform(*device.pauses)
        if till_minute > pause + 0.05 * minute_s:
            await asyncio.sleep(pause)
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
    parser = argparse.ArgumentParser(description="A Shelly without the hardware.")
    parser.add_argument("url", nargs="?", default="ws://localhost:5000/ws", help="default: %(default)s")
    parser.add_argument(
        "--model", choices=["pro4pm", "pro3em", "proem50"], default="pro4pm", help="default: %(default)s"
    )
    parser.add_argument("--devices", type=int, default=1, help="how many")
    parser.add_argument("--channels", type=int, help="of each Pro 4PM; default: 4")
    parser.add_argument("--minute", type=float, default=60.0, metavar="S", help="seconds that a minute takes, e.g. 1")
    parser.add_argument("--minutes", type=int, metavar="N", help="stop after so many; default: never")
    parser.add_argument("--history", type=read_history, metavar="TIME", help="play so much past first, e.g. 24h or 90m")
    parser.add_argument("--old-firmware", action="store_true", help="before 1.5: minute frames hold aenergy alone")
    parser.add_argument("--filter", action="store_true", help="send what the filter in front lets pass")
    parser.add_argument("--unconnected", choices="abc", help="the phase of a Pro 3EM that has no wire")
    parser.add_argument("--quiet", action="store_true", help="do not show what is sent")
    args = parser.parse_args()
    if not args.minute > 0:
        parser.error("--minute must be above 0")
    belong = dict.fromkeys(("channels", "history", "old_firmware", "filter"), "pro4pm") | {"unconnected": "pro3em"}
    for name, model in belong.items():
        if getattr(args, name) not in (None, False) and model != args.model:
            parser.error(f"--{name.replace('_', '-')} goes with --model {model} only")

    def show(text: str) -> None:
        if not args.quiet:
            print(text, flush=True)

    def make(n: int) -> Device:
        device_id, channels = f"shelly{args.model}-a1b2c3{n:06x}", 4 if args.channels is None else args.channels
        if args.model == "pro3em":
            return Pro3EM(device_id, args.unconnected, seed=n)
        if args.model == "proem50":
            return ProEM50(device_id, seed=n)
        if args.history:
            return House(n + 1, channels, args.old_firmware, args.history)
        return Device(device_id, channels, args.old_firmware, seed=n)

    devices = [make(n) for n in range(args.devices)]
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
