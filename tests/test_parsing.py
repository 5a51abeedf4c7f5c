"""From a frame's text to the known status: deltas, full statuses, answers, and frames
without readings."""

import contextlib
import json
import math

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import simulated_device as sim
from support import (
    COUNTER,
    DEVICE,
    EM,
    EMDATA,
    METER,
    NOON,
    PHASES,
    POWER,
    Row,
    expire,
    feed,
    known_channels,
    minute_frame,
    notify,
    of_both_kinds,
    taken,
    values_taken,
)

WHOLE = {
    "apower": 100.0,
    "voltage": 230.0,
    "current": 0.5,
    "aenergy": {"total": 1000.0},
}


def row(collector, values):
    return [(r.channel, *r[3:7]) for r in taken(collector)] == values


async def test_a_minute_frame_becomes_a_row_with_the_values_that_the_device_sent(make):
    collector = make()
    feed(collector, minute_frame(), NOON + 0.02)
    assert taken(collector) == [
        Row(NOON, DEVICE, "switch:0", 433.8, 228.2, 2.631, 1234.567, 0.0)
    ]


async def test_a_delta_is_laid_over_what_was_known(make):
    collector = make()
    feed(collector, minute_frame(), NOON)
    feed(collector, notify({"switch:0": {"apower": 50}}), NOON + 30)
    feed(collector, notify({"switch:0": {"current": 0.25}}), NOON + 60)
    assert [r[3:7] for r in taken(collector)] == [
        (433.8, 228.2, 2.631, 1234.567),
        (50.0, 228.2, 0.25, 1234.567),
    ]


async def test_a_full_status_replaces_what_was_known(make):
    collector = make()
    feed(collector, minute_frame(), NOON)
    taken(collector)
    feed(
        collector,
        notify(
            {"switch:0": {"apower": 7.0, "current": 0.1}}, method="NotifyFullStatus"
        ),
        NOON + 60,
    )
    # The old voltage and counter are gone, so this row waits.
    assert taken(collector) == []
    feed(
        collector,
        notify({"switch:0": {"voltage": 231.0, "aenergy": {"total": 5.0}}}),
        NOON + 61,
    )
    assert [r[3:7] for r in taken(collector)] == [(7.0, 231.0, 0.1, 5.0)]


async def test_the_answer_to_get_status_makes_rows(make):
    collector = make()
    answer = {
        "id": 2,
        "src": DEVICE,
        "dst": "collector",
        "result": {"sys": {"unixtime": 1}, "switch:3": WHOLE},
    }
    feed(collector, answer, NOON)
    assert [(r.channel, r.apower_w) for r in taken(collector)] == [("switch:3", 100.0)]
    answer["result"]["switch:3"] = {"apower": 7.0}  # replaces what was known
    feed(collector, answer, NOON + 60)
    assert taken(collector) == []
    rest = {"voltage": 231.0, "current": 0.1, "aenergy": {"total": 5.0}}
    feed(collector, notify({"switch:3": rest}), NOON + 61)
    assert [r[3:] for r in taken(collector)] == [(7.0, 231.0, 0.1, 5.0, None)]


async def test_a_frame_with_id_and_method_is_a_notification(make):
    collector = make()
    feed(
        collector,
        {"id": 7, **notify({"switch:0": WHOLE}, "ShellyWallDisplay-00082216C97B")},
        NOON,
    )
    assert [r.device_id for r in taken(collector)] == ["ShellyWallDisplay-00082216C97B"]


async def test_frames_without_readings_are_normal(make):
    collector = make()
    feed(
        collector,
        {
            "id": 1,
            "src": DEVICE,
            "dst": "collector",
            "error": {"code": 404, "message": "No handler"},
        },
        NOON,
    )
    feed(
        collector,
        {
            "src": DEVICE,
            "method": "NotifyEvent",
            "params": {"events": [{"component": "input:0"}]},
        },
        NOON,
    )
    feed(collector, notify({"ws": {"connected": True}}), NOON)
    assert not taken(collector) and not known_channels(collector)


