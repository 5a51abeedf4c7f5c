"""Devices that were refused: a line in the log for each, and the last of them for the
page. The entry point is `Refusals`."""

import time
from typing import NamedTuple

from complaints import Complaints

# The page and /data/refused show this many at most.
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
    # The URL's, without its query and without a token; "" unless it is the reason.
    path: str


class Refusals:
    def __init__(self, complaints: Complaints) -> None:
        self.complaints = complaints
        # The last one of each address and reason, the oldest first.
        self.recent: dict[tuple[str, str], Refusal] = {}

    def note(self, address: str, reason: str, path: str = "") -> None:
        """Keep a refusal. Log it, too, but the same line only once a minute."""
        line = LINES[reason].format(address=address, path=path)
        self.complaints.log(line, "%s", line)
        key = (address, reason)
        self.recent.pop(key, None)
        self.recent[key] = Refusal(time.time(), address, reason, path)
        if len(self.recent) > MAX_REFUSALS:
            del self.recent[next(iter(self.recent))]

    def newest_first(self) -> list[Refusal]:
        return [*reversed(self.recent.values())]
