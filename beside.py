"""The database for a command that runs beside a collector, or without one. The entry
points are `reachable` and `NoDatabase`."""

import contextlib
import sqlite3
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

    Raises OSError, psycopg.OperationalError."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    folder = local_postgres.folder_in(settings.data_dir)
    if not (folder / "PG_VERSION").exists():
        raise NoDatabase(
            "There is no database yet: the collector makes it when it starts."
        )
    outbox = Outbox(Path(settings.data_dir))
    process = None
    try:
        if not await takes_connections(folder) and may_start(outbox):
            process = await local_postgres.start(folder)
            await local_postgres.wait_until_ready(process, folder)
        yield local_postgres.conninfo(folder)
    finally:
        await local_postgres.stop(process)
        outbox.close()


async def takes_connections(folder: Path) -> bool:
    try:
        conn = await psycopg.AsyncConnection.connect(local_postgres.conninfo(folder))
    except psycopg.OperationalError:
        return False
    await conn.close()
    return True


def may_start(outbox: Outbox) -> bool:
    """Whether no collector has the folder, and so is about to start its server."""
    # If it doesn't exist, don't create it: it would belong to whoever runs the command.
    if outbox.path.exists():
        try:
            outbox.claim()
        except sqlite3.OperationalError:
            return False
    return True
