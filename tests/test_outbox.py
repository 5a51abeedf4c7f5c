"""Rows on their way: in order, bounded, on disk when they do not get on, safe from torn and damaged files."""

import asyncio
import os
import shutil
import sqlite3
import time

import pytest
from shelly_collector import Outbox, keep_house
from support import ROWS, drain, fill, old_spool, wait_for


@pytest.fixture
def new(tmp_path):
    """Opens outboxes in a folder; all are closed at the end."""
    opened = []

    def make(folder=tmp_path, rows=(), claim=True):
        outbox = Outbox(folder)
        opened.append(outbox)
        if claim:
            outbox.claim()
        return fill(outbox, rows)

    yield make
    for outbox in opened:
        close(outbox)


def close(outbox):
    if outbox.file is not None:
        outbox.file.close()
        outbox.file = None


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


def test_the_first_row_wakes_the_writer_and_begins_the_half_second_that_it_has(new):
    outbox = new()
    assert not outbox.arrived.is_set()
    fill(outbox, ROWS[:1])
    assert outbox.arrived.is_set() and time.monotonic() - outbox.step_time < 60


def test_a_batch_in_flight_that_goes_to_disk_meanwhile_is_removed_there(new):
    outbox = new(rows=ROWS[:10])
    batch = outbox.oldest(4)
    fill(outbox, ROWS[10:12]).save()
    outbox.remove(*batch)
    assert len(outbox) == 8 and drain(outbox) == ROWS[4:12]


def test_a_batch_in_flight_whose_rows_are_dropped_meanwhile_takes_no_others_along(new, replace):
    replace(MOST_IN_MEMORY=10)
    outbox = new(rows=ROWS[:10], claim=False)
    batch = outbox.oldest(6)
    fill(outbox, ROWS[10:14]).save()
    outbox.remove(*batch)
    assert outbox.dropped == 4 and drain(outbox) == ROWS[6:14]


def test_the_next_process_finds_what_is_not_in_the_table(new):
    first = new(rows=ROWS[:10])
    first.save()
    first.remove(*first.oldest(4))
    close(first)
    second = new()
    assert drain(second) == ROWS[:10]  # a second replay does no harm, a lost row would
    close(second)
    assert len(new()) == 0


def test_a_clean_stop_in_mid_drain_leaves_only_what_is_not_in_the_table(new):
    first = new(rows=ROWS)
    first.save()
    first.remove(*first.oldest(2000))
    first.save()
    close(first)
    assert drain(new()) == ROWS[2000:]


def test_a_new_process_puts_its_rows_behind_those_that_it_found(new):
    first = new(rows=ROWS[:10])
    first.save()
    close(first)
    second = new(rows=ROWS[10:20])
    second.save()
    fill(second, ROWS[20:30])
    assert drain(second, 7) == ROWS[:30]


def test_one_process_has_the_folder_and_the_next_one_takes_over_what_it_leaves(new):
    first, second = new(rows=ROWS[:5]), new(claim=False, rows=ROWS[5:8])
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        second.claim()
    second.save()  # has no file: its rows wait in memory
    assert len(second) == 3 and second.saved == 0
    first.save()
    close(first)
    second.claim()
    assert drain(second) == ROWS[:8]


async def test_rows_that_come_while_the_file_drains_go_to_disk_in_time_too(make):
    collector = make()
    outbox = collector.outbox
    outbox.claim()
    fill(outbox, ROWS[:3000]).save()
    house = asyncio.create_task(keep_house(collector))
    fill(outbox, ROWS[3000:3001])

    def drain_a_little():
        outbox.remove(*outbox.oldest(10))
        return not outbox.memory

    await wait_for(drain_a_little)
    assert outbox.saved > 0 and drain(outbox)[-1] == ROWS[3000]
    house.cancel()
    close(outbox)