@pytest.mark.parametrize(
    "answer",
    [
        # A device whose owner has set a password answers with a challenge.
        {
            "id": 2,
            "src": DEVICE,
            "dst": "collector",
            "error": {
                "code": 401,
                "message": '{"auth_type": "digest", "nonce": 1795437480, "nc": 1, '
                '"realm": "shellypro4pm-a1b2c3d4e5f6", "algorithm": "SHA-256"}',
            },
        },
        # Firmware 2.0 under haste.
        {
            "id": 2,
            "src": DEVICE,
            "error": {"code": 429, "message": "Too many requests"},
        },
        # What a meter remembers is pushed, too.
        {
            "src": METER,
            "method": "NotifyEvent",
            "params": {
                "ts": NOON,
                "events": [
                    {
                        "component": "emdata:0",
                        "id": 0,
                        "event": "data",
                        "ts": NOON,
                        "data": {"ts": 1795435140, "period": 60, "values": [[1.0]]},
                    }
                ],
            },
        },
    ],
)
async def test_a_challenge_an_error_and_a_pushed_record_change_nothing(
    make, caplog, answer
):
    collector = make()
    feed(collector, notify({"switch:0": WHOLE}), NOON)
    feed(collector, answer, NOON + 60)
    assert len(taken(collector)) == 1
    assert not caplog.messages


@pytest.mark.parametrize(
    ("device", "channels"),
    [
        # A power strip has four switches; an add-on's begin with 100.
        ("shellypstripg4-a1b2c3d4e5f6", [f"switch:{n}" for n in range(4)]),
        ("shelly1pmg3-a1b2c3d4e5f6", ["switch:0", "switch:100"]),
    ],
)
async def test_each_switch_of_a_strip_or_an_add_on_makes_rows(make, device, channels):
    collector = make()
    whole = {channel: WHOLE for channel in channels}
    feed(collector, notify(whole, device, "NotifyFullStatus"), NOON)
    assert [row.channel for row in taken(collector)] == channels


async def test_a_3em_400_is_a_three_phase_meter(make):
    collector = make()
    whole = {"em:0": EM, "emdata:0": EMDATA, "temperature:0": {"id": 0, "tC": 41.2}}
    device = "shellypro3em400-a1b2c3d4e5f6"
    feed(collector, notify(whole, device, "NotifyFullStatus"), NOON)
    assert [tuple(row[2:]) for row in taken(collector)] == PHASES


@pytest.mark.parametrize("kind", ["pm1", "cover", "light"])
async def test_other_metered_components_make_rows(make, kind):
    collector = make()
    feed(collector, notify({f"{kind}:0": WHOLE, "switch:0": WHOLE}), NOON)
    assert sorted(r.channel for r in taken(collector)) == [f"{kind}:0", "switch:0"]


async def test_a_switch_without_a_meter_never_makes_a_row(make):
    collector = make()
    relay = {"id": 0, "source": "init", "output": True, "temperature": {"tC": 40}}
    for minute in range(3):
        feed(
            collector,
            notify({"switch:0": relay}, method="NotifyFullStatus"),
            NOON + 60 * minute,
        )
    expire(collector)
    assert not taken(collector) and not known_channels(collector)


async def test_negative_power_keeps_its_sign_and_whole_numbers_become_floats(make):
    collector = make()
    feed(
        collector,
        notify(
            {
                "switch:0": {
                    "apower": -250,
                    "voltage": 230,
                    "current": 1,
                    "aenergy": {"total": 9},
                }
            }
        ),
        NOON,
    )
    (kept,) = taken(collector)
    assert kept[3:7] == (-250.0, 230.0, 1.0, 9.0) and all(
        type(value) is float for value in kept[3:7]
    )


@pytest.mark.parametrize(
    "bad", [True, "230", [], {}, {"total": 1}, 1e400, 1.01e9, -1e10, 10**400]
)
@pytest.mark.parametrize("field", ["apower", "voltage", "current", "aenergy", "total"])
async def test_a_component_that_no_meter_sends_is_passed_over_and_named_and_the_others_count(
    make, caplog, bad, field
):
    if field == "aenergy" and isinstance(bad, dict):
        # A dict is right here.
        return
    bad = bad * 1000 if field == "total" and isinstance(bad, float) else bad
    collector = make()
    feed(collector, minute_frame(), NOON)
    component = (
        {"apower": 1.0, "aenergy": {"total": bad}}
        if field == "total"
        else {"current": 1.0, field: bad}
    )
    text = json.dumps(notify({"switch:0": component, "switch:1": WHOLE})).replace(
        "Infinity", "1e400"
    )
    feed(collector, text, NOON + 60)
    assert [r.channel for r in taken(collector)] == ["switch:0", "switch:1"]
    (line,) = caplog.messages
    assert (
        DEVICE in line
        and "switch:0" in line
        and f"`$.{'aenergy.' * (field == 'total')}{field}`" in line
    )
    feed(collector, notify({"switch:0": {"apower": 5.0}}), NOON + 61)
    assert [r[3:7] for r in taken(collector)] == [(5.0, 228.2, 2.631, 1234.567)]


