"""Which minute a frame counts for, and when a device is asked: simulated devices with
their quirks live for a day, by a clock that the tests set."""

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import simulated_device as sim
from asking import GET_CONFIG, GET_STATUS, Requests, moment_of
from complaints import MAX_LOGGED_ONCE, Complaints
from shelly_collector import ASK_TICK, count_silent
from support import (
    DEVICE,
    EM,
    EMDATA,
    METER,
    NOON,
    Link,
    assert_nothing_waits,
    exchange,
    expire,
    feed,
    look,
    minute_frame,
    notify,
    taken,
)

DAY = 1440


class Life:
    """A simulated device on a connection, and what the collector makes of it.

    `arrives(n)` is how late the frame of minute n comes, in seconds; below 0 it comes
    before the minute."""

    def __init__(
        self,
        collector: Any,
        device: sim.Device,
        arrives: Callable[[int], float] = lambda n: 0.02,
        answers: bool = True,
    ) -> None:
        self.collector, self.device = collector, device
        self.arrives, self.answers = arrives, answers
        self.link = Link()
        self.now = NOON
        # How long an answer takes.
        self.delay_s = 0.1
        # When it was asked, and the frames of full minutes by the minute they mean.
        self.asked: list[float] = []
        self.minutes: dict[float, sim.Frame] = {}
        device.clock = lambda: self.now
        device.synced = True
        self.rnd = random.Random(1)

    def send(self, frame: sim.Frame, now: float) -> None:
        if exchange(self.collector, self.link, frame, now):
            self.answer(now)

    def answer(self, now: float) -> None:
        self.asked.append(now)
        if self.answers:
            answer = self.device.answer(json.loads(GET_STATUS))
            self.send(answer, now + self.delay_s)

    def say_minute(self, minute: float, arrival: float) -> None:
        # The device makes the frame at the full minute of its own clock.
        self.now = minute
        frames = self.device.minute()
        self.now = arrival
        for frame in frames:
            self.minutes[minute] = frame
            self.send(frame, arrival)

    def say_change(self, now: float) -> None:
        for frame in self.device.change():
            self.send(frame, now)

    def look(self, now: float) -> None:
        if look(self.collector, self.link, now):
            self.answer(now)

    def connect(self) -> None:
        """Connect half a minute before NOON, and tell the whole status."""
        self.now = NOON - 31
        self.link.requests.sent_at[GET_STATUS] = self.now
        self.send(self.device.full_status(), self.now)
        if self.answers:
            self.send(self.device.answer(json.loads(GET_STATUS)), self.now)
        self.asked.clear()

    def live(self, minutes: int, edges: tuple[float, ...] = ()) -> None:
        """Live from NOON on. `edges` are seconds from each full minute at which a load
        changes, besides those in between."""
        events: list[tuple[float, Callable[..., None], tuple[float, ...]]] = []
        for n in range(minutes):
            minute = NOON + 60 * n
            arrival = minute + self.arrives(n)
            events.append((arrival, self.say_minute, (minute, arrival)))
            pause = self.rnd.uniform(*self.device.pauses) * 60
            second = pause
            while second < 60:
                events.append((minute + second, self.say_change, (minute + second,)))
                second += pause
            for edge in edges:
                events.append((minute + edge, self.say_change, (minute + edge,)))
            for tick in range(60):
                moment = minute + tick * ASK_TICK + self.rnd.random() * 0.01
                events.append((moment, self.look, (moment,)))
        for moment, happen, arguments in sorted(events, key=lambda event: event[0]):
            self.now = moment
            happen(*arguments)


def minutes_of(rows: list[Any]) -> list[float]:
    return [(row.time - NOON) / 60 for row in rows]


class Steady(sim.Switch):
    """An output whose power changes, but that is never switched off."""

    def change(self) -> list[sim.Frame]:
        self.load_w = 800.0
        self.change_load()
        delta = {"apower": self.apower, "current": self.current}
        return [{self.key: delta}]


# ---- A device whose clock is off


