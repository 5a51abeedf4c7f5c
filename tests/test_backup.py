"""--backup, as an owner uses it: with a real pg_dump, and a real restore."""

import asyncio
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest

import local_postgres
from beside import reachable
from support import (
    ROOT,
    device,
    execute,
    fresh_database,
    minute_frame,
    query,
    run_script,
    settings,
    wait_for,
    wait_for_rows,
)

# Rows of three days up to now; the pump's first day is older than the others.
ROWS = """
    INSERT INTO power_logs (timestamp, device_id, channel,
                            apower_w, voltage_v, current_a, energy_total_wh)
    SELECT date_trunc('minute', now()) - n * interval '1 minute', 'pump', 'switch:0',
           100, 230, 1, (4320 - n) * 100 / 60.0
    FROM generate_series(0, 4320) n
"""
QUESTIONS = [
    "SELECT * FROM power_logs ORDER BY id",
    "SELECT * FROM channel_names ORDER BY 1, 2",
    "SELECT * FROM power_quarters WHERE final ORDER BY 1, 2, 3",
    "SELECT * FROM energy_by_day(zone => 'Europe/Paris') ORDER BY 1, 2, 3",
    "SELECT * FROM coverage() ORDER BY 1, 2",
    "SELECT * FROM channels() ORDER BY 1, 2",
]


def url_of(folder: Path) -> str:
    return local_postgres.conninfo(folder / "data" / "postgres")


def answers(url: str) -> list[list[tuple[object, ...]]]:
    return [query(url, question) for question in QUESTIONS]


async def written(folder: Path, **env: str) -> Path:
    """Run --backup; return the file, whose name its line of output begins with."""
    status, out, err = await run_script(folder, "--backup", "kept", **env)
    assert (status, err) == (0, ""), err
    line = re.fullmatch(
        r"(kept/shelly-\d{4}-\d\d-\d\dT\d{6}Z\.dump): \d+\.\d MB in \d+\.\d s;"
        r" backups kept: \d\n",
        out,
    )
    assert line is not None, out
    return folder / line[1]


def restore(dump: Path, url: str) -> None:
    program = str(local_postgres.programs() / "pg_restore")
    command = [program, "-d", url, "-1", "--no-owner", "--clean", "--if-exists", dump]
    subprocess.run(command, check=True, capture_output=True)


async def test_a_backup_beside_a_running_collector_brings_back_every_number(
    collectors, tmp_path
):
    running = await collectors(tmp_path).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(url_of(tmp_path), 1)
    execute(
        url_of(tmp_path),
        ROWS,
        "INSERT INTO channel_names (device_id, channel, name)"
        " VALUES ('pump', 'switch:0', 'Pump')",
    )
    await wait_for(lambda: "quarters: all made" in running.get()[1], 30)
    await running.stop()
    running = await collectors(tmp_path, RETENTION_DAYS="2").ready()
    # Rows older than two days go, and leave final quarters.
    is_pruned = "SELECT min(timestamp) > now() - interval '49 hours' FROM power_logs"
    await wait_for(lambda: query(url_of(tmp_path), is_pruned) == [(True,)], 60)
    await wait_for(lambda: "quarters: all made" in running.get()[1], 30)
    dump = await written(tmp_path, **running.env)
    assert stat.S_IMODE(dump.stat().st_mode) == 0o600
    expected = answers(url_of(tmp_path))
    assert len(expected[0]) > 2000 and len(expected[2]) > 80
    with fresh_database() as other:
        restore(dump, other)
        assert answers(other) == expected
    assert "rows waiting: 0" in running.get()[1]


async def test_a_backup_stays_if_an_older_one_cannot_be_deleted(database, tmp_path):
    execute(database, (ROOT / "schema.sql").read_bytes())
    # No file, so it cannot be deleted like one.
    (tmp_path / "kept" / "shelly-2020-01-01T000000Z.dump").mkdir(parents=True)
    for year in range(2021, 2027):
        (tmp_path / "kept" / f"shelly-{year}-01-01T000000Z.dump").touch()
    status, out, err = await run_script(
        tmp_path, "--backup", "kept", DATABASE_URL=database
    )
    assert status == 1 and "older backups cannot be deleted" in out
    assert len(err.splitlines()) == 1 and "No backup" not in err
    assert max((tmp_path / "kept").iterdir()).stat().st_size > 0


async def test_the_database_of_a_stopped_collector_is_started_for_the_backup(
    collectors, tmp_path
):
    running = await collectors(tmp_path).ready()
    await wait_for(lambda: "database connected" in running.log)
    execute(url_of(tmp_path), ROWS)
    await running.stop()
    dump = await written(tmp_path, **running.env)
    with fresh_database() as other:
        restore(dump, other)
        assert query(other, "SELECT count(*) FROM power_logs") == [(4321,)]
    assert not (tmp_path / "data" / "postgres" / "postmaster.pid").exists()


