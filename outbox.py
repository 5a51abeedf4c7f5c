"""Rows on their way to the table: each goes through here, oldest first.

A row is forgotten when it is in the table. Otherwise only if the database refuses it,
if the disk garbles it, or if both disk and memory are full.

They wait in memory while PostgreSQL answers. Where they get stuck they go to an SQLite
file, which also locks the folder for this process. Each row has a place, which is its
id in the file; so a batch in flight can be removed wherever its rows are by then.

The writer takes `oldest`, as many rows as `BatchSize` says, writes it, and calls
`remove`. `append` brings a row, `save` brings all that are in memory to disk, and
`claim` takes the folder.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("shelly_collector")

# Of 0.25 kB each. This is reached only if the disk fails as well as the database.
MAX_ROWS_IN_MEMORY = 100_000
# Rows in a statement; larger batches gain nothing.
BATCH_SIZE = 1_000

CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS rows (
    id INTEGER PRIMARY KEY,
    time, device_id, channel,
    apower_w, voltage_v, current_a, energy_total_wh, energy_returned_wh
)
"""
INSERT = """
INSERT INTO rows (
    id, time, device_id, channel,
    apower_w, voltage_v, current_a, energy_total_wh, energy_returned_wh
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
OLDEST = """
SELECT id, time, device_id, channel,
    apower_w, voltage_v, current_a, energy_total_wh, energy_returned_wh
