"""Warnings that a bad device or network may cause again and again. Each is logged at
most once a minute, or only once, and their number is limited."""

import logging
import time

log = logging.getLogger("shelly_collector")

# Warnings per minute, each about something different.
MAX_COMPLAINTS = 500
# How many of the warnings that are logged only once are remembered.
MAX_LOGGED_ONCE = 1_000


class Complaints:
    def __init__(self) -> None:
        # What this minute's warnings were about.
        self.about: set[str] = set()
        # The number of that minute (monotonic).
        self.minute = 0.0
        # The warnings that are logged only once.
        self.logged_once: set[str] = set()

    def log(self, subject: str, text: str, *values: object) -> bool:
        """Log a warning, unless this minute had one about the same thing, or too many.

        Returns whether it was logged."""
        logged = self.admit(subject)
        if logged:
            log.warning(text, *values)
        return logged

    def log_once(self, text: str) -> None:
        """Log a warning unless it was logged before. After MAX_LOGGED_ONCE different
        ones, no more are logged."""
        if text in self.logged_once or len(self.logged_once) >= MAX_LOGGED_ONCE:
            return
        if self.log(text, "%s", text):
            self.logged_once.add(text)

    def admit(self, subject: str) -> bool:
        """Count a warning for this minute. Returns False if it must not be logged:
        there was one about the same thing, or there were too many."""
        minute = time.monotonic() // 60
        if minute != self.minute:
            self.minute = minute
            self.about.clear()
        if subject in self.about or len(self.about) >= MAX_COMPLAINTS:
            return False
        self.about.add(subject)
        return True
