"""The endpoint for devices, HTTP answers, the token, and what strangers send, over real
sockets."""

import asyncio
import contextlib
import json
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse

import psutil
import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus

from asking import GET_CONFIG
from shelly_collector import DeviceConnection, ask_periodically, handle_device
from support import (
    DEVICE,
    GET_STATUS,
    VALUES,
    device,
    fresh_database,
    minute_frame,
    notify,
    read_rows,
    starting_collectors,
    wait_for,
    wait_for_rows,
)

HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nHost: x:1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
VALUES_OF_MINUTE = (433.8, 228.2, 2.631, 1234.567)


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """One collector for all tests that only ask it over HTTP."""
    with fresh_database() as database, starting_collectors(tmp_path_factory) as start:
        running = start(DATABASE_URL=database)
        asyncio.run(running.ready())
        yield running


@pytest.fixture
async def shared(collectors, database):
    """A collector of the test's own."""
    return await collectors(DATABASE_URL=database).ready()


async def test_a_device_is_asked_and_its_frame_is_a_row_a_moment_later(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="60"
    ).ready()
    async with device(running.url, subprotocols=["json-rpc"]) as peer:
        await peer.send(
            {
                "id": 1,
                "src": DEVICE,
                "dst": "collector",
                "error": {"code": 404, "message": "No handler"},
            }
        )
        await peer.send(minute_frame())
        assert await wait_for_rows(database, 1) == [
            (DEVICE, "switch:0", *VALUES_OF_MINUTE)
        ]
        assert (await running.health())["devices connected"] == "1"
    ((start, written),) = read_rows(database, "timestamp, created_at")
    assert start.second == 0 and -1 < (written - start).total_seconds() < 61
    assert (
        re.findall(f"{DEVICE} connected from 127.0.0.1", running.log)
        and "404" not in running.log
    )


async def test_several_devices_on_one_socket_and_one_device_on_two(
    collectors, database
):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as one, device(running.url) as two:
        await one.send(minute_frame("a"), minute_frame("b"))
        await wait_for_rows(database, 2)
        await two.send(minute_frame("a"), minute_frame("a", 1))
        assert [row[:2] for row in await wait_for_rows(database, 3)] == [
            ("a", "switch:0"),
            ("a", "switch:1"),
            ("b", "switch:0"),
        ]


@pytest.mark.slow
async def test_a_frame_in_fragments_counts_and_a_binary_one_does_not(
    collectors, database
):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(json.dumps(minute_frame("binary")).encode())
        await peer.websocket.send(
            [json.dumps(minute_frame())[:50], json.dumps(minute_frame())[50:]]
        )
        assert [row[0] for row in await wait_for_rows(database, 1)] == [DEVICE]
    assert "frame passed over" in running.log and "binary" in running.log


@pytest.mark.slow
async def test_old_firmware_is_asked_for_its_voltage_again(collectors, database):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="0.2"
    ).ready()
    async with device(running.url) as peer:
        # It has no voltage, which counts as an old one. But the collector has just
        # asked for a status, so it does not ask again.
        await peer.send(
            notify(
                {"switch:0": {"apower": 5.0, "current": 0.1, "aenergy": {"total": 1.0}}}
            )
        )
        await wait_for_rows(database, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.websocket.recv(), 0.1)
    assert running.log.count("reports no voltage_v") == 1


async def test_an_old_voltage_is_asked_for_and_seldom_where_nobody_answers(
    make, monkeypatch, replace
):
    replace(ASK_TICK=0.01)
    collector, clock = make(), 1_795_435_200.0
    monkeypatch.setattr(time, "time", lambda: clock)

    async def handle(websocket):
        await handle_device(collector, websocket)

    asking = asyncio.create_task(ask_periodically(collector))
    async with serve(
        handle, "127.0.0.1", 0, create_connection=DeviceConnection
    ) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
        async with device(url) as peer:
            asked = []
            for minute in range(19):
                frame = (
                    minute_frame()
                    if minute == 0
                    else notify({"switch:0": {"aenergy": {"total": float(minute)}}})
                )
                await peer.send(frame)
                await wait_for(
                    lambda minute=minute: len(collector.outbox) == minute + 1
                )
                (link,) = collector.links
                clock += 58
                # It is looked at once in each minute, in its second half.
                await wait_for(
                    lambda link=link, minute=clock - 58: (
                        link.requests.looked_interval == minute
                    )
                )
                await (await peer.websocket.ping())
                clock += 2
                with contextlib.suppress(TimeoutError):
                    request = await asyncio.wait_for(peer.websocket.recv(), 0.05)
                    asked.append((minute, request))
    asking.cancel()
    # The request that follows the connection counts.
    assert asked == [(minute, GET_STATUS) for minute in (5, 6, 16)]
    assert not collector.links