@pytest.mark.parametrize("min_power", [{}, {"MIN_POWER_W": "10"}])
@pytest.mark.parametrize("offset_s", [-19.5, -10, -2.1, -0.3, -0.2, 0, 0.3, 10, 19.5])
async def test_each_minute_frame_is_in_the_minute_that_it_names_and_none_is_lost(
    make, offset_s, min_power
):
    rnd = random.Random(2)
    life = Life(
        make(**min_power),
        sim.SmallDevice(DEVICE, Steady),
        lambda n: offset_s + rnd.uniform(-0.1, 0.1),
    )
    life.live(DAY, edges=(-9.5, -0.05, 0.05, 9.5))
    rows = taken(life.collector)
    # A reading that comes before NOON may add a row for that minute.
    found = [minute for minute in minutes_of(rows) if minute >= 0]
    assert found == list(range(DAY))
    if offset_s < -1:
        # It came before any other reading of its minute.
        for row in rows:
            if row.time in life.minutes:
                (component,) = [
                    value
                    for key, value in life.minutes[row.time]["params"].items()
                    if key == row.channel
                ]
                assert row.energy_total_wh == component["aenergy"]["total"]
                assert row.apower_w == component["apower"]


async def test_a_clock_that_drifts_through_zero_loses_no_minute(make):
    rnd = random.Random(3)
    life = Life(
        make(),
        sim.SmallDevice(DEVICE, Steady),
        lambda n: -0.6 + 1.2 * n / DAY + rnd.uniform(-0.1, 0.1),
    )
    life.live(DAY, edges=(-0.05, 0.05))
    assert minutes_of(taken(life.collector)) == list(range(DAY))


async def test_a_frame_that_does_not_name_its_minute_counts_for_the_nearest_one(make):
    # Firmware 1.1: its minute_ts is no full minute.
    rnd = random.Random(4)
    device = sim.SmallDevice(DEVICE, Steady)
    device.parts[0].odd_minute_ts = True
    life = Life(make(), device, lambda n: -0.2 + rnd.uniform(-0.04, 0.04))
    life.live(DAY, edges=(-0.1, 0.1))
    assert minutes_of(taken(life.collector)) == list(range(DAY))


@pytest.mark.parametrize(
    ("minute_ts", "now", "minute"),
    [
        (NOON, NOON - 19.9, 0),
        (NOON, NOON + 19.9, 0),
        (NOON, NOON + 59.9, 60),  # its clock is behind by a minute
        (NOON, NOON - 20.1, -60),
        (NOON + 1, NOON - 10, -60),
        (NOON - 3600, NOON - 0.2, 0),
        (0, NOON - 10, -60),
        (None, NOON - 0.3, -60),
        (NOON, NOON + 30, 0),
    ],
)
async def test_a_minute_that_is_named_counts_within_20_s_of_the_servers_clock(
    make, minute_ts, now, minute
):
    collector = make()
    energy = {"total": 1.0, "minute_ts": minute_ts}
    feed(collector, minute_frame(aenergy=energy), now)
    assert [row.time - NOON for row in taken(collector)] == [minute]


@pytest.mark.parametrize(("early_s", "start"), [(3, 60), (15, 40)])
async def test_with_a_short_interval_a_named_minute_is_believed_for_a_third_of_it(
    make, early_s, start
):
    collector = make(THROTTLE_INTERVAL_SECONDS="10")
    energy = {"total": 1.0, "minute_ts": NOON + 60}
    feed(collector, minute_frame(aenergy=energy), NOON + 60 - early_s)
    assert [row.time - NOON for row in taken(collector)] == [start]


async def test_a_held_back_frame_is_in_the_minute_that_it_names(make):
    collector = make()
    energy = {"total": 1.0, "minute_ts": NOON - 3600}
    frame = minute_frame(aenergy=energy) | {"received": NOON - 3602}
    feed(collector, frame, NOON)
    assert [row.time - NOON for row in taken(collector)] == [-3600]


