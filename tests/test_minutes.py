"""Which minute a frame counts for, and when a device is asked: simulated devices with
their quirks live for a day, by a clock that the tests set."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

import simulated_device as sim
from shelly_collector import (
    GET_STATUS,
)
from support import (
    DEVICE,
    NOON,
    Link,
    exchange,
    feed,
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
            self.send(answer, now + 0.1)

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

    def connect(self) -> None:
        """Connect half a minute before NOON, and tell the whole status."""
        self.now = NOON - 31
        self.link.asked[GET_STATUS] = self.now
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