@pytest.mark.slow
async def test_a_silent_device_is_asked_and_each_answer_is_a_row(collectors, database):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="60"
    ).ready()
    meter = minute_frame()["params"]["switch:0"]
    answer = {"id": 2, "src": DEVICE, "dst": "collector", "result": {"pm1:0": meter}}
    async with device(running.url) as peer:
        await peer.send(answer)
        await wait_for_rows(database, 1)
        assert await peer.websocket.recv() == GET_CONFIG
        # It comes in the second half of the next minute at the latest.
        assert await asyncio.wait_for(peer.websocket.recv(), 120) == GET_STATUS
        await peer.send(answer)
        await wait_for_rows(database, 2)


async def test_with_short_intervals_it_is_asked_no_more_than_once_a_minute(
    make, monkeypatch
):
    collector, clock = make(THROTTLE_INTERVAL_SECONDS="10"), 1_795_435_200.0
    monkeypatch.setattr(time, "time", lambda: clock)

    async def handle(websocket):
        await handle_device(collector, websocket)

    async with serve(
        handle, "127.0.0.1", 0, create_connection=DeviceConnection
    ) as server:
        async with device(
            f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
        ) as peer:
            for second in range(0, 130, 10):
                # No voltage is known.
                await peer.send(notify({"switch:0": {"apower": float(second)}}))
                await (await peer.websocket.ping())
                clock += 10
            asked = [await asyncio.wait_for(peer.websocket.recv(), 5) for _ in range(2)]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(peer.websocket.recv(), 0.1)
    assert asked == [GET_STATUS] * 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/health", 200),
        ("HEAD", "/health", 200),
        ("GET", "/?x=1", 200),
        ("GET", "/ws", 426),
        ("HEAD", "/ws", 426),
        ("GET", "/nothing", 404),
        ("GET", "/ws/", 404),
        ("POST", "/", 404),
        ("OPTIONS", "/", 404),
        ("DELETE", "/ws", 426),
        ("GET", "//", 404),
        ("GET", "/%2e%2e/etc/passwd", 404),
    ],
)
async def test_http_answers(idle, method, path, status):
    before = idle.log
    got, text = await asyncio.to_thread(idle.get, path, method)
    assert got == status and (text == "") == (method == "HEAD")
    assert idle.log == before


