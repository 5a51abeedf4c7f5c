"""What an owner asks over HTTP: the page's door, data as JSON and CSV, metrics, silence, names, and old rows."""

import asyncio
import csv
import gzip
import io
import json
import os
import re
import stat
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import shelly_collector as sc
from answers import QUESTIONS
from support import (
    DEVICE,
    EM,
    EMDATA,
    METER,
    ORIGINAL_TABLE,
    ROOT,
    device,
    execute,
    feed,
    minute_frame,
    notify,
    query,
    read_rows,
    run_script,
    taken,
    wait_for,
    wait_for_rows,
)
from version import VERSION

HOSTILE = "<img src=x onerror=alert(1)>"
ROWS = """INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)
    SELECT '2026-11-20 10:00+00'::timestamptz + m * INTERVAL '1 minute', d, 'switch:0',
           CASE WHEN m BETWEEN 5 AND 19 THEN 1200.5 ELSE 0 END, 230, 5.25, greatest(0, least(m - 5, 15)) * 20.125
    FROM generate_series(0, 29) m, unnest('{=1+1,b}'::text[]) d"""
WINDOW = {"since": "2026-11-20T09:00Z", "until": "2026-11-20 12:00+00"}


def fetch(running, path, headers=None, **parameters):
    """Status, headers and body, with the right token unless another is given."""
    parameters = {"token": "look"} | parameters
    url = f"http://127.0.0.1:{running.port}{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers or {}), timeout=15
        ) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.headers, exc.read()


@pytest.fixture
async def running(collectors, database):
    started = await collectors(
        DATABASE_URL=database, DASHBOARD_TOKEN="look", COLLECTOR_TOKEN="send"
    ).ready()
    execute(database, ROWS)
    return started


async def test_only_the_right_token_opens_the_data(running):
    for path in (
        "/data/channels.json",
        "/data/power.csv",
        "/data/settings.json",
        "/data/settings.csv",
        "/data/x",
        "/data",
    ):
        for token in ("", "send", "Look", "look%00", "looklook"):
            status, headers, body = fetch(running, path, token=token)
            assert (status, headers["Referrer-Policy"]) == (
                401,
                "no-referrer",
            ) and body.count(b"\n") == 1
            assert headers["Cache-Control"] == "no-store" and b"look at" not in body
    assert (
        fetch(running, "/data/channels.json")[0]
        == fetch(running, "/data/settings.json")[0]
        == 200
    )
    for path in ("/data/x.json", "/data/power.xml", "/data/power", "/data/"):
        assert fetch(running, path)[0] == 404
    assert "look" not in running.log.replace("look at:", "")


async def test_the_page_needs_no_token_and_may_run_its_own_files_only(running):
    for token in ({}, {"token": "wrong"}):
        status, headers, body = fetch(running, "/dashboard", **({"token": ""} | token))
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert body == (ROOT / "page" / "index.html").read_bytes()
    assert (
        headers["Referrer-Policy"] == "no-referrer"
        and headers["X-Content-Type-Options"] == "nosniff"
    )
    policy = dict(
        part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; ")
    )
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'", "img-src": "data:",
        "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip


async def test_each_file_of_the_page_is_served_and_nothing_else(running):
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    files = [path for path in (ROOT / "page").iterdir() if path.suffix in types]
    assert files
    for path in files:
        status, headers, body = fetch(running, f"/page/{path.name}", token="")
        assert (status, headers["Content-Type"]) == (
            200,
            f"{types[path.suffix]}; charset=utf-8",
        )
        assert body == path.read_bytes() and headers["Cache-Control"] == "no-cache"
        assert not re.search(rb"(src|href)=.?https?:|@import", body)
    for path in ("/page", "/page/", "/page/x.js", "/page/../schema.sql", "/page/%2e%2e/schema.sql", "/page//index.html",
                 "/page/./index.html", "/page/INDEX.HTML", "/pages", "/page/index.html/"):  # fmt: skip
        assert running.get(path)[0] == 404


async def test_a_browser_asks_only_for_files_that_changed(running):
    status, headers, body = fetch(running, "/page/index.html", token="")
    etag = headers["ETag"]
    assert status == 200 and re.fullmatch('"[0-9a-f]{16,}"', etag)
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        status, headers, body = fetch(
            running, "/page/index.html", {"If-None-Match": known}, token=""
        )
        assert (status, body, headers["ETag"], headers["Cache-Control"]) == (
            304,
            b"",
            etag,
            "no-cache",
        )
    assert (
        fetch(running, "/page/index.html", {"If-None-Match": '"other"'}, token="")[0]
        == 200
    )
    assert fetch(running, "/dashboard", {"If-None-Match": etag}, token="")[0] == 304


async def test_files_of_the_page_are_packed_where_that_is_understood(running):
    plain, packed = (
        fetch(running, "/dashboard", {"Accept-Encoding": how}, token="")
        for how in ("identity", "br, gzip")
    )
    assert (
        packed[1]["Content-Encoding"] == "gzip" and plain[1]["Content-Encoding"] is None
    )
    assert (
        gzip.decompress(packed[2]) == plain[2]
        and packed[1]["Vary"] == plain[1]["Vary"] == "Accept-Encoding"
    )
    assert running.get("/dashboard", "HEAD") == (200, "")


async def test_the_settings_in_force_are_data(collectors, database):
    env = {
        "PRICE_PER_KWH": "0,2516 EUR",
        "MIN_POWER_W": "25",
        "DEFAULT_DAYS_HISTORY": "90",
        "PUBLIC_URL": "https://x.example/a",
    }
    running = collectors(
        DATABASE_URL=database,
        DASHBOARD_TOKEN="look",
        COLLECTOR_TOKEN="</script>",
        **env,
    )
    await running.ready()
    status, headers, body = fetch(running, "/data/settings.json")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (
        200,
        "application/json",
        "no-store",
    )
    expected = {
        "default_days_history": 90, "gap_threshold_minutes": 3, "min_cycle_duration_minutes": 2, "min_power_w": 25,
        "throttle_interval_seconds": 86400, "price_per_kwh": "0,2516 EUR", "device_url": "wss://x.example/a/ws?token=…",
        "version": VERSION,
    }  # fmt: skip
    assert json.loads(body) == expected
    status, headers, body = fetch(running, "/data/settings.csv")
    assert (status, headers["Content-Type"]) == (200, "text/csv; charset=utf-8")
    assert (
        body.decode()
        == ",".join(expected)
        + '\r\n90,3,2,25,86400,"0,2516 EUR","wss://x.example/a/ws?token=…","'
        + f'{VERSION}"\r\n'
    )
    body = fetch(running, "/data/settings.csv", excel="1")[2]
    assert (
        body.startswith(b"\xef\xbb\xbfdefault_days_history;gap")
        and body.count(b"\r\n") == 2
    )
    assert fetch(running, "/data/settings.json", since="now")[::2] == (
        400,
        b"since is no parameter of settings.json\n",
    )


async def test_the_settings_are_told_while_the_database_is_away(collectors):
    running = collectors(
        DATABASE_URL="postgresql://nobody@127.0.0.1:1/x", DASHBOARD_TOKEN="look"
    )
    await running.ready("unreachable")
    assert json.loads(fetch(running, "/data/settings.json")[2])["price_per_kwh"] is None
    assert fetch(running, "/data/channels.json")[::2] == (
        503,
        b"No answer: the database is away\n",
    )


