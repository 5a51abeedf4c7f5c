"""The database goes away, hangs and comes back, or the collector is killed: the table
is still right."""

import asyncio
import contextlib
import math
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
import pytest
from websockets.exceptions import ConnectionClosed, WebSocketException

from support import (
    DEVICE,
    OLD_ROWS,
    ROOT,
    Wire,
    device,
    execute,
    minute_frame,
    old_outbox,
    read_rows,
    wait_for,
    wait_for_rows,
)

INTERVAL_S = 0.5


class Steady:
    """A device that reports twice in every interval: before, during and after an
    outage."""

    def __init__(self, url):
        # The intervals that the collector has certainly heard it in, by number. On a
        # busy machine it may be late for one.
        self.heard: set[int] = set()
        self.task = asyncio.create_task(self.live(url))

    async def live(self, url):
        while True:
            with contextlib.suppress(OSError, WebSocketException):
                async with device(url) as peer:
                    while True:
                        self.heard |= await report(peer)
                        half = INTERVAL_S / 2
                        await asyncio.sleep(half - time.time() % half + 0.05)
            await asyncio.sleep(0.05)

    async def report(self, intervals):
        """Wait until it has reported in this many more intervals."""
        goal = len(self.heard) + intervals
        await wait_for(lambda: len(self.heard) >= goal, 60)

    async def stop(self):
        """Close its connection. If the test ended in the middle of that, the socket
        would stay open."""
        self.task.cancel()
        await asyncio.wait({self.task})


async def report(peer):
    """Send a frame of the device `steady`. Returns the number of the interval in which
    the collector has certainly read it, as a set; an empty one if it lies between two."""
    sent = number_of(time.time())
    await peer.send(minute_frame("steady"))
    # The answer to a ping shows that the frame before it was read.
    await (await peer.websocket.ping())
    return {sent} & {number_of(time.time())}


def number_of(seconds):
    """The number of the interval that a time is in."""
    return math.floor(seconds / INTERVAL_S)


def without_row(url, heard):
    """Those of the intervals that have no row, by number."""
    rows = read_rows(url, "timestamp, device_id")
    written = [number_of(at.timestamp()) for at, name in rows if name == "steady"]
    assert len(set(written)) == len(written)
    return sorted(heard - set(written))


async def settle(running, url, timeout_s=30):
    """Wait until no row waits any more."""

    async def done():
        health = await running.health()
        return (
            health.get("database") == "connected" and health.get("rows waiting") == "0"
        )

    await wait_for(done, timeout_s)


def start(collectors, url, **env):
    return collectors(
        DATABASE_URL=url, THROTTLE_INTERVAL_SECONDS=str(INTERVAL_S), **env
    )


def outage_lines(running):
    return [
        line
        for line in running.log.splitlines()
        if "database unreachable" in line or "database back" in line
    ]


async def hang(own_postgres):
    own_postgres.signal_all(signal.SIGSTOP)


async def crash(own_postgres):
    await asyncio.to_thread(own_postgres.crash)


async def come_back(own_postgres, how):
    if how is hang:
        own_postgres.signal_all(signal.SIGCONT)
    else:
        await asyncio.to_thread(own_postgres.start)


@pytest.mark.parametrize("how", [crash, hang])
async def test_every_interval_has_its_row_after_an_outage(
    collectors, own_postgres, how
):
    running = await start(collectors, own_postgres.url).ready()
    steady = Steady(running.url)
    await steady.report(3)
    await how(own_postgres)
    await running.ready("unreachable since")
    await steady.report(10)
    assert int((await running.health())["rows waiting"]) > 5
    await come_back(own_postgres, how)
    back = time.monotonic()
    await settle(running, own_postgres.url)
    assert time.monotonic() - back < 10
    await steady.report(3)
    await steady.stop()
    await settle(running, own_postgres.url)
    assert without_row(own_postgres.url, steady.heard) == []
    assert [line.split()[1] for line in outage_lines(running)] == ["ERROR", "WARNING"]


