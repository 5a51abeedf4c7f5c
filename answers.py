"""Answers to the owner over HTTP: the page's files, and its questions under /data.

The entry points are `respond`, `has_token` and `device_token`. A question of /data is a
function of schema.sql. PostgreSQL checks the parameters, one by one, and finds the
rows; Python writes them as JSON or CSV, 1,000 at a time in a thread, so that the
devices are never kept waiting.

/data/cycles.csv?token=…&since=2026-11-01   question cycles, form csv, one parameter
/data/settings.json?token=…                 the settings that the page goes by
/data/refused.json?token=…                  devices that were refused since the start
"""

import asyncio
import codecs
import hashlib
import hmac
import http
import math
import re
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec
import psycopg
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types.datetime import IntervalLoader
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests
from websockets import Headers, Request, Response

from database import BEGIN_READING, DATABASE_ERRORS, one_line, within
from refusals import Refusal, Refusals
from settings import Settings, links
from version import VERSION

# Covers waiting for a connection, the query and the writing. It must be below the 10 s
# of open_timeout, after which websockets closes without an answer.
QUESTION_TIMEOUT = 8.0
MAX_ROWS = 100_000
ROWS_AT_A_TIME = 1_000
# A shorter answer gains nothing by compression.
MIN_COMPRESSED = 1_000

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}

# One client's question gets one core. With less memory for hashes the answer about many
# channels would be sorted on disk.
BEGIN_QUESTION = f"""
    {BEGIN_READING}
    SET LOCAL statement_timeout = '5s';
    SET LOCAL work_mem = '32MB';
    SET LOCAL hash_mem_multiplier = 4;
    SET LOCAL jit = off;
    SET LOCAL max_parallel_workers_per_gather = 0
"""

# Too many questions at a time, or one that takes too long.
BUSY = (PoolTimeout, TooManyRequests, psycopg.errors.QueryCanceled)


# What must be true of each parameter.
MOMENT = "%s::timestamptz BETWEEN '0001-01-01' AND '9999-12-31'"
SPAN = "%s::interval BETWEEN '0' AND '100 years'"
# date_bin raises an error if its step is not positive, or holds months.
STEP = "date_bin(%s::interval, now(), now()) IS NOT NULL"
TEXT = "%s::text IS NOT NULL"
CONDITIONS = {
    "since": MOMENT,
    "until": MOMENT,
    "gap": SPAN,
    "min_duration": SPAN,
    "step": STEP,
    "row_length": STEP,
    "min_power_w": "%s::float8 BETWEEN 0 AND 1e9",
    # It must be a zone for SET TimeZone, too, which returns its name.
    "zone": "now() AT TIME ZONE set_config('TimeZone', %s, true) IS NOT NULL",
    "device": TEXT,
    "channel": TEXT,
    "excel": "%s::text IN ('0', '1')",
}
# In a time, PostgreSQL passes over other characters, even a quote.
TIME_OR_NUMBER = re.compile(r"[-+:.,/ \w]*", re.ASCII)
FREE_TEXTS = ("zone", "device", "channel")
# +02:00 is west of Greenwich for PostgreSQL, +02 west or east, depending on the place.
# And CET, EET, MET and WET have summer time in one place, and none in another.
AMBIGUOUS_ZONE = re.compile(r"[-+:.\d\s]*|[CEMW]ET", re.IGNORECASE)
# What every question takes.
COMMON_PARAMETERS = ("zone", "device", "channel")


class Question(NamedTuple):
    """A function of schema.sql as it is called, and the parameters it takes."""

    call: str
    parameters: tuple[str, ...]


QUESTIONS = {
    "channels": Question("channels()", ()),
    "power": Question(
        """power_series(
            %(since)s::timestamptz, %(until)s::timestamptz, %(step)s::interval)""",
        ("since", "until", "step"),
    ),
    "cycles": Question(
        """power_cycles(
            %(since)s::timestamptz, %(until)s::timestamptz, %(gap)s::interval,
            %(min_duration)s::interval, coalesce(%(min_power_w)s::float8, 10),
            %(row_length)s::interval)""",
        ("since", "until", "gap", "min_duration", "min_power_w", "row_length"),
    ),
    "energy": Question(
        """energy_by_day(
            %(since)s::timestamptz, %(until)s::timestamptz, %(zone)s::text)""",
        ("since", "until", "zone"),
    ),
    "months": Question(
        """energy_by_month(
            %(since)s::timestamptz, %(until)s::timestamptz, %(zone)s::text)""",
        ("since", "until", "zone"),
    ),
    "coverage": Question(
        """coverage(
            %(since)s::timestamptz, %(until)s::timestamptz,
            %(row_length)s::interval, %(min_power_w)s::float8)""",
        ("since", "until", "row_length", "min_power_w"),
    ),
    "gaps": Question(
        """gaps(
            %(since)s::timestamptz, %(until)s::timestamptz,
            %(row_length)s::interval, %(min_power_w)s::float8)""",
        ("since", "until", "row_length", "min_power_w"),
    ),
}
NAMES = (*QUESTIONS, "settings", "refused")
# PostgreSQL plans with the values at hand, so a condition with a NULL costs nothing.
SELECT = sql.SQL("""
    SELECT * FROM {}
    WHERE (%(device)s::text IS NULL OR device_id = %(device)s::text)
      AND (%(channel)s::text IS NULL OR channel = %(channel)s::text)
    ORDER BY 1, 2, 3, 4
    LIMIT %(max_rows)s + 1
""")

