"""A person looks at the page: a real Chromium, on a real collector and a real PostgreSQL."""

import asyncio
import contextlib
import os
import re
import shutil
import sys
import urllib.request
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from zoneinfo import ZoneInfo

import psycopg
import pytest
import pytest_asyncio
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from support import (
    ROOT,
    device,
    execute,
    minute_frame,
    read_rows,
    run_script,
    wait_for,
    wait_for_rows,
)

api = pytest.importorskip(
    "playwright.async_api",
    reason="no Playwright: pip install -r tests/requirements.txt",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [  # one browser for all tests of a worker
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium: sudo apt install chromium"
    ),
    pytest.mark.asyncio(loop_scope="module"),
]
expect = api.expect
expect.set_options(timeout=15_000)
QUIET = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
ZONE = "Europe/Paris"
HOUSE, PUMP, HEATER, FRIDGE = (
    "shellypro4pm-a1b2c3d4e5f6",
    "switch:0",
    "switch:1",
    "switch:2",
)
# Power by the minutes `m` since the first row, or `ago` before now. The counter goes on where no row is kept.
ROWS = """INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh)
    SELECT t, %(device)s, %(channel)s, w, 230.2, w / 230.2, counter FROM (
        SELECT *, 1000 + coalesce(sum(w) OVER (ORDER BY t ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) / 60 AS counter
        FROM (SELECT t, m, ago, ({watts})::float AS w FROM generate_series(date_trunc('minute', {since}), {until}, '1 minute') t,
              LATERAL (SELECT (date_part('epoch', t - date_trunc('minute', {since})) / 60)::int AS m,
                              (date_part('epoch', date_trunc('minute', now()) - t) / 60)::int AS ago) x) r) r WHERE {kept}"""


def put_rows(
    database,
    channel,
    watts,
    since="now() - INTERVAL '20 h'",
    until="now()",
    kept="true",
    device=HOUSE,
):
    with psycopg.connect(database) as conn:
        statement = ROWS.format(
            watts=watts.replace("%", "%%"),
            since=since,
            until=until,
            kept=kept.replace("%", "%%"),
        )
        conn.execute(statement, {"device": device, "channel": channel})


def put_house(database):
    """A pump that runs since 14 minutes, and for an hour was not heard; a heater that is off since 90; a silent fridge."""
    pump = "CASE WHEN ago <= 14 OR m % 200 < 37 AND ago > 60 THEN 812.3 ELSE 0 END"
    put_rows(database, PUMP, pump, kept="ago NOT BETWEEN 301 AND 360")
    put_rows(
        database,
        HEATER,
        "CASE WHEN ago > 90 AND m % 250 < 125 THEN 1850.7 ELSE 1.5 END",
    )
    put_rows(
        database,
        FRIDGE,
        "CASE WHEN m % 40 < 12 THEN 90.4 ELSE 2 END",
        until="now() - INTERVAL '3 h'",
    )
    names = [
        f"('{HOUSE}', '{key}', '{name}')"
        for key, name in ((PUMP, "Well pump"), (HEATER, "Heater"))
    ]
    execute(
        database,
        f"INSERT INTO channel_names (device_id, channel, name) VALUES {','.join(names)}",
    )


def query(database, question, *values):
    with psycopg.connect(database) as conn:
        conn.execute(f"SET TimeZone = '{ZONE}'")
        return conn.execute(question, values).fetchall()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser():
    async with api.async_playwright() as playwright:
        started = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=QUIET.split()
        )
        yield started
        await started.close()


@pytest_asyncio.fixture(loop_scope="module")
async def look(browser):
    """Opens pages. Whatever a test does: no message in the console, no error, no dialog, no request to another host."""
    contexts, seen = [], []

    async def open_page(running, query="", link=None, own_clock=False, **options):
        given = {
            "locale": "en-GB",
            "timezone_id": ZONE,
            "viewport": {"width": 1280, "height": 900},
        } | options
        contexts.append(await browser.new_context(**given))
        page, own = await contexts[-1].new_page(), f"http://127.0.0.1:{running.port}/"
        page.set_default_timeout(15_000)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((own, "data:,")) or seen.append(request.url)
            ),
        )
        page.on(
            "dialog",
            lambda dialog: (
                seen.append(dialog.message),
                asyncio.ensure_future(dialog.dismiss()),
            ),
        )
        if own_clock:
            await page.clock.install()
        await page.goto(link or f"{own}dashboard?token=look{query}")
        await settled(page)
        return page

    open_page.seen = seen
    yield open_page
    for context in contexts:
        await context.close()
    assert seen == []


@pytest.fixture
def start(collectors, database):
    return lambda **env: collectors(**{"DATABASE_URL": database, "DASHBOARD_TOKEN": "look", "THROTTLE_INTERVAL_SECONDS": "60"} | env).ready()  # fmt: skip


@pytest_asyncio.fixture(loop_scope="module")
async def running(start, database):
    started = await start()
    put_house(database)
    return started


FRAME = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


async def settled(page):
    """Everything is asked, answered and drawn."""
    await page.evaluate(FRAME)
    await page.wait_for_selector("main[aria-busy=false]")
    await page.evaluate(FRAME)


async def in_module(page, name, expression):
    """The value of an expression on what a module of the page exports."""
    return await page.evaluate(
        f"import('./page/{name}.js').then(module => module.{expression})"
    )


def plain(found):
    return re.sub(r"\s+", " ", found).strip()


async def text(page, selector):
    return plain(await page.locator(selector).first.inner_text())


async def texts(page, selector):
    return [plain(found) for found in await page.locator(selector).all_text_contents()]


async def cells(page, table):
    found = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    return [
        list(map(plain, row))
        for row in await page.locator(f"{table} tbody tr").evaluate_all(found)
    ]


async def reload(page):
    await page.reload()
    await settled(page)


def chosen(page):
    """What the URL says."""
    return chosen_in(page.url)


def chosen_in(url):
    return {key: value for key, (value,) in parse_qs(urlsplit(url).query).items()}


def zoomed(page):
    return [datetime.fromisoformat(end) for end in chosen(page)["zoom"].split("/")]


def clock(t):
    return f"{t.astimezone(ZoneInfo(ZONE)):%H:%M}"


def length(seconds):
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02}"


def kwh(wh):
    return (
        f"{wh / 1000:.1f}" if wh >= 95 else f"{wh / 1000:.3f}".rstrip("0").rstrip(".")
    )


async def drag(page, picture, start, end):
    """From one share of the chart's width to another."""
    box = await picture.bounding_box()
    at, y = (
        [box["x"] + 50 + share * (box["width"] - 60) for share in (start, end)],
        box["y"] + 40,
    )
    await page.mouse.move(at[0], y)
    await page.mouse.down()
    await page.mouse.move(sum(at) / 2, y)
    await page.mouse.move(at[1], y)
    await page.mouse.up()
    await settled(page)