async def test_a_token_is_made_once_and_kept_for_oneself_and_shown_as_a_link(
    collectors, database, tmp_path
):
    running = await collectors(tmp_path, DATABASE_URL=database).ready()
    (token,) = re.findall(
        rf"look at: http://127.0.0.1:{running.port}/dashboard\?token=([0-9a-f]{{32}})\n",
        running.log,
    )
    kept = tmp_path / "data" / "dashboard-token"
    assert (
        stat.S_IMODE(kept.stat().st_mode) == 0o600 and kept.read_text() == f"{token}\n"
    )
    checked = subprocess.run([sys.executable, ROOT / "shelly_collector.py", "--check"], cwd=tmp_path, env=running.env, capture_output=True, text=True)  # fmt: skip
    assert (
        f"look at: http://127.0.0.1:{running.port}/dashboard?token={token}\n"
        in checked.stdout
    )
    opened = (
        fetch(running, "/data/settings.json", token=token)[0],
        fetch(running, "/data/settings.json", token="")[0],
    )
    assert opened == (200, 401)
    await running.stop()
    kept.write_text(
        ""
    )  # cut off by a full disk: an empty secret must not open the door
    await (await running.again()).ready()
    assert fetch(running, "/data/settings.json", token="")[0] == 401
    assert (
        re.findall("token=([0-9a-f]{32})\n", running.log)[1]
        == kept.read_text().strip()
        != token
    )


async def test_a_token_may_hold_a_blank_or_a_plus_however_the_url_writes_it(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, DASHBOARD_TOKEN="my pass+word"
    ).ready()
    for written, status in (
        ("my%20pass%2Bword", 200),
        ("my+pass%2Bword", 200),
        ("my%20pass+word", 200),
        ("mypassword", 401),
    ):
        assert running.get(f"/data/channels.json?token={written}")[0] == status


async def test_check_makes_no_token_and_shows_a_set_one_as_a_link_alone(
    tmp_path, database
):
    def check(**env):
        base = {"PATH": os.environ["PATH"], "DATABASE_URL": database, "PORT": "1"}
        command = [sys.executable, ROOT / "shelly_collector.py", "--check"]
        return subprocess.run(
            command, cwd=tmp_path, env=base | env, capture_output=True, text=True
        ).stdout

    assert "look at: " in check() and not (tmp_path / "data").exists()
    shown = check(DASHBOARD_TOKEN="a b&c", PUBLIC_URL="https://x.example")
    assert "look at: https://x.example/dashboard?token=a%20b%26c\n" in shown
    assert re.search(r"DASHBOARD_TOKEN +\*\*\*\n", shown) and "a b&c" not in shown


@pytest.mark.parametrize("name", ["channels", "power", "cycles", "energy", "coverage"])
async def test_json_holds_the_rows_of_the_function_under_its_own_names(
    running, database, name
):
    function = {
        "power": "power_series",
        "cycles": "power_cycles",
        "energy": "energy_by_day",
    }.get(name, name)
    parameters = {} if name == "channels" else WINDOW
    called = ", ".join(f"{key} => %({key})s" for key in parameters)
    with psycopg.connect(database) as conn:
        conn.execute("SET TimeZone = 'UTC'")
        found = conn.execute(
            f"SELECT to_jsonb(r) FROM {function}({called}) r ORDER BY device_id",
            parameters,
        ).fetchall()
    expected = [
        row[0] | ({"longest_gap": 0} if name == "coverage" else {}) for row in found
    ]
    if name in (
        "cycles",
        "coverage",
    ):  # rows of a day, as the setting in force says, are taken back to a minute's
        parameters = parameters | {"row_length": "60"}
    status, headers, body = fetch(running, f"/data/{name}.json", **parameters)
    assert (status, headers["Content-Type"], json.loads(body)) == (
        200,
        "application/json",
        expected,
    ) and expected
    only = json.loads(
        fetch(
            running, f"/data/{name}.json", **parameters, device="b", channel="switch:0"
        )[2]
    )
    assert only == [row for row in expected if row["device_id"] == "b"]
    assert (
        json.loads(fetch(running, f"/data/{name}.json", **parameters, device="c")[2])
        == []
    )


async def test_csv_opens_in_a_spreadsheet_and_holds_no_formula(running):
    status, headers, body = fetch(
        running, "/data/cycles.csv", row_length="60", **WINDOW
    )
    assert (status, headers["Content-Type"]) == (
        200,
        "text/csv; charset=utf-8",
    ) and body.count(b"\r\n") == 3
    table = list(csv.reader(io.StringIO(body.decode(), newline="")))
    assert (
        table[0]
        == "device_id channel started_at ended_at ongoing complete energy_wh mean_w max_w mean_a median_v".split()
    )
    assert table[1][0] == "'=1+1" and table[2] == [
        "b", "switch:0", "2026-11-20 10:05:00+00", "2026-11-20 10:20:00+00", "false", "true", "301.875", "1200.5", "1200.5", "5.25", "230"
    ]  # fmt: skip
    body = fetch(
        running,
        "/data/cycles.csv",
        row_length="60",
        excel="1",
        zone="Europe/Paris",
        **WINDOW,
    )[2]
    assert body.startswith(b"\xef\xbb\xbfdevice_id;channel;")
    assert (
        body.decode()
        .splitlines()[2]
        .startswith(
            '"b";"switch:0";2026-11-20 11:05:00;2026-11-20 11:20:00;false;true;301,875;1200,5;'
        )
    )
    assert fetch(running, "/data/coverage.csv", row_length="60", **WINDOW)[2].endswith(
        b",30,0,0,0,0\r\n"
    )
    assert (
        fetch(running, "/data/energy.csv", device="none")[2]
        == b"device_id,channel,day,energy_wh,rows,energy_returned_wh\r\n"
    )


async def test_months_and_gaps_are_questions_like_the_others(running, database):
    execute(
        database,
        "DELETE FROM power_logs WHERE device_id = 'b' AND timestamp BETWEEN"
        " '2026-11-20 10:10+00' AND '2026-11-20 10:14+00'",
    )
    months = json.loads(fetch(running, "/data/months.json", device="b", **WINDOW)[2])
    assert months == [
        {
            "device_id": "b",
            "channel": "switch:0",
            "month": "2026-11-01",
            "energy_wh": 301.875,
            "rows": 25,
            "energy_returned_wh": None,
        }
    ]
    gaps = fetch(running, "/data/gaps.csv", row_length="60", **WINDOW)[2]
    assert gaps.decode().splitlines() == [
        "device_id,channel,kind,began_at,ended_at,missing",
        '"b","switch:0","no data",2026-11-20 10:10:00+00,2026-11-20 10:15:00+00,5',
    ]


async def test_the_health_page_says_how_far_quarters_are_made(collectors, database):
    await sc.database.apply_schema(conn := await sc.database.connect(database))
    await conn.close()
    execute(
        database,
        "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v,"
        " current_a, energy_total_wh) SELECT now() - n * interval '1 minute', d::text,"
        " 'switch:0', 60, 230, 1, 4000 - n FROM generate_series(1, 30) d,"
        " generate_series(1, 4000) n",
    )
    running = await collectors(DATABASE_URL=database).ready()
    # If autovacuum has the table, the first step is put off by a minute.
    await wait_for(lambda: "quarters: made back to 20" in running.get()[1], 90)
    await wait_for(lambda: "quarters: all made" in running.get()[1], 30)
    texts = [line.split(" ", 2)[2] for line in running.log.splitlines()]
    steps = ("making quarters", "quarters of an hour:")
    assert [text for text in texts if text.startswith(steps)] == [
        "making quarters of an hour, so that questions about long times are answered quickly",
        "quarters of an hour: all made",
    ]
    # A late row is made up for by itself.
    execute(
        database,
        "UPDATE power_logs SET apower_w = 1 WHERE timestamp < now() - interval '2 days'",
    )
    assert query(database, "SELECT count(*) > 0 FROM quarter_marks") == [(True,)]
    await wait_for(
        lambda: query(database, "SELECT count(*) FROM quarter_marks") == [(0,)]
    )
    assert query(
        database,
        "SELECT DISTINCT max_w FROM power_quarters WHERE quarter < now() - interval '3 hours 2 days'",
    ) == [(1.0,)]


