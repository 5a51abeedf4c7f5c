"""The database for a command that runs beside a collector, or without one. The entry
points are `reachable` and `NoDatabase`."""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg

import local_postgres
from outbox import Outbox
from settings import Settings


class NoDatabase(OSError):
    """The embedded database has not been made yet."""


@contextlib.asynccontextmanager
async def reachable(settings: Settings) -> AsyncIterator[str]:
    """How to connect to the database. If no collector runs, the embedded server is
    started for as long as the command takes.

    A collector that starts meanwhile ends that server and starts its own: rows come
    first. Raises OSError, psycopg.OperationalError."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    folder = local_postgres.folder_in(settings.data_dir)
    if not (folder / "PG_VERSION").exists():
        raise NoDatabase(
            "There is no database yet: the collector makes it when it starts."
        )
    process = None
    try:
        if not await takes_connections(folder):
            process = await start_server(Path(settings.data_dir), folder)
            if process is None:
                await wait_for_collector(folder)
            else:
                await local_postgres.wait_until_ready(process, folder)
        yield local_postgres.conninfo(folder)
    finally:
        await local_postgres.stop(process)


async def start_server(
    data_dir: Path, folder: Path
) -> asyncio.subprocess.Process | None:
    """Start the embedded server; return None if a collector is about to start it."""
    outbox = Outbox(data_dir)
    try:
        if not claim(outbox):
            return None
        return await local_postgres.start(folder)
    finally:
        # A collector that starts from now on must get the folder. It ends our server.
        outbox.close()


async def wait_for_collector(folder: Path) -> None:
    """Wait until the server that a collector starts takes connections. After
    START_TIMEOUT give up: whoever connects then says why it failed."""
    end = time.monotonic() + local_postgres.START_TIMEOUT
    while time.monotonic() < end and not await takes_connections(folder):
        await asyncio.sleep(0.2)


async def takes_connections(folder: Path) -> bool:
    try:
        conn = await psycopg.AsyncConnection.connect(local_postgres.conninfo(folder))
    except psycopg.OperationalError:
        return False
    await conn.close()
    return True


def claim(outbox: Outbox) -> bool:
    """Lock DATA_DIR. Returns False if a collector has it, whose server takes no
    connections yet."""
    # If the file doesn't exist, don't create it: it would belong to whoever runs the
    # command. Then no collector has run here, either.
    if outbox.path.exists():
        try:
            outbox.claim()
        except sqlite3.OperationalError:
            return False
    return True
