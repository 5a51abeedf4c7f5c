"""The newest row of each channel in the table, from which /health knows what to expect:
also a channel that has been silent since the start, and a device that another collector
serves. The entry points are `NewestRow` and `follow_newest_rows`."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg
from psycopg_pool import AsyncConnectionPool

from complaints import Complaints
from database import DATABASE_ERRORS, one_line, within
from upkeep import GetPool

# Times are seconds. A database that takes longer counts as away.
ANSWER_TIMEOUT = 5.0
# From one read to the next.
PAUSE = 60.0
# How often to look for the database while it is away.
RETRY = 2.0
# A channel without a row for longer is not expected any more.
DAY = 86_400.0
ROWS_AT_A_TIME = 1_000

# Steps through an index, from channel to channel, so a long time costs no more.
NEWEST_OF_DAY = """
    SELECT device_id, channel, date_part('epoch', timestamp) FROM newest_rows()
    WHERE timestamp BETWEEN to_timestamp(%s) AND to_timestamp(%s)
"""
# Reads every row of the time.
NEWEST_SINCE = """
    SELECT device_id, channel, date_part('epoch', max(timestamp)) FROM power_logs
    WHERE timestamp BETWEEN to_timestamp(%s) AND to_timestamp(%s)
    GROUP BY device_id, channel
"""


class NewestRow(NamedTuple):
    device_id: str
    channel: str
    # The start of its interval, in seconds since 1970.
    timestamp: float


Note = Callable[[NewestRow], None]


async def follow_newest_rows(
    get_pool: GetPool, note: Note, interval_s: float, complaints: Complaints
) -> None:
    """Call `note` with the newest row of each channel of the last day, and from then on
    with those that are new."""
    # A row bears the start of its interval and is written up to an interval later, or a
    # minute if that is longer.
    overlap_s = 2 * max(60.0, interval_s)
    # None before the first time.
    read_at = None
    while True:
        pool = get_pool()
        if pool is None:
            await asyncio.sleep(RETRY)
            continue
        now = time.time()
        try:
            if read_at is None:
                await within(ANSWER_TIMEOUT, read_last_day(pool, now, note))
            else:
                since = read_at - overlap_s
                reading = read(pool, NEWEST_SINCE, since, now, note)
                await within(ANSWER_TIMEOUT, reading)
            read_at = now
        except DATABASE_ERRORS as exc:
            complaints.log("newest", "the newest rows are not read: %s", one_line(exc))
        await asyncio.sleep(PAUSE)


async def read_last_day(pool: AsyncConnectionPool[Any], now: float, note: Note) -> None:
    try:
        await read(pool, NEWEST_OF_DAY, now - DAY, now, note)
    except psycopg.errors.UndefinedFunction:
        # schema.sql could not be applied, so newest_rows() is missing.
        await read(pool, NEWEST_SINCE, now - DAY, now, note)


async def read(
    pool: AsyncConnectionPool[Any], query: str, since: float, until: float, note: Note
) -> None:
    async with pool.connection() as conn:
        cursor = await conn.execute(query, (since, until))
        while rows := await cursor.fetchmany(ROWS_AT_A_TIME):
            for row in rows:
                note(NewestRow(*row))
            # Let the devices' frames in.
            await asyncio.sleep(0)