async def test_why_there_are_no_quarters_is_logged_and_the_page_works(
    collectors, database
):
    running = await collectors(DATABASE_URL=database).ready()
    await running.stop()
    execute(
        database,
        "ALTER TABLE power_logs RENAME TO rows_of_power",
        "CREATE VIEW power_logs AS SELECT * FROM rows_of_power",
    )
    await running.again()
    await running.ready()
    await wait_for(lambda: "quarters: none\n" in running.get()[1])
    assert "so questions about long times are slow; none: " in running.log
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for(lambda: "rows written: 1" in running.get()[1])
    assert query(database, "SELECT rows FROM coverage()") == [(1,)]


@pytest.mark.parametrize("name, parameter, value", [
    ("cycles", "since", "yesterday'"), ("cycles", "since", "x"), ("power", "until", "'; DROP TABLE power_logs; --"),
    ("cycles", "since", "infinity"), ("cycles", "gap", "-1"), ("cycles", "gap", "a while"), ("cycles", "min_duration", "1e99"),
    ("cycles", "min_power_w", "NaN"), ("cycles", "min_power_w", "10 W"), ("coverage", "row_length", "0"),
    ("power", "step", "0"), ("power", "step", "-60"), ("power", "step", "1 month"), ("power", "step", "60)"),
    ("energy", "zone", "Mars/Olympus"), ("energy", "zone", "Europe/Paris'"), ("energy", "zone", "Etc/Unknown"),
    # PostgreSQL reads each of these in one place alone, or in two ways.
    ("energy", "zone", "CEST"), ("energy", "zone", "+02"), ("energy", "zone", "-7.5"), ("energy", "zone", "+02:00"),
    ("energy", "zone", "CET"), ("energy", "zone", "wet"),
    ("power", "gap", "60"), ("channels", "since", "now"),
    ("power", "limit", "1"), ("power", "excel", "1"), ("power", "Since", "now"), ("power", "since", "2026-11-20\0"),
])  # fmt: skip
async def test_a_parameter_that_makes_no_sense_is_named(
    running, name, parameter, value
):
    status, headers, body = fetch(running, f"/data/{name}.json", **{parameter: value})
    assert (status, headers["Content-Type"], body.count(b"\n")) == (
        400,
        "text/plain; charset=utf-8",
        1,
    )
    assert re.match(
        rf"{parameter} (makes no sense|is no parameter of {name}.json)", body.decode()
    ), body


HALF_HOURS = """INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)
    SELECT t, 'b', 'switch:0', 1, 230, 1, 1 FROM generate_series(({})::timestamptz, {}, '30 minutes') t"""


async def test_a_time_without_an_offset_is_one_of_the_zone(collectors, database):
    running = await collectors(DATABASE_URL=database, DASHBOARD_TOKEN="look").ready()
    execute(database, HALF_HOURS.format("'2026-03-28Z'", "'2026-11-03Z'"))
    for since, zone, first_row in (
        ("2026-11-01", "Europe/Paris", "2026-10-31T23:00"),
        ("2026-07-01", "Europe/Paris", "2026-06-30T22:00"),
        ("2026-07-01 10:00", "America/New_York", "2026-07-01T14:00"),
        ("2026-11-01T00:00", "Asia/Kolkata", "2026-10-31T18:30"),
        ("2026-11-01", "UTC", "2026-11-01T00:00"),
        # This hour is skipped in spring.
        ("2026-03-29 02:30", "Europe/Paris", "2026-03-29T01:30"),
        ("2026-11-01T00:00Z", "Europe/Paris", "2026-11-01T00:00"),
        ("2026-11-01 00:00+05:30", "Europe/Paris", "2026-10-31T18:30"),
        ("2026-11-01 00:00 America/New_York", "Europe/Paris", "2026-11-01T04:00"),
        ("0001-01-01", "Europe/Paris", "2026-03-28T00:00"),
    ):
        asked = {"since": since, "zone": zone}
        (found,) = json.loads(fetch(running, "/data/coverage.json", **asked)[2])
        assert found["first_row"] == f"{first_row}:00+00:00", (since, zone)
        asked = {"until": since, "zone": zone, "since": "2026-01-01", "step": "1800"}
        buckets = json.loads(fetch(running, "/data/power.json", **asked)[2])
        assert all(row["bucket"] < first_row for row in buckets), (since, zone)
        if not since.startswith("0001"):
            last = datetime.fromisoformat(buckets[-1]["bucket"])
            assert f"{last + timedelta(minutes=30):%Y-%m-%dT%H:%M}" == first_row
    (found,) = json.loads(fetch(running, "/data/coverage.json", since="2026-11-01")[2])
    assert found["first_row"] == "2026-11-01T00:00:00+00:00"


async def test_a_month_of_the_zone_has_all_of_its_hours(collectors, database):
    running = await collectors(DATABASE_URL=database, DASHBOARD_TOKEN="look").ready()
    execute(database, HALF_HOURS.format("'2026-09-28Z'", "'2026-11-03Z'"))
    asked = {"since": "2026-10-01", "until": "2026-11-01", "zone": "Europe/Paris"}
    days = json.loads(fetch(running, "/data/energy.json", **asked)[2])
    # The 25th has 25 hours.
    rows = {day["day"]: day["rows"] for day in days}
    assert rows == {f"2026-10-{n:02}": 50 if n == 25 else 48 for n in range(1, 32)}
    lines = fetch(running, "/data/energy.csv", excel="1", **asked)[2].splitlines()
    assert len(lines) == 32 and b";2026-10-01;" in lines[1] + lines[-1]


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/Los_Angeles"])
async def test_today_and_yesterday_are_days_of_the_zone(collectors, database, zone):
    running = await collectors(DATABASE_URL=database, DASHBOARD_TOKEN="look").ready()
    execute(database, HALF_HOURS.format("now()::date - 3", "now()"))

    def first_row(since):
        asked = {"since": since, "until": "now", "zone": zone}
        (found,) = json.loads(fetch(running, "/data/coverage.json", **asked)[2])
        return found["first_row"]

    def midnight(days):
        day = datetime.now(ZoneInfo(zone)).date() - timedelta(days=days)
        local = datetime.combine(day, datetime.min.time(), ZoneInfo(zone))
        return local.astimezone(UTC).isoformat()

    await wait_for(lambda: first_row("today") == midnight(0))
    await wait_for(lambda: first_row("yesterday") == midnight(1))


