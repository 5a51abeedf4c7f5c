"""Settings, --check and --help, as an owner types them."""

import re

import pytest

from settings import READERS, links
from support import (
    ROOT,
    Running,
    device,
    execute,
    minute_frame,
    run_script,
    settings,
    wait_for_rows,
)
from version import VERSION

NONSENSE = [
    ("PORT", "http"),
    ("PORT", "70000"),
    ("PORT", "0"),
    ("PORT", "5000.5"),
    ("THROTTLE_INTERVAL_SECONDS", "0"),
    ("THROTTLE_INTERVAL_SECONDS", "-60"),
    ("THROTTLE_INTERVAL_SECONDS", "nan"),
    ("THROTTLE_INTERVAL_SECONDS", "1 min"),
    ("DB_POOL_MIN_SIZE", "x"),
    ("DB_POOL_MIN_SIZE", "9"),
    ("DB_POOL_MAX_SIZE", "0"),
    ("CHANNELS", "zero"),
    ("CHANNELS", "0,,1"),
    ("CHANNELS", "-1"),
    ("MIN_POWER_W", "ten"),
    ("MIN_POWER_W", "-1"),
    ("MIN_POWER_W", "inf"),
    ("COLLECTOR_TOKEN", "a\nb"),
    ("LOG_LEVEL", "LOUD"),
    ("DATABASE_URL", "http://example.org/secret-pass"),
    ("DATABASE_URL", "postgresql://user:secret-pass@host:port/db"),
    ("DATABASE_URL", "postgresql://u:secret-pass@[host/db"),
    # With a bare @ or /, libpq would take a part of the password for the host, and show
    # it in each error.
    ("DATABASE_URL", "postgresql://user:p@secret-pass@host/db"),
    ("DATABASE_URL", "postgresql://user:1/secret-pass@host/db"),
    ("DATABASE_URL", "postgresql://user:x/secret-pass@host/db"),
    ("DATABASE_URL", "postgresql://user:1?x@secret-pass@host/db"),
    ("DATABASE_URL", "postgresql://u:secret-pass\udcff@host/db"),
    ("PUBLIC_URL", "shelly.example.org"),
    ("PUBLIC_URL", "https://"),
    ("PUBLIC_URL", "https://a b"),
    ("PUBLIC_URL", "https://x?y"),
    ("PUBLIC_URL", "https://x/ws?token=secret-pass"),
    ("PUBLIC_URL", "https://me:secret-pass@x"),
    ("PRICE_PER_KWH", "0,25 €/kWh"),
    ("PRICE_PER_KWH", "0.25 EURkWh"),
    ("PRICE_PER_KWH", "EUR 0.25"),
    ("CHANNELS", "1 2"),
    ("CHANNELS", "1000"),
    ("DB_POOL_MAX_SIZE", "1001"),
]


@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_a_setting_that_makes_no_sense_is_named(name, value):
    with pytest.raises(ValueError) as caught:
        settings(**{name: value})
    assert (
        name in str(caught.value)
        and "\n" not in str(caught.value)
        and "secret-pass" not in str(caught.value)
    )


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("PORT", "http", "PORT makes no sense: 'http' (Expected whole number)"),
        (
            "PORT",
            "70000",
            "PORT makes no sense: '70000' (Expected whole number <= 65535)",
        ),
        ("CHANNELS", "0,x", "CHANNELS makes no sense: '0,x' (Expected whole number)"),
        (
            "CHANNELS",
            "0,1000",
            "CHANNELS makes no sense: '0,1000' (Expected whole number <= 999)",
        ),
        ("MIN_POWER_W", "ten", "MIN_POWER_W makes no sense: 'ten' (Expected number)"),
        (
            "LOG_LEVEL",
            "loud",
            "LOG_LEVEL makes no sense: 'loud' (it is one of DEBUG, INFO, WARNING, ERROR, CRITICAL)",
        ),
    ],
)
def test_the_error_says_what_is_wrong_in_plain_words(name, value, line):
    with pytest.raises(ValueError) as caught:
        settings(**{name: value})
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("schema=public", "'schema'"),
        ("sslmode=require&pgbouncer=true", "'pgbouncer'"),
        (
            "pool_timeout=0&connection_limit=1&ssl=true",
            "'pool_timeout', 'connection_limit'",
        ),
        ("ssl=no-verify", "'ssl' (for TLS it is sslmode=require)"),
        ("\x1b[2J=x", r"'\x1b[2J'"),
    ],
)
def test_a_parameter_of_another_library_is_named(query, names):
    assert settings(DATABASE_URL="postgresql://host:5432/db").database_url
    with pytest.raises(ValueError, match="take it out of the URL"):
        settings(DATABASE_URL=f"postgres://host:5432/db?{query}")
    with pytest.raises(ValueError) as caught:
        settings(DATABASE_URL=f"postgresql://me:secret-pass@host/db?{query}")
    assert (
        str(caught.value)
        == f"DATABASE_URL holds what libpq does not know; take it out of the URL: {names}"
    )