@pytest.mark.parametrize("how", [crash, hang])
async def test_a_stop_in_an_outage_takes_3_s_at_most_and_loses_nothing(
    collectors, own_postgres, how
):
    running = await start(collectors, own_postgres.url).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("before"))
        await wait_for_rows(own_postgres.url, 1)
        await how(own_postgres)
        await peer.send(*(minute_frame(f"d{n}") for n in range(50)))
        # The stop comes during the first write that hangs, before anybody knows of an
        # outage.
        status, took = await running.stop()
    assert status == 0 and took < 3
    await come_back(own_postgres, how)
    again = await (await running.again()).ready()
    assert len(await wait_for_rows(own_postgres.url, 51)) == 51
    await settle(again, own_postgres.url)


@pytest.mark.parametrize("how", [crash, hang])
async def test_kill_9_in_an_outage_leaves_all_but_the_last_second_on_disk(
    collectors, own_postgres, how
):
    running = await start(collectors, own_postgres.url).ready()
    steady = Steady(running.url)
    await steady.report(2)
    await how(own_postgres)
    await steady.report(6)
    running.process.kill()
    killed = time.time()
    await asyncio.to_thread(running.process.wait)
    await steady.stop()
    await (await running.again()).ready("unreachable since")
    await wait_for(lambda: "rows of an earlier outage" in running.log)
    await come_back(own_postgres, how)
    await settle(running, own_postgres.url)
    lost = without_row(own_postgres.url, steady.heard)
    assert all(number >= number_of(killed - 1.2) for number in lost)
    assert len(lost) < len(steady.heard)


async def test_a_network_that_swallows_its_connections_for_good_loses_no_row(
    collectors, own_postgres
):
    info = psycopg.conninfo.conninfo_to_dict(own_postgres.url)
    async with Wire(f"{info['host']}/.s.PGSQL.5432") as wire:
        url = f"postgresql://postgres@127.0.0.1:{wire.port}/postgres"
        running = await start(collectors, url).ready()
        steady = Steady(running.url)
        await steady.report(2)
        wire.swallow()
        await wait_for(lambda: len(outage_lines(running)) == 1, 30)
        wire.mend()
        back = time.monotonic()
        await settle(running, url)
        assert time.monotonic() - back < 10
        await steady.stop()
        await settle(running, url)
        assert without_row(own_postgres.url, steady.heard) == []
        assert len(outage_lines(running)) == 2


SLOW_CHECK = "ALTER TABLE power_logs ADD CONSTRAINT even CHECK (apower_w::int % 2 = 0)"


async def test_a_slow_link_and_many_refused_rows_get_past_every_deadline(
    collectors, own_postgres
):
    # The link takes 10 ms each way. Of 600 rows the database refuses every second one.
    info = psycopg.conninfo.conninfo_to_dict(own_postgres.url)
    async with Wire(f"{info['host']}/.s.PGSQL.5432", delay_s=0.01) as wire:
        url = f"postgresql://postgres@127.0.0.1:{wire.port}/postgres"
        running = await collectors(DATABASE_URL=url).ready()
        execute(own_postgres.url, SLOW_CHECK)
        async with device(running.url) as peer:
            await peer.send(
                *(minute_frame(f"d{n}", apower=float(n)) for n in range(600))
            )
            # This takes 14 s on an idle machine.
            await wait_for_rows(own_postgres.url, 300, 60)
            await wait_for(lambda: "rows waiting: 0" in running.get()[1])
        assert "rows dropped: 300" in running.get()[1]
    assert outage_lines(running) == [] and running.log.count("row dropped") == 300