async def test_the_settings_in_force_are_the_defaults_of_a_question(
    collectors, database
):
    env = {
        "MIN_POWER_W": "1300",
        "THROTTLE_INTERVAL_SECONDS": "1",
        "DEFAULT_DAYS_HISTORY": "2",
    }
    running = await collectors(
        DATABASE_URL=database, DASHBOARD_TOKEN="look", **env
    ).ready()
    execute(
        database,
        ROWS.replace(
            "'2026-11-20 10:00+00'::timestamptz",
            "date_trunc('minute', now() - INTERVAL '1 hour')",
        ),
    )

    def ask(name, **parameters):
        return json.loads(
            fetch(running, f"/data/{name}.json", device="b", **parameters)[2]
        )

    execute(
        database,
        "DELETE FROM power_logs WHERE timestamp = (SELECT min(timestamp) + INTERVAL '3 minutes' FROM power_logs)",
    )
    assert ask("cycles") == [] and len(ask("cycles", min_power_w="10")) == 1
    (cover,) = ask(
        "coverage"
    )  # what is missing after a row at or below MIN_POWER_W is "off"; a row stands for a minute
    assert (cover["missing"], cover["rows"]) == (0, 29)
    assert ask("coverage", min_power_w="-0")[0]["missing"] == 0
    execute(database, "UPDATE power_logs SET timestamp = timestamp - INTERVAL '3 days'")
    assert (
        ask("cycles", min_power_w="10") == []
        and len(ask("cycles", min_power_w="10", since="2026-01-01")) == 1
    )


async def test_answers_are_packed_where_that_is_understood(running):
    plain, packed = (
        fetch(running, "/data/power.json", {"Accept-Encoding": how}, **WINDOW)
        for how in ("identity", "br, gzip")
    )
    assert (
        packed[1]["Content-Encoding"] == "gzip" and plain[1]["Content-Encoding"] is None
    )
    assert gzip.decompress(packed[2]) == plain[2] and len(packed[2]) < len(plain[2]) / 4
    status, text = running.get("/data/power.json?token=look", "HEAD")
    assert (status, text) == (200, "")


async def test_a_question_without_an_answer_is_one_line(running, database):
    execute(database, "CREATE OR REPLACE FUNCTION newest_rows() RETURNS TABLE (device_id TEXT, channel TEXT, name TEXT,"
                      ' "timestamp" TIMESTAMPTZ, apower_w FLOAT, energy_total_wh FLOAT) LANGUAGE plpgsql AS'
                      " 'BEGIN PERFORM pg_sleep(20); END'")  # fmt: skip
    began = time.monotonic()
    status, _, body = await asyncio.to_thread(fetch, running, "/data/channels.json")
    assert (
        status == 503
        and body.startswith(b"Too much")
        and 4 < time.monotonic() - began < 7.5
    )  # by the server, not by us
    execute(database, "DROP FUNCTION power_series")
    status, _, body = fetch(running, "/data/power.json")
    assert status == 503 and b"power_series" in body and body.count(b"\n") == 1
    assert (await running.health())[
        "database"
    ] == "connected" and "unreachable" not in running.log


async def test_a_database_that_is_away_is_said_at_once_and_what_is_asked_after_it_is_answered(
    collectors, own_postgres
):
    running = await collectors(
        DATABASE_URL=own_postgres.url, DASHBOARD_TOKEN="look"
    ).ready()
    assert fetch(running, "/data/channels.json")[0] == 200
    own_postgres.stop()
    async with device(running.url) as peer:
        await peer.send(minute_frame())  # the writer notices
        await running.ready("unreachable")
        status, _, body = fetch(running, "/data/channels.json")
        assert (status, body) == (503, b"No answer: the database is away\n")
        own_postgres.start()
        await running.ready()
    status, _, body = fetch(running, "/data/channels.json")
    assert status == 200 and [row["device_id"] for row in json.loads(body)] == [DEVICE]


async def test_rows_of_times_and_numbers_that_python_or_json_lack_are_answered(
    running, database
):
    row = "('{0}', '{0}', 'switch:0', '{1}', 230, 1, 1)"
    rows = [
        row.format(*one)
        for one in (
            ("infinity", "NaN"),
            ("0044-03-15 12:00 BC", "1"),
            ("12026-11-20 10:00+02", "2"),
        )
    ]
    columns = (
        "timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh"
    )
    execute(
        database,
        f"DELETE FROM power_logs; INSERT INTO power_logs ({columns}) VALUES {', '.join(rows)}",
    )
    status, _, body = fetch(running, "/data/channels.json")
    assert status == 200 and [(row["timestamp"], row["apower_w"]) for row in json.loads(body)] == [
        ("0044-03-15T12:00:00+00:00 BC", 1), ("12026-11-20T08:00:00+00:00", 2), ("infinity", None)
    ]  # fmt: skip
    status, _, body = fetch(running, "/data/channels.csv")
    assert (
        status == 200 and body.count(b"\r\n") == 4 and b'"switch:0",,infinity,,' in body
    )


ODD_SETTINGS = [
    "DateStyle = 'SQL, DMY'",
    "IntervalStyle = 'iso_8601'",
    "TimeZone = 'Asia/Kolkata'",
    "search_path = 'nowhere'",
    "standard_conforming_strings = off",
    "client_encoding = 'LATIN1'",
    "bytea_output = 'escape'",
    "extra_float_digits = -15",
    "array_nulls = off",
    "transform_null_equals = on",
    "quote_all_identifiers = on",
    "client_min_messages = 'error'",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_deferrable = on",
    "lc_messages = 'C'",
    "lc_numeric = 'C'",
]


@pytest.fixture
def odd_database(database):
    """A database in which each setting that could matter is another one."""
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    odd = f"{name}_odd"
    execute(database, f"CREATE DATABASE {odd} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")  # fmt: skip
    for setting in ODD_SETTINGS:
        execute(database, f"ALTER DATABASE {odd} SET {setting}")
    yield psycopg.conninfo.make_conninfo(database, dbname=odd)
    execute(database, f"DROP DATABASE {odd} WITH (FORCE)")


def as_usual(url):
    """The URL of the same database, for a test that wants to see it as usual."""
    options = "-c DateStyle=ISO -c TimeZone=UTC -c search_path=public -c standard_conforming_strings=on -c extra_float_digits=1"
    return psycopg.conninfo.make_conninfo(url, options=options)


async def test_no_setting_of_the_database_changes_what_is_written(
    collectors, odd_database
):
    env = {"DATABASE_URL": odd_database, "RETENTION_DAYS": "30"}
    running = await collectors(**env, DASHBOARD_TOKEN="look").ready()
    usual = as_usual(odd_database)
    execute(
        usual,
        ROWS.replace(
            "'2026-11-20 10:00+00'::timestamptz", "now() - interval '40 days'"
        ),
    )
    hostile = """C:\\new "pump's" {NULL}, é"""
    status = {"id": 2, "src": hostile, "dst": "collector", "result": minute_frame(ret_aenergy=None)["params"]}  # fmt: skip
    names = {"id": 3, "src": hostile, "dst": "collector", "result": {"switch:0": {"name": hostile}}}  # fmt: skip
    async with device(running.url) as peer:
        await peer.send(minute_frame("NULL"), minute_frame(hostile, ret_aenergy=None))
        await peer.send(status)
        assert await peer.websocket.recv() == sc.GET_CONFIG
        await peer.send(names)
        found = "SELECT device_says FROM channel_names WHERE channel = 'switch:0'"
        await wait_for(lambda: query(usual, found) == [(hostile,)])
        # What is older than RETENTION_DAYS has gone.
        columns = "device_id, apower_w, energy_returned_wh"
        left = [(hostile, 433.8, None), ("NULL", 433.8, 0.0)]
        await wait_for(lambda: read_rows(usual, columns) == left)
    assert "WARNING" not in running.log.replace("WARNING no COLLECTOR_TOKEN", "")
    assert "ERROR" not in running.log

    shown = json.loads(fetch(running, "/data/channels.json")[2])
    assert [(row["device_id"], row["name"]) for row in shown] == [
        (hostile, hostile),
        ("NULL", None),
    ]
    status, out, err = await run_script(running.folder, "--check", **running.env)
    assert (status, err) == (0, "")
    at = shown[0]["timestamp"].replace("+00:00", "Z")
    assert f"  {at}  {hostile}  switch:0  433.8 W  {hostile}\n" in out

    # The schema finds its version and its indexes, and adds no second ones.
    indexes = "SELECT count(*) FROM pg_indexes WHERE tablename = 'power_logs'"
    before = query(usual, indexes)
    with psycopg.connect(odd_database, autocommit=True) as conn:
        conn.execute("SET search_path = public")
        conn.execute((ROOT / "schema.sql").read_bytes())
    assert query(usual, indexes) == before == [(4,)]
    await running.stop()
    execute(usual, "COMMENT ON FUNCTION newest_rows IS 'kept'")
    await (await running.again()).ready()
    comment = "SELECT obj_description('newest_rows'::regproc)"
    assert query(usual, comment) == [("kept",)]


