"""The collector's settings: what the environment and .env say, checked once, never
changed.

`read_settings` makes `Settings` of them; `links` makes the URLs that an owner pastes
and opens. Every setting is optional, and .env.example explains each one."""

import contextlib
import difflib
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from dotenv.parser import parse_stream
from psycopg.pq import Conninfo

# Each of these platforms sets its variable, and throws the disk away at a restart.
FORGETFUL_PLATFORMS = (
    "DYNO",
    "RENDER",
    "RAILWAY_ENVIRONMENT",
    "K_SERVICE",
    "FLY_APP_NAME",
    "REPLIT_DEPLOYMENT",
)
# Where a platform publishes the host name that it gave to this program.
PLATFORM_DOMAINS = (
    "RENDER_EXTERNAL_HOSTNAME",
    "RAILWAY_PUBLIC_DOMAIN",
    "REPLIT_DEV_DOMAIN",
    "HEROKU_APP_DEFAULT_DOMAIN_NAME",
)
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class Settings:
    # None: the embedded PostgreSQL.
    database_url: str | None = None
    # None: all interfaces.
    host: str | None = None
    port: int = 5000
    throttle_interval_seconds: float = 60.0
    db_pool_min_size: int = 1
    db_pool_max_size: int = 3
    # None: all channels.
    channels: frozenset[int] | None = None
    # None: all readings.
    min_power_w: float | None = None
    gap_threshold_minutes: float = 3.0
    min_cycle_duration_minutes: float = 2.0
    default_days_history: int = 45
    price_per_kwh: str | None = None
    # None: for ever.
    retention_days: int | None = None
    collector_token: str | None = None
    # None: one that is made once and kept in DATA_DIR.
    dashboard_token: str | None = None
    # None: what the platform or the machine tells.
    public_url: str | None = None
    data_dir: str = "data"
    log_level: str = "INFO"


def nonsense(text: str, expected: str) -> ValueError:
    return ValueError(f"makes no sense: {text!r} ({expected})")


def parse_whole_number(text: str, low: int, high: int) -> int:
    """Raises ValueError, which says what was expected."""
    if not re.fullmatch(r"[-+]?[0-9]{1,18}", text):
        raise ValueError("Expected whole number")
    value = int(text)
    if value < low:
        raise ValueError(f"Expected whole number >= {low}")
    if value > high:
        raise ValueError(f"Expected whole number <= {high}")
    return value


