"""From a text to known status: deltas, whole statuses, answers, and what is no reading."""

import contextlib
import json
import math

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support import DEVICE, Row, expire, feed, minute_frame, notify, taken

NOON = 1_795_435_200.0  # a full minute
WHOLE = {"apower": 100.0, "voltage": 230.0, "current": 0.5, "aenergy": {"total": 1000.0}}


def row(collector, values):
    return [(r.channel, *r[3:7]) for r in taken(collector)] == values


async def test_a_minute_frame_becomes_a_row_with_the_values_that_the_device_sent(make):
    collector = make()
    feed(collector, minute_frame(), NOON + 0.02)
    assert taken(collector) == [Row(NOON, DEVICE, "switch:0", 433.8, 228.2, 2.631, 1234.567, 0.0)]


async def test_a_delta_is_laid_over_what_was_known(make):
    collector = make()
    feed(collector, minute_frame(), NOON)
    feed(collector, notify({"switch:0": {"apower": 50}}), NOON + 30)
    feed(collector, notify({"switch:0": {"current": 0.25}}), NOON + 60)
    assert [r[3:7] for r in taken(collector)] == [(433.8, 228.2, 2.631, 1234.567), (50.0, 228.2, 0.25, 1234.567)]


async def test_a_whole_status_replaces_what_was_known(make):
    collector = make()
    feed(collector, minute_frame(), NOON)
    taken(collector)
    feed(collector, notify({"switch:0": {"apower": 7.0, "current": 0.1}}, method="NotifyFullStatus"), NOON + 60)
    assert taken(collector) == []  # the old voltage and energy are gone, so this row waits
    feed(collector, notify({"switch:0": {"voltage": 231.0, "aenergy": {"total": 5.0}}}), NOON + 61)
    assert [r[3:7] for r in taken(collector)] == [(7.0, 231.0, 0.1, 5.0)]


async def test_the_answer_to_get_status_counts(make):
    collector = make()
    answer = {"id": 2, "src": DEVICE, "dst": "collector", "result": {"sys": {"unixtime": 1}, "switch:3": WHOLE}}
    feed(collector, answer, NOON)
    assert [(r.channel, r.apower_w) for r in taken(collector)] == [("switch:3", 100.0)]
    answer["result"]["switch:3"] = {"apower": 7.0}  # it replaces what was known
    feed(collector, answer, NOON + 60)
    assert taken(collector) == [] and collector.channels[DEVICE + "switch:3"].values == [7.0, None, None, None, None]


async def test_a_frame_with_id_and_method_is_a_notification(make):
    collector = make()
    feed(collector, {"id": 7, **notify({"switch:0": WHOLE}, "ShellyWallDisplay-00082216C97B")}, NOON)
    assert [r.device_id for r in taken(collector)] == ["ShellyWallDisplay-00082216C97B"]


async def test_frames_without_readings_are_normal(make):
    collector = make()
    feed(collector, {"id": 1, "src": DEVICE, "dst": "collector", "error": {"code": 404, "message": "No handler"}}, NOON)
    feed(collector, {"src": DEVICE, "method": "NotifyEvent", "params": {"events": [{"component": "input:0"}]}}, NOON)
    feed(collector, notify({"ws": {"connected": True}}), NOON)
    assert not taken(collector) and not collector.channels


@pytest.mark.parametrize("kind", ["pm1", "cover", "light"])
async def test_other_metered_components_make_rows(make, kind):
    collector = make()
    feed(collector, notify({f"{kind}:0": WHOLE, "switch:0": WHOLE}), NOON)
    assert sorted(r.channel for r in taken(collector)) == [f"{kind}:0", "switch:0"]


async def test_a_switch_without_a_meter_never_makes_a_row(make):
    collector = make()
    relay = {"id": 0, "source": "init", "output": True, "temperature": {"tC": 40}}
    for minute in range(3):
        feed(collector, notify({"switch:0": relay}, method="NotifyFullStatus"), NOON + 60 * minute)
    expire(collector)
    assert not taken(collector) and not collector.channels


async def test_negative_power_keeps_its_sign_and_whole_numbers_become_floats(make):
    collector = make()
    feed(collector, notify({"switch:0": {"apower": -250, "voltage": 230, "current": 1, "aenergy": {"total": 9}}}), NOON)
    (kept,) = taken(collector)
    assert kept[3:7] == (-250.0, 230.0, 1.0, 9.0) and all(type(value) is float for value in kept[3:7])


