"""`--backup`: the whole database in one file, by pg_dump, also beside a running
collector. The entry point is `backup`."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from psycopg import conninfo
from psycopg.pq import Conninfo

import database
import local_postgres
from beside import reachable
from database import DATABASE_ERRORS, one_line, within
from settings import Settings

# Seconds; after that the server counts as frozen.
ANSWER_TIMEOUT = 30.0
# Older ones are deleted.
MAX_BACKUPS = 7
# The time of a backup is part of its name, so the names sort by age.
NAME = re.compile(r"shelly-\d{4}-\d\d-\d\dT\d{6}Z\.dump")
# Where Debian puts the programs of each PostgreSQL.
DEBIAN = "/usr/lib/postgresql/{major}/bin/pg_dump"


async def backup(settings: Settings, folder: Path) -> int:
    """Write a backup into a folder, and say how that went. Returns the exit status."""
    began = time.monotonic()
    task = asyncio.current_task()
    assert task is not None
    # asyncio does the same at Ctrl-C. Neither leaves a file or a server behind.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        async with reachable(settings) as url:
            path = await write_backup(url, folder)
    except DATABASE_ERRORS as exc:
        print(f"No backup: {one_line(exc)}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("No backup: stopped", file=sys.stderr)
        return 1
    size_mb = path.stat().st_size / 1e6
    took_s = time.monotonic() - began
    print(f"{path}: {size_mb:,.1f} MB in {took_s:.1f} s", end="; ")
    try:
        print(f"backups kept: {delete_old(folder)}")
    except OSError as exc:
        print("older backups cannot be deleted")
        print(one_line(exc), file=sys.stderr)
        return 1
    return 0


async def write_backup(url: str, folder: Path) -> Path:
    """Write the file, under its own name only once it is whole. Returns its path.

    Raises OSError, psycopg.Error."""
    major = await within(ANSWER_TIMEOUT, check_server(url))
    program = await asyncio.to_thread(find_pg_dump, major)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"shelly-{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.dump"
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        await dump(program, url, unfinished)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


async def check_server(url: str) -> int:
    """Return the server's major version. Raises OSError if it has no table to back up:
    such a backup would push out a good one."""
    async with await database.connect(url) as conn:
        table = await database.read_table(conn)
        if not table.exists:
            raise OSError("the database holds no table power_logs")
        return conn.info.server_version // 10_000


async def dump(program: str, url: str, path: Path) -> None:
    """Run pg_dump. Raises OSError with what it says if it fails."""
    process = await asyncio.create_subprocess_exec(
        program,
        "--format=custom",
        "--no-password",
        # While pg_dump waits for a table that an owner is altering, its locks on the
        # others hold that owner up, too.
        "--lock-wait-timeout=60s",
        f"--file={path}",
        env=os.environ | environment_of(url),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        umask=0o077,
        # The collector and its server come first.
        preexec_fn=lower_priority,
    )
    try:
        _, errors = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise OSError(errors.decode(errors="replace").strip())


def lower_priority() -> None:
    os.nice(10)


def environment_of(url: str) -> dict[str, str]:
    """The parts of a URL as the PG variables that libpq reads: as arguments, every user
    of the machine could see the password."""
    given = conninfo.conninfo_to_dict(url)
    variables = {}
    for option in Conninfo.get_defaults():
        name = option.keyword.decode()
        if name in given and option.envvar is not None:
            variables[option.envvar.decode()] = str(given[name])
    return variables


def find_pg_dump(major: int) -> str:
    """The oldest pg_dump that can dump a server of this version. Raises OSError.

    A pg_restore that is older than that pg_dump may not read the backup."""
    candidates = [
        str(local_postgres.programs() / "pg_dump"),
        DEBIAN.format(major=major),
        shutil.which("pg_dump"),
    ]
    by_version: dict[int, str] = {}
    for program in candidates:
        if program is None or not Path(program).exists():
            continue
        version = major_version_of(program)
        if version >= major:
            by_version.setdefault(version, program)
    if not by_version:
        raise OSError(f"it needs pg_dump of PostgreSQL {major}, or of a later one")
    return by_version[min(by_version)]


def major_version_of(program: str) -> int:
    """Return 0, which is too old, if the program does not say."""
    process = subprocess.run([program, "--version"], capture_output=True, text=True)
    # pg_dump (PostgreSQL) 18.6
    version = re.search(r"\d+", process.stdout)
    if version is None:
        return 0
    return int(version[0])


def delete_old(folder: Path) -> int:
    """Delete all backups but the newest ones. Returns how many there are."""
    backups = sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))
    for path in backups[:-MAX_BACKUPS]:
        path.unlink()
    return min(len(backups), MAX_BACKUPS)