async def test_what_follows_an_early_frame_makes_no_second_row_for_the_minute_before(
    make,
):
    collector = make(MIN_POWER_W="10")
    early = {"total": 1.0, "minute_ts": NOON + 60}
    feed(collector, minute_frame(aenergy=early), NOON + 50)
    feed(collector, notify({"switch:0": {"apower": 99.0}}), NOON + 55)
    feed(collector, notify({"switch:0": {"apower": 98.0}}), NOON + 65)
    assert [row.time - NOON for row in taken(collector)] == [60]


async def test_a_device_that_is_off_at_its_early_frame_runs_in_the_minute_it_is_switched_on(
    make,
):
    collector = make(MIN_POWER_W="10")
    early = {"total": 1.0, "minute_ts": NOON + 60}
    feed(collector, minute_frame(apower=0, aenergy=early), NOON + 50)
    feed(collector, notify({"switch:0": {"apower": 99.0}}), NOON + 55)
    assert [row.time - NOON for row in taken(collector)] == [0]


# ---- A device that is asked


async def test_a_day_of_a_silent_device_has_1440_rows(make):
    life = Life(make(), sim.SmallDevice(DEVICE, sim.SilentMeter))
    life.connect()
    life.live(DAY)
    rows = taken(life.collector)
    assert minutes_of(rows) == list(range(-1, DAY))
    # It is asked once in each minute, in its second half.
    assert len(life.asked) == DAY
    assert all(30 <= (moment - NOON) % 60 < 59 for moment in life.asked)
    # Each row has the counter of its own minute.
    counters = [row.energy_total_wh for row in rows]
    assert counters[1:] == sorted(set(counters[1:]))


@pytest.mark.parametrize("interval_s", [1, 10, 60, 300, 3600])
async def test_a_silent_device_is_asked_once_in_an_interval_and_at_most_once_a_minute(
    make, interval_s
):
    collector = make(THROTTLE_INTERVAL_SECONDS=str(interval_s))
    life = Life(collector, sim.SmallDevice(DEVICE, sim.SilentMeter))
    life.connect()
    life.live(240)
    length = max(60, interval_s)
    assert len(life.asked) == 240 * 60 / length
    assert {(moment - NOON) // length for moment in life.asked} == set(
        range(int(240 * 60 / length))
    )


@pytest.mark.parametrize("offset_s", [-10, -0.3, 0.02, 10])
async def test_a_device_that_sends_its_minute_frames_is_never_asked(make, offset_s):
    # Where no row is written, it is the frames that count.
    for min_power in ({}, {"MIN_POWER_W": "5000"}):
        device = sim.Device(DEVICE, 4)
        device.pauses = (1.0, 2.0)
        life = Life(make(**min_power), device, lambda n: offset_s)
        life.connect()
        life.live(DAY)
        assert life.asked == []


async def test_a_meter_that_tells_its_counters_each_minute_is_never_asked(make):
    for device in (sim.Pro3EM(METER), sim.ProEM50(METER)):
        life = Life(make(), device)
        life.connect()
        life.live(60)
        assert life.asked == []


async def test_a_relay_without_a_meter_is_never_asked(make):
    device = sim.SmallDevice(DEVICE, sim.SilentMeter)
    device.parts = [sim.Relay(0, random.Random(1))]
    life = Life(make(), device)
    life.connect()
    life.live(60)
    assert life.asked == [] and not taken(life.collector)


async def test_where_nobody_answers_it_is_asked_every_ten_minutes(make):
    device = sim.SmallDevice(DEVICE, sim.SilentMeter)
    life = Life(make(), device, answers=False)
    life.connect()
    life.live(DAY)
    pauses = [b - a for a, b in zip(life.asked, life.asked[1:], strict=False)]
    assert all(590 < pause < 610 for pause in pauses[3:])
    assert DAY / 10 <= len(life.asked) <= DAY / 10 + 3
    # Once somebody answers, each minute counts again.
    life.answers = True
    before = len(life.asked)
    for second in range(12 * 60):
        life.look(NOON + 60 * DAY + second)
    assert len(life.asked) - before >= 2


def test_only_requests_for_the_status_count_as_unanswered():
    requests = Requests()
    for n in range(5):
        requests.note_sent(GET_CONFIG, NOON + n)
    assert requests.unanswered == 0
    requests.note_sent(GET_STATUS, NOON)
    assert requests.unanswered == 1


