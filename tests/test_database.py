"""schema.sql and the INSERT, against a real PostgreSQL."""

import asyncio

import psycopg
import pytest

from database import SCHEMA_VERSION
from quarters import next_step
from shelly_collector import open_database, write_batches, write_rows
from support import (
    ALL_VALUES,
    DEVICE,
    EM,
    EMDATA,
    METER,
    NOON,
    ORIGINAL_TABLE,
    PHASES,
    RETURNED_ROWS,
    ROOT,
    VALUES,
    Row,
    close_pools,
    device,
    execute,
    fill,
    join_ids,
    minute_frame,
    new_collector,
    notify,
    open_outbox,
    query,
    read_rows,
    run_script,
    stop_writer,
    wait_for,
    wait_for_rows,
)

OLD_ROW = "INSERT INTO power_logs VALUES (DEFAULT, '2020-01-01', 'old', 'switch:0', 1, 2, 3, 4)"
MANY_ROWS = (
    "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)"
    " SELECT to_timestamp(n), 'old', 'switch:0', 1, 2, 3, 4 FROM generate_series(1, 300000) n"
)
PARTS = {
    "idx_power_logs_timestamp",
    "idx_power_logs_device_channel",
    "power_logs_one_row_per_interval",
}


def indexes(database):
    with psycopg.connect(database) as conn:
        found = conn.execute(
            "SELECT indexname FROM pg_indexes WHERE tablename = 'power_logs'"
        ).fetchall()
    return {name for (name,) in found}


def row(n=0, device_id=DEVICE, apower=1.0):
    return Row(NOON + 60 * n, device_id, "switch:0", apower, 230.0, 0.5, 9.0)


async def prepare(database):
    collector = new_collector(DATABASE_URL=database)
    collector.pool = await open_database(collector)
    await close_pools(collector)


@pytest.fixture
async def writer(make, database):
    """Write rows as the collector does, and wait until none is left; returns how many were new."""
    collector = make(DATABASE_URL=database)
    task = None

    async def write(rows):
        nonlocal task
        before = collector.rows_written
        fill(collector.outbox, rows)
        if task is None:
            task = asyncio.create_task(write_batches(collector))
        await wait_for(lambda: len(collector.outbox) == 0 or task.done(), 30)
        return collector.rows_written - before

    write.collector = collector
    yield write
    if task is not None:
        await stop_writer(collector, task)


async def test_the_table_is_made_with_its_columns_and_indexes(database):
    await prepare(database)
    await prepare(database)
    # An owner may apply it again by hand.
    execute(database, (ROOT / "schema.sql").read_bytes())
    with psycopg.connect(database) as conn:
        columns = conn.execute(
            "SELECT column_name, data_type, character_maximum_length, is_nullable FROM information_schema.columns"
            " WHERE table_name = 'power_logs' ORDER BY ordinal_position"
        ).fetchall()
    assert columns == [
        ("id", "bigint", None, "NO"),
        ("timestamp", "timestamp with time zone", None, "NO"),
        ("device_id", "character varying", 100, "NO"),
        ("channel", "character varying", 20, "NO"),
        ("apower_w", "double precision", None, "NO"),
        ("voltage_v", "double precision", None, "NO"),
        ("current_a", "double precision", None, "NO"),
        ("energy_total_wh", "double precision", None, "NO"),
        ("created_at", "timestamp with time zone", None, "YES"),
        ("energy_returned_wh", "double precision", None, "YES"),
        ("origin", "text", None, "YES"),
    ]
    assert indexes(database) >= PARTS


async def test_a_view_in_the_tables_place_keeps_its_rule(writer, database, caplog):
    await prepare(database)
    execute(
        database,
        "ALTER TABLE power_logs RENAME TO power_rows",
        "CREATE VIEW power_logs AS SELECT * FROM power_rows",
    )
    rows = [row(n) for n in range(5)]
    assert await writer(rows) == 5
    # A replay is no error, and no row of it is "lost".
    assert await writer(rows) == 0
    assert writer.collector.outbox.dropped == 0 and "lacks" not in caplog.text
    assert len(read_rows(database)) == 5


async def test_a_view_whose_trigger_takes_the_rows_is_written_to(writer, database):
    # PostgreSQL knows no ON CONFLICT there, though the table below has the rule.
    await prepare(database)
    execute(
        database,
        "ALTER TABLE power_logs RENAME TO power_rows",
        "CREATE VIEW power_logs AS SELECT * FROM power_rows",
        """CREATE FUNCTION take_row() RETURNS TRIGGER LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO power_rows (timestamp, device_id, channel, apower_w, voltage_v,
            current_a, energy_total_wh) VALUES (NEW.timestamp, NEW.device_id,
            NEW.channel, NEW.apower_w, NEW.voltage_v, NEW.current_a,
            NEW.energy_total_wh) ON CONFLICT DO NOTHING;
        RETURN NEW; END $$""",
        "CREATE TRIGGER take INSTEAD OF INSERT ON power_logs"
        " FOR EACH ROW EXECUTE FUNCTION take_row()",
    )
    await writer([row(n) for n in range(5)])
    assert len(read_rows(database)) == 5 and writer.collector.outages == 0


async def test_many_processes_may_apply_the_schema_at_once(database):
    await asyncio.gather(*(prepare(database) for _ in range(12)))
    assert indexes(database) >= PARTS


@pytest.mark.slow
async def test_an_existing_table_keeps_its_rows_and_gets_the_rule(collectors, database):
    execute(database, ORIGINAL_TABLE, OLD_ROW)
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        assert [r[0] for r in await wait_for_rows(database, 2)] == ["old", DEVICE]
    assert (
        "power_logs_one_row_per_interval" in indexes(database)
        and "WARNING power_logs" not in running.log
    )


@pytest.mark.slow
async def test_a_table_with_duplicates_goes_on_without_the_rule_and_the_log_says_how_to_see_them(
    collectors, database
):
    execute(database, ORIGINAL_TABLE, OLD_ROW, OLD_ROW)
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 3)
    assert "power_logs_one_row_per_interval" not in indexes(database)
    (line,) = [line for line in running.log.splitlines() if "duplicates" in line]
    query = line.partition("shows them: ")[2]
    with psycopg.connect(database) as conn:
        assert [r[0] for r in conn.execute(query).fetchall()] == ["old"]


