#!/usr/bin/env python3
"""A Shelly without the hardware, by default a Pro 4PM: it speaks to a collector as a
real one does, quirks included.

    python tests/simulated_device.py ws://localhost:5000/ws --minute 1
    python tests/simulated_device.py ws://localhost:5000/ws --history 24h
    python tests/simulated_device.py ws://localhost:5000/ws --model pro3em

It asks for the subprotocol json-rpc, but does not need it. It sends its full status right
after connecting, and answers requests. Then it sends a frame for each channel at each
full minute, and deltas when a load changes or is switched. After a drop it comes back.

`--filter` puts the Cloudflare Worker of docs/filter.md in between: only frames with a
channel above 10 W pass, and the connection opens with the first of them.

`--model pro3em` is a three-phase meter. Its powers (em:0) come every few seconds, its
counters (emdata:0) at each full minute. Phase c has solar panels, which feed power back
by day. `--unconnected b` leaves that phase without a wire, so it reports 0 V.
`--model proem50` has two clamps, the second around the panels' wire, and a relay without
a meter. `--model balcony` is a plug with solar panels, whose counter counts both
directions. `--model pmmini` says nothing under a steady load, but answers. `--model
1pmgen4` sends power, voltage and current every few seconds, and its counter in whole
statuses alone. `--model bulb` has neither voltage nor current. `--model charger` tells its
power in object:200.

`--clock-error -0.3` is a device whose clock is behind by so many seconds, so its minute
frames come late; above 0 they come early. `--odd-minute-ts` is firmware 1.1, whose minute
frames do not name their minute.

`--history 24h` makes it a house: a pump, a heater, a fridge and a spare output. It first
plays its last hours within seconds, with the time of each frame as `received`, and then
lives on. What it does depends on the time alone, so a second run a few days later agrees
with the first; only its 20 minutes without network are at another time.
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


# The parts of a device. Each has its status, its configuration and the frame of a full
# minute as components by key, and what happens between two minutes as a list of these.
class Switch:
    """An output with a meter. Powers are in W, counters in Wh."""

    name: str | None = None
    kind = "switch"
    # As a part of the load.
    spread = 0.1
    # Firmware 1.1 has a minute_ts that is no full minute.
    odd_minute_ts = False

    def __init__(
        self, number: int, rnd: random.Random, old_firmware: bool = False
    ) -> None:
        self.number, self.rnd, self.old_firmware = number, rnd, old_firmware
        self.key = f"{self.kind}:{number}"
        self.on = True
        self.load_w = rnd.uniform(20, 1500)
        self.apower = self.current = 0.0
        self.voltage = 230.0
        # This counts both directions, the other one what was given back.
        self.total = rnd.uniform(100, 9999)
        self.returned = 0.0
        self.by_minute = [0.0, 0.0, 0.0]
        self.returned_by_minute = [0.0, 0.0, 0.0]
        self.change_load()

    def change_load(self) -> None:
        self.apower = (
            round(self.load_w * self.rnd.uniform(1 - self.spread, 1 + self.spread), 1)
            if self.on
            else 0
        )
        self.voltage = round(self.rnd.uniform(226, 234), 1)
        amps = abs(self.apower) / self.voltage * 1.02
        self.current = round(amps, 3) if self.on else 0

    def pass_minute(self, hour: int) -> None:
        self.total += abs(self.apower) / 60
        self.by_minute = [round(abs(self.apower) / 60 * 1000, 3), *self.by_minute[:2]]
        given_back = max(-self.apower, 0) / 60
        self.returned += given_back
        self.returned_by_minute = [
            round(given_back * 1000, 3),
            *self.returned_by_minute[:2],
        ]
        self.voltage = round(self.rnd.uniform(226, 234), 1)

    def energy(self, minute_ts: int) -> Frame:
        if self.odd_minute_ts:
            minute_ts += 7
        returned = {
            "by_minute": self.returned_by_minute,
            "minute_ts": minute_ts,
            "total": round(self.returned, 3),
        }
        counted = {
            "by_minute": self.by_minute,
            "minute_ts": minute_ts,
            "total": round(self.total, 3),
        }
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
        return {
            self.key: self.energy(minute_ts)
            | ({} if self.old_firmware else self.measured())
        }

    def status(self, minute_ts: int) -> Frame:
        rest = {
            "id": self.number,
            "source": "init",
            "output": self.on,
            "temperature": {"tC": 41.2, "tF": 106.2},
        }
        return {self.key: rest | self.energy(minute_ts) | self.measured()}

    def config(self) -> Frame:
        rest = {
            "in_mode": "follow",
            "initial_state": "match_input",
            "auto_on": False,
            "auto_off": False,
        }
        return {self.key: {"id": self.number, "name": self.name, **rest}}

    def change(self) -> list[Frame]:
        """Change the load, or switch the output."""
        if self.rnd.random() < 0.2:
            self.on = not self.on
            self.change_load()
            return self.turned()
        self.change_load()
        delta = {"current": self.current}
        return [
            {
                self.key: delta
                if self.rnd.random() < 0.3
                else {"apower": self.apower, **delta}
            }
        ]

    def turned(self) -> list[Frame]:
        source = {"output": self.on, "source": "SHC"}
        # The power comes in a second frame.
        if self.on:
            return [
                {self.key: source},
                {self.key: {"apower": self.apower, "current": self.current}},
            ]
        return [{self.key: {"apower": 0, "current": 0, "pf": 0, **source}}]


class Panels(Switch):
    """A plug that solar panels feed power into by day; at night the inverter draws a
    little."""

    name = "Panels"

    def change_load(self) -> None:
        super().change_load()
        if 7 <= time.localtime().tm_hour < 19:
            self.apower = -abs(self.apower)
        else:
            self.apower, self.current = 4.0, 0.018

    def change(self) -> list[Frame]:
        self.change_load()
        return [{self.key: {"apower": self.apower, "current": self.current}}]


class SilentMeter(Switch):
    """A PM Mini before 1.6.2: under a steady load it says nothing, but it answers."""

    kind = "pm1"

    def minute(self, minute_ts: int) -> Frame:
        return {}

    def status(self, minute_ts: int) -> Frame:
        component = super().status(minute_ts)[self.key]
        return {self.key: {n: v for n, v in component.items() if n != "output"}}

    def change(self) -> list[Frame]:
        return []


class LateSwitch(Switch):
    """A 1PM Gen4 that sends power, voltage and current, but its counter in whole statuses
    alone."""

    def minute(self, minute_ts: int) -> Frame:
        return {}

    def change(self) -> list[Frame]:
        self.change_load()
        fields = {"apower": self.apower, "voltage": self.voltage}
        return [{self.key: fields | {"current": self.current}}]


class Bulb(Switch):
    """A Gen3 bulb, which has no voltage and no current."""

    kind = "cct"

    def measured(self) -> Frame:
        return {"apower": self.apower}

    def turned(self) -> list[Frame]:
        return [{self.key: {"apower": self.apower, "output": self.on}}]

    def change(self) -> list[Frame]:
        self.change_load()
        return [{self.key: {"apower": self.apower, "brightness": 60}}]


class Charger(Switch):
    """An EV charger, which tells its power in units that no document settles."""

    kind = "object"

    def minute(self, minute_ts: int) -> Frame:
        return {}

    def status(self, minute_ts: int) -> Frame:
        phase = {"power": self.apower / 1000, "voltage": self.voltage}
        return {self.key: {"value": {"total_power": self.apower, "phase_a": phase}}}

    def config(self) -> Frame:
        return {self.key: {"id": self.number, "name": "Charger"}}

    def change(self) -> list[Frame]:
        self.change_load()
        return [self.status(0)]


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
            self.key: {
                "id": self.number,
                "source": "init",
                "output": self.on,
                "temperature": {"tC": 40, "tF": 104},
            }
        }

    def config(self) -> Frame:
        return {self.key: {"id": self.number, "name": None, "initial_state": "off"}}

    def change(self) -> list[Frame]:
        self.on = not self.on
        return [{self.key: {"id": self.number, "output": self.on, "source": "SHC"}}]


class Wire:
    """What a clamp measures of a wire: a power in W, negative when it flows back, and
    two counters in Wh that only rise."""

    def __init__(
        self, rnd: random.Random, solar: bool = False, connected: bool = True
    ) -> None:
        self.rnd, self.solar, self.connected = rnd, solar, connected
        self.load_w = rnd.uniform(50, 2500)
        self.drawn = rnd.uniform(1e5, 9e6) if connected else 0.0
        self.returned = rnd.uniform(1e5, 9e6) if solar and connected else 0.0
        self.measure()

    def measure(self) -> None:
        hour, power = time.localtime().tm_hour, self.load_w
        # At night the inverter draws a little.
        if self.solar:
            power = -self.load_w if 7 <= hour < 19 else 4.0
        self.power = (
            round(power * self.rnd.uniform(0.9, 1.1), 1) if self.connected else 0.0
        )
        self.voltage = round(self.rnd.uniform(226, 234), 1) if self.connected else 0.0
        self.current = (
            round(abs(self.power) / self.voltage * 1.02, 3) if self.connected else 0.027
        )

    def pass_minute(self) -> None:
        self.drawn += max(self.power, 0) / 60
        self.returned += max(-self.power, 0) / 60

    def measured(self, phase: str = "") -> Frame:
        values = {
            "act_power": self.power,
            "aprt_power": round(self.voltage * self.current, 1),
            # The current has no sign.
            "current": self.current,
            # Without a wire this is noise.
            "freq": 50.0 if self.connected else 198,
            "pf": 0.98 if self.connected else 1,
            "voltage": self.voltage,
        }
        return {phase + name: value for name, value in values.items()}

    def counted(self, phase: str = "") -> Frame:
        values = {"total_act_energy": self.drawn, "total_act_ret_energy": self.returned}
        return {phase + name: round(value, 2) for name, value in values.items()}


class Clamp:
    """A meter of one wire, with its power in em1:N and its counters in em1data:N."""

    def __init__(
        self, number: int, rnd: random.Random, name: str, solar: bool = False
    ) -> None:
        self.number, self.rnd, self.name, self.wire = (
            number,
            rnd,
            name,
            Wire(rnd, solar),
        )

    def pass_minute(self, hour: int) -> None:
        self.wire.pass_minute()

    def minute(self, minute_ts: int) -> Frame:
        return {f"em1data:{self.number}": {"id": self.number, **self.wire.counted()}}

    def status(self, minute_ts: int) -> Frame:
        measured = {"id": self.number, **self.wire.measured(), "calibration": "factory"}
        return {f"em1:{self.number}": measured} | self.minute(minute_ts)

    def config(self) -> Frame:
        rest = {"reverse": False, "ct_type": "50A"}
        return {
            f"em1:{self.number}": {"id": self.number, "name": self.name, **rest},
            f"em1data:{self.number}": {},
        }

    def change(self) -> list[Frame]:
        """Mostly this has all values; sometimes the voltage has not changed enough to
        be sent."""
        before = self.wire.voltage
        self.wire.measure()
        measured = self.wire.measured()
        if self.rnd.random() < 0.3:
            self.wire.voltage = before
            measured = {name: measured[name] for name in ("act_power", "current")}
        return [{f"em1:{self.number}": {"id": self.number, **measured}}]


class ThreePhase:
    """A meter of three wires, with their powers in em:0 and their counters in emdata:0."""

    name = "House"

    def __init__(self, rnd: random.Random, unconnected: str | None = None) -> None:
        self.wires = {
            phase: Wire(rnd, phase == "c", phase != unconnected) for phase in "abc"
        }

    def pass_minute(self, hour: int) -> None:
        for wire in self.wires.values():
            wire.pass_minute()

    def measured(self) -> Frame:
        values: Frame = {"id": 0}
        for phase, wire in self.wires.items():
            values |= wire.measured(f"{phase}_")
        sums = {
            name: sum(values[f"{phase}_{name}"] for phase in "abc")
            for name in ("act_power", "aprt_power", "current")
        }
        return (
            values
            | {"n_current": None}
            | {f"total_{name}": round(value, 3) for name, value in sums.items()}
        )

    def minute(self, minute_ts: int) -> Frame:
        values: Frame = {"id": 0}
        for phase, wire in self.wires.items():
            values |= wire.counted(f"{phase}_")
        for total, counter in (
            ("total_act", "total_act_energy"),
            ("total_act_ret", "total_act_ret_energy"),
        ):
            values[total] = round(
                sum(values[f"{phase}_{counter}"] for phase in "abc"), 2
            )
        return {"emdata:0": values}

    def status(self, minute_ts: int) -> Frame:
        return {"em:0": self.measured() | {"user_calibrated_phase": []}} | self.minute(
            minute_ts
        )

    def config(self) -> Frame:
        rest = {
            "monitor_phase_sequence": False,
            "phase_selector": "all",
            "reverse": {},
            "ct_type": "120A",
        }
        return {"em:0": {"id": 0, "name": self.name, **rest}, "emdata:0": {}}

    def change(self) -> list[Frame]:
        for wire in self.wires.values():
            wire.measure()
        return [{"em:0": self.measured()}]


def pump(rnd: random.Random, hour: int) -> list[float]:
    """The power in each of the next minutes: a run about every hour, mornings and
    evenings."""
    begins = rnd.random() < (
        1 / 60 if hour in {6, 7, 8, 9, 17, 18, 19, 20} else 1 / 360
    )
    return [812.0] * rnd.randint(8, 25) + [0.0] * 30 if begins else [0.0]


def heater(rnd: random.Random, hour: int) -> list[float]:
    wanted = hour in {6, 7, 8, 17, 18, 19, 20, 21}
    stage = rnd.choice([1250.0, 1600.0, 1900.0])
    return (
        [stage] * rnd.randint(6, 14) + [0.0] * rnd.randint(4, 10) if wanted else [0.0]
    )


def fridge(rnd: random.Random, hour: int) -> list[float]:
    return [90.0] * 12 + [2.0] * rnd.randint(25, 31)


# The name, the plan of its power, and whether the output switches it on and off.
LOADS: list[tuple[str, Callable[[random.Random, int], list[float]], bool]] = [
    ("Well pump", pump, True),
    ("Heater", heater, False),
    ("Fridge", fridge, False),
    ("Spare", lambda rnd, hour: [0.0], True),
]


class Load(Switch):
    """An output of a house, whose power follows a plan from minute to minute."""

    spread = 0.015

    def __init__(
        self, number: int, rnd: random.Random, old_firmware: bool = False
    ) -> None:
        super().__init__(number, rnd, old_firmware)
        again, kind = divmod(number, len(LOADS))
        name, self.plan, self.switched = LOADS[kind]
        self.name = f"{name} {again + 1}" if again else name
        ahead = self.plan(rnd, 0)
        # Fridges do not all start at once.
        self.ahead = ahead[rnd.randrange(len(ahead)) :]

    def pass_minute(self, hour: int) -> None:
        super().pass_minute(hour)
        self.ahead = self.ahead or self.plan(self.rnd, hour)
        self.load_w = self.ahead.pop(0)
        self.on = self.load_w > 0 or not self.switched
        self.change_load()


class Device:
    """A device that makes frames, by default a Pro 4PM. `sent` holds those that went
    out, the newest last."""

    name: str | None = None
    # The time in the past that its frames stand for; None: now.
    at: float | None = None
    # The right time, and by how much its own clock is ahead of it.
    clock: Callable[[], float] = staticmethod(time.time)
    clock_error_s = 0.0
    # Between two changes, in minutes.
    pauses = (0.2, 0.5)

    def __init__(
        self,
        device_id: str,
        channels: int = 4,
        old_firmware: bool = False,
        seed: int = 1,
    ) -> None:
        self.rnd = random.Random(seed)
        self.id, self.old_firmware = device_id, old_firmware
        self.parts: list[Any] = [
            Switch(n, self.rnd, old_firmware) for n in range(channels)
        ]
        self.booted = time.time()
        # Until it has the time from NTP, its ts is the uptime.
        self.synced = False
        self.sent: list[Frame] = []

    def time(self) -> float:
        """The time by its own clock."""
        return self.clock() + self.clock_error_s

    def now(self) -> float:
        return self.at or round(self.time() - (0 if self.synced else self.booted), 2)

    def notify(self, components: Frame, method: str = "NotifyStatus") -> Frame:
        frame = {
            "src": self.id,
            "dst": "ws",
            "method": method,
            "params": {"ts": self.now(), **components},
        }
        return frame | {"received": self.at} if self.at else frame

    def components(self) -> Frame:
        minute_ts = int(self.time()) // 60 * 60
        components = {
            "ble": {},
            "cloud": {"connected": True},
            "input:0": {"id": 0, "state": False},
            "mqtt": {"connected": False},
            "sys": {
                "mac": self.id[-12:].upper(),
                "unixtime": int(self.time()),
                "uptime": int(self.clock() - self.booted),
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
        config = {
            "sys": {
                "device": {
                    "name": self.name,
                    "mac": self.id[-12:].upper(),
                    "discoverable": True,
                }
            }
        }
        for part in self.parts:
            config |= part.config()
        return config

    def answer(self, request: Frame) -> Frame:
        reply = {"id": request.get("id"), "src": self.id, "dst": request.get("src")}
        if request.get("method") == "Shelly.GetStatus":
            return reply | {"result": self.components()}
        if request.get("method") == "Shelly.GetConfig":
            return reply | {"result": self.config()}
        return reply | {
            "error": {"code": 404, "message": f"No handler for {request.get('method')}"}
        }

    def minute(self) -> list[Frame]:
        """A frame for each part that has a meter, even while it is off."""
        minute_ts = int(self.at or self.time()) // 60 * 60
        hour = time.localtime(minute_ts).tm_hour
        for part in self.parts:
            part.pass_minute(hour)
        return [
            self.notify(components)
            for part in self.parts
            if (components := part.minute(minute_ts))
        ]

    def change(self) -> list[Frame]:
        """The frames of what happens between two minutes."""
        return [
            self.notify(components)
            for components in self.rnd.choice(self.parts).change()
        ]


class SmallDevice(Device):
    """A device with a single part, and how often it speaks, in minutes."""

    def __init__(
        self,
        device_id: str,
        part: type[Switch],
        number: int = 0,
        seed: int = 1,
        pauses: tuple[float, float] = (0.2, 0.5),
    ) -> None:
        super().__init__(device_id, seed=seed)
        self.parts = [part(number, self.rnd)]
        self.pauses = pauses


class Pro3EM(Device):
    """A three-phase meter."""

    pauses = (0.03, 0.1)

    def __init__(
        self, device_id: str, unconnected: str | None = None, seed: int = 1
    ) -> None:
        super().__init__(device_id, seed=seed)
        self.parts = [ThreePhase(self.rnd, unconnected)]


class ProEM50(Device):
    """Two clamps, the second around the wire of solar panels, and a relay without a
    meter."""

    pauses = (0.03, 0.1)

    def __init__(self, device_id: str, seed: int = 1) -> None:
        super().__init__(device_id, seed=seed)
        self.parts = [
            Clamp(0, self.rnd, "Mains"),
            Clamp(1, self.rnd, "Panels", solar=True),
            Relay(0, self.rnd),
        ]


class House(Device):
    """A device whose loads follow the hours of the day. It has a past of some minutes
    until that has been played."""

    def __init__(
        self, number: int, channels: int, old_firmware: bool, minutes: int
    ) -> None:
        super().__init__(
            f"simulated-house-{number}", channels, old_firmware, seed=number
        )
        self.name = "House" if number == 1 else f"House {number}"
        self.number, self.minutes = number, minutes
        self.past: list[Frame] = []
        # The past ends at the start of this minute.
        self.lived_s = 0

    def minute(self) -> list[Frame]:
        """Loads change at full minutes. What that switches is sent behind the minute's
        frames, so no row is made of it."""
        before = [switch.on for switch in self.parts]
        frames = super().minute()
        for switch, was_on in zip(self.parts, before, strict=True):
            frames += [
                self.notify(components)
                for components in switch.turned()
                if switch.on != was_on
            ]
        return frames

    def change(self) -> list[Frame]:
        return []

    def remember(self) -> None:
        """Live from the start of a week up to this minute, and keep the last hours'
        frames. Every run starts at the same time, so all have the same past."""
        rnds = [random.Random(f"{self.number}/{n}") for n in range(len(self.parts))]
        self.parts = [Load(n, rnd, self.old_firmware) for n, rnd in enumerate(rnds)]
        self.lived_s, week_s = int(time.time()) // 60 * 60, 7 * 86400
        first = self.lived_s - self.minutes * 60
        silent = first + int(self.minutes * self.rnd.uniform(0.3, 0.6)) * 60
        without_network = range(silent, silent + min(20, self.minutes // 3) * 60)
        self.past = []
        for minute in range(
            (self.lived_s - 86400) // week_s * week_s, self.lived_s + 60, 60
        ):
            self.at = round(minute + self.rnd.uniform(0, 0.02), 2)
            frames = self.minute()
            if first <= minute < self.lived_s and minute not in without_network:
                self.past += frames
        self.at = None


def passes_filter(frame: Frame) -> bool:
    """Whether the Worker forwards a frame: one of the first three switches is above 10
    W."""
    params = frame.get("params") or {}
    powers = (params.get(f"switch:{n}", {}).get("apower") for n in range(3))
    return any(isinstance(power, int | float) and power > 10 for power in powers)


class Line:
    """A device's connection to the collector. Behind a filter it opens with the first
    frame that passes."""

    def __init__(
        self, device: Device, url: str, filtered: bool, show: Callable[[str], None]
    ) -> None:
        self.device, self.url, self.filtered, self.show = device, url, filtered, show
        self.websocket: ClientConnection | None = None
        self.reader: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self.websocket = await connect(
            self.url, subprotocols=["json-rpc"], compression=None, ping_interval=None
        )
        self.reader = asyncio.create_task(self.answer_requests(self.websocket))

    async def send(self, *frames: Frame) -> None:
        """Send frames. Raises WebSocketException or OSError when the connection is
        down."""
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

    def check(self) -> None:
        """Raise OSError when the collector has closed the connection, which a device
        that sends nothing would not notice."""
        if self.reader is not None and self.reader.done():
            raise OSError("the collector has closed the connection")

    async def close(self) -> None:
        if self.reader is not None:
            self.reader.cancel()
        if self.websocket is not None:
            await self.websocket.close()
        self.websocket = None


async def play_past(line: Line, house: House) -> None:
    """Play a house's past. If the connection drops meanwhile, the next one plays all of
    it again."""
    for frame in house.past:
        await line.send(frame)
        # Requests are answered meanwhile.
        await asyncio.sleep(0)
    line.show(f"{house.id} -- played {house.minutes} minutes of the past")
    house.minutes = 0
    # Live through the full minutes that have come meanwhile.
    for _ in range(house.lived_s, int(time.time()) // 60 * 60, 60):
        await line.send(*house.minute())


async def play(line: Line, minute_s: float, minutes: int | None) -> None:
    """Live through some minutes on one connection. Raises WebSocketException or OSError
    when it drops."""
    device = line.device
    if isinstance(device, House) and device.minutes:
        device.remember()
    if not line.filtered:
        await line.open()
    await asyncio.sleep(0.1 * min(1, minute_s))
    await line.send(device.full_status())
    device.synced = True
    await line.send(
        device.notify({"ws": {"connected": True}}),
        device.notify({"cloud": {"connected": True}}),
    )
    if isinstance(device, House) and device.minutes:
        await play_past(line, device)
    done = 0
    while minutes is None or done < minutes:
        till_minute, pause = (
            minute_s - device.time() % minute_s,
            minute_s * device.rnd.uniform(*device.pauses),
        )
        if till_minute > pause + 0.05 * minute_s:
            await asyncio.sleep(pause)
            await line.send(*device.change())
            line.check()
            continue
        await asyncio.sleep(
            till_minute + device.rnd.uniform(0, 0.02) * min(1, minute_s)
        )
        await line.send(*device.minute())
        line.check()
        done += 1


async def live(line: Line, minute_s: float, minutes: int | None) -> None:
    """Play, and come back after a drop, after a part of a minute. A real device waits 1
    to 60 s."""
    while True:
        try:
            await play(line, minute_s, minutes)
            return
        except (BrokenPipeError, InvalidURI):
            raise
        except (WebSocketException, InvalidHandshake, OSError) as exc:
            wait_s = line.device.rnd.uniform(1, 28) / 60 * minute_s
            line.show(
                f"{line.device.id} -- {str(exc) or type(exc).__name__}; back in {wait_s:.1f} s"
            )
            await line.close()
            await asyncio.sleep(wait_s)
        finally:
            await line.close()


def read_history(text: str) -> int:
    """The minutes of a text such as `90m` or `24h`."""
    found = re.fullmatch("([0-9]{1,4})([mh])", text)
    minutes = int(found[1]) * (60 if found[2] == "h" else 1) if found else 0
    if not 0 < minutes <= 24 * 60:
        raise argparse.ArgumentTypeError(
            f"{text!r} is nothing like 90m or 24h, which is the most"
        )
    return minutes


# The model that each option belongs to, where it is not for all.
MODEL_OF_OPTION = {
    "channels": "pro4pm",
    "history": "pro4pm",
    "old_firmware": "pro4pm",
    "filter": "pro4pm",
    "unconnected": "pro3em",
    "odd_minute_ts": "pro4pm",
}
# The part, its number and the pauses of each model that has a single part.
SMALL_MODELS: dict[str, tuple[type[Switch], int, tuple[float, float]]] = {
    "balcony": (Panels, 0, (0.2, 0.5)),
    "pmmini": (SilentMeter, 0, (1, 2)),
    "1pmgen4": (LateSwitch, 0, (0.11, 0.12)),
    "bulb": (Bulb, 0, (0.2, 0.5)),
    "charger": (Charger, 200, (0.2, 0.5)),
}


def read_arguments() -> argparse.Namespace:
    """The options of the command line. Exits with status 2 where they make no sense."""
    parser = argparse.ArgumentParser(description="A Shelly without the hardware.")
    add = parser.add_argument
    default = "default: %(default)s"
    add("url", nargs="?", default="ws://localhost:5000/ws", help=default)
    models = ["pro4pm", "pro3em", "proem50", *SMALL_MODELS]
    add("--model", choices=models, default="pro4pm", help=default)
    add("--devices", type=int, default=1, help="how many")
    add("--channels", type=int, help="of each Pro 4PM; default: 4")
    minute_help = "seconds that a minute takes, e.g. 1"
    add("--minute", type=float, default=60.0, metavar="S", help=minute_help)
    add("--minutes", type=int, metavar="N", help="stop after so many; default: never")
    history_help = "play so much past first, e.g. 24h or 90m"
    add("--history", type=read_history, metavar="TIME", help=history_help)
    firmware_help = "before 1.5: minute frames hold aenergy alone"
    add("--old-firmware", action="store_true", help=firmware_help)
    add("--filter", action="store_true", help="send what the filter in front lets pass")
    unconnected_help = "the phase of a Pro 3EM that has no wire"
    add("--unconnected", choices="abc", help=unconnected_help)
    clock_help = "by how many seconds its clock is ahead; below 0: behind"
    add("--clock-error", type=float, default=0.0, metavar="S", help=clock_help)
    odd_help = "firmware 1.1: minute frames do not name their minute"
    add("--odd-minute-ts", action="store_true", help=odd_help)
    add("--quiet", action="store_true", help="do not show what is sent")
    args = parser.parse_args()
    if not args.minute > 0:
        parser.error("--minute must be above 0")
    for name, model in MODEL_OF_OPTION.items():
        given = getattr(args, name) not in (None, False)
        if given and model != args.model:
            option = name.replace("_", "-")
            parser.error(f"--{option} goes with --model {model} only")
    return args


def make_device(args: argparse.Namespace, n: int) -> Device:
    """The device with the number `n`, beginning with 0, and the clock that was asked
    for."""
    device = make_model(args, n)
    device.clock_error_s = args.clock_error
    for part in device.parts:
        part.odd_minute_ts = args.odd_minute_ts
    return device


def make_model(args: argparse.Namespace, n: int) -> Device:
    device_id = f"shelly{args.model}-a1b2c3{n:06x}"
    channels = 4 if args.channels is None else args.channels
    if args.model == "pro3em":
        return Pro3EM(device_id, args.unconnected, seed=n)
    if args.model == "proem50":
        return ProEM50(device_id, seed=n)
    if args.model in SMALL_MODELS:
        part, number, pauses = SMALL_MODELS[args.model]
        return SmallDevice(device_id, part, number, seed=n, pauses=pauses)
    if args.history:
        return House(n + 1, channels, args.old_firmware, args.history)
    return Device(device_id, channels, args.old_firmware, seed=n)


async def main() -> None:
    args = read_arguments()

    def show(text: str) -> None:
        if not args.quiet:
            print(text, flush=True)

    devices = [make_device(args, n) for n in range(args.devices)]
    lines = [Line(device, args.url, args.filter, show) for device in devices]
    lives = asyncio.gather(*(live(line, args.minute, args.minutes) for line in lines))
    for name in (signal.SIGINT, signal.SIGTERM):
        # Windows has no such handlers; Ctrl-C still ends it.
        with contextlib.suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(name, lives.cancel)
    try:
        await lives
    except InvalidURI as exc:
        raise SystemExit(str(exc)) from None
    except BrokenPipeError:
        # With `… | head`, nobody reads the rest, not even what is flushed at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except asyncio.CancelledError:
        show("stopped")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