async def test_an_error_is_no_answer(make):
    device = sim.SmallDevice(DEVICE, sim.SilentMeter)
    life = Life(make(), device)
    life.connect()
    error = {"code": 401, "message": '{"auth_type": "digest", "nonce": 1}'}
    device.answer = lambda request: {"id": 2, "src": DEVICE, "error": error}
    life.live(60)
    assert 5 < len(life.asked) < 12


async def test_a_device_that_is_silent_on_a_new_connection_is_asked_there(make):
    device = sim.SmallDevice(DEVICE, sim.SilentMeter)
    life = Life(make(), device)
    life.connect()
    life.live(3)
    life.link = Link()
    life.send(device.full_status(), NOON + 179)
    life.asked.clear()
    for second in range(60):
        life.look(NOON + 180 + second)
    assert len(life.asked) == 1


async def test_a_clock_that_steps_back_does_not_end_the_asking(make):
    life = Life(make(), sim.SmallDevice(DEVICE, sim.SilentMeter))
    life.connect()
    life.live(3)
    life.asked.clear()
    for second in range(180):
        life.look(NOON - 7200 + second)
    assert len(life.asked) == 3


def test_ten_thousand_silent_devices_are_asked_over_half_a_minute():
    moments = Counter(
        int(60 * moment_of(f"shellypmmini-{n:012x}")) for n in range(10_000)
    )
    assert set(moments) == set(range(30, 54))
    assert max(moments.values()) < 2 * 10_000 / 24


async def test_each_device_is_asked_at_its_own_moment(make):
    collector = make()
    links = []
    for n in range(300):
        links.append(Link())
        feed(collector, minute_frame(f"shellypmmini-{n:012x}"), NOON, links[-1])
    asked = Counter(
        second
        for second in range(60, 120)
        for link in links
        if look(collector, link, NOON + second)
    )
    assert asked.total() == 300
    assert max(asked.values()) < 300 / 8


# Ids that are asked early, in the middle and late.
IDS = sorted((f"shellypmmini-{n:012x}" for n in range(40)), key=moment_of)[::13]


@pytest.mark.parametrize("device_id", IDS)
@pytest.mark.parametrize("clock_error_s", [-19, 4, 10, 19, 25])
async def test_the_clock_of_a_silent_device_does_not_matter(
    make, device_id, clock_error_s
):
    # Its answer names a minute, too, but it is an answer to a question of this minute.
    device = sim.SmallDevice(device_id, sim.SilentMeter)
    device.clock_error_s = clock_error_s
    life = Life(make(), device)
    life.connect()
    life.live(120)
    assert minutes_of(taken(life.collector)) == list(range(-1, 120))


@pytest.mark.parametrize("device_id", IDS)
async def test_an_answer_may_take_five_seconds(make, device_id):
    life = Life(make(), sim.SmallDevice(device_id, sim.SilentMeter))
    life.delay_s = 5.0
    life.connect()
    life.live(120)
    assert minutes_of(taken(life.collector)) == list(range(-1, 120))


@pytest.mark.parametrize("interval_s", [7, 25, 45])
async def test_a_short_interval_that_does_not_divide_the_minute_asks_nobody(
    make, interval_s
):
    collector = make(THROTTLE_INTERVAL_SECONDS=str(interval_s))
    life = Life(collector, sim.SmallDevice(DEVICE, Steady, pauses=(1.0, 2.0)))
    life.connect()
    life.live(60)
    assert life.asked == []


async def test_a_counter_that_is_not_told_is_asked_for_like_an_old_voltage(make):
    life = Life(
        make(),
        sim.SmallDevice(DEVICE, sim.LateSwitch, pauses=(0.11, 0.12)),
    )
    life.connect()
    life.live(60)
    rows = taken(life.collector)
    assert minutes_of(rows) == list(range(-1, 60))
    # No counter is older than six minutes.
    counters = [row.energy_total_wh for row in rows]
    assert max(Counter(counters).values()) <= 7
    assert 60 / 7 < len(life.asked) <= 60 / 5


