"""The Cloudflare Worker of worker/, in its real runtime.

Devices on sockets → Worker → a real collector with a real PostgreSQL, or a `Host` that
notes what it gets.
"""

import asyncio
import contextlib
import http
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

import simulated_device as sim
from shelly_collector import ENABLE_NOTIFICATIONS, GET_CONFIG, GET_STATUS
from support import (
    DEVICE,
    NUMBERS,
    ROOT,
    VALUES,
    fresh_database,
    minute_frame,
    notify,
    read_rows,
    wait_for,
)

SECRET = "s3cret of the owner"
RUNTIME = ROOT / "worker/node_modules/miniflare"
pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no node"),
    pytest.mark.skipif(
        not RUNTIME.exists(),
        reason="the Worker's runtime is missing: npm ci in worker/",
    ),
]

# In milliseconds, for tests that await several attempts to reach the collector.
SHORT_PAUSES = {"SHORTEST_PAUSE_MS": 50, "LONGEST_PAUSE_MS": 400}

# An answer, which passes every filter. When it has come, all that passes and was sent
# before it has come.
MARK = json.dumps({"id": 9, "src": DEVICE, "result": None})

# A full hour in the past, two to three hours ago.
NOON = time.time() // 3600 * 3600 - 7200


class Worker:
    """worker.js in Cloudflare's runtime, as a process.

    `bindings` are its variables, and `constants` replace those at the top of worker.js.
    """

    def __init__(self, folder, bindings, constants):
        self.log_path = folder / f"worker-{next(NUMBERS)}.txt"
        options = json.dumps({"bindings": bindings, "constants": constants})
        with self.log_path.open("wb") as log:
            command = ["node", str(ROOT / "tests/worker_runtime.mjs"), options]
            # The runtime leaves folders behind where it finds temporary ones.
            env = os.environ | {"TMPDIR": str(folder)}
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env
            )

    @property
    def log(self):
        return self.log_path.read_text()

    async def ready(self):
        def port():
            assert self.process.poll() is None, self.log
            return re.match(r"(\d+)\n", self.log)

        self.port = int((await wait_for(port, 30))[1])
        return self

    def url(self, query="", scheme="ws"):
        return f"{scheme}://127.0.0.1:{self.port}/any/path{query}"

    async def get(self, method="GET", query=""):
        """Return status and text of the answer to a request without an upgrade."""

        def ask():
            request = urllib.request.Request(self.url(query, "http"), method=method)
            with pytest.raises(urllib.error.HTTPError) as info:
                urllib.request.urlopen(request, timeout=10)
            with info.value as answer:
                return answer.code, answer.read().decode()

        return await asyncio.to_thread(ask)

    def device(self, query="", **options):
        quiet = {"ping_interval": None, "compression": None, "close_timeout": 2}
        return connect(self.url(query), **(quiet | options))


@pytest.fixture
def workers(tmp_path):
    """A function that starts Workers. None of them may log a secret or a bug."""
    started = []

    async def start(collector_url, constants=None, **variables):
        bindings = {"COLLECTOR_URL": collector_url} | variables
        started.append(Worker(tmp_path, bindings, constants or {}))
        return await started[-1].ready()

    yield start
    for worker in started:
        worker.process.stdin.close()
        try:
            worker.process.wait(10)
        finally:
            worker.process.kill()
            worker.process.wait()
    for worker in started:
        assert "s3cret" not in worker.log and "rror" not in worker.log, worker.log


class Host:
    """What stands in the collector's place, or in that of its platform's router.

    It notes what it gets, or refuses to take a connection.
    """

    def __init__(self):
        # What a Worker gets: a status; "hang", until `go_on` is set; "drop", which is a
        # connection that is closed at once; or None, a connection.
        self.answer = None
        self.go_on = asyncio.Event()
        # The times of the attempts to connect, and the one that hangs.
        self.attempts = []
        self.hanging = None
        # The connections, the messages of all of them, and the codes of their ends.
        self.links = []
        self.got = []
        self.closes = []

    async def __aenter__(self):
        self.server = await serve(
            self.handle,
            "127.0.0.1",
            0,
            process_request=self.process_request,
            compression=None,
            open_timeout=None,
            close_timeout=1,
        )
        port = self.server.sockets[0].getsockname()[1]
        self.url = f"ws://127.0.0.1:{port}/ws?token=s3cret"
        return self

    async def __aexit__(self, *_):
        self.go_on.set()
        self.server.close()
        await self.server.wait_closed()

    async def process_request(self, connection, _):
        self.attempts.append(time.monotonic())
        if self.answer == "hang":
            self.hanging = connection
            await self.go_on.wait()
        elif isinstance(self.answer, int):
            return connection.respond(
                http.HTTPStatus(self.answer), "the router's own words\n"
            )
        return None

    async def handle(self, link):
        self.links.append(link)
        if self.answer == "drop":
            return
        with contextlib.suppress(ConnectionClosed):
            async for message in link:
                self.got.append(message)
        self.closes.append(link.close_code)

    async def has(self, count):
        """Return the messages once there are `count`; more would be wrong."""
        await wait_for(lambda: len(self.got) >= count)
        assert len(self.got) == count, self.got
        return self.got

    def frames(self):
        return [json.loads(text) for text in self.got]


