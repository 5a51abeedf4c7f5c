"""Whole sessions: frames as a Pro 4PM sends them, and the simulated device against a running collector."""

import asyncio
import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import simulated_device as sim
from support import (
    ALL_VALUES,
    COUNTER,
    DEVICE,
    EM,
    EMDATA,
    METER,
    NOON,
    POWER,
    ROOT,
    VALUES,
    device,
    feed,
    listening,
    minute_frame,
    notify,
    query,
    read_rows,
    taken,
    wait_for,
    wait_for_rows,
)


def energy(total, minutes=(7035.312, 7161.568, 7514.251)):
    return {
        "aenergy": {
            "by_minute": list(minutes),
            "minute_ts": 1795435200,
            "total": total,
        },
        "ret_aenergy": {
            "by_minute": [0.0, 0.0, 0.0],
            "minute_ts": 1795435200,
            "total": 0.0,
        },
    }


def measured(apower, current, voltage, pf=0.8):
    return {
        "apower": apower,
        "aprtpower": 438.0,
        "current": current,
        "freq": 50.0,
        "pf": pf,
        "voltage": voltage,
    }


# Seconds after noon, and the frame, in the order of a real device's morning.
SESSION = [
    (10.1, notify({"switch:0": {"id": 0, "source": "init", "output": True, "temperature": {"tC": 41.0, "tF": 105.8},
                                **energy(1000.5), **measured(433.1, 2.63, 228.4)},
                   "switch:1": {"id": 1, "source": "init", "output": False, "temperature": {"tC": 41.0, "tF": 105.8},
                                **energy(77.0, (0.0, 0.0, 0.0)), **measured(0, 0, 228.4, 0)},
                   "sys": {"unixtime": 0, "uptime": 3}, "wifi": {"rssi": -58}, "ts": 3.1}, method="NotifyFullStatus")),
    (10.1, {"id": 1, "src": DEVICE, "dst": "collector", "error": {"code": 404, "message": "No handler for NotifyStatus"}}),
    (10.2, {"id": 2, "src": DEVICE, "dst": "collector",
            "result": {"switch:0": {"id": 0, "output": True, **energy(1000.5), **measured(433.2, 2.631, 228.5)}}}),
    (10.3, notify({"ws": {"connected": True}})), (10.3, notify({"cloud": {"connected": True}})),
    (31.0, notify({"switch:0": {"current": 2.474}})),
    (60.01, notify({"switch:0": {**energy(1007.7), **measured(433.8, 2.631, 228.2)}})),
    (60.02, notify({"switch:1": {**energy(77.0, (0.0, 0.0, 0.0)), **measured(0, 0, 228.2, 0)}})),
    (75.0, notify({"switch:0": {"apower": 0, "current": 0, "output": False, "pf": 0, "source": "SHC"}})),
    (80.0, {"src": DEVICE, "dst": "ws", "method": "NotifyEvent", "params": {"ts": 1.0, "events": [{"event": "ota"}]}}),
    (120.0, notify({"switch:0": {**energy(1009.5), **measured(0, 0, 229.1, 0)}})),
    (120.02, notify({"switch:1": {**energy(77.0, (0.0, 0.0, 0.0)), **measured(0, 0, 229.1, 0)}})),
    (130.0, notify({"switch:1": {"output": True, "source": "SHC", "timer_duration": None}})),
    (131.0, notify({"switch:1": {"apower": 1210.4, "current": 5.31}})),
    (180.01, notify({"switch:0": {**energy(1009.5), **measured(0, 0, 228.9, 0)}})),
    (180.02, notify({"switch:1": {**energy(93.1), **measured(1208.2, 5.301, 227.3)}})),
    (240.0, notify({"switch:1": {"apower": 1199.9, "current": 5.28}})),
    (240.01, notify({"switch:1": {**energy(12.0), **measured(1200.0, 5.282, 227.5)}})),
]  # fmt: skip

