"""schema.sql and the INSERT, against a real PostgreSQL."""

import asyncio

import psycopg
import pytest
import shelly_collector as sc
from conftest import DEVICE, ROOT, VALUES, device, minute_frame, read_rows, wait_for, wait_for_rows

ORIGINAL_TABLE = """
CREATE TABLE power_logs (id SERIAL PRIMARY KEY, timestamp TIMESTAMPTZ NOT NULL, device_id VARCHAR(100) NOT NULL,
 channel VARCHAR(20) NOT NULL, apower_w FLOAT NOT NULL, voltage_v FLOAT NOT NULL, current_a FLOAT NOT NULL,
 energy_total_wh FLOAT NOT NULL, created_at TIMESTAMPTZ DEFAULT NOW());
CREATE INDEX idx_power_logs_timestamp ON power_logs(timestamp);
CREATE INDEX idx_power_logs_device_channel ON power_logs(device_id, channel);
"""
OLD_ROW = "INSERT INTO power_logs VALUES (DEFAULT, '2020-01-01', 'old', 'switch:0', 1, 2, 3, 4)"
MANY_ROWS = (
    "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)"
    " SELECT to_timestamp(n), 'old', 'switch:0', 1, 2, 3, 4 FROM generate_series(1, 300000) n"
)
NOON = 1_795_435_200.0


def execute(database, *statements):
    with psycopg.connect(database, autocommit=True) as conn:
        for statement in statements:
            conn.execute(statement)


def indexes(database):
    with psycopg.connect(database) as conn:
        found = conn.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'power_logs'").fetchall()
    return {name for (name,) in found}


def row(n=0, device_id=DEVICE, apower=1.0):
    return sc.Row(NOON + 60 * n, device_id, "switch:0", apower, 230.0, 0.5, 9.0)


async def connection(database):
    return await psycopg.AsyncConnection.connect(database, **sc.CONNECTION)


async def test_the_table_is_made_with_its_columns_and_indexes(database):
    async with await connection(database) as conn:
        await sc.prepare_table(conn)
        await sc.prepare_table(conn)
        await conn.execute((ROOT / "schema.sql").read_bytes())  # safe to apply again, by hand too
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
    ]
    assert indexes(database) >= set(sc.PARTS[1:])


async def test_many_processes_may_apply_the_schema_at_once(database):
    async def apply():
        async with await connection(database) as conn:
            await sc.prepare_table(conn)

    await asyncio.gather(*(apply() for _ in range(12)))
    assert indexes(database) >= set(sc.PARTS[1:])


async def test_an_existing_table_keeps_its_rows_and_gets_the_rule(collectors, database):
    execute(database, ORIGINAL_TABLE, OLD_ROW)
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        assert [r[0] for r in await wait_for_rows(database, 2)] == ["old", DEVICE]
    assert "power_logs_one_row_per_interval" in indexes(database) and "WARNING power_logs" not in running.log


async def test_a_table_with_duplicates_goes_on_without_the_rule_and_the_log_says_how_to_see_them(collectors, database):
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


@pytest.mark.parametrize("whole_schema", [True, False])
async def test_a_role_that_may_only_insert_and_select_is_enough(collectors, database, whole_schema):
    if whole_schema:
        async with await connection(database) as conn:
            await sc.prepare_table(conn)
    else:
        execute(database, ORIGINAL_TABLE, "GRANT USAGE ON SEQUENCE power_logs_id_seq TO PUBLIC")
    execute(
        database,
        "DO $$ BEGIN CREATE ROLE meter LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
        "GRANT INSERT, SELECT ON power_logs TO meter",
    )
    running = await collectors(DATABASE_URL=psycopg.conninfo.make_conninfo(database, user="meter")).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)
    assert running.log.count("is used as it is") == (0 if whole_schema else 1)
    execute(database, "DROP OWNED BY meter", "DROP ROLE meter")


async def test_the_first_reading_of_an_interval_wins(database, caplog):
    async with await connection(database) as conn:
        await sc.prepare_table(conn)
        assert await sc.insert_rows(conn, [row(apower=1.0), row(apower=2.0), row(1)]) == 2
        assert await sc.insert_rows(conn, [row(apower=3.0), row(2)]) == 1
    assert [r[2] for r in read_rows(database, VALUES)] == [1.0, 1.0, 1.0] and caplog.messages == []


async def test_numbers_and_texts_arrive_to_the_last_bit(database):
    values = (0.1 + 0.2, -1.7976931348623157e308, 5e-324, 2.0**53 + 2)
    async with await connection(database) as conn:
        await sc.prepare_table(conn)
        await sc.insert_rows(
            conn, [sc.Row(NOON, 'a"b\\c,{}', "switch:0", *values), sc.Row(NOON, "NULL", "switch:0", *values)]
        )
    assert read_rows(database, VALUES) == [("NULL", "switch:0", *values), ('a"b\\c,{}', "switch:0", *values)]