Connection = psycopg.AsyncConnection[tuple[Any, ...]]


class BadParameter(Exception):
    """A parameter of the request makes no sense; the text names it."""


class LargeResponse(Response):
    """A response whose body, a bytearray, is sent as it is.

    As bytes, websockets and asyncio would copy it three times: that holds the event
    loop for 36 ms with 14 MB, and this for 8 ms.
    """

    def serialize(self) -> bytes | memoryview:  # type: ignore[override]
        if isinstance(self.body, bytes):
            return super().serialize()
        head = Response(self.status_code, self.reason_phrase, self.headers)
        self.body[:0] = head.serialize()
        return memoryview(self.body)


class PageFile(NamedTuple):
    content_type: str
    etag: str
    body: bytes
    compressed: bytes


def compress(body: bytes | bytearray) -> bytes:
    """Return the body as gzip."""
    return zlib.compress(body, level=5, wbits=31)


def read_page(folder: Path) -> dict[str, PageFile]:
    """Read the page's files, by name."""
    files = {}
    for path in folder.iterdir():
        content_type = CONTENT_TYPES.get(path.suffix)
        if content_type is not None:
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            files[path.name] = PageFile(content_type, etag, body, compress(body))
    return files


PAGE = read_page(Path(__file__).with_name("page"))


async def respond(
    request: Request,
    settings: Settings,
    page_token: str,
    pool: AsyncConnectionPool | None,
    refusals: Refusals,
) -> Response:
    """Answer a GET or HEAD of /dashboard, /page/… or /data/….

    The pool is an open one, for reading; None while the database is away. The body is
    there for a HEAD, too.
    """
    path, _, _ = request.path.partition("?")
    if path == "/dashboard":
        response = page_response(request, "index.html")
    elif path.startswith("/page/"):
        response = page_response(request, path.removeprefix("/page/"))
    else:
        response = await data_response(request, settings, page_token, pool, refusals)
        await compress_large(request, response)
    if response.status_code != 304:
        response.headers["Content-Length"] = str(len(response.body))
    return response


async def compress_large(request: Request, response: Response) -> None:
    if len(response.body) > MIN_COMPRESSED and accepts_gzip(request):
        response.body = await asyncio.to_thread(compress, response.body)
        response.headers["Content-Encoding"] = "gzip"


def page_response(request: Request, name: str) -> Response:
    """Answer with a file of the page, or 304 if the browser has it."""
    file = PAGE.get(name)
    if file is None:
        return text_response(404, "Not found.")
    headers = {
        "Cache-Control": "no-cache",
        "ETag": file.etag,
        "Vary": "Accept-Encoding",
    }
    # A proxy that compresses turns "…" into W/"…", hence no comparison of the whole.
    if file.etag in header(request, "If-None-Match"):
        return make_response(304, b"", file.content_type, headers)
    if accepts_gzip(request):
        headers["Content-Encoding"] = "gzip"
        return make_response(200, file.compressed, file.content_type, headers)
    return make_response(200, file.body, file.content_type, headers)