@pytest.mark.parametrize("bad", [True, "230", [], {}, {"total": 1}, 1e400, 1.01e9, -1e10, 10**400])
@pytest.mark.parametrize("field", ["apower", "voltage", "current", "aenergy", "total"])
async def test_a_component_that_no_meter_sends_is_passed_over_and_named_and_the_others_count(make, caplog, bad, field):
    if field == "aenergy" and isinstance(bad, dict):
        return  # that is one
    bad = bad * 1000 if field == "total" and isinstance(bad, float) else bad
    collector = make()
    feed(collector, minute_frame(), NOON)
    component = {"apower": 1.0, "aenergy": {"total": bad}} if field == "total" else {"current": 1.0, field: bad}
    text = json.dumps(notify({"switch:0": component, "switch:1": WHOLE})).replace("Infinity", "1e400")
    feed(collector, text, NOON + 60)
    assert [r.channel for r in taken(collector)] == ["switch:0", "switch:1"]
    (line,) = caplog.messages
    assert DEVICE in line and "switch:0" in line and f"`$.{'aenergy.' * (field == 'total')}{field}`" in line
    feed(collector, notify({"switch:0": {"apower": 5.0}}), NOON + 61)
    assert [r[3:7] for r in taken(collector)] == [(5.0, 228.2, 2.631, 1234.567)]


async def test_each_component_that_is_passed_over_is_named_once_a_minute(make, caplog):
    collector = make()
    for _ in range(2):
        feed(collector, notify({"switch:0": {"apower": "x"}, "switch:1": {"apower": 1e200}, "switch:2": WHOLE}), NOON)
    assert [
        DEVICE + " " + key in line for key, line in zip(("switch:0", "switch:1"), caplog.messages, strict=True)
    ] == [True] * 2


@pytest.mark.parametrize(
    "gone", [{"voltage": None}, {"current": None}, {"aenergy": None}, {"aenergy": {"total": None}}]
)
async def test_null_takes_a_value_away(make, gone):
    collector = make()
    feed(collector, minute_frame(), NOON)
    taken(collector)
    feed(collector, notify({"switch:0": {"apower": 9.0, **gone}}), NOON + 60)
    assert not taken(collector)  # the row waits for what is no longer known
    feed(collector, notify({"switch:0": {"voltage": 1.0, "current": 2.0, "aenergy": {"total": 3.0}}}), NOON + 61)
    (kept,) = taken(collector)
    old, new = (9.0, 228.2, 2.631, 1234.567), (9.0, 1.0, 2.0, 3.0)
    lost = ["voltage", "current", "aenergy"].index(next(iter(gone))) + 1
    assert kept[3:7] == tuple(new[n] if n == lost else old[n] for n in range(4))


async def test_an_errored_meter_makes_no_row_until_it_has_a_power_again(make):
    collector = make()
    feed(collector, minute_frame(), NOON)
    broken = {"apower": None, "voltage": None, "current": None, "errors": ["power_meter_failure"]}
    feed(collector, notify({"switch:0": broken}), NOON + 60)
    feed(collector, notify({"switch:0": {"aenergy": {"total": 1240.0}}}), NOON + 120)
    expire(collector)
    assert len(taken(collector)) == 1  # neither 0 nor the last power again
    feed(collector, minute_frame(apower=3.0), NOON + 180)
    assert [r.apower_w for r in taken(collector)] == [3.0]


