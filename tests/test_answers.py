"""The questions of schema.sql, against a real PostgreSQL: written from the contract, beside the SQL and not after it."""

import itertools
import os
import random
import re
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import psycopg
import pytest

from support import NUMBERS, ROOT, execute, query, sql_of_docs

NOON = datetime(2026, 11, 3, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
WIDE = {"since": NOON - DAY, "until": NOON + 2 * DAY}
COLUMNS = (
    "timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh"
)
ORDER = {
    "power_cycles": "started_at",
    "energy_by_day": "day",
    "energy_by_month": "month",
    "coverage": "first_row",
    "gaps": "began_at",
    "power_series": "bucket",
}
QUESTIONS = {
    "power_cycles": ("since until gap min_duration min_power_w row_length",
        "device_id channel started_at ended_at ongoing complete energy_wh mean_w max_w mean_a median_v"),
    "energy_by_day": ("since until zone", "device_id channel day energy_wh rows energy_returned_wh"),
    "energy_by_month": ("since until zone", "device_id channel month energy_wh rows energy_returned_wh"),
    "coverage": ("since until row_length min_power_w", "device_id channel first_row last_row rows missing longest_gap resets from_memory"),
    "gaps": ("since until row_length min_power_w", "device_id channel kind began_at ended_at missing"),
    "power_series": ("since until step", "device_id channel bucket mean_w max_w rows"),
    "newest_rows": ("", "device_id channel name timestamp apower_w energy_total_wh"),
    "channels": ("", "device_id channel name timestamp apower_w energy_total_wh device_name"),
}  # fmt: skip


class Table:
    """power_logs in a transaction that is rolled back; the first question makes it read-only.

    With `quarters`, the first question is asked when they are made."""

    def __init__(self, conn, quarters):
        self.conn = conn
        self.quarters = quarters

    def store(self, rows):
        """Rows of COLUMNS; what was given back may follow."""
        columns = f"{COLUMNS}, energy_returned_wh"
        with self.conn.cursor().copy(f"COPY power_logs ({columns}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row if len(row) == 8 else (*row, None))

    def put(
        self,
        watts,
        device="a",
        channel="switch:0",
        start=NOON,
        every=60,
        wh=1000.0,
        **given,
    ):
        """A row each `every` seconds; the counter rises by the power, or is given. (5,): 5 W, but the row is lost."""
        rows = []
        for n, power in enumerate(watts):
            watt = power[0] if isinstance(power, tuple) else power
            if watt is power:
                others = ("volts", 230), ("amps", 1), ("counter", wh), ("back", None)
                values = [
                    given[name][n] if name in given else other for name, other in others
                ]
                rows.append(
                    (
                        start + n * timedelta(seconds=every),
                        device,
                        channel,
                        watt,
                        *values,
                    )
                )
            wh += max(watt, 0) * every / 3600
        self.store(rows)

    def ask(self, question, columns="*", **given):
        arguments = ", ".join(f"{name} => %({name})s" for name in given)
        order = ", ".join(["device_id", "channel", *ORDER.get(question, "").split()])
        if self.quarters:
            self.make_quarters()
        self.conn.execute("SET LOCAL transaction_read_only = on")
        return self.conn.execute(
            f"SELECT {columns} FROM {question}({arguments}) ORDER BY {order}", given
        ).fetchall()

    def make_quarters(self):
        self.quarters = False
        progress = ""
        while progress != "all made":
            (progress,) = self.conn.execute("SELECT make_quarters()").fetchone()

    def runs(self, *more, **given):
        """(first minute, last minute, Wh, more columns) of each run, minutes since NOON."""
        columns = ", ".join(["started_at", "ended_at", "energy_wh", *more])
        found = self.ask("power_cycles", columns, **(WIDE | given))
        return [
            ((began - NOON) / MINUTE, (ended - NOON) / MINUTE, *rest)
            for began, ended, *rest in found
        ]

    def now(self):
        return self.conn.execute("SELECT date_trunc('minute', now())").fetchone()[0]


@pytest.fixture(scope="module")
def prepared():
    """One database for all tests of a process, with the schema."""
    name = f"answers_{os.getpid()}_{next(NUMBERS)}"
    with psycopg.connect(os.environ["TEST_DATABASE_URL"], autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name}")
        url = psycopg.conninfo.make_conninfo(
            os.environ["TEST_DATABASE_URL"], dbname=name
        )
        with psycopg.connect(url, autocommit=True) as own:
            own.execute((ROOT / "schema.sql").read_bytes())
        yield url
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["rows", "quarters"])
def table(prepared, request):
    """Each question has the same answer from rows as from quarters of an hour."""
    with psycopg.connect(prepared, options="-c timezone=UTC") as conn:
        yield Table(conn, request.param == "quarters")
        conn.rollback()


def lost(count, watts=0):
    return [(watts,)] * count


def near(rows):
    """The rows, their numbers about the same."""
    return [
        tuple(pytest.approx(x, abs=1e-6) if type(x) in (int, float) else x for x in row)
        for row in rows
    ]


def minutes(count):
    return timedelta(minutes=count)


ON, OFF = [1200], [0]  # 1,200 W are 20 Wh a minute


@pytest.mark.parametrize(
    ("watts", "given", "expected"),
    [(OFF * 5 + ON * 15 + OFF * 5, {}, [(5, 20, 300)]),
     (ON * 15, {}, [(0, 15, 300)]),  # rows only while running: the last one stands for its minute
     (ON * 15 + lost(600) + ON * 15, {}, [(0, 15, 300), (615, 630, 300)]),
     (ON * 15 + lost(600, 3) + ON * 15, {}, [(0, 15, 300), (615, 630, 300)]),  # standby that nobody stored
     # gaps
     (ON * 5 + lost(2, 1200) + ON * 5 + OFF, {}, [(0, 12, 240)]),
     (ON * 5 + lost(3, 1200) + ON * 5 + OFF, {}, [(0, 5, 100), (8, 13, 100)]),
     (ON * 5 + lost(4, 1200) + ON * 5 + OFF, {}, [(0, 5, 100), (9, 14, 100)]),
     (ON * 5 + lost(4, 1200) + ON * 5 + OFF, {"gap": "5 minutes"}, [(0, 14, 280)]),
     (ON * 5 + lost(1, 1200) + ON * 5 + OFF, {"gap": "1 minute"}, [(0, 5, 100), (6, 11, 100)]),
     (ON * 5 + OFF * 2 + ON * 5 + OFF, {}, [(0, 12, 200)]),
     (ON * 5 + OFF * 3 + ON * 5 + OFF, {}, [(0, 5, 100), (8, 13, 100)]),
     (ON * 5 + OFF, {"gap": "0"}, [(0, 5, 100)]),  # next to each other is one run all the same
     # noise
     (OFF + ON + OFF, {}, []),
     (OFF + ON * 2 + OFF, {}, [(1, 3, 40)]),
     (OFF + ON + OFF, {"min_duration": "1 minute"}, [(1, 2, 20)]),
     (OFF + ON * 9 + OFF, {"min_duration": "10 minutes"}, []),
     # the floor, which itself does not run
     ([9] * 30, {}, []),
     ([99] * 30, {"min_power_w": 100}, []),
     ([11] * 30, {}, [(0, 30, 5.5)]),
     ([3] * 5 + ON * 5 + [3] * 30 + ON * 5 + [3] * 5, {}, [(5, 10, 100), (40, 45, 100)]),
     ([3] * 5 + ON * 5 + [3] * 5, {"min_power_w": 2}, [(0, 15, 100.5)])],
)  # fmt: skip
def test_what_is_one_run_and_how_much_it_took(table, watts, given, expected):
    table.put(watts)
    assert table.runs(**given) == near(expected)


@pytest.mark.parametrize(
    ("watts", "counter", "every", "given", "expected"),
    [(OFF * 6, [0, 0, 15, 30, 30, 30], 60, {}, [(1, 3, 30)]),
     (OFF * 3, [0, 50, 50], 300, {"row_length": "5 minutes"}, [(0, 5, 50)]),
     (OFF * 4, [0, .1, .2, .3], 60, {}, []),  # 6 W
     ([10] * 9, [1000] * 9, 60, {}, []),  # exactly the floor
     ([-10] * 9, [1000] * 9, 60, {}, []),
     (OFF + lost(2) + OFF, [0, None, None, 30], 60, {"min_duration": "1 minute"}, [(0, 1, 30)]),
     (OFF + lost(4) + OFF, [0, *[None] * 4, 30], 60, {"min_duration": "1 minute"}, []),  # when, nobody knows
     (OFF * 4, [1_400_000, 0, 1_400_000, 1_400_000], 60, {"min_duration": "1 minute"}, []),  # it only came back
     (ON * 5 + OFF, [1000, 1020, 0, 20, 40, 60], 60, {}, [(0, 5, 80)]),  # set to 0
     (ON * 5 + OFF, [1000, 1020, 1010, 1030, 1050, 1070], 60, {}, [(0, 5, 80)]),  # its last digits lost
     (ON * 5 + OFF, [1.4e6, 1.4e6 + 20, 0, 1.4e6 + 60, 1.4e6 + 80, 1.4e6 + 100], 60, {}, [(0, 5, 60)])],
)  # fmt: skip
def test_what_the_counter_tells_of_a_run(table, watts, counter, every, given, expected):
    table.put(watts, every=every, counter=counter)
    assert table.runs(**given) == near(expected)


@pytest.mark.parametrize(
    ("watts", "every", "given", "expected"),
    [(OFF + ON * 3 + OFF, 300, {}, [(5, 20, 300)]),
     (ON * 3, 300, {}, [(0, 15, 300)]),
     (ON * 3 + OFF, 300, {}, [(0, 15, 300)]),  # a closing row
     (ON * 3 + lost(60, 3) + ON * 3 + OFF, 300, {}, [(0, 15, 300), (315, 330, 300)]),
     (ON * 2 + lost(1, 1200) + ON * 2 + OFF, 300, {}, [(0, 10, 200), (15, 25, 200)]),
     (ON * 2 + lost(1, 1200) + ON * 2 + OFF, 300, {"gap": "10 minutes"}, [(0, 25, 500)]),
     (OFF + ON * 3 + OFF, 300, {"row_length": "1 minute"}, []),  # three single minutes
     (OFF + ON * 3 + OFF, 300, {"row_length": "4 minutes"}, [(5, 19, 300)]),  # one and a half of them is next to each other
     (OFF + ON * 3 + OFF, 300, {"row_length": "3 minutes"}, [(5, 8, 60), (10, 13, 60), (15, 18, 60)]),
     (ON * 4 + OFF, 30, {"row_length": "30 seconds"}, [(0, 2, 40)])],
)  # fmt: skip
def test_rows_of_another_length(table, watts, every, given, expected):
    table.put(watts, every=every)
    assert table.runs(**({"row_length": "5 minutes"} | given)) == near(expected)


def test_a_run_over_midnight_is_one(table):
    table.put(OFF + ON * 30 + OFF, start=NOON + 11 * HOUR + minutes(44))
    assert table.runs("complete") == near([(705, 735, 600, True)])


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [(-60, 60, [(0, 20, 400, True)]),
     (-1, 21, [(0, 20, 400, True)]),
     (5, 60, [(5, 20, 300, False)]),
     (-60, 15, [(0, 15, 300, False)]),
     (5, 15, [(5, 15, 200, False)]),
     (0, 60, [(0, 20, 400, False)]),
     (-60, 20, [(0, 20, 400, False)]),
     (19, 60, [(19, 20, 20, False)]),  # a minute of a long run is no noise
     (-60, 1, [(0, 1, 20, False)]),
     (20, 60, []),
     (-60, 0, [])],
)  # fmt: skip
def test_a_run_is_clipped_at_the_window(table, since, until, expected):
    table.put(ON * 20 + OFF * 60)
    assert table.runs(
        "complete", since=NOON + minutes(since), until=NOON + minutes(until)
    ) == near(expected)