@pytest.mark.parametrize(
    "url",
    [
        # In each of these, a part of the password looks like a parameter.
        "postgresql://me:1/2?hunter2=3@host/db",
        "postgresql://me:1?hunter2=3@host/db?schema=public",
        "postgresql://host/db?user=me&password=1&hunter2=3",
        "postgresql://host/db?user=me&pwd=1&hunter2=3",
        "postgresql://me:word?hunter2=3",
        # Here it is the scheme that libpq does not know.
        "postgresql+asyncpg://me:secret@host/db?hunter2=3",
        "host=host password=1?hunter2=3 dbname=db schema=public",
    ],
)
def test_a_part_of_the_password_is_never_named_as_a_parameter(url):
    with pytest.raises(ValueError, match="cannot be read") as caught:
        settings(DATABASE_URL=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgres://user:p%40ss@host/db",
        "postgresql://h/db?application_name=a@b",
        "postgresql://u:a?b@h/db",
        "postgresql://u@h/db?application_name=a@b",
        "postgresql:///db?host=/run/x",
        "host=x password=p@ss/word dbname=y",
        "postgresql://u:p@h1:1,h2:2/db",
        "postgresql://[::1]:5432/db",
    ],
)
def test_any_url_that_libpq_reads_correctly_is_accepted(url):
    assert settings(DATABASE_URL=url).database_url == url


@pytest.mark.parametrize(
    "platform",
    "DYNO RENDER RAILWAY_ENVIRONMENT K_SERVICE FLY_APP_NAME REPLIT_DEPLOYMENT".split(),
)
def test_a_platform_that_forgets_its_disk_needs_a_database_or_a_folder(platform):
    with pytest.raises(ValueError, match="DATABASE_URL is not set") as caught:
        settings(**{platform: "x"})
    assert "\n" not in str(caught.value)
    assert (
        settings(**{platform: "x", "DATABASE_URL": "postgresql://u@h/d"}).data_dir
        == "data"
    )
    assert settings(**{platform: "x", "DATA_DIR": "/disk"}).database_url is None


@pytest.mark.parametrize(
    ("public_url", "url"),
    [
        ("https://shelly.example.org", "wss://shelly.example.org/ws"),
        ("http://10.0.0.9:8080/", "ws://10.0.0.9:8080/ws"),
        ("https://example.org/shelly/", "wss://example.org/shelly/ws"),
        ("https://a.example/ws", "wss://a.example/ws"),
    ],
)
def test_the_public_url_wins_for_what_to_paste(public_url, url, monkeypatch):
    monkeypatch.setenv("RENDER_EXTERNAL_HOSTNAME", "x.onrender.com")
    assert (
        links(settings(PUBLIC_URL=public_url, COLLECTOR_TOKEN="x"))[0]
        == url + "?token=…"
    )
    assert links(settings())[0] == "wss://x.onrender.com/ws"


def test_without_a_public_url_the_machines_address_is_used(monkeypatch):
    assert links(settings(HOST="127.0.0.1", PORT="81"))[0] == "ws://127.0.0.1:81/ws"
    assert links(settings(HOST="fd00::1"))[0] == "ws://[fd00::1]:5000/ws"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["1_000", "٣", "5.0", "1e3", "null"])
def test_a_whole_number_is_written_in_digits_alone(text):
    with pytest.raises(ValueError, match=r"PORT makes no sense.*Expected whole number"):
        settings(PORT=text)