async def test_a_locked_table_keeps_one_backend_waiting_and_no_row_is_lost(
    collectors, database
):
    running = await start(collectors, database).ready()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    steady = Steady(running.url)
    await steady.report(2)
    with (
        psycopg.connect(database) as owner,
        psycopg.connect(database, autocommit=True) as look,
    ):
        # VACUUM FULL locks it like this.
        owner.execute("LOCK TABLE power_logs")
        await wait_for(lambda: len(outage_lines(running)) == 1, 60)
        assert running.log.count("no answer in time") == 1
        # This lasts longer than the next attempts.
        for _ in range(100):
            assert look.execute(waiting).fetchone()[0] <= 1
            await asyncio.sleep(0.05)
        await steady.stop()
        status, took = await running.stop()
        assert status == 0 and took < 3
        await wait_for(lambda: look.execute(waiting).fetchone() == (0,))
        await running.again()
        await running.ready("connected")
        owner.rollback()
    await steady.stop()
    await settle(running, database)
    assert without_row(database, steady.heard) == []


@pytest.mark.parametrize(
    "refusal",
    [
        "ALTER TABLE power_logs ADD site INT NOT NULL DEFAULT 1; ALTER TABLE power_logs ALTER site DROP DEFAULT",
        "read-only",
    ],
)
async def test_a_database_that_answers_but_refuses_and_a_full_disk_are_one_line_each(
    collectors, database, monkeypatch, refusal
):
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *a, **kw: real(*a, **kw, preexec_fn=limit_files(40_000)),
    )
    running = await start(collectors, database).ready()
    monkeypatch.undo()
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    read_only = [f"ALTER DATABASE {name} SET default_transaction_read_only TO on"]
    read_only.append(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    execute(database, *(read_only if refusal == "read-only" else [refusal]))
    async with device(running.url) as peer:
        for n in range(25):
            await peer.send(*(minute_frame(f"d{n}-{m}") for m in range(40)))
            # In these 6 s naive retries wrote 2,058 lines.
            await asyncio.sleep(0.25)
        await wait_for(lambda: "rows wait in memory" in running.log)
        lines = running.log.splitlines()
        assert len(lines) < 10 and len(outage_lines(running)) == 1, running.log
        if refusal == "read-only":
            with psycopg.connect(
                database,
                autocommit=True,
                options="-c default_transaction_read_only=off",
            ) as conn:
                conn.execute(
                    f"ALTER DATABASE {name} RESET default_transaction_read_only"
                )
        else:
            execute(database, "ALTER TABLE power_logs DROP site")
        await wait_for(lambda: len(read_rows(database, "1", "1")) == 1000, 30)
    await wait_for(lambda: len(outage_lines(running)) == 2)


async def test_connections_that_the_server_closed_are_no_outage(collectors, database):
    running = await start(collectors, database).ready()
    async with device(running.url) as peer:
        for n in range(1, 4):
            await peer.send(minute_frame(f"d{n}"))
            await wait_for_rows(database, n)
            with psycopg.connect(database, autocommit=True) as conn:
                conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND application_name = 'shelly_collector'"
                )
    assert outage_lines(running) == []


async def test_the_second_host_of_a_url_is_reached_when_the_first_swallows_all(
    collectors, database
):
    info = psycopg.conninfo.conninfo_to_dict(database)
    async with (
        Wire(f"{info['host']}/.s.PGSQL.5432") as hole,
        Wire(f"{info['host']}/.s.PGSQL.5432") as way,
    ):
        hole.swallow()
        url = f"postgresql://postgres@127.0.0.1:{hole.port},127.0.0.1:{way.port}/{info['dbname']}"
        running = await start(collectors, url).ready()
        async with device(running.url) as peer:
            await peer.send(minute_frame())
            await wait_for_rows(database, 1)


async def test_a_name_that_no_resolver_takes_is_an_outage_and_no_bug(collectors):
    running = await start(collectors, "postgresql://u@db..example/x").ready(
        "unreachable since"
    )
    await wait_for(lambda: len(outage_lines(running)) == 1)


async def test_a_database_may_come_after_the_start(collectors, own_postgres):
    own_postgres.stop()
    running = await start(collectors, own_postgres.url).ready("unreachable since")
    async with device(running.url) as peer:
        await peer.send(*(minute_frame(f"d{n}") for n in range(10)))
        await wait_for(lambda: "rows waiting: 10" in running.get()[1])
        await wait_for(lambda: len(outage_lines(running)) == 1)
        await asyncio.to_thread(own_postgres.start)
        await wait_for_rows(own_postgres.url, 10)
    assert running.log.count("No such file") == 1 and len(outage_lines(running)) == 2