FROM rows WHERE id > ? ORDER BY id LIMIT ?
"""


class Row(NamedTuple):
    """A line of power_logs, in the order of its columns."""

    # The start of the interval, seconds since 1970.
    time: float
    device_id: str
    # The component's key; that of a phase has its letter.
    channel: str
    apower_w: float
    voltage_v: float
    current_a: float
    energy_total_wh: float
    # None where the device says nothing of it.
    energy_returned_wh: float | None = None


class Batch(NamedTuple):
    rows: list[Row]
    # One past the place of its last row.
    end: int


class BatchSize:
    """How many rows go into a statement.

    A batch that failed is tried again in smaller ones, of 1,000, 31, then 1, until the
    refused row is found. Halving would take more statements, each a round trip. Past
    the batch that failed, they grow again."""

    def __init__(self) -> None:
        self.limit = BATCH_SIZE
        # Where the batch that failed ends, a place in the outbox.
        self.narrow_until = 0

    def narrow(self, batch: Batch) -> None:
        if len(batch.rows) == 1:
            return
        self.limit = max(1, len(batch.rows) // 32)
        self.narrow_until = batch.end

    def widen(self, batch: Batch) -> None:
        if batch.end >= self.narrow_until:
            self.limit = min(BATCH_SIZE, self.limit * 32)


def is_sound(row: Row) -> bool:
    """Whether a row of the file has values of the right types: a flipped bit must not
    block the rows behind it."""
    texts = (row.device_id, row.channel)
    values = (row.apower_w, row.voltage_v, row.current_a, row.energy_total_wh)
    returned = row.energy_returned_wh
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(value, float) for value in (row.time, *values))
        and (returned is None or isinstance(returned, float))
    )


class Outbox:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "outbox.sqlite3"
        # None unless this process has claimed the folder.
        self.file: sqlite3.Connection | None = None
        self.memory: deque[Row] = deque()
        # The place of memory[0], or of the next row.
        self.first_place = 1
        # Rows in the file that are not in the table yet.
        self.saved = 0
        # Rows up to this place are in the table, but may still be in the file.
        self.removed_place = 0
        # When a row last left memory, or the first came into it (monotonic).
        self.stuck_since = 0.0
        # The file cannot be written.
        self.failing = False
        # Memory holds as much as it may, and the oldest rows are dropped.
        self.overflowing = False
        self.dropped = 0
        self.arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self.memory) + self.saved

    def append(self, row: Row) -> None:
        if not self.memory:
            self.stuck_since = time.monotonic()
            self.arrived.set()
        self.memory.append(row)

    async def wait_for_rows(self, timeout_s: float) -> None:
        self.arrived.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.arrived.wait(), timeout_s)

    def should_save(self, after_s: float) -> bool:
        """Whether it is time to save: no row has left memory for `after_s`, or it holds
        too much."""
        stuck = time.monotonic() >= self.stuck_since + after_s
        return stuck or len(self.memory) > MAX_ROWS_IN_MEMORY

    def oldest(self, limit: int) -> Batch:
        """The oldest rows, those in the file first."""
        batch = self.oldest_saved(limit)
        if batch is not None:
            return batch
        count = min(limit, len(self.memory))
        rows = [self.memory[index] for index in range(count)]
        return Batch(rows, self.first_place + count)

    def oldest_saved(self, limit: int) -> Batch | None:
        if self.saved == 0 or self.file is None:
            return None
        try:
            lines = self.file.execute(OLDEST, [self.removed_place, limit]).fetchall()
        except sqlite3.Error as exc:
            self.report_failure(exc)
            # The writer claims the file anew, and counts its rows. Those in memory go
            # on.
            self.close()
            lines = []
        if not lines:
            self.saved = 0
            return None
        rows = [Row(*values) for _, *values in lines]
        last_place = lines[-1][0]
        return Batch([row for row in rows if is_sound(row)], last_place + 1)

    def remove(self, batch: Batch) -> None:
        """Forget the oldest rows, which are in the table by now.

        The disk learns of it later, since a second replay does no harm."""
        while self.memory and self.first_place < batch.end:
            self.memory.popleft()
            self.first_place += 1
            self.stuck_since = time.monotonic()
        if self.saved == 0 or self.file is None:
            return
        self.removed_place = batch.end - 1
        self.saved = max(0, self.saved - len(batch.rows))
        if self.saved == 0:
            self.delete_and_recount(self.file)

    def delete_and_recount(self, file: sqlite3.Connection) -> None:
        # A full disk has no room even to delete.
        with contextlib.suppress(sqlite3.Error), file:
            self.delete_removed(file)
            (self.saved,) = file.execute("SELECT count(*) FROM rows").fetchone()

    def delete_removed(self, file: sqlite3.Connection) -> None:
        file.execute("DELETE FROM rows WHERE id <= ?", [self.removed_place])

    def save(self) -> None:
        """Move all rows in memory to disk, in flight or not, and delete there those
        that the table has.

        If that fails they wait on, within memory's bound."""
        if self.file is not None and len(self) > 0:
            try:
                with self.file:
                    self.delete_removed(self.file)
                    places = enumerate(self.memory, self.first_place)
                    lines = ((place, *row) for place, row in places)
                    self.file.executemany(INSERT, lines)
            except (sqlite3.Error, OSError) as exc:
                self.report_failure(exc)
            else:
                self.saved += len(self.memory)
                self.first_place += len(self.memory)
                self.memory.clear()
                self.failing = False
        self.drop_excess()

    def drop_excess(self) -> None:
        excess = len(self.memory) - MAX_ROWS_IN_MEMORY
        # Exactly full is still overflowing: the next row drops one again.
        if excess < 0:
            self.overflowing = False
        if excess <= 0:
            return
        if not self.overflowing:
            log.error("too many rows wait: the oldest are dropped from now on")
        self.overflowing = True
        for _ in range(excess):
            self.memory.popleft()
        self.first_place += excess
        self.dropped += excess

    def report_failure(self, exc: Exception) -> None:
        if not self.failing:
            log.error("%s cannot be used, rows wait in memory: %s", self.path, exc)
        self.failing = True

    def claim(self) -> None:
        """Take the folder for this process, with the rows that an earlier one left.

        No batch may be in flight. Raises sqlite3.OperationalError where another process
        has it, and OSError or sqlite3.Error where it cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = sqlite3.connect(self.path, timeout=0)
        # A flipped bit in one row's text must not hide the others.
        file.text_factory = partial(str, encoding="utf-8", errors="replace")
        try:
            prepare_file(file)
            self.saved, last_place = count_rows(file)
        except sqlite3.OperationalError:
            # Locked, or full.
            file.close()
            raise
        except sqlite3.Error as exc:
            file.close()
            self.set_aside(exc)
            self.claim()
            return
        self.file = file
        self.first_place = max(self.first_place, last_place + 1)
        self.removed_place = 0

    def set_aside(self, exc: sqlite3.Error) -> None:
        """Rename a damaged file, so that a new one can be made."""
        damaged = f"{self.path}.damaged-{time.time():.0f}"
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.path}{suffix}", f"{damaged}{suffix}")
        log.error("%s is damaged (%s), and now set aside: %s", self.path, exc, damaged)

    def close(self) -> None:
        """Release the folder."""
        if self.file is not None:
            self.file.close()
        self.file = None


def prepare_file(file: sqlite3.Connection) -> None:
    # The lock is held until the process ends, however it ends.
    file.execute("PRAGMA locking_mode = EXCLUSIVE")
    # The room that a long outage took is given back.
    file.execute("PRAGMA auto_vacuum = FULL")
    # One fsync for each save; a torn write loses no other.
    file.execute("PRAGMA journal_mode = WAL")
    file.execute("PRAGMA synchronous = FULL")
    # This really writes, so a full disk shows now and not in an outage.
    file.execute("PRAGMA user_version = 1")
    file.execute(CREATE_TABLE)
    columns = [name for _, name, *_ in file.execute("PRAGMA table_info(rows)")]
    # Files of the first version lack this column.
    if "energy_returned_wh" not in columns:
        file.execute("ALTER TABLE rows ADD COLUMN energy_returned_wh")


def count_rows(file: sqlite3.Connection) -> tuple[int, int]:
    """How many rows there are, and the last one's place."""
    # max() of the last column looks into every row, and so finds damage.
    question = "SELECT count(*), max(id), max(energy_returned_wh) FROM rows"
    count, last_place, _ = file.execute(question).fetchone()
    return count, last_place or 0
