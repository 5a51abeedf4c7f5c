"""The outbox: rows stay in order and bounded, go to disk when they are stuck, and
survive torn and damaged files."""

import asyncio
import contextlib
import itertools
import os
import shutil
import sqlite3

import pytest

from outbox import Outbox
from shelly_collector import release_and_save_periodically
from support import (
    OLD_ROWS,
    RETURNED_ROWS,
    ROWS,
    Row,
    drain,
    fill,
    old_outbox,
    open_outbox,
    wait_for,
)


@pytest.fixture
def new(tmp_path):
    """Open outboxes, by default in the same folder; all are closed at the end."""
    opened = []

    def make(folder=tmp_path, rows=(), claim=True):
        outbox = Outbox(folder)
        opened.append(outbox)
        if claim:
            outbox.claim()
        return fill(outbox, rows)

    yield make
    for outbox in opened:
        outbox.close()


@contextlib.contextmanager
def full_disk(outbox):
    """Make every write to the outbox's file fail, as a full disk does."""
    outbox.file.execute("PRAGMA query_only = ON")
    try:
        yield
    finally:
        outbox.file.execute("PRAGMA query_only = OFF")


def flush_log(outbox):
    """Bring all that SQLite still holds in its write-ahead log into the file itself."""
    outbox.file.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def in_memory(outbox):
    """How many of its rows are not on disk."""
    return len(outbox) - outbox.saved


def rows_in_file(path):
    with contextlib.closing(sqlite3.connect(path)) as file:
        (count,) = file.execute("SELECT count(*) FROM rows").fetchone()
    return count


def test_rows_come_oldest_first_from_memory_and_from_disk(new):
    outbox = new(rows=ROWS[:3000])
    outbox.save()
    fill(outbox, ROWS[3000:4000]).save()
    fill(outbox, ROWS[4000:])
    assert len(outbox) == 5000 and outbox.saved == 4000
    assert drain(outbox) == ROWS
    assert len(outbox) == outbox.saved == 0
    fill(outbox, ROWS[:1]).save()
    assert drain(outbox) == ROWS[:1]


async def test_the_first_row_wakes_the_writer_and_starts_the_time_that_it_has(new):
    outbox = new()
    waiting = asyncio.create_task(outbox.wait_for_rows(60))
    await asyncio.sleep(0)
    assert not waiting.done()
    fill(outbox, ROWS[:1])
    await asyncio.wait_for(waiting, 5)
    assert not outbox.should_save(60)
    assert outbox.should_save(0)


def test_a_batch_in_flight_that_goes_to_disk_meanwhile_is_removed_there(new):
    outbox = new(rows=ROWS[:10])
    batch = outbox.oldest(4)
    fill(outbox, ROWS[10:12]).save()
    outbox.remove(batch)
    assert len(outbox) == 8 and drain(outbox) == ROWS[4:12]


def test_a_batch_in_flight_whose_rows_are_dropped_takes_no_others_along(new, replace):
    replace(MAX_ROWS_IN_MEMORY=10)
    outbox = new(rows=ROWS[:10], claim=False)
    batch = outbox.oldest(6)
    fill(outbox, ROWS[10:14]).save()
    outbox.remove(batch)
    assert outbox.dropped == 4 and drain(outbox) == ROWS[6:14]


def test_the_next_process_finds_what_is_not_in_the_table(new):
    first = new(rows=ROWS[:10])
    first.save()
    first.remove(first.oldest(4))
    first.close()
    second = new()
    # A row that is written twice does no harm; a lost one would.
    assert drain(second) == ROWS[:10]
    second.close()
    assert len(new()) == 0


def test_a_clean_stop_in_mid_drain_leaves_only_what_is_not_in_the_table(new):
    first = new(rows=ROWS)
    first.save()
    first.remove(first.oldest(2000))
    first.save()
    first.close()
    assert drain(new()) == ROWS[2000:]


def test_a_new_process_puts_its_rows_behind_those_that_it_found(new):
    first = new(rows=ROWS[:10])
    first.save()
    first.close()
    second = new(rows=ROWS[10:20])
    second.save()
    fill(second, ROWS[20:30])
    assert drain(second, 7) == ROWS[:30]


def test_one_process_has_the_folder_and_the_next_one_takes_over_what_it_leaves(new):
    first, second = new(rows=ROWS[:5]), new(claim=False, rows=ROWS[5:8])
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        second.claim()
    second.save()  # it has no file, so its rows wait in memory
    assert len(second) == 3 and second.saved == 0
    first.save()
    first.close()
    second.claim()
    assert drain(second) == ROWS[:8]


async def test_rows_that_come_while_the_file_drains_go_to_disk_in_time_too(make):
    collector = make()
    outbox = collector.outbox
    outbox.claim()
    fill(outbox, ROWS[:3000]).save()
    saving = asyncio.create_task(release_and_save_periodically(collector))
    fill(outbox, ROWS[3000:3001])

    def drain_a_little():
        outbox.remove(outbox.oldest(10))
        return in_memory(outbox) == 0

    await wait_for(drain_a_little)
    assert outbox.saved > 0 and drain(outbox)[-1] == ROWS[3000]
    saving.cancel()
    outbox.close()