async def test_no_setting_of_the_database_changes_an_answer(
    collectors, database, odd_database
):
    answers = []
    for url in (database, odd_database):
        running = await collectors(DATABASE_URL=url, DASHBOARD_TOKEN="look").ready()
        execute(as_usual(url), ROWS)
        asked = {"since": "2026-11-20", "until": "2026-11-21", "zone": "Europe/Paris"}
        paths = ["/data/channels.json", "/data/channels.csv"]
        answers.append([fetch(running, path) for path in paths])
        for name in ("power", "cycles", "energy", "coverage"):
            for form in ("json", "csv"):
                answers[-1].append(fetch(running, f"/data/{name}.{form}", **asked))
    usual, odd = ([(status, body) for status, _, body in found] for found in answers)
    assert usual == odd
    assert {status for status, _ in odd} == {200}


async def test_a_question_waits_for_no_writer_whatever_the_isolation(
    collectors, odd_database, tmp_path
):
    running = await collectors(
        DATABASE_URL=odd_database, DASHBOARD_TOKEN="look"
    ).ready()
    execute(as_usual(odd_database), ROWS)
    with psycopg.connect(as_usual(odd_database)) as writer:
        writer.execute("DELETE FROM power_logs")
        assert len(json.loads(fetch(running, "/data/channels.json")[2])) == 2
        env = {"DATABASE_URL": odd_database}
        status, out, _ = await run_script(tmp_path, "--check", **env)
        assert status == 0 and "holds 60 rows" in out


async def test_where_the_role_hears_no_warning_the_log_has_the_query_for_doubles(
    collectors, odd_database
):
    usual = as_usual(odd_database)
    old_row = "INSERT INTO power_logs VALUES (DEFAULT, '2020-01-01', 'old', 'switch:0', 1, 2, 3, 4)"
    execute(usual, ORIGINAL_TABLE, old_row, old_row)
    running = await collectors(DATABASE_URL=odd_database).ready()
    assert "this query shows them: SELECT device_id" in running.log


async def test_check_may_take_longer_than_a_statement_of_the_role(
    running, database, tmp_path
):
    execute(
        database,
        "CREATE OR REPLACE FUNCTION newest_rows() RETURNS TABLE (device_id TEXT, channel TEXT, name TEXT,"
        ' "timestamp" TIMESTAMPTZ, apower_w FLOAT, energy_total_wh FLOAT) LANGUAGE plpgsql AS'
        " 'BEGIN PERFORM pg_sleep(1); RETURN QUERY VALUES (''d'', ''c'', NULL, now(), 1.5::float, 2.0::float); END'",
        f"ALTER DATABASE {psycopg.conninfo.conninfo_to_dict(database)['dbname']} SET statement_timeout = '500ms'",
    )
    status, out, err = await run_script(tmp_path, "--check", DATABASE_URL=database)
    assert (status, err) == (0, "") and "  d  c  1.5 W\n" in out


async def test_rows_wait_while_the_database_is_read_only(running, database, tmp_path):
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    limit = f"ALTER DATABASE {name} SET default_transaction_read_only"
    execute(database, f"{limit} = on")
    await running.stop()
    await (await running.again()).ready()
    async with device(f"{running.url}?token=send") as peer:
        await peer.send(minute_frame())
        reason = "cannot execute INSERT in a read-only transaction"
        await wait_for(lambda: reason in running.log)
        status, _, _ = await run_script(tmp_path, "--check", DATABASE_URL=database)
        assert status == 0
        with psycopg.connect(database, autocommit=True) as conn:
            conn.execute("SET default_transaction_read_only = off")
            conn.execute(f"{limit} = off")
        await wait_for_rows(database, 61)
    assert "rows dropped: 0" in running.get()[1]


async def test_looking_writes_nothing(running, database):
    execute(database, "CREATE OR REPLACE FUNCTION newest_rows() RETURNS TABLE (device_id TEXT, channel TEXT, name TEXT,"
                      ' "timestamp" TIMESTAMPTZ, apower_w FLOAT, energy_total_wh FLOAT) LANGUAGE sql AS'
                      " 'DELETE FROM power_logs RETURNING device_id, channel, NULL, timestamp, apower_w, energy_total_wh'")  # fmt: skip
    assert (
        fetch(running, "/data/channels.json")[0] == 503
        and len(read_rows(database)) == 60
    )


async def test_eight_clients_that_ask_for_everything_delay_no_row(collectors, database):
    running = await collectors(
        DATABASE_URL=database, DASHBOARD_TOKEN="look", THROTTLE_INTERVAL_SECONDS="0.1"
    ).ready()
    execute(database, ROWS.replace("generate_series(0, 29)", "generate_series(0, 60000)").replace("20 10:00", "01 10:00")
                          .replace("=1+1,b", "a,b,c,d,e,f"), "VACUUM ANALYZE power_logs")  # fmt: skip
    stop, answered = asyncio.Event(), []

    async def ask(number):
        names = ("power", "cycles", "energy", "coverage")
        while not stop.is_set():
            with suppress(OSError):
                name = names[number % 4]
                status, _, _ = await asyncio.to_thread(
                    fetch,
                    running,
                    f"/data/{name}.json",
                    since="2026-11-01",
                    until="2027-11-01",
                )
                answered.append(status)

    clients = [asyncio.create_task(ask(number)) for number in range(8)]
    try:
        await wait_for(lambda: 200 in answered, 30)
        late = []
        async with device(running.url) as peer, AsyncExitStack() as stack:
            conn = await stack.enter_async_context(
                await psycopg.AsyncConnection.connect(database, autocommit=True)
            )
            for number in range(20):
                began = time.monotonic()
                await peer.send(minute_frame(f"row-{number}"))
                while not await (
                    await conn.execute(
                        "SELECT 1 FROM power_logs WHERE device_id = %s",
                        [f"row-{number}"],
                    )
                ).fetchone():
                    assert time.monotonic() - began < 15
                late.append(time.monotonic() - began)
        assert sorted(late)[10] < 1
    finally:
        stop.set()
        await asyncio.gather(*clients)
    assert set(answered) <= {200, 503} and "unreachable" not in running.log


