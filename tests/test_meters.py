"""Clamps and three-phase meters, whose power and counter come in two components, and the energy that is given back."""

import asyncio
import contextlib
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from typing import NamedTuple

import psycopg
import pytest
import simulated_device as sim
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from shelly_collector import GET_CONFIG, SCHEMA_VERSION, Outbox
from support import (
    ORIGINAL_TABLE,
    ROOT,
    Row,
    device,
    drain,
    execute,
    expire,
    feed,
    fill,
    listening,
    minute_frame,
    notify,
    read_rows,
    taken,
    wait_for,
)

NOON = 1_795_435_200.0  # a full minute
METER = "shellypro3em-a1b2c3d4e5f6"
VALUES = "device_id, channel, apower_w, voltage_v, current_a, energy_total_wh, energy_returned_wh"

# As a Pro 3EM tells them: phase b gives back, phase c has no wire.
EM = {"id": 0, "a_act_power": 2166.2, "a_aprt_power": 2175.9, "a_current": 9.592, "a_freq": 49.9, "a_pf": 0.99, "a_voltage": 227.0,
      "b_act_power": -318.4, "b_aprt_power": 330.1, "b_current": 1.435, "b_freq": 49.9, "b_pf": 0.96, "b_voltage": 230.0,
      "c_act_power": 0, "c_aprt_power": 0, "c_current": 0.027, "c_freq": 198, "c_pf": 1, "c_voltage": 0,
      "n_current": None, "total_act_power": 1847.8, "total_aprt_power": 2506.0, "total_current": 11.054}  # fmt: skip
EMDATA = {"id": 0, "a_total_act_energy": 3105576.42, "a_total_act_ret_energy": 0.0, "b_total_act_energy": 195765.72,
          "b_total_act_ret_energy": 131881.85, "c_total_act_energy": 0, "c_total_act_ret_energy": 0,
          "total_act": 3301342.14, "total_act_ret": 131881.85}  # fmt: skip
PHASES = [
    ("em:0:a", 2166.2, 227.0, 9.592, 3105576.42, 0.0),
    ("em:0:b", -318.4, 230.0, 1.435, 195765.72, 131881.85),
    ("em:0:c", 0.0, 0.0, 0.027, 0.0, 0.0),
]


class Part(NamedTuple):
    """One channel of a meter, and how its device tells of it."""

    component: str
    twin: str
    prefix: str
    channel: str

    def says(self, method="NotifyStatus", **fields):
        """A frame with the components that the fields belong to; with no method an answer to Shelly.GetStatus."""
        components = {}
        for name, value in fields.items():
            key = self.twin if name.startswith("total_") else self.component
            components.setdefault(key, {"id": 0})[self.prefix + name] = value
        if method:
            return notify(components, METER, method)
        return {"id": 2, "src": METER, "dst": "collector", "result": components}


POWER = {"act_power": 100.0, "voltage": 230.0, "current": 0.5}
COUNTER = {"total_act_energy": 1000.0, "total_act_ret_energy": 50.0}
CLAMP, PHASE = Part("em1:1", "em1data:1", "", "em1:1"), Part("em:0", "emdata:0", "b_", "em:0:b")
of_both_kinds = pytest.mark.parametrize("part", [CLAMP, PHASE], ids=["clamp", "phase"])


def rows(collector):
    """What was queued since the last call: seconds since NOON, and the five values."""
    return [(row.time - NOON, *row[3:]) for row in taken(collector)]


# ---- From frames to rows.


@pytest.mark.parametrize("method", ["NotifyStatus", "NotifyFullStatus"])
async def test_a_three_phase_meter_makes_a_row_for_each_of_its_phases(make, method):
    collector = make()
    feed(collector, notify({"em:0": EM, "emdata:0": EMDATA}, METER, method), NOON + 0.21)
    found = taken(collector)
    assert found == [Row(NOON, METER, *values) for values in PHASES]
    assert all(type(value) is float for row in found for value in row[3:])


async def test_the_answer_to_get_status_makes_them_too(make):
    collector = make()
    result = {"em:0": EM | {"user_calibrated_phase": []}, "emdata:0": EMDATA, "sys": {"unixtime": 1}}
    feed(collector, {"id": 2, "src": METER, "dst": "collector", "result": result}, NOON)
    assert taken(collector) == [Row(NOON, METER, *values) for values in PHASES]


async def test_a_clamp_makes_a_row_under_the_number_in_its_key(make):
    collector = make()
    first = {"id": 0, "current": 0.02, "voltage": 224.6, "act_power": 0.0, "aprt_power": 4.6, "pf": 0.0, "freq": 50.0}
    second = {"id": 0, "current": 22.78, "voltage": 224.6, "act_power": -5080.3, "calibration": "factory"}
    counters = {"em1data:0": {"id": 0, "total_act_energy": 0.0, "total_act_ret_energy": 0.0},
                "em1data:1": {"id": 1, "total_act_energy": 6644.9, "total_act_ret_energy": 2595.26}}  # fmt: skip
    feed(collector, notify({"em1:0": first, "em1:1": second, **counters}, METER, "NotifyFullStatus"), NOON)
    assert taken(collector) == [
        Row(NOON, METER, "em1:0", 0.0, 224.6, 0.02, 0.0, 0.0),
        Row(NOON, METER, "em1:1", -5080.3, 224.6, 22.78, 6644.9, 2595.26),
    ]


@of_both_kinds
async def test_a_row_waits_for_the_counter_that_comes_in_another_frame(make, part):
    collector = make()
    assert feed(collector, part.says(**POWER), NOON + 57)  # a status would bring the counter
    assert not taken(collector)
    assert not feed(collector, part.says(**COUNTER), NOON + 60.2)
    assert rows(collector) == [(0, 100.0, 230.0, 0.5, 1000.0, 50.0), (60, 100.0, 230.0, 0.5, 1000.0, 50.0)]
    expire(collector)
    assert not taken(collector)


@of_both_kinds
async def test_a_counter_that_was_heard_before_makes_its_row_with_the_first_power(make, part):
    collector = make()
    feed(collector, part.says(**COUNTER), NOON + 0.2)
    expire(collector)
    assert not taken(collector)  # without a power there is no row to wait
    feed(collector, part.says(**POWER), NOON + 3)
    assert rows(collector) == [(0, 100.0, 230.0, 0.5, 1000.0, 50.0)]