async def test_each_component_that_is_passed_over_is_named_once_a_minute(make, caplog):
    collector = make()
    for _ in range(2):
        feed(
            collector,
            notify(
                {
                    "switch:0": {"apower": "x"},
                    "switch:1": {"apower": 1e200},
                    "switch:2": WHOLE,
                }
            ),
            NOON,
        )
    assert [
        DEVICE + " " + key in line
        for key, line in zip(("switch:0", "switch:1"), caplog.messages, strict=True)
    ] == [True] * 2


@pytest.mark.parametrize(
    "gone",
    [
        {"voltage": None},
        {"current": None},
        {"aenergy": None},
        {"aenergy": {"total": None}},
    ],
)
async def test_null_takes_a_value_away(make, gone):
    collector = make()
    feed(collector, minute_frame(), NOON)
    taken(collector)
    feed(collector, notify({"switch:0": {"apower": 9.0, **gone}}), NOON + 60)
    # The row waits for the value that is no longer known.
    assert not taken(collector)
    feed(
        collector,
        notify(
            {"switch:0": {"voltage": 1.0, "current": 2.0, "aenergy": {"total": 3.0}}}
        ),
        NOON + 61,
    )
    (kept,) = taken(collector)
    old, new = (9.0, 228.2, 2.631, 1234.567), (9.0, 1.0, 2.0, 3.0)
    lost = ["voltage", "current", "aenergy"].index(next(iter(gone))) + 1
    assert kept[3:7] == tuple(new[n] if n == lost else old[n] for n in range(4))


async def test_a_meter_with_an_error_makes_no_row_until_it_has_a_power_again(make):
    collector = make()
    feed(collector, minute_frame(), NOON)
    broken = {
        "apower": None,
        "voltage": None,
        "current": None,
        "errors": ["power_meter_failure"],
    }
    feed(collector, notify({"switch:0": broken}), NOON + 60)
    feed(collector, notify({"switch:0": {"aenergy": {"total": 1240.0}}}), NOON + 120)
    expire(collector)
    # No row with 0 W, and none with the last power.
    assert len(taken(collector)) == 1
    feed(collector, minute_frame(apower=3.0), NOON + 180)
    assert [r.apower_w for r in taken(collector)] == [3.0]


MALFORMED = [
    "",
    "no json",
    "[]",
    "1",
    "null",
    "{}",
    '{"src":1,"method":"NotifyStatus","params":{}}',
    '{"method":"NotifyStatus","params":{}}',
    '{"src":"x","method":"NotifyStatus"}',
    '{"src":"x","method":"NotifyStatus","params":[]}',
    '{"src":"x","result":3}',
    "[" * 100_000 + "]" * 100_000,
    '{"src":"x","method":"NotifyStatus","params":{"switch:0":{"apower":NaN}}}',
    '{"src":"x","method":"NotifyStatus","params":{"switch:0":{"apower":-Infinity}}}',
    '{"params":{"a":' + "[" * 100_000 + "]" * 100_000 + "}}",
    '{"src":"\\ud800","method":"NotifyStatus","params":{}}',
    b'{"src":"\xff","method":"NotifyStatus","params":{}}',
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
async def test_malformed_frames_are_refused_with_a_reason(make, text):
    collector = make()
    with pytest.raises((ValueError, RecursionError)):
        feed(collector, text, NOON)
    assert not taken(collector) and not known_channels(collector)


async def test_a_device_id_of_100_bytes_is_accepted(make):
    collector = make()
    feed(collector, minute_frame("ж" * 50), NOON)
    assert [r.device_id for r in taken(collector)] == ["ж" * 50]


@pytest.mark.parametrize(
    "device",
    ["", "x" * 101, "a\nb", "a\0b", "a\x1b[2J", "a\u2028b", "\u202egnp", "ж" * 51],
)
async def test_a_device_id_that_the_table_or_the_log_cannot_hold_is_refused(
    make, device
):
    collector = make()
    with pytest.raises(ValueError):
        feed(collector, minute_frame(device), NOON)
    assert not taken(collector) and not known_channels(collector)


@pytest.mark.parametrize(
    "key",
    [
        "switch:",
        "switch:-1",
        "switch:1.5",
        "switch:01",
        "switch:99999",
        "switch:١",
        "switch",
        "switch:0\n",
        " switch:0",
        "em1:0",
        "switch:0:0",
    ],
)
async def test_a_key_without_a_small_whole_number_is_passed_over_and_the_others_count(
    make, key
):
    collector = make()
    feed(
        collector,
        notify({key: WHOLE, "switch:1": "text", "switch:2": None, "switch:3": WHOLE}),
        NOON,
    )
    assert [r.channel for r in taken(collector)] == ["switch:3"]


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just(10**400),
    st.lists(st.integers()),
)