async def test_old_firmware_is_asked_for_its_voltage_every_few_minutes(make):
    device = sim.SmallDevice(DEVICE, Steady, pauses=(1.0, 2.0))
    device.parts[0].old_firmware = True
    life = Life(make(), device)
    life.connect()
    life.live(60)
    assert 60 / 7 < len(life.asked) <= 60 / 5
    voltages = [row.voltage_v for row in taken(life.collector)]
    assert max(Counter(voltages).values()) <= 7


# ---- What a device does not have


@pytest.mark.parametrize("kind", ["rgb", "rgbw", "cct", "rgbcct"])
async def test_a_lamp_makes_rows(make, kind):
    collector = make()
    component = minute_frame()["params"]["switch:0"]
    feed(collector, notify({f"{kind}:0": component}), NOON)
    assert [(row.channel, row.apower_w) for row in taken(collector)] == [
        (f"{kind}:0", 433.8)
    ]


async def test_a_bulb_without_voltage_and_current_has_0_for_both_and_is_not_asked_for_ever(
    make, caplog
):
    life = Life(make(), sim.SmallDevice(DEVICE, sim.Bulb))
    life.connect()
    life.live(2)
    expire(life.collector)
    asked = len(life.asked)
    assert asked <= 2
    rows = taken(life.collector)
    life.live(60)
    assert len(life.asked) == asked
    # None has waited.
    rows = taken(life.collector)
    assert len(rows) >= 57
    assert_nothing_waits(life.collector)
    assert {(row.voltage_v, row.current_a) for row in rows} == {(0.0, 0.0)}
    (warning,) = caplog.messages
    assert "cct:0 reports no voltage_v, current_a: stored as 0" in warning


def status(**fields: Any) -> dict[str, Any]:
    component = {"id": 0, "apower": 5.0, "aenergy": {"total": 9.0}}
    return notify({"cct:0": component | fields}, method="NotifyFullStatus")


async def test_a_device_that_boots_may_lack_what_it_soon_has(make, caplog):
    collector = make()
    # Two whole statuses come right after it has connected.
    feed(collector, status(), NOON)
    feed(collector, status(), NOON + 0.1)
    assert not taken(collector)
    feed(collector, status(voltage=230.0, current=0.1), NOON + 50)
    assert [row.voltage_v for row in taken(collector)] == [230.0]
    assert not caplog.messages


async def test_what_two_whole_statuses_lack_is_waited_for_again_once_it_has_come(make):
    collector = make()
    for minute in (0, 1):
        feed(collector, status(), NOON + 60 * minute)
    assert len(taken(collector)) == 2
    feed(collector, status(voltage=230.0, current=0.1), NOON + 120)
    feed(collector, status(), NOON + 180)
    assert [row.voltage_v for row in taken(collector)] == [230.0]


@pytest.mark.parametrize("how", ["a minute frame", "a delta"])
async def test_what_has_come_by_any_frame_may_come_again(make, caplog, how):
    collector = make()
    # It boots, and what the first two statuses lack comes soon.
    feed(collector, status(), NOON)
    feed(collector, status(), NOON + 0.1)
    measured = {"voltage": 230.0, "current": 0.1}
    if how == "a minute frame":
        measured["aenergy"] = {"total": 10.0}
    feed(collector, notify({"cct:0": measured}), NOON + 10)
    # Two hours later it boots again.
    feed(collector, status(), NOON + 7200)
    assert [row.voltage_v for row in taken(collector)] == [230.0]
    feed(collector, notify({"cct:0": measured}), NOON + 7210)
    assert [row.voltage_v for row in taken(collector)] == [230.0]
    assert not caplog.messages


async def test_a_counter_that_a_device_does_not_have_is_not_asked_for_ever(make):
    collector, link = make(), Link()
    measured = {"apower": 5.0, "voltage": 230.0, "current": 0.1}
    whole = notify({"switch:0": measured}, method="NotifyFullStatus")
    for minute in range(20):
        frame = whole if minute < 2 else notify({"switch:0": measured})
        feed(collector, frame, NOON + 60 * minute, link)
        asked = look(collector, link, NOON + 60 * minute + 58)
        assert not asked or minute < 2
    assert len(taken(collector)) == 20