@pytest.mark.slow
@pytest.mark.parametrize("whole_schema", [True, False])
async def test_a_role_that_may_only_insert_and_select_is_enough(
    collectors, database, whole_schema
):
    # Roles belong to the whole server, so each test has its own.
    role = "meter_" + psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    if whole_schema:
        await prepare(database)
    else:
        execute(
            database,
            ORIGINAL_TABLE,
            "GRANT USAGE ON SEQUENCE power_logs_id_seq TO PUBLIC",
        )
    execute(
        database,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT INSERT, SELECT ON power_logs TO {role}",
    )
    running = await collectors(
        DATABASE_URL=psycopg.conninfo.make_conninfo(database, user=role)
    ).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)
    assert running.log.count("is used as it is") == (0 if whole_schema else 1)
    _, out, err = await run_script(running.folder, "--check", **running.env)
    assert "holds 1 rows" in out and "Traceback" not in err
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.slow
async def test_a_newer_schema_reaches_an_existing_database_and_an_older_one_is_left(
    collectors, database
):
    def version():
        with psycopg.connect(database) as conn:
            return conn.execute("SELECT power_logs_version()").fetchone()[0]

    await prepare(database)
    assert version() == SCHEMA_VERSION
    execute(database, "DROP FUNCTION newest_rows")
    execute(
        database,
        "CREATE OR REPLACE FUNCTION power_logs_version() RETURNS INT LANGUAGE sql IMMUTABLE AS 'SELECT 1'",
    )
    running = await collectors(DATABASE_URL=database).ready()
    assert version() == SCHEMA_VERSION
    await running.stop()
    execute(
        database,
        "CREATE OR REPLACE FUNCTION power_logs_version() RETURNS INT LANGUAGE sql IMMUTABLE AS 'SELECT 99'",
    )
    await (await running.again()).ready()
    assert version() == 99 and "WARNING" not in running.log


@pytest.mark.slow
async def test_while_an_index_is_built_rows_wait_and_health_says_so(
    collectors, database
):
    execute(database, ORIGINAL_TABLE, OLD_ROW)
    # This delays the index, as a long table would.
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE power_logs IN ROW EXCLUSIVE MODE")
        running = await collectors(DATABASE_URL=database).ready("preparing the table")
        async with device(running.url) as peer:
            await peer.send(minute_frame())
            await wait_for(lambda: "rows waiting: 1" in running.get()[1])
            other.rollback()
            await wait_for_rows(database, 2)
    assert (
        "power_logs_one_row_per_interval" in indexes(database)
        and "ERROR" not in running.log
    )


@pytest.mark.slow
async def test_a_stop_while_an_index_is_built_is_quick_and_leaves_nothing_waiting(
    collectors, database
):
    execute(database, ORIGINAL_TABLE)
    with (
        psycopg.connect(database) as other,
        psycopg.connect(database, autocommit=True) as look,
    ):
        other.execute("LOCK TABLE power_logs IN ROW EXCLUSIVE MODE")
        running = await collectors(DATABASE_URL=database).ready("preparing the table")
        status, took = await running.stop()
        assert status == 0 and took < 3
        backends = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shelly_collector' AND datname = current_database()"
        await wait_for(lambda: look.execute(backends).fetchone() == (0,))


async def test_the_newest_row_of_each_channel_is_found_with_its_name(database):
    await prepare(database)
    execute(
        database,
        "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)"
        " SELECT to_timestamp(60 * m), d, c, m, 2, 3, 10 * m FROM generate_series(1, 50) m, unnest(ARRAY['a', 'b', 'B']) d,"
        " unnest(ARRAY['switch:0', 'switch:10']) c",
        "INSERT INTO channel_names VALUES ('a', 'switch:0', 'Switch', 'Pump'), ('b', 'switch:10', 'Heater', NULL)",
    )
    with psycopg.connect(database) as conn:
        conn.execute("SET timezone TO 'UTC'")
        cursor = conn.execute("SELECT * FROM newest_rows()")
        rows, columns = (
            cursor.fetchall(),
            [column.name for column in cursor.description],
        )
        assert columns == [
            "device_id",
            "channel",
            "name",
            "timestamp",
            "apower_w",
            "energy_total_wh",
        ]
        names = {(r[0], r[1]): r[2] for r in rows}
        assert (
            names.pop(("a", "switch:0")) == "Pump"
            and names.pop(("b", "switch:10")) == "Heater"
        )
        assert len(names) == 4 and set(names.values()) == {None}
        assert {(r[3].timestamp(), r[4], r[5]) for r in rows} == {(3000.0, 50.0, 500.0)}
        conn.execute("TRUNCATE power_logs")
        assert conn.execute("SELECT * FROM newest_rows()").fetchall() == []


async def test_the_newest_row_is_found_by_index_steps_however_long_the_channel_is_dead(
    database,
):
    await prepare(database)
    execute(
        database,
        "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)"
        " SELECT to_timestamp(60 * m), 'd', 'switch:' || c, m, 2, 3, 4 FROM generate_series(1, 20000) m, generate_series(0, 3) c"
        " WHERE c <> 2 OR m < 10",
        "VACUUM ANALYZE power_logs",
    )
    with psycopg.connect(database) as conn:
        plan = conn.execute(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM newest_rows()"
        ).fetchone()[0]
    assert (
        plan[0]["Plan"]["Actual Rows"] == 4
        and plan[0]["Plan"]["Shared Hit Blocks"] < 100
    )


async def test_the_first_reading_of_an_interval_wins(writer, database, caplog):
    assert await writer([row(apower=1.0), row(apower=2.0), row(1)]) == 2
    assert await writer([row(apower=3.0), row(2)]) == 1
    assert [r[2] for r in read_rows(database, VALUES)] == [
        1.0,
        1.0,
        1.0,
    ] and caplog.messages == []