async def test_the_answer_to_head_has_no_body(idle):
    for path in (b"/", b"/ws", b"/nothing"):
        answer = await knock(
            idle.port, b"HEAD " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 ") and answer.endswith(b"\r\n\r\n")


async def test_a_request_without_an_upgrade_is_told_which_one_is_needed(idle):
    answer = await knock(idle.port, b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 426 " in answer and b"\r\nupgrade: websocket\r\n" in answer.lower()


async def test_health_tells_how_things_stand(shared, database):
    async with device(shared.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)
        await wait_for(lambda: shared.get()[1].count("rows written: 1"))
        lines = shared.get()[1].splitlines()
    assert lines[:5] == [
        "Shelly WS collector running",
        "database: connected",
        "devices connected: 1",
        "rows written: 1",
        "rows waiting: 0",
    ]
    assert re.fullmatch(r"last write: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", lines[5])


TOKENS = ["secret", "a b", "50%+1&2=#?/ü", "😀", "x" * 500]


@pytest.mark.slow
@pytest.mark.parametrize("token", TOKENS)
async def test_only_the_right_token_lets_a_device_in(collectors, database, token):
    running = await collectors(
        DATABASE_URL=database, COLLECTOR_TOKEN=token, LOG_LEVEL="DEBUG"
    ).ready()
    encoded = urllib.parse.quote(token, safe="")
    for query in (
        "",
        "?token=",
        "?token=wrong",
        f"?token={encoded}x",
        f"?token={encoded[:-1]}",
        f"?Token={encoded}",
        f"?token=wrong&token={encoded}",
        f"?x={encoded}",
        "?token=%",
        "?token=%ff",
    ):
        with pytest.raises(InvalidStatus) as caught:
            async with connect(running.url + query):
                pass
        assert caught.value.response.status_code == 401
    for query in (f"?token={encoded}", f"?a=b&token={encoded}&c"):
        async with device(running.url + query) as peer:
            await peer.send(minute_frame())
    await wait_for_rows(database, 1)
    assert (await asyncio.to_thread(running.get, f"/ws?token={encoded}"))[0] == 426
    await running.stop()
    assert token not in running.log and encoded not in running.log
    assert (
        1
        <= running.log.count("127.0.0.1 refused: The URL lacks the right ?token=")
        <= 2
    )


@pytest.mark.slow
async def test_devices_behind_one_address_that_are_refused_each_have_their_line(
    collectors, database
):
    running = await collectors(DATABASE_URL=database, COLLECTOR_TOKEN="x").ready()
    for url in (running.url, running.url.replace("/ws", "/wss")):
        with pytest.raises(InvalidStatus):
            async with connect(url):
                pass
    await wait_for(lambda: "127.0.0.1 refused: /wss is not /ws" in running.log, 5)
    assert "127.0.0.1 refused: The URL lacks the right" in running.log


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/", "/ws/", "/WS", "/health", "/nothing?token=secret"]
)
async def test_a_device_with_a_wrong_path_is_refused_with_a_line_that_says_the_right_one(
    collectors, database, path
):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send("garbage of another one behind the same proxy")
        await wait_for(lambda: "127.0.0.1: frame passed over" in running.log)
    with pytest.raises(InvalidStatus) as caught:
        async with connect(running.url.removesuffix("/ws") + path):
            pass
    assert caught.value.response.status_code == 404 and "secret" not in running.log
    shown = path.partition("?")[0]
    assert running.log.count(f"127.0.0.1 refused: {shown} is not /ws\n") == 1


async def test_a_token_in_the_path_is_not_logged(collectors, database):
    running = await collectors(
        DATABASE_URL=database, COLLECTOR_TOKEN="a secret", DASHBOARD_TOKEN="look"
    ).ready()
    told = []
    for path, shown in {
        "/ws&token=a%20secret": "/ws…",
        "/ws&token=a+secret": "/ws…",
        "/wss%3Ftoken=secret": "/wss…",
        "/ws;old-secret": "/ws…",
        "/ws/a%20secret": "/ws/…",
        "/%E2%80%AEx": "/…",
        "/" + 99 * "x": "/" + 59 * "x" + "…",
    }.items():
        with pytest.raises(InvalidStatus):
            async with connect(running.url.removesuffix("/ws") + path):
                pass
        refused = json.loads(running.get("/data/refused.json?token=look")[1])
        told.append(refused[0]["path"] == shown)
        # The last one for an address and a reason.
        assert len(refused) == 1
    assert told == [True] * 7
    assert "secret" not in running.log
    # Another path is news at once, the same one only after a minute.
    assert running.log.count("/wss… is not /ws") == 1
    assert 1 <= running.log.count(" /ws… is not /ws") <= 2


async def test_tls_on_the_plain_port_is_named(shared):
    context = ssl.create_default_context()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", shared.port, ssl=context)
    line = "127.0.0.1 refused: it speaks wss:// to a ws:// port\n"
    await wait_for(lambda: line in shared.log, 5)


async def test_a_device_that_leaves_makes_a_line_that_says_why(shared, database):
    async with device(shared.url) as closes, device(shared.url) as breaks:
        async with device(shared.url) as sends_too_much:
            peers = {"closes": closes, "breaks": breaks, "floods": sends_too_much}
            for device_id, peer in peers.items():
                await peer.send(minute_frame(device_id))
            await wait_for_rows(database, 3)
            await sends_too_much.send("x" * 300_000)
            await wait_for(lambda: "floods left after 0:00:0" in shared.log)
        await closes.websocket.close()
        breaks.websocket.transport.abort()
        await wait_for(lambda: "breaks left after 0:00:0" in shared.log)
    reasons = dict(re.findall(r"(\w+) left after [\d:]+: (.*)", shared.log))
    assert reasons == {
        "closes": "it closed the connection",
        "breaks": "the connection broke",
        "floods": "the collector closed it, frame with 300000 bytes exceeds limit of 262144 bytes",
    }


async def test_a_device_that_no_longer_answers_is_said_to_have_left(make, caplog):
    collector = make()
    caplog.set_level("INFO")

    async def handle(websocket):
        await handle_device(collector, websocket)

    async with serve(
        handle,
        "127.0.0.1",
        0,
        create_connection=DeviceConnection,
        ping_interval=0.1,
        ping_timeout=0.1,
        close_timeout=0.1,
    ) as server:
        port = server.sockets[0].getsockname()[1]
        async with connect(
            f"ws://127.0.0.1:{port}/ws", ping_interval=None
        ) as websocket:
            await websocket.send(json.dumps(minute_frame("dead")))
            await wait_for(lambda: "dead connected" in caplog.text)
            # As a device that has lost its power: it reads nothing, and never closes.
            websocket.transport.pause_reading()
            line = "dead left after 0:00:0"
            await wait_for(lambda: line in caplog.text)
            websocket.transport.abort()
    assert "it no longer answers" in caplog.text


async def test_at_a_stop_no_device_leaves(collectors, database):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)
        await running.stop()
    assert "connected from" in running.log and " left " not in running.log


