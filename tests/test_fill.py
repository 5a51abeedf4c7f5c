"""The houses of fill.py: what they measured agrees with what they used."""

import psycopg
import pytest
from fill import main

from support import query, read_rows

TWO_DAYS = ["--days", "2", "--devices", "2", "--until", "2026-11-03T00:00Z"]
WINDOW = "since => '2026-11-01 00:00+00', until => '2026-11-03 00:00+00'"
CHANNELS = 8
MINUTES = 2 * 1440

# By how much the counters of neighbouring rows disagree with the power between them, at
# most, in Wh.
LARGEST_ERROR = """
SELECT max(abs(next_wh - energy_total_wh - abs(apower_w) / 60))
FROM (SELECT *, lead(energy_total_wh) OVER (
          PARTITION BY device_id, channel ORDER BY timestamp) AS next_wh
      FROM power_logs) AS rows
"""

# The Wh that each channel drew and gave back on each day, by the powers of its rows. The
# last row has none after it, so nobody knows how long its power lasted.
BY_POWERS = """
SELECT device_id, channel, (timestamp AT TIME ZONE 'UTC')::date,
       sum(greatest(apower_w, 0)) / 60, sum(greatest(-apower_w, 0)) / 60
FROM power_logs WHERE timestamp < '2026-11-02 23:59+00'
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""
BY_QUESTION = f"""
SELECT device_id, channel, day, energy_wh, energy_returned_wh
FROM energy_by_day({WINDOW}, zone => 'UTC') ORDER BY 1, 2, 3
"""
COVERAGE = (
    f"SELECT rows, missing, resets FROM coverage({WINDOW}) ORDER BY device_id, channel"
)


def write(database, *more):
    main([*TWO_DAYS, *more, database])


def written_rows(database):
    return read_rows(
        database,
        "timestamp, device_id, channel, apower_w, voltage_v, current_a, energy_total_wh",
        "id",
    )


def assert_energies_agree(database):
    by_powers = query(database, BY_POWERS)
    by_question = query(database, BY_QUESTION)
    assert len(by_powers) == len(by_question) == 2 * CHANNELS
    for powers, answer in zip(by_powers, by_question, strict=True):
        assert answer[:3] == powers[:3]
        assert answer[3] == pytest.approx(powers[3], abs=0.1)
        if answer[4] is not None:
            assert answer[4] == pytest.approx(powers[4], abs=0.1)


def test_counters_rise_by_the_power_and_no_minute_is_missing(database, capsys):
    write(database)
    assert capsys.readouterr().out.startswith("23,040 rows written in ")
    assert query(database, LARGEST_ERROR)[0][0] < 0.002
    assert_energies_agree(database)
    assert query(database, COVERAGE) == [(MINUTES, 0, 0)] * CHANNELS


def test_rows_are_whole_and_stand_in_the_order_of_arrival(database):
    write(database)
    rows = written_rows(database)
    assert rows == sorted(rows)
    for time, _, _, watts, volts, amps, _ in rows:
        assert (time.second, time.microsecond) == (0, 0)
        assert 215 < volts < 245
        assert amps == pytest.approx(watts / volts, abs=0.0006)
    assert query(database, "SELECT count(energy_returned_wh) FROM power_logs") == [(0,)]


def test_channels_have_their_names(database):
    write(database, "--channels", "5")
    names = query(database, "SELECT device_name, channel, name FROM channels()")
    assert names[:5] == [
        ("House 1", "switch:0", "Well pump"),
        ("House 1", "switch:1", "Heater"),
        ("House 1", "switch:2", "Fridge"),
        ("House 1", "switch:3", "House"),
        ("House 1", "switch:4", "Well pump 2"),
    ]


def test_the_same_seed_gives_the_same_rows(database):
    write(database)
    first = written_rows(database)
    query(database, "DELETE FROM power_logs RETURNING 1")
    write(database)
    assert written_rows(database) == first
    query(database, "DELETE FROM power_logs RETURNING 1")
    write(database, "--seed", "2")
    assert written_rows(database) != first


def test_a_house_with_panels_gives_back_what_it_did_not_draw(database):
    write(database, "--solar")
    assert_energies_agree(database)
    returned = query(
        database, "SELECT DISTINCT channel FROM power_logs WHERE energy_returned_wh > 0"
    )
    assert returned == [("pm1:0",)]


def test_an_outage_and_a_reset_are_where_they_were_asked_for(database):
    write(database, "--outage", "5", "--reset")
    with_reset, *others = query(database, COVERAGE)
    assert with_reset == (MINUTES - 300, 300, 1)
    assert others == [(MINUTES - 300, 300, 0)] * (CHANNELS - 1)
    # The counters go on during the outage.
    rises = f"SELECT energy_wh FROM energy_by_day({WINDOW}, zone => 'UTC') WHERE channel = 'switch:3'"
    assert all(energy_wh > 4000 for (energy_wh,) in query(database, rises))


def test_rows_that_are_there_are_left_alone(database):
    write(database)
    rows = written_rows(database)
    with pytest.raises(
        psycopg.errors.UniqueViolation, match="power_logs_one_row_per_interval"
    ):
        write(database)
    assert written_rows(database) == rows