@pytest.mark.parametrize(
    "window", [{"since": NOON + minutes(10)}, {"until": NOON + minutes(1)}]
)
def test_what_is_noise_is_told_by_the_whole_run_also_by_its_rows_outside_of_the_window(
    table, window
):
    rows = [*ON, *(lost(2, 1200) + ON) * 3]
    table.put(
        rows + ON + OFF if "since" in window else ON + lost(1, 1200) + rows + OFF
    )  # one minute is in the window
    ((began, ended, wh),) = table.runs(min_duration="10 minutes", **window)
    assert (ended - began, wh) == (1, pytest.approx(20))


def test_a_run_goes_on_after_the_window_also_by_its_counter(table):
    table.put(
        ON * 5 + lost(2) + OFF + lost(2) + OFF,
        counter=[*range(1000, 1100, 20), 0, 0, 1100, 0, 0, 1150],
    )
    assert table.runs("complete", until=NOON + minutes(7)) == near([(0, 7, 100, False)])


@pytest.mark.parametrize("since", [5, 6, 7])
def test_a_run_that_ended_before_the_window_is_not_in_it_though_the_next_row_is(
    table, since
):
    table.put(ON * 5 + lost(2) + OFF * 9)
    assert table.runs(since=NOON + minutes(since), min_duration="1 minute") == []


def test_an_ongoing_run_is_shown_however_short_and_ends_with_its_last_row(table):
    now = table.now()
    table.put(OFF + ON, "just begun", start=now - minutes(2))
    table.put(ON * 60, "going on", start=now - minutes(60))
    table.put(ON * 60, "over", start=now - minutes(65))
    table.put(OFF + ON + OFF, "noise", start=now - minutes(20))
    table.put(ON * 60, "its clock ahead", start=now - minutes(30))
    found = table.ask(
        "power_cycles", "device_id, ongoing, ended_at, energy_wh", until=now + HOUR
    )
    assert found == near([
        ("going on", True, now, 1200), ("its clock ahead", True, now + minutes(30), 1200),
        ("just begun", True, now, 20), ("over", False, now - minutes(5), 1200)])  # fmt: skip
    assert ("over", True) in table.ask(
        "power_cycles", "device_id, ongoing", gap="10 minutes"
    )
    assert dict(table.ask("power_cycles", "device_id, ended_at < now()"))[
        "going on"
    ]  # by default until now


def test_a_run_that_goes_on_after_the_window_is_not_complete(table):
    now = table.now()
    table.put(ON * 60, start=now - minutes(60))
    found = table.ask(
        "power_cycles", "complete, ended_at, energy_wh", until=now - minutes(30)
    )
    assert found == near([(False, now - minutes(30), 600)])


def test_means_maximum_and_median_are_those_of_the_running_rows(table):
    volts, amps = [240, 0, 229, 235, 240], [0, 4, 13, 8.5, 0]
    table.put(
        [0, 1000, 3000, 2000, 0], volts=volts, amps=amps, counter=[0, 0, 50, 90, 90]
    )
    table.put([500] * 3, "b", volts=[0] * 3)
    assert table.ask("power_cycles", "energy_wh, mean_w, max_w, mean_a, median_v", **WIDE) == near([
        (90, 2000, 3000, 8.5, 232), (25, 500, 500, 1, None)])  # fmt: skip