async def test_the_link_of_the_log_shows_the_numbers_of_the_functions(
    start, database, look
):
    running = await start(DASHBOARD_TOKEN="")
    since, until = (
        "2026-10-24 00:00 Europe/Paris",
        "2026-10-27 00:00 Europe/Paris",
    )  # the 25th has 25 hours
    begin, end = (
        "'2026-10-23 21:45+00'::timestamptz",
        "'2026-10-27 00:00+00'::timestamptz",
    )
    put_rows(
        database,
        PUMP,
        "CASE WHEN m % 200 < 37 THEN 812.3 ELSE 0 END",
        begin,
        end,
        "m NOT BETWEEN 700 AND 739",
    )
    put_rows(
        database,
        HEATER,
        "CASE WHEN m % 470 BETWEEN 100 AND 200 THEN 1850.7 + m % 7 ELSE 1.5 END",
        begin,
        end,
    )
    (link,) = re.findall(r"look at: (http://\S+)", running.log)
    page = await look(running, link=f"{link}&from=2026-10-24T00:00&to=2026-10-27T00:00")

    runs = query(database, "SELECT channel, started_at, ended_at, energy_wh, mean_w, max_w, mean_a, median_v, complete FROM power_cycles(%s, %s) ORDER BY 2 DESC", since, until)  # fmt: skip
    shown = await cells(page, "#runs")
    assert len(runs) == len(shown) > 30
    for run, (channel, first, last, *values) in zip(runs, shown, strict=True):
        name, started, ended, wh, mean, most, amperes, volts, complete = run
        assert (channel, re.search(r"\d\d:\d\d", first)[0], re.search(r"\d\d:\d\d", last)[0]) == (name, clock(started), clock(ended))  # fmt: skip
        assert values == [length(ended.timestamp() - started.timestamp()), kwh(wh), f"{mean:,.0f}", f"{most:,.0f}", f"{amperes:.2f}", f"{volts:.0f}"]  # fmt: skip
        assert ("began earlier" in first) == (
            not complete and clock(started) == "00:00"
        )
    assert (await text(page, "#runs tfoot th")) == f"Total · {len(runs)} runs"
    for link in ("#runscsv", "#runsexcel"):
        answer = await page.request.get(
            await page.locator(link).evaluate("a => a.href")
        )
        assert answer.ok and (await answer.text()).count("\n") == len(runs) + 1

    await page.locator("#daytable summary").click()
    days = query(database, "SELECT sum(energy_wh), sum(energy_wh) FILTER (WHERE channel = 'switch:0') FROM energy_by_day(%s, %s, %s) GROUP BY day ORDER BY day", since, until, ZONE)  # fmt: skip
    assert [row[1:3] for row in await cells(page, "#energy")] == [
        [kwh(total), kwh(pump)] for total, pump in days
    ]
    assert len(
        days
    ) == 3 and f"total {kwh(sum(total for total, _ in days))} kWh" in await text(
        page, "#energyrange"
    )

    missing = query(database, "SELECT channel, first_row, last_row, rows, missing, longest_gap, resets FROM coverage(%s, %s) ORDER BY 1", since, until)  # fmt: skip
    for row, (channel, first, last, *values) in zip(
        missing, await cells(page, "#coverage"), strict=True
    ):
        assert (channel, first[-5:], last[-5:]) == (
            row[0],
            clock(row[1]),
            clock(row[2]),
        )
        assert values == [
            f"{row[3]:,}",
            str(row[4]),
            length(row[5].total_seconds()) if row[5] else "–",
            str(row[6]),
        ]
    share = missing[0][3] / (missing[0][3] + missing[0][4])
    assert (
        await texts(page, ".share")
        == [f"{int(share * 1000) / 10:g} % of minutes", "100 % of minutes"]
        and share < 1
    )


@pytest.mark.parametrize(
    ("system", "zone", "asked"),
    [
        ("Etc/Unknown", "Etc/Unknown", "UTC"),
        ("GMT+2", "+02:00", "UTC-2:0"),
        ("GMT-3:30", "-03:30", "UTC+3:30"),
    ],
)
async def test_in_a_zone_that_the_database_does_not_know_there_is_energy(
    start, database, look, system, zone, asked
):
    running = await start()
    begin, end = "'2026-10-23 00:00+00'::timestamptz", "'2026-10-27 00:00+00'"
    put_rows(database, PUMP, "CASE WHEN m % 200 < 37 THEN 812.3 ELSE 0 END", begin, end)
    period = "&from=2026-10-24T00:00&to=2026-10-26T00:00"
    page = await look(running, period, timezone_id=system)
    own = "Intl.DateTimeFormat().resolvedOptions().timeZone"
    assert await page.evaluate(own) == zone
    since, until = await page.evaluate(
        "['2026-10-24', '2026-10-26'].map(day => new Date(`${day}T00:00`).toJSON())"
    )
    days = query(database, "SELECT sum(energy_wh) FROM energy_by_day(%s, %s, %s) GROUP BY day ORDER BY day", since, until, asked)  # fmt: skip
    assert len(days) == 2
    await expect(page.locator("#energyrange")).to_contain_text(
        f"total {kwh(sum(total for (total,) in days))} kWh"
    )
    for link in ("#runsexcel", "#energycsv"):
        href = await page.locator(link).evaluate("a => a.href")
        assert chosen_in(href)["zone"] == asked and (await page.request.get(href)).ok
    # Where the database had to be asked, the browser's console says so, but not again.
    refused = len(look.seen)
    assert (refused > 0) == (asked != "UTC"), look.seen
    await in_module(page, "questions", "refresh(true)")
    assert len(look.seen) == refused
    look.seen.clear()


async def test_it_says_what_runs_now_since_when_and_what_it_used(
    running, database, look
):
    page = await look(running)
    used = dict(
        query(
            database,
            "SELECT channel, sum(energy_wh) FROM energy_by_day(now() - INTERVAL '1 day') GROUP BY 1",
        )
    )
    runs = {channel: (count, time.total_seconds()) for channel, count, time in query(database, "SELECT channel, count(*), sum(ended_at - started_at) FROM power_cycles(now() - INTERVAL '1 day') GROUP BY 1")}  # fmt: skip
    ends = dict(
        query(database, "SELECT channel, max(ended_at) FROM power_cycles() GROUP BY 1")
    )
    last = dict(query(database, "SELECT channel, timestamp FROM newest_rows()"))
    assert await texts(page, ".name") == ["Well pump", "Heater", FRIDGE]
    for channel, line in zip(
        (PUMP, HEATER, FRIDGE), await texts(page, ".used"), strict=True
    ):
        count, seconds = runs[channel]
        assert (
            line
            == f"last 24 hours: {kwh(used[channel])} kWh · {count} runs, {length(seconds)}"
        )
    pump, heater, fridge = await texts(page, ".state")
    assert re.fullmatch("running for 1[4-6] min", pump)
    assert heater.startswith("off since ") and heater.endswith(clock(ends[HEATER]))
    assert fridge.startswith("no data since ") and fridge.endswith(
        clock(last[FRIDGE] + timedelta(minutes=1))
    )
    assert await texts(page, ".now") == ["812 W", "1.5 W", "–"]
    assert (await texts(page, "#runs tbody td:nth-child(3)"))[0] == "still running"
    since = clock(last[FRIDGE] + timedelta(minutes=1))
    assert re.fullmatch(
        rf"1 of 3 silent, since (yesterday )?{since} · \d\d:\d\d",
        await text(page, "#health"),
    )


async def test_a_gap_is_hatched_and_no_line_crosses_it(running, look):
    page = await look(running)
    strip = page.locator(".strip").first
    box = (
        await strip.locator("rect.gap").nth(1).bounding_box()
    )  # the first is before the first row
    path = await strip.locator("path.mean").get_attribute("d")
    left = (await strip.locator("svg.picture").bounding_box())["x"]
    pieces = [
        [float(x) for x in re.findall(r"[MH]([-\d.]+)", piece)]
        for piece in re.findall("M[^M]+", path)
    ]
    assert await strip.locator("rect.gap").count() == 2 and len(pieces) == 2
    assert pieces[0][-1] == pytest.approx(box["x"] - left, abs=2)
    assert pieces[1][0] == pytest.approx(box["x"] + box["width"] - left, abs=2)
    assert box["width"] == pytest.approx(1120 / 24, abs=4)
    await page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    assert re.search(
        r"no data for (≈ )?(1 h 00|5[89] min|1 h 02)$",
        await text(page, ".strip .readout"),
    )


async def test_where_rows_are_kept_only_while_it_runs_the_rest_is_off(
    start, database, look
):
    running = await start(MIN_POWER_W="20")
    put_rows(database, PUMP, "CASE WHEN m % 200 < 37 AND ago > 60 THEN 812.3 ELSE 0 END", "now() - INTERVAL '25 h'", kept="(m % 200 < 38 AND ago > 60 OR ago = 60) AND m % 200 NOT BETWEEN 10 AND 24")  # fmt: skip
    page = await look(running)
    assert (await text(page, ".state")).startswith("off since ") and await text(
        page, ".now"
    ) == "0 W"
    assert await page.locator("#floor").input_value() == "20"
    gaps = [
        await gap.bounding_box() for gap in await page.locator(".strip rect.gap").all()
    ]
    assert 6 <= len(gaps) <= 8 and all(
        gap["width"] < 1120 * 20 / 1440 for gap in gaps
    )  # the holes within its runs
    await page.mouse.move(gaps[1]["x"] - 50, gaps[1]["y"] + 20)
    assert (await text(page, ".readout")).endswith(
        "off (rows are kept only while it runs)"
    )