@pytest.mark.slow
async def test_without_a_token_an_open_address_warns_once(collectors, database):
    open_one = await collectors(DATABASE_URL=database, HOST="0.0.0.0").ready()
    private = await collectors(DATABASE_URL=database, HOST="127.0.0.1").ready()
    guarded = await collectors(
        DATABASE_URL=database, HOST="0.0.0.0", COLLECTOR_TOKEN="t"
    ).ready()
    assert [
        running.log.count("no COLLECTOR_TOKEN")
        for running in (open_one, private, guarded)
    ] == [1, 0, 0]


async def test_malformed_frames_are_passed_over_with_one_line_and_the_good_ones_count(
    shared, database
):
    evil = "x\n2026-01-01T00:00:00Z CRITICAL forged'); DROP TABLE power_logs; --"
    async with device(shared.url) as peer:
        for bad in (
            "",
            "{",
            "[" * 100_000,
            "NaN",
            json.dumps(minute_frame(evil)),
            json.dumps(minute_frame("\0")),
            b"\x00",
            '{"src":"x","method":"NotifyStatus","params":{"a":'
            + "[" * 9999
            + "]" * 9999
            + "}}",
            '{"src":"\\ud800","method":"NotifyStatus","params":{}}',
            "1" * 400,
            json.dumps(minute_frame("y" * 101)),
        ):
            await peer.send(bad, minute_frame())
        await peer.send(minute_frame(channel=1))
        rows = await wait_for_rows(database, 2)
    assert [row[:2] for row in rows] == [(DEVICE, "switch:0"), (DEVICE, "switch:1")]
    # One line is about the address, and one about the device, once its name is known; a
    # full minute may come in between.
    assert shared.log.count("passed over") <= 4
    assert "Traceback" not in shared.log
    assert not re.search(r"^2026-01-01", shared.log, re.MULTILINE)


@pytest.mark.slow
async def test_quotes_backslashes_and_any_letters_in_a_device_id_arrive_as_they_are(
    shared, database
):
    ids = sorted(
        [
            "o'brien",
            'say "hi"',
            "back\\slash",
            "{a,b}",
            "NULL",
            "ogemray25a-70af09f0ab7c",
            "ü😀",
            "; DROP",
        ]
    )
    async with device(shared.url) as peer:
        await peer.send(*(minute_frame(name) for name in ids))
        assert sorted(row[0] for row in await wait_for_rows(database, len(ids))) == ids


@pytest.mark.slow
async def test_a_frame_over_256_kib_closes_its_connection_only(shared, database):
    async with device(shared.url) as good, device(shared.url) as bad:
        await good.send(json.dumps(minute_frame()) + " " * (255 * 1024))
        with pytest.raises(ConnectionClosedError) as caught:
            await bad.send("x" * (256 * 1024 + 1))
            await bad.websocket.recv()
        assert caught.value.rcvd.code == 1009
        await good.send(minute_frame(channel=1))
        await wait_for_rows(database, 2)