def test_what_runs_by_its_counter_alone_has_the_mean_of_the_counter(table):
    table.put(OFF * 4, counter=[0, 15, 30, 30])
    assert table.runs("mean_w") == near([(0, 2, 30, 900)])


def test_power_that_flows_back_runs_with_its_sign_and_takes_nothing(table):
    table.put([0, -800, -300, 100, -600, 0], counter=[5] * 6)
    table.put([-800] * 5, "b")
    assert table.runs("mean_w", "max_w") == near(
        [(1, 5, 0, -400, -800), (0, 5, 0, -800, -800)]
    )
    assert table.ask("energy_by_day", "energy_wh, rows", **WIDE) == [(0, 6), (0, 5)]


def test_devices_channels_and_phases_are_apart(table):
    series = {("a", "switch:0"): ON * 10, ("a", "switch:1"): ON * 5 + OFF * 2 + ON * 3, ("b", "pm1:0"): OFF * 5 + ON * 5,
        **{("meter", f"em:0:{phase}"): [600 * n] * 10 for n, phase in enumerate("abc", 1)}, ("z", "em1:0"): OFF * 10}  # fmt: skip
    for (device, channel), watts in series.items():
        table.put(watts + OFF, device, channel)
    found = [("a", "switch:0", 200), ("a", "switch:1", 160), ("b", "pm1:0", 100)]
    found += [
        ("meter", "em:0:a", 100),
        ("meter", "em:0:b", 200),
        ("meter", "em:0:c", 300),
    ]
    assert table.ask("power_cycles", "device_id, channel, energy_wh", **WIDE) == near(
        found
    )
    found += [("z", "em1:0", 0)]
    assert table.ask("energy_by_day", "device_id, channel, energy_wh", **WIDE) == near(
        found
    )
    keys = [key[:2] for key in found]
    assert table.ask("coverage", "device_id, channel, rows, missing", **WIDE) == [
        (*key, 11, 0) for key in keys
    ]
    assert table.ask(
        "power_series", "device_id, channel, rows", step="1 hour", **WIDE
    ) == [(*key, 11) for key in keys]


COUNTERS = [
    ([1000, 1010, 1030], 30, 0),
    ([1000, 1010, 0, 5, 10], 20, 1),  # set to 0
    ([1000, 1010, 3, 5], 15, 1),  # set to 0, and on
    ([1000, 1010, 1002, 1005], 13, 0),  # digits lost at a reboot
    ([1000, 900, 901], 1, 0),  # not below 0.9 of it
    ([1_400_000, 1_400_010, 0, 1_400_020, 1_400_030], 20, 1),  # 0 for a minute
    (
        [1_400_000, 0, *[None] * 600, 1_400_010, 1_400_020],
        10,
        1,
    ),  # and no rows for hours meanwhile
    (
        [1000, 0, 1020, 0, 1040],
        0,
        2,
    ),  # not reported in every second row, as in the first system's tables
    ([1000, 0, 20, 40], 40, 1),  # set to 0 for good
    ([0, 1600, 1600], 1600, 0),  # 96 kW
    ([0, 1700, 1701], 1, 0),  # 102 kW
    ([0, *[None] * 59, 90_000], 90_000, 0),  # 90 kW for an hour
    ([2_000_000, 1_000_000, 1_000_001], 1, 1),  # no minute gives so much
    ([7], 0, 0),
]


@pytest.mark.parametrize(("counter", "wh", "resets"), COUNTERS)
def test_what_a_counter_that_falls_or_jumps_is_worth(table, counter, wh, resets):
    table.put([(0,) if value is None else 0 for value in counter], counter=counter)
    assert table.ask("energy_by_day", "day, energy_wh", **WIDE) == near(
        [(NOON.date(), wh)]
    )
    assert table.ask("coverage", "resets", **WIDE) == [(resets,)]


def energy(table, **given):
    """(Wh drawn, Wh given back) of each channel, where all rows are of one day."""
    columns = "energy_wh, energy_returned_wh"
    return table.ask("energy_by_day", columns, zone="UTC", **(WIDE | given))


# ---- Counters that are told late, or wrong.


@pytest.mark.parametrize(
    ("watts", "counter", "wh"),
    [([2000] * 62, [1000] * 60 + [3000, 3033], 2033),
     ([1000] * 301, [1000] * 150 + [3417] * 150 + [5833], 4833),  # five hours, the counter in two frames
     ([2000] * 60 + OFF * 6, [1000] * 63 + [3000] * 3, 2000),  # told when it was off
     ([2000] * 62, [1000] * 60 + [5100, 5133], 4133),  # no more than twice, and 100 Wh
     ([2000] * 62, [1000] * 60 + [5101, 5134], 33),
     (OFF * 62, [1000] * 60 + [3000, 3000], 0),
     ([120_000] * 4, [1000, 1000, 5000, 7000], 4000),  # a row of its own, and one that did not stand still
     ([-2000] * 62, [1000] * 60 + [3000, 3033], 2033),
     ([2000] * 62, [0] * 60 + [2000, 2033], 2033),  # a device that was never used before
     ([2000] * 63, [1000, 0] + [0] * 59 + [2000, 2033], 33),  # a counter that comes back after an hour
     # a device swapped for another, at noon or after a night
     ([500] * 4, [1000, 1008, 500_000, 500_008], 16),
     ([500] * 4, [500_000, 500_008, 2000, 2008], 16),
     (OFF * 602, [1000] * 600 + [500_000, 500_000], 0),
     (OFF * 602, [500_000] * 600 + [2000, 2000], 0),
     ([3] * 602, [1000] * 600 + [2700, 2700], 0),
     ([3] * 602, [1000] * 600 + [900, 900], 0),
     # what was right stays
     ([2000] * 5, [1000] * 3 + [20, 53], 53),  # set to 0
     ([2000] * 5, [3_000_000, 3_000_000, 0, 3_000_067, 3_000_100], 33),  # 0 for a minute
     ([20] * 6, [1000, 0, 0, 0, 1001, 1002], 1),  # or for some
     ([20] * 6, [1000, 0, 0, 0, 21, 22], 22),
     ([2000] * 64, [1000] * 60 + [950] * 2 + [983, 1017], 67)],  # digits lost
)  # fmt: skip
def test_a_counter_that_is_told_late_is_a_counter(table, watts, counter, wh):
    table.put(watts, "total", channel="em:0:a", counter=counter)
    table.put(watts, "z", channel="em:0:a", counter=[5] * len(watts), back=counter)
    assert energy(table) == near([(wh, None), (0, wh)])


@pytest.mark.parametrize(
    ("counter", "wh", "resets"),
    [([1000, 1010, 999_999, 1030, 1040], 20, 0),
     ([1000, 1010, 999_999, 999_999, 1030, 1040], 20, 0),
     ([1000, 1010, 999_999, 1005, 1015], 20, 0),  # with its last digits lost
     ([1000, 1010, 999_999, 50, 60], 70, 1),  # a reset
     ([0, 0, 999_999, 20, 30], 30, 1),  # 0 is no value that it could come back to
     ([1000, 1010, 2600, 1030, 1040], 2640, 1)],  # 95 kW are believed
)  # fmt: skip
def test_one_wrong_reading_upwards_adds_nothing(table, counter, wh, resets):
    table.put([0] * len(counter), counter=counter)
    table.put([0] * len(counter), "z", counter=[5] * len(counter), back=counter)
    assert energy(table)[0][0] == wh
    assert energy(table)[1][1] == wh
    assert table.ask("coverage", "resets", **WIDE) == [(resets,), (0,)]