MERGED = [
    (0, "switch:0", 433.1, 228.4, 2.63, 1000.5),
    (0, "switch:1", 0.0, 228.4, 0.0, 77.0),
    (60, "switch:0", 433.8, 228.2, 2.631, 1007.7),
    (60, "switch:1", 0.0, 228.2, 0.0, 77.0),
    (120, "switch:0", 0.0, 229.1, 0.0, 1009.5),
    (120, "switch:1", 0.0, 229.1, 0.0, 77.0),
    (180, "switch:0", 0.0, 228.9, 0.0, 1009.5),
    (180, "switch:1", 1208.2, 227.3, 5.301, 93.1),
    # The delta came first, so the voltage and the counter are those of 12:03.
    (240, "switch:1", 1199.9, 227.3, 5.28, 93.1),
]


async def test_a_recorded_session_gives_exactly_the_merged_values(make):
    collector = make()
    for second, frame in SESSION:
        feed(collector, frame, NOON + second)
    assert [
        (row.time - NOON, row.channel, *row[3:7]) for row in taken(collector)
    ] == MERGED


async def test_the_same_session_over_a_socket_ends_in_the_table(collectors, database):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="86400"
    ).ready()
    async with device(running.url, subprotocols=["json-rpc"]) as peer:
        await peer.send(*(frame for _, frame in SESSION))
        rows = await wait_for_rows(database, 2)
    assert [row[1:] for row in rows] == [row[1:] for row in MERGED[:2]]


def said(devices):
    """All numbers that the devices sent, by device, channel and field."""
    numbers = {}
    for one in devices:
        for frame in one.sent:
            for key, component in (
                frame.get("params") or frame.get("result") or {}
            ).items():
                if key.startswith("switch:"):
                    fields = {
                        **component,
                        "total": component.get("aenergy", {}).get("total"),
                    }
                    for name in ("apower", "voltage", "current", "total"):
                        numbers.setdefault((one.id, key, name), set()).add(
                            fields.get(name)
                        )
    return numbers


async def live_for(running, minutes, devices, filtered=False, minute_s=1.0):
    """Let devices live for some minutes of `minute_s` seconds each."""
    lines = [sim.Line(one, running.url, filtered, lambda _: None) for one in devices]
    await asyncio.gather(*(sim.live(line, minute_s, minutes) for line in lines))


@pytest.mark.slow
@pytest.mark.parametrize("old_firmware", [False, True])
async def test_every_value_of_every_row_is_one_that_the_device_sent(
    collectors, database, old_firmware
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1"
    ).ready()
    devices = [
        sim.Device(f"shellypro4pm-{n:012x}", 4, old_firmware, seed=n) for n in range(5)
    ]
    await live_for(running, 8, devices)
    await wait_for(lambda: "rows waiting: 0" in running.get()[1])
    numbers = said(devices)
    for device_id, channel, *values in read_rows(database, VALUES):
        for name, value in zip(
            ("apower", "voltage", "current", "total"), values, strict=True
        ):
            assert value in numbers[device_id, channel, name], (
                device_id,
                channel,
                name,
                value,
            )
        assert values[1] > 200 and values[3] > 100
    times = {}
    for when, device_id, channel in read_rows(
        database, "timestamp, device_id, channel"
    ):
        times.setdefault((device_id, channel), []).append(when.timestamp())
    assert len(times) == 5 * 4
    for found in times.values():
        assert found == [found[0] + n for n in range(len(found))] and len(found) >= 9


@pytest.mark.slow
async def test_behind_the_filter_nothing_but_what_passed_becomes_rows(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1", MIN_POWER_W="10"
    ).ready()
    one = sim.Device(DEVICE, 4, seed=7)
    await live_for(running, 10, [one], filtered=True)
    assert all(sim.passes_filter(frame) for frame in one.sent)
    rows = await wait_for(lambda: read_rows(database, VALUES))
    numbers = said([one])
    for device_id, channel, *values in rows:
        assert all(
            value in numbers[device_id, channel, name]
            for name, value in zip(
                ("apower", "voltage", "current", "total"), values, strict=True
            )
        )
        assert values[1] > 200


@pytest.mark.slow
async def test_a_bare_first_delta_behind_a_filter_with_old_firmware_is_stored_after_an_interval(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1"
    ).ready()
    async with device(running.url) as peer:
        await peer.send(notify({"switch:0": {"apower": 433.8, "current": 2.631}}))
        assert await wait_for_rows(database, 1) == [
            (DEVICE, "switch:0", 433.8, 0.0, 2.631, 0.0)
        ]
    (line,) = [line for line in running.log.splitlines() if "stored as 0" in line]
    assert DEVICE in line and "switch:0" in line and "voltage_v" in line