async def knock(port, *parts):
    """Send raw bytes, then read until the collector closes. Fail if it does not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), 14)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.slow
async def test_strangers_are_disconnected_in_time_and_devices_go_on(shared, database):
    hello_tls = bytes.fromhex("16030100c8010000c40303") + bytes(100)
    knocks = [
        (b"",),
        (b"\0" * 5000,),
        (hello_tls,),
        (b"GET / HTTP/1.1\r\n",),
        (b"SSH-2.0-Go\r\n",),
        (b"\r\n\r\n",),
        (b"GET /ws HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",),
        (b"GET /ws HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",),
        (b"GET /" + b"w" * 100_000 + b" HTTP/1.1\r\n\r\n",),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",),
        (
            b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        ),
        (b"GET / HTTP/1.0\r\n\r\n",),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",),
    ]
    async with device(shared.url) as peer:
        silent = [asyncio.create_task(knock(shared.port, *parts)) for parts in knocks]
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", shared.port)):
                # A port scan sends nothing.
                pass
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)
        assert (await asyncio.to_thread(shared.get))[0] == 200
        answers = await asyncio.gather(*silent)
    assert answers[-2].startswith(b"HTTP/1.1 200")
    assert "Traceback" not in shared.log and "ERROR" not in shared.log


@pytest.mark.slow
async def test_a_dripping_handshake_is_closed_in_time(shared):
    _, writer = await asyncio.open_connection("127.0.0.1", shared.port)

    async def drip():
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"X")
                await writer.drain()
                await asyncio.sleep(0.2)

    dripping = asyncio.create_task(drip())
    await asyncio.wait_for(dripping, 14)
    writer.close()


@pytest.mark.slow
async def test_300000_invented_device_ids_on_one_socket_cost_little_memory_and_log(
    shared, database
):
    process = psutil.Process(shared.process.pid)
    before = process.memory_info().rss
    # Without a current each row waits, and is worth a warning.
    text = json.dumps(minute_frame("invented-@", current=None))
    async with device(shared.url) as peer:
        for n in range(300_000):
            await peer.websocket.send(text.replace("@", str(n)))
        await (await peer.websocket.ping())
        # A real device is still served.
        async with device(shared.url) as good:
            await good.send(minute_frame())
            await wait_for_rows(database, 1)
    assert process.memory_info().rss - before < 40 * 2**20
    assert (
        1 <= shared.log.count("at most 1000 devices") <= 2 and len(shared.log) < 200_000
    )


@pytest.mark.slow
async def test_a_peer_that_pings_and_never_reads_is_cut_off(shared, database):
    process = psutil.Process(shared.process.pid)
    before = process.memory_info().rss
    reader, writer = await asyncio.open_connection("127.0.0.1", shared.port)
    writer.write(HANDSHAKE.encode())
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.pause_reading()
    pings = b"\x89\xfd\0\0\0\0" + bytes(125)
    most = 0
    with pytest.raises(ConnectionError):
        for _ in range(150 * 2**20 // len(pings * 500)):
            writer.write(pings * 500)
            await writer.drain()
            most = max(most, process.memory_info().rss - before)
    assert most < 20 * 2**20
    writer.close()
    async with device(shared.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        ("https://127.0.0.1:{port}", 101),
        ("http://127.0.0.1:{port}", 101),
        ("http://127.0.0.1:1", 403),
        ("http://LOCALHOST:{port}", 403),
    ],
)
async def test_a_page_of_another_site_may_not_connect(shared, origin, status):
    origin = origin.format(port=shared.port)
    if status == 101:
        async with device(shared.url, origin=origin):
            return
    with pytest.raises(InvalidStatus) as caught:
        async with connect(shared.url, origin=origin):
            pass
    assert caught.value.response.status_code == status and "ERROR" not in shared.log
    assert (
        shared.log.count("127.0.0.1 refused: No page of another site may send rows.")
        == 1
    )


@pytest.mark.slow
async def test_with_a_token_any_origin_may_connect(collectors, database):
    running = await collectors(DATABASE_URL=database, COLLECTOR_TOKEN="t").ready()
    async with device(running.url + "?token=t", origin="http://evil.example"):
        pass


FLOOD = """
import socket, sys
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.sendall(sys.argv[2].encode())
sock.recv(65536)
frame = sys.argv[3].encode()
head = b"\\x81\\xfe" + len(frame).to_bytes(2, "big") + bytes(4)
while True:
    sock.sendall((head + frame) * 100)