@pytest.mark.parametrize(
    ("counter", "wh"),
    [([1000] * 60 + [3000, 3033], 2033), ([1000, 1010, 999_999, 1030, 1040], 20), ([1000, 0, 0, 0, 1001, 1002], 1)],
)  # fmt: skip
def test_the_rises_after_since_do_not_depend_on_it(table, counter, wh):
    table.put([2000] * len(counter), channel="em:0:a", counter=counter)
    for n in range(len(counter)):
        middle = NOON + minutes(n)
        earlier = sum(wh for wh, _ in energy(table, until=middle))
        later = sum(wh for wh, _ in energy(table, since=middle))
        assert earlier + later == pytest.approx(wh)


@pytest.mark.parametrize(("hours", "wh"), [(1, 0), (24, 0), (25, 999)])
def test_no_rise_depends_on_a_row_more_than_a_day_back(table, hours, wh):
    """Whether the 0 was a reset is told by a row so many hours before the last 0."""
    counter = [1000] + [0] * hours + [999]
    start = NOON - hours * HOUR
    table.put(OFF * len(counter), every=3600, start=start, counter=counter)
    found = table.ask(
        "energy_by_day", "energy_wh", zone="UTC", **WIDE | {"since": start}
    )
    assert sum(wh for (wh,) in found) == wh


def test_two_rows_of_one_moment_are_no_division_by_zero(table):
    table.conn.execute("DROP INDEX power_logs_one_row_per_interval")
    for watts in (0, 2000):
        for counter in ([1000, 1000, 1000, 1010], [1000, 1000, 1050, 1060]):
            table.put([watts] * 4, f"{watts}", counter=counter, back=counter)
    for drawn, back in energy(table):
        assert (drawn, back) == (0, pytest.approx(60, abs=50))
    assert [most for *_, most in table.runs("max_w")] == [2000]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), -5.0])
def test_a_counter_that_is_no_number_adds_nothing(table, wrong):
    counter = [1000, 1010, wrong, 1030, 1040]
    table.put([600] * 5, "em", "em:0:a", counter=counter)
    table.put([600] * 5, "z", "em:0:a", counter=[5] * 5, back=counter)
    assert energy(table) == [(20, None), (0, 20)]


# ---- Runs, where the counter is told late: the power is that of the rows.


PUMP = [2000] * 60


@pytest.mark.parametrize(
    ("watts", "counter", "expected"),
    [(PUMP + [0] * 4, [1000] * 62 + [3000, 3000], [(0, 60, 2000, 2000, 2000)]),
     (PUMP + [0] * 4, [1000] * 62 + [2500, 2500], [(0, 60, 1500, 2000, 2000)]),  # 90 kW, which would be believed
     (PUMP + [0] * 40, [1000] * 90 + [3000] * 10, [(0, 60, 2000, 2000, 2000)]),  # half an hour later
     (PUMP + [3000] * 2 + [0], [1000] * 61 + [3000, 3050], [(0, 62, 2050, 2032.258, 3000)]),
     # the next run is another one, though the row that tells it lies between
     (PUMP + [0] * 3 + PUMP, [1000] * 62 + [3000] + [3000 + n * 33 for n in range(60)], [(0, 60, 2000, 2000, 2000), (63, 123, 1980.333, 2000, 2000)]),
     # what stood still before is not of the run
     ([6] * 1000 + OFF, [1000] * 999 + [1095, 1095], []),
     (PUMP + [6] * 1000 + OFF, [1000 + 33 * n for n in range(60)] + [3000] * 999 + [3095] * 2, [(0, 60, 2000, 2000, 2000)]),
     ([9, 0, 0], [1000, 1000.2, 1000.2], [])],  # a row of its own runs by its counter, but a minute is noise
)  # fmt: skip
def test_energy_that_is_told_late_is_of_the_run_and_no_power(
    table, watts, counter, expected
):
    table.put(watts, counter=[*counter, *[counter[-1]] * (len(watts) - len(counter))])
    assert table.runs("mean_w", "max_w") == [
        tuple(pytest.approx(number, abs=0.001) for number in run) for run in expected
    ]


def test_a_single_row_below_the_floor_still_runs_by_its_counter(table):
    table.put([9, 9, 9, 0], counter=[1000, 1000.2, 1000.4, 1000.4])
    assert table.runs("mean_w") == near([(0, 2, 0.4, 12)])


# ---- Solar: the total of a switch or a pm1 counts both directions.


HOUR_BACK = [-600] * 60 + OFF
BOTH_RISE = [1000 + 10 * n for n in range(61)]
STANDS = [1000] * 61
BACK = [50 + 10 * n for n in range(61)]


@pytest.mark.parametrize(
    ("channel", "counter", "back", "wh", "back_wh"),
    [("switch:0", BOTH_RISE, BACK, 0, 600),
     ("pm1:0", BOTH_RISE, BACK, 0, 600),
     ("switch:12", BOTH_RISE, BACK, 0, 600),
     ("em:0:a", BOTH_RISE, BACK, 600, 600),
     ("em1:0", BOTH_RISE, BACK, 600, 600),
     ("em1:0", STANDS, BACK, 0, 600),
     ("cover:0", BOTH_RISE, [None] * 61, 600, None),
     ("switch:0", BOTH_RISE, [None] * 61, 600, None),  # it does not report it
     ("switch:0", BOTH_RISE, [7] * 61, 600, 0),
     ("switch:0", [1000 + 20 * n for n in range(61)], BACK, 600, 600),  # both directions in one hour
     # the total comes every half hour, or is late at the end
     ("switch:0", [1000] * 30 + [1300] * 30 + [1600], BACK, 0, 600),
     ("switch:0", [1000] * 30 + [1300] * 31, BACK, 0, 600),
     ("switch:0", [1000] * 31 + [1300] * 30, BACK[:-1] + BACK[-2:-1], 0, 590),
     # one wrong reading of the total, or one that was not reported
     ("switch:0", [*BOTH_RISE[:30], 999999, *BOTH_RISE[31:]], BACK, 0, 600),
     ("switch:0", [*BOTH_RISE[:30], 0, *BOTH_RISE[31:]], BACK, 0, 600),
     # what was given back comes late
     ("switch:0", BOTH_RISE, [50] * 30 + [350] * 30 + [650], 0, 600),
     # a device that counts otherwise
     ("switch:0", [1000 + n for n in range(61)], BACK, 60, 600),
     ("switch:0", STANDS, BACK, 0, 600),
     # what is given back is not reported now and then
     ("switch:0", BOTH_RISE, [None if 5 <= n < 9 else 50 + 10 * n for n in range(61)], 0, 600),
     ("switch:0", BOTH_RISE, [None if n % 2 else 50 + 10 * n for n in range(61)], 0, 600),
     ("switch:0", BOTH_RISE, [None] * 20 + BACK[20:], 200, 400)],
)  # fmt: skip
def test_what_was_given_back_is_not_drawn(table, channel, counter, back, wh, back_wh):
    table.put(HOUR_BACK, channel=channel, counter=counter, back=back)
    assert energy(table) == near([(wh, back_wh)])
    assert table.runs("mean_w", "max_w") == near([(0, 60, wh, -600, -600)])


def test_the_difference_keeps_its_sign_until_the_day_is_finished(table):
    """The total of an hour comes in the next hour, in which as much is drawn."""
    watts = [-600] * 60 + [600] * 60 + OFF
    counter = [1000] * 60 + [1600 + 10 * n for n in range(61)]
    back = [10 * n for n in range(60)] + [600] * 61
    table.put(watts, counter=counter, back=back)
    assert energy(table) == near([(600, 600)])
    assert table.runs() == near([(0, 120, 600)])


