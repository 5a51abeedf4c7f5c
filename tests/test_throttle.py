"""Which readings become rows, by a clock that the tests set."""

import random
import time

import pytest

from complaints import Complaints
from shelly_collector import MAX_DEVICES
from support import (
    COUNTER,
    DEVICE,
    EM,
    EMDATA,
    METER,
    NOON,
    PHASES,
    POWER,
    Link,
    Row,
    assert_nothing_waits,
    expire,
    feed,
    known_channels,
    look,
    minute_frame,
    notify,
    of_both_kinds,
    taken,
    values_taken,
)

DELTA = {"switch:0": {"apower": 433.8, "current": 2.631}}


def times(collector):
    return [row.time - NOON for row in taken(collector)]


async def test_many_readings_in_a_minute_make_one_row_of_the_first(make):
    collector = make()
    for second in range(60):
        feed(collector, minute_frame(apower=100.0 + second), NOON + second)
    assert [(row.time, row.apower_w) for row in taken(collector)] == [(NOON, 100.0)]


@pytest.mark.parametrize("offset", [0.02, 0.0, -0.02, 30, 59.5])
@pytest.mark.parametrize("interval_s", [1, 7, 60, 3600])
async def test_a_steady_device_has_a_row_for_every_single_interval(
    make, offset, interval_s
):
    # A real device's minute frames come around the full minute; by the server's clock
    # some come before it.
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
    # The frame of 12:01 is lost. From then on each one comes 10 ms before the full
    # minute.
    for when in (0.02, 119.99, 179.99, 239.99):
        feed(collector, minute_frame(), NOON + when)
    assert times(collector) == [0, 120, 180, 240]