async def test_numbers_and_texts_arrive_to_the_last_bit(writer, database):
    values = (0.1 + 0.2, -1.7976931348623157e308, 5e-324, 2.0**53 + 2)
    await writer(
        [
            Row(NOON, 'a"b\\c,{}', "switch:0", *values),
            Row(NOON, "NULL", "switch:0", *values),
        ]
    )
    assert read_rows(database, VALUES) == [
        ("NULL", "switch:0", *values),
        ('a"b\\c,{}', "switch:0", *values),
    ]


@pytest.mark.parametrize("bad", [[37], [0, 99], range(100), range(1, 100, 2)])
@pytest.mark.parametrize(
    "rule", ["CHECK (apower_w <> 666)", "CHECK (device_id <> 'bad')"]
)
async def test_a_row_that_the_database_refuses_is_dropped_alone_and_logged(
    writer, database, caplog, rule, bad
):
    await prepare(database)
    execute(database, f"ALTER TABLE power_logs ADD CONSTRAINT my_rule {rule}")
    rows = [row(n) for n in range(100)]
    for n in bad:
        rows[n] = rows[n]._replace(device_id="bad", apower_w=666.0)
    assert await writer(rows) == 100 - len(bad) == len(read_rows(database))
    assert writer.collector.outbox.dropped == len(bad)
    # There is at most one a minute about the same channel, and a new minute may start
    # during the test.
    assert len(caplog.messages) in (1, 2)
    assert all(
        "my_rule" in message and "bad" in message and "\n" not in message
        for message in caplog.messages
    )


async def test_a_rule_that_skips_a_row_is_no_refusal(writer, database, caplog):
    await prepare(database)
    execute(
        database,
        "ALTER TABLE power_logs ADD EXCLUDE (device_id WITH =) WHERE (device_id = 'bad')",
    )
    assert (
        await writer([row(n, "bad" if n == 37 else "good") for n in range(100)]) == 100
        and not caplog.messages
    )
    assert await writer([row(200, "good"), row(200, "bad"), row(201, "good")]) == 2
    assert "conflicting key value" in caplog.text


async def test_a_row_of_a_device_that_a_table_of_the_owners_does_not_know_is_dropped_alone(
    writer, database, caplog
):
    await prepare(database)
    execute(
        database,
        f"CREATE TABLE mine (id TEXT PRIMARY KEY); INSERT INTO mine VALUES ('{DEVICE}')",
        "ALTER TABLE power_logs ADD FOREIGN KEY (device_id) REFERENCES mine",
    )
    assert (
        await writer([row(0), row(1, "stranger"), row(2)]) == 2
        and "stranger" in caplog.text
    )


async def test_a_double_that_only_the_table_knows_of_is_dropped_alone(writer, database):
    # ON CONFLICT cannot use this rule.
    execute(
        database,
        ORIGINAL_TABLE,
        "ALTER TABLE power_logs ADD UNIQUE (device_id, channel, timestamp) DEFERRABLE",
    )
    assert await writer([row(0)]) == 1
    assert (
        await writer([row(0), row(1), row(2)]) == 2
        and writer.collector.outbox.dropped == 1
    )


@pytest.mark.slow
async def test_a_server_that_is_slow_with_many_rows_gets_fewer_at_a_time(
    writer, database, replace
):
    await prepare(database)
    execute(
        database,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.01); RETURN NEW; END $$",
        "CREATE TRIGGER slow BEFORE INSERT ON power_logs FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    replace(ANSWER_TIMEOUT=0.5, PATIENT_TIMEOUT=1.0)
    # In one piece they take 4 s.
    await writer([row(n) for n in range(400)])
    # Don't ask the collector: it counts no row whose answer came too late.
    assert len(read_rows(database)) == 400


async def test_a_row_that_a_trigger_refuses_is_dropped_alone(writer, database, caplog):
    await prepare(database)
    execute(
        database,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.apower_w = 666 THEN RAISE EXCEPTION 'not this one'; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER refuse BEFORE INSERT ON power_logs FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    assert await writer([row(0), row(1, apower=666.0), row(2)]) == 2
    assert "not this one" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "name", "kept"),
    [
        ("LATIN1", "Ωmega", False),
        ("SQL_ASCII", "ж" * 50, True),
        ("LATIN1", "Ümega", True),
    ],
)
async def test_a_name_that_the_encoding_cannot_hold_costs_only_its_row(
    collectors, database, encoding, name, kept
):
    narrow = f"{psycopg.conninfo.conninfo_to_dict(database)['dbname']}_narrow"
    execute(
        database,
        f"CREATE DATABASE {narrow} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0",
    )
    url = psycopg.conninfo.make_conninfo(database, dbname=narrow)
    running = await collectors(DATABASE_URL=url).ready()
    async with device(running.url) as peer:
        await peer.send(
            minute_frame("one"),
            minute_frame(name),
            minute_frame("two"),
            minute_frame("ж" * 60),
        )
        await wait_for(
            lambda: (
                "rows waiting: 0" in running.get()[1]
                and len(read_rows(url)) >= 2 + kept
            )
        )
    with psycopg.connect(url, client_encoding="utf8") as conn:
        found = {
            row[0] if isinstance(row[0], str) else row[0].decode()
            for row in conn.execute("SELECT device_id FROM power_logs")
        }
    assert found == {"one", "two", *([name] if kept else [])}
    assert running.log.count("row dropped") == (not kept) and "ERROR" not in running.log
    await running.stop()
    execute(database, f"DROP DATABASE {narrow} WITH (FORCE)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "undo"),
    [
        (
            "ALTER TABLE power_logs RENAME COLUMN apower_w TO power",
            "ALTER TABLE power_logs RENAME COLUMN power TO apower_w",
        ),
        (
            "ALTER TABLE power_logs ADD COLUMN site TEXT NOT NULL DEFAULT '?'; ALTER TABLE power_logs ALTER site DROP DEFAULT",
            "ALTER TABLE power_logs DROP COLUMN site",
        ),
        (
            "ALTER TABLE power_logs ALTER device_id TYPE BYTEA USING ''",
            "ALTER TABLE power_logs ALTER device_id TYPE TEXT USING 'x'",
        ),
    ],
)
async def test_a_table_with_other_columns_is_a_clear_error_and_the_rows_wait(
    collectors, database, change, undo
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="0.5"
    ).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("before"))
        await wait_for_rows(database, 1)
        execute(database, change)
        await peer.send(minute_frame("during"))
        await wait_for(lambda: "database unreachable" in running.log)
        await wait_for(lambda: "rows waiting: 1" in running.get()[1])
        execute(database, undo)
        await wait_for_rows(database, 2)
    (error,) = [line for line in running.log.splitlines() if "ERROR" in line]
    assert "column" in error


