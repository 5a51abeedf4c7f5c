#!/usr/bin/env python3
"""A Shelly Pro 4PM without the hardware: speaks to a collector as the real one does, quirks included.

    python tests/simulated_device.py ws://localhost:5000/ws --minute 1

It asks for subprotocol json-rpc and needs no answer, sends its whole status right after connecting, answers requests,
then sends one frame per channel at each full minute, deltas when a load changes, and what switching off and on brings.
After a drop it comes back. `--filter` puts the Cloudflare Worker of the README in between: only frames with a channel
above 10 W pass, and the connection opens with the first of them.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
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
        self.apower = round(self.load_w * self.rnd.uniform(0.9, 1.1), 1) if self.on else 0
        self.voltage = round(self.rnd.uniform(226, 234), 1)
        self.current = round(self.apower / self.voltage * 1.02, 3) if self.on else 0

    def pass_minute(self) -> None:
        self.total += self.apower / 60
        self.by_minute = [round(self.apower / 60 * 1000, 3), *self.by_minute[:2]]

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
            "pf": 0.98 if self.on else 0,
            "voltage": self.voltage,
        }

    def minute(self, minute_ts: int, old_firmware: bool) -> Frame:
        return self.energy(minute_ts) | ({} if old_firmware else self.measured())

    def status(self, minute_ts: int) -> Frame:
        rest = {"id": self.number, "source": "init", "output": self.on, "temperature": {"tC": 41.2, "tF": 106.2}}
        return rest | self.energy(minute_ts) | self.measured()


class Device:
    """The frames of one device; `sent` keeps those that went out, the newest last."""

    def __init__(self, device_id: str, channels: int = 4, old_firmware: bool = False, seed: int = 1) -> None:
        self.rnd = random.Random(seed)
        self.id, self.old_firmware = device_id, old_firmware
        self.switches = [Switch(n, self.rnd) for n in range(channels)]
        self.booted = time.time()
        self.synced = False  # before the first NTP answer ts is the uptime
        self.sent: list[Frame] = []

    def now(self) -> float:
        return round(time.time() - (0 if self.synced else self.booted), 2)

    def notify(self, components: Frame, method: str = "NotifyStatus") -> Frame:
        return {"src": self.id, "dst": "ws", "method": method, "params": {"ts": self.now(), **components}}

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

    def answer(self, request: Frame) -> Frame:
        reply = {"id": request.get("id"), "src": self.id, "dst": request.get("src")}
        if request.get("method") == "Shelly.GetStatus":
            return reply | {"result": self.components()}
        return reply | {"error": {"code": 404, "message": f"No handler for {request.get('method')}"}}

    def minute(self) -> list[Frame]:
        """One frame per channel, also while off."""
        minute_ts = int(time.time()) // 60 * 60
        for switch in self.switches:
            switch.pass_minute()
            switch.voltage = round(self.rnd.uniform(226, 234), 1)
        return [self.notify({f"switch:{s.number}": s.minute(minute_ts, self.old_firmware)}) for s in self.switches]

    def change(self) -> list[Frame]:
        """What happens between two minutes: a load that changes, or an output that is switched."""
        switch = self.rnd.choice(self.switches)
        key = f"switch:{switch.number}"
        if self.rnd.random() < 0.2:
            switch.on = not switch.on
            switch.change_load()
            source = {"output": switch.on, "source": "SHC"}
            if switch.on:  # the power follows
                return [
                    self.notify({key: source}),
                    self.notify({key: {"apower": switch.apower, "current": switch.current}}),
                ]
            return [self.notify({key: {"apower": 0, "current": 0, "pf": 0, **source}})]
        switch.change_load()
        delta = {"current": switch.current}
        return [self.notify({key: delta if self.rnd.random() < 0.3 else {"apower": switch.apower, **delta}})]


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
            self.show(f"{self.device.id} {text if len(text) < 160 else text[:150] + ' … ' + str(len(text)) + ' bytes'}")

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


async def play(line: Line, minute_s: float, minutes: int | None) -> None:
    """Live through a number of minutes on one connection; raises WebSocketException or OSError when it drops."""
    device = line.device
    if not line.filtered:
        await line.open()
    await asyncio.sleep(0.1 * min(1, minute_s))
    await line.send(device.full_status())
    device.synced = True
    await line.send(device.notify({"ws": {"connected": True}}), device.notify({"cloud": {"connected": True}}))
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


async def main() -> None:
    parser = argparse.ArgumentParser(description="A Shelly Pro 4PM without the hardware.")
    parser.add_argument("url", nargs="?", default="ws://localhost:5000/ws", help="default: %(default)s")
    parser.add_argument("--devices", type=int, default=1, help="how many")
    parser.add_argument("--channels", type=int, default=4, help="of each device")
    parser.add_argument("--minute", type=float, default=60.0, metavar="S", help="seconds that a minute takes, e.g. 1")
    parser.add_argument("--minutes", type=int, metavar="N", help="stop after so many; default: never")
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
        Device(f"shellypro4pm-a1b2c3{n:06x}", args.channels, args.old_firmware, seed=n) for n in range(args.devices)
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