async def test_a_refused_password_makes_the_rows_wait_and_is_never_shown(
    collectors, own_postgres
):
    hba = own_postgres.folder / "pg_hba.conf"
    trusting = hba.read_text()

    def apply(rules):
        hba.write_text(rules)
        with psycopg.connect(own_postgres.url, autocommit=True) as conn:
            conn.execute("SELECT pg_reload_conf()")

    with psycopg.connect(own_postgres.url, autocommit=True) as conn:
        conn.execute("CREATE ROLE meter LOGIN SUPERUSER PASSWORD 'right-one'")
    apply("local all postgres trust\nlocal all all scram-sha-256\n")
    url = psycopg.conninfo.make_conninfo(
        own_postgres.url, user="meter", password="wrong-one"
    )
    running = await start(collectors, url).ready("unreachable since")
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for(lambda: "rows waiting: 1" in running.get()[1])
        line = "ERROR DATABASE_URL does not work, rows wait until it does: connection failed: "
        await wait_for(lambda: running.log.count(line) == 1)
        assert running.log.count("password authentication failed") == 1
        apply(trusting)
        await wait_for_rows(own_postgres.url, 1)
    assert "wrong-one" not in running.log


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (
            "u@no.host.invalid/x",
            "DATABASE_URL: there is no host 'no.host.invalid'; rows wait until there is",
        ),
        (
            "u@127.0.0.1/x?sslmode=nonsense",
            "DATABASE_URL does not work, rows wait until it does:"
            ' connection is bad: invalid sslmode value: "nonsense"',
        ),
    ],
)
async def test_a_database_url_that_cannot_work_is_no_outage(collectors, place, line):
    running = await collectors(DATABASE_URL=f"postgresql://{place}").ready(
        "unreachable"
    )
    await wait_for(lambda: f"ERROR {line}\n" in running.log)
    assert "is back" not in running.log


async def test_rows_of_the_replay_come_oldest_first(collectors, own_postgres):
    running = await start(collectors, own_postgres.url).ready()
    steady = Steady(running.url)
    await steady.report(2)
    await crash(own_postgres)
    await steady.report(10)
    await asyncio.to_thread(own_postgres.start)
    await steady.report(4)
    await steady.stop()
    await settle(running, own_postgres.url)
    written = [when for (when,) in read_rows(own_postgres.url, "timestamp", "id")]
    assert written == sorted(written)


async def test_a_restart_within_the_interval_makes_no_second_row(collectors, database):
    running = await collectors(DATABASE_URL=database).ready()
    for n in range(3):
        async with device(running.url) as peer:
            await peer.send(minute_frame(apower=float(n)), minute_frame(f"mark{n}"))
            await wait_for(lambda n=n: len(read_rows(database)) == n + 2)
        running.process.kill()
        running.process.wait()
        await (await running.again()).ready()
    assert [
        row for row in read_rows(database, "device_id, apower_w") if row[0] == DEVICE
    ] == [(DEVICE, 0.0)]


async def test_two_collectors_and_a_device_that_moves_between_them(
    collectors, database
):
    one, two = start(collectors, database), start(collectors, database)
    await one.ready()
    await two.ready()
    # Each time the old socket lives on for a while.
    heard = set()
    for n in range(6):
        async with (
            device((one, two)[n % 2].url) as new,
            device((two, one)[n % 2].url) as old,
        ):
            for _ in range(4):
                heard |= await report(new)
                heard |= await report(old)
                await asyncio.sleep(INTERVAL_S / 4)
    await settle(one, database)
    await settle(two, database)
    assert without_row(database, heard) == [] and len(heard) > 3


def limit_files(size):
    """Run in the child: no file can grow beyond `size`, as on a full disk."""

    def apply():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return apply