@pytest.mark.slow
async def test_a_missing_partition_makes_the_rows_wait(collectors, database):
    await prepare(database)
    execute(
        database,
        "ALTER TABLE power_logs RENAME TO plain",
        "ALTER INDEX power_logs_one_row_per_interval RENAME TO plain_rule",
        "CREATE TABLE power_logs (LIKE plain INCLUDING DEFAULTS INCLUDING IDENTITY) PARTITION BY RANGE (timestamp)",
    )
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for(lambda: "no partition" in running.log)
        execute(database, "CREATE TABLE power_logs_all PARTITION OF power_logs DEFAULT")
        await wait_for_rows(database, 1)


async def test_a_table_of_monthly_parts_is_left_whole_by_the_schema_and_keeps_doubles_out(
    writer, database
):
    # These are the statements of docs/growing.md, without pg_partman.
    await prepare(database)
    execute(
        database,
        OLD_ROW,
        "ALTER TABLE power_logs RENAME TO power_logs_old",
        "CREATE TABLE power_logs (LIKE power_logs_old INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING COMMENTS,"
        " PRIMARY KEY (id, timestamp), UNIQUE (device_id, channel, timestamp)) PARTITION BY RANGE (timestamp)",
        "CREATE INDEX ON power_logs (timestamp)",
        "CREATE INDEX ON power_logs (device_id, channel)",
        "ALTER TABLE power_logs ALTER id ADD GENERATED BY DEFAULT AS IDENTITY",
        "SELECT setval(pg_get_serial_sequence('power_logs', 'id'), max(id)) FROM power_logs_old",
        "CREATE TABLE month PARTITION OF power_logs FOR VALUES FROM ('2026-11-01Z') TO ('2026-12-01Z')",
        "CREATE TABLE other PARTITION OF power_logs DEFAULT",
        "INSERT INTO power_logs SELECT * FROM power_logs_old",
    )
    before = indexes(database)
    execute(database, (ROOT / "schema.sql").read_bytes())
    assert indexes(database) == before
    assert await writer([row(0), row(1)]) == 2
    assert await writer([row(1, apower=7.0), row(2)]) == 1
    with psycopg.connect(database) as conn:
        parts = conn.execute(
            "SELECT tableoid::regclass::text, count(*), max(apower_w) FROM power_logs GROUP BY 1"
        )
        assert sorted(parts.fetchall()) == [("month", 3, 1.0), ("other", 1, 1.0)]
        newest = conn.execute(
            "SELECT device_id, timestamp FROM newest_rows() ORDER BY 1"
        ).fetchall()
        assert [
            (device_id, time.timestamp())
            for device_id, time in newest
            if device_id == DEVICE
        ] == [(DEVICE, NOON + 120)]
        # Rows go when their quarters are made.
        steps = (conn.execute("SELECT make_quarters()").fetchone() for _ in range(50))
        assert ("all made",) in steps
        conn.execute("SELECT forget_rows(1000)")
        assert conn.execute("SELECT count(*) FROM power_logs").fetchone() == (3,)


@pytest.mark.slow
async def test_ids_that_are_used_up_make_the_rows_wait_and_drop_none(
    collectors, database
):
    # ON CONFLICT uses up ids, and an old table's SERIAL has only four bytes for them.
    execute(database, ORIGINAL_TABLE, "SELECT setval('power_logs_id_seq', 2147483647)")
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(*(minute_frame(f"d{n}") for n in range(5)))
        await wait_for(lambda: "reached maximum value" in running.log)
        execute(
            database,
            "ALTER TABLE power_logs ALTER id TYPE BIGINT",
            "ALTER SEQUENCE power_logs_id_seq AS BIGINT NO MAXVALUE",
        )
        await wait_for_rows(database, 5)
    assert "rows dropped: 0" in running.get()[1]


@pytest.mark.slow
async def test_a_database_that_forbids_new_tables_is_an_outage_and_no_bug(
    collectors, database
):
    execute(
        database,
        "CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no DDL here'; END $$",
        "CREATE EVENT TRIGGER forbid ON ddl_command_start EXECUTE FUNCTION forbid()",
    )
    running = await collectors(DATABASE_URL=database).ready("unreachable since")
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for(lambda: running.log.count("no DDL here") == 1)
        execute(database, "DROP EVENT TRIGGER forbid")
        await wait_for_rows(database, 1)
    assert "rows dropped: 0" in running.get()[1]


@pytest.mark.slow
async def test_a_table_that_was_archived_under_another_name_gets_a_whole_successor(
    collectors, database
):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("before"))
        await wait_for_rows(database, 1)
        # Its indexes keep their names.
        execute(database, "ALTER TABLE power_logs RENAME TO power_logs_2026")
        await peer.send(minute_frame("after"))
        assert [r[0] for r in await wait_for_rows(database, 1)] == ["after"]
        definitions = "SELECT indexdef FROM pg_indexes WHERE tablename = 'power_logs'"
        with psycopg.connect(database) as conn:
            found = " ".join(row[0] for row in conn.execute(definitions))
        assert (
            "UNIQUE INDEX" in found
            and '(device_id, channel, "timestamp")' in found
            and '("timestamp")' in found
        )
    await running.stop()
    await (await running.again()).ready()
    assert "WARNING" not in running.log and "ERROR" not in running.log


@pytest.mark.slow
async def test_a_unique_rule_of_the_owner_is_enough(collectors, database):
    execute(
        database,
        ORIGINAL_TABLE,
        "ALTER TABLE power_logs ADD UNIQUE (channel, timestamp, device_id)",
    )
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame(), minute_frame())
        await wait_for_rows(database, 1)


