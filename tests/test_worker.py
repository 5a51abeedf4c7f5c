"""The Cloudflare Worker of worker/ in its real runtime: device → Worker → a real collector → a real PostgreSQL."""

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
import shelly_collector as sc
import simulated_device as sim
from support import DEVICE, NUMBERS, ROOT, fresh_database, minute_frame, notify, read_rows, wait_for
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

SECRET = "s3cret of the owner"
WITHOUT = (not shutil.which("node") and "there is no node") or (
    not (ROOT / "worker/node_modules/miniflare").exists() and "the Worker's runtime is missing: npm ci in worker/"
)
pytestmark = pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT or "")


class Worker:
    """worker.js in Cloudflare's runtime, as its own process; `bindings` are its variables."""

    def __init__(self, folder, bindings, constants):
        self.log_path = folder / f"worker-{next(NUMBERS)}.txt"
        options = json.dumps({"bindings": bindings, "constants": constants})
        with self.log_path.open("wb") as log:
            command = ["node", str(ROOT / "tests/worker_runtime.mjs"), options]
            env = os.environ | {"TMPDIR": str(folder)}  # where the runtime leaves folders of its own
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env)

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
        """Status and text of an answer to a plain request."""

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
    """Starts Workers; at the end they are stopped, and none may have logged a secret or a bug."""
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
    """Where the collector should be: takes connections and notes what comes, or says no as a platform's router does."""

    def __init__(self):
        self.answer = None  # a status, or "hang", or "drop": take the connection and close it; None: take it
        self.attempts, self.got, self.closes = [], [], []  # times, messages, codes
        self.links, self.hanging = [], None
        self.go_on = asyncio.Event()  # ends a "hang"

    async def __aenter__(self):
        options = {"process_request": self.process_request, "compression": None, "open_timeout": None}
        self.server = await serve(self.handle, "127.0.0.1", 0, close_timeout=1, **options)
        self.url = f"ws://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/ws?token=s3cret"
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
            return connection.respond(http.HTTPStatus(self.answer), "the router's own words\n")
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
        """The messages once there are so many, and no more."""
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
    return re.sub(r'^{"received":[0-9.]+,?', "{", text)


async def arrived(worker, link):
    """Wait until the Worker has what was sent: both take their way through it."""
    await (await link.ping())
    await worker.get()


async def sent_to(link, *frames):
    for frame in frames:
        await link.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))


MARK = json.dumps({"id": 9, "src": DEVICE, "result": None})  # an answer, which always passes


def at(second, frame):
    """A frame of a past minute, as of another filter in front: no test has to wait for it."""
    return {**frame, "received": NOON + second}


NOON = time.time() // 3600 * 3600 - 7200
SHORT = {"SHORTEST_PAUSE": 50, "LONGEST_PAUSE": 400}  # milliseconds


# ---- Rows are the same as without it. -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "variables", [{}, {"CHANNELS": "0, 2"}, {"MIN_POWER_W": "10"}, {"CHANNELS": "0,1", "MIN_POWER_W": "10"}], ids=str
)
async def test_a_day_of_a_house_gives_the_same_rows_as_without_it(collectors, workers, database, variables):
    house = sim.House(1, 4, old_firmware=False, minutes=1440)
    house.remember()
    house.at = house.past[0]["received"] - 1
    day = [house.full_status(), *house.past]
    day[1000:1000] = [at_time | {"received": day[1000]["received"]} for at_time in (
        {"id": 3, "src": house.id, "dst": "collector", "result": house.config()},
        {"src": house.id, "dst": "ws", "method": "NotifyEvent", "params": {"ts": 1.0, "events": [{"event": "ota"}]}},
        {"id": 7, "src": house.id, "dst": "ws", "method": "NotifyStatus", "params": {"switch:0": {"current": 0.01}}},
    )]  # fmt: skip
    with fresh_database() as other:
        settings = {"THROTTLE_INTERVAL_SECONDS": "60", **variables}
        plain, behind = (collectors(DATABASE_URL=url, **settings) for url in (database, other))
        await asyncio.gather(plain.ready(), behind.ready())
        worker = await workers(behind.url, **variables)
        for url in (plain.url, worker.url()):
            async with connect(url, compression=None, ping_interval=None) as link:
                await sent_to(link, day[0])
                assert [await link.recv() for _ in range(2)] == [sc.ENABLE_NOTIFICATIONS, sc.GET_STATUS]
                await sent_to(link, *day[1:])  # not before the collector is there: that is more than is kept

        columns = "timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh"
        expected = await settled(plain, database, columns)
        assert await settled(behind, other, columns) == expected
        assert len(expected) > 100