async def test_a_period_is_in_the_url_and_in_the_titles_and_survives_a_reload(
    running, look
):
    page = await look(running)

    async def shows(period, pressed, **state):
        for settle in (settled, reload):
            await settle(page)
            assert {key: chosen(page).get(key) for key in ("days", "from", "to")} == {"days": None, "from": None, "to": None} | state  # fmt: skip
            titles = [
                await text(page, "#period"),
                await text(page, "#runsrange"),
                (await page.title()).split(" · ")[0],
            ]
            assert all(
                re.fullmatch(period, title, re.IGNORECASE) for title in titles
            ), titles
            assert len({title.lower() for title in titles}) == 1
            assert await texts(page, "#periods [aria-pressed=true]") == pressed

    await shows("last 24 hours", ["24 h"], days="1")
    now = datetime.now(ZoneInfo(ZONE))
    assert (await text(page, "#range"))[-5:] in (
        clock(now),
        clock(now - timedelta(minutes=1)),
    )
    ticks = await texts(page, ".strip:first-child .grid text[text-anchor=middle]")
    assert len(ticks) >= 6 and all(
        re.fullmatch(r"\d\d:00|\d+ \w+", tick) for tick in ticks
    )
    await page.get_by_role("button", name="45 d", exact=True).click()
    await shows("last 45 days", ["45 d"], days="45")
    for field, value in (("from", "2026-10-24T12:00"), ("to", "2026-10-25T13:30")):
        await page.locator(f"#{field}").fill(value)
    await expect(page).to_have_url(re.compile("to=2026"))
    await shows(
        r".*24.* 12:00 – .*25.* 13:30",
        [],
        **{"from": "2026-10-24T12:00", "to": "2026-10-25T13:30"},
    )
    await page.locator("#to").fill("2026-10-23T00:00")
    await expect(page.locator("#notice")).to_have_text(
        "the start must be before the end"
    )
    assert chosen(page)["to"] == "2026-10-25T13:30"
    await page.get_by_role("button", name="24 h", exact=True).click()
    await shows("last 24 hours", ["24 h"], days="1")


async def test_a_click_on_a_column_sorts_the_runs(running, look):
    page = await look(running)

    def minutes(shown):
        return sum(
            int(part) * unit
            for part, unit in zip(
                reversed(re.findall(r"\d+", shown)), (1, 60), strict=False
            )
        )

    up, down = "ascending", "descending"
    for name, number, value, ways in (
        ("channel", 1, str.lower, (up, down)), ("meanW", 6, lambda shown: float(shown.replace(",", "")), (down, up)),
        ("kWh", 5, float, (down, up)), ("duration", 4, minutes, (down, up)),
    ):  # fmt: skip
        for way in ways:
            await page.locator(f"#runs th[data-word={name}] button").click()
            await settled(page)
            head = page.locator("#runs th[aria-sort]")
            assert (
                await head.get_attribute("data-word"),
                await head.get_attribute("aria-sort"),
            ) == (name, way)
            values = [value(row[number - 1]) for row in await cells(page, "#runs")]
            assert (
                values == sorted(values, reverse=way == down) and len(set(values)) > 2
            )
    assert chosen(page)["sort"] == "duration"
    await reload(page)
    assert (
        await page.locator("#runs th[aria-sort=ascending]").get_attribute("data-word")
        == "duration"
    )


AUGUST = "'2025-08-01 00:00 Europe/Paris'::timestamptz"
OCTOBER = "'2025-09-30 23:59 Europe/Paris'"


def used_in(database, month):
    """The kWh of the pump in a month of 2025, as the page writes them."""
    first = f"2025-{month:02}-01 00:00 {ZONE}"
    end = f"2025-{month + 1:02}-01 00:00 {ZONE}"
    ((wh,),) = query(
        database,
        "SELECT sum(energy_wh) FROM energy_by_day(%s, %s, %s)",
        *(first, end, ZONE),
    )
    return kwh(wh)


async def test_arrows_go_from_month_to_month_and_back_goes_back(start, database, look):
    running = await start()
    watts = "CASE WHEN m % 1440 < 60 THEN CASE WHEN m < 44640 THEN 1000 ELSE 1120 END ELSE 0 END"
    put_rows(database, PUMP, watts, AUGUST, OCTOBER)
    page = await look(running, "&period=month&at=2025-09-01")

    async def shows(title, month, compared):
        assert [await text(page, "#period"), await text(page, "#periodname")] == [
            title
        ] * 2
        assert (await page.title()).startswith(title)
        used = await text(page, ".used")
        assert used.startswith(f"{title}: {used_in(database, month)} kWh · ")
        assert await text(page, ".compared") == compared
        assert f"total {used_in(database, month)} kWh" in await text(
            page, "#energyrange"
        )

    september = ("September 2025", 9, "▲ 8 % on August 2025")
    # It has nothing before it.
    august = ("August 2025", 8, "")
    await shows(*september)
    await page.get_by_role("button", name="earlier").click()
    await settled(page)
    await shows(*august)
    assert chosen(page)["at"] == "2025-08-01"
    await reload(page)
    await shows(*august)
    await page.get_by_role("button", name="day", exact=True).click()
    await settled(page)
    assert await page.get_by_role("button", name="later").is_disabled()
    await page.go_back()
    await settled(page)
    await shows(*august)
    await page.go_back()
    await settled(page)
    await shows(*september)
    await page.go_forward()
    await settled(page)
    await page.get_by_role("button", name="later").click()
    await settled(page)
    await shows(*september)


async def test_nothing_is_compared_with_a_month_that_lacks_minutes(
    start, database, look
):
    running = await start()
    # 900 of August's 44,640 minutes are missing, then 880.
    put_rows(database, PUMP, "100", AUGUST, OCTOBER, "m NOT BETWEEN 1000 AND 1899")
    page = await look(running, "&period=month&at=2025-09-01")
    assert await text(page, ".compared") == ""
    execute(database, "DELETE FROM power_logs")
    put_rows(database, PUMP, "100", AUGUST, OCTOBER, "m NOT BETWEEN 1000 AND 1879")
    await in_module(page, "questions", "refresh(true)")
    await settled(page)
    assert await text(page, ".compared") == "▼ 3 % on August 2025"


@pytest.mark.parametrize(
    ("unit", "now", "before"),
    [
        ("day", "2026-03-29T14:30", ("2026-03-28T00:00", "2026-03-28T14:30")),
        ("week", "2026-10-28T09:00", ("2026-10-19T00:00", "2026-10-21T09:00")),
        ("month", "2026-03-30T08:00", ("2026-02-01T00:00", "2026-03-01T00:00")),
        ("month", "2026-11-10T14:00", ("2026-10-01T00:00", "2026-10-10T14:00")),
        ("year", "2026-11-10T14:00", ("2025-01-01T00:00", "2025-11-10T14:00")),
    ],
)
async def test_a_period_that_goes_on_is_compared_with_the_same_stretch_before(
    running, look, unit, now, before
):
    page = await look(running)
    found = await page.evaluate(
        """async ([unit, now]) => {
            const { state, moveFrame, frameBefore } = await import("./page/state.js");
            const { followServer } = await import("./page/time.js");
            followServer(Date.parse(now));
            state.unit = unit;
            moveFrame();
            const { since, until } = frameBefore();
            return [since, until].map((t) => Math.round(t / 60000));
        }""",
        [unit, now],
    )
    expected = [
        datetime.fromisoformat(end).replace(tzinfo=ZoneInfo(ZONE)) for end in before
    ]
    assert found == [round(end.timestamp() / 60) for end in expected]