def test_what_was_given_back_is_of_the_day_on_which_it_was(table):
    table.put([-600] * 120 + OFF, start=NOON + 11 * HOUR,
        counter=[10 * n for n in range(121)], back=[10 * n for n in range(121)])  # fmt: skip
    columns = "day, energy_wh, energy_returned_wh"
    assert table.ask("energy_by_day", columns, zone="UTC", **WIDE) == near([
        (date(2026, 11, 3), 0, 600), (date(2026, 11, 4), 0, 600)])  # fmt: skip


@pytest.mark.parametrize(
    ("channel", "counter", "back", "mean"),
    [("switch:0", [0, 10, 20, 20], [0, 10, 20, 20], -600),
     ("switch:0", [0, 10, 20, 20], [0, 0, 0, 0], 600),
     ("switch:0", [0, 10, 20, 20], [None] * 4, 600),
     ("switch:0", [0, 1, 2, 2], [0, 10, 20, 20], -600),  # it counts otherwise, or comes late
     ("em:0:a", [0, 2, 4, 4], [0, 10, 20, 20], -480)],
)  # fmt: skip
def test_what_runs_by_its_counter_alone_has_the_sign_of_the_flow(
    table, channel, counter, back, mean
):
    table.put(OFF * 4, channel=channel, counter=counter, back=back)
    assert table.runs("mean_w", "max_w")[0][3:] == (mean, mean)


@pytest.mark.parametrize("until", [30, 45.5])
def test_a_clipped_run_of_solar_draws_nothing(table, until):
    table.put(HOUR_BACK, counter=BOTH_RISE, back=BACK)
    window = {"since": NOON + minutes(10.5), "until": NOON + minutes(until)}
    assert table.runs("mean_w", **window) == near([(10.5, until, 0, -600)])


@pytest.mark.parametrize(
    ("first", "hours"), [(date(2026, 3, 28), (24, 23, 24)), (date(2026, 10, 24), (24, 25, 24)), (date(2026, 7, 1), (24, 24, 24))]
)  # fmt: skip
def test_a_day_has_its_23_or_25_hours(table, first, hours):
    paris = ZoneInfo("Europe/Paris")
    since, until = (
        datetime(d.year, d.month, d.day, tzinfo=paris).astimezone(UTC)
        for d in (first, first + 3 * DAY)
    )
    table.put([600] * (2 * 144 + 400), start=since - DAY, every=600)
    expected = [
        (first + n * DAY, 600 * length, 6 * length) for n, length in enumerate(hours)
    ]
    given = {"since": since, "until": until}
    assert table.ask(
        "energy_by_day", "day, energy_wh, rows", zone="Europe/Paris", **given
    ) == near(expected)
    table.conn.execute("SET LOCAL timezone = 'Europe/Paris'")
    assert table.ask("energy_by_day", "day, energy_wh, rows", **given) == near(expected)


def test_the_rise_in_an_outage_is_of_the_day_it_began_in_and_a_day_without_rows_is_absent(
    table,
):
    table.put(
        [600] * 6 + lost(12, 600) + [600] * 6, start=NOON + 11 * HOUR, every=600
    )  # away from midnight to two
    table.put(
        [600] * 6 + lost(6 * 37, 60) + [600] * 6, "b", start=NOON + 11 * HOUR, every=600
    )
    window = {"since": NOON, "until": NOON + 3 * DAY}
    assert table.ask("energy_by_day", "device_id, day, energy_wh, rows", **window) == near([
        ("a", date(2026, 11, 3), 600 + 1200, 6), ("a", date(2026, 11, 4), 500, 6),
        ("b", date(2026, 11, 3), 600 + 2220, 6), ("b", date(2026, 11, 5), 500, 6)])  # fmt: skip


def test_windows_are_half_open_and_the_last_rise_may_end_within_a_day_after(table):
    table.put(range(0, 1200, 60))
    table.put(
        [600] + lost(22, 600) + [600] * 5, "b", every=3600, start=NOON + minutes(9)
    )
    table.put(
        [600] + lost(25, 600) + [600] * 5, "c", every=3600, start=NOON + minutes(9)
    )
    window = {"since": NOON + minutes(5), "until": NOON + minutes(10)}
    found = table.ask("energy_by_day", "energy_wh, rows", zone="UTC", **window)
    assert found == near([(5 + 6 + 7 + 8 + 9, 5), (23 * 600, 1), (0, 1)])
    first, last = NOON + minutes(5), NOON + minutes(9)
    found = table.ask("coverage", "first_row, last_row, rows", **window)
    assert found == [(first, last, 5), (last, last, 1), (last, last, 1)]
    found = table.ask("power_series", "bucket, rows", step="1 minute", **window)
    assert found == [
        *((NOON + minutes(n), 1) for n in range(5, 10)),
        (last, 1),
        (last, 1),
    ]


def test_a_gap_and_a_reset_that_end_after_the_window_do_not_count(table):
    table.put([600] * 5 + lost(5) + [600], "a")
    table.put([600] * 8, "b", counter=[1000] * 5 + [0] * 3)
    window = {"since": NOON, "until": NOON + minutes(5)}
    columns = "rows, missing, longest_gap, resets"
    assert table.ask("coverage", columns, **window) == [(5, 0, minutes(0), 0)] * 2
    assert table.ask("gaps", **window) == []
    window["until"] = NOON + minutes(11)
    assert table.ask("coverage", columns, **window) == [
        (6, 5, minutes(5), 0),
        (8, 0, minutes(0), 1),
    ]


@pytest.mark.parametrize(
    ("watts", "every", "given", "expected"),
    [([1] * 10, 60, {}, (0, 9, 10, 0, 0)),
     ([1], 60, {}, (0, 0, 1, 0, 0)),
     ([1] * 5 + lost(5) + [1] * 5, 60, {}, (0, 14, 10, 5, 5)),
     (lost(5) + [1] * 5 + lost(1) + [1], 60, {}, (5, 11, 6, 1, 1)),
     ([1] * 5 + lost(2) + [1] + lost(5) + [1], 60, {}, (0, 13, 7, 7, 5)),
     ([1] * 5 + lost(2) + [1] * 5, 300, {"row_length": "5 minutes"}, (0, 55, 10, 2, 10)),
     ([1] * 3, 300, {}, (0, 10, 3, 8, 4)),
     # rows only while it runs, with a closing row
     (ON * 5 + OFF + lost(60) + ON * 5 + OFF, 60, {}, (0, 71, 12, 60, 60)),
     (ON * 5 + OFF + lost(60) + ON * 5 + OFF, 60, {"min_power_w": 10}, (0, 71, 12, 0, 0)),
     (ON * 5 + OFF + lost(60) + ON + lost(3) + ON, 60, {"min_power_w": 10}, (0, 70, 8, 3, 3)),
     (ON * 5 + lost(60) + ON, 60, {"min_power_w": 10}, (0, 65, 6, 60, 60)),
     ([1200, 10, *lost(60), 1200, -10, *lost(60), 1200], 60, {"min_power_w": 10}, (0, 124, 5, 0, 0)),
     ([-800, *lost(60), -800], 60, {"min_power_w": 10}, (0, 61, 2, 60, 60)),
     (ON * 3 + OFF + lost(12) + ON * 3, 300, {"min_power_w": 10, "row_length": "5 minutes"}, (0, 90, 7, 0, 0))],
)  # fmt: skip
def test_what_is_missing(table, watts, every, given, expected):
    table.put(watts, every=every)
    columns = "first_row, last_row, rows, missing, longest_gap"
    ((first, last, rows, missing, longest),) = table.ask(
        "coverage", columns, **(WIDE | given)
    )
    assert (
        (first - NOON) / MINUTE,
        (last - NOON) / MINUTE,
        rows,
        missing,
        longest / MINUTE,
    ) == expected


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata"])
def test_buckets_are_round_in_utc_and_those_without_rows_absent(table, zone):
    table.put([10, 20, 30, *lost(7), -300, -100, 100, 200, 0], start=NOON + minutes(2))
    table.conn.execute(f"SET LOCAL timezone = '{zone}'")
    assert table.ask("power_series", "bucket, mean_w, max_w, rows", step="5 minutes", **WIDE) == near([
        (NOON, 20, 30, 3), (NOON + minutes(10), -100, 100, 3), (NOON + minutes(15), 100, 200, 2)])  # fmt: skip
    assert table.ask("power_series", "bucket, mean_w, max_w, rows", step="1 day", **WIDE) == near([
        (NOON - 12 * HOUR, -5, 200, 8)])  # fmt: skip