@pytest.mark.slow
async def test_a_schema_that_only_half_fits_is_a_warning_and_rows_go_on(
    collectors, database
):
    execute(
        database,
        ORIGINAL_TABLE,
        "CREATE FUNCTION newest_rows() RETURNS INT LANGUAGE sql AS 'SELECT 1'",
    )
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)
    assert running.log.count("is used as it is") == 1 and "ERROR" not in running.log


@pytest.mark.slow
async def test_a_table_in_a_later_schema_of_the_search_path_is_the_table(
    collectors, database
):
    # A schema named like the role comes first in the search path.
    execute(database, ORIGINAL_TABLE, OLD_ROW, "CREATE SCHEMA postgres")
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 2)
    with psycopg.connect(database) as conn:
        assert conn.execute(
            "SELECT count(*) FROM pg_tables WHERE tablename = 'power_logs'"
        ).fetchone() == (1,)


@pytest.mark.slow
@pytest.mark.parametrize("search_path", ["''", "nowhere", "pg_catalog"])
async def test_a_search_path_without_a_schema_for_tables_means_public(
    collectors, database, search_path
):
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    execute(database, f"ALTER DATABASE {name} SET search_path = {search_path}")
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        found = "SELECT count(*) FROM public.power_logs"
        await wait_for(lambda: query(database, found) == [(1,)])


@pytest.mark.slow
async def test_a_rule_that_on_conflict_cannot_use_counts_as_none(collectors, database):
    execute(
        database,
        ORIGINAL_TABLE,
        "ALTER TABLE power_logs ADD UNIQUE (device_id, channel, timestamp) DEFERRABLE",
    )
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)
    assert "lacks the rule" in running.log and "ERROR" not in running.log


# Behind a pooler one name would stand for several clients' statements.
COUNT_KEPT_STATEMENTS = """
    CREATE TABLE kept (source TEXT, statements INT);
    CREATE FUNCTION count_kept() RETURNS TRIGGER LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO kept SELECT TG_TABLE_NAME, count(*) FROM pg_prepared_statements;
            RETURN NULL;
        END $$;
    CREATE TRIGGER count_kept AFTER INSERT OR UPDATE ON power_logs
        EXECUTE FUNCTION count_kept();
    CREATE TRIGGER count_kept AFTER INSERT OR UPDATE ON quarter_state
        EXECUTE FUNCTION count_kept();
"""


async def test_no_statement_gets_a_name_which_is_anothers_behind_a_pooler(
    writer, database
):
    await writer([row(0)])
    execute(database, COUNT_KEPT_STATEMENTS)
    for n in range(1, 11):
        await writer([row(n)])
        await next_step(writer.collector.query_pool)
    counted = query(
        database,
        "SELECT source, statements, count(*) > 8 FROM kept GROUP BY 1, 2 ORDER BY 1",
    )
    assert counted == [("power_logs", 0, True), ("quarter_state", 0, True)]


@pytest.mark.slow
async def test_a_table_that_is_dropped_is_made_again(collectors, database):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="0.2"
    ).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("before"))
        await wait_for_rows(database, 1)
        execute(database, "DROP TABLE power_logs")
        await peer.send(minute_frame("after"))
        assert [r[0] for r in await wait_for_rows(database, 1)] == ["after"]
    assert indexes(database) >= PARTS


@pytest.mark.slow
async def test_a_limit_on_time_that_forbids_an_index_is_no_outage(collectors, database):
    execute(database, ORIGINAL_TABLE)
    execute(database, MANY_ROWS)
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(
            f"ALTER DATABASE {conn.info.dbname} SET statement_timeout = '40ms'"
        )
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for(lambda: "rows written: 1" in running.get()[1])
    assert (
        "is used as it is" in running.log
        and "power_logs_one_row_per_interval" not in indexes(database)
    )


@pytest.mark.slow
async def test_ids_that_an_import_has_used_swallow_no_row(collectors, database):
    execute(
        database,
        ORIGINAL_TABLE,
        OLD_ROW.replace("DEFAULT", "1"),
        OLD_ROW.replace("DEFAULT", "2").replace("2020", "2021"),
    )
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        # The sequence gives 1 and 2 again. Each attempt uses one up, so the row waits
        # until it gets a free id.
        assert len(await wait_for_rows(database, 3)) == 3
    assert "power_logs_pkey" in running.log


async def test_an_idle_writer_sleeps(writer):
    await writer([row(0)])
    outbox = writer.collector.outbox
    oldest = outbox.oldest
    calls = []

    def counted(limit):
        calls.append(limit)
        return oldest(limit)

    outbox.oldest = counted
    await asyncio.sleep(0.3)
    assert len(calls) <= 1


@pytest.mark.parametrize(
    ("rows", "nth", "batch", "most"), [(100, 100, 10, 30), (320, 2, 1000, 400)]
)
async def test_refused_rows_cost_few_statements(
    writer, database, replace, rows, nth, batch, most
):
    calls = []

    async def counted(collector, pool, rows):
        calls.append(len(rows))
        return await write_rows(collector, pool, rows)

    await prepare(database)
    execute(
        database,
        "ALTER TABLE power_logs ADD CONSTRAINT my_rule CHECK (apower_w <> 666)",
    )
    replace(write_rows=counted, BATCH_SIZE=batch)
    sent = [row(n, apower=666.0 if n % nth == 1 else 1.0) for n in range(rows)]
    good = [one for one in sent if one.apower_w == 1.0]
    assert await writer(sent) == len(good)
    # Batches narrow down to the refused row, and widen again.
    assert max(calls) <= batch and len(calls) < most


async def test_the_pool_of_an_outage_is_closed(writer, database):
    await writer([row(0)])
    pool = writer.collector.pool
    execute(
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'shelly_collector'",
    )
    await writer([row(1)])
    assert pool.closed and writer.collector.pool is not pool