def mostly(right):
    """Right in nine cases of ten, so that many frames make rows; otherwise anything."""
    return st.sampled_from([right] * 9 + [odd]).flatmap(lambda strategy: strategy)


numbers = mostly(st.floats(-1e9, 1e9))
energy = mostly(st.fixed_dictionaries({"total": numbers}))
components = st.fixed_dictionaries(
    {"apower": numbers},
    optional={"voltage": numbers, "current": numbers, "aenergy": energy, "output": odd},
)
parts = mostly(
    st.dictionaries(
        st.sampled_from(["ts", "switch:0", "switch:1", "pm1:0"]), components, min_size=1
    )
)
methods = mostly(st.sampled_from(["NotifyStatus", "NotifyFullStatus", "NotifyEvent"]))
devices = mostly(st.one_of(st.sampled_from([DEVICE, "other-1"]), st.text(max_size=120)))
frames = st.one_of(
    st.fixed_dictionaries(
        {"src": devices, "method": methods, "params": parts},
        optional={"id": odd, "result": parts},
    ),
    st.fixed_dictionaries(
        {"src": devices, "result": parts, "id": odd}, optional={"method": st.none()}
    ),
)


def finite_numbers(value):
    """All finite numbers in a frame, as floats."""
    if isinstance(value, dict):
        return set().union(*map(finite_numbers, value.values())) if value else set()
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            return set()
        return {number} if math.isfinite(number) else set()
    return set()


@pytest.mark.slow
async def test_only_finite_numbers_that_the_device_sent_become_rows(make):
    made = 0

    @hypothesis_settings(max_examples=400, deadline=None)
    @given(history=st.lists(st.tuples(frames, st.floats(0, 200)), max_size=12))
    def rows_hold_only_what_was_sent(history):
        nonlocal made
        collector, now, sent = make(), NOON, set()
        for frame, pause in history:
            now += pause
            sent |= finite_numbers(frame)
            # What two whole statuses a minute apart lack is stored as 0.
            if now - NOON >= 60:
                sent.add(0.0)
            with contextlib.suppress(ValueError):
                feed(collector, json.dumps(frame), now)
        rows = taken(collector)
        keys = [(r.device_id, r.channel, r.time) for r in rows]
        assert len(set(keys)) == len(keys)
        for r in rows:
            assert all(type(value) is float and value in sent for value in r[3:7])
            assert 0 < len(r.device_id.encode()) <= 100
            assert r.channel in {"switch:0", "switch:1", "pm1:0"}
        made += len(rows)

    rows_hold_only_what_was_sent()
    assert made > 20


@pytest.mark.slow
@hypothesis_settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    text=st.one_of(
        st.text(), st.binary(), st.recursive(numbers, st.lists).map(json.dumps)
    )
)
async def test_any_text_is_read_or_raises_a_value_error(make, text):
    collector = make()
    try:
        feed(collector, text, NOON)
    except ValueError:
        pass
    assert not taken(collector)