@of_both_kinds
async def test_a_delta_of_either_half_is_laid_over_what_was_known(make, part):
    collector = make()
    feed(collector, part.says(**POWER, **COUNTER), NOON)
    deltas = [{"act_power": -7}, {"current": 0.25}, {"voltage": 231}, {"total_act_energy": 1001}, {"act_power": -8}]
    deltas[-1]["total_act_ret_energy"] = 51
    for minute, delta in enumerate(deltas, 1):
        feed(collector, part.says(**delta), NOON + 60 * minute)
    assert rows(collector)[1:] == [
        (60, -7.0, 230.0, 0.5, 1000.0, 50.0),
        (120, -7.0, 230.0, 0.25, 1000.0, 50.0),
        (180, -7.0, 231.0, 0.25, 1000.0, 50.0),
        (240, -7.0, 231.0, 0.25, 1001.0, 50.0),
        (300, -8.0, 231.0, 0.25, 1001.0, 51.0),
    ]


async def test_a_delta_of_one_phase_says_nothing_of_the_others(make):
    collector = make()
    feed(collector, notify({"em:0": EM, "emdata:0": EMDATA}, METER), NOON)
    taken(collector)
    feed(collector, notify({"em:0": {"id": 0, "b_act_power": 5.0}}, METER), NOON + 60)
    assert [(row.channel, row.apower_w) for row in taken(collector)] == [("em:0:b", 5.0)]
    feed(collector, notify({"em:0": {"id": 0, "total_act_power": 9.0, "n_current": None}}, METER), NOON + 61)
    feed(collector, notify({"emdata:0": {"id": 0, "total_act": 9.0}}, METER), NOON + 61)
    assert not taken(collector)


@pytest.mark.parametrize("method", ["NotifyFullStatus", None], ids=["whole", "answer"])
@of_both_kinds
async def test_neither_half_of_a_whole_status_wipes_what_the_other_said(make, part, method):
    collector = make()
    feed(collector, part.says(**POWER, **COUNTER), NOON)
    feed(collector, part.says(method, act_power=7.0, voltage=231.0, current=0.1), NOON + 60)
    feed(collector, part.says(method, total_act_energy=1010.0, total_act_ret_energy=51.0), NOON + 120)
    assert rows(collector)[1:] == [(60, 7.0, 231.0, 0.1, 1000.0, 50.0), (120, 7.0, 231.0, 0.1, 1010.0, 51.0)]


@of_both_kinds
async def test_the_first_row_after_hours_of_silence_has_the_counter_of_its_own_status(make, part):
    collector = make()
    feed(collector, part.says(**POWER, **COUNTER), NOON)
    # With the counter of noon, what was drawn meanwhile would look like drawn within the minute to the next row.
    whole = POWER | {"total_act_energy": 9000.0, "total_act_ret_energy": 70.0}
    feed(collector, part.says("NotifyFullStatus", **whole), NOON + 6 * 3600)
    assert rows(collector)[1:] == [(6 * 3600, 100.0, 230.0, 0.5, 9000.0, 70.0)]


@pytest.mark.parametrize("method", ["NotifyFullStatus", None], ids=["whole", "answer"])
@of_both_kinds
async def test_a_whole_status_replaces_each_half_that_it_holds(make, part, method):
    collector = make()
    feed(collector, part.says(**POWER, **COUNTER), NOON)
    taken(collector)
    feed(collector, part.says(method, act_power=7.0, current=0.1, total_act_energy=1010.0), NOON + 60)
    assert not taken(collector)  # the old voltage is gone
    feed(collector, part.says(voltage=231.0), NOON + 61)
    assert rows(collector) == [(60, 7.0, 231.0, 0.1, 1010.0, None)]
    feed(collector, part.says(method, total_act_ret_energy=51.0), NOON + 120)
    assert not taken(collector)  # and here the old counter
    feed(collector, part.says(total_act_energy=1011.0), NOON + 121)
    assert rows(collector) == [(120, 7.0, 231.0, 0.1, 1011.0, 51.0)]


@pytest.mark.parametrize(("field", "place"), [("voltage", 2), ("current", 3), ("total_act_energy", 4)])
@of_both_kinds
async def test_null_takes_a_value_away_and_the_row_waits(make, part, field, place):
    collector = make()
    feed(collector, part.says(**POWER, **COUNTER), NOON)
    taken(collector)
    feed(collector, part.says(**{"act_power": 9.0, field: None}), NOON + 60)
    assert not taken(collector)
    feed(collector, part.says(**{field: 3.0}), NOON + 61)
    expected = [60, 9.0, 230.0, 0.5, 1000.0, 50.0]
    expected[place] = 3.0
    assert rows(collector) == [tuple(expected)]


@of_both_kinds
async def test_a_meter_that_reports_an_error_makes_no_row_until_it_has_a_power_again(make, part):
    collector = make()
    feed(collector, part.says(**POWER, **COUNTER), NOON)
    feed(collector, part.says(act_power=None, voltage=None, current=None, errors=["power_meter_failure"]), NOON + 60)
    feed(collector, part.says(total_act_energy=1001.0), NOON + 120)
    expire(collector)
    assert len(taken(collector)) == 1
    feed(collector, part.says(**POWER), NOON + 180)
    assert rows(collector) == [(180, 100.0, 230.0, 0.5, 1001.0, 50.0)]


async def test_a_phase_that_reports_an_error_leaves_the_others_alone(make):
    collector = make()
    broken = {"a_act_power": None, "a_voltage": None, "a_current": None, "a_errors": ["power_meter_failure"]}
    feed(collector, notify({"em:0": EM | broken, "emdata:0": EMDATA}, METER), NOON)
    expire(collector)
    assert taken(collector) == [Row(NOON, METER, *values) for values in PHASES[1:]]


async def test_the_zero_volts_of_a_phase_without_a_wire_are_a_value_and_nothing_to_ask_for(make, caplog):
    collector = make()
    feed(collector, notify({"em:0": EM, "emdata:0": EMDATA}, METER), NOON)
    taken(collector)
    assert not feed(collector, notify({"em:0": EM}, METER), NOON + 60)
    assert [row[2:] for row in taken(collector)] == PHASES and not caplog.messages


