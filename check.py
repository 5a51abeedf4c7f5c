"""`--check`: how things stand, also beside a running collector; `--link`: a link to one
device's data."""

import contextlib
import sys
from dataclasses import asdict
from typing import Any, NamedTuple
from urllib.parse import quote

import psycopg

import database
from answers import device_token
from beside import NoDatabase, reachable
from database import BEGIN_READING, DATABASE_ERRORS, one_line, utc, within
from settings import Settings, links, page_token
from version import VERSION

CHECK_TIMEOUT = 60.0
# The link of one device holds a hash of the page's token. From the hash of a shorter
# one, whoever has that link could find the token by trying.
MIN_TOKEN_LENGTH = 20
# In seconds.
DAY = 86_400
QUARTER = 900
SIZES = """
    SELECT
        coalesce(
            -- The sum is NULL if power_logs is not partitioned.
            (SELECT sum(pg_total_relation_size(relid))
             FROM pg_partition_tree('power_logs')),
            pg_total_relation_size('power_logs'))::bigint AS rows_bytes,
        coalesce(pg_total_relation_size(to_regclass('power_quarters')), 0)
            AS quarters_bytes,
        count(*) AS rows,
        count(*) FILTER (WHERE timestamp > now() - interval '1 day')
            AS rows_of_last_day,
        -- An owner's row may have the time infinity.
        coalesce(date_part('epoch',
            max(timestamp) FILTER (WHERE isfinite(timestamp))
            - min(timestamp) FILTER (WHERE isfinite(timestamp))), 0) AS span_s
    FROM power_logs
"""


class Sizes(NamedTuple):
    """What SIZES returns."""

    # With indexes and partitions.
    rows_bytes: int
    quarters_bytes: int
    rows: int
    rows_of_last_day: int
    # Seconds from the first row to the last; 0 if there is none.
    span_s: float


async def check(settings: Settings) -> int:
    """Print the settings, what the database holds, and the URLs. Returns the exit
    status."""
    print(f"Shelly collector {VERSION}\n")
    for name, value in shown_settings(settings).items():
        print(f"{name:28}{value}")
    status = 0
    print()
    try:
        await within(CHECK_TIMEOUT, print_database(settings))
    except DATABASE_ERRORS as exc:
        print(f"The database cannot be read: {one_line(exc)}")
        status = 1
    token = quote(settings.collector_token or "", safe="")
    token_of_page = quote(page_token(settings, make=False), safe="")
    if token_of_page == "":
        token_of_page = "…, which the collector makes when it starts"
    urls = links(settings, token, token_of_page)
    print(f"\nlook at: {urls.page}\nPaste into the device: {urls.device}")
    return status


async def print_device_link(settings: Settings, device: str) -> int:
    """Print the link that opens the data of one device. Returns the exit status."""
    token = page_token(settings, make=False)
    if device == "":
        print("A link needs the id of a device, which --check shows.")
        return 2
    if token == "":
        print("There is no token yet: the collector makes one when it starts.")
        return 1
    if len(token) < MIN_TOKEN_LENGTH:
        print(
            "DASHBOARD_TOKEN is too short: whoever has the link of a device could find"
            " it by trying. Make one with: openssl rand -hex 16"
        )
        return 1
    of_device = quote(device_token(token, device), safe="")
    print(links(settings, page_token=of_device).page)
    # The link works without the database, so it is not worth an error.
    with contextlib.suppress(*DATABASE_ERRORS):
        if not await within(CHECK_TIMEOUT, has_rows(settings, device)):
            print(
                f"There is no row of {device!r} yet; --check shows the devices.",
                file=sys.stderr,
            )
    return 0


async def has_rows(settings: Settings, device: str) -> bool:
    async with reachable(settings) as conninfo:
        conn = await database.connect(conninfo)
        async with conn:
            query = "SELECT FROM power_logs WHERE device_id = %s LIMIT 1"
            cursor = await conn.execute(query, [device])
            return await cursor.fetchone() is not None


def shown_settings(settings: Settings) -> dict[str, Any]:
    """The settings by their names, without a secret."""
    shown = {name.upper(): value for name, value in asdict(settings).items()}
    for name, value in shown.items():
        if value is None:
            shown[name] = "none"
    shown["DATABASE_URL"] = shown_database_url(settings.database_url)
    if settings.host is None:
        shown["HOST"] = "all addresses"
    if settings.collector_token is not None:
        shown["COLLECTOR_TOKEN"] = "***"
    if settings.dashboard_token is not None:
        shown["DASHBOARD_TOKEN"] = "***"
    shown["CHANNELS"] = "all"
    if settings.channels is not None:
        shown["CHANNELS"] = ",".join(
            str(number) for number in sorted(settings.channels)
        )
    return shown


def shown_database_url(url: str | None) -> str:
    if url is None:
        return "none: a PostgreSQL of its own"
    parts = psycopg.conninfo.conninfo_to_dict(url)
    harmless = {name: parts.get(name) for name in ("user", "host", "port", "dbname")}
    return psycopg.conninfo.make_conninfo("", **harmless) or "***"


async def print_database(settings: Settings) -> None:
    """Print what the database holds, or that there is none yet. Raises
    DATABASE_ERRORS."""
    try:
        async with reachable(settings) as conninfo:
            conn = await database.connect(conninfo)
            await print_table(conn, settings)
    except NoDatabase as exc:
        print(exc)


async def print_table(conn: psycopg.AsyncConnection[Any], settings: Settings) -> None:
    """Print what power_logs holds, and what it takes."""
    async with conn, conn.transaction():
        await conn.execute(BEGIN_READING)
        # Counting the rows of a long table takes time; CHECK_TIMEOUT ends it.
        await conn.execute("SET LOCAL statement_timeout = 0")
        print(f"The database answers: PostgreSQL {conn.info.server_version // 10000}")
        table = await database.read_table(conn)
        if not table.exists:
            print("There is no table yet: the collector makes it when it starts.")
            return
        cursor = await conn.execute(SIZES)
        row = await cursor.fetchone()
        assert row is not None
        sizes = Sizes(*row)
        if sizes.rows == 0:
            print("power_logs holds 0 rows.")
            return
        print(f"power_logs holds {sizes.rows} rows, the newest of each channel:")
        newest = await conn.execute(
            "SELECT device_id, channel, concat_ws(' · ', device_name, name),"
            " timestamp, apower_w FROM channels()"
        )
        async for device_id, channel, names, timestamp, apower_w in newest:
            at = utc(timestamp.timestamp())
            line = f"  {at}  {device_id}  {channel}  {apower_w:g} W  {names}"
            print(line.rstrip())
        print_sizes(sizes, settings)


def print_sizes(sizes: Sizes, settings: Settings) -> None:
    """Print what the tables take on disk, and what a year takes at the last day's
    rate."""
    print(
        f"On disk: {megabytes(sizes.rows_bytes)} for the rows,"
        f" {megabytes(sizes.quarters_bytes)} for their quarters of an hour."
    )
    # Before there is a whole day, its rate is not known.
    if sizes.rows_of_last_day == 0 or sizes.span_s < DAY:
        return
    rows = sizes.rows_of_last_day * 365
    # A quarter takes as much as a row, and stays when its rows are deleted.
    quarters = rows / max(1.0, QUARTER / settings.throttle_interval_seconds)
    if settings.retention_days is not None:
        rows = sizes.rows_of_last_day * min(365, settings.retention_days)
    year_bytes = (rows + quarters) * sizes.rows_bytes / sizes.rows
    print(f"At the rate of the last day, a year takes {megabytes(year_bytes)}.")


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
