"""Devices that were refused: a line in the log for each, and the last of them for the
page. The entry point is `Refusals`."""

import time
from typing import NamedTuple

from complaints import Complaints

# As many are kept for the page.
MAX_REFUSALS = 20
# The log's line for each reason.
LINES = {
    "path": "{address} refused: {path} is not /ws",
    "token": "{address} refused: The URL lacks the right ?token=",
    "site": "{address} refused: No page of another site may send rows.",
    "tls": "{address} refused: it speaks wss:// to a ws:// port",
}


class Refusal(NamedTuple):
    # Seconds since 1970; the last time, if there were several.
    refused_at: float
    address: str
    # A key of LINES.
    reason: str
    # Of the URL, without its query.
    path: str


class Refusals:
    def __init__(self, complaints: Complaints) -> None:
        self.complaints = complaints
        # By address and reason, the oldest first.
        self.last: dict[tuple[str, str], Refusal] = {}

    def note(self, address: str, reason: str, path: str = "") -> None:
        """Keep a refusal, and log it: at most once a minute for an address and a
        reason."""
        line = LINES[reason].format(address=address, path=path)
        self.complaints.log(f"{address} {reason}", "%s", line)
        key = (address, reason)
        self.last.pop(key, None)
        self.last[key] = Refusal(time.time(), address, reason, path)
        if len(self.last) > MAX_REFUSALS:
            del self.last[next(iter(self.last))]

    def newest_first(self) -> list[Refusal]:
        return [*reversed(self.last.values())]