@of_both_kinds
async def test_a_counter_that_never_comes_is_stored_as_zero_after_an_interval_with_one_warning(
    make, caplog, monkeypatch, part
):
    collector, clock = make(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for minute in range(2):
        feed(collector, part.says(**POWER), NOON + 60 * minute)
    expire(collector, clock + 59.9)
    assert not taken(collector)
    expire(collector, clock + 60)
    assert rows(collector) == [(60 * minute, 100.0, 230.0, 0.5, 0.0, None) for minute in range(2)]
    (warning,) = caplog.messages
    assert METER in warning and f"{part.channel} " in warning and "energy_total_wh" in warning
    assert "energy_returned_wh" not in warning  # nobody waits for that


@pytest.mark.parametrize("bad", ["230", True, [], {"total": 1}, 1e200, 1e400, -1e13, 10**400])
@pytest.mark.parametrize("field", [*POWER, *COUNTER])
@of_both_kinds
async def test_a_half_that_cannot_be_read_is_passed_over_and_named_and_all_else_counts(make, caplog, part, field, bad):
    collector = make()
    feed(collector, part.says(**POWER, **COUNTER), NOON)
    taken(collector)
    good, other = (COUNTER, POWER) if field in COUNTER else (POWER, COUNTER)
    frame = part.says(**({name: 77.0 for name in good} | {field: bad}))
    text = json.dumps(frame | {"params": frame["params"] | minute_frame(channel=3)["params"]})
    feed(collector, text.replace("Infinity", "1e400"), NOON + 60)
    assert [row.channel for row in taken(collector)] == ["switch:3"]
    (line,) = caplog.messages
    key = part.twin if field in COUNTER else part.component
    assert f"{METER} {key}: passed over" in line and part.prefix + field in line
    # What it said is as if unsaid; the other half of such a frame counts.
    feed(collector, part.says(**{name: 5.0 for name in other}, **{field: "?"}), NOON + 61)
    known = POWER | COUNTER | dict.fromkeys(other, 5.0)
    assert rows(collector) == [(60, *(known[name] for name in ("act_power", "voltage", "current", *COUNTER)))]


async def test_an_oddity_among_what_nobody_reads_spoils_no_phase(make, caplog):
    collector = make()
    odd = {"n_current": "x", "total_act_power": 1e200, "a_pf": True, "user_calibrated_phase": None, "id": "0"}
    feed(collector, notify({"em:0": EM | odd, "emdata:0": EMDATA | {"total_act": "x"}}, METER), NOON)
    assert [row[2:] for row in taken(collector)] == PHASES and not caplog.messages


@pytest.mark.parametrize("key", ["em:0:a", "em:0:b", "em:", "em:x", "em:00", "em:-1", "em", "em:0 ", "em1:", "em1:01", "em1:0:a",
                                 "em1data", "emdata:0:a", "em2:0", "pm1data:0", "switchdata:0"])  # fmt: skip
async def test_keys_that_no_meter_has_are_passed_over_and_the_others_count(make, key):
    collector = make()
    every = EM | EMDATA | POWER | COUNTER | {"apower": 1.0, "aenergy": {"total": 1.0}}
    absent = {"em1:5": None, "em:5": None}
    feed(collector, notify({key: every, **absent, "em1:1": POWER, "em1data:1": COUNTER}, METER), NOON)
    expire(collector)
    assert [row.channel for row in taken(collector)] == ["em1:1"]


@pytest.mark.parametrize("text", ['"text"', "[]", "7", "true"])
async def test_a_meter_that_is_no_object_is_passed_over_and_named(make, caplog, text):
    collector = make()
    for key in ("em:0", "emdata:0", "em1:0", "em1data:0"):
        frame = json.dumps(notify({key: "?", "em1:1": POWER, "em1data:1": COUNTER}, METER)).replace('"?"', text)
        feed(collector, frame, NOON)
        assert f"{METER} {key}: passed over" in caplog.messages[-1]
    assert [row.channel for row in taken(collector)] == ["em1:1"] and len(caplog.messages) == 4


async def test_the_field_names_of_another_kind_are_not_taken(make):
    collector = make()
    switch = {"apower": 1.0, "voltage": 230.0, "current": 0.1, "aenergy": {"total": 1.0}, "ret_aenergy": {"total": 1.0}}
    feed(collector, notify({"em:0": switch, "em1:0": switch, "emdata:0": switch, "em1data:0": switch}, METER), NOON)
    feed(collector, notify({"em1:1": EM, "em1data:1": EMDATA, "switch:0": POWER | COUNTER, "em:1": POWER}, METER), NOON)
    feed(collector, notify({"em1:2": POWER | COUNTER, "em:2": EM | EMDATA}, METER), NOON)  # a counter in the wrong half
    assert not taken(collector)


async def test_the_relay_of_a_pro_em_50_never_makes_a_row(make):
    collector, meter = make(), sim.ProEM50("shellyproem50-a1b2c3d4e5f6")
    relay = meter.parts[-1]
    for minute in range(3):
        feed(collector, meter.full_status(), NOON + 60 * minute)
        feed(collector, meter.notify(relay.change()[0]), NOON + 60 * minute + 30)
    expire(collector)
    assert {row.channel for row in taken(collector)} == {"em1:0", "em1:1"}


async def test_channels_count_the_number_of_a_meter(make):
    everything = {"em:0": EM, "emdata:0": EMDATA, **minute_frame(channel=1)["params"]}
    everything |= {f"em1:{n}": POWER for n in range(3)} | {f"em1data:{n}": COUNTER for n in range(3)}
    for wanted, kept in (
        ("0", ["em1:0", "em:0:a", "em:0:b", "em:0:c"]),
        ("1", ["em1:1", "switch:1"]),
        ("0,2", ["em1:0", "em1:2", "em:0:a", "em:0:b", "em:0:c"]),
        ("", ["em1:0", "em1:1", "em1:2", "em:0:a", "em:0:b", "em:0:c", "switch:1"]),
    ):
        collector = make(CHANNELS=wanted)
        feed(collector, notify(everything, METER), NOON)
        assert sorted(row.channel for row in taken(collector)) == kept


async def test_min_power_keeps_the_runs_of_each_phase_and_the_one_row_after(make):
    collector = make(MIN_POWER_W="10")
    for minute, (a, b) in enumerate([(0, -500), (500, -500), (0, 0), (0, 0)]):
        powers = {"a_act_power": a, "b_act_power": b, "c_act_power": 5}
        feed(collector, notify({"em:0": EM | powers, "emdata:0": EMDATA}, METER), NOON + 60 * minute)
    found = [(row.channel, row.time - NOON, row.apower_w) for row in taken(collector)]
    assert sorted(found) == [
        ("em:0:a", 60, 500), ("em:0:a", 120, 0), ("em:0:b", 0, -500), ("em:0:b", 60, -500), ("em:0:b", 120, 0)
    ]  # fmt: skip


async def test_a_meter_that_tells_its_power_every_few_seconds_has_one_row_a_minute_and_is_asked_for_nothing(make):
    collector, rnd, frames = make(), random.Random(1), []
    for minute in range(60):
        begin = NOON + 60 * minute
        counted = {"emdata:0": EMDATA | {f"{p}_total_act_energy": 1000.0 + minute for p in "abc"}}
        frames.append((begin + rnd.uniform(0, 0.3), counted))
        for n in range(15):
            frames.append((begin + 4 * n + rnd.uniform(0, 3), {"em:0": EM | {"a_act_power": 60.0 * minute + n}}))
    frames.sort(key=lambda one: one[0])
    asked = [feed(collector, notify(components, METER), when) for when, components in frames]
    assert not any(asked[16:])
    found = taken(collector)
    assert len(found) == 180 and len({row[:3] for row in found}) == 180
    assert {row.time for row in found} == {NOON + 60 * minute for minute in range(60)}
    for row in found:  # of the first reading in the minute, which may be a power or the counter
        minute = (row.time - NOON) // 60
        assert row.energy_total_wh - 1000 in {minute, max(minute - 1, 0)}
        if row.channel == "em:0:a":
            assert row.apower_w in {60 * minute, 60 * (minute - 1) + 14, 60 * (minute - 1) + 13}


@of_both_kinds
async def test_a_meter_whose_voltage_is_old_is_asked_for_its_status(make, part):
    collector = make()
    feed(collector, part.says(**POWER, **COUNTER), NOON)
    asked = [feed(collector, part.says(act_power=1.0, total_act_energy=1.0), NOON + 60 * n) for n in range(1, 8)]
    assert asked == [False] * 5 + [True] * 2


@of_both_kinds
async def test_frames_held_back_land_in_their_minute_and_change_nothing_of_what_is_known_since(make, part):
    collector, now = make(), NOON
    feed(collector, part.says(**POWER, **COUNTER), now)
    late = {"act_power": -2000.0, "voltage": 229.0, "current": 9.0}
    feed(collector, part.says(**late) | {"received": now - 3600}, now + 1)
    assert rows(collector) == [(0, 100.0, 230.0, 0.5, 1000.0, 50.0)]  # the other one lacks the counter of then
    counted = part.says(total_act_energy=500.0, total_act_ret_energy=5.0)
    feed(collector, counted | {"received": now - 3570}, now + 1)
    feed(collector, counted | {"received": now - 3540}, now + 1)
    feed(collector, part.says(act_power=3.0), now + 60)
    assert rows(collector) == [
        (-3600, -2000.0, 229.0, 9.0, 500.0, 5.0),
        (-3540, -2000.0, 229.0, 9.0, 500.0, 5.0),
        (60, 3.0, 230.0, 0.5, 1000.0, 50.0),
    ]
    assert not any(channel.waiting for channel in collector.channels.values())


async def test_what_is_known_of_many_meters_is_bounded_and_the_newest_stay(make, replace):
    replace(MOST_CHANNELS=30)
    collector = make()
    for n in range(100):
        feed(collector, notify({"em:0": EM, "emdata:0": EMDATA}, f"invented-{n}"), NOON + n / 100)
        assert len(collector.channels) <= 30
    feed(collector, notify({"em:0": {"b_act_power": 1.0}}, "invented-99"), NOON + 60)
    assert taken(collector)[-1][1:] == ("invented-99", "em:0:b", 1.0, 230.0, 1.435, 195765.72, 131881.85)


odd = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just(10**400))
numbers = st.sampled_from([True] * 9 + [False]).flatmap(lambda right: st.floats(-1e9, 1e9) if right else odd)


