"""Which readings become rows, by a clock that the tests turn."""

import random
import time

import pytest
from shelly_collector import MOST_DEVICES, complain
from support import DEVICE, Link, expire, feed, minute_frame, notify, taken

NOON = 1_795_435_200.0  # a full minute
DELTA = {"switch:0": {"apower": 433.8, "current": 2.631}}


def times(collector):
    return [row.time - NOON for row in taken(collector)]


async def test_many_readings_in_a_minute_are_one_row_of_the_first(make):
    collector = make()
    for second in range(60):
        feed(collector, minute_frame(apower=100.0 + second), NOON + second)
    assert [(row.time, row.apower_w) for row in taken(collector)] == [(NOON, 100.0)]


@pytest.mark.parametrize("offset", [0.02, 0.0, -0.02, 30, 59.5])
@pytest.mark.parametrize("interval_s", [1, 7, 60, 3600])
async def test_a_steady_device_has_a_row_for_every_single_interval(make, offset, interval_s):
    # The minute frames of a real device sway around the full minute; some come before it by the server's clock.
    collector, rnd = make(THROTTLE_INTERVAL_SECONDS=str(interval_s)), random.Random(1)
    begin, scale = NOON // interval_s * interval_s, min(1, interval_s / 60)
    feed(collector, minute_frame(), begin - interval_s / 2)
    taken(collector)
    for n in range(600):
        sway = rnd.uniform(-0.05, 0.05) * scale
        feed(collector, minute_frame(), begin + n * interval_s + offset * scale + sway)
    got = [row.time for row in taken(collector)]
    first = got[0]
    assert got == [first + n * interval_s for n in range(len(got))] and len(got) >= 598


async def test_a_missed_minute_stays_the_only_one_missed(make):
    collector = make()
    # The frame of 12:01 is lost, and from then on each comes 10 ms before the full minute.
    for when in (0.02, 119.99, 179.99, 239.99):
        feed(collector, minute_frame(), NOON + when)
    assert times(collector) == [0, 120, 180, 240]


