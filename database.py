"""PostgreSQL, for whoever uses it: how to connect, deadlines, the state of the table,
and calling a function of schema.sql."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import sql
from psycopg_pool import AsyncConnectionPool

log = logging.getLogger("shelly_collector")

Result = TypeVar("Result")

CONNECTION: dict[str, Any] = {
    "application_name": "shelly_collector",
    "autocommit": True,
    # Otherwise it's the database's own encoding, which cannot write every name.
    "client_encoding": "utf8",
    "connect_timeout": 5,
    # No statement gets a name: behind a pooler it may be another's. One without a name
    # is planned for its values, too.
    "prepare_threshold": None,
    # A dead network shows after a minute.
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}
# Of a database that is absent, full, frozen or altered.
DATABASE_ERRORS = (psycopg.Error, OSError, UnicodeError)
SCHEMA = Path(__file__).with_name("schema.sql")
# The number at the end of schema.sql.
SCHEMA_VERSION = 7

# The server, the database or the role may have other settings than those that our SQL
# relies on. PgBouncer refuses startup options, so they are set after connecting. With
# no schema but the system's own in the search_path, the table would have no place.
CONFIGURE = """
    SET array_nulls = on;
    SET default_transaction_isolation = 'read committed';
    SELECT set_config('search_path', 'public', false)
    WHERE current_schemas(false) <@ '{pg_catalog}'
"""
# The same at the start of a transaction that reads values as text.
BEGIN_READING = """
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED READ ONLY;
    SET LOCAL TimeZone = 'UTC';
    SET LOCAL DateStyle = 'ISO, YMD';
    SET LOCAL IntervalStyle = 'postgres';
    SET LOCAL extra_float_digits = 1;
"""

READ_TABLE = """
WITH power_logs AS (
    SELECT to_regclass('power_logs') AS oid
), tables AS (
    -- It may be a view of the owner's. Then the table that it is made of counts, unless
    -- a trigger takes the rows, or the view takes none (8: INSERT).
    SELECT oid FROM power_logs
    UNION
    SELECT refobjid FROM pg_depend JOIN pg_rewrite ON objid = pg_rewrite.oid
    JOIN pg_class ON ev_class = pg_class.oid
    WHERE ev_class = (SELECT oid FROM power_logs)
        AND classid = 'pg_rewrite'::regclass AND refclassid = 'pg_class'::regclass
        AND NOT relhastriggers
        AND pg_relation_is_updatable(ev_class, false) & 8 <> 0
), unique_indexes AS (
    -- Their columns, without those that are only INCLUDEd.
    SELECT indimmediate, (
        SELECT array_agg(attname::text ORDER BY attname) FROM pg_attribute
        WHERE attrelid = indrelid
            AND attnum = ANY ((indkey::int2[])[0:indnkeyatts - 1])
    ) AS columns
    FROM pg_index
    WHERE indrelid IN (SELECT oid FROM tables) AND indisunique AND indisvalid
        AND indpred IS NULL AND indexprs IS NULL
)
SELECT
    (SELECT oid FROM power_logs) IS NOT NULL,
    coalesce((
        SELECT substring(prosrc FROM '[0-9]+')::int FROM pg_proc
        WHERE oid = to_regprocedure('power_logs_version()')
            -- A restored database may lack the rest.
            AND to_regclass('quarter_state') IS NOT NULL
    ), 0),
    EXISTS (
        SELECT FROM pg_attribute, power_logs
        WHERE attrelid = power_logs.oid AND attname = 'energy_returned_wh'
            AND NOT attisdropped
    ),
    -- A deferrable rule cannot be named in ON CONFLICT.
    coalesce((
        SELECT bool_and(indimmediate) FROM unique_indexes
        WHERE columns = '{channel,device_id,timestamp}'
    ), false)