@pytest.fixture
async def host():
    async with Host() as one:
        yield one


def without_time(text):
    """Return a frame's text as the device sent it, before the Worker added the time."""
    return re.sub(r'^{"received":[0-9.]+,?', "{", text)


async def arrived(worker, link):
    """Wait until the Worker has taken what was sent: this comes after it."""
    await (await link.ping())
    await worker.get()


async def sent_to(link, *frames):
    for frame in frames:
        await link.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))


def at(second, frame):
    """Return the frame as if it was received then, so that no test waits for it."""
    return {**frame, "received": NOON + second}


# ---- Rows are the same as without it -----------------------------------------
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"CHANNELS": "0, 2"},
        {"MIN_POWER_W": "10"},
        {"CHANNELS": "0,1", "MIN_POWER_W": "10"},
    ],
    ids=str,
)
async def test_a_day_of_a_house_gives_the_same_rows_as_without_it(
    collectors, workers, database, variables
):
    house = sim.House(1, 4, old_firmware=False, minutes=1440)
    house.remember()
    house.at = house.past[0]["received"] - 1
    day = [house.full_status(), *house.past]
    configuration = {
        "id": 3,
        "src": house.id,
        "dst": "collector",
        "result": house.config(),
    }
    update = event(src=house.id, params={"ts": 1.0, "events": [{"event": "ota"}]})
    with_an_id = notify({"switch:0": {"current": 0.01}}, house.id) | {"id": 7}
    # In the middle of the day, and of the same moment as the frame that follows.
    noon = {"received": day[1000]["received"]}
    day[1000:1000] = [configuration | noon, update | noon, with_an_id | noon]
    with fresh_database() as other:
        settings = {"THROTTLE_INTERVAL_SECONDS": "60", **variables}
        plain, behind = (
            collectors(DATABASE_URL=url, **settings) for url in (database, other)
        )
        await asyncio.gather(plain.ready(), behind.ready())
        worker = await workers(behind.url, **variables)
        for url in (plain.url, worker.url()):
            async with connect(url, compression=None, ping_interval=None) as link:
                await sent_to(link, day[0])
                assert [await link.recv() for _ in range(2)] == [
                    ENABLE_NOTIFICATIONS,
                    GET_STATUS,
                ]
                # The collector is there now: a whole day is more than the Worker keeps.
                await sent_to(link, *day[1:])

        columns = f"timestamp, {VALUES}"
        expected = await settled(plain, database, columns)
        assert await settled(behind, other, columns) == expected
        assert len(expected) > 100


async def settled(running, database, columns):
    """Return the rows, once there are some and no more come."""

    async def is_still():
        before = await running.health()
        await asyncio.sleep(0.5)
        after = await running.health()
        has_rows = int(before.get("rows written", 0)) > 0
        return has_rows and before["rows waiting"] == "0" and before == after

    await wait_for(is_still, 30)
    return read_rows(database, columns)


async def test_the_row_after_a_run_says_that_the_pump_is_off(
    collectors, workers, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="60", MIN_POWER_W="10"
    ).ready()
    worker = await workers(running.url, MIN_POWER_W="10")
    async with worker.device() as link:
        for minute in range(10):
            power = 812.0 if minute < 4 else 0
            await sent_to(link, at(60 * minute + 0.01, minute_frame(apower=power)))
        await wait_for(lambda: len(read_rows(database)) >= 5)
    assert [row[0] for row in read_rows(database, "apower_w")] == [812.0] * 4 + [0.0]


