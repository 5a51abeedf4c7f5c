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
# The shortest pause while there is more to do. A step returns at once if another
# collector is at work.
SHORT_PAUSE = 0.2
# When they cannot be made. The lock for the triggers may have timed out, and each try
# holds up writers.
PAUSE_WITHOUT = 60.0


class Quarters:
    """How far the quarters are made."""

    def __init__(self) -> None:
        # As make_quarters says it: "all made", "being made", "made back to 2026-03-01",
        # or "none: must be owner of table power_logs".
        self.progress = "not known yet"
        # Whether the owner was told that they are being made.
        self.was_announced = False

    def summary(self) -> str:
        """Return the progress without reasons, which are not for everybody."""
        summary, _, _ = self.progress.partition(":")
        return summary

    def note(self, progress: str) -> None:
        """Keep what make_quarters says, and log it if that is news to the owner."""
        before = self.progress
        self.progress = progress
        if progress.startswith("none"):
            if not before.startswith("none"):
                log.warning(
                    "quarters of an hour cannot be made, so questions about long times"
                    " are slow; %s",
                    progress,
                )
        elif progress.startswith("made back to"):
            # A table that is done in one step makes no line.
            if before.startswith("made back to") and not self.was_announced:
                self.was_announced = True
                log.info(
                    "making quarters of an hour, so that questions about long times are"
                    " answered quickly"
                )
        elif progress == "all made" and self.was_announced:
            self.was_announced = False
            log.info("quarters of an hour: all made")


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
                quarters.note(await within(STEP_TIMEOUT, next_step(pool)))
                pause_s = pause_after(quarters.progress, time.monotonic() - began)
            except DATABASE_ERRORS as exc:
                complaints.log(
                    "quarters", "make_quarters has failed: %s", one_line(exc)
                )
        await asyncio.sleep(pause_s)


def pause_after(progress: str, step_s: float) -> float:
    """How long to wait after a step that took so long."""
    if progress == "all made":
        return PAUSE
    if progress.startswith("none"):
        return PAUSE_WITHOUT
    # Rest as long as the step took, so the database is busy half of the time at most.
    return max(step_s, SHORT_PAUSE)


async def next_step(pool: AsyncConnectionPool) -> str:
    """Do the next step; return how far the quarters are made."""
    async with pool.connection() as conn:
        try:
            cursor = await conn.execute("SELECT make_quarters()")
        except psycopg.errors.UndefinedFunction:
            return "none: schema.sql has not been applied"
        row = await cursor.fetchone()
        assert row is not None
        progress: str = row[0]
        return progress