def component(*names):
    return st.fixed_dictionaries({}, optional={name: numbers for name in names})


parts = st.fixed_dictionaries({}, optional={
    "em:0": component(*(f"{p}_{name}" for p in "abc" for name in POWER)),
    "emdata:0": component(*(f"{p}_{name}" for p in "abc" for name in COUNTER)),
    "em1:0": component(*POWER), "em1data:0": component(*COUNTER),
})  # fmt: skip


def values_of(components):
    """Channel, field and number of all that a frame tells of a meter."""
    for key, fields in components.items():
        for name, value in fields.items():
            phase, _, field = name.partition("_") if key in ("em:0", "emdata:0") else (None, "", name)
            with contextlib.suppress(OverflowError, TypeError, ValueError):
                yield f"em:0:{phase}" if phase else "em1:0", field, float(value)


async def test_whatever_comes_only_finite_numbers_of_the_same_phase_and_field_become_values(make):
    made = 0
    frames = st.tuples(parts, st.sampled_from(["NotifyStatus", "NotifyFullStatus"]), st.floats(0, 90))

    @hypothesis_settings(max_examples=300, deadline=None)
    @given(history=st.lists(frames, max_size=15))
    def rows_hold_only_what_was_sent(history):
        nonlocal made
        collector, now, sent = make(), NOON, set()
        for components, method, pause in history:
            now += pause
            sent |= set(values_of(components))
            with contextlib.suppress(ValueError):
                feed(collector, json.dumps(notify(components, METER, method)), now)
        found = taken(collector)
        assert len({row[:3] for row in found}) == len(found)
        for row in found:
            for field, value in zip([*POWER, *COUNTER], row[3:], strict=True):
                assert (row.channel, field, value) in sent or (value is None and field == "total_act_ret_energy")
        made += len(found)

    rows_hold_only_what_was_sent()
    assert made > 20


# ---- What a switch gives back.