async def test_an_empty_answer_and_a_request_are_normal_and_an_event_is_no_reading(
    make,
):
    collector = make()
    feed(collector, {"id": 1, "src": DEVICE, "dst": "collector", "result": {}}, NOON)
    feed(collector, {"id": 1, "src": DEVICE, "method": "Shelly.GetDeviceInfo"}, NOON)
    feed(collector, notify({"switch:0": WHOLE}, method="NotifyEvent"), NOON)
    feed(collector, notify({"switch:0": WHOLE}) | {"result": {"switch:1": WHOLE}}, NOON)
    assert [r.channel for r in taken(collector)] == ["switch:0"]


@pytest.mark.parametrize("method", ["NotifyStatus", "NotifyFullStatus"])
async def test_a_three_phase_meter_makes_a_row_for_each_of_its_phases(make, method):
    collector = make()
    feed(
        collector, notify({"em:0": EM, "emdata:0": EMDATA}, METER, method), NOON + 0.21
    )
    found = taken(collector)
    assert found == [Row(NOON, METER, *values) for values in PHASES]
    assert all(type(value) is float for row in found for value in row[3:])


async def test_an_answer_to_get_status_makes_a_row_for_each_phase(make):
    collector = make()
    result = {
        "em:0": EM | {"user_calibrated_phase": []},
        "emdata:0": EMDATA,
        "sys": {"unixtime": 1},
    }
    feed(collector, {"id": 2, "src": METER, "dst": "collector", "result": result}, NOON)
    assert taken(collector) == [Row(NOON, METER, *values) for values in PHASES]


async def test_a_clamp_makes_a_row_under_the_number_in_its_key(make):
    collector = make()
    first = {
        "id": 0,
        "current": 0.02,
        "voltage": 224.6,
        "act_power": 0.0,
        "aprt_power": 4.6,
        "pf": 0.0,
        "freq": 50.0,
    }
    second = {
        "id": 0,
        "current": 22.78,
        "voltage": 224.6,
        "act_power": -5080.3,
        "calibration": "factory",
    }
    counters = {
        "em1data:0": {"id": 0, "total_act_energy": 0.0, "total_act_ret_energy": 0.0},
        "em1data:1": {
            "id": 1,
            "total_act_energy": 6644.9,
            "total_act_ret_energy": 2595.26,
        },
    }
    feed(
        collector,
        notify(
            {"em1:0": first, "em1:1": second, **counters}, METER, "NotifyFullStatus"
        ),
        NOON,
    )
    assert taken(collector) == [
        Row(NOON, METER, "em1:0", 0.0, 224.6, 0.02, 0.0, 0.0),
        Row(NOON, METER, "em1:1", -5080.3, 224.6, 22.78, 6644.9, 2595.26),
    ]