async def data_response(
    request: Request,
    settings: Settings,
    page_token: str,
    pool: AsyncConnectionPool | None,
    refusals: Refusals,
) -> Response:
    """Answer a request of /data with rows, or with a line that says why not."""
    path, _, query = request.path.partition("?")
    only_device = device_of_link(query, page_token)
    if only_device is None and not has_token(query, page_token):
        return text_response(
            401, "The link lacks the right ?token=, which --check shows."
        )
    name, _, form = path.removeprefix("/data/").partition(".")
    if name not in NAMES or form not in ("json", "csv"):
        names = ", ".join(NAMES)
        return text_response(
            404, f"There are /data/NAME.json and .csv; NAME is {names}."
        )
    refused = refusals.newest_first()
    try:
        given = read_parameters(query, name, form)
        if only_device is not None:
            # It must not show the addresses of others.
            refused = []
            given = limit_to_device(only_device, given, name)
        body = await answer_body(name, form, given, settings, refused, pool)
    except (*BUSY, TimeoutError):
        return text_response(
            503,
            "Too much at a time: ask for less, or for one device, or in some seconds.",
        )
    except (BadParameter, psycopg.DataError) as exc:
        return text_response(400, one_line(exc))
    except DATABASE_ERRORS as exc:
        return text_response(503, f"No answer: {one_line(exc)}")
    return make_response(200, body, CONTENT_TYPES[f".{form}"])


async def answer_body(
    name: str,
    form: str,
    given: dict[str, str],
    settings: Settings,
    refused: list[Refusal],
    pool: AsyncConnectionPool | None,
) -> bytes | bytearray:
    """Return what is asked for; raises BadParameter, DATABASE_ERRORS."""
    if name == "settings":
        return settings_body(settings, form, given)
    if name == "refused":
        return refused_body(refused, form, given)
    if pool is None:
        raise OSError("the database is away")
    question = ask(pool, settings, QUESTIONS[name], form, given)
    return await within(QUESTION_TIMEOUT, question)


def text_response(status: int, text: str) -> Response:
    """Answer with one line of plain text."""
    return make_response(status, f"{text}\n".encode(), CONTENT_TYPES[".txt"])


def make_response(
    status: int,
    body: bytes | bytearray,
    content_type: str,
    headers: dict[str, str] | None = None,
) -> Response:
    """Make a response that nobody stores, unless headers say otherwise."""
    together = {
        "Date": formatdate(usegmt=True),
        "Connection": "close",
        "Content-Type": content_type,
        "Cache-Control": "no-store",
    }
    together.update(SECURITY_HEADERS)
    together.update(headers or {})
    reason = http.HTTPStatus(status).phrase
    return LargeResponse(status, reason, Headers(together), body)


def header(request: Request, name: str) -> str:
    """Return a header's value, "" if it is absent; a repeated one is joined."""
    return ", ".join(request.headers.get_all(name))


def accepts_gzip(request: Request) -> bool:
    return "gzip" in header(request, "Accept-Encoding")


def has_token(query: str, token: str) -> bool:
    """Whether a URL's query carries the token, compared in constant time.

    In a URL, a blank may be + or %20, and a + may stand for itself.
    """
    if not token:
        return False
    given = token_in(query).replace("+", " ")
    return hmac.compare_digest(given.encode(), token.replace("+", " ").encode())


def token_in(query: str) -> str:
    """Return the token that a URL's query carries, "" if there is none."""
    for name, text in parse_qsl(query):
        if name == "token":
            return text
    return ""


def device_token(page_token: str, device: str) -> str:
    """Return the token that opens the data of one device: its id, ~, and a hash made
    with the page's token."""
    digest = hmac.new(page_token.encode(), device.encode(), "sha256").hexdigest()
    return f"{device}~{digest[:32]}"


def device_of_link(query: str, page_token: str) -> str | None:
    """Return the device that the token of a query opens; None if it opens none."""
    if page_token == "":
        # The start is not complete yet. Anybody could make the hash of nothing.
        return None
    device, _, _ = token_in(query).rpartition("~")
    if device != "" and has_token(query, device_token(page_token, device)):
        return device
    return None


def read_parameters(query: str, name: str, form: str) -> dict[str, str]:
    """Return the parameters of a question; raises BadParameter for one that it
    lacks."""
    allowed = {"token"}
    if form == "csv":
        allowed.add("excel")
    if name in QUESTIONS:
        allowed.update(QUESTIONS[name].parameters, COMMON_PARAMETERS)
    given = {}
    for key, text in parse_qsl(query):
        if key not in allowed:
            raise BadParameter(f"{key} is no parameter of {name}.{form}")
        # PostgreSQL takes no NUL.
        given[key] = text.replace("\0", "?")
    del given["token"]
    return given


def limit_to_device(device: str, given: dict[str, str], name: str) -> dict[str, str]:
    """Return the parameters of a question about one device alone; raises BadParameter
    if they name another."""
    if name not in QUESTIONS:
        # Settings and refusals hold no rows of devices.
        return given
    if "device" in given and given["device"] != device:
        raise BadParameter(f"device makes no sense: this link opens {device} alone")
    return given | {"device": device}