@pytest.mark.parametrize(
    ("returned", "value"),
    [
        ({"total": 12.5, "by_minute": [0.0]}, 12.5),
        ({"total": 0}, 0.0),
        (None, None),
        ({"total": None}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("kind", ["switch", "pm1", "cover", "light"])
async def test_a_row_holds_what_a_switch_gave_back_and_never_waits_for_it(make, caplog, kind, returned, value):
    collector = make()
    whole = {"apower": 100.0, "voltage": 230.0, "current": 0.5, "aenergy": {"total": 1000.0}}
    assert not feed(collector, notify({f"{kind}:0": whole}, METER), NOON)  # nor asks for it
    feed(collector, notify({f"{kind}:0": {"apower": -1.0, "ret_aenergy": returned}}, METER), NOON + 60)
    assert rows(collector) == [(0, 100.0, 230.0, 0.5, 1000.0, None), (60, -1.0, 230.0, 0.5, 1000.0, value)]
    assert not caplog.messages


async def test_what_a_switch_gave_back_is_laid_over_replaced_and_taken_away_like_any_value(make):
    collector = make()
    whole = {"apower": 100.0, "voltage": 230.0, "current": 0.5, "aenergy": {"total": 1000.0}}
    gives = [("NotifyStatus", {**whole, "ret_aenergy": {"total": 7.0}}, 7.0), ("NotifyStatus", {"apower": 1.0}, 7.0),
             ("NotifyStatus", {"ret_aenergy": {"total": 8.0}}, 8.0), ("NotifyStatus", {"ret_aenergy": None}, None),
             ("NotifyStatus", {"ret_aenergy": {"total": 9.0}}, 9.0), ("NotifyFullStatus", whole, None)]  # fmt: skip
    for minute, (method, fields, _) in enumerate(gives):
        feed(collector, notify({"switch:0": {"apower": 1.0, **fields}}, METER, method), NOON + 60 * minute)
    assert [row.energy_returned_wh for row in taken(collector)] == [value for *_, value in gives]


@pytest.mark.parametrize("bad", ["x", [], {"total": "1"}, {"total": True}, {"total": 1e13}, {"total": 1e400}])
async def test_a_switch_whose_returned_energy_cannot_be_read_is_passed_over_and_named(make, caplog, bad):
    collector = make()
    frame = json.dumps(minute_frame(METER, ret_aenergy=bad)).replace("Infinity", "1e400")
    feed(collector, frame, NOON)
    assert not taken(collector)
    (line,) = caplog.messages
    assert f"{METER} switch:0: passed over" in line and "ret_aenergy" in line


# ---- Rows that wait on disk. The version before this one made its file so:

OLD_SPOOL = """PRAGMA auto_vacuum = FULL; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA user_version = 1;
CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, time, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)"""
OLD_ROWS = [(NOON + 60.0 * n, "old", "switch:0", float(n), 230.0, 0.5, 9.0) for n in range(20)]
RETURNED = [None, 7.0, 0.0, None] * 5
NEW_ROWS = [Row(NOON + 60.0 * n, "new", "em1:0", float(n), 230.0, 0.5, 9.0, wh) for n, wh in enumerate(RETURNED)]


def old_spool(folder):
    folder.mkdir(exist_ok=True)
    file = sqlite3.connect(folder / "outbox.sqlite3", isolation_level=None)
    file.executescript(OLD_SPOOL)
    file.executemany("INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", OLD_ROWS)
    return file


@contextlib.contextmanager
def outbox_of(folder, rows=()):
    outbox = Outbox(folder)
    outbox.claim()
    try:
        yield fill(outbox, rows)
    finally:
        if outbox.file:
            outbox.file.close()


def as_new(rows):
    return [Row(*row, None) for row in rows]


@pytest.mark.parametrize("killed", [False, True])
def test_an_old_spool_without_returned_energy_is_delivered_and_goes_on_being_used(tmp_path, caplog, killed):
    file = old_spool(tmp_path / "made")
    if not killed:
        file.close()
    shutil.copytree(tmp_path / "made", tmp_path / "data", ignore=shutil.ignore_patterns("*-shm"))
    file.close()
    with outbox_of(tmp_path / "data", NEW_ROWS[:10]) as outbox:
        assert len(outbox) == 30
        outbox.save()
        assert outbox.saved == 30 and not outbox.memory
    with outbox_of(tmp_path / "data", NEW_ROWS[10:]) as outbox:  # the next start
        assert drain(outbox, 7) == as_new(OLD_ROWS) + NEW_ROWS
        fill(outbox, NEW_ROWS).save()
        assert outbox.saved == 20 and drain(outbox) == NEW_ROWS
    assert not caplog.messages and not list((tmp_path / "data").glob("*.damaged-*"))


def test_a_spool_that_is_older_still_is_taken_over_too(tmp_path, caplog):
    file = old_spool(tmp_path)
    file.close()
    (tmp_path / "outbox.sqlite3").rename(tmp_path / "spool.sqlite3")
    with outbox_of(tmp_path, NEW_ROWS) as outbox:
        outbox.save()
        assert drain(outbox) == as_new(OLD_ROWS) + NEW_ROWS and not caplog.messages


def test_rows_come_back_from_disk_with_and_without_returned_energy(tmp_path):
    with outbox_of(tmp_path, NEW_ROWS) as outbox:
        outbox.save()
    with outbox_of(tmp_path) as outbox:
        assert drain(outbox) == NEW_ROWS


def test_a_row_on_disk_whose_returned_energy_is_damaged_is_passed_over_alone(tmp_path):
    with outbox_of(tmp_path, NEW_ROWS) as outbox:
        outbox.save()
    with contextlib.closing(sqlite3.connect(tmp_path / "outbox.sqlite3", isolation_level=None)) as file:
        file.execute("UPDATE rows SET energy_returned_wh = 'x' WHERE id = 5")
    with outbox_of(tmp_path) as outbox:
        assert drain(outbox) == NEW_ROWS[:4] + NEW_ROWS[5:]


async def test_a_collector_brings_the_rows_of_an_old_spool_to_the_table(collectors, database, tmp_path):
    old_spool(tmp_path / "data").close()
    running = await collectors(tmp_path, DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("new"))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == len(OLD_ROWS) + 1)
    found = read_rows(database, "device_id, apower_w, energy_returned_wh")
    assert found == [("new", 433.8, 0.0)] + [("old", float(n), None) for n in range(20)]
    assert "rows dropped: 0" in running.get()[1] and "ERROR" not in running.log


# ---- The table. As the version before this one left it, the functions that nobody looks at here left out:

VERSION_3 = """
CREATE TABLE power_logs (id BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, timestamp TIMESTAMPTZ NOT NULL,
 device_id VARCHAR(100) NOT NULL, channel VARCHAR(20) NOT NULL, apower_w FLOAT NOT NULL, voltage_v FLOAT NOT NULL,
 current_a FLOAT NOT NULL, energy_total_wh FLOAT NOT NULL, created_at TIMESTAMPTZ DEFAULT NOW());
CREATE TABLE channel_names (device_id VARCHAR(100) NOT NULL, channel VARCHAR(20) NOT NULL DEFAULT '', device_says TEXT,
 name TEXT, PRIMARY KEY (device_id, channel));
COMMENT ON TABLE power_logs IS 'Readings of Shelly devices, one row per metered channel and interval; the first reading of an interval wins';
CREATE INDEX idx_power_logs_timestamp ON power_logs (timestamp);
CREATE INDEX idx_power_logs_device_channel ON power_logs (device_id, channel);
CREATE UNIQUE INDEX power_logs_one_row_per_interval ON power_logs (device_id, channel, timestamp);
CREATE FUNCTION energy_by_day(since TIMESTAMPTZ DEFAULT now() - INTERVAL '45 days', until TIMESTAMPTZ DEFAULT now(),
 zone TEXT DEFAULT current_setting('TimeZone'))
RETURNS TABLE (device_id TEXT, channel TEXT, day DATE, energy_wh FLOAT, rows BIGINT) LANGUAGE sql STABLE AS $$
 SELECT p.device_id::text, p.channel::text, (p.timestamp AT TIME ZONE zone)::date,
        max(p.energy_total_wh) - min(p.energy_total_wh), count(*)
 FROM power_logs p WHERE p.timestamp >= since AND p.timestamp < until GROUP BY 1, 2, 3 $$;
CREATE FUNCTION power_logs_version() RETURNS INT LANGUAGE sql IMMUTABLE AS 'SELECT 3';
"""
HISTORY = """INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)
 SELECT date_trunc('hour', now()) - INTERVAL '1 hour' + n * INTERVAL '1 second', 'old', 'switch:0', 1, 2, 3, n FROM generate_series(0, 100) n"""


def ask(database, query, *values):
    with psycopg.connect(database, autocommit=True) as conn:
        return conn.execute(query, values or None).fetchall()


def relfilenode(database):
    return ask(database, "SELECT relfilenode FROM pg_class WHERE oid = 'power_logs'::regclass")


async def test_the_table_has_a_column_for_it_at_its_end_and_the_others_are_what_they_were(collectors, database):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        without = minute_frame("b-plain", ret_aenergy=None)
        await peer.send(minute_frame("a-switch"), without, notify({"em:0": EM, "emdata:0": EMDATA}, METER))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 5)
    switch = (433.8, 228.2, 2.631, 1234.567)
    assert read_rows(database, VALUES) == [
        ("a-switch", "switch:0", *switch, 0.0), ("b-plain", "switch:0", *switch, None), *((METER, *one) for one in PHASES)
    ]  # fmt: skip
    columns = ask(database, "SELECT column_name, data_type, is_nullable FROM information_schema.columns"
                            " WHERE table_name = 'power_logs' ORDER BY ordinal_position")  # fmt: skip
    assert [name for name, _, _ in columns[:9]] == [
        "id", "timestamp", "device_id", "channel", "apower_w", "voltage_v", "current_a", "energy_total_wh", "created_at"
    ]  # fmt: skip
    assert columns[9:] == [("energy_returned_wh", "double precision", "YES")]
    (comment,) = ask(database, "SELECT col_description('power_logs'::regclass, 10)")
    assert comment[0] and "Wh" in comment[0]


@pytest.mark.parametrize("old_table", [VERSION_3, ORIGINAL_TABLE], ids=["version 3", "the first system's"])
async def test_an_old_table_gets_the_column_at_the_start_without_being_rewritten(collectors, database, old_table):
    execute(database, old_table, HISTORY)
    before = relfilenode(database)
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(notify({"em:0": EM, "emdata:0": EMDATA}, METER))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 104)
    stored = ask(database, f"SELECT {VALUES} FROM power_logs WHERE device_id = %s ORDER BY channel", METER)
    assert stored == [(METER, *one) for one in PHASES]
    assert ask(database, "SELECT count(*) FROM power_logs WHERE energy_returned_wh IS NULL") == [(101,)]
    assert relfilenode(database) == before and ask(database, "SELECT power_logs_version()") == [(SCHEMA_VERSION,)]
    await running.stop()
    await (await running.again()).ready()
    execute(database, (ROOT / "schema.sql").read_bytes())  # safe to apply again, by hand too
    assert relfilenode(database) == before and "WARNING power_logs" not in running.log and "ERROR" not in running.log