@pytest.mark.parametrize(
    ("start", "length", "every"),
    [(NOON, HOUR, 60), (NOON, DAY, 60), (NOON, 7 * DAY, 60), (NOON, 30 * DAY, 600), (NOON, 45 * DAY, 600), (NOON, 400 * DAY, 3600),
     (NOON - timedelta(seconds=30), 25 * HOUR, 30)],
)  # fmt: skip
def test_without_a_step_a_round_one_is_taken(table, start, length, every):
    table.put([1] * (length // timedelta(seconds=every)), start=start, every=every)
    buckets = [
        bucket
        for (bucket,) in table.ask(
            "power_series", "bucket", since=start, until=start + length
        )
    ]
    step = min(later - bucket for bucket, later in itertools.pairwise(buckets))
    assert len(buckets) <= 1500 and (len(buckets) >= 300 or step == MINUTE)
    assert DAY % step == timedelta(0) and all(
        (bucket - NOON + DAY / 2) % step == timedelta(0) for bucket in buckets
    )


@pytest.mark.parametrize("question", list(ORDER))
def test_by_default_the_last_45_days_are_asked_for(table, question):
    now = table.now()
    for start, count in ((now - 46 * DAY, 3), (now - 44 * DAY, 5), (now + HOUR, 2)):
        table.put(ON * count, start=start)
    if question == "power_cycles":
        assert table.ask(question, "started_at, ongoing, complete") == [
            (now - 44 * DAY, False, True)
        ]
    elif question == "gaps":
        assert table.ask(question) == []
    else:
        assert sum(rows for (rows,) in table.ask(question, "rows")) == 5


def test_channels_are_shown_with_the_names_of_them_and_of_their_device(table):
    table.put([1, 2, 3], "a", "switch:0")
    table.put([4], "a", "switch:1", wh=7)
    table.put([5], "b", "pm1:0", wh=8, start=NOON - 300 * DAY)
    table.conn.execute(
        "INSERT INTO channel_names VALUES ('a', '', 'Shelly', 'Cellar'), ('a', 'switch:0', 'Pump', NULL),"
        " ('a', 'switch:1', 'Out 1', 'Heater'), ('b', '', 'Attic', NULL), ('gone', '', 'x', 'x'), ('gone', 'switch:0', 'x', 'x')"
    )
    columns = QUESTIONS["channels"][1].replace(" ", ", ")
    found = table.ask("channels", columns)
    assert found == near([
        ("a", "switch:0", "Pump", NOON + minutes(2), 3, 1000.05, "Cellar"),
        ("a", "switch:1", "Heater", NOON, 4, 7, "Cellar"),
        ("b", "pm1:0", None, NOON - 300 * DAY, 5, 8, "Attic")])  # fmt: skip
    assert table.ask("newest_rows") == [row[:-1] for row in found]


# The same questions, answered by plain Python over random tables. Times are minutes, a row is
# (minute, W, Wh of the total counter, Wh of the returned one or None); a counter is its index.
TOTAL, RETURNED = 2, 3
A_DAY = 1440


def before(rows, n, counter):
    """The number of the newest row before row n, of the last day, in which the counter was another; None if there is none."""
    for m in range(n - 1, -1, -1):
        if rows[n][0] - rows[m][0] > A_DAY:
            return None
        if rows[m][counter] not in (None, rows[n][counter]):
            return m
    return None


def stretch(rows, n, counter):
    """The rows up to n over which the counter stood still."""
    first = before(rows, n, counter)
    since = rows[n][0] - A_DAY if first is None else rows[first][0]
    return [
        row
        for row in rows[: n + 1]
        if row[0] > since and row[counter] == rows[n][counter]
    ]


def own_wh(still, later):
    """What the power of these rows makes until `later`."""
    ends = [*(row[0] for row in still[1:]), later[0]]
    return sum(
        abs(row[1]) * (end - row[0]) / 60 for row, end in zip(still, ends, strict=True)
    )


def most_wh(start, end):
    return 100_000 * (end[0] - start[0]) / 60


def comes_back(rows, n, later, counter):
    """Whether row n is one wrong reading upwards."""
    m = before(rows, n, counter)
    if m is None or rows[m][counter] <= 0:
        return False
    risen = rows[n][counter] - rows[m][counter]
    first = stretch(rows, n, counter)[0]
    is_wrong = risen > most_wh(rows[m], first)
    return is_wrong and later[counter] >= 0.9 * rows[m][counter]


def rise(rows, n, counter=TOTAL):
    """By how much the counter rose from row n to the next."""
    row, later = rows[n], rows[n + 1] if n + 1 < len(rows) else None
    if later is None or later[counter] is None:
        return None if row[counter] is None else 0
    value, following, most = row[counter], later[counter], most_wh(row, later)
    m = before(rows, n, counter)
    if value is None:
        if m is None:
            return None
        risen = following - rows[m][counter]
        return risen if 0 <= risen <= most_wh(rows[m], later) else 0
    if value == 0 and m is not None and 0 < rows[m][counter] <= following / 0.9:
        return 0  # not reported, and back
    if following >= value:
        still = stretch(rows, n, counter)
        was_late = (
            len(still) >= 2 and following - value <= 2 * own_wh(still, later) + 100
        )
        return following - value if following - value <= most or was_late else 0
    if (
        following >= 0.9 * value
        or following > most
        or comes_back(rows, n, later, counter)
    ):
        return 0
    return following


def late_since(rows, n):
    """Since when the total had stood still, if the power of its rows explains the rise after row n."""
    still = stretch(rows, n, TOTAL)
    if len(still) >= 2 and rise(rows, n) <= 2 * own_wh(still, rows[n + 1]):
        return still[0][0]
    return None


def drawn(channel, total, back, largest):
    """From the sum of the total's rises, those of the returned counter (None: unknown), and the largest of the first."""
    if back is None or not channel.startswith(("switch:", "pm1:")):
        return total
    return total if back - total > 3 * largest + 1 else max(total - back, 0)


def add_known(numbers):
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def expected_runs(channel, rows, since, until, gap, min_duration, floor, length):
    reach = max(gap, 1.5 * length)
    # So far beyond the window rows are looked at.
    rows = [row for row in rows if row[0] < until + min_duration + 2 * reach]
    running = []
    for n, row in enumerate(rows):
        at, watt = row[:2]
        near = n + 1 < len(rows) and rows[n + 1][0] - at <= reach
        # A row whose next one is near stands for all the time until then.
        span = rows[n + 1][0] - at if near else length
        total, back = max(watt, 0) * length / 60, None
        if near:
            total, back = rise(rows, n), rise(rows, n, RETURNED)
        elif n + 1 < len(rows):
            total = min(total, rise(rows, n))
        loaded = abs(watt) > floor
        late = None
        if not loaded:
            if not near or total <= floor * span / 60:
                continue
            # Of a row that was too long ago, only the power of this one is asked.
            read = [one for one in running if one["at"] > since - min_duration - reach]
            stood = not read or read[-1]["wh"] == row[TOTAL]
            idle = all(abs(one[1]) <= floor for one in stretch(rows, n, TOTAL))
            if stood or (watt != 0 and idle):
                late = late_since(rows, n)
            if late is not None and watt != 0 and idle:
                continue
        share = max(0, min(at + span, until) - max(at, since)) / span
        mean = watt if loaded else flow(channel, total, back) * 60 / span
        running.append({"at": at, "wh": row[TOTAL], "share": share, "span": span,
            "total": total, "back": back, "mean": mean, "late": late})  # fmt: skip
    # What was told late is energy of the run whose last row stood still, too.
    for one, late in itertools.pairwise(running):
        if late["late"] is not None and late["late"] <= one["at"]:
            one["total"] += late["total"]
    running = [row for row in running if row["late"] is None]
    return list(
        finished_runs(channel, running, since, until, reach, min_duration, length)
    )


def flow(channel, total, back):
    if back is None:
        return total
    return max(total - 2 * back, -back) if channel == "switch:0" else total - back


def finished_runs(channel, running, since, until, reach, min_duration, length):
    runs = []
    for row in running:
        if not runs or row["at"] - runs[-1][-1]["at"] > reach:
            runs.append([])
        runs[-1].append(row)
    for run in runs:
        began, ended = run[0]["at"], run[-1]["at"] + length
        times = sum(row["share"] * row["span"] for row in run)
        if not times or ended <= since or ended - began < min_duration:
            continue
        totals = [row["share"] * row["total"] for row in run]
        back = add_known(
            None if row["back"] is None else row["share"] * row["back"] for row in run
        )
        energy = drawn(channel, sum(totals), back, max(totals))
        mean = sum(row["share"] * row["span"] * row["mean"] for row in run) / times
        highest = max((row["mean"] for row in run if row["share"]), key=abs)
        complete = since < began and ended < until
        yield max(began, since), min(ended, until), complete, energy, mean, highest


def expected_days(channel, rows, since, until, zone):
    days = {}
    # So far beyond the window rows are looked at.
    rows = [row for row in rows if row[0] < until + A_DAY]
    for n, row in enumerate(rows):
        if since <= row[0] < until:
            day = (NOON + minutes(row[0])).astimezone(ZoneInfo(zone)).date()
            days.setdefault(day, []).append((rise(rows, n), rise(rows, n, RETURNED)))
    found = []
    for day, rises in days.items():
        totals, back = [total for total, _ in rises], add_known(b for _, b in rises)
        energy = drawn(channel, sum(totals), back, max(totals))
        found.append((day, energy, len(rises), back))
    return found


def expected_coverage(rows, since, until, floor, length):
    inside = [row for row in rows if since <= row[0] < until]
    pairs = list(itertools.pairwise(inside))
    gaps = [
        b[0] - a[0] - length for a, b in pairs if floor is None or abs(a[1]) > floor
    ]
    resets = 0
    for n, row in enumerate(rows[:-1]):
        falls = rows[n + 1][TOTAL] < 0.9 * row[TOTAL]
        if row in inside and rows[n + 1] in inside and falls:
            resets += not comes_back(rows, n, rows[n + 1], TOTAL)
    return (
        [
            (
                inside[0][0],
                inside[-1][0],
                len(inside),
                sum(gaps) / length,
                max(gaps, default=0),
                resets,
            )
        ]
        if inside
        else []
    )


def random_rows(chance, length, solar, late):
    """From 22 h UTC on, over the midnights of Paris and of UTC."""
    wh, back, watts, there = chance.uniform(1000, 2_000_000), 500.0, 0, True
    rows, told = [], [wh, back]
    kept = chance.choice([0.95, 0.95, 0.5])
    for n in range(chance.randrange(20, 200)):
        if chance.random() < 0.2:
            watts, there = (
                chance.choice([0, 0, 3, 50, 1200, 2000, -500, 40_000]),
                chance.random() < 0.7,
            )
        if chance.random() < 0.03:
            wh = chance.choice([0, wh * 0.999, wh + 30])
        for counter, value in enumerate((wh, back)):
            if chance.random() > late:
                told[counter] = value
        if there and chance.random() < kept:
            total, returned = told
            if chance.random() < 0.04:
                total = chance.choice([0, total + 1_000_000, total * 3])
            if not solar or chance.random() < 0.1:
                returned = None
            rows.append((600 + n * length, watts, total, returned))
        both = abs(watts) if solar == "both" else max(watts, 0)
        wh += both * length / 60 * chance.uniform(0.9, 1.1)
        back += max(-watts, 0) * length / 60 * chance.uniform(0.9, 1.1)
    return rows


@pytest.mark.parametrize(("seed", "length"), [(1, 1), (2, 1), (3, 5), (4, 5)])
def test_random_tables_are_answered_as_plain_python_does(table, seed, length):
    chance = random.Random(seed)
    tables = {}
    for n in range(90):
        channel = ("switch:0", "switch:0", "em:0:a")[n % 3]
        solar, late = (
            chance.choice([None, "both", "apart"]),
            chance.choice([0, 0.5, 0.95]),
        )
        tables[f"{n:02}"] = channel, random_rows(chance, length, solar, late)
    table.store((NOON + minutes(row[0]), device, channel, row[1], 230, 1, *row[2:])
        for device, (channel, rows) in tables.items() for row in rows)  # fmt: skip

    def asked(question, columns, **given):
        """The answer by device, times as minutes."""
        found = {device: [] for device in tables}
        for device, *row in table.ask(question, f"device_id, {columns}", **given):
            found[device].append(
                tuple(
                    (x - NOON) / MINUTE if isinstance(x, datetime) else x for x in row
                )
            )
        return found

    for _ in range(8):
        since, until = (
            600 + length * n + chance.choice([0, 0, 0.4])
            for n in sorted(chance.sample(range(-5, 205), 2))
        )
        window = {"since": NOON + minutes(since), "until": NOON + minutes(until)}
        gap, least, floor = (
            chance.choice([0, 1, 3, 10]),
            chance.choice([0, 1, 2, 10]),
            chance.choice([1, 10, 100]),
        )
        zone = chance.choice(
            ["UTC", "Europe/Paris", "America/St_Johns", "Pacific/Chatham"]
        )
        off = chance.choice([None, 10])
        times = {
            "gap": minutes(gap),
            "min_duration": minutes(least),
            "row_length": minutes(length),
        }
        columns = "started_at, ended_at, complete, energy_wh, mean_w, max_w"
        runs = asked("power_cycles", columns, min_power_w=floor, **times, **window)
        columns = "day, energy_wh, rows, energy_returned_wh"
        days = asked("energy_by_day", columns, zone=zone, **window)
        columns = "first_row, last_row, rows, missing, extract(epoch FROM longest_gap) / 60, resets"
        missing = asked(
            "coverage", columns, row_length=minutes(length), min_power_w=off, **window
        )
        for device, (channel, rows) in tables.items():
            case = seed, device, channel, since, until, gap, least, floor, rows
            expected = expected_runs(
                channel, rows, since, until, gap, least, floor, length
            )
            assert runs[device] == near(expected), case
            expected = expected_days(channel, rows, since, until, zone)
            assert days[device] == near(expected), case
            assert missing[device] == expected_coverage(
                rows, since, until, off, length
            ), case


GRAFANA_MACROS = {
    "$__timeFrom()": "'2026-11-20T00:00:00Z'",
    "$__timeTo()": "'2026-11-21T00:00:00Z'",
    "$__interval": "1m",
}


def test_in_grafana_each_channel_is_a_line_of_its_own(database):
    asked = sql_of_docs("questions.md", "Grafana")
    for macro, value in GRAFANA_MACROS.items():
        assert macro in asked
        asked = asked.replace(macro, value)
    channels = "VALUES ('one', 'switch:0'), ('one', 'switch:1'), ('two', 'switch:0'), ('two', 'switch:1')"
    execute(
        database,
        (ROOT / "schema.sql").read_bytes(),
        f"INSERT INTO power_logs ({COLUMNS}) SELECT timestamptz '2026-11-20Z' + m * interval '1 minute',"
        f" d, c, 100, 230, 1, m FROM generate_series(0, 9) m, ({channels}) x (d, c)",
        "INSERT INTO channel_names (device_id, channel, name)"
        " VALUES ('one', 'switch:1', 'Pump'), ('two', 'switch:1', 'Pump')",
    )
    lines = Counter(metric for _, metric, _ in query(database, asked))
    assert lines == {
        "one switch:0": 10,
        "two switch:0": 10,
        "Pump one switch:1": 10,
        "Pump two switch:1": 10,
    }


@pytest.mark.parametrize("question", QUESTIONS)
def test_names_are_those_of_the_contract_and_the_comment_explains_them(table, question):
    parameters, columns = (names.split() for names in QUESTIONS[question])
    names, modes, comment, volatile = table.conn.execute(
        "SELECT proargnames, proargmodes::text[], obj_description(oid, 'pg_proc'), provolatile::text FROM pg_proc WHERE proname = %s",
        [question],
    ).fetchone()
    assert [
        name for name, mode in zip(names, modes, strict=True) if mode == "i"
    ] == parameters
    assert [
        name for name, mode in zip(names, modes, strict=True) if mode == "t"
    ] == columns
    assert (
        volatile == "s"
        and [name for name in columns if not re.search(rf"\b{name}\b", comment)] == []
    )


@pytest.mark.parametrize(
    "arguments", ["", "since => now() - interval '7 days', until => now()"]
)
@pytest.mark.parametrize("question", ORDER)
def test_what_is_asked_of_one_device_reads_only_its_part_of_the_index(
    table, question, arguments
):
    table.conn.execute(
        f"INSERT INTO power_logs ({COLUMNS}) SELECT now() - n * interval '1 minute', 'device' || d, 'switch:0', 1, 1, 1, 1"
        " FROM generate_series(1, 1000) n, generate_series(1, 30) d"
    )
    if table.quarters:
        table.make_quarters()
        assert table.conn.execute(
            "SELECT count(*) > 1000 FROM power_quarters"
        ).fetchone() == (True,)
    table.conn.execute("ANALYZE power_logs")
    table.conn.execute("ANALYZE power_quarters")
    plan = table.conn.execute(
        f"EXPLAIN SELECT * FROM {question}({arguments}) WHERE device_id = 'device7'"
    ).fetchall()
    plan = "\n".join(line for (line,) in plan)
    assert (
        f"Function Scan on {question}" not in plan
        and "Seq Scan on power_logs" not in plan
        # Where no quarters are made, the table is empty.
        and ("Seq Scan on power_quarters" not in plan or not table.quarters)
    ), plan
    assert re.search(r"Index Cond: .*device_id.*'device7'", plan), plan


def test_who_may_only_read_the_two_tables_may_ask(table):
    table.put(ON * 5, start=table.now().replace(hour=12, minute=0) - DAY)
    role = f"reader_{os.getpid()}"
    table.conn.execute(f"CREATE ROLE {role}")  # rolled back
    table.conn.execute(f"GRANT SELECT ON power_logs, channel_names TO {role}")
    table.conn.execute(f"SET LOCAL ROLE {role}")
    assert {
        question: len(table.ask(question)) for question in QUESTIONS
    } == dict.fromkeys(QUESTIONS, 1) | {"gaps": 0}


# ---- What was given back on each day.

WINDOW = "since => '2026-11-02', until => '2026-11-20', zone => 'UTC'"


@pytest.fixture
def meter(database):
    """A prepared database; puts rows with these counters (drawn, returned), a minute apart, None for a lost row."""
    execute(database, (ROOT / "schema.sql").read_bytes())
    insert = (
        "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v,"
        " current_a, energy_total_wh, energy_returned_wh)"
        " VALUES (%s, %s, 'em:0:a', 1, 230, 1, %s, %s)"
    )

    def put(counters, device_id="a", every_s=60):
        values = []
        for n, counter in enumerate(counters):
            if counter is not None:
                values.append(
                    (NOON + timedelta(seconds=every_s * n), device_id, *counter)
                )
        with (
            psycopg.connect(database, autocommit=True) as conn,
            conn.cursor() as cursor,
        ):
            cursor.executemany(insert, values)

    def energy_by_day(columns, window=WINDOW):
        with psycopg.connect(database) as conn:
            return conn.execute(
                f"SELECT {columns} FROM energy_by_day({window}) ORDER BY 1, 2"
            ).fetchall()

    put.energy_by_day = energy_by_day
    return put


def test_energy_by_day_tells_what_was_given_back_in_its_last_column(database, meter):
    meter([(1000 + n, 50 + 2 * n) for n in range(10)])
    with psycopg.connect(database) as conn:
        cursor = conn.execute(f"SELECT * FROM energy_by_day({WINDOW})")
        assert [column.name for column in cursor.description] == [
            "device_id", "channel", "day", "energy_wh", "rows", "energy_returned_wh"
        ]  # fmt: skip
        assert cursor.fetchall() == [("a", "em:0:a", NOON.date(), 9.0, 10, 18.0)]


def test_a_device_that_says_nothing_of_it_has_null_and_one_that_gives_nothing_back_has_0(
    meter,
):
    meter([(1000 + n, None) for n in range(5)], "silent")
    meter([(1000 + n, 7.0) for n in range(5)], "none")
    meter(
        [(1000 + n, None) for n in range(5)] + [(1005 + n, 10.0 * n) for n in range(5)],
        "new firmware",
    )
    found = dict(meter.energy_by_day("device_id, energy_returned_wh"))
    assert found == {"silent": None, "none": 0.0, "new firmware": 40.0}
    assert dict(meter.energy_by_day("device_id, energy_wh")) == {
        "silent": 4.0,
        "none": 4.0,
        "new firmware": 9.0,
    }


@pytest.mark.parametrize(("counter", "wh", "resets"), COUNTERS)
def test_a_returned_counter_that_falls_or_jumps_is_worth_what_the_drawn_one_would_be(
    meter, counter, wh, resets
):
    meter([value if value is None else (5.0, value) for value in counter])
    assert meter.energy_by_day("energy_wh, energy_returned_wh") == near([(0, wh)])


def test_returned_energy_is_given_to_the_same_days_by_the_same_rules(meter):
    rnd, counters, wh = random.Random(1), [], 5000.0
    for _ in range(3000):
        wh = (
            rnd.choice([0.0, wh * 0.95, wh + 1e6])
            if rnd.random() < 0.01
            else wh + rnd.uniform(0, 900)
        )
        counters.append(None if rnd.random() < 0.05 else (wh, wh))
    meter(counters, every_s=300)
    two_days = WINDOW.replace("11-02", "11-05").replace("11-20", "11-07")
    for window in (WINDOW, WINDOW.replace("UTC", "Asia/Kathmandu"), two_days):
        found = meter.energy_by_day("day, energy_wh, energy_returned_wh", window)
        assert len(found) >= 2 and all(
            drawn > 0 and returned == drawn for _, drawn, returned in found
        )