async def test_the_collectors_requests_and_the_devices_answers_pass(
    collectors, workers, database
):
    running = await collectors(DATABASE_URL=database, COLLECTOR_TOKEN=SECRET).ready()
    token = SECRET.replace(" ", "%20")
    worker = await workers(
        f"{running.url}?token={token}", MIN_POWER_W="10", DEVICE_TOKEN=SECRET
    )
    async with worker.device(f"?token={token}", subprotocols=["json-rpc"]) as link:
        await sent_to(
            link, notify({"ws": {"connected": True}}, method="NotifyFullStatus")
        )
        assert [await link.recv() for _ in range(2)] == [
            ENABLE_NOTIFICATIONS,
            GET_STATUS,
        ]
        status = minute_frame(apower=433.8)["params"]
        await sent_to(
            link, {"id": 2, "src": DEVICE, "dst": "collector", "result": status}
        )
        assert await link.recv() == GET_CONFIG
        await wait_for(lambda: read_rows(database, "apower_w") == [(433.8,)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_of_the_collector_costs_no_row(
    collectors, workers, database, number
):
    # On a busy machine, a frame may take half a second.
    step_s = 1.0
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS=str(step_s)
    ).ready()
    worker = await workers(running.url, SHORT_PAUSES)
    reported = []
    async with worker.device() as link:

        async def report():
            """Send one frame early in each interval."""
            for interval in itertools.count(int(time.time() / step_s) + 1):
                await asyncio.sleep(max(0, (interval + 0.2) * step_s - time.time()))
                # On a busy machine it may be late, and count for the next interval.
                if time.time() < (interval + 0.5) * step_s:
                    reported.append(interval)
                    await sent_to(link, minute_frame(apower=400 + interval % 1000))

        stream = asyncio.create_task(report())
        await longer(reported, 3)
        await running.stop(number)
        await longer(reported, 2)
        await (await running.again()).ready()
        await longer(reported, 2)
        stream.cancel()
        await wait_for(lambda: newest(database, step_s) == reported[-1])
    rows = read_rows(database, "timestamp, apower_w")
    stored = [(round(moment.timestamp() / step_s), power) for moment, power in rows]
    assert stored == [(interval, 400 + interval % 1000) for interval in reported]


async def longer(items, count):
    """Wait until the list has so many more items."""
    end = len(items) + count
    await wait_for(lambda: len(items) >= end)


def newest(database, step_s):
    """Return the interval of the newest row; nothing as long as there is none."""
    rows = read_rows(database, "timestamp", "timestamp DESC LIMIT 1")
    return rows and round(rows[0][0].timestamp() / step_s)


# ---- What passes -------------------------------------------------------------
async def test_without_a_filter_everything_passes_both_ways_unchanged(workers, host):
    worker = await workers(host.url)
    texts = [
        '{ "a" :1.0,  "b":1e3}',
        "no JSON",
        "",
        '{"received":5}',
        b"\x00\xff",
        json.dumps(minute_frame(apower=0)),
        "é€😀",
    ]
    async with worker.device() as link:
        await sent_to(link, "{}")
        await host.has(1)
        # From here on there is a connection, and nothing has to wait for it.
        await sent_to(link, *texts)
        await host.has(1 + len(texts))
        assert host.got[1:] == texts
        for text in texts:
            await host.links[0].send(text)
            assert await link.recv() == text


def event(**fields):
    """Return a notification without a reading."""
    frame = {"src": DEVICE, "dst": "ws", "method": "NotifyEvent"}
    return {**frame, "params": {"ts": 1.0, "events": []}, **fields}


def delta(**components):
    """Return a NotifyStatus frame; the component switch:0 is given as switch_0."""
    return notify({key.replace("_", ":"): value for key, value in components.items()})


def whole(**components):
    frame = delta(**components)
    return frame | {"method": "NotifyFullStatus"}


def answer(number, **components):
    """Return a device's answer to the request of that id."""
    result = delta(**components)["params"]
    return {"id": number, "src": DEVICE, "result": result}


PUMP = {"MIN_POWER_W": "10"}
THREE_SMALL_POWERS = {
    "a_act_power": 5,
    "b_act_power": 6,
    "c_act_power": 7,
    "total_act_power": 18,
}
PASSES, STAYS = True, False

# By case: the Worker's variables, and its frames: second, frame, what becomes of it.
PASSING = {
    "a channel that does not run, and its run": (
        PUMP,
        [
            (0, delta(switch_0={"apower": 10}), STAYS),
            (1, delta(switch_0={"apower": 10.1}), PASSES),
            (2, delta(switch_0={"current": 1}), PASSES),
        ],
    ),
    "power that flows back": (
        PUMP,
        [(0, delta(switch_0={"apower": -11}), PASSES)],
    ),
    "130 s after the run": (
        PUMP,
        [
            (0, delta(switch_0={"apower": 500}), PASSES),
            (600, delta(switch_0={"voltage": 230}), PASSES),
            (900, delta(switch_0={"apower": 0}), PASSES),
            (1029, delta(switch_0={"voltage": 231}), PASSES),
            (1031, delta(switch_0={"voltage": 232}), STAYS),
        ],
    ),
    "null takes the power away": (
        PUMP,
        [
            (0, delta(switch_0={"apower": 500}), PASSES),
            (1, delta(switch_0={"apower": None}), PASSES),
            (140, delta(switch_0={"voltage": 230}), STAYS),
        ],
    ),
    "a whole status takes the place of what was known": (
        PUMP,
        [
            (0, delta(switch_0={"apower": 500}), PASSES),
            (1, whole(switch_0={"output": True}), PASSES),
            (140, delta(switch_0={"voltage": 230}), STAYS),
            (141, answer(2, switch_0={"apower": 20}), PASSES),
            (142, delta(switch_0={"voltage": 230}), PASSES),
            (143, answer(2, switch_0={"apower": 0}), PASSES),
            (300, delta(switch_0={"voltage": 230}), STAYS),
        ],
    ),
    "a configuration is no status": (
        PUMP,
        [
            (0, delta(switch_0={"apower": 500}), PASSES),
            (1, answer(3, switch_0={"name": "Pump"}), PASSES),
            (200, delta(switch_0={"voltage": 230}), PASSES),
        ],
    ),
    "whole statuses and answers always, other methods never": (
        PUMP,
        [
            (0, whole(sys={}), PASSES),
            (0, {"id": 1, "src": DEVICE, "error": {"code": 404}}, PASSES),
            (0, {"id": 2, "src": DEVICE, "result": {}}, PASSES),
            (0, event(), STAYS),
            (0, event(id=4), STAYS),
            (0, event(id=4, result={}), STAYS),
            (0, {"id": 4, "src": DEVICE}, STAYS),
            (0, {**delta(switch_0={"apower": 500}), "id": 5}, PASSES),
            (0, {**event(), "method": None, "result": {}}, PASSES),
        ],
    ),
    "what can be no reading": (
        {"CHANNELS": "0"},
        [
            (0, delta(ws={"connected": True}), STAYS),
            (0, {**delta(switch_0={}), "src": None}, STAYS),
            (0, delta(switch_x={"apower": 500}), STAYS),
        ],
    ),
    "channels that are kept": (
        {"CHANNELS": "0,2"},
        [
            (0, delta(switch_0={"apower": 0}), PASSES),
            (0, delta(switch_1={"apower": 500}), STAYS),
            (0, delta(switch_1={"apower": 5}, switch_2={"output": False}), PASSES),
            (0, delta(pm1_0={"apower": 0}), PASSES),
            (0, delta(em1data_1={"total_act_energy": 5.0}), STAYS),
        ],
    ),
    "another channel that runs": (
        {"CHANNELS": "0", "MIN_POWER_W": "10"},
        [(0, delta(switch_0={"apower": 2}, switch_1={"apower": 500}), STAYS)],
    ),
    "all kinds of components": (
        PUMP,
        [
            (0, delta(pm1_0={"apower": 11}), PASSES),
            (0, delta(cover_0={"apower": 11}), PASSES),
            (0, delta(light_0={"apower": 11}), PASSES),
            (0, delta(rgb_0={"apower": 11}), PASSES),
            (0, delta(rgbw_0={"apower": 11}), PASSES),
            (0, delta(cct_0={"apower": 11}), PASSES),
            (0, delta(rgbcct_0={"apower": 11}), PASSES),
            (0, delta(voltmeter_0={"apower": 11}), STAYS),
            (0, delta(em_0={"total_act_power": 11}), STAYS),
        ],
    ),
    "a clamp and its counter": (
        PUMP,
        [
            (0, delta(em1_0={"act_power": 5}), STAYS),
            (1, delta(em1data_0={"total_act_energy": 1.0}), STAYS),
            (2, delta(em1_0={"act_power": 11}), PASSES),
            (3, delta(em1data_0={"total_act_energy": 2.0}), PASSES),
            (4, delta(em1data_1={"total_act_energy": 3.0}), STAYS),
        ],
    ),
    "three phases and their counters": (
        PUMP,
        [
            (0, delta(em_0=THREE_SMALL_POWERS), STAYS),
            (1, delta(emdata_0={"total_act": 1.0}), STAYS),
            (2, delta(em_0={"c_act_power": -12}), PASSES),
            (3, delta(emdata_0={"total_act": 2.0}), PASSES),
            (4, delta(em_0={"c_act_power": 0, "b_act_power": 50}), PASSES),
        ],
    ),
}


@pytest.mark.parametrize("case", PASSING)
async def test_what_passes_the_filter(workers, host, case):
    variables, steps = PASSING[case]
    sent = [json.dumps(at(second, frame)) for second, frame, _ in steps]
    expected = [
        text for text, (_, _, passes) in zip(sent, steps, strict=True) if passes
    ]
    no_frames = ["no JSON", b"\x00", "[1]", "null"]
    worker = await workers(host.url, **variables)
    async with worker.device() as link:
        await sent_to(link, *no_frames, *sent, MARK)
        await wait_for(
            lambda: host.got and without_time(host.got[-1]) == without_time(MARK)
        )
    got = host.got[:-1]
    assert [text for text in got if text in sent] == expected
    # The rest is what was held back before a run.
    assert all("NotifyStatus" in text for text in got if text not in sent)


async def test_what_was_held_back_goes_along_when_the_run_begins(workers, host):
    worker = await workers(host.url, MIN_POWER_W="10")
    idle = [
        minute_frame(apower=0, current=0, voltage=229.1),
        delta(switch_0={"voltage": 231.5}, switch_1={"voltage": 1}),
        delta(em1data_0={"total_act_energy": 7.5}),
    ]
    begin = [
        delta(switch_0={"apower": 433.8, "current": 2.6}),
        delta(em1_0={"act_power": 50}),
    ]
    async with worker.device() as link:
        await sent_to(
            link,
            *(at(n, frame) for n, frame in enumerate(idle)),
            *(at(9, frame) for frame in begin),
            MARK,
        )
        await host.has(5)
    held_back, run, counter, clamp, _ = host.frames()
    assert (run["params"], clamp["params"]) == (begin[0]["params"], begin[1]["params"])
    assert (held_back["src"], held_back["received"]) == (DEVICE, NOON + 1)
    expected = idle[0]["params"]["switch:0"] | {"voltage": 231.5}
    assert held_back["params"] == {"switch:0": expected}
    assert counter["params"] == {"em1data:0": {"total_act_energy": 7.5}}


async def test_what_has_passed_is_not_held_back_as_well(workers, host):
    worker = await workers(host.url, MIN_POWER_W="10")
    status = minute_frame(apower=0, current=0, voltage=212.0) | {
        "method": "NotifyFullStatus"
    }
    # A minute frame of firmware before 1.5 has nothing but the counter.
    minutes = [delta(switch_0={"aenergy": {"total": 100.0 + n}}) for n in range(1, 6)]
    async with worker.device() as link:
        frames = [status, *minutes, delta(switch_0={"apower": 500.0})]
        await sent_to(
            link, *(at(60 * n, frame) for n, frame in enumerate(frames)), MARK
        )
        await host.has(4)
    first, held_back, run, _ = host.frames()
    assert first["received"] == NOON
    assert held_back["received"] == NOON + 300
    assert run["received"] == NOON + 360
    # The voltage has passed. The collector asks for it if it is too old.
    assert held_back["params"] == {
        "switch:0": {"apower": 0, "aenergy": {"total": 105.0}}
    }


# ---- When the collector is connected -----------------------------------------
def now_in_milliseconds():
    """Return the time in seconds, as exact as a Worker's clock is, and no more."""
    return int(time.time() * 1000) / 1000


async def test_the_connection_opens_with_the_first_frame_that_passes(workers, host):
    worker = await workers(host.url, MIN_POWER_W="10")
    async with worker.device() as link:
        await sent_to(link, notify({"sys": {}}), event(), minute_frame(apower=3))
        await arrived(worker, link)
        assert not host.attempts
        host.answer = "hang"
        began = now_in_milliseconds()
        await sent_to(link, minute_frame(apower=433.8))
        await wait_for(lambda: host.attempts)
        await sent_to(link, minute_frame(apower=434.8))
        await arrived(worker, link)
        host.go_on.set()
        # Some of these come before the connection is there, some after.
        more = range(435, 465)
        for power in more:
            await sent_to(link, minute_frame(apower=power))
            await asyncio.sleep(0.005)
        await host.has(3 + len(more))
    frames = host.frames()
    assert [frame["params"]["switch:0"]["apower"] for frame in frames] == [
        3,
        433.8,
        434.8,
        *more,
    ]
    assert began <= frames[1]["received"] <= frames[2]["received"] <= time.time()
    assert "received" not in frames[-1] and len(host.attempts) == 1


async def test_it_leaves_the_collector_when_nothing_runs_and_comes_back(workers, host):
    worker = await workers(host.url, {"IDLE_CLOSE_MS": 1000}, MIN_POWER_W="10")
    async with worker.device() as link:
        for n in range(1, 3):
            await sent_to(link, minute_frame(apower=433.8), minute_frame(apower=0))
            await wait_for(lambda n=n: len(host.closes) == n)
        assert host.closes == [1000, 1000] and len(host.attempts) == 2
        assert host.links[1].close_reason == "nothing runs"
        await sent_to(link, MARK)
        await wait_for(lambda: len(host.attempts) == 3)


async def test_it_stays_connected_without_a_floor_and_while_something_runs(
    workers, host
):
    plain = await workers(host.url, {"IDLE_CLOSE_MS": 2000}, CHANNELS="0")
    async with plain.device() as link, Host() as other:
        busy = await workers(other.url, {"IDLE_CLOSE_MS": 2000}, MIN_POWER_W="10")
        async with busy.device() as runs:
            await sent_to(link, minute_frame(apower=0))
            # In all, this takes longer than the 2 s. A single turn takes less, however
            # busy the machine is.
            for n in range(25):
                await sent_to(runs, minute_frame(apower=433.8))
                await wait_for(lambda n=n: len(other.got) == n + 1)
                await asyncio.sleep(0.1)
            assert not host.closes + other.closes
            await host.has(1)


@pytest.mark.parametrize("answer", [404, 502, 503, 301, "hang"])
async def test_any_answer_but_a_refusal_means_that_the_collector_is_away(
    workers, host, answer
):
    host.answer = answer
    worker = await workers(host.url, SHORT_PAUSES | {"ANSWER_TIMEOUT_MS": 200})
    async with worker.device() as link:
        await sent_to(
            link,
            "{}",
            '{ "a":1.0}',
            '{"received":5}',
            "no JSON",
            b"\x00",
            '{"a":{"received":6}}',
        )
        # A refusal would have ended it after three.
        await wait_for(lambda: len(host.attempts) >= 5)
        host.answer = None
        await host.has(6)
        assert re.fullmatch(r'{"received":\d+\.?\d*}', host.got[0])
        assert re.fullmatch(r'{"received":\d+\.?\d*, "a":1.0}', host.got[1])
        assert host.got[2:5] == ['{"received":5}', "no JSON", b"\x00"]
        assert re.fullmatch(r'{"received":\d+\.?\d*,"a":{"received":6}}', host.got[5])
    # Its port, that the collector is away, and that it is back.
    await wait_for(lambda: worker.log.count("\n") >= 3)
    assert worker.log.count("\n") == 3


async def test_what_went_out_in_the_last_seconds_goes_out_once_more(workers, host):
    worker = await workers(host.url, SHORT_PAUSES | {"RESEND_MS": 3000})
    async with worker.device() as link:
        await sent_to(link, '{"a":1}')
        await host.has(1)
        await asyncio.sleep(3.1)
        began = now_in_milliseconds()
        await sent_to(link, '{"a":2}', '{"a":3,"received":7}', '{"a":4}')
        await host.has(4)
        ended = time.time()
        host.answer = 503
        host.links[0].transport.abort()
        await wait_for(lambda: len(host.attempts) >= 3)
        await sent_to(link, '{"a":5}')
        await arrived(worker, link)
        host.answer = None
        await host.has(8)
        await sent_to(link, '{"a":6}')
        await host.has(9)
    again = host.frames()[4:]
    assert [frame["a"] for frame in again] == [2, 3, 4, 5, 6]
    assert (
        began <= again[0]["received"] <= again[2]["received"] <= ended
        and again[1]["received"] == 7
    )
    assert again[3]["received"] > ended and "received" not in again[4]


async def test_it_connects_again_only_when_there_is_something_to_send(workers, host):
    worker = await workers(host.url, SHORT_PAUSES | {"RESEND_MS": 1})
    async with worker.device() as link:
        await sent_to(link, '{"a":1}')
        await host.has(1)
        await asyncio.sleep(0.1)
        await host.links[0].close(1001)
        # In this time, ten attempts could have been made.
        await asyncio.sleep(0.5)
        assert len(host.attempts) == 1
        await sent_to(link, '{"a":2}')
        await host.has(2)


async def test_a_collector_that_drops_its_connections_is_asked_less_and_less_often(
    workers, host
):
    host.answer = "drop"
    worker = await workers(
        host.url, {"SHORTEST_PAUSE_MS": 50, "LONGEST_PAUSE_MS": 1500}
    )
    async with worker.device() as link:
        await sent_to(link, "{}")
        await wait_for(lambda: len(host.attempts) >= 6)
        pauses = [
            later - earlier for earlier, later in itertools.pairwise(host.attempts[:6])
        ]
        for pause, shortest in zip(pauses, [0.05, 0.1, 0.2, 0.4, 0.8], strict=True):
            assert pause > shortest - 0.005, pauses
        host.answer = None
        await host.has(1)
        # A connection that lasts for the longest pause proves good.
        await asyncio.sleep(1.6)
        host.links[-1].transport.abort()
        lost = time.monotonic()
        count = len(host.attempts)
        await wait_for(lambda: len(host.attempts) > count)
        assert host.attempts[-1] - lost < 1.4


@pytest.mark.parametrize("size, kept", [(0, 1000), (1000, 256)])
async def test_the_oldest_frames_are_dropped_when_too_many_wait(
    workers, host, size, kept
):
    host.answer = 503
    worker = await workers(
        host.url, {"SHORTEST_PAUSE_MS": 300, "LONGEST_PAUSE_MS": 300}
    )
    texts = [f'{{"n":{n:4}}}'.ljust(size) for n in range(1200 if size == 0 else 300)]
    async with worker.device() as link:
        await sent_to(link, *texts)
        await arrived(worker, link)
        count = len(host.attempts)
        await wait_for(lambda: len(host.attempts) > count + 1)
        host.answer = None
        await wait_for(lambda: host.got and without_time(host.got[-1]) == texts[-1])
        assert [without_time(text) for text in host.got] == texts[-kept:]
        # What has gone out, and might go out once more, is bounded in the same way.
        host.links[0].transport.abort()
        await wait_for(lambda: len(host.got) == 2 * kept)
        assert [without_time(text) for text in host.got[kept:]] == texts[-kept:]


# ---- How a device's connection ends ------------------------------------------
async def ended(link):
    """Return code and reason of the end; pass over what comes before."""
    with contextlib.suppress(ConnectionClosed):
        async for _ in link:
            pass
    return link.close_code, link.close_reason


async def test_the_device_is_closed_before_the_last_request_that_a_free_plan_allows(
    workers, host
):
    host.answer = 503
    worker = await workers(host.url, {"SHORTEST_PAUSE_MS": 1, "LONGEST_PAUSE_MS": 2})
    async with worker.device() as link:
        await sent_to(link, "{}")
        code, reason = await asyncio.wait_for(ended(link), 20)
    assert (code, len(host.attempts)) == (1012, 49) and "come back" in reason


async def test_the_device_is_closed_earlier_at_a_moment_with_nothing_to_send(
    workers, host
):
    worker = await workers(
        host.url, {"IDLE_CLOSE_MS": 100, "RENEW_AT_FETCHES": 2}, MIN_POWER_W="10"
    )
    async with worker.device() as link:
        await sent_to(link, minute_frame(apower=50))
        await wait_for(lambda: host.closes == [1000])
        await sent_to(link, minute_frame(apower=50))
        assert (await asyncio.wait_for(ended(link), 10))[0] == 1012
    assert len(host.attempts) == 2 and host.closes == [1000, 1000]


async def test_the_device_is_told_when_the_collector_refuses(
    collectors, workers, database, host
):
    running = await collectors(DATABASE_URL=database, COLLECTOR_TOKEN=SECRET).ready()
    host.answer = 403
    cases = [
        (f"{running.url}?token=s3cret-wrong", "the collector refuses: status 401"),
        (host.url, "the collector refuses: status 403"),
        (
            "wss://s3cret:s3cret@host/ws",
            "COLLECTOR_URL cannot be read: it must be like wss://host/ws?token=...",
        ),
        (
            "wss//host/ws?token=s3cret",
            "COLLECTOR_URL cannot be read: it must be like wss://host/ws?token=...",
        ),
        ("", "COLLECTOR_URL cannot be read: it must be like wss://host/ws?token=..."),
    ]
    for url, reason in cases:
        worker = await workers(url, SHORT_PAUSES)
        async with worker.device() as link:
            await sent_to(link, "{}")
            assert await asyncio.wait_for(ended(link), 10) == (1013, reason)
        await wait_for(lambda worker=worker, reason=reason: reason in worker.log)
    assert len(host.attempts) == 3


async def test_the_collectors_connection_closes_with_the_devices(workers, host):
    worker = await workers(host.url)
    async with worker.device() as link:
        await sent_to(link, "{}")
        await host.has(1)
        await link.close(1001, "goodbye")
        assert link.close_code == 1000
        await wait_for(lambda: host.closes == [1000])
    async with worker.device() as link:
        await sent_to(link, "{}")
        await host.has(2)
        link.transport.abort()
        await wait_for(lambda: host.closes == [1000, 1000])
    assert worker.log.count("\n") == 1


async def test_a_device_that_leaves_while_the_collector_is_asked_leaves_nothing_behind(
    workers, host
):
    host.answer = 503
    worker = await workers(host.url, SHORT_PAUSES)
    async with worker.device() as link:
        await sent_to(link, "{}")
        await wait_for(lambda: host.attempts)
        host.answer = "hang"
        await wait_for(lambda: host.hanging)
    await wait_for(lambda: host.hanging.transport.is_closing())
    asked = len(host.attempts)
    host.answer = None
    host.go_on.set()
    # If a timer were left, it would ask once more in this time.
    await asyncio.sleep(0.5)
    assert len(host.attempts) == asked
    assert all(link.close_code is not None for link in host.links)


# ---- Who is let in -----------------------------------------------------------
async def refusal(worker, query="", **headers):
    """Return status and text with which a device is refused."""
    with pytest.raises(InvalidStatus) as info:
        async with worker.device(query, additional_headers=headers):
            pass
    return info.value.response.status_code, info.value.response.body.decode()


async def test_a_device_must_carry_the_token_and_a_page_of_another_site_stays_out(
    workers, host
):
    worker = await workers(host.url, DEVICE_TOKEN="s3cret + more")
    assert (await worker.get())[0] == (await worker.get("HEAD"))[0] == 426
    assert (await worker.get("POST", "?token=s3cret%20%2B%20more"))[0] == 426
    for query in (
        "",
        "?token=",
        "?token=s3cret",
        "?Token=s3cret+%2B+more",
        "?token=x&token=s3cret+%2B+more",
    ):
        assert await refusal(worker, query) == (
            401,
            "The URL lacks the right ?token=\n",
        ), query
    for query in (
        "?token=s3cret+%2B+more",
        "?token=s3cret+++more",
        "?token=s3cret%20+%20more",
        "?a=b&token=s3cret%20%2B%20more&token=",
    ):
        async with worker.device(
            query, additional_headers={"Origin": "https://shelly.example.org"}
        ):
            pass
    plain = await workers(host.url, DEVICE_TOKEN=" ")
    for origin in ("https://evil.example.org", "null"):
        status, text = await refusal(plain, Origin=origin)
        assert (status, text) == (403, "No page of another site may send rows.\n")
    async with plain.device(
        additional_headers={"Origin": f"http://127.0.0.1:{plain.port}"}
    ):
        pass
    assert not host.attempts


@pytest.mark.parametrize(
    "name, text",
    [
        ("CHANNELS", "0,x"),
        ("CHANNELS", "0,"),
        ("MIN_POWER_W", "ten"),
        ("MIN_POWER_W", "-1"),
        ("MIN_POWER_W", "2e9"),
    ],
)
async def test_a_setting_that_makes_no_sense_is_named(workers, host, name, text):
    worker = await workers(host.url, DEVICE_TOKEN="s3cret", **{name: text})
    for status, said in (await refusal(worker, "?token=s3cret"), await worker.get()):
        assert (
            status == 500
            and said.startswith(f"{name} makes no sense: ")
            and said.count("\n") == 1
        )
    await wait_for(lambda: f"{name} makes no sense: " in worker.log)


async def test_numbers_and_lists_of_wrangler_toml_are_read_too(workers, host):
    worker = await workers(host.url, CHANNELS=[1, 2], MIN_POWER_W=10)
    async with worker.device() as link:
        await sent_to(
            link,
            delta(switch_0={"apower": 50}),
            delta(switch_1={"apower": 50}),
            delta(switch_2={"apower": 9}),
            MARK,
        )
        await host.has(2)
    assert "switch:1" in host.got[0]