async def test_a_year_has_a_bar_a_month_and_a_click_on_one_opens_it(
    start, database, look
):
    running = await start()
    put_rows(database, PUMP, "100", AUGUST, OCTOBER)
    page = await look(running, "&period=year&at=2025-06-15")
    assert await text(page, "#energytitle") == "Energy per month"
    await page.locator("#daytable summary").click()
    months = [row[:2] for row in await cells(page, "#daysbox")]
    assert len(months) == 12 and months[7:10] == [
        ["August 2025", used_in(database, 8)],
        ["September 2025", used_in(database, 9)],
        ["October 2025", "–"],
    ]
    href = await page.locator("#energycsv").evaluate("a => a.href")
    lines = (await (await page.request.get(href)).text()).splitlines()
    assert len(lines) == 3 and "2025-08-01" in lines[1]
    await page.locator("#days .whole").nth(7).click()
    await settled(page)
    assert await text(page, "#period") == "August 2025"
    assert await text(page, "#energytitle") == "Energy per day"
    await page.locator("#days .whole").nth(9).click()
    await settled(page)
    assert await text(page, "#periodname") == "10 Aug 2025"
    for title in ("August 2025", "2025"):
        await page.go_back()
        await settled(page)
        assert await text(page, "#period") == title


async def test_each_gap_is_named_and_seen_however_short(start, database, look):
    running = await start()
    kept = "m NOT BETWEEN 1000 AND 1119"
    put_rows(database, PUMP, "100", AUGUST, OCTOBER, kept)
    put_rows(database, HEATER, "100", AUGUST, OCTOBER, f"{kept} AND m <> 5000")
    execute(
        database,
        "UPDATE power_logs SET energy_total_wh = energy_total_wh - 22800"
        " WHERE channel = 'switch:1' AND timestamp >= '2025-08-10 00:00+00'",
    )
    page = await look(running, "&period=month&at=2025-08-01")
    assert await texts(page, "#gaps li") == [
        "10 Aug 2025, 02:00 · counter reset · switch:1",
        "4 Aug 2025, 11:20 – 11:21 · no data for 1 min · switch:1",
        "1 Aug 2025, 16:40 – 18:40 · no data for 2 h 00 · all channels",
    ]
    widths = [
        (await gap.bounding_box())["width"]
        for gap in await page.locator(".strip .lines .gap").all()
    ]
    assert len(widths) == 3 and min(widths) >= 2
    # Beneath the bars of the 1st and the 4th.
    assert await page.locator("#days .gap").count() == 2
    box = await page.locator("svg.picture").first.bounding_box()
    gap = await page.locator(".strip .lines .gap").first.bounding_box()
    await page.mouse.move(gap["x"] + gap["width"] / 2, box["y"] + 30)
    assert "no data for 2 h 00" in await text(page, ".readout")


async def test_runs_are_asked_for_92_days_at_most_and_the_page_says_so(running, look):
    page = await look(running, "&from=2025-01-01T00:00")
    assert "runs are shown for 92 days at most" in await text(page, "#runs")
    assert await page.locator("#runsbox").is_hidden()
    assert "run" not in await text(page, ".used")
    assert "running for 1" in await text(page, ".state")
    await page.get_by_role("button", name="24 h", exact=True).click()
    await settled(page)
    assert len(await cells(page, "#runs")) > 1


async def test_a_drag_zooms_and_there_is_a_way_back(running, look):
    page = await look(running)
    picture = page.locator("svg.picture").first
    wide = await picture.locator("path.mean").get_attribute("d")
    for back in (
        lambda: page.keyboard.press("Escape"),
        lambda: page.get_by_role("button", name="whole period").click(),
        lambda: picture.dblclick(position={"x": 300, "y": 40}),
    ):
        now = datetime.now(ZoneInfo("UTC"))
        await drag(page, picture, 0.5, 0.75)
        for end, hours in zip(zoomed(page), (12, 6), strict=True):
            assert abs(now - timedelta(hours=hours) - end) < timedelta(minutes=3)
            assert clock(end) in await text(page, "#zoomtext")
        fine = await picture.locator("path.mean").get_attribute("d")
        assert (
            fine != wide
            and await in_module(page, "questions", "answers.fine.step") == 60_000
        )  # from a question of its own
        await reload(page)
        assert await page.locator("#zoombar").is_visible() and "zoom" in chosen(page)
        await back()
        await settled(page)
        assert await page.locator("#zoombar").is_hidden() and "zoom" not in chosen(page)


async def test_keys_on_a_chart_show_values_and_zoom(running, look):
    page = await look(running)
    picture = page.locator("svg.picture").first
    await picture.focus()
    await page.keyboard.press("ArrowLeft")
    now = await text(page, ".strip .readout")
    assert re.search(
        r"\d\d:\d\d.* · mean 812 W · maximum 812 W · run \d\d:\d\d – ", now
    )
    assert await text(page, "#live") == now
    for key in ("ArrowLeft", "Shift+ArrowLeft", "ArrowRight"):
        await page.keyboard.press(key)
    assert "mean 0 W" in await text(page, ".strip .readout")
    _, heater, fridge = await texts(page, ".readout")
    assert heater == "1.5 W" and re.match("no data for (≈ )?[23] h", fridge)
    await page.keyboard.press("+")
    await settled(page)
    first, last = zoomed(page)
    assert abs(last - first - timedelta(hours=12)) < timedelta(minutes=3)
    await page.keyboard.press("-")
    await settled(page)
    assert "zoom" not in chosen(page)
    await page.keyboard.press("Tab")
    assert await texts(page, ".readout") == ["", "", ""]


EN = ["en", "running for 1", "off since ", "no data since ", "last 24 hours: ", "Energy per day", "Runs", "What is missing", "Start", "Duration", "Mean W", "from", "24 h", "45 d", "1.5 W"]  # fmt: skip
FR = ["fr", "en marche depuis 1", "arrêté ", "plus de données après ", "24 dernières heures : ", "Énergie par jour", "Cycles", "Ce qui manque", "Début", "Durée", "W moyen", "de", "24 h", "45 j", "1,5 W"]  # fmt: skip


async def test_it_speaks_the_language_of_the_browser_or_the_one_that_is_chosen(
    running, look
):
    async def speaks(page, words):
        await settled(page)
        assert await page.locator("html").get_attribute("lang") == words[0]
        everything = plain(await page.locator("body").inner_text())
        assert [word for word in words[1:] if word not in everything] == []
        # "7 h 05" would be a duration.
        assert re.search(r"\d\d:\d\d$", await text(page, "#health"))

    for locale, words in (("fr-CA", FR), ("de-DE", EN), ("en-GB", EN)):
        page = await look(running, locale=locale)
        await speaks(page, words)
        assert "lang" not in chosen(page)
    await page.get_by_role("button", name="Français").click()
    await speaks(page, FR)
    await page.reload()
    await speaks(page, FR)
    assert chosen(page)["lang"] == "fr"
    await page.get_by_role("button", name="English").click()
    await speaks(page, EN)


CONTRASTS = """() => {
    const parse = colour => colour.match(/[\\d.]+/g).map(Number), light = c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
    const shine = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
    const behind = el => { const c = parse(getComputedStyle(el).backgroundColor); return c[3] === 0 && el.parentElement ? behind(el.parentElement) : c; };
    return [...document.querySelectorAll("h1, h2, h3, p, button, label span, input, summary, th, td, .now, .state, .used, .compared, .share, a, svg text, .legend li")].map(el => {
        const style = getComputedStyle(el), [a, b] = [shine(parse(el.closest("svg") ? style.fill : style.color)), shine(behind(el))].sort((a, b) => b - a);
        return [(a + 0.05) / (b + 0.05), el.outerHTML.slice(0, 80)];
    });
}"""


