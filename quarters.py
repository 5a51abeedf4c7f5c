"""Has PostgreSQL make the quarters of an hour, from which questions about long times
are answered. The entry points are `Quarters` and `keep_making_quarters`.

make_quarters of schema.sql does all of it, a step at a time. It goes through the query
pool, with pauses, so that rows never wait."""

import asyncio
import logging
import time

import psycopg
from psycopg_pool import AsyncConnectionPool

from complaints import Complaints
from database import DATABASE_ERRORS, one_line, within
from upkeep import GetPool

log = logging.getLogger("shelly_collector")

# Times are seconds. A database that takes longer counts as away. A step takes 0.3 s as
# a rule.
STEP_TIMEOUT = 20.0
# When everything is made.
PAUSE = 2.0
# When they cannot be made at all, or not now: the lock for the triggers was not to be
# had, say, and each try makes writers wait.
PAUSE_WITHOUT = 60.0


class Quarters:
    """How far the quarters are made."""

    def __init__(self) -> None:
        # As make_quarters says it: "all made", "made back to 2026-03-01" or "none: …".
        self.progress = "not known yet"

    def summary(self) -> str:
        """Return the progress without reasons, which are not for everybody."""
        summary, _, _ = self.progress.partition(":")
        return summary

    def note(self, progress: str) -> None:
        """Keep what make_quarters says, and log it if that is news to the owner."""
        before = self.progress
        self.progress = progress
        if kind(progress) == kind(before):
            return
        if kind(progress) == "made back to":
            log.info(
                "making quarters of an hour, so that questions about long times are"
                " answered quickly; they are %s",
                progress,
            )
        elif kind(progress) == "none":
            log.warning(
                "quarters of an hour cannot be made, so questions about long times are"
                " slow: %s",
                progress.removeprefix("none: "),
            )
        elif kind(before) == "made back to":
            log.info("quarters of an hour: all made")


def kind(progress: str) -> str:
    """What a progress is about, without its details."""
    for start in ("made back to", "none"):
        if progress.startswith(start):
            return start
    return progress


async def keep_making_quarters(
    get_pool: GetPool, quarters: Quarters, complaints: Complaints
) -> None:
    """Have the quarters made while the database is there."""
    while True:
        pause_s = PAUSE
        pool = get_pool()
        if pool is not None:
            began = time.monotonic()
            try:
                progress = await within(STEP_TIMEOUT, next_step(pool))
            except psycopg.errors.UndefinedFunction:
                progress = "none: schema.sql has not been applied"
            except DATABASE_ERRORS as exc:
                complaints.log(
                    "quarters", "make_quarters has failed: %s", one_line(exc)
                )
                progress = quarters.progress
            quarters.note(progress)
            if kind(progress) == "none":
                pause_s = PAUSE_WITHOUT
            elif kind(progress) == "made back to":
                # There is more to do, in half of the time.
                pause_s = time.monotonic() - began
        await asyncio.sleep(pause_s)


async def next_step(pool: AsyncConnectionPool) -> str:
    """Do the next step; return how far the quarters are made."""
    async with pool.connection() as conn:
        cursor = await conn.execute("SELECT make_quarters()")
        row = await cursor.fetchone()
        assert row is not None
        progress: str = row[0]
        return progress