@pytest.mark.parametrize("may", ["", "GRANT CREATE ON SCHEMA public TO {role}"], ids=["only insert", "create, too"])
async def test_where_the_role_may_not_alter_the_table_rows_go_in_without_it_and_none_is_lost(collectors, database, may):
    role = "meter_" + psycopg.conninfo.conninfo_to_dict(database)["dbname"]  # of the whole server
    execute(database, VERSION_3, f"CREATE ROLE {role} LOGIN", f"GRANT INSERT, SELECT ON power_logs TO {role}")
    execute(database, may.format(role=role) or "SELECT")
    running = await collectors(DATABASE_URL=psycopg.conninfo.make_conninfo(database, user=role)).ready()
    async with device(running.url) as peer:
        await peer.send(notify({"em:0": EM, "emdata:0": EMDATA}, METER), minute_frame())
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 4)
    narrow = VALUES.removesuffix(", energy_returned_wh")
    stored = ask(database, f"SELECT {narrow} FROM power_logs WHERE device_id = %s ORDER BY channel", METER)
    assert stored == [(METER, *one[:5]) for one in PHASES]
    assert "lacks the column energy_returned_wh of schema.sql: apply that file by hand, and restart" in running.log
    text = running.get()[1]
    assert "rows dropped: 0" in text and "rows waiting: 0" in text and "ERROR" not in running.log
    # The owner does by hand what the role may not do; from the next start on it is filled.
    await running.stop()
    execute(database, "ALTER TABLE power_logs ADD COLUMN energy_returned_wh FLOAT")
    await (await running.again()).ready()
    async with device(running.url) as peer:
        await peer.send(notify({"em:0": EM, "emdata:0": EMDATA}, METER + "-2"))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 7)
    stored = ask(database, f"SELECT {VALUES} FROM power_logs WHERE device_id = %s ORDER BY channel", METER + "-2")
    assert stored == [(METER + "-2", *one) for one in PHASES]
    await running.stop()
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_a_client_that_holds_the_table_open_delays_the_update_but_no_row_for_long(collectors, database):
    execute(database, VERSION_3)
    with psycopg.connect(database) as client:
        client.execute("SELECT count(*) FROM power_logs")  # and its transaction stays open
        running = await collectors(DATABASE_URL=database).ready()
        async with device(running.url) as peer:
            await peer.send(minute_frame())
            await wait_for(lambda: len(read_rows(database, "1", "1")) == 1)
        assert "lock timeout" in running.log and "lacks the column energy_returned_wh" in running.log
    await running.stop()
    await (await running.again()).ready()
    assert ask(database, "SELECT count(*) FROM power_logs WHERE energy_returned_wh IS NULL") == [(1,)]
    assert ask(database, "SELECT power_logs_version()") == [(SCHEMA_VERSION,)]