@pytest.mark.slow
async def test_a_connection_that_drops_while_the_index_is_built_is_an_outage_and_the_index_is_built(
    collectors, database
):
    execute(database, ORIGINAL_TABLE)
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE power_logs IN ROW EXCLUSIVE MODE")
        running = await collectors(DATABASE_URL=database).ready("preparing the table")
        execute(
            database,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'shelly_collector'",
        )
    await wait_for(lambda: "power_logs_one_row_per_interval" in indexes(database))
    assert "is used as it is" not in running.log


async def test_a_catalogue_that_cannot_be_read_is_an_outage_and_no_bug(
    database, replace
):
    replace(READ_TABLE="SELECT 1 / 0")
    with pytest.raises(psycopg.errors.DivisionByZero):
        await prepare(database)


async def test_a_database_that_freezes_right_after_the_connection_is_an_outage(
    database, replace
):
    replace(ANSWER_TIMEOUT=0.2, READ_TABLE="SELECT pg_sleep(60)")
    opening = asyncio.create_task(open_database(new_collector(DATABASE_URL=database)))
    await asyncio.wait({opening}, timeout=5)
    assert opening.done() and isinstance(opening.exception(), TimeoutError)


async def test_the_newest_row_is_found_in_whatever_order_they_came(database):
    await prepare(database)
    execute(
        database,
        "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)"
        " SELECT to_timestamp(60 * m), d, 'switch:0', m, 2, 3, 4 FROM generate_series(20000, 1, -1) m, unnest(ARRAY['a', 'b', 'c']) d",
        "VACUUM ANALYZE power_logs",
    )
    with psycopg.connect(database) as conn:
        rows = conn.execute("SELECT device_id, apower_w FROM newest_rows()").fetchall()
    assert rows == [("a", 20000.0), ("b", 20000.0), ("c", 20000.0)]


async def test_the_schema_applied_again_leaves_what_the_owner_said_and_named(database):
    await prepare(database)
    execute(
        database,
        "COMMENT ON TABLE power_logs IS 'mine'",
        # A schema named like the role comes first in the search path.
        "CREATE SCHEMA postgres",
        (ROOT / "schema.sql").read_bytes(),
    )
    with psycopg.connect(database) as conn:
        assert conn.execute(
            "SELECT obj_description('public.power_logs'::regclass)"
        ).fetchone() == ("mine",)
        found = conn.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname IN ('postgres', 'public')"
        )
        assert sorted(found.fetchall()) == [
            ("public", "channel_names"),
            ("public", "power_logs"),
            ("public", "power_quarters"),
            ("public", "quarter_marks"),
            ("public", "quarter_state"),
        ]


async def test_a_row_may_be_imported_with_its_id(database):
    await prepare(database)
    execute(database, OLD_ROW.replace("DEFAULT", "17"))
    assert read_rows(database, "id") == [(17,)]


@pytest.mark.parametrize(
    ("index", "enough"),
    [
        (
            "UNIQUE INDEX mine ON power_logs (device_id, channel, timestamp) WHERE channel <> 'x'",
            False,
        ),
        (
            "UNIQUE INDEX mine ON power_logs (device_id, channel, timestamp) INCLUDE (apower_w) WHERE channel <> 'x'",
            False,
        ),
        ("INDEX mine ON power_logs (device_id, channel, timestamp)", False),
        (
            "UNIQUE INDEX mine ON power_logs (apower_w, device_id, channel, timestamp)",
            False,
        ),
        (
            "UNIQUE INDEX mine ON power_logs (device_id, channel, timestamp, apower_w)",
            False,
        ),
        (
            "UNIQUE INDEX mine ON power_logs (device_id, channel, timestamp) INCLUDE (apower_w)",
            True,
        ),
        (
            "UNIQUE INDEX mine ON power_logs (device_id, channel, timestamp) WITH (fillfactor = 90)",
            True,
        ),
    ],
)
async def test_an_index_of_the_owner_is_the_rule_only_if_it_does_the_same(
    database, index, enough
):
    execute(database, ORIGINAL_TABLE, f"CREATE {index}")
    await prepare(database)
    assert ("power_logs_one_row_per_interval" not in indexes(database)) == enough


async def test_an_invalid_index_is_no_rule(database):
    execute(database, ORIGINAL_TABLE, OLD_ROW, OLD_ROW)
    with pytest.raises(psycopg.errors.UniqueViolation):
        execute(
            database,
            "CREATE UNIQUE INDEX CONCURRENTLY mine ON power_logs (device_id, channel, timestamp)",
        )
    execute(database, "DELETE FROM power_logs")
    await prepare(database)
    assert indexes(database) >= {"mine", "power_logs_one_row_per_interval"}


# ---- The column for returned energy. VERSION_3 is the schema without it, with only the functions used here.

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


def relfilenode(database):
    return query(
        database, "SELECT relfilenode FROM pg_class WHERE oid = 'power_logs'::regclass"
    )


