"""Without a DATABASE_URL: the collector's own PostgreSQL."""

import asyncio
import signal

import psutil
import psycopg
import pytest
import shelly_collector as sc
from conftest import device, minute_frame, read_rows, wait_for, wait_for_rows


def servers(folder):
    """The PostgreSQL processes that serve a folder."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        command = process.info["cmdline"] or []
        if process.info["name"] == "postgres" and str(folder / "data" / "postgres") in command:
            found.append(process)
    return found


def url(running):
    return sc.start_postgres(running.folder / "data" / "postgres").get_uri()


async def connected(collectors, folder):
    running = await collectors(folder).ready()
    assert "no DATABASE_URL: using an embedded PostgreSQL" in running.log
    return running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_rows_outlive_a_clean_stop_and_no_server_is_left_behind(collectors, tmp_path, number):
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


async def test_ctrl_c_reaches_the_whole_terminal_and_no_row_is_lost(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    async with device(running.url) as peer:
        await peer.send(*(minute_frame(f"d{n}") for n in range(100)))
        for process in servers(tmp_path):
            process.send_signal(signal.SIGINT)
        status, _ = await running.stop(signal.SIGINT)
    assert status == 0
    await (await running.again()).ready()
    await wait_for_rows(url(running), 100)


async def test_kill_9_and_start_again(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    async with device(running.url) as peer:
        await peer.send(minute_frame("one"))
        await wait_for_rows(url(running), 1)
    running.process.kill()
    running.process.wait()
    (left,) = servers(tmp_path)
    await (await running.again()).ready()
    assert servers(tmp_path) == [left]  # found again
    async with device(running.url) as peer:
        await peer.send(minute_frame("two"))
        await wait_for_rows(url(running), 2)
    status, _ = await running.stop()
    assert status == 0 and servers(tmp_path) == []


async def test_a_second_start_on_the_folder_is_refused_and_the_first_goes_on(collectors, tmp_path):
    first = await connected(collectors, tmp_path)
    second = collectors(tmp_path)
    assert await asyncio.to_thread(second.process.wait, 10) == 1
    assert "DATA_DIR data is in use by another collector" in second.log
    async with device(first.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(url(first), 1)


async def test_a_server_that_crashes_is_started_again(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    (server,) = servers(tmp_path)
    for process in [server, *server.children()]:
        process.kill()
    await asyncio.to_thread(server.wait, 5)
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for(lambda: "database back" in running.log)
        await wait_for_rows(url(running), 1)


async def test_a_process_number_that_became_another_process_is_not_taken_for_the_server(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    pid_file = tmp_path / "data/postgres/postmaster.pid"
    lines = pid_file.read_text().splitlines()
    await running.stop()
    # As after a power cut: the file is there, and its number now is somebody else's.
    pid_file.write_text("\n".join([str(psutil.Process().pid), *lines[1:]]) + "\n")
    await (await running.again()).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(url(running), 1)


async def test_a_stop_right_after_the_start_leaves_no_server_behind(collectors, tmp_path):
    running = collectors(tmp_path)
    await wait_for(lambda: "paste into the device" in running.log)
    status, took = await running.stop()
    assert status == 0 and took < 4 and servers(tmp_path) == []
    await (await running.again()).ready()


async def test_check_starts_and_stops_the_server_if_no_collector_runs(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(url(running), 1)
    command = [*psutil.Process(running.process.pid).cmdline(), "--check"]
    for collector_runs in (True, False):
        check = await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, env=running.env, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await check.communicate()
        assert check.returncode == 0 and b"holds 1 rows" in out
        assert len(servers(tmp_path)) == collector_runs
        if collector_runs:
            await running.stop()


async def test_the_original_database_can_be_read_with_any_client(collectors, tmp_path):
    running = await connected(collectors, tmp_path)
    with psycopg.connect(url(running)) as conn:
        assert conn.execute("SELECT count(*) FROM power_logs").fetchone() == (0,)
    assert read_rows(url(running)) == []