@pytest.mark.parametrize(
    ("interval_s", "early_s"), [(3600, 0.25), (60, 0.25), (6, 0.025)]
)
async def test_no_more_than_a_quarter_of_a_second_counts_as_early(
    make, interval_s, early_s
):
    begin = NOON // interval_s * interval_s
    for when, start in (
        (-early_s * 1.01, begin - interval_s),
        (-early_s * 0.99, begin),
        (0, begin),
    ):
        collector = make(THROTTLE_INTERVAL_SECONDS=str(interval_s))
        feed(collector, minute_frame(), begin + when)
        assert [row.time for row in taken(collector)] == [start]
    collector = make(THROTTLE_INTERVAL_SECONDS="3600")
    feed(collector, minute_frame(apower=1.0), begin // 3600 * 3600 + 3590)
    feed(collector, minute_frame(apower=2.0), begin // 3600 * 3600 + 3600)
    assert [row.apower_w for row in taken(collector)] == [1.0, 2.0]


async def test_each_channel_of_each_device_is_throttled_by_itself(make):
    collector = make()
    for device in ("one", "two"):
        for channel in range(4):
            feed(collector, minute_frame(device, channel), NOON)
            feed(collector, minute_frame(device, channel), NOON + 1)
    assert len(taken(collector)) == 8


@pytest.mark.parametrize("step_s", [-3600, 3600, -90, 90])
async def test_a_clock_that_steps_never_silences_a_channel(make, step_s):
    collector = make()
    for minute in range(5):
        feed(collector, minute_frame(), NOON + 60 * minute)
    assert times(collector) == [0, 60, 120, 180, 240]
    after = [NOON + 300 + step_s + 60 * minute for minute in range(5)]
    for now in after:
        feed(collector, minute_frame(), now)
    assert [row.time for row in taken(collector)] == [now // 60 * 60 for now in after]


@pytest.mark.parametrize("step_s", [-1, -19, -61])
async def test_a_small_step_back_repeats_no_minute_and_loses_none(make, step_s):
    collector = make()
    for minute in range(5):
        feed(collector, minute_frame(), NOON + 60 * minute)
    for minute in range(5, 9):
        feed(collector, minute_frame(), NOON + 60 * minute + step_s)
    last = 480 if step_s > -60 else 420
    assert times(collector) == list(range(0, last, 60))


async def test_channels_that_are_not_wanted_make_no_rows(make):
    collector = make(CHANNELS="0, 2")
    for channel in range(4):
        feed(collector, minute_frame(channel=channel), NOON)
    feed(
        collector,
        notify(
            {
                "pm1:2": {
                    "apower": 1.0,
                    "voltage": 230,
                    "current": 0,
                    "aenergy": {"total": 1},
                }
            }
        ),
        NOON,
    )
    assert [row.channel for row in taken(collector)] == [
        "switch:0",
        "switch:2",
        "pm1:2",
    ]


async def test_min_power_keeps_runs_and_the_one_row_after_each(make):
    collector = make(MIN_POWER_W="10")
    powers = [0, 9.9, 10, 500, -400, 10, 0, 0, 12, 0, 0]
    for minute, power in enumerate(powers):
        feed(collector, minute_frame(apower=power), NOON + 60 * minute)
    assert [row.apower_w for row in taken(collector)] == [500, -400, 10, 12, 0]


async def test_a_run_that_ends_within_its_minute_still_gets_its_off_row(make):
    collector = make(MIN_POWER_W="10")
    feed(collector, minute_frame(apower=500), NOON)
    feed(
        collector,
        notify({"switch:0": {"apower": 0, "current": 0, "output": False}}),
        NOON + 20,
    )
    feed(collector, minute_frame(apower=0), NOON + 60)
    feed(collector, minute_frame(apower=0), NOON + 120)
    assert [(row.time - NOON, row.apower_w) for row in taken(collector)] == [
        (0, 500),
        (60, 0),
    ]


async def test_a_row_waits_for_its_four_values(make):
    collector = make()
    feed(collector, notify(DELTA), NOON + 30)
    assert not taken(collector)
    feed(collector, minute_frame(apower=500.0, current=3.0, voltage=231.0), NOON + 60)
    # The first row keeps the values it had, and takes only the missing ones from the
    # next frame.
    assert [tuple(row)[0:1] + tuple(row)[3:7] for row in taken(collector)] == [
        (NOON, 433.8, 231.0, 2.631, 1234.567),
        (NOON + 60, 500.0, 231.0, 3.0, 1234.567),
    ]
    expire(collector)
    assert not taken(collector)


async def test_what_never_comes_is_stored_as_zero_after_an_interval_with_one_warning(
    make, caplog
):
    collector = make()
    began = time.monotonic()
    feed(collector, notify(DELTA), NOON)
    expire(collector, began + 59.9)
    assert not taken(collector)
    expire(collector, time.monotonic() + 60)
    feed(collector, notify(DELTA), NOON + 60)
    expire(collector, time.monotonic() + 60)
    assert [tuple(row) for row in taken(collector)] == [
        (NOON, DEVICE, "switch:0", 433.8, 0.0, 2.631, 0.0, None),
        (NOON + 60, DEVICE, "switch:0", 433.8, 0.0, 2.631, 0.0, None),
    ]
    (warning,) = caplog.messages
    assert (
        DEVICE in warning
        and "switch:0" in warning
        and "voltage_v" in warning
        and "energy_total_wh" in warning
    )


async def test_without_a_power_there_is_no_row_to_wait(make):
    collector = make()
    feed(
        collector,
        notify({"switch:0": {"voltage": 230.0, "aenergy": {"total": 1.0}}}),
        NOON,
    )
    expire(collector)
    assert not taken(collector)


async def test_known_status_outlives_a_reconnect(make):
    collector = make()
    feed(collector, minute_frame(), NOON, Link())
    feed(collector, notify({"switch:0": {"apower": 20.0}}), NOON + 3600, Link())
    assert [row.voltage_v for row in taken(collector)] == [228.2, 228.2]


async def test_a_status_is_wanted_when_the_voltage_is_old(make):
    collector, link = make(), Link()
    old = {"switch:0": {"aenergy": {"total": 7.0}}}
    feed(collector, minute_frame(), NOON, link)
    asked = []
    for minute in range(1, 8):
        assert not feed(collector, notify(old), NOON + 60 * minute, link)
        asked.append(look(collector, link, NOON + 60 * minute + 58))
    assert asked == [False] * 4 + [True] * 3
    feed(collector, notify({"switch:0": {"voltage": 229.0}}), NOON + 8 * 60, link)
    assert not look(collector, link, NOON + 8 * 60 + 58)


async def test_a_status_is_wanted_when_the_clock_went_back_behind_the_voltage(make):
    collector, link = make(), Link()
    old = {"switch:0": {"aenergy": {"total": 7.0}}}
    feed(collector, minute_frame(), NOON, link)
    feed(collector, notify(old), NOON - 3600, link)
    assert look(collector, link, NOON - 3600 + 58)


async def test_a_status_is_wanted_when_one_of_several_channels_lacks_a_value(make):
    whole = {"apower": 1.0, "voltage": 230.0, "current": 0.1, "aenergy": {"total": 1.0}}
    for first, second in ((DELTA["switch:0"], whole), (whole, DELTA["switch:0"])):
        assert feed(make(), notify({"switch:0": first, "switch:1": second}), NOON)
    assert not feed(make(), notify({"switch:0": whole, "switch:1": whole}), NOON)


async def test_known_channels_are_bounded_and_the_newest_stay(make, replace):
    replace(MAX_CHANNELS=100)
    collector = make()
    for n in range(1000):
        feed(collector, minute_frame(f"invented-{n}"), NOON + n / 100)
        assert len(known_channels(collector)) <= 100
    assert ("invented-999", "switch:0") in known_channels(collector)
    feed(collector, minute_frame("invented-999"), NOON + 30)
    assert len(taken(collector)) == 1000


async def test_an_unknown_power_is_asked_for(make):
    # Old firmware whose first status was lost: its minute frames hold only the counter.
    collector = make()
    assert feed(collector, notify({"switch:0": {"aenergy": {"total": 7.0}}}), NOON)
    assert not taken(collector)
    assert feed(
        collector, notify({"switch:0": {"voltage": 230.0, "current": 1.0}}), NOON + 1
    )
    assert not feed(collector, minute_frame(), NOON + 2) and len(taken(collector)) == 1


async def test_the_channel_that_is_forgotten_is_the_one_whose_row_is_oldest(
    make, replace
):
    replace(MAX_CHANNELS=3)
    collector = make()
    for n, name in enumerate(("steady", "b", "c", "steady", "d")):
        feed(collector, minute_frame(name), NOON + 60 * n)
    assert {device_id for device_id, _ in known_channels(collector)} == {
        "steady",
        "c",
        "d",
    }


async def test_one_connection_speaks_for_a_thousand_devices_at_most(make):
    collector, link = make(), Link()
    for n in range(MAX_DEVICES):
        feed(collector, minute_frame(f"d{n}"), NOON, link)
    with pytest.raises(ValueError, match="at most 1000 devices"):
        feed(collector, minute_frame("one-too-many"), NOON, link)
    feed(collector, minute_frame("d0"), NOON + 60, link)
    feed(collector, minute_frame("d999"), NOON + 60, link)
    assert len(taken(collector)) == MAX_DEVICES + 2
    assert len(known_channels(collector)) == MAX_DEVICES


async def test_a_row_waits_its_whole_interval_though_the_next_one_begins(make):
    collector = make()
    feed(collector, notify(DELTA), NOON + 59)
    feed(collector, notify(DELTA), NOON + 60)
    feed(
        collector,
        notify({"switch:0": {"voltage": 229.0, "aenergy": {"total": 3.0}}}),
        NOON + 65,
    )
    assert [
        (row.time - NOON, row.voltage_v, row.energy_total_wh)
        for row in taken(collector)
    ] == [
        (0, 229, 3),
        (60, 229, 3),
    ]
    assert_nothing_waits(collector)


async def test_warnings_of_values_that_never_come_are_limited_and_none_is_forgotten(
    make, caplog, monkeypatch, replace
):
    replace(MAX_COMPLAINTS=10)
    collector, clock = make(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for minute in range(3):
        for n in range(25):
            feed(collector, notify(DELTA, f"d{n}"), NOON + 60 * minute)
        clock += 61
        expire(collector, clock)
        assert len(caplog.messages) == min(25, 10 * (minute + 1))
    assert len(taken(collector)) == 75


async def test_the_queue_in_memory_is_bounded_and_each_time_it_overflows_the_log_says_so(
    make, replace, caplog
):
    replace(MAX_ROWS_IN_MEMORY=10)
    collector = make()
    # A row that the database refused earlier must not hide the next losses.
    collector.outbox.dropped = 1
    for lines in (1, 2):
        for n in range(25):
            feed(collector, minute_frame(), NOON + 60 * n)
            collector.outbox.save()
        assert len(caplog.messages) == lines
        assert times(collector) == [60 * n for n in range(15, 25)]
        collector.outbox.save()
    assert collector.outbox.dropped == 31


def test_warnings_of_past_minutes_are_forgotten(monkeypatch):
    complaints, clock = Complaints(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for n in range(5):
        assert complaints.log(f"d{n}", "x")
        clock += 61
    assert len(complaints.about) == 1


async def test_a_channel_with_nothing_but_null_is_not_remembered(make):
    collector = make()
    assert not feed(
        collector,
        notify({"switch:0": {"apower": None, "errors": ["power_meter_failure"]}}),
        NOON,
    )
    assert not known_channels(collector)


@of_both_kinds
async def test_a_row_waits_for_the_counter_that_comes_in_another_frame(make, meter):
    collector = make()
    # A full status would bring the counter.
    assert feed(collector, meter.says(**POWER), NOON + 57)
    assert not taken(collector)
    assert not feed(collector, meter.says(**COUNTER), NOON + 60.2)
    assert values_taken(collector) == [
        (0, 100.0, 230.0, 0.5, 1000.0, 50.0),
        (60, 100.0, 230.0, 0.5, 1000.0, 50.0),
    ]
    expire(collector)
    assert not taken(collector)


@of_both_kinds
async def test_a_counter_that_was_heard_before_makes_its_row_with_the_first_power(
    make, meter
):
    collector = make()
    feed(collector, meter.says(**COUNTER), NOON + 0.2)
    expire(collector)
    # Without a power there is no row that could wait.
    assert not taken(collector)
    feed(collector, meter.says(**POWER), NOON + 3)
    assert values_taken(collector) == [(0, 100.0, 230.0, 0.5, 1000.0, 50.0)]


@of_both_kinds
async def test_the_first_row_after_hours_of_silence_has_the_counter_of_its_own_status(
    make, meter
):
    collector = make()
    feed(collector, meter.says(**POWER, **COUNTER), NOON)
    # With noon's counter, the energy of six hours would seem to be drawn in the minute
    # before the next row.
    whole = POWER | {"total_act_energy": 9000.0, "total_act_ret_energy": 70.0}
    feed(collector, meter.says("NotifyFullStatus", **whole), NOON + 6 * 3600)
    assert values_taken(collector)[1:] == [(6 * 3600, 100.0, 230.0, 0.5, 9000.0, 70.0)]


@of_both_kinds
async def test_a_meter_that_reports_an_error_makes_no_row_until_it_has_a_power_again(
    make, meter
):
    collector = make()
    feed(collector, meter.says(**POWER, **COUNTER), NOON)
    feed(
        collector,
        meter.says(
            act_power=None, voltage=None, current=None, errors=["power_meter_failure"]
        ),
        NOON + 60,
    )
    feed(collector, meter.says(total_act_energy=1001.0), NOON + 120)
    expire(collector)
    assert len(taken(collector)) == 1
    feed(collector, meter.says(**POWER), NOON + 180)
    assert values_taken(collector) == [(180, 100.0, 230.0, 0.5, 1001.0, 50.0)]


async def test_a_phase_that_reports_an_error_leaves_the_others_alone(make):
    collector = make()
    broken = {
        "a_act_power": None,
        "a_voltage": None,
        "a_current": None,
        "a_errors": ["power_meter_failure"],
    }
    feed(collector, notify({"em:0": EM | broken, "emdata:0": EMDATA}, METER), NOON)
    expire(collector)
    assert taken(collector) == [Row(NOON, METER, *values) for values in PHASES[1:]]


async def test_the_zero_volts_of_a_phase_without_a_wire_are_a_value_and_nothing_to_ask_for(
    make, caplog
):
    collector = make()
    feed(collector, notify({"em:0": EM, "emdata:0": EMDATA}, METER), NOON)
    taken(collector)
    assert not feed(collector, notify({"em:0": EM}, METER), NOON + 60)
    assert [row[2:] for row in taken(collector)] == PHASES and not caplog.messages


@of_both_kinds
async def test_a_counter_that_never_comes_is_stored_as_zero_after_an_interval_with_one_warning(
    make, caplog, meter
):
    collector = make()
    began = time.monotonic()
    for minute in range(2):
        feed(collector, meter.says(**POWER), NOON + 60 * minute)
    expire(collector, began + 59.9)
    assert not taken(collector)
    expire(collector, time.monotonic() + 60)
    assert values_taken(collector) == [
        (60 * minute, 100.0, 230.0, 0.5, 0.0, None) for minute in range(2)
    ]
    (warning,) = caplog.messages
    assert (
        METER in warning
        and f"{meter.channel} " in warning
        and "energy_total_wh" in warning
    )
    # No row waits for that one.
    assert "energy_returned_wh" not in warning


async def test_min_power_keeps_the_runs_of_each_phase_and_the_one_row_after(make):
    collector = make(MIN_POWER_W="10")
    for minute, (a, b) in enumerate([(0, -500), (500, -500), (0, 0), (0, 0)]):
        powers = {"a_act_power": a, "b_act_power": b, "c_act_power": 5}
        feed(
            collector,
            notify({"em:0": EM | powers, "emdata:0": EMDATA}, METER),
            NOON + 60 * minute,
        )
    found = [(row.channel, row.time - NOON, row.apower_w) for row in taken(collector)]
    assert sorted(found) == [
        ("em:0:a", 60, 500),
        ("em:0:a", 120, 0),
        ("em:0:b", 0, -500),
        ("em:0:b", 60, -500),
        ("em:0:b", 120, 0),
    ]


async def test_a_meter_that_tells_its_power_every_few_seconds_has_one_row_a_minute_and_is_asked_for_nothing(
    make,
):
    collector, rnd, frames = make(), random.Random(1), []
    for minute in range(60):
        begin = NOON + 60 * minute
        counted = {
            "emdata:0": EMDATA
            | {f"{p}_total_act_energy": 1000.0 + minute for p in "abc"}
        }
        frames.append((begin + rnd.uniform(0, 0.3), counted))
        for n in range(15):
            frames.append(
                (
                    begin + 4 * n + rnd.uniform(0, 3),
                    {"em:0": EM | {"a_act_power": 60.0 * minute + n}},
                )
            )
    frames.sort(key=lambda one: one[0])
    asked = [
        feed(collector, notify(components, METER), when) for when, components in frames
    ]
    assert not any(asked[16:])
    found = taken(collector)
    assert len(found) == 180 and len({row[:3] for row in found}) == 180
    assert {row.time for row in found} == {NOON + 60 * minute for minute in range(60)}
    # Each row is the first reading of its minute, which may be a power or a counter.
    for row in found:
        minute = (row.time - NOON) // 60
        assert row.energy_total_wh - 1000 in {minute, max(minute - 1, 0)}
        if row.channel == "em:0:a":
            assert row.apower_w in {
                60 * minute,
                60 * (minute - 1) + 14,
                60 * (minute - 1) + 13,
            }


@of_both_kinds
async def test_a_meter_whose_voltage_or_counter_is_old_is_asked_for_its_status(
    make, meter
):
    for told in ({"total_act_energy": 1.0}, {"voltage": 229.0}):
        collector, link = make(), Link()
        feed(collector, meter.says(**POWER, **COUNTER), NOON, link)
        asked = []
        for minute in range(1, 8):
            now = NOON + 60 * minute
            feed(collector, meter.says(act_power=1.0, **told), now, link)
            asked.append(look(collector, link, now + 58))
        assert asked == [False] * 4 + [True] * 3


@of_both_kinds
async def test_frames_held_back_land_in_their_minute_and_change_nothing_of_what_is_known_since(
    make, meter
):
    collector, now = make(), NOON
    feed(collector, meter.says(**POWER, **COUNTER), now)
    late = {"act_power": -2000.0, "voltage": 229.0, "current": 9.0}
    feed(collector, meter.says(**late) | {"received": now - 3600}, now + 1)
    # The late frame makes no row yet: it lacks the counter of its time.
    assert values_taken(collector) == [(0, 100.0, 230.0, 0.5, 1000.0, 50.0)]
    counted = meter.says(total_act_energy=500.0, total_act_ret_energy=5.0)
    feed(collector, counted | {"received": now - 3570}, now + 1)
    feed(collector, counted | {"received": now - 3540}, now + 1)
    feed(collector, meter.says(act_power=3.0), now + 60)
    assert values_taken(collector) == [
        (-3600, -2000.0, 229.0, 9.0, 500.0, 5.0),
        (-3540, -2000.0, 229.0, 9.0, 500.0, 5.0),
        (60, 3.0, 230.0, 0.5, 1000.0, 50.0),
    ]
    assert_nothing_waits(collector)


async def test_known_phases_are_bounded_and_the_newest_stay(make, replace):
    replace(MAX_CHANNELS=30)
    collector = make()
    for n in range(100):
        feed(
            collector,
            notify({"em:0": EM, "emdata:0": EMDATA}, f"invented-{n}"),
            NOON + n / 100,
        )
        assert len(known_channels(collector)) <= 30
    feed(collector, notify({"em:0": {"b_act_power": 1.0}}, "invented-99"), NOON + 60)
    assert taken(collector)[-1][1:] == (
        "invented-99",
        "em:0:b",
        1.0,
        230.0,
        1.435,
        195765.72,
        131881.85,
    )