@pytest.mark.slow
async def test_returned_energy_is_a_later_column_and_the_others_stay(
    collectors, database
):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        without = minute_frame("b-plain", ret_aenergy=None)
        await peer.send(
            minute_frame("a-switch"),
            without,
            notify({"em:0": EM, "emdata:0": EMDATA}, METER),
        )
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 5)
    switch = (433.8, 228.2, 2.631, 1234.567)
    assert read_rows(database, ALL_VALUES) == [
        ("a-switch", "switch:0", *switch, 0.0),
        ("b-plain", "switch:0", *switch, None),
        *((METER, *one) for one in PHASES),
    ]
    columns = query(
        database,
        "SELECT column_name, data_type, is_nullable FROM information_schema.columns"
        " WHERE table_name = 'power_logs' ORDER BY ordinal_position",
    )
    assert [name for name, _, _ in columns[:9]] == [
        "id",
        "timestamp",
        "device_id",
        "channel",
        "apower_w",
        "voltage_v",
        "current_a",
        "energy_total_wh",
        "created_at",
    ]
    assert columns[9:] == [
        ("energy_returned_wh", "double precision", "YES"),
        ("origin", "text", "YES"),
    ]
    (comment,) = query(database, "SELECT col_description('power_logs'::regclass, 10)")
    assert comment[0] and "Wh" in comment[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "old_table", [VERSION_3, ORIGINAL_TABLE], ids=["version 3", "the first system's"]
)
async def test_an_old_table_gets_the_column_at_the_start_without_being_rewritten(
    collectors, database, old_table
):
    execute(database, old_table, HISTORY)
    before = relfilenode(database)
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(notify({"em:0": EM, "emdata:0": EMDATA}, METER))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 104)
    stored = query(
        database,
        f"SELECT {ALL_VALUES} FROM power_logs WHERE device_id = %s ORDER BY channel",
        METER,
    )
    assert stored == [(METER, *one) for one in PHASES]
    assert query(
        database, "SELECT count(*) FROM power_logs WHERE energy_returned_wh IS NULL"
    ) == [(101,)]
    assert relfilenode(database) == before and query(
        database, "SELECT power_logs_version()"
    ) == [(SCHEMA_VERSION,)]
    await running.stop()
    await (await running.again()).ready()
    # An owner may apply it again by hand.
    execute(database, (ROOT / "schema.sql").read_bytes())
    assert (
        relfilenode(database) == before
        and "WARNING power_logs" not in running.log
        and "ERROR" not in running.log
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "may",
    ["", "GRANT CREATE ON SCHEMA public TO {role}"],
    ids=["only insert", "create, too"],
)
async def test_where_the_role_may_not_alter_the_table_rows_go_in_without_it_and_none_is_lost(
    collectors, database, may
):
    # Roles belong to the whole server, so each test has its own.
    role = "meter_" + psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    execute(
        database,
        VERSION_3,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT INSERT, SELECT ON power_logs TO {role}",
    )
    execute(database, may.format(role=role) or "SELECT")
    running = await collectors(
        DATABASE_URL=psycopg.conninfo.make_conninfo(database, user=role)
    ).ready()
    async with device(running.url) as peer:
        await peer.send(notify({"em:0": EM, "emdata:0": EMDATA}, METER), minute_frame())
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 4)
    narrow = ALL_VALUES.removesuffix(", energy_returned_wh")
    stored = query(
        database,
        f"SELECT {narrow} FROM power_logs WHERE device_id = %s ORDER BY channel",
        METER,
    )
    assert stored == [(METER, *one[:5]) for one in PHASES]
    assert (
        "lacks the column energy_returned_wh of schema.sql: apply that file by hand, and restart"
        in running.log
    )
    text = running.get()[1]
    assert (
        "rows dropped: 0" in text
        and "rows waiting: 0" in text
        and "ERROR" not in running.log
    )
    # The owner adds the column by hand. From the next start on it is filled.
    await running.stop()
    execute(database, "ALTER TABLE power_logs ADD COLUMN energy_returned_wh FLOAT")
    await (await running.again()).ready()
    async with device(running.url) as peer:
        await peer.send(notify({"em:0": EM, "emdata:0": EMDATA}, METER + "-2"))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 7)
    stored = query(
        database,
        f"SELECT {ALL_VALUES} FROM power_logs WHERE device_id = %s ORDER BY channel",
        METER + "-2",
    )
    assert stored == [(METER + "-2", *one) for one in PHASES]
    await running.stop()
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.slow
async def test_a_client_that_holds_the_table_open_delays_the_update_but_no_row_for_long(
    collectors, database
):
    execute(database, VERSION_3)
    with psycopg.connect(database) as client:
        # Its transaction stays open.
        client.execute("SELECT count(*) FROM power_logs")
        running = await collectors(DATABASE_URL=database).ready()
        async with device(running.url) as peer:
            await peer.send(minute_frame())
            await wait_for(lambda: len(read_rows(database, "1", "1")) == 1)
        assert (
            "lock timeout" in running.log
            and "lacks the column energy_returned_wh" in running.log
        )
    await running.stop()
    await (await running.again()).ready()
    assert query(
        database, "SELECT count(*) FROM power_logs WHERE energy_returned_wh IS NULL"
    ) == [(1,)]
    assert query(database, "SELECT power_logs_version()") == [(SCHEMA_VERSION,)]


@pytest.mark.slow
async def test_rows_that_wait_for_the_database_go_into_a_table_without_the_column_too(
    collectors, database, tmp_path
):
    role = "meter_" + psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    execute(
        database,
        VERSION_3,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT INSERT, SELECT ON power_logs TO {role}",
    )
    (tmp_path / "data").mkdir()
    with open_outbox(tmp_path / "data", RETURNED_ROWS) as outbox:
        outbox.save()
    running = await collectors(
        tmp_path, DATABASE_URL=psycopg.conninfo.make_conninfo(database, user=role)
    ).ready()
    await wait_for(lambda: len(read_rows(database, "1", "1")) == len(RETURNED_ROWS))
    assert read_rows(database, "apower_w") == [(row.apower_w,) for row in RETURNED_ROWS]
    await running.stop()
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.slow
async def test_a_column_that_the_owner_drops_costs_no_row(collectors, database):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="0.5"
    ).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("before"))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 1)
        execute(
            database, "ALTER TABLE power_logs DROP COLUMN energy_returned_wh CASCADE"
        )
        await peer.send(minute_frame("after"))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 2)
    assert "rows dropped: 0" in running.get()[1]


@pytest.mark.slow
async def test_a_view_of_the_owner_on_energy_by_day_stops_no_update_and_goes_on_working(
    collectors, database
):
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
    before, sums = query(database, days), query(database, "SELECT wh FROM my_days")
    assert before == [("old", 100.0, 101)]
    running = await collectors(DATABASE_URL=database).ready()
    for _ in range(2):
        assert query(database, "SELECT power_logs_version()") == [(SCHEMA_VERSION,)]
        assert "is used as it is" not in running.log and "ERROR" not in running.log
        assert (
            query(database, days) == before
            and query(database, "SELECT wh FROM my_days") == sums
        )
        assert query(database, may_read) == [(True,)] * 2
        assert (
            query(
                database,
                "SELECT energy_returned_wh FROM energy_by_day(until => now() + INTERVAL '1 day')",
            )
            != []
        )
        await running.stop()
        # An owner may apply it by hand, too.
        execute(database, (ROOT / "schema.sql").read_bytes())
        await (await running.again()).ready()
    # The view also sees the rows that come after the update.
    execute(database, HISTORY.replace("'old'", "'later'"))
    assert query(database, days.replace("'old'", "'later'")) == [("later", 100.0, 101)]
    await running.stop()
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