@pytest.mark.parametrize(("interval_s", "early_s"), [(3600, 0.25), (60, 0.25), (6, 0.025)])
async def test_no_more_than_a_quarter_of_a_second_counts_as_early(make, interval_s, early_s):
    begin = NOON // interval_s * interval_s
    for when, start in ((-early_s * 1.01, begin - interval_s), (-early_s * 0.99, begin), (0, begin)):
        collector = make(THROTTLE_INTERVAL_SECONDS=str(interval_s))
        feed(collector, minute_frame(), begin + when)
        assert [row.time for row in taken(collector)] == [start]
    collector = make(THROTTLE_INTERVAL_SECONDS="3600")
    feed(collector, minute_frame(apower=1.0), begin // 3600 * 3600 + 3590)
    feed(collector, minute_frame(apower=2.0), begin // 3600 * 3600 + 3600)
    assert [row.apower_w for row in taken(collector)] == [1.0, 2.0]


async def test_channels_and_devices_are_throttled_each_for_itself(make):
    collector = make()
    for device in ("one", "two"):
        for channel in range(4):
            feed(collector, minute_frame(device, channel), NOON)
            feed(collector, minute_frame(device, channel), NOON + 1)
    assert len(taken(collector)) == 8


@pytest.mark.parametrize("step_s", [-3600, 3600, -61, 90])
async def test_a_clock_that_steps_never_silences_a_channel(make, step_s):
    collector = make()
    for minute in range(5):
        feed(collector, minute_frame(), NOON + 60 * minute)
    assert times(collector) == [0, 60, 120, 180, 240]
    after = [NOON + 300 + step_s + 60 * minute for minute in range(5)]
    for now in after:
        feed(collector, minute_frame(), now)
    assert [row.time for row in taken(collector)] == [now // 60 * 60 for now in after]


async def test_other_channels_than_those_wanted_are_not_kept(make):
    collector = make(CHANNELS="0, 2")
    for channel in range(4):
        feed(collector, minute_frame(channel=channel), NOON)
    feed(collector, notify({"pm1:2": {"apower": 1.0, "voltage": 230, "current": 0, "aenergy": {"total": 1}}}), NOON)
    assert [row.channel for row in taken(collector)] == ["switch:0", "switch:2", "pm1:2"]


async def test_min_power_keeps_runs_and_the_one_row_after_each(make):
    collector = make(MIN_POWER_W="10")
    powers = [0, 9.9, 10, 500, -400, 10, 0, 0, 12, 0, 0]
    for minute, power in enumerate(powers):
        feed(collector, minute_frame(apower=power), NOON + 60 * minute)
    assert [row.apower_w for row in taken(collector)] == [500, -400, 10, 12, 0]


async def test_a_run_that_ends_within_its_minute_still_gets_its_off_row(make):
    collector = make(MIN_POWER_W="10")
    feed(collector, minute_frame(apower=500), NOON)
    feed(collector, notify({"switch:0": {"apower": 0, "current": 0, "output": False}}), NOON + 20)
    feed(collector, minute_frame(apower=0), NOON + 60)
    feed(collector, minute_frame(apower=0), NOON + 120)
    assert [(row.time - NOON, row.apower_w) for row in taken(collector)] == [(0, 500), (60, 0)]


async def test_a_row_waits_for_its_four_values(make):
    collector = make()
    feed(collector, notify(DELTA), NOON + 30)
    assert not taken(collector)
    feed(collector, minute_frame(apower=500.0, current=3.0, voltage=231.0), NOON + 60)
    # The first row keeps what it had; only what it lacked comes from the frame that brought it.
    assert [tuple(row)[0:1] + tuple(row)[3:7] for row in taken(collector)] == [
        (NOON, 433.8, 231.0, 2.631, 1234.567),
        (NOON + 60, 500.0, 231.0, 3.0, 1234.567),
    ]
    expire(collector)
    assert not taken(collector)


async def test_what_never_comes_is_stored_as_zero_after_an_interval_with_one_warning(make, caplog, monkeypatch):
    collector = make()
    clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    feed(collector, notify(DELTA), NOON)
    expire(collector, clock + 59.9)
    assert not taken(collector)
    expire(collector, clock + 60)
    feed(collector, notify(DELTA), NOON + 60)
    expire(collector, clock + 60)
    assert [tuple(row) for row in taken(collector)] == [
        (NOON, DEVICE, "switch:0", 433.8, 0.0, 2.631, 0.0, None),
        (NOON + 60, DEVICE, "switch:0", 433.8, 0.0, 2.631, 0.0, None),
    ]
    (warning,) = caplog.messages
    assert DEVICE in warning and "switch:0" in warning and "voltage_v" in warning and "energy_total_wh" in warning


async def test_without_a_power_there_is_no_row_to_wait(make):
    collector = make()
    feed(collector, notify({"switch:0": {"voltage": 230.0, "aenergy": {"total": 1.0}}}), NOON)
    expire(collector)
    assert not taken(collector)


async def test_known_status_outlives_a_reconnect(make):
    collector = make()
    feed(collector, minute_frame(), NOON, Link())
    feed(collector, notify({"switch:0": {"apower": 20.0}}), NOON + 3600, Link())
    assert [row.voltage_v for row in taken(collector)] == [228.2, 228.2]


async def test_a_status_is_wanted_when_the_voltage_is_old(make):
    collector = make()
    old = {"switch:0": {"aenergy": {"total": 7.0}}}
    assert not feed(collector, minute_frame(), NOON)
    assert [feed(collector, notify(old), NOON + 60 * n) for n in range(1, 8)] == [False] * 5 + [True] * 2
    assert not feed(collector, notify(old), NOON + 7 * 60 + 1)  # no row is due
    feed(collector, notify({"switch:0": {"voltage": 229.0}}), NOON + 7 * 60 + 2)
    assert not feed(collector, notify(old), NOON + 8 * 60)


async def test_a_status_is_wanted_when_the_clock_went_back_behind_the_voltage(make):
    collector = make()
    feed(collector, minute_frame(), NOON)
    assert feed(collector, notify({"switch:0": {"aenergy": {"total": 7.0}}}), NOON - 3600)


async def test_a_status_is_wanted_when_one_of_several_channels_lacks_a_value(make):
    whole = {"apower": 1.0, "voltage": 230.0, "current": 0.1, "aenergy": {"total": 1.0}}
    for first, second in ((DELTA["switch:0"], whole), (whole, DELTA["switch:0"])):
        assert feed(make(), notify({"switch:0": first, "switch:1": second}), NOON)
    assert not feed(make(), notify({"switch:0": whole, "switch:1": whole}), NOON)


async def test_what_is_known_of_many_channels_is_bounded_and_the_newest_stay(make, replace):
    replace(MOST_CHANNELS=100)
    collector = make()
    for n in range(1000):
        feed(collector, minute_frame(f"invented-{n}"), NOON + n / 100)
        assert len(collector.channels) <= 100
    assert "invented-999switch:0" in collector.channels
    feed(collector, minute_frame("invented-999"), NOON + 30)
    assert len(taken(collector)) == 1000


async def test_an_unknown_power_is_asked_for(make):
    # Old firmware whose first status was lost: its minute frames hold the counter alone.
    collector = make()
    assert feed(collector, notify({"switch:0": {"aenergy": {"total": 7.0}}}), NOON)
    assert not taken(collector)
    assert feed(collector, notify({"switch:0": {"voltage": 230.0, "current": 1.0}}), NOON + 1)
    assert not feed(collector, minute_frame(), NOON + 2) and len(taken(collector)) == 1


async def test_the_channel_that_is_forgotten_is_the_one_whose_row_is_oldest(make, replace):
    replace(MOST_CHANNELS=3)
    collector = make()
    for n, name in enumerate(("steady", "b", "c", "steady", "d")):
        feed(collector, minute_frame(name), NOON + 60 * n)
    assert {channel.device_id for channel in collector.channels.values()} == {"steady", "c", "d"}


async def test_one_connection_speaks_for_a_thousand_devices_at_most(make):
    collector, link = make(), Link()
    for n in range(MOST_DEVICES):
        feed(collector, minute_frame(f"d{n}"), NOON, link)
    with pytest.raises(ValueError, match="at most 1000 devices"):
        feed(collector, minute_frame("one-too-many"), NOON, link)
    feed(collector, minute_frame("d0"), NOON + 60, link)
    feed(collector, minute_frame("d999"), NOON + 60, link)
    assert len(taken(collector)) == MOST_DEVICES + 2 and len(collector.channels) == MOST_DEVICES


async def test_a_row_waits_its_whole_interval_though_the_next_one_begins(make):
    collector = make()
    feed(collector, notify(DELTA), NOON + 59)
    feed(collector, notify(DELTA), NOON + 60)
    feed(collector, notify({"switch:0": {"voltage": 229.0, "aenergy": {"total": 3.0}}}), NOON + 65)
    assert [(row.time - NOON, row.voltage_v, row.energy_total_wh) for row in taken(collector)] == [
        (0, 229, 3),
        (60, 229, 3),
    ]
    assert not any(channel.waiting for channel in collector.channels.values())


async def test_warnings_of_values_that_never_come_are_limited_and_none_is_forgotten(make, caplog, monkeypatch, replace):
    replace(MOST_COMPLAINTS=10)
    collector, clock = make(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for minute in range(3):
        for n in range(25):
            feed(collector, notify(DELTA, f"d{n}"), NOON + 60 * minute)
        clock += 61
        expire(collector, clock)
        assert len(caplog.messages) == min(25, 10 * (minute + 1))
    assert len(taken(collector)) == 75


async def test_the_queue_in_memory_is_bounded_and_each_time_it_overflows_the_log_says_so(make, replace, caplog):
    replace(MOST_IN_MEMORY=10)
    collector = make()
    collector.outbox.dropped = 1  # a row that the database refused: it must not hide what comes now
    for lines in (1, 2):
        for n in range(25):
            feed(collector, minute_frame(), NOON + 60 * n)
            collector.outbox.save()
        assert len(caplog.messages) == lines
        assert times(collector) == [60 * n for n in range(15, 25)]
        collector.outbox.save()
    assert collector.outbox.dropped == 31


async def test_complaints_of_minutes_past_are_forgotten(make, monkeypatch):
    collector, clock = make(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for n in range(5):
        assert complain(collector, f"d{n}", "x")
        clock += 61
    assert sum(map(len, collector.complaints.values())) == 1


async def test_a_meter_that_says_null_only_is_not_known(make):
    collector = make()
    assert not feed(collector, notify({"switch:0": {"apower": None, "errors": ["power_meter_failure"]}}), NOON)
    assert not collector.channels