async def test_another_server_is_backed_up_and_the_newest_seven_are_kept(
    tmp_path, database
):
    execute(database, (ROOT / "schema.sql").read_bytes(), ROWS)
    folder = tmp_path / "kept"
    folder.mkdir()
    older = [folder / f"shelly-2026-01-0{day}T000000Z.dump" for day in range(1, 9)]
    foreign = [folder / "shelly.dump", folder / "notes.txt"]
    for path in older + foreign:
        path.write_text("x")
    dump = await written(tmp_path, DATABASE_URL=database)
    assert {*folder.iterdir()} == {dump, *older[2:], *foreign}
    with fresh_database() as other:
        restore(dump, other)
        assert answers(other) == answers(database)


async def test_a_backup_goes_into_a_database_of_another_owner(tmp_path, database):
    execute(database, (ROOT / "schema.sql").read_bytes(), ROWS)
    dump = await written(tmp_path, DATABASE_URL=database)
    role = f"owner_{os.getpid()}"
    with fresh_database() as other:
        execute(
            other,
            f"CREATE ROLE {role} LOGIN",
            f"ALTER SCHEMA public OWNER TO {role}",
        )
        restore(dump, psycopg.conninfo.make_conninfo(other, user=role))
        assert answers(other) == answers(database)
        execute(other, f"DROP OWNED BY {role} CASCADE")
    execute(database, f"DROP ROLE {role}")


async def test_a_backup_that_fails_says_why_and_leaves_the_older_ones(
    tmp_path, database
):
    execute(database, (ROOT / "schema.sql").read_bytes())
    role = f"blind_{os.getpid()}"
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE {role} LOGIN")
    try:
        blind = psycopg.conninfo.make_conninfo(database, user=role)
        older = tmp_path / "kept" / "shelly-2026-01-01T000000Z.dump"
        older.parent.mkdir()
        older.write_text("x")
        (tmp_path / "file").write_text("x")
        empty = psycopg.conninfo.make_conninfo(database, dbname="postgres")
        for url, folder, reason in (
            ("postgresql://u@127.0.0.1:1/x", "kept", "Connection refused"),
            (blind, "kept", "permission denied"),
            (database, "file", "File exists"),
            (empty, "kept", "no table power_logs"),
        ):
            status, out, err = await run_script(
                tmp_path, "--backup", folder, DATABASE_URL=url
            )
            assert (status, out) == (1, "") and err.startswith("No backup: ")
            assert reason in err and err.count("\n") == 1
            assert [*older.parent.iterdir()] == [older]
    finally:
        with psycopg.connect(database, autocommit=True) as conn:
            conn.execute(f"DROP OWNED BY {role}")
            conn.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_backup_that_is_stopped_leaves_nothing_behind(
    tmp_path, database, number
):
    execute(database, (ROOT / "schema.sql").read_bytes())
    with psycopg.connect(database) as conn:
        # pg_dump waits for it.
        conn.execute("LOCK TABLE power_logs")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            ROOT / "shelly_collector.py",
            "--backup",
            "kept",
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "DATABASE_URL": database},
            stderr=subprocess.PIPE,
        )
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_dump'"
            " AND wait_event_type = 'Lock' AND datname = current_database()"
        )
        await wait_for(lambda: query(database, waiting) == [(1,)])
        (dump,) = psutil.Process(process.pid).children()
        process.send_signal(number)
        _, err = await asyncio.wait_for(process.communicate(), 10)
    assert (process.returncode, err) == (1, b"No backup: stopped\n")
    assert not dump.is_running() and [*(tmp_path / "kept").iterdir()] == []


async def test_a_collector_that_starts_during_a_backup_comes_first(
    collectors, tmp_path
):
    running = await collectors(tmp_path).ready()
    await wait_for(lambda: "database connected" in running.log)
    await running.stop()
    async with reachable(settings(DATA_DIR=str(tmp_path / "data"))) as url:
        assert query(url, "SELECT 1") == [(1,)]
        await (await running.again()).ready()
        async with device(running.url) as peer:
            await peer.send(minute_frame())
            await wait_for_rows(url_of(tmp_path), 1)
    assert "in use" not in running.log
    assert query(url_of(tmp_path), "SELECT count(*) FROM power_logs") == [(1,)]


async def test_without_a_database_there_is_no_backup(tmp_path):
    status, out, err = await run_script(tmp_path, "--backup", "kept")
    assert (status, out) == (1, "") and "There is no database yet" in err
    assert [*tmp_path.iterdir()] == []