def test_a_slow_but_moving_drain_does_not_grow_the_file_for_ever(new):
    outbox = new(rows=ROWS[:100])
    outbox.save()
    for n in range(100, 4000, 100):  # never empty
        outbox.remove(*outbox.oldest(100))
        fill(outbox, ROWS[n : n + 100]).save()
    (kept,) = outbox.file.execute("SELECT count(*) FROM rows").fetchone()
    assert kept == len(outbox) == 100 and drain(outbox) == ROWS[3900:4000]


def test_a_disk_that_cannot_be_written_leaves_all_in_memory_with_one_line(new, caplog):
    outbox = new(rows=ROWS[:10])
    outbox.file.execute("PRAGMA query_only = ON")
    outbox.save()
    outbox.save()
    assert len(caplog.messages) == 1 and "rows wait in memory" in caplog.text and len(outbox.memory) == 10
    outbox.file.execute("PRAGMA query_only = OFF")
    outbox.save()
    assert outbox.saved == 10 and drain(outbox) == ROWS[:10]


def test_the_file_gives_its_room_back(new):
    outbox = new(rows=ROWS)
    outbox.save()
    drain(outbox)
    close(outbox)
    assert outbox.path.stat().st_size < 20_000


@pytest.mark.parametrize("cut", [1, 100, 4096, 5000, 20_000, 100_000])
def test_a_torn_write_costs_no_more_than_what_it_tore(new, tmp_path, cut):
    outbox = new()
    for n in range(50):
        fill(outbox, ROWS[100 * n : 100 * n + 100]).save()
    # As kill -9 and a power cut leave it: the log of the last writes, its end torn off.
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
    close(outbox)
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
    assert aside.read_bytes() == content[damage] and len(caplog.messages) == 1 and "damaged" in caplog.text


@pytest.mark.parametrize(
    ("right", "wrong", "kept"),
    [
        (b"deviceswitch", b"dev\xe9ceswitch", 5000),  # a letter that is none: the row goes on with it
        (b"\x00\x07\x19\x1d", b"\x00\x06\x19\x1d", 4999),  # a time that is none: that row is passed over
        (b"\x0a\x00\x07\x19\x1d", b"\x79\xff\xff\x19\x1d", 0),  # a row that cannot be read: the file is set aside
    ],
)
def test_one_damaged_row_holds_up_nothing_behind_it(new, right, wrong, kept):
    outbox = new(rows=ROWS)
    outbox.save()
    close(outbox)
    content = outbox.path.read_bytes()
    assert content.count(right) > 4900
    outbox.path.write_bytes(content.replace(right, wrong, 1))
    after = new()
    fill(after, ROWS[:3]).save()
    rows = []
    while batch := after.oldest(1000)[0]:
        rows += batch
        after.remove(batch, after.oldest(1000)[1])
    assert len(rows) == kept + 3 and rows[-3:] == ROWS[:3] and len(set(rows) & set(ROWS)) >= min(kept, 4999)


def test_an_empty_file_is_a_new_one(new, tmp_path, caplog):
    (tmp_path / "outbox.sqlite3").write_bytes(b"")
    assert drain(new(rows=ROWS[:5])) == ROWS[:5] and caplog.messages == []


def test_a_file_that_can_no_longer_be_read_does_not_hold_up_the_rows_in_memory(new, tmp_path, caplog):
    outbox = new(rows=ROWS)
    outbox.save()
    outbox.file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    outbox.file.execute("PRAGMA shrink_memory")
    with outbox.path.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(b"\xff" * 4096 * 20)
    fill(outbox, ROWS[:5])
    while outbox.file is not None:
        rows, end = outbox.oldest(1000)
        outbox.remove(rows, end)
    assert rows == ROWS[:5] and len(outbox) == 0 and len(caplog.messages) == 1
    outbox.claim()  # as the writer does; the damage shows, and a new file is begun
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
    fill(outbox, ROWS[5:9]).save()
    assert outbox.saved == 4 and drain(outbox) == ROWS[5:9]


def test_the_spool_of_the_version_before_is_taken_over(new, tmp_path):
    old_spool(tmp_path, ROWS[:20])
    outbox = new(rows=ROWS[20:30])
    assert outbox.saved == 20 and not (tmp_path / "spool.sqlite3").exists()
    outbox.save()
    assert drain(outbox, 7) == ROWS[:30]


