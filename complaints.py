"""Warnings that a bad device or network may give again and again: each is logged at
most once a minute, or once and for all, and there is a limit to them all."""

import logging
import time

log = logging.getLogger("shelly_collector")

# Warnings per minute, each about something different.
MAX_COMPLAINTS = 500
# Warnings that are logged once and for all.
MAX_KNOWN = 1_000


class Complaints:
    def __init__(self) -> None:
        # What this minute's warnings were about.
        self.about: set[str] = set()
        # That minute (monotonic).
        self.minute = 0.0
        # What was logged once and for all.
        self.known: set[str] = set()

    def log(self, about: str, text: str, *values: object) -> bool:
        """Log a warning, unless this minute had one about the same thing, or too many.

        Returns whether it was logged."""
        logged = self.may_log(about)
        if logged:
            log.warning(text, *values)
        return logged

    def log_once(self, text: str) -> None:
        """Log a warning once and for all."""
        if text in self.known or len(self.known) >= MAX_KNOWN:
            return
        if self.log(text, "%s", text):
            self.known.add(text)

    def may_log(self, about: str) -> bool:
        minute = time.monotonic() // 60
        if minute != self.minute:
            self.minute = minute
            self.about.clear()
        if about in self.about or len(self.about) >= MAX_COMPLAINTS:
            return False
        self.about.add(about)
        return True