def whole_number(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            return parse_whole_number(text, low, high)
        except ValueError as exc:
            raise nonsense(text, str(exc)) from None

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?", text):
            raise nonsense(text, "Expected number")
        value = float(text)
        if value < low:
            raise nonsense(text, f"Expected number >= {low:g}")
        if value > high:
            raise nonsense(text, f"Expected number <= {high:g}")
        return value

    return read


def channel_numbers(text: str) -> frozenset[int]:
    numbers = text.split(",")
    try:
        return frozenset(parse_whole_number(n.strip(), 0, 999) for n in numbers)
    except ValueError as exc:
        raise nonsense(text, str(exc)) from None


def log_level(text: str) -> str:
    level = text.upper()
    if level not in LOG_LEVELS:
        raise nonsense(text, f"it is one of {', '.join(LOG_LEVELS)}")
    return level


def token(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must hold printable characters only")
    return text


def price(text: str) -> str:
    # What follows the currency, such as /kWh, would be shown behind every cost.
    is_price = re.fullmatch(r"\d{1,9}([.,]\d{1,9})?\s*[^\d\s.,<&/]{0,12}", text)
    if not is_price or "kwh" in text.lower():
        raise nonsense(text, "must be like 0.2516 EUR, without /kWh")
    return text


def public_url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", text):
        raise ValueError("must be like https://shelly.example.org")
    return text


def database_url(text: str) -> str:
    """Check it as libpq would read it. The error shows no part of it, since any part
    may be one of the password."""
    unreadable = ValueError(
        "cannot be read: it must be like postgresql://user:password@host:5432/name,"
        " with an @ or / in the password as %40 or %2F"
    )
    if text.startswith("postgres") and splits_password(text):
        raise unreadable
    try:
        parts = psycopg.conninfo.conninfo_to_dict(text)
    except (psycopg.Error, UnicodeError):
        unknown = unknown_parameters(text)
        if unknown:
            names = ", ".join(map(repr, unknown))
            text = f"holds what libpq does not know; take it out of the URL: {names}"
            if "ssl" in unknown:
                text += " (for TLS it is sslmode=require)"
            raise ValueError(text) from None
        raise unreadable from None
    if not re.fullmatch(r"[\d,]*", str(parts.get("port", ""))):
        raise unreadable
    return text


def splits_password(url: str) -> bool:
    """Whether libpq would take a part of the password for the host, and show it in
    errors. It ends the credentials at the first @, and sees none if a / comes
    before."""
    _, _, rest = url.partition("//")
    user, at, host = rest.partition("@")
    if at and "/" not in user:
        rest = host
    before_query, _, _ = rest.partition("?")
    return "@" in before_query


# With an @, the password has ended. Without one, there is a host, and maybe a port.
WHOLE_PLACE = re.compile(r"postgres(ql)?://(.*@|[^:/]*(:\d+)?(/|$))")


def unknown_parameters(url: str) -> list[str]:
    """The names of a URL's parameters that libpq does not know, such as another
    library's; none where the query may hold a part of a password."""
    place, _, query = url.partition("?")
    if not WHOLE_PLACE.match(place) or re.search("@|pass|pwd", query):
        return []
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    # libpq takes ssl=true, but no other value of it.
    known_parameters = ["", "ssl=true"]
    names = []
    for parameter in query.split("&"):
        name, _, _ = parameter.partition("=")
        if name not in known and parameter not in known_parameters:
            names.append(name)
    return names


# How each setting is read; a reader raises ValueError, which says what is wrong.
READERS: dict[str, Callable[[str], Any]] = {
    "DATABASE_URL": database_url,
    "HOST": str,
    "PORT": whole_number(1, 65_535),
    "THROTTLE_INTERVAL_SECONDS": number(0.1, 86_400),
    "DB_POOL_MIN_SIZE": whole_number(0, 1_000),
    "DB_POOL_MAX_SIZE": whole_number(1, 1_000),
    "CHANNELS": channel_numbers,
    "MIN_POWER_W": number(0, 1e9),
    "GAP_THRESHOLD_MINUTES": number(0, 1e6),
    "MIN_CYCLE_DURATION_MINUTES": number(0, 1e6),
    "DEFAULT_DAYS_HISTORY": whole_number(1, 36_500),
    "PRICE_PER_KWH": price,
    "RETENTION_DAYS": whole_number(1, 36_500),
    "COLLECTOR_TOKEN": token,
    "DASHBOARD_TOKEN": token,
    "PUBLIC_URL": public_url,
    "DATA_DIR": os.path.expanduser,
    "LOG_LEVEL": log_level,
}


def read_settings(env: Mapping[str, str | None]) -> Settings:
    """Read the settings by their names in capitals; an empty value counts as none.

    Raises ValueError: one line that names the setting and shows no secret."""
    values: dict[str, Any] = {}
    for name, read in READERS.items():
        text = (env.get(name) or "").strip()
        if text == "":
            continue
        try:
            values[name.lower()] = read(text)
        except ValueError as exc:
            raise ValueError(f"{name} {exc}") from None
    settings = Settings(**values)
    if settings.db_pool_min_size > settings.db_pool_max_size:
        raise ValueError("DB_POOL_MIN_SIZE must not be above DB_POOL_MAX_SIZE")
    forgetful = any(env.get(name) for name in FORGETFUL_PLATFORMS)
    if forgetful and "database_url" not in values and "data_dir" not in values:
        raise ValueError(
            "DATABASE_URL is not set, and the platform forgets its disk:"
            " set it, or a DATA_DIR that stays"
        )
    return settings


def read_env_file(path: Path) -> dict[str, str | None]:
    """The names and values of a .env file, none if there is no such file.

    Raises OSError, and ValueError for a line that cannot be read: passed over, it might
    leave the door open, or send the rows to another database."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            lines = list(parse_stream(file))
    except FileNotFoundError:
        return {}
    for line in lines:
        if line.error or "\ufffd" in line.original.string:
            raise ValueError(
                f".env cannot be read, line {line.original.line}:"
                " a quote that is not closed, no =, or no UTF-8"
            )
    return {line.key: line.value for line in lines if line.key is not None}


def unknown_names(env_file: Mapping[str, str | None]) -> list[str]:
    """What the log says of each name that is not a setting, with the one that may be
    meant."""
    lines = []
    for name, value in env_file.items():
        if name in READERS:
            if value is None:
                lines.append(f"{name} has no value: it must be {name}=value")
            continue
        line = f"{name} is not a setting"
        if value is None or not re.fullmatch(r"[A-Za-z_]\w*", name):
            # Don't show it: it may be the rest of a secret that was broken in two.
            line = "a line is not a setting: it must be NAME=value"
        # At 0.6 there is no word for PRICE; at 0.5 HISTORY is taken for HOST.
        similar = difflib.get_close_matches(name.upper(), READERS, n=1, cutoff=0.55)
        if similar:
            line += f"; is {similar[0]} meant?"
        lines.append(line)
    return lines


class Links(NamedTuple):
    # The URL to paste into the device.
    device: str
    # The URL of the page.
    page: str


def links(settings: Settings, token: str = "…", page_token: str = "…") -> Links:
    """The URLs of this collector, as far as this machine can know its own address.

    The tokens go in as they are given, so the caller must URL-quote them."""
    base = base_url(settings).rstrip("/").removesuffix("/ws")
    device = f"ws{base.removeprefix('http')}/ws"
    if settings.collector_token:
        device += f"?token={token}"
    return Links(device, f"{base}/dashboard?token={page_token}")


def base_url(settings: Settings) -> str:
    if settings.public_url:
        return settings.public_url
    for name in PLATFORM_DOMAINS:
        if os.environ.get(name):
            return f"https://{os.environ[name]}"
    host = settings.host
    if host is None or host in ("0.0.0.0", "::"):
        host = own_address()
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{settings.port}"


def own_address() -> str:
    """The address that this machine has in its network."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # This sends nothing. It only asks the system which address it would use.
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
    except OSError:
        return "localhost"


def page_token(settings: Settings, make: bool) -> str:
    """The secret of the page's link: the owner's own, or the one kept in DATA_DIR.

    If that is missing or cut off, `make` puts a new one in its place. Without `make`,
    what is there is returned, "" if there is nothing."""
    if settings.dashboard_token:
        return settings.dashboard_token
    path = Path(settings.data_dir, "dashboard-token")
    token = ""
    with contextlib.suppress(OSError):
        token = path.read_text(errors="replace").strip()
    if make and len(token) < 16:
        token = os.urandom(16).hex()
        # If it cannot be kept, it lasts until the next start.
        with contextlib.suppress(OSError):
            keep_token(path, token)
    return token


def keep_token(path: Path, token: str) -> None:
    """Write it to a file that only this user can read."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(f"{token}\n")