OTHER_ID = "shelly1pmg2-a1b2c3d4e5f6"


async def test_two_ids_of_one_device_become_one_history(writer, database):
    await prepare(database)
    # The minutes 2 and 3 are there under both ids.
    await writer([row(n, DEVICE, 1.0) for n in range(4)])
    await writer([row(n, OTHER_ID, 2.0) for n in range(2, 6)])
    await writer([row(n, "bystander", 3.0) for n in range(6)])
    execute(
        database,
        f"""INSERT INTO channel_names (device_id, channel, device_says, name) VALUES
        ('{DEVICE}', '', 'Old house', 'House'),
        ('{DEVICE}', 'switch:0', 'old 0', 'Pump'), ('{OTHER_ID}', 'switch:0', 'new 0', NULL),
        ('{DEVICE}', 'switch:1', 'old 1', 'Heater'), ('{OTHER_ID}', 'switch:1', NULL, 'Boiler'),
        ('bystander', 'switch:0', NULL, 'Mill')""",
    )
    for _ in range(2):
        execute(database, join_ids(DEVICE, OTHER_ID))
        rows = read_rows(database, "device_id, apower_w")
        assert rows == [("bystander", 3.0)] * 6 + [
            (OTHER_ID, power) for power in (1.0, 1.0, 2.0, 2.0, 2.0, 2.0)
        ]
        names = "SELECT device_id, channel, device_says, name FROM channel_names"
        assert query(database, f"{names} ORDER BY 1, 2") == [
            ("bystander", "switch:0", None, "Mill"),
            (OTHER_ID, "", "Old house", "House"),
            (OTHER_ID, "switch:0", "new 0", "Pump"),
            (OTHER_ID, "switch:1", "old 1", "Boiler"),
        ]
    # The energy of the minute between the two ids counts, too.
    execute(
        database,
        "UPDATE power_logs SET energy_total_wh = date_part('epoch', timestamp) / 60",
    )
    energy = f"SELECT sum(energy_wh) FROM energy_by_day('2026-11-01', '2026-12-01') WHERE device_id = '{OTHER_ID}'"
    assert query(database, energy) == [(5.0,)]


async def test_one_id_alone_or_none_is_refused_and_nothing_is_lost(writer, database):
    await prepare(database)
    await writer([row(n, DEVICE, 1.0) for n in range(4)])
    for new_id in (DEVICE, ""):
        with pytest.raises(psycopg.errors.RaiseException, match="two different ids"):
            execute(database, join_ids(DEVICE, new_id))
    assert len(read_rows(database)) == 4


async def test_two_ids_become_one_in_an_old_table_with_doubles(database):
    execute(database, ORIGINAL_TABLE, *[OLD_ROW] * 2, OLD_ROW.replace("'old'", "'new'"))
    execute(database, (ROOT / "schema.sql").read_bytes(), join_ids("old", "new"))
    assert read_rows(database, "device_id") == [("new",)]


# ---- A question that gets a column. An older version of it lacks the last one.

GROWING = [
    "newest_rows",
    "power_cycles",
    "energy_by_day",
    "coverage",
    "power_series",
    "channels",
]


def signature(database, question):
    return query(
        database,
        "SELECT pg_get_function_arguments(oid), pg_get_function_result(oid)"
        " FROM pg_proc WHERE proname = %s",
        question,
    )


def put_older(database, question, version):
    """Leave the database with a question as if in this version it lacked its last column."""
    ((arguments, result),) = signature(database, question)
    older = result.rpartition(",")[0]
    types = [column.split(" ", 1)[1] for column in older.split("(", 1)[1].split(", ")]
    values = ", ".join(f"NULL::{name}" for name in types)
    execute(
        database,
        f"DROP FUNCTION {question}",
        f"CREATE FUNCTION {question}({arguments}) RETURNS {older})"
        f" LANGUAGE sql STABLE AS 'SELECT {values}'",
        f"CREATE OR REPLACE FUNCTION power_logs_version() RETURNS INT"
        f" LANGUAGE sql IMMUTABLE AS 'SELECT {version}'",
    )
    return older + ")"


@pytest.mark.parametrize("question", GROWING)
@pytest.mark.parametrize("version", [3, 4])
def test_a_question_that_lacks_its_newest_column_gets_it(database, question, version):
    schema = (ROOT / "schema.sql").read_bytes()
    execute(database, schema)
    wanted = signature(database, question)
    put_older(database, question, version)
    for _ in range(2):
        execute(database, schema)
        assert signature(database, question) == wanted
        found = query(
            database, "SELECT proname FROM pg_proc WHERE proname ~ 'of_version'"
        )
        assert found == []


@pytest.mark.parametrize("version", [3, 4])
def test_views_on_older_questions_go_on_working_beside_the_new_ones(database, version):
    schema = (ROOT / "schema.sql").read_bytes()
    execute(database, schema)
    wanted = {question: signature(database, question) for question in GROWING}
    older = {}
    for question in GROWING:
        older[question] = put_older(database, question, version)
        execute(database, f"CREATE VIEW my_{question} AS SELECT * FROM {question}()")
    for _ in range(2):
        execute(database, schema)
        for question in GROWING:
            assert signature(database, question) == wanted[question]
            ((_, result),) = signature(database, f"{question}_of_version_{version}")
            assert result == older[question]
            rows = query(database, f"SELECT count(*) FROM my_{question}")
            assert rows == [(1,)]


def test_a_question_that_is_up_to_date_is_not_made_anew(database):
    schema = (ROOT / "schema.sql").read_bytes()
    execute(database, schema)
    oids = "SELECT oid FROM pg_proc WHERE proname = ANY (%s) ORDER BY oid"
    before = query(database, oids, GROWING)
    assert len(before) == len(GROWING)
    execute(database, schema)
    assert query(database, oids, GROWING) == before
