"""What the collector does to its database besides writing rows: it stores the names of
devices, and deletes old rows. The entry points are `Configs` and `maintain_table`.

All of it goes through the query pool, a little at a time, so that rows never wait."""

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

# Configurations that wait for their names to be written to the table, at most.
MAX_CONFIGS = 1_000
# A larger one is ignored.
MAX_CONFIG_BYTES = 32_768
# Times are seconds. A database that takes longer counts as away.
ANSWER_TIMEOUT = 5.0
# How often to check what there is to do, or to be done again.
RETRY = 2.0

# Returns the query pool, or None while the database is away.
GetPool = Callable[[], AsyncConnectionPool | None]


class Configs:
    """Configurations of devices, whose names are still to be written to the table."""

    def __init__(self, component_keys: Collection[str]) -> None:
        self.component_keys = component_keys
        # By device.
        self.texts: dict[str, str] = {}

    def keep(self, src: str, config: dict[str, Raw]) -> None:
        """Keep what a device's configuration says of itself and its channels, until
        note_names of schema.sql has read the names."""
        useful = {
            key: text
            for key, text in config.items()
            if key == "sys" or key in self.component_keys
        }
        text = msgspec.json.encode(useful)
        if len(self.texts) < MAX_CONFIGS and len(text) < MAX_CONFIG_BYTES:
            self.texts[src] = text.decode()

    def put_back(self, src: str, text: str) -> None:
        """Keep one whose names could not be written, unless there is a newer one."""
        if len(self.texts) < MAX_CONFIGS:
            self.texts.setdefault(src, text)


async def maintain_table(
    get_pool: GetPool, configs: Configs, days: int | None, complaints: Complaints
) -> None:
    """Store the names that devices gave, and delete rows that are older than `days`, a
    few at a time."""
    while True:
        await asyncio.sleep(RETRY)
        pool = get_pool()
        if pool is None:
            continue
        texts = configs.texts
        configs.texts = {}
        for src, text in texts.items():
            if not await maintain(pool, complaints, "note_names", src, text):
                configs.put_back(src, text)
        if days is not None:
            await maintain(pool, complaints, "forget_rows", days)


async def maintain(
    pool: AsyncConnectionPool, complaints: Complaints, function: str, *values: Any
) -> bool:
    """Call a function of schema.sql. Returns False if it should be tried again."""
    try:
        await within(ANSWER_TIMEOUT, call_function(pool, function, *values))
    except DATABASE_ERRORS as exc:
        complaints.log(function, "%s has failed: %s", function, one_line(exc))
        # If the database is away or busy. Any other error would only come again.
        worth_retrying = isinstance(exc, psycopg.OperationalError | OSError)
        return not worth_retrying
    return True


async def call_function(pool: AsyncConnectionPool, function: str, *values: Any) -> None:
    async with pool.connection() as conn:
        await database.call(conn, function, *values)
