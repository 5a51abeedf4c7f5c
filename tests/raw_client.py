#!/usr/bin/env python3
"""Cheap devices for benchmark.py, so that its figures are not those of a client.

A device is a socket, and a task that answers the collector's pings: otherwise it would
be dropped after 50 s. Its frames are made before they are sent, and have a mask of
zeros. The collector unmasks them like any other, and here the text goes out as it is.

As a program, this is a part of a fleet, with a loopback address of its own:

    python tests/raw_client.py --port 5733 --address 127.0.0.2 --first 0 --count 10000

It says `connected` once its devices are, and then obeys its input, a command a line:

    prepare 1795437480    make the frames of the interval that starts then; `ready`
    send                  wait for that moment and send them; `sent`

It ends with its input, or with an error if the collector dropped one of the devices.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

TEXT = 0x1
PING = 0x9
PONG = 0xA

FINAL = 0x80
MASKED = 0x80
TWO_BYTES_OF_LENGTH = 126
MASK_OF_ZEROS = bytes(4)

# asyncio's server has a backlog of 100. Of more at once, Linux would drop some, and
# they would try again a second later.
CONNECTED_AT_ONCE = 100

CHANNELS_OF_A_DEVICE = (0, 1, 2, 3)


# ---- Frames ------------------------------------------------------------------
def client_frame(opcode: int, payload: bytes) -> bytes:
    """Return a client's frame as it goes over the wire."""
    size = len(payload)
    if size < TWO_BYTES_OF_LENGTH:
        length = bytes([MASKED | size])
    else:
        length = bytes([MASKED | TWO_BYTES_OF_LENGTH]) + size.to_bytes(2, "big")
    return bytes([FINAL | opcode]) + length + MASK_OF_ZEROS + payload


def notify_status(device: str, components: dict[str, Any]) -> bytes:
    frame = {
        "src": device,
        "dst": "ws",
        "method": "NotifyStatus",
        "params": {"ts": time.time(), **components},
    }
    return client_frame(TEXT, json.dumps(frame).encode())


def this_minute() -> int:
    return int(time.time()) // 60 * 60


def minute_frame(
    device: str, channels: tuple[int, ...], rnd: random.Random, minute_ts: int
) -> bytes:
    """Return what a Pro 4PM sends of one or more channels at the full minute."""
    component = {
        "aenergy": {
            "by_minute": [7035.312, 7161.568, 7514.251],
            "minute_ts": minute_ts,
            "total": round(rnd.random() * 9999, 3),
        },
        "apower": round(rnd.uniform(11, 2000), 1),
        "aprtpower": 438.0,
        "current": round(rnd.random() * 9, 3),
        "freq": 50.0,
        "pf": 0.8,
        "ret_aenergy": {
            "by_minute": [0.0, 0.0, 0.0],
            "minute_ts": minute_ts,
            "total": 0.0,
        },
        "voltage": 228.2,
    }
    return notify_status(
        device, {f"switch:{channel}": component for channel in channels}
    )


def delta(device: str, channel: int, rnd: random.Random) -> bytes:
    """Return what a device sends when the power of a channel changes."""
    component = {
        "apower": round(rnd.uniform(11, 2000), 1),
        "current": round(rnd.random() * 9, 3),
    }
    return notify_status(device, {f"switch:{channel}": component})


# ---- Devices -----------------------------------------------------------------
@dataclass
class Client:
    """The device's end of a connection."""

    writer: asyncio.StreamWriter
    reading: asyncio.Task[None]


async def connect(
    port: int, deflate: bool = False, address: str = "127.0.0.1"
) -> Client:
    """Connect a device from `address`; it answers pings, and ignores all else."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, local_addr=(address, 0)
    )
    lines = [
        "GET /ws HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        "Sec-WebSocket-Version: 13",
    ]
    if deflate:
        offer = "permessage-deflate; client_max_window_bits"
        lines.append(f"Sec-WebSocket-Extensions: {offer}")
    request = "\r\n".join(lines) + "\r\n\r\n"
    writer.write(request.encode())
    answer = await reader.readuntil(b"\r\n\r\n")
    if not answer.startswith(b"HTTP/1.1 101 "):
        raise SystemExit(f"no WebSocket: {answer.decode()}")
    return Client(writer, asyncio.create_task(answer_pings(reader, writer)))


async def answer_pings(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Read until the end of the connection, and answer each ping."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            start, size = await reader.readexactly(2)
            if size == TWO_BYTES_OF_LENGTH:
                size = int.from_bytes(await reader.readexactly(2), "big")
            payload = await reader.readexactly(size)
            if start == FINAL | PING:
                writer.write(client_frame(PONG, payload))


async def connect_many(
    count: int, port: int, deflate: bool = False, address: str = "127.0.0.1"
) -> list[Client]:
    clients: list[Client] = []
    while len(clients) < count:
        missing = count - len(clients)
        together = min(CONNECTED_AT_ONCE, missing)
        clients += await asyncio.gather(
            *(connect(port, deflate, address) for _ in range(together))
        )
    return clients


async def push(clients: list[Client], loads: list[bytes]) -> None:
    """Send each device's load; return when all of it is on its way."""
    for client, load in zip(clients, loads, strict=True):
        client.writer.write(load)
    for client in clients:
        await client.writer.drain()


async def hang_up(clients: list[Client]) -> None:
    for client in clients:
        client.writer.close()
    await asyncio.gather(*(client.reading for client in clients))


def use_all_descriptors() -> int:
    """Raise the limit of open files as far as it goes, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


# ---- A part of a fleet -------------------------------------------------------
def say(word: str) -> None:
    print(word, flush=True)


async def read_commands() -> asyncio.StreamReader:
    """Return the program's input as a reader, so that pings are answered meanwhile."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    return reader


def make_loads(first: int, count: int, interval_start: int) -> list[bytes]:
    """Return each device's frames of an interval: one for each of its channels."""
    rnd = random.Random(interval_start)
    loads = []
    for number in range(first, first + count):
        device = f"shellypro4pm-{number:012x}"
        frames = [
            minute_frame(device, (channel,), rnd, interval_start)
            for channel in CHANNELS_OF_A_DEVICE
        ]
        loads.append(b"".join(frames))
    return loads


def check_connected(clients: list[Client]) -> None:
    dropped = sum(client.reading.done() for client in clients)
    if dropped:
        raise SystemExit(f"the collector dropped {dropped} of {len(clients)} devices")


async def take_part(port: int, address: str, first: int, count: int) -> None:
    commands = await read_commands()
    clients = await connect_many(count, port, address=address)
    say("connected")
    interval_start = 0
    loads: list[bytes] = []
    async for line in commands:
        command, *arguments = line.split()
        if command == b"prepare":
            interval_start = int(arguments[0])
            loads = make_loads(first, count, interval_start)
            say("ready")
        if command == b"send":
            await asyncio.sleep(interval_start - time.time())
            await push(clients, loads)
            say("sent")
        check_connected(clients)
    await hang_up(clients)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--address", default="127.0.0.1", help="of the devices")
    parser.add_argument("--first", type=int, default=0, help="number of a device")
    parser.add_argument("--count", type=int, required=True, help="of devices")
    args = parser.parse_args()
    use_all_descriptors()
    asyncio.run(take_part(args.port, args.address, args.first, args.count))


if __name__ == "__main__":
    main()