def test_a_slow_but_moving_drain_does_not_grow_the_file_for_ever(new):
    outbox = new(rows=ROWS[:100])
    outbox.save()
    for n in range(100, 4000, 100):  # it is never empty
        outbox.remove(outbox.oldest(100))
        fill(outbox, ROWS[n : n + 100]).save()
    assert len(outbox) == 100
    outbox.close()
    assert rows_in_file(outbox.path) == 100
    assert drain(new()) == ROWS[3900:4000]


def test_a_disk_that_cannot_be_written_leaves_all_in_memory_with_one_line(new, caplog):
    outbox = new(rows=ROWS[:10])
    with full_disk(outbox):
        outbox.save()
        outbox.save()
    assert len(caplog.messages) == 1 and "rows wait in memory" in caplog.text
    assert in_memory(outbox) == 10
    outbox.save()
    assert outbox.saved == 10 and drain(outbox) == ROWS[:10]


def test_the_file_shrinks_when_it_is_drained(new):
    outbox = new(rows=ROWS)
    outbox.save()
    drain(outbox)
    outbox.close()
    assert outbox.path.stat().st_size < 20_000


@pytest.mark.parametrize("cut", [1, 100, 4096, 5000, 20_000, 100_000])
def test_a_torn_write_costs_no_more_than_what_it_tore(new, tmp_path, cut):
    outbox = new()
    for n in range(50):
        fill(outbox, ROWS[100 * n : 100 * n + 100]).save()
    # What kill -9 or a power cut leaves: the log of the last writes, with its end torn off.
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "outbox.sqlite3").write_bytes(outbox.path.read_bytes())
    log = outbox.path.with_name("outbox.sqlite3-wal").read_bytes()
    (copy / "outbox.sqlite3-wal").write_bytes(log[:-cut])
    rows = drain(new(copy))
    assert rows == ROWS[: len(rows)] and len(rows) >= 5000 - 100 * (cut // 4096 + 2)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "zeroed"])
def test_a_damaged_file_is_set_aside_with_one_line(new, tmp_path, damage, caplog):
    outbox = new(rows=ROWS)
    outbox.save()
    outbox.close()
    size = outbox.path.stat().st_size
    content = {
        "truncated": outbox.path.read_bytes()[: size // 2],
        "garbage": b"not a database" * 999,
        "zeroed": bytes(size),
    }
    outbox.path.write_bytes(content[damage])
    after = new()
    assert len(after) == 0 and drain(fill(after, ROWS[:5])) == ROWS[:5]
    (aside,) = tmp_path.glob("*.damaged-*")
    assert (
        aside.read_bytes() == content[damage]
        and len(caplog.messages) == 1
        and "damaged" in caplog.text
    )


@pytest.mark.parametrize(
    ("right", "wrong", "kept"),
    [
        # Not a letter: the row is kept, with a replacement character.
        (b"deviceswitch", b"dev\xe9ceswitch", 5000),
        # Not a time: that row is passed over.
        (b"\x00\x07\x19\x1d", b"\x00\x06\x19\x1d", 4999),
        # Not a row: the file is set aside.
        (b"\x0a\x00\x07\x19\x1d", b"\x79\xff\xff\x19\x1d", 0),
    ],
)
def test_one_damaged_row_holds_up_nothing_behind_it(new, right, wrong, kept):
    outbox = new(rows=ROWS)
    outbox.save()
    outbox.close()
    content = outbox.path.read_bytes()
    assert content.count(right) > 4900
    outbox.path.write_bytes(content.replace(right, wrong, 1))
    after = new()
    fill(after, ROWS[:3]).save()
    rows = drain(after)
    assert (
        len(rows) == kept + 3
        and rows[-3:] == ROWS[:3]
        and len(set(rows) & set(ROWS)) >= min(kept, 4999)
    )


def test_an_empty_file_is_a_new_one(new, tmp_path, caplog):
    (tmp_path / "outbox.sqlite3").write_bytes(b"")
    assert drain(new(rows=ROWS[:5])) == ROWS[:5] and caplog.messages == []


def test_a_file_that_can_no_longer_be_read_does_not_hold_up_the_rows_in_memory(
    new, tmp_path, caplog
):
    outbox = new(rows=ROWS)
    outbox.save()
    flush_log(outbox)
    outbox.file.execute("PRAGMA shrink_memory")  # SQLite forgets the pages it has read
    with outbox.path.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(b"\xff" * 4096 * 20)
    fill(outbox, ROWS[:5])
    assert drain(outbox)[-5:] == ROWS[:5]
    assert len(outbox) == 0 and len(caplog.messages) == 1
    # The writer claims the folder again; that shows the damage, and starts a new file.
    outbox.claim()
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
    fill(outbox, ROWS[5:9]).save()
    assert outbox.saved == 4 and drain(outbox) == ROWS[5:9]


@pytest.mark.parametrize("limit", [4, 1000])
def test_rows_of_a_batch_in_flight_that_are_dropped_are_not_counted_twice(
    new, replace, limit
):
    # The disk is full for a moment. Of six rows in flight four are dropped; the others go
    # to disk with the rest.
    replace(MAX_ROWS_IN_MEMORY=10)
    outbox = new(rows=ROWS[:10])
    batch = outbox.oldest(6)
    with full_disk(outbox):
        fill(outbox, ROWS[10:14]).save()
    outbox.save()
    outbox.remove(batch)
    assert (
        outbox.dropped == 4 and drain(outbox, limit) == ROWS[6:14] and len(outbox) == 0
    )


def test_a_disk_too_full_to_delete_holds_up_nothing(new):
    outbox = new(rows=ROWS[:10])
    outbox.save()
    with full_disk(outbox):
        assert drain(outbox, 4) == ROWS[:10]
        assert drain(fill(outbox, ROWS[10:12])) == ROWS[10:12]
    fill(outbox, ROWS[12:14]).save()
    assert drain(outbox) == ROWS[12:14]


def test_a_disk_that_is_full_a_second_time_is_logged_again(new, caplog):
    outbox = new(rows=ROWS[:10])
    for n in range(2):
        with full_disk(outbox):
            fill(outbox, ROWS[:1]).save()
            outbox.save()
        assert len(caplog.messages) == n + 1
        outbox.save()


def test_the_log_of_a_damaged_file_is_set_aside_with_it(new, tmp_path, caplog):
    outbox = new(rows=ROWS)
    outbox.save()
    flush_log(outbox)
    fill(outbox, ROWS[:1]).save()
    wal = outbox.path.with_name("outbox.sqlite3-wal")
    log = wal.read_bytes()  # it holds only the last pages
    outbox.close()
    os.truncate(outbox.path, outbox.path.stat().st_size // 2)
    wal.write_bytes(log)  # kill -9 leaves it there
    after = new(rows=ROWS[:5])
    assert (
        drain(after) == ROWS[:5]
        and len(caplog.messages) == 1
        and "damaged" in caplog.text
    )
    assert len([*tmp_path.glob("*.damaged-*-wal")]) == 1


def test_what_is_saved_is_flushed_to_the_disk(new):
    # 2 is FULL: one fsync for each transaction.
    assert new().file.execute("PRAGMA synchronous").fetchone() == (2,)


def test_the_folder_and_the_one_above_it_are_made(new, tmp_path):
    assert drain(new(tmp_path / "a" / "b", rows=ROWS[:5])) == ROWS[:5]


async def test_rows_beyond_the_bound_of_memory_go_to_disk_though_others_get_on(
    make, replace
):
    replace(MAX_ROWS_IN_MEMORY=10)
    collector = make()
    outbox = collector.outbox
    outbox.claim()
    new_rows = iter(ROWS)
    fill(outbox, itertools.islice(new_rows, 11))
    saving = asyncio.create_task(release_and_save_periodically(collector))

    def get_on():
        outbox.remove(outbox.oldest(1))
        fill(outbox, [next(new_rows)])
        return outbox.saved > 0

    await wait_for(get_on, 3)
    assert outbox.dropped == 0
    saving.cancel()
    outbox.close()


def as_new(rows):
    return [Row(*row, None) for row in rows]


@pytest.mark.parametrize("killed", [False, True])
def test_an_old_outbox_without_returned_energy_is_delivered_and_goes_on_being_used(
    tmp_path, caplog, killed
):
    file = old_outbox(tmp_path / "made")
    if not killed:
        file.close()
    shutil.copytree(
        tmp_path / "made", tmp_path / "data", ignore=shutil.ignore_patterns("*-shm")
    )
    file.close()
    with open_outbox(tmp_path / "data", RETURNED_ROWS[:10]) as outbox:
        assert len(outbox) == 30
        outbox.save()
        assert outbox.saved == 30 and in_memory(outbox) == 0
    with open_outbox(tmp_path / "data", RETURNED_ROWS[10:]) as outbox:  # the next start
        assert drain(outbox, 7) == as_new(OLD_ROWS) + RETURNED_ROWS
        fill(outbox, RETURNED_ROWS).save()
        assert outbox.saved == 20 and drain(outbox) == RETURNED_ROWS
    assert not caplog.messages and not list((tmp_path / "data").glob("*.damaged-*"))


def test_rows_come_back_from_disk_with_and_without_returned_energy(tmp_path):
    with open_outbox(tmp_path, RETURNED_ROWS) as outbox:
        outbox.save()
    with open_outbox(tmp_path) as outbox:
        assert drain(outbox) == RETURNED_ROWS


def test_a_row_on_disk_whose_returned_energy_is_damaged_is_passed_over_alone(tmp_path):
    with open_outbox(tmp_path, RETURNED_ROWS) as outbox:
        outbox.save()
    with contextlib.closing(
        sqlite3.connect(tmp_path / "outbox.sqlite3", isolation_level=None)
    ) as file:
        file.execute("UPDATE rows SET energy_returned_wh = 'x' WHERE id = 5")
    with open_outbox(tmp_path) as outbox:
        assert drain(outbox) == RETURNED_ROWS[:4] + RETURNED_ROWS[5:]