async def test_null_is_not_absent(make):
    collector = make()
    for minute in range(3):
        feed(collector, status(voltage=None, current=0.1), NOON + 60 * minute)
    assert not taken(collector)


async def test_a_half_of_a_clamp_does_not_lack_what_the_other_reports(make):
    collector = make()
    whole = {"em:0": EM, "emdata:0": EMDATA}
    for minute in range(3):
        feed(collector, notify(whole, METER, "NotifyFullStatus"), NOON + 60 * minute)
    taken(collector)
    # The counter is null now, and its rows wait.
    lost = EMDATA | {f"{phase}_total_act_energy": None for phase in "abc"}
    feed(collector, notify(whole | {"emdata:0": lost}, METER), NOON + 180)
    assert not taken(collector)


# ---- Components that are not read


async def test_a_power_in_an_unknown_component_is_named_once_per_device(make, caplog):
    collector = make()
    for name in ("charger-1", "charger-2"):
        life = Life(collector, sim.SmallDevice(name, sim.Charger, 200))
        life.connect()
        life.live(10)
    assert caplog.messages[1::2] != []
    assert [m for m in caplog.messages if "sends" in m] == [
        f"{name} sends object:200 with a power, which is not kept"
        for name in ("charger-1", "charger-2")
    ]
    assert not taken(collector)


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("cb:0", {"id": 0, "output": True, "apower": 5.0}),
        ("bm:0", {"id": 0, "voltage": 12.8, "current": 1.0, "power": 12.8}),
        ("voltmeter:100", {"id": 100, "voltage": 4.2}),
        ("bthomesensor:200", {"id": 200, "value": 21.5}),
        ("devicepower:0", {"battery": {"V": 5.9, "percent": 84}}),
        ("object:200", {"value": None}),
        ("object:200", {"value": {"total_power": None}}),
        ("input:0", {"id": 0, "state": False}),
        # CHANNELS does not want it.
        ("switch:1", {"id": 1, "apower": 5.0}),
        ("em:1", {"id": 1, "a_act_power": 5.0}),
    ],
)
async def test_of_breakers_sensors_and_gateways_there_is_no_word(
    make, caplog, key, component
):
    feed(make(CHANNELS="0"), notify({key: component}), NOON)
    assert not caplog.messages


async def test_a_charger_beside_a_switch_is_named(make, caplog):
    both = minute_frame()["params"] | {"object:200": {"value": {"total_power": 9.0}}}
    feed(make(), notify(both, method="NotifyFullStatus"), NOON)
    assert [m for m in caplog.messages if "object:200" in m]


def test_what_is_logged_once_is_not_lost_in_a_minute_with_too_many_warnings(
    monkeypatch, caplog, replace
):
    replace(MAX_COMPLAINTS=1)
    complaints, clock = Complaints(), 1000.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    for _ in range(3):
        for text in ("one", "two", "three"):
            complaints.log_once(text)
        clock += 61
    assert sorted(caplog.messages) == ["one", "three", "two"]


async def test_a_key_that_no_device_has_does_not_get_into_the_log(make, caplog):
    collector = make()
    keys = ("object:200\n2026-11-29 CRITICAL the disk is full:1", "x" * 200_000 + ":1")
    feed(collector, notify({key: {"apower": 1.0} for key in keys}), NOON)
    assert not caplog.messages and not collector.complaints.logged_once


async def test_components_that_are_named_are_bounded(make, caplog, replace):
    replace(MAX_LOGGED_ONCE=10, MAX_COMPLAINTS=100)
    collector = make()
    for n in range(50):
        feed(collector, notify({f"object:{n}": {"apower": 1.0}}), NOON)
    assert len(caplog.messages) == 10 < MAX_LOGGED_ONCE


# ---- A change of profile