MALFORMED = [
    "", "no json", "[]", "1", "null", "{}", '{"src":1,"method":"NotifyStatus","params":{}}',
    '{"method":"NotifyStatus","params":{}}', '{"src":"x","method":"NotifyStatus"}',
    '{"src":"x","method":"NotifyStatus","params":[]}', '{"src":"x","result":3}', "[" * 100_000 + "]" * 100_000,
    '{"src":"x","method":"NotifyStatus","params":{"switch:0":{"apower":NaN}}}',
    '{"src":"x","method":"NotifyStatus","params":{"switch:0":{"apower":-Infinity}}}',
    '{"params":{"a":' + "[" * 100_000 + "]" * 100_000 + "}}",
    '{"src":"\\ud800","method":"NotifyStatus","params":{}}',
    b'{"src":"\xff","method":"NotifyStatus","params":{}}',
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
async def test_malformed_frames_are_refused_with_a_reason(make, text):
    collector = make()
    with pytest.raises((ValueError, RecursionError)):
        feed(collector, text, NOON)
    assert not taken(collector) and not collector.channels


async def test_a_device_id_of_100_bytes_is_one(make):
    collector = make()
    feed(collector, minute_frame("ж" * 50), NOON)
    assert [r.device_id for r in taken(collector)] == ["ж" * 50]


@pytest.mark.parametrize("device", ["", "x" * 101, "a\nb", "a\0b", "a\x1b[2J", "a\u2028b", "\u202egnp", "ж" * 51])
async def test_a_device_id_that_the_table_or_the_log_could_not_bear_is_refused(make, device):
    collector = make()
    with pytest.raises(ValueError):
        feed(collector, minute_frame(device), NOON)
    assert not taken(collector) and not collector.channels


@pytest.mark.parametrize("key", ["switch:", "switch:-1", "switch:1.5", "switch:01", "switch:99999", "switch:١", "switch",
                                 "switch:0\n", " switch:0", "em1:0", "switch:0:0"])  # fmt: skip
async def test_a_channel_that_is_no_small_whole_number_is_passed_over_and_the_others_count(make, key):
    collector = make()
    feed(collector, notify({key: WHOLE, "switch:1": "text", "switch:2": None, "switch:3": WHOLE}), NOON)
    assert [r.channel for r in taken(collector)] == ["switch:3"]


odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400), st.lists(st.integers())
)


def mostly(right):
    """Right nine times of ten, so that rows are made of it; else anything."""
    return st.sampled_from([right] * 9 + [odd]).flatmap(lambda strategy: strategy)


numbers = mostly(st.floats(-1e9, 1e9))
energy = mostly(st.fixed_dictionaries({"total": numbers}))
components = st.fixed_dictionaries(
    {"apower": numbers}, optional={"voltage": numbers, "current": numbers, "aenergy": energy, "output": odd}
)
parts = mostly(st.dictionaries(st.sampled_from(["ts", "switch:0", "switch:1", "pm1:0"]), components, min_size=1))
methods = mostly(st.sampled_from(["NotifyStatus", "NotifyFullStatus", "NotifyEvent"]))
devices = mostly(st.one_of(st.sampled_from([DEVICE, "other-1"]), st.text(max_size=120)))
frames = st.one_of(
    st.fixed_dictionaries({"src": devices, "method": methods, "params": parts}, optional={"id": odd, "result": parts}),
    st.fixed_dictionaries({"src": devices, "result": parts, "id": odd}, optional={"method": st.none()}),
)


def finite_numbers(value):
    """Every finite number in a frame, as a float."""
    if isinstance(value, dict):
        return set().union(*map(finite_numbers, value.values())) if value else set()
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            return set()
        return {number} if math.isfinite(number) else set()
    return set()


async def test_whatever_comes_only_finite_numbers_that_the_device_sent_become_rows(make):
    made = 0

    @hypothesis_settings(max_examples=400, deadline=None)
    @given(history=st.lists(st.tuples(frames, st.floats(0, 200)), max_size=12))
    def rows_hold_only_what_was_sent(history):
        nonlocal made
        collector, now, sent = make(), NOON, set()
        for frame, pause in history:
            now += pause
            sent |= finite_numbers(frame)
            with contextlib.suppress(ValueError):
                feed(collector, json.dumps(frame), now)
        rows = taken(collector)
        keys = [(r.device_id, r.channel, r.time) for r in rows]
        assert len(set(keys)) == len(keys)
        for r in rows:
            assert all(type(value) is float and value in sent for value in r[3:7])
            assert 0 < len(r.device_id.encode()) <= 100 and r.channel in collector.kept[0]
        made += len(rows)

    rows_hold_only_what_was_sent()
    assert made > 20


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(), st.binary(), st.recursive(numbers, st.lists).map(json.dumps)))
async def test_no_text_does_more_than_raise_a_value_error(make, text):
    collector = make()
    try:
        feed(collector, text, NOON)
    except ValueError:
        pass
    assert not taken(collector)


async def test_an_empty_answer_and_a_request_are_normal_and_an_event_is_no_reading(make):
    collector = make()
    feed(collector, {"id": 1, "src": DEVICE, "dst": "collector", "result": {}}, NOON)
    feed(collector, {"id": 1, "src": DEVICE, "method": "Shelly.GetDeviceInfo"}, NOON)
    feed(collector, notify({"switch:0": WHOLE}, method="NotifyEvent"), NOON)
    feed(collector, notify({"switch:0": WHOLE}) | {"result": {"switch:1": WHOLE}}, NOON)
    assert [r.channel for r in taken(collector)] == ["switch:0"]
