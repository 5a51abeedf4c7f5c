"""How the process deals with its operating system: signals, file descriptors, the
log."""

import asyncio
import contextlib
import logging
import resource
import signal
import time
from typing import Any

from complaints import Complaints

log = logging.getLogger("shelly_collector")


def handle_signals(stop: asyncio.Event) -> None:
    """Set `stop` on SIGTERM, SIGINT or SIGHUP."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Under nohup SIGHUP is ignored, and must stay so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop.set)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files, often only 1,024, to the hard one, or to a
    million."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, min(hard, 1_000_000))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def start_log(level: str) -> None:
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=level,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%SZ",
    )
    # These log a line per request, and at DEBUG the secrets in its URL.
    for name in ("websockets", "psycopg", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)


def log_loop_error(
    complaints: Complaints, loop: asyncio.AbstractEventLoop, context: dict[str, Any]
) -> None:
    """Log what asyncio reports, such as too many open files, each at most once a
    minute."""
    message = context["message"]
    exc = context.get("exception")
    if complaints.admit(message):
        # An error of the network needs no traceback.
        bug = None if isinstance(exc, OSError) else exc
        log.warning("%s", message, exc_info=bug)