async def test_metrics_are_those_that_prometheus_reads(running, database):
    async with device(f"{running.url}?token=send") as peer:
        await peer.send(minute_frame(), "no frame")
        await wait_for_rows(database, 61)
        await wait_for(lambda: "rows_written_total 1" in running.get("/metrics")[1])
        status, headers, body = fetch(running, "/metrics", token="")
    assert status == 200 and headers["Content-Type"].startswith(
        "text/plain; version=0.0.4"
    )
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    age_s = time.time() - found.pop("shelly_collector_last_write_timestamp_seconds")
    assert -1 < age_s < 15 and found == {
        "shelly_collector_frames_total": 2, "shelly_collector_frames_passed_over_total": 1,
        "shelly_collector_rows_written_total": 1, "shelly_collector_rows_dropped_total": 0,
        "shelly_collector_rows_waiting": 0, "shelly_collector_devices_connected": 1,
        "shelly_collector_database_up": 1, "shelly_collector_outages_total": 0,
        "shelly_collector_info": 1,
    }  # fmt: skip


async def test_health_tells_of_a_channel_that_has_gone_silent(collectors, database):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="60"
    ).ready()
    assert running.get("/health?silent=600")[0] == 200
    async with device(running.url) as peer:
        await peer.send(
            minute_frame() | {"received": time.time() - 1200}, minute_frame("b")
        )
        await wait_for_rows(database, 2)
        status, text = running.get("/health?silent=600")
        assert (
            status == 503
            and text.startswith("Shelly WS collector running\n")
            and text.endswith("channels silent: 1\n")
        )
        assert running.get("/health")[0] == running.get("/health?silent=1800")[0] == 200
        await peer.send(minute_frame(apower=1.0))
        await wait_for_rows(database, 3)
        assert running.get("/health?silent=600")[0] == 200
        await peer.send(
            minute_frame("c") | {"received": time.time() - 24.5 * 3600}
        )  # dead for a day: known to be so
        await wait_for_rows(database, 4)
        assert running.get("/health?silent=600")[0] == 200
    for nonsense in ("soon", "-1", "9" * 5000, "٣", ""):
        assert running.get(f"/health?silent={urllib.parse.quote(nonsense)}")[0] == 400
    assert running.get("/health?silent=soon") == (
        400,
        "silent makes no sense: it is a number of seconds\n",
    )
    assert running.get("/health?silence=60") == (
        400,
        "silence is no parameter of /health, which takes silent=SECONDS\n",
    )
    assert running.get("/?silence=60&silent=soon")[0] == 200


def put_row(database, device_id, age_s, channel="switch:0"):
    execute(
        database,
        "INSERT INTO power_logs (timestamp, device_id, channel,"
        " apower_w, voltage_v, current_a, energy_total_wh) VALUES"
        f" (now() - interval '{age_s} s', '{device_id}', '{channel}', 1, 1, 1, 1)",
    )


async def test_a_channel_that_never_came_back_after_a_start_is_silent(
    collectors, database
):
    first = await collectors(DATABASE_URL=database).ready()
    await first.stop()
    for device_id, age_s in {"pump": 900, "heater": 60, "sold": 90_000}.items():
        put_row(database, device_id, age_s)
    put_row(database, "pump", 900, channel="switch:7")
    running = await collectors(
        DATABASE_URL=database, DASHBOARD_TOKEN="look", CHANNELS="0,1"
    ).ready()
    await wait_for(lambda: running.get("/health?silent=600")[0] == 503)
    text = running.get("/health?silent=600")[1]
    assert text.endswith("channels silent: 1\n") and "pump" not in text
    told = running.get("/health?silent=600&token=look")[1].splitlines()
    assert re.fullmatch(
        r"silent since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ: pump switch:0", told[-1]
    )
    assert told[-2] == "channels silent: 1"
    told = running.get("/health?silent=600&token=wrong")[1]
    assert "not the page's token" in told and "pump" not in told
    async with device(running.url) as peer:
        # It has another profile now, and so no switch:0.
        meter = minute_frame()["params"]["switch:0"]
        await peer.send(notify({"switch:1": meter}, "pump", "NotifyFullStatus"))
        await wait_for(lambda: running.get("/health?silent=600")[0] == 200)


@pytest.mark.slow
async def test_a_channel_whose_rows_another_collector_writes_is_not_silent(
    collectors, database
):
    first = await collectors(DATABASE_URL=database).ready()
    await first.stop()
    put_row(database, "pump", 900)
    running = await collectors(DATABASE_URL=database).ready()
    await wait_for(lambda: running.get("/health?silent=600")[0] == 503)
    put_row(database, "pump", 0)
    # The table is read once a minute.
    await wait_for(lambda: running.get("/health?silent=600")[0] == 200, 80)


async def test_who_was_refused_is_told_to_who_has_the_link(collectors, database):
    running = await collectors(
        DATABASE_URL=database, DASHBOARD_TOKEN="look", COLLECTOR_TOKEN="send"
    ).ready()
    assert json.loads(fetch(running, "/data/refused.json")[2]) == []
    for path in ("/wss?token=send", "/ws?token=look", "/wss"):
        with pytest.raises(InvalidStatus):
            async with connect(running.url.removesuffix("/ws") + path):
                pass
    refused = json.loads(fetch(running, "/data/refused.json")[2])
    for refusal in refused:
        at = datetime.fromisoformat(refusal.pop("refused_at"))
        assert timedelta(0) <= datetime.now(UTC) - at < timedelta(minutes=1)
    assert refused == [
        {"address": "127.0.0.1", "reason": "path", "path": "/wss"},
        {"address": "127.0.0.1", "reason": "token", "path": ""},
    ]
    head, line, *_ = fetch(running, "/data/refused.csv")[2].decode().split("\r\n")
    assert head == "refused_at,address,reason,path"
    assert re.fullmatch(
        r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00,"127.0.0.1","path","/wss"', line
    )
    assert running.get("/data/refused.json")[0] == 401


async def test_a_link_of_one_device_opens_its_data_only(collectors, database, tmp_path):
    execute(database, (ROOT / "schema.sql").read_bytes())
    own_id, other_id = "a+b ~ü", "other"
    for device_id in (own_id, other_id):
        for age_s in (700, 2400, 2460, 2520):
            put_row(database, device_id, age_s)
    running = await collectors(tmp_path, DATABASE_URL=database).ready()
    await wait_for(lambda: running.get("/health?silent=600")[0] == 503)
    status, out, err = await run_script(tmp_path, "--link", own_id, **running.env)
    assert (status, err) == (0, "")
    link = urllib.parse.urlsplit(out.strip())
    assert link.path == "/dashboard" and link.port == running.port
    token = dict(urllib.parse.parse_qsl(link.query))["token"]

    def get(name, **parameters):
        status, _, body = fetch(running, f"/data/{name}", token=token, **parameters)
        return status, body.decode()

    parameters = {
        "cycles": {"min_power_w": 0.5, "row_length": 60},
        "gaps": {"row_length": 60},
    }
    for name in QUESTIONS:
        given = parameters.get(name, {})
        status, body = get(f"{name}.json", **given)
        assert status == 200
        assert {row["device_id"] for row in json.loads(body)} == {own_id}
        assert get(f"{name}.json", device=own_id, **given)[0] == 200
        for excel in (0, 1):
            status, body = get(f"{name}.csv", excel=excel, **given)
            assert own_id in body and other_id not in body
    assert get("channels.json", device=other_id) == (
        400,
        f"device makes no sense: this link opens {own_id} alone\n",
    )
    assert get("settings.json")[0] == 200
    # Who was refused is nothing for a tenant.
    with pytest.raises(InvalidStatus):
        async with connect(running.url + "s"):
            pass
    assert get("refused.json") == (200, "[]")
    quoted = urllib.parse.quote(token)
    assert "silent since" not in running.get(f"/health?silent=600&token={quoted}")[1]
    _, _, mark = token.rpartition("~")
    for wrong in (f"{other_id}~{mark}", f"~{mark}", mark, token[:-1], f"{own_id}~"):
        assert fetch(running, "/data/channels.json", token=wrong)[0] == 401