@pytest.mark.slow
async def test_a_device_comes_back_after_a_drop_and_goes_on(
    collectors, database, tmp_path
):
    running = await collectors(
        tmp_path, DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1"
    ).ready()
    one = sim.Device(DEVICE, 1)
    line = sim.Line(one, running.url, False, lambda _: None)
    living = asyncio.create_task(sim.live(line, 1.0, None))
    await wait_for_rows(database, 1)
    status, _ = await running.stop()
    assert status == 0
    await (await running.again()).ready()
    before = len(read_rows(database))
    await wait_for(lambda: len(read_rows(database)) > before + 1)
    living.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await living


@pytest.mark.slow
async def test_the_simulated_device_runs_from_the_command_line_and_stops_cleanly(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1"
    ).ready()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        ROOT / "tests/simulated_device.py",
        running.url,
        "--minute",
        "1",
        "--devices",
        "2",
        "--channels",
        "3",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await wait_for(lambda: len(read_rows(database)) >= 12)
    process.terminate()
    out, err = await process.communicate()
    assert process.returncode == 0 and err == b"", err.decode()
    assert (
        b'"error":{"code":404' in out
        and b"NotifyFullStatus" in out
        and out.endswith(b"stopped\n")
    )


@pytest.mark.slow
async def test_the_simulated_device_ends_quietly_when_nobody_reads_on(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1"
    ).ready()
    command = f"'{sys.executable}' '{ROOT / 'tests/simulated_device.py'}' {running.url} --minute 1 | head -n 3"
    process = await asyncio.create_subprocess_shell(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0 and err == b"" and out.count(b"\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["http://localhost:5000/ws"],
        ["--minute", "0"],
        *(
            ["--history", text]
            for text in ("soon", "24", "-1h", "0m", "25h", "1441m", "1.5h", "٢h")
        ),
    ],
)
async def test_the_simulated_device_refuses_nonsense_with_a_line(arguments):
    command = [sys.executable, str(ROOT / "tests/simulated_device.py"), *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 10)
    assert (
        process.returncode != 0
        and out == b""
        and b"Traceback" not in err
        and err.strip()
    )