async def test_a_channel_that_a_whole_status_lacks_is_no_longer_expected(make):
    collector, link = make(), Link()
    feed(collector, notify({"em:0": EM, "emdata:0": EMDATA}, METER), NOON, link)
    clamp = {"act_power": 5.0, "voltage": 230.0, "current": 0.1}
    changed = {"em1:0": clamp, "em1data:0": {"total_act_energy": 1.0}}
    # It has rebooted, so this is another connection.
    other = Link()
    feed(collector, notify(changed, METER, "NotifyFullStatus"), NOON + 60, other)
    silent = [name for name, channel in collector.channels.items() if not channel.gone]
    assert silent == [f"{METER}em1:0"]
    # The old profile comes back.
    feed(collector, notify({"em:0": EM}, METER), NOON + 120, other)
    assert not any(channel.gone for channel in collector.channels.values())


async def test_silent_channels_of_an_old_profile_are_not_counted(make, monkeypatch):
    collector, link = make(), Link()
    feed(collector, notify({"em:0": EM, "emdata:0": EMDATA}, METER), NOON, link)
    monkeypatch.setattr("time.time", lambda: NOON + 700)
    assert count_silent(collector, 600) == 3
    clamp = {"act_power": 5.0, "voltage": 230.0, "current": 0.1}
    feed(collector, notify({"em1:0": clamp}, METER, "NotifyFullStatus"), NOON + 650)
    assert count_silent(collector, 600) == 0


async def test_an_answer_to_another_request_or_an_old_frame_takes_no_channel_away(make):
    collector, link = make(), Link()
    feed(collector, notify({"em:0": EM, "emdata:0": EMDATA}, METER), NOON, link)
    records = {"id": 9, "src": METER, "dst": "collector", "result": {"keys": ["a"]}}
    feed(collector, records, NOON + 1, link)
    clamp = {"act_power": 5.0, "voltage": 230.0, "current": 0.1}
    old = notify({"em1:0": clamp}, METER, "NotifyFullStatus")
    feed(collector, old | {"received": NOON - 600}, NOON + 2, link)
    gone = {channel.key for channel in collector.channels.values() if channel.gone}
    assert gone == set()


async def test_a_profile_that_comes_back_within_a_minute_is_expected(make):
    collector, link = make(), Link()
    whole = notify({"em:0": EM, "emdata:0": EMDATA}, METER, "NotifyFullStatus")
    clamp = {"act_power": 5.0, "voltage": 230.0, "current": 0.1}
    other = notify({"em1:0": clamp}, METER, "NotifyFullStatus")
    for second, frame in enumerate((whole, other, whole)):
        feed(collector, frame, NOON + second, link)
    gone = {channel.key for channel in collector.channels.values() if channel.gone}
    assert gone == {"em1:0"}


async def test_a_meter_with_an_error_is_still_expected(make, monkeypatch):
    collector, link = make(), Link()
    feed(collector, minute_frame(), NOON, link)
    broken = {"switch:0": {"apower": None, "errors": ["power_meter_failure"]}}
    feed(collector, notify(broken, method="NotifyFullStatus"), NOON + 650, link)
    monkeypatch.setattr("time.time", lambda: NOON + 700)
    assert count_silent(collector, 600) == 1


async def test_after_a_change_of_profile_only_the_new_channels_are_asked_for(make):
    collector, link = make(), Link()
    feed(collector, notify({"switch:0": {"apower": 1.0}, "switch:1": {"apower": 1.0}}), NOON, link)  # fmt: skip
    cover = minute_frame()["params"]["switch:0"]
    feed(collector, notify({"cover:0": cover}, method="NotifyFullStatus"), NOON + 60, link)  # fmt: skip
    asked = [
        second for second in range(60) if look(collector, link, NOON + 60 + second)
    ]
    assert asked == []


async def test_the_index_of_devices_forgets_with_the_channels(make, replace):
    replace(MAX_CHANNELS=30)
    collector = make()
    for n in range(300):
        feed(collector, minute_frame(f"invented-{n}", n % 3), NOON + n / 100)
    assert sum(len(known) for known in collector.devices.values()) == 30