"""


class Table(NamedTuple):
    """What the catalogue says of power_logs."""

    exists: bool
    # The number of the schema.sql that was applied last; 0: none.
    version: int
    has_returned_column: bool
    # Whether it has the rule of one row per channel and interval.
    has_unique_rule: bool


# In the words of glibc and macOS, and of musl. A network that is only down says
# "Temporary failure in name resolution".
UNKNOWN_HOST = re.compile(
    r"failed to resolve host '(.*)': .*(not known|does not resolve)"
)
# Waiting does not help: DATABASE_URL must change, or something on the server.
NEEDS_OWNER = re.compile(
    r"invalid \S+ value|FATAL: (password authentication failed|no pg_hba.conf entry"
    r"|(role|database) .* does not exist)"
)


def outage_line(exc: BaseException) -> str:
    """What the log says when the database is away."""
    reason = one_line(exc)
    unknown_host = UNKNOWN_HOST.match(reason)
    if unknown_host is not None:
        host = unknown_host[1]
        return f"DATABASE_URL: there is no host {host!r}; rows wait until there is"
    if NEEDS_OWNER.search(reason):
        return f"DATABASE_URL does not work, rows wait until it does: {reason}"
    return f"database unreachable, rows wait until it is back: {reason}"


def one_line(exc: BaseException) -> str:
    """What an error says, without the statement that PostgreSQL quotes below it."""
    message = str(exc)
    if isinstance(exc, psycopg.Error) and exc.diag.message_primary:
        message = exc.diag.message_primary
    if message == "":
        # A TimeoutError has no message.
        message = "no answer in time"
    return " ".join(message.split())


def utc(seconds: float) -> str:
    """A time as the log writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


async def within(timeout_s: float, work: Awaitable[Result]) -> Result:
    """The result of `work`. Raises TimeoutError.

    Work that is cut off is cancelled in the server, too, where it may wait for a
    lock."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.wait_for(asyncio.shield(task), timeout_s)
    finally:
        task.cancel()
        # On a frozen server psycopg takes 10 s to cancel. After a second it is left
        # alone.
        await asyncio.wait({task}, timeout=1)


async def connect(conninfo: str) -> psycopg.AsyncConnection[Any]:
    conn = await psycopg.AsyncConnection.connect(conninfo, **CONNECTION)
    conn.add_notice_handler(log_warning)
    await configure(conn)
    return conn


async def configure(conn: psycopg.AsyncConnection[Any]) -> None:
    """Prepare a new connection, also one of a pool."""
    await conn.execute(CONFIGURE)


def log_warning(notice: psycopg.errors.Diagnostic) -> None:
    if notice.severity_nonlocalized == "WARNING":
        log.warning("%s", notice.message_primary)


def make_query_pool(conninfo: str) -> AsyncConnectionPool:
    """A pool for everything but writing rows, so that rows never wait for it. The
    caller opens it. Two questions run at a time, and at most eight wait."""
    return AsyncConnectionPool(
        conninfo,
        kwargs=CONNECTION,
        open=False,
        configure=configure,
        check=AsyncConnectionPool.check_connection,
        min_size=0,
        max_size=2,
        max_waiting=8,
        timeout=3,
        max_idle=60,
    )


def refuses_row(exc: Exception) -> bool:
    """Whether an error is about a row's values. Any other is about the table, and so
    concerns every row: then they wait."""
    if isinstance(exc, psycopg.errors.CheckViolation):
        # Without a name it's a partition that is missing.
        return exc.diag.constraint_name is not None
    if isinstance(exc, psycopg.errors.UniqueViolation):
        # Otherwise the id is the problem: the sequence ran into existing rows. That's
        # the table's fault, so the row waits.
        return "device_id" in (exc.diag.message_detail or "")
    return isinstance(
        exc,
        psycopg.errors.ExclusionViolation
        | psycopg.errors.ForeignKeyViolation
        | psycopg.errors.RaiseException
        | psycopg.errors.UntranslatableCharacter,
    )


async def read_table(conn: psycopg.AsyncConnection[Any]) -> Table:
    row = await (await conn.execute(READ_TABLE)).fetchone()
    assert row is not None
    return Table(*row)


async def apply_schema(conn: psycopg.AsyncConnection[Any]) -> None:
    """Make the table, or bring an older one up to date. It takes long on a long
    table."""
    try:
        await conn.execute(SCHEMA.read_bytes())
    except psycopg.Error:
        if not conn.closed:
            await conn.rollback()
        raise


async def call(conn: psycopg.AsyncConnection[Any], function: str, *values: Any) -> None:
    """Call a function of schema.sql that returns nothing."""
    places = sql.SQL(", ").join([sql.Placeholder()] * len(values))
    name = sql.Identifier(function)
    statement = sql.SQL("SELECT {}({})").format(name, places)
    await conn.execute(statement, values)
