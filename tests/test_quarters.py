"""Quarters of an hour: what is answered from them is what the rows say, whatever happens
to the rows, and whoever makes them."""

import os
import random
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL

from support import ROOT, join_ids

# Changes in the random test. CI makes 300; ten thousand take some minutes.
CHANGES = int(os.environ.get("CHANGES", "300"))
SEED = int(os.environ.get("SEED", "19"))

START = datetime(2026, 3, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
QUARTER = timedelta(minutes=15)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

# The clock of the database: its now() comes before PostgreSQL's own.
CLOCK = """
CREATE TABLE clock (time TIMESTAMPTZ);
CREATE FUNCTION public.now() RETURNS TIMESTAMPTZ LANGUAGE sql STABLE
AS 'SELECT time FROM clock';
"""
INSERT = SQL("""
INSERT INTO power_logs (device_id, channel, timestamp, apower_w, voltage_v, current_a,
    energy_total_wh, energy_returned_wh, origin)
VALUES (%s, %s, %s, %s, 230, 1, %s, %s, %s) ON CONFLICT DO NOTHING
""")


class House:
    """A table with its quarters, in a database whose clock the test sets."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.conn = self.connect()
        self.conn.execute(CLOCK)
        self.conn.execute("INSERT INTO clock VALUES (%s)", [START])
        self.conn.execute((ROOT / "schema.sql").read_bytes())

    def connect(self) -> psycopg.Connection[Any]:
        conn = psycopg.connect(self.url, autocommit=True)
        conn.execute("SET search_path = public, pg_catalog")
        conn.execute("SET TimeZone = 'UTC'")
        return conn

    def set_clock(self, time: datetime) -> None:
        self.conn.execute("UPDATE clock SET time = %s", [time])

    def run(self, statement: str, *values: Any) -> None:
        self.conn.execute(statement, values or None)

    def all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.conn.execute(statement, values or None).fetchall()

    def put(self, *minutes: int, channel: str = "switch:0", wh: float = 1.0) -> None:
        """Insert rows of 60 W at minutes after START; the counter rises by `wh` a
        minute."""
        for minute in minutes:
            time = START + minute * MINUTE
            row = ("house", channel, time, 60, minute * wh, None, None)
            self.conn.execute(INSERT, row)

    def make_all(self) -> str:
        """Make quarters until there is nothing left to do, as a collector does within
        seconds; return how far they are made."""
        for _ in range(100):
            before = self.progress()
            ((progress,),) = self.all("SELECT make_quarters()")
            if self.progress() == before:
                return progress
        raise AssertionError("too many steps")

    def progress(self) -> list[tuple[Any, ...]]:
        return self.all(
            "SELECT s::text, (SELECT count(*) FROM quarter_marks),"
            " (SELECT count(*) FROM power_quarters),"
            " (SELECT count(*) FROM power_quarters WHERE final) FROM quarter_state s"
        )

    def quarters(self) -> list[tuple[int, int, float]]:
        """What is stored: the minute after START at which it begins, its rows, and what
        the total rose."""
        return self.all(
            "SELECT (date_part('epoch', quarter - %s) / 60)::int, rows, total_wh"
            " FROM power_quarters ORDER BY device_id, channel, quarter",
            START,
        )


@pytest.fixture
def house(database):
    made = House(database)
    yield made
    made.conn.close()


def minute(number: int) -> datetime:
    return START + number * MINUTE


def energy(house: House, **window: Any) -> list[tuple[Any, ...]]:
    """Wh and rows of each channel and day."""
    given = {"since": START - 9 * DAY, "until": START + 90 * DAY} | window
    return house.conn.execute(
        "SELECT energy_wh, rows FROM energy_by_day(%(since)s, %(until)s, 'UTC')"
        " ORDER BY device_id, channel, day",
        given,
    ).fetchall()


def assert_answered_from_quarters(house: House) -> None:
    """A row that vanished without a mark is still in the answer."""
    with house.conn.transaction() as transaction:
        before = energy(house)
        house.run("ALTER TABLE power_logs DISABLE TRIGGER mark_changes_delete")
        house.run("DELETE FROM power_logs WHERE timestamp < %s", minute(15))
        house.run("ALTER TABLE power_logs ENABLE TRIGGER mark_changes_delete")
        assert energy(house) == before
        raise psycopg.Rollback(transaction)


# ---- Comparing ----

QUESTIONS = [
    "energy_by_day(%(since)s, %(until)s, 'UTC')",
    "energy_by_day(%(since)s, %(until)s, 'Asia/Kathmandu')",
    "energy_by_month(%(since)s, %(until)s, 'Europe/Paris')",
    "coverage(%(since)s, %(until)s)",
    "coverage(%(since)s, %(until)s, min_power_w => 10)",
    "gaps(%(since)s, %(until)s, min_power_w => 10)",
    "power_series(%(since)s, %(until)s, '15 minutes')",
    "power_series(%(since)s, %(until)s, '1 day')",
]


def near(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The rows; the last digits of a sum depend on the order of its parts."""
    return [
        tuple(pytest.approx(v, abs=1e-3) if isinstance(v, float) else v for v in row)
        for row in rows
    ]


def assert_answers_are_those_of_rows(
    conn: psycopg.Connection[Any], since: datetime, until: datetime
) -> None:
    window = {"since": since, "until": until}
    for question in QUESTIONS:
        query = SQL(f"SELECT * FROM {question} ORDER BY 1, 2, 3, 4")
        with conn.transaction() as transaction:
            conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            answer = conn.execute(query, window).fetchall()
            # Functions read rows as long as not all quarters are made.
            conn.execute("UPDATE quarter_state SET made_from = 'infinity'")
            expected = conn.execute(query, window).fetchall()
            assert answer == near(expected), (question, window)
            raise psycopg.Rollback(transaction)


def final_quarters(conn: psycopg.Connection[Any]) -> set[str]:
    rows = conn.execute("SELECT q::text FROM power_quarters q WHERE final").fetchall()
    return {text for (text,) in rows}


def assert_quarters_are_those_of_rows(conn: psycopg.Connection[Any]) -> None:
    """When no mark is left, what is stored is what the rows make, above the horizon. A
    rise may need rows of the day before, so just above it there is nothing to compare."""
    columns = (
        "device_id, channel, quarter, rows, rows_from_memory, sum_w, min_w, max_w,"
        " total_wh, largest_wh, returned_wh, first_row, last_row, gap_began, gap_ended,"
        " gap_power_w, resets, next_row"
    )
    ((made_until, final_until),) = conn.execute(
        "SELECT made_until, greatest(final_until, '0001-01-02') FROM quarter_state"
    ).fetchall()
    since = final_until + DAY
    stored = conn.execute(
        f"SELECT {columns} FROM power_quarters WHERE quarter >= %s ORDER BY 1, 2, 3",
        [since],
    ).fetchall()
    expected = conn.execute(
        f"SELECT {columns} FROM quarters_of_rows(%s, %s, %s, '1 minute')"
        " ORDER BY 1, 2, 3",
        [since, made_until, made_until],
    ).fetchall()
    assert stored == near(expected)
    # Each channel has one that is open.
    assert (
        conn.execute(
            "SELECT count(*), count(DISTINCT (device_id, channel)) FROM power_quarters"
            " WHERE next_row IS NULL AND NOT final"
        ).fetchall()
        == conn.execute(
            "SELECT count(*), count(*) FROM (SELECT DISTINCT device_id, channel"
            " FROM power_logs WHERE timestamp >= %s AND timestamp < %s) c",
            [final_until, made_until],
        ).fetchall()
    )
    assert (
        conn.execute(
            "SELECT coalesce(sum(rows), 0) FROM power_quarters WHERE quarter >= %s",
            [final_until],
        ).fetchall()
        == conn.execute(
            "SELECT count(*) FROM power_logs WHERE timestamp >= %s AND timestamp < %s",
            [final_until, made_until],
        ).fetchall()
    )


# ---- Random changes ----


class Life:
    """Random changes of a table: `changes` names them, each with how often it comes."""

    CHANNELS = (("a", "switch:0"), ("a", "pm1:0"), ("b", "em1:0"), ("b", "switch:1"))

    def __init__(self, house: House, seed: int, unique: bool) -> None:
        self.house = house
        self.chance = random.Random(seed)
        # Summer time begins some days later.
        self.now = START + 26 * DAY
        self.oldest = self.now
        self.unique = unique
        # The counters of each channel: total, given back, power.
        self.meters = {key: [1000.0, 500.0, 0.0] for key in self.CHANNELS}
        # A transaction of somebody else's that is open, and the keys of its rows. Whoever
        # inserts one of these waits for its end.
        self.open: psycopg.Connection[Any] | None = None
        self.uncommitted: set[tuple[Any, ...]] = set()
        self.changes = {
            self.minutes_pass: 40,
            self.outage: 3,
            self.long_gap: 1,
            self.late_rows: 15,
            self.delete_some: 6,
            self.delete_a_day: 1,
            self.change_counters: 6,
            self.move_rows: 2,
            self.rename_channel: 1,
            self.open_transaction: 4,
            self.repeatable_read: 2,
            self.make_some: 25,
            self.two_at_once: 3,
            self.clock_jumps: 2,
            self.truncate: 0.1,
            self.forget: 1,
        }
        if not unique:
            house.run("DROP INDEX power_logs_one_row_per_interval")
            house.run("CREATE INDEX ON power_logs (device_id, channel, timestamp)")
            self.changes[self.double_rows] = 4
            # Two rows of one moment have the same values here, or no order would be
            # right. Writers who do not see each other cannot keep to that.
            for kind in (self.open_transaction, self.repeatable_read, self.two_at_once):
                del self.changes[kind]

    def change(self) -> None:
        kinds = list(self.changes)
        (kind,) = self.chance.choices(kinds, list(self.changes.values()))
        # The zone of whoever writes or makes quarters makes no difference.
        zone = self.chance.choice(["UTC", "Europe/Paris", "Asia/Kathmandu"])
        self.house.run(f"SET TimeZone = '{zone}'")
        kind()
        self.house.run("SET TimeZone = 'UTC'")
        if self.open is not None and self.chance.random() < 0.2:
            self.end_transaction()

    def end_transaction(self) -> None:
        assert self.open is not None
        if self.chance.random() < 0.8:
            self.open.commit()
        else:
            self.open.rollback()
        self.open.close()
        self.open = None
        self.uncommitted.clear()

    # What a meter says. A counter may stand still for hours, be told late, be reset, lose
    # digits, or be absent.
    def next_row(self, key: tuple[str, str], time: datetime) -> tuple[Any, ...]:
        chance, meter = self.chance, self.meters[key]
        if chance.random() < 0.1:
            meter[2] = chance.choice([0, 0, 0, 5, 60, 2000, -800])
        if chance.random() < 0.6:
            meter[0] += abs(meter[2]) / 60
        if chance.random() < 0.01:
            meter[0] += chance.choice([50, 400, 1e7])
        if chance.random() < 0.01:
            meter[0] = chance.choice([0.0, meter[0] * 0.95, 3.0])
        returned = None
        if key[1] != "switch:0":
            if meter[2] < 0:
                meter[1] -= meter[2] / 60
            returned = meter[1]
            if chance.random() < 0.1:
                returned = None
        total = meter[0]
        if chance.random() < 0.01:
            total = 0.0
        origin = chance.choice([None, None, None, "memory"])
        return (*key, time, meter[2], total, returned, origin)

    def insert(
        self, conn: psycopg.Connection[Any], rows: list[tuple[Any, ...]]
    ) -> None:
        rows = [row for row in rows if row[:3] not in self.uncommitted]
        if not self.unique:
            # Without a rule, a second row of one moment has the same values.
            rows = [
                row
                for row in rows
                if not conn.execute(
                    "SELECT FROM power_logs WHERE device_id = %s AND channel = %s"
                    " AND timestamp = %s",
                    row[:3],
                ).fetchall()
            ]
        with conn.cursor() as cursor:
            cursor.executemany(INSERT, rows)

    def minutes_pass(self) -> None:
        rows = []
        missing = [key for key in self.CHANNELS if self.chance.random() < 0.2]
        for _ in range(self.chance.choice([1, 3, 20])):
            self.now += MINUTE
            for key in self.CHANNELS:
                if key not in missing and self.chance.random() < 0.95:
                    rows.append(self.next_row(key, self.now))
        self.house.set_clock(self.now)
        self.insert(self.house.conn, rows)

    def outage(self) -> None:
        self.now += self.chance.choice([20, 120, 700]) * MINUTE
        self.house.set_clock(self.now)

    def long_gap(self) -> None:
        self.now += self.chance.randrange(20, 60) * HOUR
        self.house.set_clock(self.now)

    def some_time(self) -> datetime:
        """A full minute of the past, mostly of the last hours."""
        back = self.chance.choice([HOUR, 8 * HOUR, self.now - self.oldest + HOUR])
        minutes = self.chance.randrange(int(back / MINUTE) + 1)
        return self.now - minutes * MINUTE

    def some_late_rows(self) -> list[tuple[Any, ...]]:
        time = self.some_time()
        self.oldest = min(self.oldest, time)
        key = self.chance.choice(self.CHANNELS)
        rows = []
        for _ in range(self.chance.choice([1, 1, 2, 40])):
            time += self.chance.choice([1, 1, 1, 30]) * MINUTE
            if time < self.now:
                rows.append(self.next_row(key, time))
        return rows

    def late_rows(self) -> None:
        self.insert(self.house.conn, self.some_late_rows())

    def open_transaction(self) -> None:
        """Somebody else's rows, which are committed some changes later."""
        if self.open is None:
            self.open = self.house.connect()
            self.open.autocommit = False
            if self.chance.random() < 0.5:
                self.now += MINUTE
                rows = [self.next_row(key, self.now) for key in self.CHANNELS[:2]]
            else:
                rows = self.some_late_rows()
            self.insert(self.open, rows)
            self.uncommitted = {row[:3] for row in rows}

    def repeatable_read(self) -> None:
        """Rows of a transaction that does not see what came after its start."""
        with self.house.connect() as conn:
            conn.autocommit = False
            conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            conn.execute("SELECT count(*) FROM power_logs")
            self.now += 20 * MINUTE
            self.house.set_clock(self.now)
            self.house.make_all()
            self.insert(conn, self.some_late_rows())

    def somewhere(self) -> tuple[datetime, datetime, str, str]:
        """A stretch of time and a channel."""
        since = self.some_time()
        length = self.chance.choice([1, 1, 15, 200]) * MINUTE
        return since, since + length, *self.chance.choice(self.CHANNELS)

    def delete_some(self) -> None:
        self.house.run(
            "DELETE FROM power_logs WHERE timestamp >= %s AND timestamp < %s"
            " AND device_id = %s AND channel = %s",
            *self.somewhere(),
        )

    def delete_a_day(self) -> None:
        since = self.some_time()
        self.house.run(
            "DELETE FROM power_logs WHERE timestamp >= %s AND timestamp < %s",
            since,
            since + DAY,
        )

    def change_counters(self) -> None:
        change = self.chance.choice(
            [
                "energy_total_wh = 5",
                "energy_total_wh = energy_total_wh + 30",
                "apower_w = 700",
                "energy_returned_wh = NULL",
                "energy_returned_wh = 900",
            ]
        )
        self.house.run(
            f"UPDATE power_logs SET {change} WHERE timestamp >= %s AND timestamp < %s"
            " AND device_id = %s AND channel = %s",
            *self.somewhere(),
        )

    def move_rows(self) -> None:
        # By a second, since another row may have the minute.
        self.house.run(
            "UPDATE power_logs older SET timestamp = timestamp + interval '1 second'"
            " WHERE timestamp >= %s AND timestamp < %s AND device_id = %s"
            " AND channel = %s AND date_part('second', timestamp) = 0 AND NOT EXISTS"
            " (SELECT FROM power_logs newer WHERE newer.device_id = older.device_id"
            " AND newer.channel = older.channel"
            " AND newer.timestamp = older.timestamp + interval '1 second')",
            *self.somewhere(),
        )

    def rename_channel(self) -> None:
        since, until, device, channel = self.somewhere()
        self.house.run(
            "UPDATE power_logs older SET device_id = 'c' WHERE timestamp >= %s"
            " AND timestamp < %s AND device_id = %s AND channel = %s AND NOT EXISTS"
            " (SELECT FROM power_logs newer WHERE newer.device_id = 'c' AND newer.channel"
            " = older.channel AND newer.timestamp = older.timestamp)",
            since,
            until,
            device,
            channel,
        )

    def double_rows(self) -> None:
        columns = (
            "device_id, channel, timestamp, apower_w, voltage_v, current_a,"
            " energy_total_wh, energy_returned_wh, origin"
        )
        self.house.run(
            f"INSERT INTO power_logs ({columns}) SELECT {columns} FROM power_logs"
            " WHERE timestamp >= %s AND timestamp < %s AND device_id = %s"
            " AND channel = %s",
            *self.somewhere(),
        )

    def truncate(self) -> None:
        if self.open is None:
            self.house.run("TRUNCATE power_logs")

    def make_some(self) -> None:
        for _ in range(self.chance.choice([1, 2, 9])):
            self.house.run("SELECT make_quarters()")

    def two_at_once(self) -> None:
        """Two who make quarters and two who write, at the same time."""
        self.now += 16 * MINUTE
        self.house.set_clock(self.now)
        batches = [[self.some_late_rows() for _ in range(5)] for _ in range(2)]

        def make() -> None:
            with self.house.connect() as conn:
                for _ in range(5):
                    conn.execute("SELECT make_quarters()")

        def write(rows_of_batches: list[list[tuple[Any, ...]]]) -> None:
            with self.house.connect() as conn:
                for rows in rows_of_batches:
                    self.insert(conn, rows)

        threads = [threading.Thread(target=make) for _ in range(2)]
        threads += [threading.Thread(target=write, args=[batch]) for batch in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def forget(self) -> None:
        """Delete the rows of more than some days ago, as RETENTION_DAYS does."""
        days = self.chance.choice([2, 4])
        for _ in range(self.chance.choice([1, 5])):
            self.house.run("SELECT forget_rows(%s)", days)

    def clock_jumps(self) -> None:
        """The clock is wrong for a while, and rows may come meanwhile."""
        jump = self.chance.choice([-3, -40, 2, 50]) * HOUR
        self.house.set_clock(self.now + jump)
        if jump > DAY and self.chance.random() < 0.5:
            row = self.next_row(self.CHANNELS[3], self.now + jump)
            self.insert(self.house.conn, [row])
        self.make_some()
        self.house.set_clock(self.now)

    def some_window(self) -> tuple[datetime, datetime]:
        since = self.some_time() - self.chance.choice([0, 0, 7]) * MINUTE
        until = self.chance.choice(
            [self.now + HOUR, self.some_time(), self.some_time()]
        )
        return min(since, until), max(since, until)


@pytest.mark.slow
@pytest.mark.parametrize("unique", [True, False])
def test_after_random_changes_the_answers_are_those_of_the_rows(house, unique):
    life = Life(house, SEED, unique)
    house.make_all()
    final: set[str] = set()
    for number in range(1, CHANGES + 1):
        life.change()
        if number % 10 == 0:
            since, until = life.some_window()
            ((horizon,),) = house.all(
                "SELECT greatest(max(quarter) + interval '25 hours', %s)"
                " FROM power_quarters WHERE final",
                START - DAY,
            )
            assert_answers_are_those_of_rows(
                house.conn, max(since, horizon), max(until, horizon)
            )
            assert_answers_are_those_of_rows(house.conn, horizon, life.now + 90 * DAY)
            lost = final - final_quarters(house.conn)
            assert lost == set()
            final = final_quarters(house.conn)
            assert not house.all(
                "SELECT FROM power_quarters, quarter_state"
                " WHERE quarter < final_until AND NOT final"
            )
        if number % 30 == 0 and life.open is None:
            assert house.make_all() == "all made"
            assert_quarters_are_those_of_rows(house.conn)


# ---- What is made, and when ----


def hours(house: House, count: int) -> None:
    """Rows of so many hours, and their quarters, ten minutes later."""
    house.put(*range(count * 60))
    house.set_clock(minute(count * 60 + 10))
    assert house.make_all() == "all made"


def test_a_quarter_is_made_some_minutes_after_its_end(house):
    house.put(*range(34))
    house.set_clock(minute(34))
    house.make_all()
    assert house.quarters() == [(0, 15, 14.0)]
    house.put(34, 35, 36)
    house.set_clock(minute(36))
    house.make_all()
    # The rise to the next row is known as soon as that is in a quarter that is made.
    assert house.quarters() == [(0, 15, 15.0), (15, 15, 14.0)]
    assert energy(house) == [(36.0, 37)]


def test_answers_come_from_quarters_and_from_rows_for_the_rest(house):
    hours(house, 3)
    assert_answered_from_quarters(house)
    house.put(180, 181, 182)
    assert energy(house) == [(182.0, 183)]
    assert energy(house, since=minute(5), until=minute(100)) == [(95.0, 95)]
    assert energy(house, since=minute(16), until=minute(29)) == [(13.0, 13)]
    assert energy(house, until=minute(181)) == [(181.0, 181)]


def test_a_channel_that_is_silent_for_days_gets_the_rise_to_its_next_row(house):
    hours(house, 1)
    house.put(*range(2 * 1440), channel="switch:1")
    house.set_clock(minute(2 * 1440 + 10))
    house.make_all()
    house.put(2 * 1440)
    assert energy(house)[0] == (2 * 1440.0, 60)
    house.set_clock(minute(2 * 1440 + 60))
    house.put(2 * 1440 + 50)
    house.make_all()
    assert energy(house)[0] == (2 * 1440.0, 60)
    assert house.quarters()[3] == (45, 15, 2 * 1440 - 45.0)


def test_the_rise_to_a_row_that_comes_more_than_a_day_later_counts_from_then_on(house):
    hours(house, 1)
    house.put(2 * 1440, 2 * 1440 + 20)
    house.set_clock(minute(2 * 1440 + 60))
    house.make_all()
    assert energy(house, until=minute(90)) == [(59.0, 60)]
    assert energy(house, until=minute(2 * 1440)) == [(2 * 1440.0, 60)]


CHANGES_BY_HAND = {
    "INSERT of late rows": "INSERT INTO power_logs SELECT (power_logs).* FROM spare",
    "COPY": None,
    "INSERT by hand": """
        INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v,
            current_a, energy_total_wh)
        VALUES ('2026-03-01 01:00:30+00', 'house', 'switch:0', 900, 230, 4, 66)""",
    "DELETE of a row": "DELETE FROM power_logs WHERE timestamp = '2026-03-01 01:15+00'",
    "DELETE of hours": "DELETE FROM power_logs WHERE timestamp > '2026-03-01 00:40+00'",
    "DELETE of all": "DELETE FROM power_logs",
    "UPDATE of a counter": """
        UPDATE power_logs SET energy_total_wh = 0 WHERE timestamp = '2026-03-01 01:15+00'""",
    "UPDATE of a power": "UPDATE power_logs SET apower_w = 1 WHERE energy_total_wh = 70",
    "UPDATE of the device": "UPDATE power_logs SET device_id = 'new' WHERE apower_w = 60",
    "UPDATE of the time": """
        UPDATE power_logs SET timestamp = timestamp - interval '1 day 1 minute'""",
    "TRUNCATE": "TRUNCATE power_logs",
}


@pytest.mark.parametrize("change", CHANGES_BY_HAND)
def test_an_answer_is_right_at_once_after_a_change_and_soon_made_anew(house, change):
    hours(house, 4)
    # Rows that are put back one by one.
    house.run("CREATE TABLE spare AS SELECT power_logs FROM power_logs")
    house.run(
        "DELETE FROM power_logs WHERE timestamp BETWEEN %s AND %s",
        minute(50),
        minute(80),
    )
    house.make_all()
    if change == "COPY":
        columns = "timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh"
        with house.conn.cursor().copy(
            f"COPY power_logs ({columns}) FROM STDIN"
        ) as copy:
            copy.write_row((minute(65), "house", "switch:0", 60, 230, 1, 65))
    else:
        house.run(
            CHANGES_BY_HAND[change]
            + (" ON CONFLICT DO NOTHING" if "spare" in CHANGES_BY_HAND[change] else "")
        )
    assert_answers_are_those_of_rows(house.conn, START - 9 * DAY, START + 90 * DAY)
    house.make_all()
    assert house.all("SELECT count(*) FROM quarter_marks") == [(0,)]
    assert_quarters_are_those_of_rows(house.conn)


def test_rows_of_a_transaction_that_is_open_meanwhile_are_not_missed(house):
    hours(house, 1)
    ((made_until,),) = house.all("SELECT made_until FROM quarter_state")
    with house.connect() as other:
        other.autocommit = False
        other.execute(INSERT, ("house", "pm1:0", minute(61), 60, 1, None, None))
        house.put(*range(60, 300))
        house.set_clock(minute(310))
        house.make_all()
        assert house.all("SELECT made_until FROM quarter_state") == [(made_until,)]
        assert energy(house) == [(299.0, 300)]
    house.make_all()
    assert house.all("SELECT made_until FROM quarter_state") > [(made_until,)]
    assert energy(house) == [(0.0, 1), (299.0, 300)]
    assert_quarters_are_those_of_rows(house.conn)


def test_a_transaction_that_does_not_see_what_is_made_marks_its_rows(house):
    hours(house, 1)
    with house.connect() as other:
        other.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        other.autocommit = False
        other.execute("SELECT count(*) FROM power_logs")
        house.put(*range(60, 300))
        house.set_clock(minute(310))
        house.make_all()
        other.execute(INSERT, ("house", "pm1:0", minute(61), 60, 1, None, None))
    assert energy(house) == [(0.0, 1), (299.0, 300)]
    house.make_all()
    assert_quarters_are_those_of_rows(house.conn)


def test_two_late_rows_that_do_not_see_each_other_are_neighbours(house):
    house.put(0, 300)
    house.set_clock(minute(400))
    house.make_all()
    with house.connect() as one, house.connect() as two:
        one.autocommit = two.autocommit = False
        for number, conn in ((100, one), (160, two)):
            row = ("house", "switch:0", minute(number), 60, number, None, None)
            conn.execute(INSERT, row)
        one.commit()
        house.make_all()
    house.make_all()
    assert_quarters_are_those_of_rows(house.conn)


def test_a_clock_that_was_ahead_does_not_stop_the_quarters(house):
    hours(house, 2)
    house.set_clock(minute(0) + 90 * DAY)
    house.put(90 * 1440)
    house.make_all()
    house.run("DELETE FROM power_logs WHERE timestamp > %s", START + DAY)
    house.set_clock(minute(130))
    house.put(*range(120, 128))
    house.make_all()
    assert house.all("SELECT made_until FROM quarter_state") == [(minute(120),)]
    assert_quarters_are_those_of_rows(house.conn)


def test_a_long_table_is_taken_in_step_by_step_the_newest_first(house):
    house.run(
        "INSERT INTO power_logs (device_id, channel, timestamp, apower_w, voltage_v,"
        " current_a, energy_total_wh) SELECT d::text, 'switch:0', %s + n * interval"
        " '1 minute', 60, 230, 1, n FROM generate_series(1, 30) d,"
        " generate_series(0, 4000) n",
        START,
    )
    house.set_clock(minute(4010))
    before = energy(house)
    said = []
    while not said or said[-1] != "all made":
        said += house.all("SELECT make_quarters()")[0]
        assert energy(house) == before
    assert said == [
        "made back to 2026-03-03",
        "made back to 2026-03-02",
        "made back to 2026-03-01",
        "all made",
    ]
    assert_quarters_are_those_of_rows(house.conn)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Paris"])
def test_a_day_has_24_hours_whatever_the_zone_of_who_makes_quarters(house, zone):
    house.run(f"SET TimeZone = '{zone}'")
    # The night to summer time in Paris. The 0 is no reading: 23.5 hours ago it was 1,000.
    ten = START + 27 * DAY + 10 * HOUR
    for after, wh in (
        (0, 1000),
        (1, 0),
        (1410, 0),
        (1411, 1030),
        (1412, 1031),
        (1500, 1031),
    ):
        row = ("house", "switch:0", ten + after * MINUTE, 60, wh, None, None)
        house.conn.execute(INSERT, row)
    house.set_clock(ten + 2 * DAY)
    house.make_all()
    assert sum(wh for wh, _ in energy(house)) == 1.0
    house.run("SET TimeZone = 'UTC'")
    assert sum(wh for wh, _ in energy(house)) == 1.0
    house.run(f"SET TimeZone = '{zone}'")
    house.run("UPDATE power_logs SET energy_total_wh = 0 WHERE timestamp = %s", ten)
    house.run("SET TimeZone = 'UTC'")
    assert sum(wh for wh, _ in energy(house)) == 1031.0
    house.make_all()
    assert sum(wh for wh, _ in energy(house)) == 1031.0


def test_another_row_length_than_a_minute_is_answered_from_rows(house):
    hours(house, 5)
    window = (START, START + DAY)
    missing = "SELECT missing FROM coverage(%s, %s, '20 s')"
    assert house.all(missing, *window) == [(2 * 299,)]
    gaps = "SELECT count(*), sum(missing) FROM gaps(%s, %s, '20 s')"
    assert house.all(gaps, *window) == [(299, 2 * 299)]


# ---- Retention ----


def test_retention_deletes_rows_by_whole_quarters_and_their_quarters_stay(house):
    house.put(*range(0, 5 * 1440, 5))
    house.set_clock(minute(5 * 1440 + 7))
    house.make_all()
    before = energy(house)
    for _ in range(9):
        house.run("SELECT forget_rows(3)")
        house.make_all()
    assert energy(house) == before
    assert house.all("SELECT min(timestamp) FROM power_logs") == [(minute(2 * 1440),)]
    assert_answers_are_those_of_rows(house.conn, START + 3 * DAY, START + 90 * DAY)
    # A late row below the horizon changes nothing there.
    house.put(700, 701)
    house.make_all()
    assert energy(house) == before
    # An owner's own DELETE above it takes both.
    house.run("DELETE FROM power_logs WHERE timestamp > %s", minute(3 * 1440))
    assert energy(house)[:2] == before[:2]
    assert sum(rows for _, rows in energy(house)) == 3 * 1440 / 5 + 1
    house.make_all()
    assert sum(rows for _, rows in energy(house)) == 3 * 1440 / 5 + 1


def test_a_row_below_the_horizon_counts_in_no_answer(house):
    # At noon of the second day an hour is missing, and so has no quarter.
    noon = 1440 + 720
    house.put(*range(0, noon, 5), *range(noon + 60, 5 * 1440, 5))
    house.set_clock(minute(5 * 1440 + 7))
    house.make_all()
    for _ in range(9):
        house.run("SELECT forget_rows(3)")
    before = energy(house)
    house.put(700, noon + 30)
    assert energy(house) == before
    # The row before one that is changed is below the horizon now.
    house.run(
        "UPDATE power_logs SET voltage_v = 231 WHERE timestamp = %s", minute(2 * 1440)
    )
    assert house.all("SELECT count(*) > 0 FROM quarter_marks") == [(True,)]
    assert energy(house) == before
    # All others are to be made anew.
    house.run("ALTER TABLE power_logs DISABLE TRIGGER ALL")
    assert energy(house) == before


def test_no_row_is_deleted_before_the_first_step(house):
    house.put(*range(0, 5 * 1440, 5))
    house.set_clock(minute(5 * 1440 + 7))
    for lost in (None, "DROP TABLE power_quarters CASCADE", "TRUNCATE quarter_state"):
        if lost is not None:
            house.run(lost)
            house.run((ROOT / "schema.sql").read_text())
        house.run("SELECT forget_rows(3)")
        assert house.all("SELECT count(*) FROM power_logs") == [(1440,)]
        house.make_all()
    before = energy(house)
    house.run("SELECT forget_rows(3)")
    house.run("SELECT forget_rows(3)")
    assert house.all("SELECT count(*) FROM power_logs") == [(3 * 1440 / 5,)]
    assert energy(house) == before


def test_the_quarters_of_a_device_that_has_a_new_id_go_along(house):
    house.put(*range(0, 5 * 1440, 5))
    # It had the new id on the second and third day, and since the fifth.
    house.run(
        "UPDATE power_logs SET device_id = 'newer' WHERE timestamp >= %s"
        " AND date_trunc('day', timestamp, 'UTC') <> %s",
        minute(1440),
        minute(3 * 1440),
    )
    # Both have the first row of the second day, so both have that quarter.
    house.put(1440)
    house.set_clock(minute(5 * 1440 + 7))
    house.make_all()
    for _ in range(9):
        house.run("SELECT forget_rows(3)")
        house.make_all()
    # The rows of two days are gone.
    ids = "SELECT device_id, final, count(*) FROM power_quarters GROUP BY 1, 2 ORDER BY 1, 2"
    assert house.all(ids) == [
        ("house", False, 96),
        ("house", True, 97),
        ("newer", False, 191),
        ("newer", True, 96),
    ]
    house.run(join_ids("house", "newer"))
    for _ in range(2):
        assert energy(house) == [(1440.0, 288)] * 4 + [(1435.0, 288)]
        house.make_all()
    assert house.all(ids) == [("newer", False, 287), ("newer", True, 192)]


def test_no_row_is_deleted_before_its_quarter_is_made(house):
    house.put(*range(0, 5 * 1440, 5))
    house.set_clock(minute(5 * 1440 + 7))
    # This gives the table its triggers, and nothing is made yet.
    house.run("SELECT make_quarters()")
    house.run("SELECT forget_rows(3)")
    assert house.all("SELECT count(*) FROM power_logs") == [(5 * 1440 / 5,)]
    house.make_all()
    house.put(13)
    house.run("SELECT forget_rows(3)")
    # Its quarter is marked.
    assert house.all("SELECT count(*) FROM power_logs") == [(5 * 1440 / 5 + 1,)]


def test_a_late_row_above_the_horizon_is_made_up_for_before_the_horizon_moves(house):
    house.put(*range(0, 600), *range(900, 6000))
    house.set_clock(minute(6010))
    house.make_all()
    house.put(*range(630, 900))
    # The row before these is in the quarter that would be final.
    house.set_clock(minute(610) + 1 * DAY)
    house.run("SELECT forget_rows(1)")
    house.make_all()
    assert sum(rows for _, rows in energy(house)) == 5970
    assert sum(wh for wh, _ in energy(house)) == 5999.0


def test_final_quarters_stay_whatever_becomes_of_the_rest(house):
    house.put(*range(0, 5 * 1440, 5))
    house.set_clock(minute(5 * 1440 + 7))
    house.make_all()
    before = energy(house)
    for _ in range(9):
        house.run("SELECT forget_rows(3)")
    house.run("CREATE TABLE spare AS SELECT power_logs FROM power_logs")
    # An empty table takes its place.
    house.run("ALTER TABLE power_logs RENAME TO archive")
    house.run("CREATE TABLE power_logs (LIKE archive INCLUDING ALL)")
    assert energy(house) == before[:2]
    house.make_all()
    assert energy(house) == before[:2]
    house.run("INSERT INTO power_logs SELECT (power_logs).* FROM spare")
    assert energy(house) == before
    house.make_all()
    assert energy(house) == before
    assert_answered_from_quarters(house)
    # The clock is wrong for once.
    house.set_clock(START - 400 * DAY)
    house.run("SELECT make_quarters()")
    assert energy(house) == before
    # And just then all are to be made anew.
    house.run("DROP TRIGGER mark_changes_insert ON power_logs")
    house.run("SELECT make_quarters()")
    with house.connect() as conn:
        conn.autocommit = False
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        row = ("house", "switch:0", minute(4 * 1440 + 7), 60, 4 * 1440 + 7, None, None)
        conn.execute(INSERT, row)
    assert house.all("SELECT count(*) FROM quarter_marks") == [(1,)]
    house.make_all()
    assert [wh for wh, _ in energy(house)] == [wh for wh, _ in before]
    house.set_clock(minute(5 * 1440 + 7))
    house.make_all()
    assert [wh for wh, _ in energy(house)] == [wh for wh, _ in before]
    assert_answered_from_quarters(house)


def test_a_horizon_of_a_clock_that_was_ahead_is_put_back(house):
    hours(house, 5)
    ahead = START + 400 * DAY
    house.run("UPDATE quarter_state SET final_until = made_until + interval '300 days'")
    house.set_clock(ahead)
    house.put(400 * 1440)
    house.make_all()
    house.run("DELETE FROM power_logs WHERE timestamp > %s", START + DAY)
    house.set_clock(minute(320))
    house.put(*range(300, 318))
    house.make_all()
    house.set_clock(minute(700))
    house.put(*range(318, 690))
    assert house.make_all() == "all made"
    assert house.all("SELECT final_until < now() FROM quarter_state") == [(True,)]
    assert energy(house)[0][1] > 300


def test_a_clock_far_ahead_deletes_nothing(house):
    hours(house, 5)
    house.set_clock(START + 900 * DAY)
    house.run("SELECT forget_rows(3)")
    assert house.all("SELECT count(*) FROM power_logs") == [(300,)]


# ---- The table is another one ----

PARTITIONS = """
ALTER TABLE power_logs RENAME TO old_logs;
CREATE TABLE power_logs (LIKE old_logs INCLUDING DEFAULTS INCLUDING IDENTITY,
    PRIMARY KEY (id, timestamp), UNIQUE (device_id, channel, timestamp))
    PARTITION BY RANGE (timestamp);
CREATE TABLE first_day PARTITION OF power_logs
    FOR VALUES FROM ('2026-03-01 00:00+00') TO ('2026-03-02 00:00+00');
CREATE TABLE others PARTITION OF power_logs DEFAULT;
"""
COPY_ROWS = "INSERT INTO power_logs SELECT * FROM old_logs"


def test_a_dropped_partition_leaves_its_quarters_and_a_late_row_does_not_spoil_them(
    house,
):
    for statement in (PARTITIONS, COPY_ROWS, "DROP TABLE old_logs"):
        house.run(statement)
    house.put(*range(0, 3 * 1440, 3))
    house.set_clock(minute(3 * 1440 + 7))
    house.make_all()
    before = energy(house)
    assert before == [(1440.0, 480), (1440.0, 480), (1437.0, 480)]
    house.run("DROP TABLE first_day")
    house.put(701)
    for _ in range(2):
        house.make_all()
        assert energy(house) == before
    # So it is with one that comes later, at once.
    house.put(702)
    assert energy(house) == before
    house.put(800)
    house.make_all()
    assert energy(house) == before
    # They are not made anew with a new table, either.
    house.run("DROP TRIGGER mark_changes_insert ON power_logs")
    house.make_all()
    assert energy(house) == before


def test_rows_written_straight_to_a_partition_need_a_word(house):
    for statement in (PARTITIONS, COPY_ROWS):
        house.run(statement)
    hours(house, 5)
    house.run(
        "DELETE FROM first_day WHERE timestamp >= %s AND timestamp < %s",
        minute(30),
        minute(90),
    )
    assert energy(house) == [(299.0, 300)]
    house.run("SELECT remake_quarters(%s, %s)", minute(30), minute(90))
    assert energy(house) == [(299.0, 240)]
    house.make_all()
    assert energy(house) == [(299.0, 240)]
    assert_quarters_are_those_of_rows(house.conn)


@pytest.mark.parametrize(
    "change",
    [
        "DROP TRIGGER mark_changes_delete ON power_logs",
        "ALTER TABLE power_logs DISABLE TRIGGER mark_changes_update_old",
        "ALTER TABLE power_logs DISABLE TRIGGER ALL",
        PARTITIONS + COPY_ROWS,
    ],
)
def test_a_table_that_reports_no_changes_is_noticed_and_taken_in_anew(house, change):
    hours(house, 5)
    house.run(change)
    house.run("DELETE FROM power_logs WHERE timestamp < %s", minute(100))
    assert energy(house) == [(199.0, 200)]
    assert house.make_all() == "all made"
    assert energy(house) == [(199.0, 200)]
    house.run("DELETE FROM power_logs WHERE timestamp < %s", minute(120))
    assert energy(house) == [(179.0, 180)]
    house.make_all()
    assert_quarters_are_those_of_rows(house.conn)


def test_of_rows_that_are_gone_nothing_is_left_however_many_quarters_they_had(house):
    hours(house, 5)
    house.run("ALTER TABLE power_logs DISABLE TRIGGER ALL")
    # More than a step deletes.
    house.run(
        """
        INSERT INTO power_quarters (device_id, channel, quarter, rows,
                                    sum_w, min_w, max_w, first_row, last_row)
        SELECT 'gone-' || d, 'switch:0', %s - n * interval '15 minutes', 1,
               1, 1, 1, %s, %s
        FROM generate_series(1, 201) n, generate_series(1, 100) d
        """,
        START,
        START,
        START,
    )
    assert house.make_all() == "all made"
    assert house.all("SELECT DISTINCT device_id FROM power_quarters") == [("house",)]
    assert_quarters_are_those_of_rows(house.conn)


def test_what_happens_to_a_replaced_table_sets_no_mark(house):
    hours(house, 5)
    for statement in (PARTITIONS, COPY_ROWS):
        house.run(statement)
    assert house.make_all() == "all made"
    house.run("DELETE FROM old_logs WHERE timestamp < %s", minute(100))
    assert house.all("SELECT count(*) FROM quarter_marks") == [(0,)]


@pytest.mark.parametrize(
    "change",
    [
        "TRUNCATE quarter_state",
        "TRUNCATE quarter_state, power_quarters, quarter_marks",
        "DROP TABLE quarter_marks CASCADE; DROP TABLE power_quarters CASCADE",
        "DROP TABLE quarter_state CASCADE",
    ],
)
def test_who_throws_quarters_away_gets_them_made_anew(house, change):
    hours(house, 5)
    for statement in change.split("; "):
        house.run(statement)
    house.put(*range(300, 330))
    house.run((ROOT / "schema.sql").read_text())
    assert energy(house) == [(329.0, 330)]
    assert house.make_all() == "all made"
    assert energy(house) == [(329.0, 330)]
    assert_answered_from_quarters(house)


@pytest.mark.parametrize(
    "change",
    [
        "ALTER SCHEMA public RENAME TO energy; SET search_path = energy, pg_catalog",
        "CREATE SCHEMA other; ALTER TABLE quarter_state SET SCHEMA other",
        "DROP TABLE quarter_state CASCADE",
    ],
)
def test_rows_go_in_when_no_mark_can_be_set(house, change):
    hours(house, 2)
    for statement in change.split("; "):
        house.run(statement)
    house.put(150, 151, 152)
    house.run("DELETE FROM power_logs WHERE timestamp = %s", minute(152))
    assert house.all("SELECT count(*) FROM power_logs") == [(122,)]
    if "DROP" not in change:
        assert energy(house) == [(151.0, 122)]


def test_a_new_owner_of_the_tables_gets_his_rows_and_right_answers(house):
    name = f"heir_{house.conn.info.dbname}"
    hours(house, 2)
    house.run(f"CREATE ROLE {name}")
    house.run(f"ALTER FUNCTION mark_changes() OWNER TO {name}")
    house.run("DELETE FROM power_logs WHERE timestamp > %s", minute(30))
    assert energy(house) == [(30.0, 31)]
    house.run("ALTER FUNCTION mark_changes() OWNER TO postgres")
    house.run(f"DROP ROLE {name}")


def test_tables_that_inherit_from_it_are_refused(house):
    house.run("CREATE TABLE march () INHERITS (power_logs)")
    assert house.make_all().startswith("none: power_logs has tables that inherit")


def test_an_owner_from_whom_rows_are_hidden_gets_no_quarters(house):
    name = f"owner_{house.conn.info.dbname}"
    house.put(1, 2, 3)
    house.run(f"CREATE ROLE {name}")
    house.run(f"GRANT ALL ON quarter_state, quarter_marks, clock TO {name}")
    house.run(f"ALTER FUNCTION make_quarters() OWNER TO {name}")
    house.run(f"ALTER TABLE power_logs OWNER TO {name}")
    house.run(
        "ALTER TABLE power_logs ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
    )
    assert house.make_all() == (
        "none: the row security of power_logs hides rows from its owner"
    )
    house.run(f"REASSIGN OWNED BY {name} TO CURRENT_USER")
    house.run(f"DROP OWNED BY {name}")
    house.run(f"DROP ROLE {name}")


# ---- Rights ----


@pytest.fixture
def role(house):
    """Connections of a role that owns nothing; `role(rights)` grants rights first."""
    name = f"role_{house.conn.info.dbname}"
    house.run(f"CREATE ROLE {name}")
    opened = []

    def connect(*rights: str) -> psycopg.Connection[Any]:
        for right in rights:
            house.run(f"GRANT {right} TO {name}")
        conn = house.connect()
        conn.execute(f"SET SESSION AUTHORIZATION {name}")
        opened.append(conn)
        return conn

    yield connect
    for conn in opened:
        conn.close()
    house.run(f"DROP OWNED BY {name}")
    house.run(f"DROP ROLE {name}")


ROW = ("house", "switch:0", minute(30), 60, 30, None, None)


def test_a_role_that_may_only_insert_and_select_writes_late_rows(house, role):
    conn = role("INSERT, SELECT ON power_logs", "SELECT ON clock")
    house.put(*range(30), *range(31, 60))
    house.set_clock(minute(70))
    for _ in range(9):
        conn.execute("SELECT make_quarters()")
    assert_answered_from_quarters(house)
    conn.execute(INSERT, ROW)
    assert energy(house) == [(59.0, 60)]
    for _ in range(3):
        conn.execute("SELECT make_quarters()")
    assert_quarters_are_those_of_rows(house.conn)


def test_who_may_read_the_table_may_read_its_quarters_and_nobody_else(house, role):
    conn = role("SELECT ON clock")
    hours(house, 5)
    # What he calls power_logs is not the table that he may not read.
    conn.execute("CREATE TEMP TABLE power_logs (timestamp TIMESTAMPTZ)")
    for view in (
        "readable_quarters",
        "readable_quarter_marks",
        "readable_quarter_state",
    ):
        assert conn.execute(f"SELECT count(*) FROM {view}").fetchall() == [(0,)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("SELECT * FROM power_quarters")
    conn = role("SELECT ON power_logs")
    asked = "SELECT rows FROM energy_by_day(%s, %s, 'UTC')"
    window = (START, START + DAY)
    assert conn.execute(asked, window).fetchall() == [(300,)]
    assert conn.execute("SELECT count(*) FROM readable_quarters").fetchall() == [(19,)]


def test_who_may_not_insert_takes_no_step(house, role):
    conn = role("SELECT ON power_logs", "SELECT ON clock")
    assert conn.execute("SELECT make_quarters()").fetchall() == [
        ("none: this role may not insert into power_logs",)
    ]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("CREATE TEMP TABLE mine (device_id TEXT)")
        conn.execute(
            "CREATE TRIGGER mine AFTER INSERT ON mine REFERENCING NEW TABLE AS"
            " changed_rows FOR EACH STATEMENT EXECUTE FUNCTION mark_changes()"
        )


def test_who_may_not_delete_moves_no_horizon(house, role):
    conn = role("SELECT, INSERT ON power_logs", "SELECT ON clock")
    hours(house, 5)
    moved = "SELECT finalize_expired(%s) > '-infinity'"
    assert conn.execute(moved, (minute(60),)).fetchall() == [(False,)]
    assert house.all("SELECT DISTINCT final FROM power_quarters") == [(False,)]
    assert house.all(moved, minute(60)) == [(True,)]


def test_a_temporary_table_does_not_catch_the_marks(house, role):
    hours(house, 5)
    conn = role("INSERT, SELECT ON power_logs", "SELECT ON clock")
    conn.execute(
        "CREATE TEMP TABLE quarter_marks (device_id TEXT, channel TEXT,"
        " since TIMESTAMPTZ, until TIMESTAMPTZ, removes BOOLEAN)"
    )
    conn.execute("CREATE TEMP TABLE quarter_state (marked_until TIMESTAMPTZ)")
    conn.execute(INSERT, (*ROW[:1], "switch:1", *ROW[2:]))
    assert len(energy(house)) == 2


@pytest.mark.parametrize("were_made", [False, True])
def test_without_the_right_to_the_triggers_there_are_no_quarters(house, were_made):
    name = f"maker_{house.conn.info.dbname}"
    house.run(f"CREATE ROLE {name}")
    house.put(*range(0, 5 * 1440, 5))
    house.set_clock(minute(5 * 1440 + 7))
    if were_made:
        house.make_all()
        house.run("DROP TRIGGER mark_changes_delete ON power_logs")
    house.run(f"ALTER FUNCTION make_quarters() OWNER TO {name}")
    house.run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON quarter_state TO {name}")
    house.run(f"GRANT SELECT ON power_logs, clock TO {name}")
    assert house.make_all() == "none: permission denied for table power_logs"
    assert len(energy(house)) == 5
    # Then rows are deleted as ever.
    house.run("SELECT forget_rows(3)")
    assert len(energy(house)) == 3
    house.run(f"DROP OWNED BY {name} CASCADE")
    house.run(f"DROP ROLE {name}")


def test_a_step_gives_way_to_a_change_of_the_table(house):
    hours(house, 2)
    with house.connect() as other:
        other.autocommit = False
        other.execute("LOCK TABLE power_logs IN ACCESS EXCLUSIVE MODE")
        house.run("SET statement_timeout = '5s'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            house.run("SELECT make_quarters()")
    assert house.make_all() == "all made"


def test_while_another_collector_makes_the_first_step_nothing_is_made(house):
    with house.connect() as other:
        other.autocommit = False
        other.execute("SELECT make_quarters()")
        assert house.all("SELECT make_quarters()") == [("being made",)]


def test_where_the_table_is_a_view_there_are_no_quarters(house):
    house.run("ALTER TABLE power_logs RENAME TO rows_of_power")
    house.run("CREATE VIEW power_logs AS SELECT * FROM rows_of_power")
    house.put(1, 2, 3)
    assert house.make_all().startswith("none: ")
    assert energy(house) == [(2.0, 3)]


# ---- The new questions ----


def test_gaps_are_listed_one_by_one_and_resets_with_their_time(house):
    house.put(*range(0, 30), *range(40, 60), *range(200, 230))
    house.run(
        "UPDATE power_logs SET energy_total_wh = 0 WHERE timestamp = %s", minute(210)
    )
    house.set_clock(minute(300))
    asked = (
        "SELECT kind, began_at, ended_at, missing FROM gaps(%s, %s) ORDER BY began_at"
    )
    expected = [
        ("no data", minute(30), minute(40), 10),
        ("no data", minute(60), minute(200), 140),
        ("reset", minute(210), minute(210), 0),
    ]
    for _ in range(2):
        assert house.all(asked, START, minute(300)) == expected
        assert house.all(asked, minute(5), minute(201)) == expected[:2]
        assert house.all(asked, minute(5), minute(200)) == expected[:1]
        assert house.all(asked, minute(35), minute(210)) == expected[1:2]
        house.make_all()


def test_a_month_is_the_sum_of_its_days_in_the_zone(house):
    house.put(*range(0, 40 * 1440, 10))
    house.set_clock(START + 40 * DAY)
    asked = (
        "SELECT month, energy_wh, rows FROM energy_by_month(%s, %s, 'Asia/Kathmandu')"
    )
    days = (
        "SELECT sum(energy_wh), sum(rows) FROM energy_by_day(%s, %s, 'Asia/Kathmandu')"
    )
    window = (START, START + 40 * DAY)
    for _ in range(2):
        months = house.all(asked, *window)
        assert [(month.month, rows) for month, _, rows in sorted(months)] == [
            # Midnight in Kathmandu is at 18:15.
            (3, 31 * 144 - 34),
            (4, 9 * 144 + 34),
        ]
        ((wh, rows),) = house.all(days, *window)
        assert sum(month[1] for month in months) == pytest.approx(wh)
        assert sum(month[2] for month in months) == rows
        house.make_all()


@pytest.mark.parametrize(
    ("since", "until", "found"),
    [
        ("'-infinity'", "'infinity'", 1),
        ("'2026-01-01'", "'250000-12-31'", 1),
        ("'2026-03-02'", "'2026-03-01'", 0),
        ("'2026-03-01'", "'2026-03-01'", 0),
        ("NULL", "now()", 0),
        ("'2026-03-01'", "NULL", 0),
    ],
)
def test_windows_without_end_or_sense_are_answered(house, since, until, found):
    house.put(*range(100))
    house.set_clock(minute(110))
    for _ in range(2):
        for question in ("energy_by_day", "energy_by_month", "coverage"):
            asked = f"SELECT * FROM {question}({since}, {until})"
            assert len(house.all(asked)) == found, question
        asked = f"SELECT * FROM power_series({since}, {until}, '1 day')"
        assert len(house.all(asked)) == found
        assert house.all(f"SELECT * FROM gaps({since}, {until})") == []
        house.make_all()


def test_rows_that_a_meter_remembered_are_counted(house):
    house.put(*range(60))
    house.run(
        "UPDATE power_logs SET origin = 'memory' WHERE timestamp < %s", minute(20)
    )
    house.set_clock(minute(70))
    asked = "SELECT rows, from_memory FROM coverage(%s, %s)"
    for _ in range(2):
        assert house.all(asked, START, minute(70)) == [(60, 20)]
        house.make_all()
