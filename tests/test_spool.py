"""Rows on disk: in order, bounded, gone when empty, and safe from torn files."""

import sqlite3

import pytest
import shelly_collector as sc

ROWS = [sc.Row(60.0 * n, "device", "switch:0", float(n), 230.0, 0.5, 9.0) for n in range(5000)]


def drain(spool, limit=1000):
    rows = []
    while spool.rows:
        batch = spool.oldest(limit)
        rows += [sc.Row(*row[1:]) for row in batch]
        spool.remove(batch)
    return rows


def test_rows_come_back_oldest_first_and_the_file_is_gone_when_empty(tmp_path):
    spool = sc.Spool(tmp_path)
    spool.append(ROWS[:3000])
    spool.append(ROWS[3000:])
    assert spool.rows == 5000 and spool.path.exists()
    assert drain(spool) == ROWS
    assert {path.name for path in tmp_path.iterdir()} == {"collector.lock"}
    spool.append(ROWS[:1])
    assert drain(spool) == ROWS[:1]


def test_rows_added_during_a_replay_come_last(tmp_path):
    spool = sc.Spool(tmp_path)
    spool.append(ROWS[:10])
    batch = spool.oldest(4)
    spool.append(ROWS[10:12])
    spool.remove(batch)
    assert spool.rows == 8 and drain(spool) == ROWS[4:12]


def test_the_next_process_finds_what_was_not_replayed(tmp_path):
    first = sc.Spool(tmp_path)
    first.append(ROWS[:10])
    first.remove(first.oldest(4))
    first.lock.close()
    first.file.close()
    second = sc.Spool(tmp_path)
    second.claim()
    assert drain(second) == ROWS[:10]  # a second replay does no harm, a lost row would


def test_one_process_has_the_folder(tmp_path):
    first, second = sc.Spool(tmp_path), sc.Spool(tmp_path)
    first.claim()
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        second.append(ROWS[:1])
    first.lock.close()
    second.append(ROWS[:1])


def test_the_bound_drops_the_oldest_and_counts_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sc, "MOST_IN_SPOOL", 100)
    spool = sc.Spool(tmp_path)
    assert spool.append(ROWS[:90]) == 0
    assert spool.append(ROWS[90:130]) == 30
    assert spool.append(ROWS[130:400]) == 270
    assert spool.rows == 100 and drain(spool) == ROWS[300:400]


def test_the_bound_counts_what_a_replay_has_already_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(sc, "MOST_IN_SPOOL", 100)
    spool = sc.Spool(tmp_path)
    spool.append(ROWS[:100])
    spool.remove(spool.oldest(50))
    assert spool.append(ROWS[100:160]) == 10
    assert drain(spool) == ROWS[60:160]


@pytest.mark.parametrize("cut", [1, 100, 4096, 5000, 20_000, 100_000])
def test_a_torn_write_costs_no_more_than_what_it_tore(tmp_path, cut):
    spool = sc.Spool(tmp_path)
    for n in range(50):
        spool.append(ROWS[100 * n : 100 * n + 100])
    # As kill -9 and a power cut leave it: the log of the last writes, its end torn off.
    log = spool.path.with_name(spool.path.name + "-wal")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / spool.path.name).write_bytes(spool.path.read_bytes())
    torn = log.read_bytes()[:-cut]
    (copy / log.name).write_bytes(torn)
    after = sc.Spool(copy)
    after.claim()
    rows = drain(after)
    assert rows == ROWS[: len(rows)] and len(rows) >= 5000 - 100 * (cut // 4096 + 2)


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "garbage", "empty"])
def test_a_damaged_file_is_set_aside_and_what_can_be_read_is_kept(tmp_path, damage, caplog):
    spool = sc.Spool(tmp_path)
    spool.append(ROWS)
    spool.lock.close()
    spool.file.close()
    content = spool.path.read_bytes()
    spool.path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "overwritten": content[: len(content) // 2] + b"\xff" * 9000 + content[len(content) // 2 + 9000 :],
            "garbage": b"not a database" * 1000,
            "empty": b"",
        }[damage]
    )
    after = sc.Spool(tmp_path)
    after.claim()
    rescued = drain(after)
    assert rescued == ROWS[: len(rescued)] and (len(rescued) > 1000) == (damage in ("truncated", "overwritten"))
    assert len(list(tmp_path.glob("*damaged*"))) == len(caplog.messages) == (damage != "empty")
    after.append(ROWS[:5])
    assert drain(after) == ROWS[:5]