@pytest.mark.parametrize(
    "rule",
    ["CHECK (apower_w <> 666)", "CHECK (device_id <> 'bad')", "EXCLUDE (device_id WITH =) WHERE (device_id = 'bad')"],
)
async def test_a_row_that_the_database_refuses_is_dropped_alone_and_logged(database, caplog, rule):
    async with await connection(database) as conn:
        await sc.prepare_table(conn)
        await conn.execute(f"ALTER TABLE power_logs ADD CONSTRAINT my_rule {rule}")
        rows = [row(n) for n in range(100)]
        rows[37] = rows[37]._replace(device_id="bad", apower_w=666.0)
        expected = 100 if "EXCLUDE" in rule else 99
        assert await sc.insert_rows(conn, rows) == expected
    assert len(caplog.messages) == 100 - expected
    assert all("my_rule" in message and "bad" in message and "\n" not in message for message in caplog.messages)


async def test_a_trigger_that_refuses_is_a_reason_too(database, caplog):
    async with await connection(database) as conn:
        await sc.prepare_table(conn)
        await conn.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF NEW.apower_w = 666 THEN RAISE EXCEPTION 'not this one'; END IF; RETURN NEW; END $$;"
            "CREATE TRIGGER refuse BEFORE INSERT ON power_logs FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        assert await sc.insert_rows(conn, [row(0), row(1, apower=666.0), row(2)]) == 2
    assert "not this one" in caplog.text


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
async def test_a_table_with_other_columns_is_a_clear_error_and_the_rows_wait(collectors, database, change, undo):
    running = await collectors(DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="0.5").ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("before"))
        await wait_for_rows(database, 1)
        execute(database, change)
        await peer.send(minute_frame("during"))
        await wait_for(lambda: "database unreachable" in running.log)
        await wait_for(lambda: (running.folder / "data/spool.sqlite3").exists())
        execute(database, undo)
        await wait_for_rows(database, 2)
    (error,) = [line for line in running.log.splitlines() if "ERROR" in line]
    assert "column" in error


async def test_a_missing_partition_makes_the_rows_wait(database):
    async with await connection(database) as conn:
        await conn.execute(
            "CREATE TABLE power_logs (timestamp TIMESTAMPTZ, device_id TEXT, channel TEXT, apower_w FLOAT, voltage_v FLOAT,"
            " current_a FLOAT, energy_total_wh FLOAT) PARTITION BY RANGE (timestamp)"
        )
        with pytest.raises(psycopg.errors.CheckViolation):
            await sc.insert_rows(conn, [row()], sc.INSERT)


async def test_a_pooler_that_forgets_prepared_statements_is_no_outage(database):
    async with await connection(database) as conn:
        await sc.prepare_table(conn)
        for n in range(10):
            await sc.insert_rows(conn, [row(n)])
        await conn.execute("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")  # the driver does not notice
        assert await sc.insert_rows(conn, [row(10)]) == 1
        assert await sc.insert_rows(conn, [row(11)]) == 1
    assert len(read_rows(database)) == 12


async def test_a_table_that_is_dropped_is_made_again(collectors, database):
    running = await collectors(DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="0.2").ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("before"))
        await wait_for_rows(database, 1)
        execute(database, "DROP TABLE power_logs")
        await peer.send(minute_frame("after"))
        assert [r[0] for r in await wait_for_rows(database, 1)] == ["after"]
    assert indexes(database) >= set(sc.PARTS[1:])


async def test_a_limit_on_time_that_forbids_an_index_is_no_outage(collectors, database):
    execute(database, ORIGINAL_TABLE)
    execute(database, MANY_ROWS)
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(f"ALTER DATABASE {conn.info.dbname} SET statement_timeout = '40ms'")
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for(lambda: "rows written: 1" in running.get()[1])
    assert "is used as it is" in running.log and "power_logs_one_row_per_interval" not in indexes(database)


async def test_numbers_that_an_import_has_used_up_swallow_no_row(collectors, database):
    execute(
        database,
        ORIGINAL_TABLE,
        OLD_ROW.replace("DEFAULT", "1"),
        OLD_ROW.replace("DEFAULT", "2").replace("2020", "2021"),
    )
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        # The sequence gives 1 and 2 again; each attempt uses one up, and the row waits until it gets a number.
        assert len(await wait_for_rows(database, 3)) == 3
    assert "power_logs_pkey" in running.log