"""


@pytest.mark.slow
async def test_a_flooding_device_does_not_starve_the_others(shared, database):
    command = [
        sys.executable,
        "-c",
        FLOOD,
        str(shared.port),
        HANDSHAKE,
        json.dumps(minute_frame("flood")),
    ]
    # These run in processes of their own, or they would starve this one.
    floods = [subprocess.Popen(command) for _ in range(2)]
    try:
        await wait_for_rows(database, 1)
        async with device(shared.url) as good:
            for n in range(20):
                await good.send(minute_frame("good", n))
                await wait_for(
                    lambda n=n: (
                        (f"switch:{n}",)
                        in read_rows(database, "channel", "id DESC LIMIT 1")
                    ),
                    5,
                )
        assert [flood.poll() for flood in floods] == [None, None]
    finally:
        for flood in floods:
            flood.kill()
            flood.wait()


@pytest.mark.slow
async def test_file_descriptors_run_out_and_service_returns(collectors, database):
    mine, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(mine, 900), hard))
    running = await collectors(DATABASE_URL=database).ready()
    resource.setrlimit(resource.RLIMIT_NOFILE, (mine, hard))
    process = psutil.Process(running.process.pid)
    assert process.rlimit(psutil.RLIMIT_NOFILE)[0] == min(hard, 1_000_000) > 900
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 20, hard))
    crowd = []
    async with device(running.url) as peer:
        for _ in range(100):
            crowd.append(socket.create_connection(("127.0.0.1", running.port)))
        await wait_for(lambda: "out of system resource" in running.log)
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)
        for sock in crowd:
            sock.close()
        await wait_for(lambda: answers(running))
    assert running.log.count("\n") < 20


def answers(running):
    try:
        return running.get()[0] == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_stop_closes_devices_with_1001_and_writes_what_is_in_hand(
    collectors, database, number
):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer, device(running.url) as bare:
        await bare.send(notify({"switch:0": {"apower": 5.0, "current": 0.1}}, "bare"))
        await peer.send(*(minute_frame(f"d{n:03}") for n in range(500)))
        # All frames are taken now, though not all rows may be written.
        await (await peer.websocket.ping())
        status, took = await running.stop(number)
        assert status == 0 and took < 3
        with pytest.raises(ConnectionClosed) as caught:
            await peer.websocket.recv()
        assert caught.value.rcvd.code == 1001
    written = [row[0] for row in read_rows(database, VALUES)]
    # "bare" still lacked two values, and none is invented.
    assert written == [f"d{n:03}" for n in range(500)]
    assert (
        "Traceback" not in running.log
        and "stopped, 0 rows wait on disk, 0 are lost" in running.log
    )


@pytest.mark.slow
async def test_a_row_that_still_waits_for_a_value_at_a_stop_has_a_line_in_the_log(
    collectors, database
):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        # Without a voltage, a current and a counter.
        await peer.send(notify({"switch:0": {"apower": 5.0}}))
        await (await peer.websocket.ping())
        await running.stop()
    assert "1 rows that still lacked a value are dropped" in running.log


async def test_a_stop_does_not_wait_for_frozen_peers(collectors, database):
    running = await collectors(DATABASE_URL=database).ready()
    frozen = [
        await asyncio.open_connection("127.0.0.1", running.port) for _ in range(50)
    ]
    for _, writer in frozen[:40]:
        writer.write(HANDSHAKE.encode())
    await wait_for(lambda: "devices connected: 40" in running.get()[1])
    status, took = await running.stop()
    assert status == 0 and took < 3
    for _, writer in frozen:
        writer.close()


@pytest.mark.slow
async def test_an_invalid_address_is_one_clear_line_and_status_1(collectors, database):
    running = collectors(DATABASE_URL=database, HOST="a..b")
    assert await asyncio.to_thread(running.process.wait, 10) == 1
    assert running.log.count("\n") == 1 and "cannot listen" in running.log


@pytest.mark.slow
async def test_a_port_in_use_is_one_clear_line_and_status_1(collectors, database):
    first = await collectors(DATABASE_URL=database).ready()
    second = collectors(DATABASE_URL=database, PORT=str(first.port))
    assert await asyncio.to_thread(second.process.wait, 10) == 1
    assert (
        f"cannot listen on 127.0.0.1, port {first.port}:"
        " it is taken. Does a collector run already? If not, set PORT\n" in second.log
    )