def by_minute(frames):
    """The minute frames of the past: for each device and channel, its components by
    minute."""
    found = {}
    for frame in frames:
        for key, component in frame["params"].items() if "received" in frame else ():
            if key.startswith("switch:") and "aenergy" in component:
                minutes = found.setdefault((frame["src"], key), {})
                assert (
                    0 <= frame["received"] % 60 <= 0.03
                    and frame["params"]["ts"] == frame["received"]
                )
                assert frame["received"] // 60 not in minutes, (
                    "two frames of one minute"
                )
                minutes[frame["received"] // 60] = component
    return found


def runs(minutes):
    """The lengths in minutes of the runs that are whole: not cut off by a gap or by the
    start or end of the past."""
    running = {
        minute for minute, component in minutes.items() if component["apower"] > 10
    }
    begins = [
        minute
        for minute in running
        if minute - 1 in minutes and minute - 1 not in running
    ]
    ends = [
        next(end for end in itertools.count(begin) if end not in running)
        for begin in begins
    ]
    return [
        end - begin for begin, end in zip(begins, ends, strict=True) if end in minutes
    ]


@pytest.mark.slow
async def test_a_history_of_24_hours_is_that_of_plausible_houses_and_ends_within_seconds():
    frames, began = [], time.time()
    async with listening(frames) as url:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            ROOT / "tests/simulated_device.py",
            url,
            "--devices",
            "2",
            "--channels",
            "5",
            "--history",
            "24h",
            "--minutes",
            "0",
            env=os.environ | {"TZ": "EAST-9"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0 and err == b"" and out.count(b"\n") < 40, (
        err.decode()
    )
    assert not any("received" in frame for frame in frames[:6])
    status = {
        frame["src"]: frame["params"]
        for frame in frames
        if frame.get("method") == "NotifyFullStatus"
    }
    answers = {
        frame["src"]: frame["result"] for frame in frames if frame.get("id") == 2
    }
    houses = by_minute(frames)
    assert (
        list(status) == ["simulated-house-1", "simulated-house-2"]
        and len(houses) == 2 * 5
    )
    powers = {}
    for (house, key), minutes in houses.items():
        now = max(minutes) + 1
        assert (
            min(minutes) == now - 1440
            and began // 60 <= now <= status[house][key]["aenergy"]["minute_ts"] // 60
        )
        missing = set(range(int(now) - 1440, int(now))) - set(minutes)
        assert (
            len(missing) == 20 == max(missing) - min(missing) + 1
            and len(minutes) == 1420
        )
        assert (
            answers[house][key]["aenergy"]["total"]
            == status[house][key]["aenergy"]["total"]
        )
        last = None
        for minute, one in [*minutes.items(), (now, status[house][key])]:
            assert 226 <= one["voltage"] <= 234
            assert one["current"] * one["voltage"] == pytest.approx(
                one["apower"] * 1.02, abs=0.2
            )
            total = one["aenergy"]["total"]
            if minute - 1 in minutes:
                assert total == pytest.approx(
                    last["aenergy"]["total"] + last["apower"] / 60, abs=0.002
                )
                assert one["aenergy"]["by_minute"][0] == pytest.approx(
                    last["apower"] / 60 * 1000, abs=0.001
                )
            elif last:
                assert total >= last["aenergy"]["total"] + (
                    20 * 1.9 / 60 if key == "switch:2" else 0
                )
            last = one
            hour = (minute / 60 + 9) % 24
            assert (
                key != "switch:1"
                or not one["apower"]
                or 6 <= hour < 9.5
                or 17 <= hour < 22.5
            )
            powers.setdefault((house, key), set()).add(one["apower"])
    for house in status:
        pump, heater, fridge, spare, pump_2 = (
            powers[house, f"switch:{n}"] for n in range(5)
        )
        assert spare == {0} and pump != pump_2
        assert min(fridge) > 1 and all(one < 3 or 88 < one < 92 for one in fridge)
        assert all(not one or 1200 <= one <= 2000 for one in heater) and all(
            not one or 790 < one < 830 for one in pump
        )
        assert len(runs(houses[house, "switch:0"])) >= 3
        assert all(8 <= length <= 25 for length in runs(houses[house, "switch:0"]))
        assert set(runs(houses[house, "switch:2"])) == {12}
    assert (
        powers["simulated-house-1", "switch:0"]
        != powers["simulated-house-2", "switch:0"]
    )
    switched = [
        frame["params"]["switch:0"].get("output")
        for frame in frames
        if "received" in frame and "source" in frame["params"].get("switch:0", {})
    ]
    assert switched.count(True) >= 6 and switched.count(False) >= 6
    names = [
        {key: one["name"] for key, one in frame["result"].items() if key != "sys"}
        for frame in frames
        if frame.get("id") == 3
    ]
    kinds = ["Well pump", "Heater", "Fridge", "Spare", "Well pump 2"]
    assert names == [{f"switch:{n}": name for n, name in enumerate(kinds)}] * 2
    assert [
        frame["result"]["sys"]["device"]["name"]
        for frame in frames
        if frame.get("id") == 3
    ] == [
        "House",
        "House 2",
    ]


def test_a_second_run_has_the_same_past():
    first, second = (
        sim.House(1, 4, False, sim.read_history(text)) for text in ("24h", "90m")
    )
    first.remember()
    second.remember()
    before, after = by_minute(first.past), by_minute(second.past)
    for key, minutes in after.items():
        same = [minute for minute in minutes if minute in before[key]]
        assert len(same) >= 49 and all(
            minutes[minute] == before[key][minute] for minute in same
        )


async def test_a_dropped_past_is_played_anew_and_minutes_that_come_meanwhile_are_lived(
    monkeypatch,
):
    frames, clock = [], [0]
    monkeypatch.setattr(
        sim,
        "time",
        SimpleNamespace(time=lambda: time.time() + clock[0], localtime=time.localtime),
    )

    def ends():
        clock[0] += 120 if len(frames) in {50, 100} else 0
        return len(frames) == 50

    async with listening(frames, ends) as url:
        house = sim.House(1, 2, False, 90)
        await asyncio.wait_for(
            sim.live(sim.Line(house, url, False, lambda _: None), 1.0, 0), 20
        )
    dropped, again = by_minute(frames[:50]), by_minute(frames[50:])
    assert [min(again[key]) - min(dropped[key]) in {2, 3} for key in again] == [
        True
    ] * 2
    assert [len(minutes) for minutes in again.values()] == [70, 70]
    lived = [
        one
        for frame in frames[50:]
        if frame.get("method") == "NotifyStatus" and "received" not in frame
        for key, one in frame["params"].items()
        if key == "switch:1" and "aenergy" in one
    ]
    assert len(lived) in {2, 3}
    (status,) = [
        frame["params"]["switch:1"]
        for frame in frames[50:]
        if frame.get("method") == "NotifyFullStatus"
    ]
    risen = status["aenergy"]["total"] + status["apower"] / 60
    assert lived[0]["aenergy"]["total"] == pytest.approx(risen, abs=0.002)


async def test_a_house_lives_on_after_its_past_and_plays_that_only_once():
    house, frames, hung_up = sim.House(1, 4, False, sim.read_history("1h")), [], []

    def lived():
        status = [
            frame["params"]
            for frame in frames
            if frame.get("method") == "NotifyStatus" and "received" not in frame
        ]
        return [
            (key, one)
            for params in status
            for key, one in params.items()
            if key.startswith("switch:")
        ]

    def ends():
        if len(lived()) != 4 or hung_up:
            return False
        hung_up.append(True)
        return True

    async with listening(frames, ends) as url:
        await sim.live(sim.Line(house, url, False, lambda _: None), 0.2, 3)
    assert (
        hung_up and [len(minutes) for minutes in by_minute(frames).values()] == [40] * 4
    )
    assert len([one for _, one in lived() if "aenergy" in one]) >= 4 * 4
    for before, (key, one) in itertools.pairwise(lived()):
        follows = before == (key, {"output": True, "source": "SHC"})
        assert "aenergy" in one or "output" in one or follows, (
            "a load that changed between two minutes"
        )


async def test_a_device_that_sends_nothing_notices_that_the_collector_has_gone():
    frames = []

    def starts():
        """The frames that end its first words on a connection."""
        return [frame for frame in frames if "cloud" in frame.get("params", {})]

    def ends():
        # The collector goes when the device will say no more.
        return starts()[-1:] == frames[-1:]

    async with listening(frames, ends) as url:
        silent = sim.SmallDevice(DEVICE, sim.SilentMeter, pauses=(0.2, 0.3))
        line = sim.Line(silent, url, False, lambda _: None)
        living = asyncio.create_task(sim.live(line, 0.2, None))
        await wait_for(lambda: len(starts()) > 2)
        living.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await living


async def test_a_device_without_names_says_so():
    frames = []
    async with listening(frames) as url:
        await sim.live(
            sim.Line(sim.Device(DEVICE, 2), url, False, lambda _: None), 0.5, 1
        )
    (answer,) = [frame for frame in frames if frame.get("id") == 3]
    assert (
        answer["src"] == DEVICE
        and answer["dst"] == "collector"
        and answer["result"]["sys"]["device"]["name"] is None
    )
    assert [
        (answer["result"][f"switch:{n}"]["id"], answer["result"][f"switch:{n}"]["name"])
        for n in range(2)
    ] == [
        (0, None),
        (1, None),
    ]
    assert not any("received" in frame for frame in frames)


@pytest.mark.slow
async def test_jitter_of_50_ms_costs_no_interval(collectors, database):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="2"
    ).ready()
    rnd = random.Random(3)
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        sent = 1
        while sent < 6:
            target = (time.time() // 2 + 1) * 2
            await asyncio.sleep(target - time.time() + 0.06 + rnd.uniform(-0.05, 0.05))
            # Otherwise a busy machine made it late, perhaps into the next interval.
            if time.time() < target + 0.5:
                await peer.send(minute_frame())
                sent += 1
    rows = await wait_for_rows(database, 6)
    assert len(rows) == 6


async def play(url, *arguments, **env):
    return await asyncio.create_subprocess_exec(
        sys.executable,
        ROOT / "tests/simulated_device.py",
        url,
        "--minute",
        "1",
        *arguments,
        env=env or None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def noon_here():
    """An environment whose time zone has about noon now."""
    return {"TZ": f"NOON{time.gmtime().tm_hour - 12:+d}"}


async def stop(process):
    process.terminate()
    _, err = await process.communicate()
    assert process.returncode == 0 and err == b"", err.decode()


@pytest.mark.slow
async def test_a_simulated_three_phase_meter_becomes_rows_of_three_phases_with_counters_that_grow(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1"
    ).ready()
    process = await play(running.url, "--model", "pro3em", **noon_here())
    await wait_for(lambda: len(read_rows(database, "1", "1")) >= 3 * 6, 20)
    names = "SELECT channel, device_says FROM channel_names WHERE channel <> '' ORDER BY channel"
    await wait_for(lambda: len(query(database, names)) == 3)
    await stop(process)
    await wait_for(lambda: "rows waiting: 0" in running.get()[1])
    assert query(database, names) == [
        ("em:0:a", "House A"),
        ("em:0:b", "House B"),
        ("em:0:c", "House C"),
    ]
    columns = "channel, extract(epoch FROM timestamp)::float, apower_w, voltage_v, current_a, energy_total_wh, energy_returned_wh"
    series = {}
    for channel, *values in read_rows(database, columns):
        series.setdefault(channel, []).append(values)
    assert list(series) == ["em:0:a", "em:0:b", "em:0:c"]
    for channel, found in series.items():
        times, powers, volts, amps, drawn, returned = zip(*found, strict=True)
        assert len(times) >= 5 and times == tuple(
            times[0] + n for n in range(len(times))
        )
        assert min(volts) > 200 and min(amps) > 0
        assert list(drawn) == sorted(drawn) and list(returned) == sorted(returned)
        # The solar panels are on this phase.
        if channel == "em:0:c":
            assert (
                max(powers) < 0 and returned[-1] > returned[1] and len(set(drawn)) == 1
            )
        else:
            assert min(powers) > 0 and drawn[-1] > drawn[1] and set(returned) == {0.0}
    (device_id,) = {row[0] for row in read_rows(database, "device_id")}
    assert device_id == "shellypro3em-a1b2c3000000"
    assert "passed over" not in running.log and "stored as 0" not in running.log


@pytest.mark.slow
async def test_a_simulated_pro_em_50_becomes_rows_of_its_two_clamps_and_none_of_its_relay(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1"
    ).ready()
    process = await play(
        running.url, "--model", "proem50", "--devices", "2", **noon_here()
    )
    await wait_for(lambda: len(read_rows(database, "1", "1")) >= 2 * 2 * 4, 20)
    names = "SELECT DISTINCT channel, device_says FROM channel_names WHERE channel LIKE 'em%' ORDER BY channel"
    await wait_for(lambda: len(query(database, names)) == 2)
    await stop(process)
    assert query(database, names) == [("em1:0", "Mains"), ("em1:1", "Panels")]
    found = read_rows(database, "channel, sign(apower_w)")
    assert set(found) == {("em1:0", 1.0), ("em1:1", -1.0)}
    assert "passed over" not in running.log and "stored as 0" not in running.log


@pytest.mark.slow
@pytest.mark.parametrize("unconnected", [None, "b"])
async def test_every_value_of_every_row_is_one_that_the_meter_sent(
    collectors, database, unconnected
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1"
    ).ready()
    meters = [
        sim.Pro3EM(f"shellypro3em-{n:012x}", unconnected, seed=n) for n in range(3)
    ]
    await asyncio.gather(
        *(
            sim.live(sim.Line(one, running.url, False, lambda _: None), 1.0, 5)
            for one in meters
        )
    )
    await wait_for(lambda: "rows waiting: 0" in running.get()[1])
    sent = {one.id: {} for one in meters}
    for one in meters:
        for frame in one.sent:
            components = frame.get("params") or frame.get("result") or {}
            for key in ("em:0", "emdata:0"):
                for name, value in components.get(key, {}).items():
                    sent[one.id].setdefault(name, []).append(value)
    found = read_rows(database, ALL_VALUES)
    assert len(found) >= 3 * 3 * 5
    for device_id, channel, *values in found:
        phase = channel[-1]
        for name, value in zip([*POWER, *COUNTER], values, strict=True):
            assert value in sent[device_id][f"{phase}_{name}"], (channel, name, value)
        assert (values[1] == 0) == (phase == unconnected)


async def test_the_simulated_meter_sends_powers_between_the_minutes_and_counters_at_them():
    frames = []
    async with listening(frames) as url:
        await sim.live(sim.Line(sim.Pro3EM(METER), url, False, lambda _: None), 1.0, 3)
    assert {frame["src"] for frame in frames} == {METER}
    (whole,) = [
        frame["params"] for frame in frames if frame.get("method") == "NotifyFullStatus"
    ]
    (status,) = [frame["result"] for frame in frames if frame.get("id") == 2]
    (config,) = [frame["result"] for frame in frames if frame.get("id") == 3]
    assert (
        config["em:0"]["name"] == "House"
        and config["em:0"]["id"] == 0
        and config["emdata:0"] == {}
    )
    for components in (whole, status):
        assert components["em:0"].keys() == EM.keys() | {"user_calibrated_phase"}
        assert (
            components["emdata:0"].keys() == EMDATA.keys()
            and components["em:0"]["n_current"] is None
        )
    deltas = [
        frame["params"] for frame in frames if frame.get("method") == "NotifyStatus"
    ]
    powers = [one["em:0"] for one in deltas if "em:0" in one]
    counters = [one["emdata:0"] for one in deltas if "emdata:0" in one]
    assert (
        len(counters) == 3
        and len(powers) >= 3 * 5
        and not any({"em:0", "emdata:0"} <= one.keys() for one in deltas)
    )
    assert all(one.keys() == EM.keys() for one in powers) and all(
        one.keys() == EMDATA.keys() for one in counters
    )
    assert all(0 <= one["ts"] % 1 < 0.1 for one in deltas if "emdata:0" in one)
    for one in powers:
        assert one["total_act_power"] == pytest.approx(
            sum(one[f"{p}_act_power"] for p in "abc"), abs=0.001
        )
        assert all(
            one[f"{p}_current"] >= 0 and 226 <= one[f"{p}_voltage"] <= 234
            for p in "abc"
        )


@pytest.mark.parametrize("hour", [12, 2])
def test_the_solar_phase_gives_back_by_day_and_takes_a_little_at_night(
    monkeypatch, hour
):
    fixed = time.struct_time((2026, 6, 21, hour, 0, 0, 6, 172, 0))
    monkeypatch.setattr(sim.time, "localtime", lambda *_: fixed)
    meter = sim.Pro3EM(METER)
    frames = meter.full_status(), *meter.change(), *meter.minute()
    before, powers, after = (
        frames[0]["params"],
        frames[1]["params"]["em:0"],
        frames[2]["params"],
    )
    rise = {
        name: after["emdata:0"][name] - value
        for name, value in before["emdata:0"].items()
    }
    assert (powers["c_act_power"] < 0) == (hour == 12) and powers["c_current"] > 0
    assert (rise["c_total_act_ret_energy"] > 0) == (hour == 12) and (
        rise["c_total_act_energy"] > 0
    ) == (hour == 2)
    assert rise["a_total_act_energy"] > 0 and rise["a_total_act_ret_energy"] == 0
    assert rise["total_act"] == pytest.approx(
        sum(rise[f"{p}_total_act_energy"] for p in "abc"), abs=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        *(
            [*model, option, *value]
            for model in (["--model", "pro3em"], ["--model", "proem50"])
            for option, *value in (
                ["--channels", "4"],
                ["--history", "24h"],
                ["--filter"],
                ["--old-firmware"],
            )
        ),
        ["--unconnected", "b"],
        ["--model", "proem50", "--unconnected", "b"],
        ["--model", "pro3em", "--unconnected", "d"],
        ["--model", "pro9"],
    ],
)
async def test_the_simulated_device_refuses_what_its_model_does_not_have_with_a_line(
    arguments,
):
    process = await play("ws://localhost:1/ws", *arguments)
    out, err = await asyncio.wait_for(process.communicate(), 10)
    option = [argument for argument in arguments if argument.startswith("--")][-1]
    assert (
        process.returncode == 2
        and out == b""
        and option.encode() in err.splitlines()[-1]
    )
