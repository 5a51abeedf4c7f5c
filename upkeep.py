"""What the collector does to its database besides writing rows: it stores the names
that devices have, and deletes rows that are too old. The door is `Configs` and
`maintain_table`.

It goes through the query pool, a little at a time, so that rows never wait for it."""

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import msgspec
import psycopg
from msgspec import Raw
from psycopg_pool import AsyncConnectionPool

import database
from complaints import Complaints
from database import DATABASE_ERRORS, one_line, within

# A device's configuration is kept until its names are in the table, so many at most.
# One of this many bytes is ignored.
MAX_CONFIGS = 1_000
MAX_CONFIG_BYTES = 32_768
# Times are seconds. A database that takes longer counts as away.
ANSWER_TIMEOUT = 5.0
# Between two looks at what there is to do.
RETRY = 2.0

# The query pool, None while the database is away.
FindPool = Callable[[], AsyncConnectionPool | None]


class Configs:
    """Configurations of devices, whose names are still to be written to the table."""

    def __init__(self, channel_keys: Collection[str]) -> None:
        self.channel_keys = channel_keys
        # By device.
        self.texts: dict[str, str] = {}

    def keep(self, src: str, config: dict[str, Raw]) -> None:
        """Keep what a device's configuration says of itself and its channels, until
        note_names of schema.sql has read the names."""
        useful = {
            key: text
            for key, text in config.items()
            if key == "sys" or key in self.channel_keys
        }
        text = msgspec.json.encode(useful)
        if len(self.texts) < MAX_CONFIGS and len(text) < MAX_CONFIG_BYTES:
            self.texts[src] = text.decode()


async def maintain_table(
    find_pool: FindPool, configs: Configs, days: int | None, complaints: Complaints
) -> None:
    """Store the names that devices gave, and delete rows that are older than `days`, a
    few at a time."""
    while True:
        await asyncio.sleep(RETRY)
        pool = find_pool()
        if pool is None:
            continue
        texts = configs.texts
        configs.texts = {}
        for src, text in texts.items():
            if not await maintain(pool, complaints, "note_names", src, text):
                # Try again later, unless the device has sent a newer one.
                configs.texts.setdefault(src, text)
        if days is not None:
            await maintain(pool, complaints, "forget_rows", days)


async def maintain(
    pool: AsyncConnectionPool, complaints: Complaints, function: str, *values: Any
) -> bool:
    """Call a function of schema.sql. Returns whether that is settled, i.e. False if it
    should be tried again."""
    try:
        await within(ANSWER_TIMEOUT, call_function(pool, function, *values))
    except DATABASE_ERRORS as exc:
        complaints.log(function, "%s has failed: %s", function, one_line(exc))
        # The database is away or busy; any other error would only come again.
        return not isinstance(exc, psycopg.OperationalError | OSError)
    return True


async def call_function(pool: AsyncConnectionPool, function: str, *values: Any) -> None:
    async with pool.connection() as conn:
        await database.call(conn, function, *values)
