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

from support import ROOT

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
AS 'SELECT time FROM public.clock';
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
        while True:
            before = self.progress()
            ((progress,),) = self.all("SELECT make_quarters()")
            if self.progress() == before:
                return progress

    def progress(self) -> list[tuple[Any, ...]]:
        return self.all(
            "SELECT s::text, (SELECT count(*) FROM quarter_marks), (SELECT count(*)"
            " FROM power_quarters WHERE final) FROM quarter_state s"
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
    return House(database)


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


def rounded(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The last digits of a sum depend on its order."""
    return sorted(
        tuple(
            round(value, 4) + 0.0 if isinstance(value, float) else value
            for value in row
        )
        for row in rows
    )


def assert_answers_are_those_of_rows(
    conn: psycopg.Connection[Any], since: datetime, until: datetime
) -> None:
    window = {"since": since, "until": until}
    for question in QUESTIONS:
        query = SQL("SELECT * FROM " + question)
        with conn.transaction() as transaction:
            conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            answer = conn.execute(query, window).fetchall()
            # Functions read rows as long as not all quarters are made.
            conn.execute("UPDATE quarter_state SET made_from = 'infinity'")
            expected = conn.execute(query, window).fetchall()
            assert rounded(answer) == rounded(expected), (question, window)
            raise psycopg.Rollback(transaction)


def assert_quarters_are_those_of_rows(conn: psycopg.Connection[Any]) -> None:
    """When no mark is left, what is stored is what the rows make, above the horizon."""
    columns = (
        "device_id, channel, quarter, rows, rows_from_memory, round(sum_w::numeric, 4),"
        " min_w, max_w, round(total_wh::numeric, 4), round(largest_wh::numeric, 4),"
        " round(returned_wh::numeric, 4), first_row, last_row, gap_began, gap_ended,"
        " gap_power_w, resets, next_row"
    )
    ((made_until, final_until),) = conn.execute(
        "SELECT made_until, greatest(final_until, '0001-01-02') FROM quarter_state"
    ).fetchall()
    stored = conn.execute(
        f"SELECT {columns} FROM power_quarters WHERE quarter >= %s", [final_until]
    ).fetchall()
    expected = conn.execute(
        f"SELECT {columns} FROM quarters_of_rows(%s, %s, %s, '1 minute')",
        [final_until, made_until, made_until],
    ).fetchall()
    assert sorted(map(str, stored)) == sorted(map(str, expected))
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
        self.now = START + 2 * DAY
        self.oldest = self.now
        self.unique = unique
        # The counters of each channel: total, given back, power.
        self.meters = {key: [1000.0, 500.0, 0.0] for key in self.CHANNELS}
        # A transaction of somebody else's that is open, and when it ends.
        self.open: psycopg.Connection[Any] | None = None
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
        kind()
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
            "UPDATE power_logs SET timestamp = timestamp + interval '1 second'"
            " WHERE timestamp >= %s AND timestamp < %s AND device_id = %s"
            " AND channel = %s AND date_part('second', timestamp) = 0",
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
    for number in range(1, CHANGES + 1):
        life.change()
        if number % 10 == 0:
            assert_answers_are_those_of_rows(house.conn, *life.some_window())
            assert_answers_are_those_of_rows(
                house.conn, START - DAY, life.now + 90 * DAY
            )
        if number % 30 == 0 and life.open is None:
            assert house.make_all() == "all made"
            assert_quarters_are_those_of_rows(house.conn)