def settings_body(
    settings: Settings, form: str, given: dict[str, str]
) -> bytes | bytearray:
    """Write what the page needs of the settings."""
    values = {
        "default_days_history": settings.default_days_history,
        "gap_threshold_minutes": settings.gap_threshold_minutes,
        "min_cycle_duration_minutes": settings.min_cycle_duration_minutes,
        "min_power_w": settings.min_power_w,
        "throttle_interval_seconds": settings.throttle_interval_seconds,
        "price_per_kwh": settings.price_per_kwh,
        "device_url": links(settings).device,
        "version": VERSION,
    }
    if form == "json":
        return msgspec.json.encode(values)
    writer = CsvWriter(list(values), given)
    writer.add([tuple(values.values())])
    return writer.finish()


def refused_body(refused: list[Refusal], form: str, given: dict[str, str]) -> bytearray:
    """Write the devices that were refused."""
    names = list(Refusal._fields)
    writer = JsonWriter(names) if form == "json" else CsvWriter(names, given)
    rows: list[tuple[Any, ...]] = []
    for refusal in refused:
        at = datetime.fromtimestamp(refusal.refused_at, UTC)
        # As the times of the questions: ISO 8601 in JSON, PostgreSQL's own text in CSV.
        time_text = at.isoformat(timespec="seconds")
        if form == "csv":
            time_text = Time(f"{at:%Y-%m-%d %H:%M:%S}+00")
        rows.append((time_text, refusal.address, refusal.reason, refusal.path))
    writer.add(rows)
    return writer.finish()


# ---- The questions to the database ----


async def ask(
    pool: AsyncConnectionPool,
    settings: Settings,
    question: Question,
    form: str,
    given: dict[str, str],
) -> bytearray:
    """Return a question's answer; raises BadParameter, DATABASE_ERRORS."""
    async with pool.connection() as conn, conn.transaction():
        await conn.execute(BEGIN_QUESTION)
        for name, text in given.items():
            if not await makes_sense(conn, name, text):
                raise BadParameter(f"{name} makes no sense: {text[:80]!r}")
        values = values_in_force(settings) | given
        values |= await times_with_offset(conn, given, values["zone"])
        query = SELECT.format(sql.SQL(question.call))
        if given.get("excel") == "1":
            query = await with_local_times(conn, query, values)
        cursor = make_cursor(conn, form)
        await cursor.execute(query, values)
        if cursor.rowcount > MAX_ROWS:
            raise psycopg.errors.ProgramLimitExceeded(
                "The answer is too large: ask for a shorter time, for one device,"
                " or for longer steps."
            )
        names = [column.name for column in cursor.description or ()]
        writer = JsonWriter(names) if form == "json" else CsvWriter(names, given)
        while rows := await cursor.fetchmany(ROWS_AT_A_TIME):
            await asyncio.to_thread(writer.add, rows)
    return writer.finish()


async def makes_sense(conn: Connection, name: str, text: str) -> bool:
    """Have PostgreSQL read a parameter. After a False the transaction is lost."""
    if name not in FREE_TEXTS and not TIME_OR_NUMBER.fullmatch(text):
        return False
    if name == "zone" and AMBIGUOUS_ZONE.fullmatch(text):
        return False
    try:
        cursor = await conn.execute(f"SELECT {CONDITIONS[name]}", [text])
    except (psycopg.DataError, psycopg.NotSupportedError):
        return False
    return await cursor.fetchone() == (True,)


async def times_with_offset(
    conn: Connection, given: dict[str, str], zone: str
) -> dict[str, str]:
    """Return since and until with the offset that they have in the zone, unless they
    say their own."""
    times: dict[str, str] = {}
    await conn.execute("SELECT set_config('TimeZone', %s, true)", [zone])
    for name in ("since", "until"):
        if name in given:
            cursor = await conn.execute("SELECT %s::timestamptz::text", [given[name]])
            (times[name],) = await cursor.fetchone() or ("",)
    await conn.execute("SET LOCAL TimeZone = 'UTC'")
    return times


def values_in_force(settings: Settings) -> dict[str, Any]:
    """Return the values of all parameters for a request that gives none.

    A steady load has a row a minute, however short the throttle's interval is.
    """
    now = datetime.now(UTC)
    return {
        "since": now - timedelta(days=settings.default_days_history),
        "until": now,
        "step": None,
        "gap": timedelta(minutes=settings.gap_threshold_minutes),
        "min_duration": timedelta(minutes=settings.min_cycle_duration_minutes),
        "row_length": timedelta(seconds=max(60, settings.throttle_interval_seconds)),
        "min_power_w": settings.min_power_w,
        "zone": "UTC",
        "device": None,
        "channel": None,
        "max_rows": MAX_ROWS,
    }