def test_the_spool_of_a_killed_version_before_is_taken_over_with_its_log(new, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    spool = old_spool(made, ROWS[:20], close=False)
    for end in ("", "-wal"):  # as kill -9 leaves them
        shutil.copy(made / f"spool.sqlite3{end}", tmp_path)
    spool.close()
    assert drain(new(rows=ROWS[20:30]), 7) == ROWS[:30]


@pytest.mark.parametrize("limit", [4, 1000])
def test_rows_of_a_batch_in_flight_that_are_dropped_are_not_counted_twice(new, replace, limit):
    # A disk that is full for a moment: of six rows in flight four are dropped, the others go to disk with the rest.
    replace(MOST_IN_MEMORY=10)
    outbox = new(rows=ROWS[:10])
    batch = outbox.oldest(6)
    outbox.file.execute("PRAGMA query_only = ON")
    fill(outbox, ROWS[10:14]).save()
    outbox.file.execute("PRAGMA query_only = OFF")
    outbox.save()
    outbox.remove(*batch)
    assert outbox.dropped == 4 and drain(outbox, limit) == ROWS[6:14] and len(outbox) == 0


def test_a_disk_too_full_to_delete_holds_up_nothing(new):
    outbox = new(rows=ROWS[:10])
    outbox.save()
    outbox.file.execute("PRAGMA query_only = ON")
    assert drain(outbox, 4) == ROWS[:10]
    assert drain(fill(outbox, ROWS[10:12])) == ROWS[10:12]
    outbox.file.execute("PRAGMA query_only = OFF")
    fill(outbox, ROWS[12:14]).save()
    assert drain(outbox) == ROWS[12:14]


def test_a_disk_that_is_full_for_the_second_time_is_told_again(new, caplog):
    outbox = new(rows=ROWS[:10])
    for n in range(2):
        outbox.file.execute("PRAGMA query_only = ON")
        fill(outbox, ROWS[:1]).save()
        outbox.save()
        assert len(caplog.messages) == n + 1
        outbox.file.execute("PRAGMA query_only = OFF")
        outbox.save()


def test_the_log_of_a_damaged_file_is_set_aside_with_it(new, tmp_path, caplog):
    outbox = new(rows=ROWS)
    outbox.save()
    outbox.file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    fill(outbox, ROWS[:1]).save()
    wal = outbox.path.with_name("outbox.sqlite3-wal")
    log = wal.read_bytes()  # of the last pages only
    close(outbox)
    os.truncate(outbox.path, outbox.path.stat().st_size // 2)
    wal.write_bytes(log)  # as kill -9 leaves it
    after = new(rows=ROWS[:5])
    assert drain(after) == ROWS[:5] and len(caplog.messages) == 1 and "damaged" in caplog.text
    assert len([*tmp_path.glob("*.damaged-*-wal")]) == 1


def test_an_old_spool_takes_no_outboxs_place(new, tmp_path):
    outbox = new(rows=ROWS[:5])
    outbox.save()
    close(outbox)
    old_spool(tmp_path, ROWS[20:30])
    assert drain(new()) == ROWS[:5] and (tmp_path / "spool.sqlite3").exists()


def test_what_is_saved_is_flushed(new):
    assert new().file.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_folder_in_a_folder_is_made(new, tmp_path):
    assert drain(new(tmp_path / "a" / "b", rows=ROWS[:5])) == ROWS[:5]


async def test_rows_beyond_memorys_bound_go_to_disk_though_others_get_on(make, replace):
    replace(MOST_IN_MEMORY=10)
    collector = make()
    collector.outbox.claim()
    for n in range(11):
        collector.outbox.append(ROWS[n])
    collector.outbox.step_time = float("inf")  # a drain that moves on
    house = asyncio.create_task(keep_house(collector))
    await wait_for(lambda: collector.outbox.saved == 11, 3)
    assert not collector.outbox.memory and collector.outbox.dropped == 0
    house.cancel()
    collector.outbox.file.close()