async def test_it_fits_a_phone_and_is_dark_where_the_system_is(running, database, look):
    long = "A name that is too long for a phone, and ends " + "withoutablank" * 8
    execute(
        database, f"UPDATE channel_names SET name = '{long}' WHERE channel = 'switch:1'"
    )
    backgrounds = {}
    for scheme, locale in (("light", "en-GB"), ("dark", "fr-FR")):
        page = await look(running, viewport={"width": 360, "height": 740}, color_scheme=scheme, locale=locale, has_touch=True)  # fmt: skip
        backgrounds[scheme] = await page.evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        assert [
            found for found in await page.evaluate(CONTRASTS) if found[0] < 4.5
        ] == []
        for summary in await page.locator("summary").all():
            await summary.click()
        await page.locator("svg.picture").first.tap(position={"x": 250, "y": 30})
        assert re.search("mean|moyenne", await text(page, ".strip .readout"))
        await drag(page, page.locator("svg.picture").first, 0.2, 0.6)
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        small = await page.evaluate("[...document.querySelectorAll('button')].filter(el => el.checkVisibility() && (el.offsetHeight < 24 || el.offsetWidth < 24)).map(el => el.outerHTML)")  # fmt: skip
        assert small == []
    assert len(set(backgrounds.values())) == 2


async def test_names_of_others_are_only_ever_text(start, database, look):
    running = await start()
    bad = ["<img src=x onerror=alert(1)>", '"><script>alert(2)</script>']
    channel, name, device_name = (
        "<img src onerror=x>",
        "</title><b onclick=alert(3)>&amp;",
        "<svg/onload=alert(4)>",
    )
    for device_id in bad:
        put_rows(database, channel, "500", device=device_id)
        put_rows(
            database, PUMP, "m % 200", device=device_id, until="now() - INTERVAL '1 h'"
        )
    execute(database, f"INSERT INTO channel_names (device_id, channel, name) VALUES ('{bad[0]}', '{PUMP}', '{name}'), ('{bad[0]}', '', '{device_name}')")  # fmt: skip
    page = await look(running)
    labels = [
        f"{device_name} · {channel}",
        f"{device_name} · {name}",
        f"{bad[1]} · {channel}",
        f"{bad[1]} · {PUMP}",
    ]
    assert sorted(await texts(page, ".name")) == sorted(labels)
    assert await texts(page, "#device option") == ["all devices", bad[1], device_name]
    for summary in await page.locator("summary").all():
        await summary.click()
    await page.locator(".whole").last.hover()
    await page.locator("svg.picture").first.hover()
    await page.locator("#device").select_option(bad[0])
    await reload(page)
    assert chosen(page)["device"] == bad[0] and await texts(page, ".name") == [
        channel,
        name,
    ]
    assert device_name in await page.title()
    (link,) = parse_qs(
        urlsplit(await page.locator("#runscsv").get_attribute("href")).query
    )["device"]
    assert link == bad[0]
    assert (
        await page.locator("img, b, svg[onload], script").count() == 1
    )  # its own script


async def test_two_houses_of_one_name_are_told_apart(start, database, look):
    running = await start()
    for device_id in ("shelly-1", "shelly-2", "shelly-3"):
        put_rows(database, PUMP, "500", device=device_id)
    names = (
        "('shelly-1', '', 'Farm'), ('shelly-2', '', 'Farm'), ('shelly-3', '', 'Mill')"
    )
    execute(
        database,
        f"INSERT INTO channel_names (device_id, channel, name) VALUES {names}",
    )
    page = await look(running)
    options = ["all devices", "Farm (shelly-1)", "Farm (shelly-2)", "Mill"]
    assert await texts(page, "#device option") == options
    assert await texts(page, ".name") == [
        f"{device} · switch:0" for device in options[1:]
    ]


async def test_before_the_first_row_it_says_what_to_paste_and_then_shows_the_row(
    start, database, look
):
    running = await start()
    page = await look(running, own_clock=True)
    assert (
        await text(page, "#empty h2")
        == "No rows yet: paste this into your Shelly, then reboot it"
    )
    assert (
        await page.locator("#url").input_value() == running.url
        and await page.locator("#power").is_hidden()
    )
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(database, 1)
        await page.clock.fast_forward(11_000)  # it asks each ten seconds
        await expect(page.locator(".now")).to_have_text("434\N{NO-BREAK SPACE}W")
    assert await page.locator("#empty").is_hidden() and await texts(page, ".name") == [
        "switch:0"
    ]


async def test_before_the_first_row_it_says_who_was_refused_and_why(start, look):
    running = await start(COLLECTOR_TOKEN="send")
    page = await look(running, own_clock=True)
    assert (
        await text(page, "#empty h2")
        == "No rows yet: paste the URL that shelly_collector.py --check shows into your Shelly, then reboot it"
    )
    assert await page.locator("#url").is_hidden()
    for path in ("/", "/wss", "/ws"):
        with pytest.raises(InvalidStatus):
            async with connect(running.url.removesuffix("/ws") + path):
                pass
    await page.clock.fast_forward(11_000)  # it asks each ten seconds
    await expect(page.locator("#refused li")).to_have_count(2)
    said = [line.partition(" · ")[2] for line in await texts(page, "#refused li")]
    assert said == [
        "127.0.0.1 was here: the URL lacks the right ?token=",
        "127.0.0.1 was here: the URL has /wss instead of /ws",
    ]


async def test_a_link_of_one_device_shows_that_device(start, database, look):
    running = await start(DASHBOARD_TOKEN="0123456789abcdef0123")
    for device_id in ("shelly-1", "shelly-2"):
        put_rows(database, PUMP, "500", device=device_id)
    _, link, _ = await run_script(running.folder, "--link", "shelly-2", **running.env)
    page = await look(running, link=link.strip())
    assert await texts(page, ".name") == ["switch:0"]
    assert await page.locator("#device").is_hidden()
    assert await text(page, "#title") == "shelly-2"
    assert await page.locator("#notice").is_hidden()


async def test_a_refresh_keeps_zoom_focus_scroll_and_an_open_table(
    running, database, look
):
    page = await look(running, own_clock=True, viewport={"width": 1280, "height": 500})
    await drag(page, page.locator("svg.picture").first, 0.6, 0.999)
    await page.locator("summary").first.click()
    await page.locator(".strip tbody tr").last.wait_for()
    await page.locator("svg.picture").nth(1).focus()
    await page.keyboard.press("ArrowLeft")
    await page.evaluate(
        "document.querySelector('.strip .box').scrollTop = 120; scrollTo(0, 222)"
    )
    state = """[scrollY, document.querySelector(".strip .box").scrollTop, document.activeElement.getAttribute("aria-label"),
        document.querySelectorAll("[open]").length, document.querySelectorAll(".readout")[1].textContent, location.search,
        document.getElementById("zoombar").checkVisibility(), document.querySelector(".strip .grid").textContent]"""
    before = await page.evaluate(state)
    assert (
        before[:2] == [222, 120]
        and before[2].startswith("Heater")
        and before[3] == 1
        and "1.5" in before[4]
        and before[6]
    )
    execute(database, "UPDATE power_logs SET apower_w = 555 WHERE channel = 'switch:0' AND timestamp > now() - INTERVAL '2 min'")  # fmt: skip
    assert (await text(page, ".now")) == "812 W"
    await page.clock.fast_forward(61_000)
    await expect(page.locator(".now").first).to_have_text("555\N{NO-BREAK SPACE}W")
    await settled(page)
    assert await page.evaluate(state) == before


async def test_a_database_that_is_away_is_said_in_words_and_what_was_there_stays(
    start, own_postgres, look
):
    running = await start(DATABASE_URL=own_postgres.url)
    async with device(running.url) as peer:
        await peer.send(minute_frame())
        await wait_for_rows(own_postgres.url, 1)
        page = await look(running)
        own_postgres.crash()
        await peer.send(minute_frame(channel=1))  # the writer notices
        await running.ready("unreachable")
        await in_module(page, "questions", "refresh(true) && null")
        await expect(page.locator("#health")).to_contain_text(
            "the database is away, rows are kept and will follow"
        )
        await expect(page.locator("#notice")).to_have_text(
            "the answer is late, asking again …"
        )
        assert await texts(page, ".now") == ["434 W"]
        own_postgres.start()
        await running.ready()
        await in_module(page, "questions", "refresh(true)")
        await expect(page.locator("#health")).to_contain_text("2 of 2 send")
        assert (
            await texts(page, ".now") == ["434 W", "434 W"]
            and await page.locator("#notice").is_hidden()
        )
    await running.stop()
    await in_module(page, "questions", "refresh(true)")
    await expect(page.locator("#health")).to_have_text("the collector does not answer")
    await expect(page.locator("#notice")).to_contain_text("shown is what came at ")
    running.env["DASHBOARD_TOKEN"] = "another"
    await (await running.again()).ready()
    await in_module(page, "questions", "refresh(true)")
    await expect(page.locator("#notice")).to_contain_text("lacks the right token")
    assert await texts(page, ".now") == ["434 W", "434 W"]
    assert look.seen and all(
        "Failed to load resource" in message for message in look.seen
    )
    look.seen.clear()