async def test_nonsense_stops_the_start_with_one_line_and_status_2(tmp_path):
    for name, value in (
        ("PORT", "http"),
        ("DATABASE_URL", "postgresql://u:secret-pass@[h/db"),
        ("DATABASE_URL", "postgresql://u:secret-pass@h/db?schema=public"),
    ):
        for arguments in ((), ("--check",)):
            status, out, err = await run_script(
                tmp_path,
                *arguments,
                **{"HOST": "127.0.0.1", "PORT": "5747", name: value},
            )
            assert (
                (status, out) == (2, "")
                and name in err
                and err.count("\n") == 1
                and "secret-pass" not in err
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        b"PORT=\xff\xfe",
        b'COLLECTOR_TOKEN="secret-pass',
        b"COLLECTOR_TOKEN='it's secret-pass'",
        b"PORT: 81",
        b"PORT 81",
    ],
)
async def test_a_line_of_the_env_file_that_cannot_be_read_stops_the_start(
    tmp_path, line
):
    # If such a line were skipped, anybody could send rows, or they would go to another
    # database.
    (tmp_path / ".env").write_bytes(b"HOST=127.0.0.1\n" + line + b"\nCHANNELS=1\n")
    status, out, err = await run_script(tmp_path)
    assert (
        (status, out) == (2, "")
        and ".env cannot be read, line 2" in err
        and err.count("\n") == 1
    )
    assert "secret-pass" not in err


async def test_a_name_in_the_env_file_that_is_no_setting_is_named(tmp_path):
    (tmp_path / ".env").write_text(
        "COLECTOR_TOKEN=secret-pass\nMIN_POWER=10\nPRICE_PER_KWh=0.25 EUR\nZZZ=1\nPORT=1\n"
        "secret-pass\npostgresql://u:secret-pass@h/x?sslmode=require\n"
        "COLLECTOR-TOKEN=secret-pass\nCHANNELS\n"
    )
    _, out, err = await run_script(tmp_path, "--check")
    assert [line.partition(" WARNING ")[2] for line in err.splitlines()] == [
        ".env: COLECTOR_TOKEN is not a setting; is COLLECTOR_TOKEN meant?",
        ".env: MIN_POWER is not a setting; is MIN_POWER_W meant?",
        ".env: PRICE_PER_KWh is not a setting; is PRICE_PER_KWH meant?",
        ".env: ZZZ is not a setting",
        *[".env: a line is not a setting: it must be NAME=value"] * 2,
        ".env: a line is not a setting: it must be NAME=value; is COLLECTOR_TOKEN meant?",
        ".env: CHANNELS has no value: it must be CHANNELS=value",
    ]
    assert "secret-pass" not in out + err


async def test_an_env_file_that_is_a_folder_is_named(tmp_path):
    (tmp_path / ".env").mkdir()
    status, out, err = await run_script(tmp_path)
    assert (status, out) == (2, "") and ".env" in err and err.count("\n") == 1


def test_a_tilde_in_data_dir_means_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    assert settings(DATA_DIR="~/shelly").data_dir == "/home/anna/shelly"


def test_an_empty_value_counts_as_not_set():
    assert (
        settings(CHANNELS="", COLLECTOR_TOKEN=" ", DATABASE_URL="", MIN_POWER_W="")
        == settings()
    )


def test_the_example_file_shows_every_setting_with_its_default():
    lines = (ROOT / ".env.example").read_text().splitlines()
    shown = dict(
        line[1:].split("=", 1)
        for line in lines
        if line.startswith("#") and "=" in line and line[1].isupper()
    )
    # These have no default.
    examples = "DATABASE_URL HOST CHANNELS MIN_POWER_W PUBLIC_URL PRICE_PER_KWH RETENTION_DAYS".split()
    assert set(shown) == {*READERS}
    assert (
        settings(**{name: shown[name] for name in shown if name not in examples})
        == settings()
    )
    assert settings(**shown).price_per_kwh == "0.2516 EUR"