async def with_local_times(
    conn: Connection, query: sql.Composed, values: dict[str, Any]
) -> sql.Composed:
    """Return the same query with its times as a clock of the zone shows them."""
    no_rows = sql.SQL("SELECT * FROM ({}) AS answer LIMIT 0").format(query)
    cursor = await conn.execute(no_rows, values)
    columns = []
    for column in cursor.description or ():
        text = "{0}"
        if column.type_code == conn.adapters.types["timestamptz"].oid:
            text = "date_trunc('second', {0} AT TIME ZONE %(zone)s::text) AS {0}"
        columns.append(sql.SQL(text).format(sql.Identifier(column.name)))
    return sql.SQL("SELECT {} FROM ({}) AS answer").format(
        sql.SQL(", ").join(columns), query
    )


# ---- Rows as text ----

# A spreadsheet takes a text that begins so for a formula.
FORMULA = re.compile(r"[-=+@\x00-\x1f\x7f-\x9f]")


class Time(str):
    """A time or day as PostgreSQL writes it, which CSV shows without quotes."""

    # Without a dictionary in each, the garbage collector passes over them.
    __slots__ = ()


class JsonTime(Loader):
    """2026-11-25T01:57:00+00:00. It may also be infinite, or beyond Python's years."""

    def load(self, data: Buffer) -> str:
        text = bytes(data).decode().replace(" ", "T", 1)
        return text.replace("+00", "+00:00", 1)


class CsvTime(Loader):
    def load(self, data: Buffer) -> Time:
        return Time(bytes(data).decode())


class Seconds(IntervalLoader):
    def load(self, data: Buffer) -> float:  # type: ignore[override]
        return super().load(data).total_seconds()


def make_cursor(conn: Connection, form: str) -> psycopg.AsyncCursor[tuple[Any, ...]]:
    """Return a cursor whose rows can be written."""
    cursor = conn.cursor()
    time_loader = JsonTime if form == "json" else CsvTime
    for type_name in ("date", "timestamp", "timestamptz"):
        cursor.adapters.register_loader(type_name, time_loader)
    cursor.adapters.register_loader("interval", Seconds)
    return cursor


class JsonWriter:
    """A list of objects; a number that JSON lacks, such as NaN, is null."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.body = bytearray(b"[")

    def add(self, rows: list[tuple[Any, ...]]) -> None:
        """Append rows; it is called in a thread."""
        objects = [dict(zip(self.names, row, strict=True)) for row in rows]
        if len(self.body) > 1:
            self.body += b","
        self.body += msgspec.json.encode(objects, enc_hook=str)[1:-1]

    def finish(self) -> bytearray:
        self.body += b"]"
        return self.body


class CsvWriter:
    """Lines that a spreadsheet opens: texts in quotes, numbers of three decimals.

    With excel=1 they are as Excel expects them where the decimal mark is a comma.
    Python's csv cannot do this: before 3.12 it quotes times along with texts.
    """

    def __init__(self, names: list[str], given: dict[str, str]) -> None:
        self.body = bytearray()
        self.separator = ","
        self.cells = CELLS
        if given.get("excel") == "1":
            self.body += codecs.BOM_UTF8
            self.separator = ";"
            self.cells = EXCEL_CELLS
        self.body += self.line(names)

    def add(self, rows: list[tuple[Any, ...]]) -> None:
        """Append rows; it is called in a thread."""
        for row in rows:
            cells = [self.cells.get(type(value), text_cell)(value) for value in row]
            self.body += self.line(cells)

    def line(self, cells: list[str]) -> bytes:
        return (self.separator.join(cells) + "\r\n").encode()

    def finish(self) -> bytearray:
        return self.body


def text_cell(value: object) -> str:
    text = str(value).replace('"', '""')
    if FORMULA.match(text):
        text = f"'{text}"
    return f'"{text}"'


def number_cell(value: float) -> str:
    # An infinite one is no number for a spreadsheet, as for JSON.
    if not math.isfinite(value):
        return ""
    # z: a small negative number is 0, not -0.
    return f"{value:z.3f}".rstrip("0").rstrip(".")


def excel_number_cell(value: float) -> str:
    return number_cell(value).replace(".", ",")


def boolean_cell(value: bool) -> str:
    return str(value).lower()


def empty_cell(_: None) -> str:
    return ""


# Any other type is text.
CELLS: dict[type, Callable[[Any], str]] = {
    float: number_cell,
    int: str,
    bool: boolean_cell,
    type(None): empty_cell,
    Time: str,
}
EXCEL_CELLS = CELLS | {float: excel_number_cell}