def fetch(running, path):
    """Headers and text of an answer without a token."""
    with urllib.request.urlopen(
        f"http://127.0.0.1:{running.port}{path}", timeout=5
    ) as response:
        return response.headers, response.read().decode()


async def test_the_code_of_the_page_needs_no_token_and_holds_no_secret(start):
    secrets = {
        "DASHBOARD_TOKEN": "look at me",
        "COLLECTOR_TOKEN": "send it",
        "PUBLIC_URL": "https://secret.example",
    }
    running = await start(**secrets, PRICE_PER_KWH="0.2516 EUR")
    headers, page = fetch(running, "/dashboard")
    policy = dict(
        part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; ")
    )
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'",
        "img-src": "data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    urls = re.findall(r'(?:src|href)="(.*?)"', page)
    files = sorted(urls[1:])
    assert urls[0] == "data:,"
    assert files == sorted(
        f"page/{file.name}"
        for file in (ROOT / "page").iterdir()
        if file.name != "index.html"
    )
    for text in (page, *(fetch(running, f"/{file}")[1] for file in files)):
        assert not re.search(
            r"0\.2516|@import|<style|style=|https?://(?!www\.w3\.org/2000/svg)", text
        )
        assert not [secret for secret in secrets.values() if secret in text]
    assert re.findall("<script.*?>", page) == [
        '<script type="module" src="page/main.js">'
    ]


async def test_with_a_wrong_token_the_page_says_so_and_nothing_else(running, browser):
    words = {
        "en-GB": "This link lacks the right token. The collector's owner finds the right link with shelly_collector.py --check.",
        "fr-FR": "Ce lien n'a pas le bon jeton. Le propriétaire du collecteur trouve le bon lien avec shelly_collector.py --check.",
    }
    for locale, said in words.items():
        for query in ("?token=wrong", "?token=", ""):
            page, asked = await browser.new_page(locale=locale), []
            page.on(
                "request",
                lambda request, asked=asked: asked.append(urlsplit(request.url).path),
            )
            await page.goto(f"http://127.0.0.1:{running.port}/dashboard{query}")
            await page.wait_for_selector("main[aria-busy=false]", state="attached")
            assert await text(page, "body") == said
            assert await page.locator("html").get_attribute("lang") == locale[:2]
            things = (
                "header",
                "section",
                "button",
                "select",
                "input",
                "a",
                "p:not(#notice)",
            )
            visible = ", ".join(f"{thing}:visible" for thing in things)
            assert await page.locator(visible).evaluate_all(
                "found => found.map(thing => thing.id)"
            ) == ["live"]
            assert [path for path in asked if "/page/" not in path] == [
                "/dashboard",
                "/data/settings.json",
            ]
            await page.context.close()


async def test_without_settings_it_says_why_and_asks_again(running, browser):
    page = await browser.new_page(locale="en-GB")
    tries = []

    async def answer(route):
        tries.append(route.request.url)
        if len(tries) == 1:
            await route.fulfill(status=503, body="Too much at a time.")
        elif len(tries) == 2:
            await route.abort()
        else:
            await route.continue_()

    await page.clock.install()
    await page.route("**/data/settings.json*", answer)
    await page.goto(f"http://127.0.0.1:{running.port}/dashboard?token=look")
    for said in ("the answer is late, asking again …", "the collector does not answer"):
        await expect(page.locator("#notice")).to_have_text(said)
        assert (
            await page.locator("header").is_hidden()
            and await page.locator("section:visible").count() == 0
        )
        await page.clock.fast_forward(5_000)
    await settled(page)
    assert await page.locator("#notice").is_hidden()
    assert await texts(page, ".name") == ["Well pump", "Heater", FRIDGE]
    await page.context.close()