async def test_env_file_counts_and_the_environment_wins(tmp_path):
    (tmp_path / ".env").write_text(
        "\ufeffCHANNELS=1,3\nMIN_POWER_W=12.5\nDATA_DIR=a${HOME}b\nDATABASE_URL=postgresql://u:pa$$w0rd@127.0.0.1:1/x\n"
    )
    status, out, err = await run_script(tmp_path, "--check", MIN_POWER_W="99")
    assert (
        status == 1
        and "1,3" in out
        and "99" in out
        and "12.5" not in out
        and "Traceback" not in err
    )
    assert "pa$$w0rd" not in out + err and "user=u" in out and "a${HOME}b" in out


@pytest.mark.slow
async def test_check_tells_of_a_running_collector_and_leaves_it_running(
    collectors, database, tmp_path
):
    running: Running = await collectors(
        tmp_path, DATABASE_URL=database, COLLECTOR_TOKEN="a b/ü"
    ).ready()
    async with device(running.url + "?token=a%20b%2F%C3%BC") as peer:
        await peer.send(minute_frame(channel=2), minute_frame("other-1"))
        await wait_for_rows(database, 2)
        status, out, err = await run_script(tmp_path, "--check", **running.env)
        await peer.send(minute_frame(channel=3))
        await wait_for_rows(database, 3)
    assert status == 0 and err == "", err
    assert re.search(r"^COLLECTOR_TOKEN +[*]{3}$", out, re.MULTILINE)
    assert "holds 2 rows" in out and "switch:2  433.8 W" in out and "other-1" in out
    assert (
        f"ws://127.0.0.1:{running.port}/ws?token=a%20b%2F%C3%BC" in out.splitlines()[-1]
    )


async def test_check_of_a_database_without_a_table_says_so(tmp_path, database):
    status, out, _ = await run_script(tmp_path, "--check", DATABASE_URL=database)
    assert status == 0 and "no table yet" in out


async def test_help_explains_the_program(tmp_path):
    status, out, err = await run_script(tmp_path, "--help")
    assert status == 0 and "--check" in out and ".env" in out and err == ""


async def test_an_unknown_argument_is_refused_with_the_known_ones(tmp_path):
    status, out, err = await run_script(tmp_path, "--chek")
    assert (status, out) == (2, "") and "--check" in err and "--chek" in err


async def test_the_version_is_told_and_stands_in_the_changelog(tmp_path):
    status, out, _ = await run_script(tmp_path, "--version")
    assert (status, out) == (0, f"Shelly collector {VERSION}\n")
    _, out, _ = await run_script(tmp_path, "--check")
    assert out.startswith(f"Shelly collector {VERSION}\n")
    newest, *_ = re.findall(
        r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )
    assert newest == VERSION


async def test_check_says_what_the_tables_take_on_disk(tmp_path, database):
    execute(database, (ROOT / "schema.sql").read_bytes())
    many_rows = """
        INSERT INTO power_logs (timestamp, device_id, channel, apower_w, voltage_v,
                                current_a, energy_total_wh)
        SELECT now() - n * interval '1 minute', 'a', 'switch:0', 1, 1, 1, 1
        FROM generate_series({}) n
    """
    execute(database, many_rows.format("1, 60"))
    _, out, _ = await run_script(tmp_path, "--check", DATABASE_URL=database)
    assert re.search(
        r"\nOn disk: 0\.[1-9] MB for the rows, 0\.\d MB for their quarters of an hour\.\n",
        out,
    )
    assert "a year takes" not in out
    execute(database, many_rows.format("61, 20 * 1440"))
    _, out, _ = await run_script(tmp_path, "--check", DATABASE_URL=database)
    (year,) = re.findall(
        r"\nAt the rate of the last day, a year takes ([\d.]+) MB", out
    )
    # A row takes some 300 bytes, with its indexes.
    assert 100 < float(year) < 250


async def test_check_without_a_database_makes_none(tmp_path):
    status, out, err = await run_script(tmp_path, "--check")
    assert (
        status == 0
        and "There is no database yet" in out
        and err == ""
        and list(tmp_path.iterdir()) == []
    )


def test_a_keyword_string_may_hold_anything_in_its_password():
    url = "host=x password=a://b@c@d/e dbname=y"
    assert settings(DATABASE_URL=url).database_url == url


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_address_of_all_interfaces_is_never_shown_to_paste(host):
    assert (
        f"//{host}" not in (url := links(settings(HOST=host))[0])
        and f"[{host}]" not in url
    )