async def test_a_full_disk_warns_at_the_start_and_rows_wait_in_memory(
    collectors, own_postgres, monkeypatch
):
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *a, **kw: real(*a, **kw, preexec_fn=limit_files(1024)),
    )
    running = start(collectors, own_postgres.url)
    monkeypatch.undo()
    # Its log is a file, too, so this reads as much of it as fits.
    await running.ready()
    assert "DATA_DIR data cannot be used" in running.log
    await asyncio.to_thread(own_postgres.stop)
    steady = Steady(running.url)
    await steady.report(4)
    await asyncio.to_thread(own_postgres.start)
    await settle(running, own_postgres.url)
    await steady.stop()
    assert without_row(own_postgres.url, steady.heard) == []
    assert len(read_rows(own_postgres.url)) >= 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_folder_that_cannot_be_written_warns_at_the_start(
    collectors, database, tmp_path
):
    (tmp_path / "data").mkdir(mode=0o500)
    running = await collectors(tmp_path, DATABASE_URL=database).ready()
    assert "DATA_DIR data cannot be used" in running.log


async def test_a_folder_that_is_a_file_warns_at_the_start(
    collectors, database, tmp_path
):
    (tmp_path / "data").write_text("")
    running = await collectors(tmp_path, DATABASE_URL=database).ready()
    assert "DATA_DIR data cannot be used" in running.log
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)


async def test_a_second_collector_on_the_folder_waits_in_memory_until_it_is_free(
    collectors, own_postgres, tmp_path
):
    first = await collectors(tmp_path, DATABASE_URL=own_postgres.url).ready()
    second = await collectors(tmp_path, DATABASE_URL=own_postgres.url).ready()
    assert "in use by another collector" in second.log
    await first.stop()
    own_postgres.stop()
    async with device(second.url) as peer:
        await peer.send(minute_frame())
        await wait_for(lambda: "rows waiting: 1" in second.get()[1])
        await wait_for(lambda: rows_on_disk(tmp_path) == 1)


async def test_rows_that_another_collector_left_in_the_folder_are_taken_over(
    collectors, database, tmp_path
):
    away = "postgresql://u@127.0.0.1:1/x"
    first = await collectors(tmp_path, DATABASE_URL=away).ready("unreachable since")
    second = await collectors(tmp_path, DATABASE_URL=database).ready()
    async with device(first.url) as peer:
        await peer.send(minute_frame())
        await wait_for(lambda: "rows waiting: 1" in first.get()[1])
    await first.stop()
    assert [row[0] for row in await wait_for_rows(database, 1)] == [DEVICE]
    assert outage_lines(second) == []


def rows_on_disk(folder):
    """How many rows a copy of a running collector's outbox holds. The file itself is
    locked, and must not be touched."""
    copy = Path(tempfile.mkdtemp(dir=folder))
    # The second one exists only while a collector runs.
    for name in ("outbox.sqlite3", "outbox.sqlite3-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(folder / "data" / name, copy / name)
    with contextlib.closing(sqlite3.connect(copy / "outbox.sqlite3")) as file:
        try:
            return file.execute("SELECT count(*) FROM rows").fetchone()[0]
        # It was copied in the middle of a write.
        except sqlite3.DatabaseError:
            return 0


async def test_a_bug_in_the_handler_is_loud_and_ends_its_connection_only(
    collectors, database, tmp_path
):
    running = await collectors(tmp_path, DATABASE_URL=database).ready()
    await running.stop()
    with_broken(
        running,
        "real = sc.should_write\n"
        "def should_write(collector, channel):\n"
        "    if channel.device_id == 'third': raise ZeroDivisionError('EXPECTED_BUG')\n"
        "    return real(collector, channel)\n"
        "sc.should_write = should_write\n",
    )
    await (await running.again()).ready()
    async with device(running.url) as good, device(running.url) as bad:
        await bad.send(
            minute_frame("first"), minute_frame("second"), minute_frame("third")
        )
        with pytest.raises(ConnectionClosed):
            await bad.websocket.recv()
        await good.send(minute_frame("fourth"))
        assert [row[0] for row in await wait_for_rows(database, 3)] == [
            "first",
            "fourth",
            "second",
        ]
    assert (
        "ZeroDivisionError: EXPECTED_BUG" in running.log
        and running.process.poll() is None
    )


async def test_a_bug_in_the_writer_saves_the_rows_in_hand_and_ends_with_status_1(
    collectors, database, tmp_path
):
    # The bug is a driver that fails in an unexpected way, at the third row.
    running = collectors(tmp_path, DATABASE_URL=database)
    await running.ready()
    await running.stop()
    with_broken(
        running,
        "real = sc.write_rows\n"
        "async def write_rows(collector, pool, rows):\n"
        "    if any(row.device_id == 'third' for row in rows): raise ZeroDivisionError('EXPECTED_BUG')\n"
        "    return await real(collector, pool, rows)\n"
        "sc.write_rows = write_rows\n",
    )
    await (await running.again()).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("first"))
        await wait_for_rows(database, 1)
        await peer.send(minute_frame("third"), minute_frame("fourth"))
        assert await asyncio.to_thread(running.process.wait, 10) == 1
    assert "CRITICAL stopped by a bug: ZeroDivisionError" in running.log
    del running.start
    await (await running.again()).ready()
    assert [row[0] for row in await wait_for_rows(database, 3)] == [
        "first",
        "fourth",
        "third",
    ]