async def test_rows_that_wait_for_the_database_go_into_a_table_without_the_column_too(collectors, database, tmp_path):
    role = "meter_" + psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    execute(database, VERSION_3, f"CREATE ROLE {role} LOGIN", f"GRANT INSERT, SELECT ON power_logs TO {role}")
    (tmp_path / "data").mkdir()
    with outbox_of(tmp_path / "data", NEW_ROWS) as outbox:
        outbox.save()
    running = await collectors(tmp_path, DATABASE_URL=psycopg.conninfo.make_conninfo(database, user=role)).ready()
    await wait_for(lambda: len(read_rows(database, "1", "1")) == len(NEW_ROWS))
    assert read_rows(database, "apower_w") == [(row.apower_w,) for row in NEW_ROWS]
    await running.stop()
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_a_column_that_the_owner_drops_costs_no_row(collectors, database):
    running = await collectors(DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="0.5").ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("before"))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 1)
        execute(database, "ALTER TABLE power_logs DROP COLUMN energy_returned_wh CASCADE")
        await peer.send(minute_frame("after"))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 2)
    assert "rows dropped: 0" in running.get()[1]


async def test_a_view_of_the_owner_on_energy_by_day_stops_no_update_and_goes_on_working(collectors, database):
    role = "reader_" + psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    execute(
        database,
        VERSION_3,
        HISTORY,
        "CREATE VIEW my_days AS SELECT day, sum(energy_wh) AS wh FROM energy_by_day() GROUP BY day",
        "CREATE VIEW all_days AS SELECT * FROM energy_by_day(now() - INTERVAL '3 days', now() + INTERVAL '1 day', 'UTC')",
        f"CREATE ROLE {role}",
        f"GRANT SELECT ON my_days, all_days TO {role}",
    )
    days = "SELECT device_id, energy_wh, rows FROM all_days WHERE device_id = 'old'"
    may_read = f"SELECT has_table_privilege('{role}', v, 'SELECT') FROM unnest(ARRAY['my_days', 'all_days']) v"
    before, sums = ask(database, days), ask(database, "SELECT wh FROM my_days")
    assert before == [("old", 100.0, 101)]
    running = await collectors(DATABASE_URL=database).ready()
    for _ in range(2):
        assert ask(database, "SELECT power_logs_version()") == [(SCHEMA_VERSION,)]
        assert "is used as it is" not in running.log and "ERROR" not in running.log
        assert ask(database, days) == before and ask(database, "SELECT wh FROM my_days") == sums
        assert ask(database, may_read) == [(True,)] * 2
        assert ask(database, "SELECT energy_returned_wh FROM energy_by_day(until => now() + INTERVAL '1 day')") != []
        await running.stop()
        execute(database, (ROOT / "schema.sql").read_bytes())  # and again, by hand too
        await (await running.again()).ready()
    # It sees what comes after the update.
    execute(database, HISTORY.replace("'old'", "'later'"))
    assert ask(database, days.replace("'old'", "'later'")) == [("later", 100.0, 101)]
    await running.stop()
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


# ---- Names.


async def test_each_phase_has_the_name_of_its_meter_and_its_letter_and_a_clamp_has_its_own(collectors, database):
    running = await collectors(DATABASE_URL=database, CHANNELS="0,1").ready()
    status = {"id": 2, "src": METER, "dst": "collector", "result": {"em:0": EM, "emdata:0": EMDATA}}
    nameless = {("", None), *((f"em:0:{p}", None) for p in "abc"), ("em1:0", None), ("em1:1", "Panels")}

    def names():
        return set(ask(database, "SELECT channel, device_says FROM channel_names"))

    async def say(house, clamp):
        async with device(running.url) as peer:
            await peer.send(status)
            assert await peer.websocket.recv() == GET_CONFIG
            config = {"sys": {"device": {"name": None, "mac": "A1"}}, "em:0": {"id": 0, "name": house, "reverse": {}},
                      "emdata:0": {}, "em1:0": {"id": 0, "name": clamp}, "em1:1": {"id": 1, "name": "Panels"}, "em1data:0": {},
                      "em1data:1": {"id": 1, "name": "x"}, "em:2": {"id": 2, "name": "Not wanted"}, "wifi": {"ap": {}}}  # fmt: skip
            await peer.send({"id": 3, "src": METER, "dst": "collector", "result": config})

    await say("House", "Mains")
    named = {("", None), *((f"em:0:{p.lower()}", f"House {p}") for p in "ABC"), ("em1:0", "Mains"), ("em1:1", "Panels")}
    await wait_for(lambda: names() == named)
    execute(database, "UPDATE channel_names SET name = 'Stove' WHERE channel = 'em:0:b'")
    await say(None, None)
    await wait_for(lambda: names() == nameless)
    shown = ask(database, "SELECT channel, name FROM newest_rows() ORDER BY channel")
    assert shown == [("em:0:a", None), ("em:0:b", "Stove"), ("em:0:c", None)]
    assert "WARNING note_names" not in running.log


# ---- The simulated meters, and whole sessions with them.