async def test_a_link_that_would_give_the_token_away_or_opens_nothing_is_not_made(
    tmp_path,
):
    status, out, _ = await run_script(tmp_path, "--link", "a")
    assert status == 1 and "no token yet" in out
    status, out, _ = await run_script(tmp_path, "--link", "a", DASHBOARD_TOKEN="look")
    assert status == 1 and "too short" in out and "look" not in out
    status, out, _ = await run_script(tmp_path, "--link", "", DASHBOARD_TOKEN="x" * 32)
    assert status == 2 and "needs the id" in out


async def test_a_link_for_a_device_without_rows_says_so(database, tmp_path):
    execute(database, (ROOT / "schema.sql").read_bytes())
    status, out, err = await run_script(
        tmp_path, "--link", "shelly-1", DATABASE_URL=database, DASHBOARD_TOKEN="x" * 32
    )
    assert status == 0 and out.count("\n") == 1
    assert err == "There is no row of 'shelly-1' yet; --check shows the devices.\n"


async def test_frames_that_a_filter_held_back_land_in_the_minute_they_came_in(make):
    collector, now = make(), 1_795_435_200.0
    minutes = [1440, 1439, 3, 0, -5]
    for minute in minutes:  # a filter's clock that runs ahead means now
        feed(
            collector, minute_frame() | {"received": now + 0.5 - minute * 60}, now + 0.5
        )
    assert [now - row.time for row in taken(collector)] == [86_400, 86_340, 180, 0]
    with pytest.raises(ValueError, match="25 hours"):
        feed(collector, minute_frame() | {"received": now - 25 * 3600 - 1}, now)
    feed(collector, minute_frame() | {"received": now - 25 * 3600 + 1}, now)
    feed(collector, minute_frame() | {"received": None}, now + 60)
    assert [now - row.time for row in taken(collector)] == [25 * 3600, -60]


async def test_a_frame_held_back_changes_nothing_of_what_is_known_since(make):
    collector, now = make(), 1_795_435_200.0
    feed(collector, minute_frame(apower=1.0), now)
    feed(collector, minute_frame(apower=2000.0) | {"received": now - 3600}, now + 1)
    feed(
        collector,
        notify({"switch:0": {"apower": 3000.0}}) | {"received": now - 1800},
        now + 2,
    )  # lacks the counter of then
    feed(collector, notify({"switch:0": {"voltage": 229.0}}), now + 60)
    assert [(row.time - now, row.apower_w) for row in taken(collector)] == [
        (0, 1.0),
        (-3600, 2000.0),
        (60, 1.0),
    ]
    assert collector.channels[DEVICE + "switch:0"].heard == now + 60
    # The row that waited for its other values does not get them from a frame of another time, and is not lost.
    feed(collector, minute_frame(apower=5.0) | {"received": now - 600}, now + 61)
    assert [(row.time - now, *row[3:7]) for row in taken(collector)] == [
        (-1800, 3000.0, 0, 0, 0), (-600, 5.0, 228.2, 2.631, 1234.567)
    ]  # fmt: skip


async def test_a_row_of_frames_held_back_waits_no_longer_than_another(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="0.5"
    ).ready()
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await peer.send(
            notify({"switch:0": {"apower": 7.0}}) | {"received": time.time() - 3600}
        )
        await wait_for_rows(database, 2)
    assert sorted(read_rows(database, "apower_w, voltage_v")) == [
        (7.0, 0.0),
        (433.8, 228.2),
    ]
    assert (
        "reports no voltage_v, current_a, energy_total_wh: stored as 0" in running.log
    )


async def test_of_frames_held_back_the_first_after_a_run_is_kept_too_with_min_power(
    make,
):
    collector, now = make(MIN_POWER_W="10"), 1_795_435_200.0
    feed(
        collector,
        notify(minute_frame(apower=0.0)["params"], method="NotifyFullStatus"),
        now,
    )
    for minute, power in enumerate((0, 500, 500, 0, 0)):
        feed(
            collector,
            minute_frame(apower=power) | {"received": now - 600 + 60 * minute},
            now + 1,
        )
    assert [(row.time - now, row.apower_w) for row in taken(collector)] == [
        (-540, 500),
        (-480, 500),
        (-420, 0),
    ]
    assert collector.channels[DEVICE + "switch:0"].heard == now


async def test_names_follow_the_device_and_an_owners_own_name_wins(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="60"
    ).ready()
    status = {
        "id": 2,
        "src": DEVICE,
        "dst": "collector",
        "result": minute_frame()["params"],
    }

    def names():
        with psycopg.connect(database) as conn:
            return conn.execute(
                "SELECT channel, device_says, name FROM channel_names ORDER BY channel"
            ).fetchall()

    async def say(device_name, name):
        async with device(running.url) as peer:
            await peer.send(minute_frame(), status)
            assert await peer.websocket.recv() == sc.GET_CONFIG
            config = {
                "sys": {"device": {"name": device_name, "mac": "A1"}},
                "switch:0": {"id": 0, "name": name},
                "wifi": {"ap": {}},
            }
            await peer.send(
                {"id": 3, "src": DEVICE, "dst": "collector", "result": config},
                minute_frame(),
                status,
            )
            await wait_for(
                lambda: (
                    names()[:1]
                    and names()[0][1] == device_name
                    and names()[1][1] == name
                )
            )
            with pytest.raises(TimeoutError):  # asked once only
                await asyncio.wait_for(peer.websocket.recv(), 0.2)

    await say("Cellar", HOSTILE)
    execute(
        database, "UPDATE channel_names SET name = 'Pump' WHERE channel = 'switch:0'"
    )
    await say(None, "Old pump")
    assert names() == [("", None, None), ("switch:0", "Old pump", "Pump")]
    (shown,) = json.loads(
        fetch(running, "/data/channels.json", token=look_token(running))[2]
    )
    assert (shown["name"], shown["device_name"], shown["apower_w"]) == (
        "Pump",
        None,
        433.8,
    )
    assert len(read_rows(database)) in (
        1,
        2,
    )  # its configuration is no status: no values were taken away


def look_token(running):
    return Path(running.folder, "data", "dashboard-token").read_text().strip()


async def test_names_that_a_busy_database_does_not_take_are_written_later(
    collectors, database
):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        with psycopg.connect(database) as conn:
            conn.execute("LOCK TABLE channel_names")
            await peer.send(
                {"id": 2, "src": DEVICE, "result": minute_frame()["params"]}
            )
            assert await peer.websocket.recv() == sc.GET_CONFIG
            await peer.send(
                {
                    "id": 3,
                    "src": DEVICE,
                    "result": {
                        "switch:0": {"name": "Pump"},
                        "switch:1": 7,
                        "input:0": {"name": "x"},
                    },
                }
            )
            await wait_for(lambda: "WARNING note_names has failed" in running.log)
        said = "SELECT channel, device_says FROM channel_names"
        with psycopg.connect(database, autocommit=True) as conn:
            assert await wait_for(lambda: conn.execute(said).fetchall()) == [
                ("switch:0", "Pump")
            ]