def with_broken(running, patch):
    """Run this patch at the collector's next start."""
    script = running.folder / "broken.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport shelly_collector as sc\n{patch}sys.exit(sc.main())\n"
    )

    def start():
        with running.log_path.open("ab") as log:
            command = [sys.executable, str(script)]
            return subprocess.Popen(
                command, cwd=running.folder, env=running.env, stdout=log, stderr=log
            )

    running.start = start


async def test_a_resolver_that_hangs_does_not_hold_up_a_stop(collectors, tmp_path):
    running = collectors(tmp_path, DATABASE_URL="postgresql://u@database.invalid/x")
    await running.ready("unreachable since")
    await running.stop()
    with_broken(
        running,
        "import socket, time\n"
        "real = socket.getaddrinfo\n"
        "def getaddrinfo(host, *rest, **more):\n"
        "    if host == 'database.invalid': time.sleep(60)\n"
        "    return real(host, *rest, **more)\n"
        "socket.getaddrinfo = getaddrinfo\n",
    )
    await (await running.again()).ready("connecting")
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        status, took = await running.stop()
    assert status == 0 and took < 3 and rows_on_disk(tmp_path) == 1


@pytest.mark.parametrize("embedded", [False, True])
async def test_a_stop_writes_what_is_in_hand_though_the_database_takes_a_moment(
    collectors, database, tmp_path, embedded
):
    running = await collectors(
        tmp_path, **({} if embedded else {"DATABASE_URL": database})
    ).ready()
    await running.stop()
    with_broken(
        running,
        "import asyncio\n"
        "real = sc.write_rows\n"
        "async def write_rows(*arguments):\n"
        "    await asyncio.sleep(0.2)\n"
        "    return await real(*arguments)\n"
        "sc.write_rows = write_rows\n",
    )
    await (await running.again()).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("one"))
        await wait_for(lambda: "rows waiting: 1" in running.get()[1])
        # This row comes while a batch is in flight.
        await peer.send(minute_frame("two"))
        await (await peer.websocket.ping())
    status, took = await running.stop()
    assert (
        status == 0
        and took < 3
        and running.log.count("stopped, 0 rows wait on disk, 0 are lost") == 2
    )
    assert "has ended" not in running.log


async def test_a_collector_brings_the_rows_of_an_old_outbox_to_the_table(
    collectors, database, tmp_path
):
    old_outbox(tmp_path / "data").close()
    running = await collectors(tmp_path, DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame("new"))
        await wait_for(lambda: len(read_rows(database, "1", "1")) == len(OLD_ROWS) + 1)
    found = read_rows(database, "device_id, apower_w, energy_returned_wh")
    assert found == [("new", 433.8, 0.0)] + [("old", float(n), None) for n in range(20)]
    assert "rows dropped: 0" in running.get()[1] and "ERROR" not in running.log