class PathProxy:
    """A reverse proxy that has a collector under a path of its own, and nothing else."""

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.carry, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        await self.server.wait_closed()

    async def carry(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            if request.startswith(b"GET /shelly/"):
                there, back = await asyncio.open_connection("127.0.0.1", self.target)
                back.write(request.replace(b"/shelly/", b"/", 1))
                writer.write(
                    await there.read()
                )  # the collector closes after each answer
                back.close()
            else:
                writer.write(b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()


async def test_the_page_works_under_a_path_of_a_reverse_proxy(start, database, look):
    async with PathProxy() as proxy:
        running = await start(PUBLIC_URL=f"http://127.0.0.1:{proxy.port}/shelly")
        proxy.target = running.port
        page = await look(
            proxy, link=f"http://127.0.0.1:{proxy.port}/shelly/dashboard?token=look"
        )
        assert (
            await page.locator("#url").input_value()
            == f"ws://127.0.0.1:{proxy.port}/shelly/ws"
        )
        put_house(database)
        await reload(page)
        assert await texts(page, ".name") == ["Well pump", "Heater", FRIDGE]
        assert (await text(page, "#health")).startswith("1 of 3 silent, since ")
        answer = await page.request.get(
            await page.locator("#runscsv").evaluate("a => a.href")
        )
        assert answer.ok and "/shelly/data/cycles.csv" in answer.url
        await page.context.close()  # so that no connection is left open


async def test_costs_are_shown_and_the_floor_changes_what_runs(start, database, look):
    running = await start(PRICE_PER_KWH="0.2516 EUR")
    put_house(database)
    page = await look(running)
    for *_, used, paid, _, _, _, _ in await cells(page, "#runs"):
        assert float(paid.removeprefix("€")) == pytest.approx(
            float(used) * 0.2516, abs=0.0126 + 0.005
        )
    (wh,) = query(
        database, "SELECT sum(energy_wh) FROM power_cycles(now() - INTERVAL '1 day')"
    )[0]
    assert (await texts(page, "#runs tfoot td"))[1:3] == [
        kwh(wh),
        f"€{wh / 1000 * 0.2516:.2f}",
    ]
    assert re.search(r"kWh \(€\d+\.\d\d\) · \d+ run", await text(page, ".used"))
    for floor in (1000, 0.5):
        await page.locator("#floor").fill(str(floor))
        await expect(page).to_have_url(re.compile(f"floor={floor}"))
        runs = query(
            database,
            "SELECT FROM power_cycles(now() - INTERVAL '1 day', min_power_w => %s)",
            floor,
        )
        for settle in (settled, reload):
            await settle(page)
            assert await page.locator("#runs tbody tr").count() == len(runs)
            assert f"{len(runs)} run" in await text(page, "#runs tfoot th")
    assert (await texts(page, ".state"))[1].startswith("running for ")


METER = "shellypro3em-a0b1c2d3e4f5"
PHASES = {
    "em:0:a": "100 + m % 200",
    "em:0:b": "200 + m % 70",
    "em:0:c": "CASE WHEN ago < 2 THEN -50 ELSE 900 END",
}


def put_meter(database, kept=None, name="House ", **more):
    """A three-phase meter with a clamp; `kept` says which rows of a phase are there."""
    for channel, watts in (PHASES | {"em1:0": "40"}).items():
        put_rows(
            database,
            channel,
            watts,
            kept=(kept or {}).get(channel, "true"),
            device=METER,
            **more,
        )
    if name:
        says = [
            f"('{METER}', '{channel}', '{name}{channel[-1].upper()}')"
            for channel in PHASES
        ]
        execute(
            database,
            f"INSERT INTO channel_names (device_id, channel, device_says) VALUES {','.join(says)}",
        )


def power(shown):
    """Watts of the text that the page shows."""
    number, unit = shown.split()[:2]
    return float(number) * {"W": 1, "kW": 1000}[unit]


async def drawn(page):
    """What the chart of the sum stands on: mean power by bucket."""
    buckets = await in_module(
        page, "chart", "strips.values().next().value.plot.buckets"
    )
    return {int(row["bucket"] / 1000): row["mean_w"] for row in buckets}


async def test_the_sum_of_three_phases_has_a_strip_above_theirs(start, database, look):
    running = await start(PRICE_PER_KWH="")
    put_meter(database)
    page = await look(running)
    assert await texts(page, ".name") == [
        "House",
        "House A",
        "House B",
        "House C",
        "em1:0",
    ]
    classes = await page.locator(".strip").evaluate_all("found => found.map(strip => strip.className.split(' ').filter(name => /sum|phase/.test(name)).join())")  # fmt: skip
    assert classes == ["sum", "phase", "phase", "phase", ""]
    total, *phases = (found for (found,) in query(database, "SELECT apower_w FROM newest_rows() WHERE channel <> 'em1:0' UNION ALL SELECT sum(apower_w) FROM newest_rows() WHERE channel <> 'em1:0' ORDER BY 1 DESC"))  # fmt: skip
    assert -50 in phases and power((await texts(page, ".now"))[0]) == total
    assert (await texts(page, ".state"))[0] == "sum of 3 phases"
    ((used,),) = query(database, "SELECT sum(energy_wh) FROM energy_by_day(now() - INTERVAL '1 day') WHERE channel LIKE 'em:%%'")  # fmt: skip
    # Its runs are not computed, and not said.
    assert (await texts(page, ".used"))[0] == f"last 24 hours: {kwh(used)} kWh"

    step = await in_module(page, "questions", "answers.power.step") / 1000
    sums = query(database, "SELECT date_part('epoch', bucket), sum(mean_w) FROM power_series(now() - INTERVAL '24 h', now(), make_interval(secs => %s)) WHERE channel LIKE 'em:%%' GROUP BY 1", step)  # fmt: skip
    shown, sums = (
        await drawn(page),
        {int(bucket): pytest.approx(mean) for bucket, mean in sums},
    )
    newest = max(sums)  # a minute may have begun in between
    del sums[newest]
    assert (
        len(sums) > 200 and {t: mean for t, mean in shown.items() if t < newest} == sums
    )
    strip = page.locator(".strip").first
    assert (
        await strip.locator("path.band").get_attribute("d") == ""
        and await strip.locator("rect.run").count() == 0
    )
    assert len(
        re.findall("H", await strip.locator("path.mean").get_attribute("d"))
    ) == len(shown)

    picture = strip.locator("svg.picture")
    assert (await picture.get_attribute("aria-label")).startswith(
        "House, power over time"
    )
    await picture.focus()
    for _ in range(12):
        await page.keyboard.press("ArrowLeft")
    said, (one, two, three, _) = (
        await text(page, "#live"),
        (await texts(page, ".readout"))[1:],
    )
    assert (
        said == await text(page, ".readout")
        and "maximum" not in said
        and "run" not in said
    )
    parts = sum(power(found) for found in (one, two, three))
    assert power(said.split("mean ")[1]) == pytest.approx(parts, abs=7)
    await strip.locator("summary").click()
    await strip.locator("tbody tr").last.wait_for()
    *_, before, _ = await cells(page, ".strip")
    assert before[2] == "–" and power(before[1]) == pytest.approx(
        shown[sorted(shown)[-2]], abs=6
    )
    await page.keyboard.press("Escape")
    await drag(page, picture, 0.5, 0.75)
    assert (
        await in_module(page, "questions", "answers.fine.step") == 60_000
        and 355 <= len(await drawn(page)) <= 365
    )
    await in_module(page, "questions", "refresh(true)")
    assert (
        "zoom" in chosen(page)
        and await strip.locator("details").get_attribute("open") is not None
    )


async def test_the_sum_of_phases_is_counted_nowhere(start, database, look):
    running = await start()
    put_meter(database)
    page = await look(running)
    midnight = datetime.now(ZoneInfo(ZONE)).replace(
        hour=0, minute=0, second=0, microsecond=0
    ) - timedelta(days=1)
    ((total,),) = query(
        database,
        "SELECT sum(energy_wh) FROM energy_by_day(%s, now(), %s)",
        midnight,
        ZONE,
    )
    assert f"total {kwh(total)} kWh" in await text(page, "#energyrange")
    names = ["House A", "House B", "House C", "em1:0"]
    assert sorted(await texts(page, "#legend li")) == sorted(names)
    await page.locator("#daytable summary").click()
    await page.locator("#daysbox tbody tr").last.wait_for()
    assert (await texts(page, "#daysbox thead th"))[2:] == names
    used = [
        row[1] for row in await cells(page, "#daysbox") if row[1] != "–"
    ]  # yesterday may have no rows
    assert sum(map(float, used)) == pytest.approx(total / 1000, abs=0.11)
    assert [row[0] for row in await cells(page, "#coverage")] == names
    assert sorted({row[0] for row in await cells(page, "#runs")}) == names
    for link in ("#runscsv", "#energycsv"):
        answer = await page.request.get(
            await page.locator(link).evaluate("a => a.href")
        )
        assert {line.split(",")[1] for line in (await answer.text()).splitlines()[1:]} == {f'"{channel}"' for channel in (*PHASES, "em1:0")}  # fmt: skip


async def test_some_phases_are_never_shown_as_their_sum(start, database, look):
    running = await start()
    put_meter(
        database,
        {
            "em:0:b": "ago NOT BETWEEN 301 AND 420",
            "em:0:c": "ago > 180 AND ago NOT BETWEEN 601 AND 630",
        },
    )
    page = await look(running)
    ((last, kept, missing),) = query(database, "SELECT last_row, rows, missing FROM coverage(now() - INTERVAL '1 day') WHERE channel = 'em:0:b'")  # fmt: skip
    ((silent,),) = query(
        database, "SELECT max(timestamp) FROM power_logs WHERE channel = 'em:0:c'"
    )
    state = (await texts(page, ".state"))[0]
    assert re.match(r"sum of 3 phases · no data since ", state) and state.endswith(
        clock(silent + timedelta(minutes=1))
    )
    assert (await texts(page, ".now"))[0] == "–" and "–" not in (
        await texts(page, ".now")
    )[1:3]
    assert (await texts(page, ".share"))[0].startswith(
        f"{int(kept / (kept + missing) * 100)} % of minutes since "
    )
    shown, now = await drawn(page), last.timestamp()
    assert shown and all(mean > 1150 for mean in shown.values())
    assert not [
        t
        for t in shown
        if 301 < (now - t) / 60 < 419
        or 602 < (now - t) / 60 < 629
        or (now - t) / 60 < 179
    ]
    strip = page.locator(".strip").first
    assert (
        await strip.locator("rect.gap").count() == 4
    )  # before the first row, two holes, and since c is silent
    await drag(page, strip.locator("svg.picture"), 0.5, 0.9995)
    await strip.locator("summary").click()
    await strip.locator("tbody tr").last.wait_for()
    rows = await cells(page, ".strip")
    gaps = [row[1] for row in rows if len(row) == 2]
    assert gaps[-2] == "no data for 2 h 00" and re.fullmatch(
        r"no data for (2 h 5\d|3 h 0\d)", gaps[-1]
    )
    assert not [row for row in rows if len(row) == 4 and not row[1].startswith("1.")]


async def test_a_sum_of_phases_that_are_kept_only_while_they_run_says_nothing_false(
    start, database, look
):
    running = await start(MIN_POWER_W="20")
    off = "CASE WHEN ago > 240 THEN 500 ELSE 0 END"
    for channel, watts, kept in (
        ("em:0:a", "300", "true"),
        ("em:0:b", off, "ago >= 240"),
        ("em:0:c", "100", "true"),
    ):
        put_rows(database, channel, watts, kept=kept, device=METER)
    page = await look(running)
    assert await texts(page, ".now") == ["400 W", "300 W", "0 W", "100 W"]
    assert await text(page, ".state") == "sum of 3 phases" and not re.search(
        "no data|off", await text(page, ".strip")
    )
    strip = page.locator(".strip").first
    box = await strip.locator("svg.picture").bounding_box()
    await page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + 30)
    assert re.search(r" · –$", await text(page, ".readout"))
    shown, now = await drawn(page), datetime.now().timestamp()
    assert (
        sorted(shown.values())[1] == 900 and min(shown.values()) >= 400
    )  # the last bucket may hold b's closing row
    assert max(shown) < now - 235 * 60 and await strip.locator("rect.gap").count() <= 1


async def test_a_sum_has_the_name_of_its_phases_or_of_its_device(start, database, look):
    running = await start()
    put_meter(database, name="")
    page = await look(running)
    assert await texts(page, ".name") == ["em:0", "em:0:a", "em:0:b", "em:0:c", "em1:0"]
    execute(
        database,
        f"INSERT INTO channel_names (device_id, channel, device_says) VALUES ('{METER}', '', 'Barn')",
    )
    await reload(page)
    assert (await texts(page, ".name"))[:2] == ["Barn", "em:0:a"]
    names = [
        f"('{METER}', '{channel}', '{name}')"
        for channel, name in zip(PHASES, ("House A", "House B", "Solar"), strict=True)
    ]
    execute(
        database,
        f"INSERT INTO channel_names (device_id, channel, name) VALUES {','.join(names)}",
    )
    await reload(page)
    assert (await texts(page, ".name"))[:2] == ["Barn", "House A"]
    execute(
        database,
        "UPDATE channel_names SET name = 'House C' WHERE name = 'Solar'",
        "DELETE FROM power_logs WHERE channel = 'em:0:b'",
    )
    put_rows(database, "em1:1", "40", device=METER)  # two clamps have no sum
    put_rows(database, "em:0:a", "500", device=HOUSE)
    put_rows(database, "em:1:b", "500", device=HOUSE)
    await reload(page)
    assert await texts(page, ".name") == ["Barn · House", "Barn · House A", "Barn · House C", "Barn · em1:0", "Barn · em1:1", f"{HOUSE} · em:0:a", f"{HOUSE} · em:1:b"]  # fmt: skip
    assert (await texts(page, ".state"))[0] == "sum of 2 phases"
    await page.locator("#device").select_option(METER)
    await settled(page)
    assert await texts(page, ".name") == [
        "House",
        "House A",
        "House C",
        "em1:0",
        "em1:1",
    ]


async def test_energy_given_back_is_said_where_there_is_some(start, database, look):
    running = await start()
    put_meter(database)
    back = {"em:0:a": 500.0, "em:0:b": 0.0, "em:0:c": 312.5, "em1:0": None}

    async def answer(route):
        response = await route.fetch()
        # There are two days in the last 24 hours.
        rows, left = [], dict(back)
        for row in await response.json():
            given_back = left.pop(row["channel"], None)
            rows.append(row | {"energy_returned_wh": given_back})
        await route.fulfill(response=response, json=rows)

    for locale, words in (("en-GB", ["0.8 kWh given back", "0.5 kWh given back", "0.3 kWh given back"]), ("fr-FR", ["0,8 kWh rendus", "0,5 kWh rendus", "0,3 kWh rendus"])):  # fmt: skip
        page = await look(running, locale=locale)
        assert not re.search("given back|rendus", await text(page, "#strips"))
        await page.route("**/data/energy*.json?*", answer)
        await in_module(page, "questions", "refresh(true)")
        await settled(page)
        found = await texts(page, ".used")
        assert [found[index].split(" · ")[1] for index in (0, 1, 3)] == words
        assert not [
            line
            for line in (found[2], found[4])
            if re.search("given back|rendus", line)
        ]
    assert (await texts(page, ".state"))[0] == "somme de 3 phases"


async def test_a_plug_with_panels_costs_nothing_while_it_gives_back(
    start, database, look
):
    """Its counter counts both directions: 600 Wh given back are in both columns."""
    running = await start(DASHBOARD_TOKEN="", PRICE_PER_KWH="0.25 EUR")
    noon = "'2026-10-24 10:00+00'::timestamptz"
    put_rows(
        database, PUMP, "-600", noon, f"{noon} + INTERVAL '1 hour'", device="panels"
    )
    execute(
        database,
        "UPDATE power_logs SET energy_total_wh = 2000 - energy_total_wh,"
        " energy_returned_wh = 1000 - energy_total_wh",
    )
    (link,) = re.findall(r"look at: (http://\S+)", running.log)
    page = await look(running, link=f"{link}&from=2026-10-24T00:00&to=2026-10-25T00:00")
    ((*_, energy, cost, mean, most, _, _),) = await cells(page, "#runs")
    assert (energy, cost, mean, most) == ("0", "€0.00", "-600", "-600")
    assert "total 0 kWh (€0.00)" in await text(page, "#energyrange")
    csv = await page.locator("#energycsv").evaluate("a => a.href")
    lines = (await (await page.request.get(csv)).text()).splitlines()
    assert lines[1].startswith('"panels","switch:0",2026-10-24,0,61,600')


async def test_pictures(start, database, look, tmp_path):
    """Kept where SHELLY_PICTURES says: docs/dashboard.png is one of them."""
    folder = Path(os.environ.get("SHELLY_PICTURES") or tmp_path)
    folder.mkdir(exist_ok=True)
    running = await start(PRICE_PER_KWH="0.2516 EUR")

    async def picture(
        name, width=1280, whole=True, locale="en-GB", scheme="light", query=""
    ):
        page = await look(
            running,
            query,
            viewport={"width": width, "height": 900},
            locale=locale,
            color_scheme=scheme,
        )
        await page.screenshot(path=folder / f"{name}.png", full_page=whole)
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        return page

    await picture("empty-1280")
    await picture("empty-360", 360, locale="fr-FR", scheme="dark")
    command = [sys.executable, ROOT / "tests" / "simulated_device.py", running.url, "--history", "24h", "--minutes", "0", "--quiet"]  # fmt: skip
    assert await (await asyncio.create_subprocess_exec(*command)).wait() == 0
    await wait_for(lambda: len(read_rows(database, "1", "1")) >= 4 * 1415)
    page = await picture("dashboard", whole=False)
    assert (folder / "dashboard.png").stat().st_size < 200_000
    await page.screenshot(path=folder / "whole-1280.png", full_page=True)
    await page.locator("summary").first.click()
    await drag(page, page.locator("svg.picture").first, 0.2, 0.5)
    await page.screenshot(path=folder / "zoomed-1280.png", full_page=True)
    await picture("dark-1280", scheme="dark")
    await picture("french-360", 360, locale="fr-FR")
    await picture("dark-360", 360, scheme="dark", query="&days=7")
    copy = "timestamp, {}, channel, apower_w, voltage_v, current_a, energy_total_wh"
    execute(database, *(f"INSERT INTO power_logs ({copy.format('device_id')}) SELECT {copy.format(device)} FROM power_logs WHERE device_id = 'simulated-house-1'" for device in (f"'simulated-house-{n}'" for n in range(2, 7))),
            "INSERT INTO channel_names SELECT 'simulated-house-' || n, channel, device_says || CASE channel WHEN '' THEN ' ' || n ELSE '' END FROM channel_names, generate_series(2, 6) n")  # fmt: skip
    page = await picture("channels24-1280")
    assert await page.locator(".strip").count() == 24
    # Runs of so many are not asked for.
    assert set(await texts(page, ".state")) <= {"running", "off"}
    assert "choose a device to see its runs" in await text(page, "#runs")
    await picture("channels24-360", 360, scheme="dark")
    execute(
        database,
        "DELETE FROM power_logs WHERE channel <> 'switch:0' OR device_id <> 'simulated-house-1'",
    )
    await picture("channel1-1280")
    await picture("channel1-360", 360)