async def settled(running, database, columns):
    """The rows, once no more come."""

    async def still():
        before = await running.health()
        await asyncio.sleep(0.5)
        after = await running.health()
        return before.get("rows waiting") == "0" and before == after and int(before["rows written"]) > 0

    await wait_for(still, 30)
    return read_rows(database, columns)


async def test_the_stop_of_the_pump_gives_its_off_row(collectors, workers, database):
    running = await collectors(DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="60", MIN_POWER_W="10").ready()
    worker = await workers(running.url, MIN_POWER_W="10")
    async with worker.device() as link:
        for minute in range(10):
            power = 812.0 if minute < 4 else 0
            await sent_to(link, at(60 * minute + 0.01, minute_frame(apower=power)))
        await wait_for(lambda: len(read_rows(database)) >= 5)
    assert [row[0] for row in read_rows(database, "apower_w")] == [812.0] * 4 + [0.0]


async def test_requests_of_the_collector_arrive_and_its_answers_go_back(collectors, workers, database):
    running = await collectors(DATABASE_URL=database, COLLECTOR_TOKEN=SECRET).ready()
    token = SECRET.replace(" ", "%20")
    worker = await workers(f"{running.url}?token={token}", MIN_POWER_W="10", DEVICE_TOKEN=SECRET)
    async with worker.device(f"?token={token}", subprotocols=["json-rpc"]) as link:
        await sent_to(link, notify({"ws": {"connected": True}}, method="NotifyFullStatus"))
        assert [await link.recv() for _ in range(2)] == [sc.ENABLE_NOTIFICATIONS, sc.GET_STATUS]
        status = minute_frame(apower=433.8)["params"]
        await sent_to(link, {"id": 2, "src": DEVICE, "dst": "collector", "result": status})
        assert await link.recv() == sc.GET_CONFIG
        await wait_for(lambda: read_rows(database, "apower_w") == [(433.8,)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_of_the_collector_costs_no_row(collectors, workers, database, number):
    step_s = 1.0  # and not less: on a busy machine a frame may take half a second
    running = await collectors(DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS=str(step_s)).ready()
    worker = await workers(running.url, SHORT)
    reported = []
    async with worker.device() as link:

        async def report():
            for n in itertools.count(int(time.time() / step_s) + 1):  # one frame in the midst of each interval
                await asyncio.sleep(max(0, (n + 0.2) * step_s - time.time()))
                if time.time() < (n + 0.5) * step_s:  # else this machine was busy, and another interval would be meant
                    reported.append(n)
                    await sent_to(link, minute_frame(apower=400 + n % 1000))

        stream = asyncio.create_task(report())
        await longer(reported, 3)
        await running.stop(number)
        await longer(reported, 2)
        await (await running.again()).ready()
        await longer(reported, 2)
        stream.cancel()
        await wait_for(lambda: newest(database, step_s) == reported[-1])
    rows = [(round(time.timestamp() / step_s), power) for time, power in read_rows(database, "timestamp, apower_w")]
    assert rows == [(n, 400 + n % 1000) for n in reported]


async def longer(what, count):
    end = len(what) + count
    await wait_for(lambda: len(what) >= end)


def newest(database, step_s):
    """The interval of the newest row."""
    rows = read_rows(database, "timestamp", "timestamp DESC LIMIT 1")
    return rows and round(rows[0][0].timestamp() / step_s)


# ---- What passes. ---------------------------------------------------------------------------------------------------
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
        await host.has(1)  # from here on the connection is there
        await sent_to(link, *texts)
        await host.has(1 + len(texts))
        assert host.got[1:] == texts
        for text in texts:
            await host.links[0].send(text)
            assert await link.recv() == text


def event(**fields):
    return {"src": DEVICE, "dst": "ws", "method": "NotifyEvent", "params": {"ts": 1.0, "events": []}, **fields}


def delta(**components):
    return notify({key[::-1].replace("_", ":", 1)[::-1]: value for key, value in components.items()})


PASSING = {
    "a stopped channel, and its run": (
        {"MIN_POWER_W": "10"},
        [(0, delta(switch_0={"apower": 10}), False), (1, delta(switch_0={"apower": 10.1}), True), (2, delta(switch_0={"current": 1}), True)],
    ),
    "power that flows back": ({"MIN_POWER_W": "10"}, [(0, delta(switch_0={"apower": -11}), True)]),
    "130 s after the run": (
        {"MIN_POWER_W": "10"},
        [
            (0, delta(switch_0={"apower": 500}), True), (600, delta(switch_0={"voltage": 230}), True), (900, delta(switch_0={"apower": 0}), True),
            (1029, delta(switch_0={"voltage": 231}), True), (1031, delta(switch_0={"voltage": 232}), False),
        ],
    ),
    "null takes away": (
        {"MIN_POWER_W": "10"},
        [(0, delta(switch_0={"apower": 500}), True), (1, delta(switch_0={"apower": None}), True), (140, delta(switch_0={"voltage": 230}), False)],
    ),
    "a whole status replaces": (
        {"MIN_POWER_W": "10"},
        [
            (0, delta(switch_0={"apower": 500}), True), (1, notify({"switch:0": {"output": True}}, method="NotifyFullStatus"), True),
            (140, delta(switch_0={"voltage": 230}), False), (141, {"id": 2, "src": DEVICE, "result": {"switch:0": {"apower": 20}}}, True),
            (142, delta(switch_0={"voltage": 230}), True), (143, {"id": 2, "src": DEVICE, "result": {"switch:0": {"apower": 0}}}, True),
            (300, delta(switch_0={"voltage": 230}), False),
        ],
    ),
    "a configuration is no status": (
        {"MIN_POWER_W": "10"},
        [(0, delta(switch_0={"apower": 500}), True), (1, {"id": 3, "src": DEVICE, "result": {"switch:0": {"name": "Pump"}}}, True),
         (200, delta(switch_0={"voltage": 230}), True)],
    ),
    "whole statuses and answers always, other methods never": (
        {"MIN_POWER_W": "10"},
        [
            (0, notify({"sys": {}}, method="NotifyFullStatus"), True), (0, {"id": 1, "src": DEVICE, "error": {"code": 404}}, True),
            (0, {"id": 2, "src": DEVICE, "result": {}}, True), (0, event(), False), (0, event(id=4), False), (0, event(id=4, result={}), False),
            (0, {"id": 4, "src": DEVICE}, False), (0, {**delta(switch_0={"apower": 500}), "id": 5}, True), (0, {**event(), "method": None, "result": {}}, True),
        ],
    ),
    "what can be no reading": (
        {"CHANNELS": "0"},
        [(0, notify({"ws": {"connected": True}}), False), (0, {**delta(switch_0={}), "src": None}, False), (0, notify({"switch:x": {"apower": 500}}), False)],
    ),
    "channels that are kept": (
        {"CHANNELS": "0,2"},
        [(0, delta(switch_0={"apower": 0}), True), (0, delta(switch_1={"apower": 500}), False), (0, delta(switch_1={"apower": 5}, switch_2={"output": False}), True),
         (0, delta(pm1_0={"apower": 0}), True), (0, delta(em1data_1={"total_act_energy": 5.0}), False)],
    ),
    "of another channel that runs": ({"CHANNELS": "0", "MIN_POWER_W": "10"}, [(0, delta(switch_0={"apower": 2}, switch_1={"apower": 500}), False)]),
    "all kinds": (
        {"MIN_POWER_W": "10"},
        [(0, delta(pm1_0={"apower": 11}), True), (0, delta(cover_0={"apower": 11}), True), (0, delta(light_0={"apower": 11}), True),
         (0, delta(voltmeter_0={"apower": 11}), False), (0, delta(em_0={"total_act_power": 11}), False)],
    ),
    "a clamp and its counter": (
        {"MIN_POWER_W": "10"},
        [
            (0, delta(em1_0={"act_power": 5}), False), (1, delta(em1data_0={"total_act_energy": 1.0}), False),
            (2, delta(em1_0={"act_power": 11}), True), (3, delta(em1data_0={"total_act_energy": 2.0}), True), (4, delta(em1data_1={"total_act_energy": 3.0}), False),
        ],
    ),
    "three phases and their counters": (
        {"MIN_POWER_W": "10"},
        [
            (0, delta(em_0={"a_act_power": 5, "b_act_power": 6, "c_act_power": 7, "total_act_power": 18}), False), (1, delta(emdata_0={"total_act": 1.0}), False),
            (2, delta(em_0={"c_act_power": -12}), True), (3, delta(emdata_0={"total_act": 2.0}), True), (4, delta(em_0={"c_act_power": 0, "b_act_power": 50}), True),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PASSING)
async def test_what_passes_the_filter(workers, host, case):
    variables, steps = PASSING[case]
    worker = await workers(host.url, **variables)
    async with worker.device() as link:
        await sent_to(link, "no JSON", b"\x00", "[1]", "null", *(at(second, frame) for second, frame, _ in steps), MARK)
        await wait_for(lambda: host.got and without_time(host.got[-1]) == without_time(MARK))
    raw = [json.dumps(at(second, frame)) for second, frame, _ in steps]
    released = [text for text in host.got[:-1] if text not in raw]  # they are of JSON.stringify: no blanks
    assert [text for text in host.got[:-1] if text in raw] == [json.dumps(at(s, f)) for s, f, passes in steps if passes]
    assert all("NotifyStatus" in text for text in released)


async def test_a_run_takes_along_what_its_channel_said_while_it_did_not_pass(workers, host):
    worker = await workers(host.url, MIN_POWER_W="10")
    idle = [
        minute_frame(apower=0, current=0, voltage=229.1),
        delta(switch_0={"voltage": 231.5}, switch_1={"voltage": 1}),
        delta(em1data_0={"total_act_energy": 7.5}),
    ]
    begin = [delta(switch_0={"apower": 433.8, "current": 2.6}), delta(em1_0={"act_power": 50})]
    async with worker.device() as link:
        await sent_to(link, *(at(n, frame) for n, frame in enumerate(idle)), *(at(9, frame) for frame in begin), MARK)
        await host.has(5)
    told, run, counter, clamp, _ = host.frames()
    assert (run["params"], clamp["params"]) == (begin[0]["params"], begin[1]["params"])
    assert told["received"] == NOON + 1 and told["src"] == DEVICE
    assert told["params"] == {"switch:0": idle[0]["params"]["switch:0"] | {"voltage": 231.5}}
    assert counter["params"] == {"em1data:0": {"total_act_energy": 7.5}}


async def test_what_has_passed_does_not_go_along_later_as_if_it_were_new(workers, host):
    worker = await workers(host.url, MIN_POWER_W="10")
    whole = notify(minute_frame(apower=0, current=0, voltage=212.0)["params"], method="NotifyFullStatus")
    minutes = [delta(switch_0={"aenergy": {"total": 100.0 + n}}) for n in range(1, 6)]  # firmware before 1.5
    async with worker.device() as link:
        frames = [whole, *minutes, delta(switch_0={"apower": 500.0})]
        await sent_to(link, *(at(60 * n, frame) for n, frame in enumerate(frames)), MARK)
        await host.has(4)
    first, told, run, _ = host.frames()
    assert (first["received"], told["received"], run["received"]) == (NOON, NOON + 300, NOON + 360)
    assert told["params"] == {"switch:0": {"apower": 0, "aenergy": {"total": 105.0}}}  # a voltage is asked for


# ---- Lazy, and patient. ---------------------------------------------------------------------------------------------
async def test_the_connection_opens_with_the_first_frame_that_passes(workers, host):
    worker = await workers(host.url, MIN_POWER_W="10")
    async with worker.device() as link:
        await sent_to(link, notify({"sys": {}}), event(), minute_frame(apower=3))
        await arrived(worker, link)
        assert not host.attempts
        host.answer = "hang"
        began = int(time.time() * 1000) / 1000  # a Worker's clock knows no more
        await sent_to(link, minute_frame(apower=433.8))
        await wait_for(lambda: host.attempts)
        await sent_to(link, minute_frame(apower=434.8))
        await arrived(worker, link)
        host.go_on.set()
        more = range(435, 465)
        for power in more:  # some before the connection is there, some live
            await sent_to(link, minute_frame(apower=power))
            await asyncio.sleep(0.005)
        await host.has(3 + len(more))
    frames = host.frames()
    assert [frame["params"]["switch:0"]["apower"] for frame in frames] == [3, 433.8, 434.8, *more]
    assert began <= frames[1]["received"] <= frames[2]["received"] <= time.time()
    assert "received" not in frames[-1] and len(host.attempts) == 1


async def test_it_closes_when_nothing_runs_and_opens_again(workers, host):
    worker = await workers(host.url, {"IDLE_CLOSE": 1000}, MIN_POWER_W="10")
    async with worker.device() as link:
        for n in range(1, 3):
            await sent_to(link, minute_frame(apower=433.8), minute_frame(apower=0))
            await wait_for(lambda n=n: len(host.closes) == n)
        assert host.closes == [1000, 1000] and len(host.attempts) == 2
        assert host.links[1].close_reason == "nothing runs"
        await sent_to(link, MARK)
        await wait_for(lambda: len(host.attempts) == 3)


async def test_it_stays_open_without_a_floor_and_while_something_runs(workers, host):
    plain = await workers(host.url, {"IDLE_CLOSE": 2000}, CHANNELS="0")
    async with plain.device() as link, Host() as other:
        busy = await workers(other.url, {"IDLE_CLOSE": 2000}, MIN_POWER_W="10")
        async with busy.device() as runs:
            await sent_to(link, minute_frame(apower=0))
            for n in range(25):  # longer than that; and no busy machine takes so long for one
                await sent_to(runs, minute_frame(apower=433.8))
                await wait_for(lambda n=n: len(other.got) == n + 1)
                await asyncio.sleep(0.1)
            assert not host.closes + other.closes
            await host.has(1)


@pytest.mark.parametrize("answer", [404, 502, 503, 301, "hang"])
async def test_any_answer_but_a_refusal_means_that_it_is_away(workers, host, answer):
    host.answer = answer
    worker = await workers(host.url, SHORT | {"ANSWER_TIMEOUT": 200})
    async with worker.device() as link:
        await sent_to(link, "{}", '{ "a":1.0}', '{"received":5}', "no JSON", b"\x00", '{"a":{"received":6}}')
        await wait_for(lambda: len(host.attempts) >= 5)  # more than the refusals that it takes
        host.answer = None
        await host.has(6)
        assert re.fullmatch(r'{"received":\d+\.?\d*}', host.got[0])
        assert re.fullmatch(r'{"received":\d+\.?\d*, "a":1.0}', host.got[1])
        assert host.got[2:5] == ['{"received":5}', "no JSON", b"\x00"]
        assert re.fullmatch(r'{"received":\d+\.?\d*,"a":{"received":6}}', host.got[5])
    await wait_for(lambda: worker.log.count("\n") >= 3)
    assert worker.log.count("\n") == 3  # its port, that the collector is away, that it is back


async def test_what_went_out_in_the_last_seconds_goes_out_once_more(workers, host):
    worker = await workers(host.url, SHORT | {"RESEND": 3000})
    async with worker.device() as link:
        await sent_to(link, '{"a":1}')
        await host.has(1)
        await asyncio.sleep(3.1)
        began = int(time.time() * 1000) / 1000  # a Worker's clock knows no more
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
    assert began <= again[0]["received"] <= again[2]["received"] <= ended and again[1]["received"] == 7
    assert again[3]["received"] > ended and "received" not in again[4]


async def test_it_comes_back_only_when_there_is_something_to_send(workers, host):
    worker = await workers(host.url, SHORT | {"RESEND": 1})
    async with worker.device() as link:
        await sent_to(link, '{"a":1}')
        await host.has(1)
        await asyncio.sleep(0.1)
        await host.links[0].close(1001)
        await asyncio.sleep(0.5)  # ten pauses
        assert len(host.attempts) == 1
        await sent_to(link, '{"a":2}')
        await host.has(2)


async def test_a_collector_that_takes_connections_and_drops_them_makes_no_hot_loop(workers, host):
    host.answer = "drop"
    worker = await workers(host.url, {"SHORTEST_PAUSE": 50, "LONGEST_PAUSE": 1500})
    async with worker.device() as link:
        await sent_to(link, "{}")
        await wait_for(lambda: len(host.attempts) >= 6)
        pauses = [b - a for a, b in itertools.pairwise(host.attempts[:6])]
        assert all(pause > least - 0.005 for pause, least in zip(pauses, [0.05, 0.1, 0.2, 0.4, 0.8], strict=True))
        host.answer = None
        await host.has(1)
        await asyncio.sleep(1.6)  # longer than the longest pause: a connection that proved good
        host.links[-1].transport.abort()
        lost, count = time.monotonic(), len(host.attempts)
        await wait_for(lambda: len(host.attempts) > count)
        assert host.attempts[-1] - lost < 1.4


@pytest.mark.parametrize("size, kept", [(0, 1000), (1000, 256)])
async def test_the_oldest_frames_are_dropped_when_too_many_wait(workers, host, size, kept):
    host.answer = 503
    worker = await workers(host.url, {"SHORTEST_PAUSE": 300, "LONGEST_PAUSE": 300})
    texts = [f'{{"n":{n:4}}}'.ljust(size) for n in range(1200 if size == 0 else 300)]
    async with worker.device() as link:
        await sent_to(link, *texts)
        await arrived(worker, link)
        count = len(host.attempts)
        await wait_for(lambda: len(host.attempts) > count + 1)
        host.answer = None
        await wait_for(lambda: host.got and without_time(host.got[-1]) == texts[-1])
        assert [without_time(text) for text in host.got] == texts[-kept:]
        # What went out is bounded alike.
        host.links[0].transport.abort()
        await wait_for(lambda: len(host.got) == 2 * kept)
        assert [without_time(text) for text in host.got[kept:]] == texts[-kept:]


# ---- Ends. ----------------------------------------------------------------------------------------------------------
async def ended(link):
    """Code and reason, once the connection is closed; what comes before is passed over."""
    with contextlib.suppress(ConnectionClosed):
        async for _ in link:
            pass
    return link.close_code, link.close_reason


async def test_the_device_is_closed_before_the_last_request_that_a_free_plan_allows(workers, host):
    host.answer = 503
    worker = await workers(host.url, {"SHORTEST_PAUSE": 1, "LONGEST_PAUSE": 2})
    async with worker.device() as link:
        await sent_to(link, "{}")
        code, reason = await asyncio.wait_for(ended(link), 20)
    assert (code, len(host.attempts)) == (1012, 49) and "come back" in reason


async def test_a_moment_without_frames_is_taken_for_it_if_one_comes(workers, host):
    worker = await workers(host.url, {"IDLE_CLOSE": 100, "RENEW_AT": 2}, MIN_POWER_W="10")
    async with worker.device() as link:
        await sent_to(link, minute_frame(apower=50))
        await wait_for(lambda: host.closes == [1000])
        await sent_to(link, minute_frame(apower=50))
        assert (await asyncio.wait_for(ended(link), 10))[0] == 1012
    assert len(host.attempts) == 2 and host.closes == [1000, 1000]


async def test_a_collector_that_refuses_is_told_to_the_device(collectors, workers, database, host):
    running = await collectors(DATABASE_URL=database, COLLECTOR_TOKEN=SECRET).ready()
    host.answer = 403
    cases = [
        (f"{running.url}?token=s3cret-wrong", "the collector refuses: status 401"),
        (host.url, "the collector refuses: status 403"),
        ("wss://s3cret:s3cret@host/ws", "COLLECTOR_URL cannot be read: it must be like wss://host/ws?token=..."),
        ("wss//host/ws?token=s3cret", "COLLECTOR_URL cannot be read: it must be like wss://host/ws?token=..."),
        ("", "COLLECTOR_URL cannot be read: it must be like wss://host/ws?token=..."),
    ]
    started = await asyncio.gather(*(workers(url, SHORT) for url, _ in cases))
    for worker, (_, reason) in zip(started, cases, strict=True):
        async with worker.device() as link:
            await sent_to(link, "{}")
            assert await asyncio.wait_for(ended(link), 10) == (1013, reason)
        await wait_for(lambda worker=worker, reason=reason: reason in worker.log)
    assert len(host.attempts) == 3


async def test_the_device_closes_and_so_does_everything(workers, host):
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


async def test_a_device_that_leaves_while_the_collector_is_asked_leaves_nothing_behind(workers, host):
    host.answer = 503
    worker = await workers(host.url, SHORT)
    async with worker.device() as link:
        await sent_to(link, "{}")
        await wait_for(lambda: host.attempts)
        host.answer = "hang"
        await wait_for(lambda: host.hanging)
    await wait_for(lambda: host.hanging.transport.is_closing())
    asked = len(host.attempts)
    host.answer = None
    host.go_on.set()
    await asyncio.sleep(0.5)  # a timer that was left would ask once more
    assert len(host.attempts) == asked and not [link for link in host.links if link.close_code is None]


# ---- Who is let in. -------------------------------------------------------------------------------------------------
async def refusal(worker, query="", **headers):
    with pytest.raises(InvalidStatus) as info:
        async with worker.device(query, additional_headers=headers):
            pass
    return info.value.response.status_code, info.value.response.body.decode()


async def test_a_device_must_carry_the_token_and_a_page_of_another_site_stays_out(workers, host):
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
        assert await refusal(worker, query) == (401, "The URL lacks the right ?token=\n"), query
    for query in (
        "?token=s3cret+%2B+more",
        "?token=s3cret+++more",
        "?token=s3cret%20+%20more",
        "?a=b&token=s3cret%20%2B%20more&token=",
    ):
        async with worker.device(query, additional_headers={"Origin": "https://shelly.example.org"}):
            pass
    plain = await workers(host.url, DEVICE_TOKEN=" ")
    for origin in ("https://evil.example.org", "null"):
        status, text = await refusal(plain, Origin=origin)
        assert (status, text) == (403, "No page of another site may send rows.\n")
    async with plain.device(additional_headers={"Origin": f"http://127.0.0.1:{plain.port}"}):
        pass
    assert not host.attempts


@pytest.mark.parametrize(
    "name, text",
    [("CHANNELS", "0,x"), ("CHANNELS", "0,"), ("MIN_POWER_W", "ten"), ("MIN_POWER_W", "-1"), ("MIN_POWER_W", "2e9")],
)
async def test_a_setting_that_makes_no_sense_is_named(workers, host, name, text):
    worker = await workers(host.url, DEVICE_TOKEN="s3cret", **{name: text})
    for status, said in (await refusal(worker, "?token=s3cret"), await worker.get()):
        assert status == 500 and said.startswith(f"{name} makes no sense: ") and said.count("\n") == 1
    await wait_for(lambda: f"{name} makes no sense: " in worker.log)


async def test_numbers_and_lists_of_wrangler_toml_are_read_too(workers, host):
    worker = await workers(host.url, CHANNELS=[1, 2], MIN_POWER_W=10)
    async with worker.device() as link:
        await sent_to(
            link, delta(switch_0={"apower": 50}), delta(switch_1={"apower": 50}), delta(switch_2={"apower": 9}), MARK
        )
        await host.has(2)
    assert "switch:1" in host.got[0]