async def play(url, *arguments, **env):
    return await asyncio.create_subprocess_exec(
        sys.executable, ROOT / "tests/simulated_device.py", url, "--minute", "1", *arguments,
        env=env or None, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def noon_here():
    """The environment of a place where it is about noon."""
    return {"TZ": f"NOON{time.gmtime().tm_hour - 12:+d}"}


async def stop(process):
    process.terminate()
    _, err = await process.communicate()
    assert process.returncode == 0 and err == b"", err.decode()


async def test_a_simulated_three_phase_meter_becomes_rows_of_three_phases_with_counters_that_grow(collectors, database):
    running = await collectors(DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1").ready()
    process = await play(running.url, "--model", "pro3em", **noon_here())
    await wait_for(lambda: len(read_rows(database, "1", "1")) >= 3 * 6, 20)
    names = "SELECT channel, device_says FROM channel_names WHERE channel <> '' ORDER BY channel"
    await wait_for(lambda: len(ask(database, names)) == 3)
    await stop(process)
    await wait_for(lambda: "rows waiting: 0" in running.get()[1])
    assert ask(database, names) == [("em:0:a", "House A"), ("em:0:b", "House B"), ("em:0:c", "House C")]
    columns = "channel, extract(epoch FROM timestamp)::float, apower_w, voltage_v, current_a, energy_total_wh, energy_returned_wh"
    series = {}
    for channel, *values in read_rows(database, columns):
        series.setdefault(channel, []).append(values)
    assert list(series) == ["em:0:a", "em:0:b", "em:0:c"]
    for channel, found in series.items():
        times, powers, volts, amps, drawn, returned = zip(*found, strict=True)
        assert len(times) >= 5 and times == tuple(times[0] + n for n in range(len(times)))
        assert min(volts) > 200 and min(amps) > 0
        assert list(drawn) == sorted(drawn) and list(returned) == sorted(returned)
        if channel == "em:0:c":  # solar panels
            assert max(powers) < 0 and returned[-1] > returned[1] and len(set(drawn)) == 1
        else:
            assert min(powers) > 0 and drawn[-1] > drawn[1] and set(returned) == {0.0}
    (device_id,) = {row[0] for row in read_rows(database, "device_id")}
    assert device_id == "shellypro3em-a1b2c3000000"
    assert "passed over" not in running.log and "stored as 0" not in running.log


async def test_a_simulated_pro_em_50_becomes_rows_of_its_two_clamps_and_none_of_its_relay(collectors, database):
    running = await collectors(DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1").ready()
    process = await play(running.url, "--model", "proem50", "--devices", "2", **noon_here())
    await wait_for(lambda: len(read_rows(database, "1", "1")) >= 2 * 2 * 4, 20)
    names = "SELECT DISTINCT channel, device_says FROM channel_names WHERE channel LIKE 'em%' ORDER BY channel"
    await wait_for(lambda: len(ask(database, names)) == 2)
    await stop(process)
    assert ask(database, names) == [("em1:0", "Mains"), ("em1:1", "Panels")]
    found = read_rows(database, "channel, sign(apower_w)")
    assert set(found) == {("em1:0", 1.0), ("em1:1", -1.0)}
    assert "passed over" not in running.log and "stored as 0" not in running.log


@pytest.mark.parametrize("unconnected", [None, "b"])
async def test_every_value_of_every_row_is_one_that_the_meter_sent(collectors, database, unconnected):
    running = await collectors(DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="1").ready()
    meters = [sim.Pro3EM(f"shellypro3em-{n:012x}", unconnected, seed=n) for n in range(3)]
    await asyncio.gather(*(sim.live(sim.Line(one, running.url, False, lambda _: None), 1.0, 5) for one in meters))
    await wait_for(lambda: "rows waiting: 0" in running.get()[1])
    sent = {one.id: {} for one in meters}
    for one in meters:
        for frame in one.sent:
            components = frame.get("params") or frame.get("result") or {}
            for key in ("em:0", "emdata:0"):
                for name, value in components.get(key, {}).items():
                    sent[one.id].setdefault(name, []).append(value)
    found = read_rows(database, VALUES)
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
    (whole,) = [frame["params"] for frame in frames if frame.get("method") == "NotifyFullStatus"]
    (status,) = [frame["result"] for frame in frames if frame.get("id") == 2]
    (config,) = [frame["result"] for frame in frames if frame.get("id") == 3]
    assert config["em:0"]["name"] == "House" and config["em:0"]["id"] == 0 and config["emdata:0"] == {}
    for components in (whole, status):
        assert components["em:0"].keys() == EM.keys() | {"user_calibrated_phase"}
        assert components["emdata:0"].keys() == EMDATA.keys() and components["em:0"]["n_current"] is None
    deltas = [frame["params"] for frame in frames if frame.get("method") == "NotifyStatus"]
    powers = [one["em:0"] for one in deltas if "em:0" in one]
    counters = [one["emdata:0"] for one in deltas if "emdata:0" in one]
    assert len(counters) == 3 and len(powers) >= 3 * 5 and not any({"em:0", "emdata:0"} <= one.keys() for one in deltas)
    assert all(one.keys() == EM.keys() for one in powers) and all(one.keys() == EMDATA.keys() for one in counters)
    assert all(0 <= one["ts"] % 1 < 0.1 for one in deltas if "emdata:0" in one)
    for one in powers:
        assert one["total_act_power"] == pytest.approx(sum(one[f"{p}_act_power"] for p in "abc"), abs=0.001)
        assert all(one[f"{p}_current"] >= 0 and 226 <= one[f"{p}_voltage"] <= 234 for p in "abc")


@pytest.mark.parametrize("hour", [12, 2])
def test_the_solar_phase_gives_back_by_day_and_takes_a_little_at_night(monkeypatch, hour):
    fixed = time.struct_time((2026, 6, 21, hour, 0, 0, 6, 172, 0))
    monkeypatch.setattr(sim.time, "localtime", lambda *_: fixed)
    meter = sim.Pro3EM(METER)
    frames = meter.full_status(), *meter.change(), *meter.minute()
    before, powers, after = frames[0]["params"], frames[1]["params"]["em:0"], frames[2]["params"]
    rise = {name: after["emdata:0"][name] - value for name, value in before["emdata:0"].items()}
    assert (powers["c_act_power"] < 0) == (hour == 12) and powers["c_current"] > 0
    assert (rise["c_total_act_ret_energy"] > 0) == (hour == 12) and (rise["c_total_act_energy"] > 0) == (hour == 2)
    assert rise["a_total_act_energy"] > 0 and rise["a_total_act_ret_energy"] == 0
    assert rise["total_act"] == pytest.approx(sum(rise[f"{p}_total_act_energy"] for p in "abc"), abs=0.02)


@pytest.mark.parametrize("arguments", [
    *([*model, option, *value] for model in (["--model", "pro3em"], ["--model", "proem50"])
      for option, *value in (["--channels", "4"], ["--history", "24h"], ["--filter"], ["--old-firmware"])),
    ["--unconnected", "b"], ["--model", "proem50", "--unconnected", "b"], ["--model", "pro3em", "--unconnected", "d"],
    ["--model", "pro9"],
])  # fmt: skip
async def test_the_simulated_device_refuses_what_its_model_does_not_have_with_a_line(arguments):
    process = await play("ws://localhost:1/ws", *arguments)
    out, err = await asyncio.wait_for(process.communicate(), 10)
    option = [argument for argument in arguments if argument.startswith("--")][-1]
    assert process.returncode == 2 and out == b"" and option.encode() in err.splitlines()[-1]