async def test_names_that_cannot_be_written_are_a_warning_and_rows_go_on(
    collectors, database
):
    running = await collectors(DATABASE_URL=database).ready()
    execute(database, "DROP TABLE channel_names CASCADE")
    async with device(running.url) as peer:
        await peer.send({"id": 2, "src": DEVICE, "result": minute_frame()["params"]})
        assert await peer.websocket.recv() == sc.GET_CONFIG
        await peer.send(
            {
                "id": 3,
                "src": DEVICE,
                "result": {"switch:0": {"name": "Pump"}, "switch:1": None},
            }
        )
        await wait_for(lambda: "WARNING note_names has failed" in running.log)
        await peer.send(minute_frame(channel=1))
        await wait_for_rows(database, 2)
    assert "ERROR" not in running.log


async def test_behind_a_filter_no_names_are_asked_for(collectors, database):
    running = await collectors(DATABASE_URL=database).ready()
    async with device(running.url) as peer:
        await peer.send(
            notify(minute_frame()["params"], method="NotifyFullStatus"),
            minute_frame(channel=1),
        )
        await wait_for_rows(database, 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.websocket.recv(), 0.2)


async def test_rows_older_than_retention_go_but_none_when_the_clock_is_wrong(
    collectors, database
):
    execute(database, (ROOT / "schema.sql").read_bytes())
    old = ROWS.replace(
        "'2026-11-20 10:00+00'::timestamptz", "now() - INTERVAL '50 days'"
    ).replace("(0, 29)", "(0, 5999)")
    execute(database, old)
    running = await collectors(DATABASE_URL=database, RETENTION_DAYS="30").ready()
    assert "rows older than 30 days are deleted (RETENTION_DAYS)" in running.log
    seen = set()

    async def only_the_new_row_is_left():
        seen.add(len(read_rows(database, "1", "1")))
        return seen and min(seen) == 1

    async with device(running.url) as peer:
        with pytest.raises(AssertionError, match="not within"):
            await wait_for(only_the_new_row_is_left, 2 * sc.RETRY + 1)
        assert seen == {12_000}
        await peer.send(minute_frame())
        await wait_for(only_the_new_row_is_left, 20)
    assert {12_001 - 5_000, 12_001 - 10_000} <= seen  # a few thousand at a time
    assert "has failed" not in running.log


async def test_a_day_of_a_simulated_house_becomes_rows_within_seconds(
    collectors, database
):
    running = await collectors(
        DATABASE_URL=database, THROTTLE_INTERVAL_SECONDS="60"
    ).ready()
    command = [
        sys.executable,
        ROOT / "tests" / "simulated_device.py",
        running.url,
        "--history",
        "24h",
        "--minutes",
        "0",
        "--quiet",
    ]
    played = await asyncio.create_subprocess_exec(*command)
    assert await played.wait() == 0
    await wait_for(lambda: len(read_rows(database, "1", "1")) >= 4 * 1415, 20)
    with psycopg.connect(database) as conn:
        cover = conn.execute(
            "SELECT missing, longest_gap, resets FROM coverage() ORDER BY channel"
        ).fetchall()
        runs = dict(
            conn.execute("SELECT channel, count(*) FROM power_cycles() GROUP BY 1")
        )
        (kwh,) = conn.execute(
            "SELECT sum(energy_wh) / 1000 FROM energy_by_day()"
        ).fetchone()
        # without network there are no powers, only what the counter rose by meanwhile
        (drawn_kwh,) = conn.execute("""
            SELECT sum(CASE WHEN until - timestamp = '1 min' THEN apower_w / 60 ELSE total - energy_total_wh END) / 1000
            FROM (SELECT *, lead(timestamp) OVER w AS until, lead(energy_total_wh) OVER w AS total FROM power_logs
                  WINDOW w AS (PARTITION BY channel ORDER BY timestamp)) AS steps
        """).fetchone()
    assert len(cover) == 4 and all(
        19 <= missing <= 21 and resets == 0 for missing, _, resets in cover
    )
    runs.pop("switch:0", 0)  # when the pump runs is left to chance
    assert runs.keys() == {"switch:1", "switch:2"} and min(runs.values()) > 5
    assert kwh == pytest.approx(drawn_kwh, rel=0.001)
    assert "passed over" not in running.log


async def test_the_returned_energy_is_in_json_and_csv_and_where_none_is_told_it_is_empty(
    collectors, database
):
    running = await collectors(DATABASE_URL=database, DASHBOARD_TOKEN="look").ready()
    execute(
        database,
        "INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a,"
        " energy_total_wh, energy_returned_wh)"
        " SELECT '2026-11-03 12:00Z'::timestamptz + n * INTERVAL '1 minute', d, 'em:0:a', 1, 230, 1,"
        " 1000 + n, CASE d WHEN 'gives' THEN 50 + 2 * n END"
        " FROM generate_series(0, 2) n, unnest('{gives,silent}'::text[]) d",
    )
    parameters = "token=look&since=2026-11-02&until=2026-11-20&zone=UTC"
    status, text = running.get(f"/data/energy.json?{parameters}")
    assert status == 200 and [
        one["energy_returned_wh"] for one in json.loads(text)
    ] == [4, None]
    head, gives, silent = running.get(f"/data/energy.csv?{parameters}")[1].split()
    assert head == "device_id,channel,day,energy_wh,rows,energy_returned_wh"
    assert (
        gives == '"gives","em:0:a",2026-11-03,2,3,4'
        and silent == '"silent","em:0:a",2026-11-03,2,3,'
    )


async def test_each_phase_has_the_name_of_its_meter_and_its_letter_and_a_clamp_has_its_own(
    collectors, database
):
    running = await collectors(DATABASE_URL=database, CHANNELS="0,1").ready()
    status = {
        "id": 2,
        "src": METER,
        "dst": "collector",
        "result": {"em:0": EM, "emdata:0": EMDATA},
    }
    nameless = {
        ("", None),
        *((f"em:0:{p}", None) for p in "abc"),
        ("em1:0", None),
        ("em1:1", "Panels"),
    }

    def names():
        return set(query(database, "SELECT channel, device_says FROM channel_names"))

    async def say(house, clamp):
        async with device(running.url) as peer:
            await peer.send(status)
            assert await peer.websocket.recv() == sc.GET_CONFIG
            config = {"sys": {"device": {"name": None, "mac": "A1"}}, "em:0": {"id": 0, "name": house, "reverse": {}},
                      "emdata:0": {}, "em1:0": {"id": 0, "name": clamp}, "em1:1": {"id": 1, "name": "Panels"}, "em1data:0": {},
                      "em1data:1": {"id": 1, "name": "x"}, "em:2": {"id": 2, "name": "Not wanted"}, "wifi": {"ap": {}}}  # fmt: skip
            await peer.send(
                {"id": 3, "src": METER, "dst": "collector", "result": config}
            )

    await say("House", "Mains")
    named = {
        ("", None),
        *((f"em:0:{p.lower()}", f"House {p}") for p in "ABC"),
        ("em1:0", "Mains"),
        ("em1:1", "Panels"),
    }
    await wait_for(lambda: names() == named)
    execute(
        database, "UPDATE channel_names SET name = 'Stove' WHERE channel = 'em:0:b'"
    )
    await say(None, None)
    await wait_for(lambda: names() == nameless)
    shown = query(database, "SELECT channel, name FROM newest_rows() ORDER BY channel")
    assert shown == [("em:0:a", None), ("em:0:b", "Stove"), ("em:0:c", None)]
    assert "WARNING note_names" not in running.log