@of_both_kinds
async def test_a_delta_of_either_half_is_laid_over_what_was_known(make, meter):
    collector = make()
    feed(collector, meter.says(**POWER, **COUNTER), NOON)
    deltas = [
        {"act_power": -7},
        {"current": 0.25},
        {"voltage": 231},
        {"total_act_energy": 1001},
        {"act_power": -8},
    ]
    deltas[-1]["total_act_ret_energy"] = 51
    for minute, delta in enumerate(deltas, 1):
        feed(collector, meter.says(**delta), NOON + 60 * minute)
    assert values_taken(collector)[1:] == [
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
    assert [(row.channel, row.apower_w) for row in taken(collector)] == [
        ("em:0:b", 5.0)
    ]
    feed(
        collector,
        notify({"em:0": {"id": 0, "total_act_power": 9.0, "n_current": None}}, METER),
        NOON + 61,
    )
    feed(collector, notify({"emdata:0": {"id": 0, "total_act": 9.0}}, METER), NOON + 61)
    assert not taken(collector)


@pytest.mark.parametrize("method", ["NotifyFullStatus", None], ids=["whole", "answer"])
@of_both_kinds
async def test_neither_half_of_a_full_status_takes_values_of_the_other_away(
    make, meter, method
):
    collector = make()
    feed(collector, meter.says(**POWER, **COUNTER), NOON)
    feed(
        collector,
        meter.says(method, act_power=7.0, voltage=231.0, current=0.1),
        NOON + 60,
    )
    feed(
        collector,
        meter.says(method, total_act_energy=1010.0, total_act_ret_energy=51.0),
        NOON + 120,
    )
    assert values_taken(collector)[1:] == [
        (60, 7.0, 231.0, 0.1, 1000.0, 50.0),
        (120, 7.0, 231.0, 0.1, 1010.0, 51.0),
    ]


@pytest.mark.parametrize("method", ["NotifyFullStatus", None], ids=["whole", "answer"])
@of_both_kinds
async def test_a_full_status_replaces_each_half_that_it_holds(make, meter, method):
    collector = make()
    feed(collector, meter.says(**POWER, **COUNTER), NOON)
    taken(collector)
    feed(
        collector,
        meter.says(method, act_power=7.0, current=0.1, total_act_energy=1010.0),
        NOON + 60,
    )
    # The old voltage is gone.
    assert not taken(collector)
    feed(collector, meter.says(voltage=231.0), NOON + 61)
    assert values_taken(collector) == [(60, 7.0, 231.0, 0.1, 1010.0, None)]
    feed(collector, meter.says(method, total_act_ret_energy=51.0), NOON + 120)
    # Here the old counter is gone.
    assert not taken(collector)
    feed(collector, meter.says(total_act_energy=1011.0), NOON + 121)
    assert values_taken(collector) == [(120, 7.0, 231.0, 0.1, 1011.0, 51.0)]


@pytest.mark.parametrize(
    ("field", "place"), [("voltage", 2), ("current", 3), ("total_act_energy", 4)]
)
@of_both_kinds
async def test_null_takes_a_value_away_and_the_row_waits(make, meter, field, place):
    collector = make()
    feed(collector, meter.says(**POWER, **COUNTER), NOON)
    taken(collector)
    feed(collector, meter.says(**{"act_power": 9.0, field: None}), NOON + 60)
    assert not taken(collector)
    feed(collector, meter.says(**{field: 3.0}), NOON + 61)
    expected = [60, 9.0, 230.0, 0.5, 1000.0, 50.0]
    expected[place] = 3.0
    assert values_taken(collector) == [tuple(expected)]


@pytest.mark.parametrize(
    "bad", ["230", True, [], {"total": 1}, 1e200, 1e400, -1e13, 10**400]
)
@pytest.mark.parametrize("field", [*POWER, *COUNTER])
@of_both_kinds
async def test_a_half_that_cannot_be_read_is_passed_over_and_named_and_all_else_counts(
    make, caplog, meter, field, bad
):
    collector = make()
    feed(collector, meter.says(**POWER, **COUNTER), NOON)
    taken(collector)
    good, other = (COUNTER, POWER) if field in COUNTER else (POWER, COUNTER)
    frame = meter.says(**({name: 77.0 for name in good} | {field: bad}))
    text = json.dumps(
        frame | {"params": frame["params"] | minute_frame(channel=3)["params"]}
    )
    feed(collector, text.replace("Infinity", "1e400"), NOON + 60)
    assert [row.channel for row in taken(collector)] == ["switch:3"]
    (line,) = caplog.messages
    key = meter.data_component if field in COUNTER else meter.component
    assert f"{METER} {key}: passed over" in line and meter.prefix + field in line
    # Nothing of the unreadable half is kept. The other half of the same frame counts.
    feed(
        collector,
        meter.says(**{name: 5.0 for name in other}, **{field: "?"}),
        NOON + 61,
    )
    known = POWER | COUNTER | dict.fromkeys(other, 5.0)
    assert values_taken(collector) == [
        (60, *(known[name] for name in ("act_power", "voltage", "current", *COUNTER)))
    ]


async def test_odd_values_in_unused_fields_do_no_harm(make, caplog):
    collector = make()
    odd = {
        "n_current": "x",
        "total_act_power": 1e200,
        "a_pf": True,
        "user_calibrated_phase": None,
        "id": "0",
    }
    feed(
        collector,
        notify({"em:0": EM | odd, "emdata:0": EMDATA | {"total_act": "x"}}, METER),
        NOON,
    )
    assert [row[2:] for row in taken(collector)] == PHASES and not caplog.messages


@pytest.mark.parametrize(
    "key",
    [
        "em:0:a",
        "em:0:b",
        "em:",
        "em:x",
        "em:00",
        "em:-1",
        "em",
        "em:0 ",
        "em1:",
        "em1:01",
        "em1:0:a",
        "em1data",
        "emdata:0:a",
        "em2:0",
        "pm1data:0",
        "switchdata:0",
    ],
)
async def test_keys_that_no_meter_has_are_passed_over_and_the_others_count(make, key):
    collector = make()
    every = EM | EMDATA | POWER | COUNTER | {"apower": 1.0, "aenergy": {"total": 1.0}}
    absent = {"em1:5": None, "em:5": None}
    feed(
        collector,
        notify({key: every, **absent, "em1:1": POWER, "em1data:1": COUNTER}, METER),
        NOON,
    )
    expire(collector)
    assert [row.channel for row in taken(collector)] == ["em1:1"]


@pytest.mark.parametrize("text", ['"text"', "[]", "7", "true"])
async def test_a_meter_that_is_no_object_is_passed_over_and_named(make, caplog, text):
    collector = make()
    for key in ("em:0", "emdata:0", "em1:0", "em1data:0"):
        frame = json.dumps(
            notify({key: "?", "em1:1": POWER, "em1data:1": COUNTER}, METER)
        ).replace('"?"', text)
        feed(collector, frame, NOON)
        assert f"{METER} {key}: passed over" in caplog.messages[-1]
    assert [row.channel for row in taken(collector)] == ["em1:1"] and len(
        caplog.messages
    ) == 4


async def test_the_field_names_of_another_kind_are_not_taken(make):
    collector = make()
    switch = {
        "apower": 1.0,
        "voltage": 230.0,
        "current": 0.1,
        "aenergy": {"total": 1.0},
        "ret_aenergy": {"total": 1.0},
    }
    feed(
        collector,
        notify(
            {"em:0": switch, "em1:0": switch, "emdata:0": switch, "em1data:0": switch},
            METER,
        ),
        NOON,
    )
    feed(
        collector,
        notify(
            {
                "em1:1": EM,
                "em1data:1": EMDATA,
                "switch:0": POWER | COUNTER,
                "em:1": POWER,
            },
            METER,
        ),
        NOON,
    )
    # Each half has the counters or powers of the other one.
    feed(
        collector, notify({"em1:2": POWER | COUNTER, "em:2": EM | EMDATA}, METER), NOON
    )
    assert not taken(collector)


async def test_the_relay_of_a_pro_em_50_never_makes_a_row(make):
    collector, meter = make(), sim.ProEM50("shellyproem50-a1b2c3d4e5f6")
    relay = meter.parts[-1]
    for minute in range(3):
        feed(collector, meter.full_status(), NOON + 60 * minute)
        feed(collector, meter.notify(relay.change()[0]), NOON + 60 * minute + 30)
    expire(collector)
    assert {row.channel for row in taken(collector)} == {"em1:0", "em1:1"}


async def test_the_setting_channels_goes_by_the_number_of_a_meter(make):
    everything = {"em:0": EM, "emdata:0": EMDATA, **minute_frame(channel=1)["params"]}
    everything |= {f"em1:{n}": POWER for n in range(3)} | {
        f"em1data:{n}": COUNTER for n in range(3)
    }
    for wanted, kept in (
        ("0", ["em1:0", "em:0:a", "em:0:b", "em:0:c"]),
        ("1", ["em1:1", "switch:1"]),
        ("0,2", ["em1:0", "em1:2", "em:0:a", "em:0:b", "em:0:c"]),
        ("", ["em1:0", "em1:1", "em1:2", "em:0:a", "em:0:b", "em:0:c", "switch:1"]),
    ):
        collector = make(CHANNELS=wanted)
        feed(collector, notify(everything, METER), NOON)
        assert sorted(row.channel for row in taken(collector)) == kept


def optional_fields(*names):
    return st.fixed_dictionaries({}, optional={name: numbers for name in names})


meter_parts = st.fixed_dictionaries(
    {},
    optional={
        "em:0": optional_fields(*(f"{p}_{name}" for p in "abc" for name in POWER)),
        "emdata:0": optional_fields(
            *(f"{p}_{name}" for p in "abc" for name in COUNTER)
        ),
        "em1:0": optional_fields(*POWER),
        "em1data:0": optional_fields(*COUNTER),
    },
)


MAY_BE_LACKING = {
    (channel, field, 0.0)
    for channel in ("em1:0", "em:0:a", "em:0:b", "em:0:c")
    for field in ("voltage", "current", "total_act_energy")
}


def values_of(components):
    """The channel, field and number of each value that a frame holds."""
    for key, fields in components.items():
        for name, value in fields.items():
            phase, _, field = (
                name.partition("_") if key in ("em:0", "emdata:0") else (None, "", name)
            )
            with contextlib.suppress(OverflowError, TypeError, ValueError):
                yield f"em:0:{phase}" if phase else "em1:0", field, float(value)


@pytest.mark.slow
async def test_only_finite_numbers_of_the_same_phase_and_field_become_values(make):
    made = 0
    frames = st.tuples(
        meter_parts,
        st.sampled_from(["NotifyStatus", "NotifyFullStatus"]),
        st.floats(0, 90),
    )

    @hypothesis_settings(max_examples=300, deadline=None)
    @given(history=st.lists(frames, max_size=15))
    def rows_hold_only_what_was_sent(history):
        nonlocal made
        collector, now, sent = make(), NOON, set()
        for components, method, pause in history:
            now += pause
            sent |= set(values_of(components))
            if now - NOON >= 60:
                # What two whole statuses a minute apart lack is stored as 0.
                sent |= MAY_BE_LACKING
            with contextlib.suppress(ValueError):
                feed(collector, json.dumps(notify(components, METER, method)), now)
        found = taken(collector)
        assert len({row[:3] for row in found}) == len(found)
        for row in found:
            for field, value in zip([*POWER, *COUNTER], row[3:], strict=True):
                assert (row.channel, field, value) in sent or (
                    value is None and field == "total_act_ret_energy"
                )
        made += len(found)

    rows_hold_only_what_was_sent()
    assert made > 20


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
async def test_a_row_holds_what_a_switch_gave_back_and_never_waits_for_it(
    make, caplog, kind, returned, value
):
    collector = make()
    whole = {
        "apower": 100.0,
        "voltage": 230.0,
        "current": 0.5,
        "aenergy": {"total": 1000.0},
    }
    # It is not asked for, either.
    assert not feed(collector, notify({f"{kind}:0": whole}, METER), NOON)
    feed(
        collector,
        notify({f"{kind}:0": {"apower": -1.0, "ret_aenergy": returned}}, METER),
        NOON + 60,
    )
    assert values_taken(collector) == [
        (0, 100.0, 230.0, 0.5, 1000.0, None),
        (60, -1.0, 230.0, 0.5, 1000.0, value),
    ]
    assert not caplog.messages


async def test_what_a_switch_gave_back_is_laid_over_replaced_and_taken_away_like_any_value(
    make,
):
    collector = make()
    whole = {
        "apower": 100.0,
        "voltage": 230.0,
        "current": 0.5,
        "aenergy": {"total": 1000.0},
    }
    gives = [
        ("NotifyStatus", {**whole, "ret_aenergy": {"total": 7.0}}, 7.0),
        ("NotifyStatus", {"apower": 1.0}, 7.0),
        ("NotifyStatus", {"ret_aenergy": {"total": 8.0}}, 8.0),
        ("NotifyStatus", {"ret_aenergy": None}, None),
        ("NotifyStatus", {"ret_aenergy": {"total": 9.0}}, 9.0),
        ("NotifyFullStatus", whole, None),
    ]
    for minute, (method, fields, _) in enumerate(gives):
        feed(
            collector,
            notify({"switch:0": {"apower": 1.0, **fields}}, METER, method),
            NOON + 60 * minute,
        )
    assert [row.energy_returned_wh for row in taken(collector)] == [
        value for *_, value in gives
    ]


@pytest.mark.parametrize(
    "bad", ["x", [], {"total": "1"}, {"total": True}, {"total": 1e13}, {"total": 1e400}]
)
async def test_a_switch_whose_returned_energy_cannot_be_read_is_passed_over_and_named(
    make, caplog, bad
):
    collector = make()
    frame = json.dumps(minute_frame(METER, ret_aenergy=bad)).replace(
        "Infinity", "1e400"
    )
    feed(collector, frame, NOON)
    assert not taken(collector)
    (line,) = caplog.messages
    assert f"{METER} switch:0: passed over" in line and "ret_aenergy" in line
