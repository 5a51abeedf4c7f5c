// What the period is called, and the arrows that go to the one before and the one after.
//
// Exports `periodTitle`, `periodName`, `nameBefore`; `drawArrows` and `listenToArrows`.

import { byId, on } from "./dom.js";
import { dayName, formatDate, formatDates, span } from "./format.js";
import { choosePeriod, frame, state } from "./state.js";
import { midnight, now, startOf } from "./time.js";
import { word } from "./words.js";

// "November 2026", "last 24 hours"
export function periodTitle() {
  const { since, until } = frame;
  if (state.unit === "day") return dayName(since);
  if (state.unit === "week") return formatDates("dayYear", since, midnight(since, 6));
  if (state.unit !== "") return formatDate(`long_${state.unit}`, since);
  if (state.from != null) return span(since, until);
  return word("last", state.days);
}

// The same where the year is clear: "November".
export function periodName() {
  if (state.unit === "month") return monthName(frame.since);
  if (state.unit === "day" && frame.moving) return word("today");
  if (state.from != null) return word("thisPeriod");
  return periodTitle();
}

// What it is compared with: "October".
export function nameBefore() {
  if (state.unit === "month") return monthName(startOf("month", frame.since, -1));
  if (state.unit === "year") return formatDate("long_year", startOf("year", frame.since, -1));
  return word(`before_${state.unit || "other"}`);
}

function monthName(t) {
  const isThisYear = startOf("year", t) === startOf("year", now());
  return formatDate(isThisYear ? "month_alone" : "long_month", t);
}

// ---- Arrows

// There are none for periods that end now, or are typed.
export function drawArrows() {
  byId("arrows").hidden = state.unit === "";
  byId("later").disabled = frame.moving;
}

export function listenToArrows() {
  on(byId("earlier"), "click", () => move(-1));
  on(byId("later"), "click", () => move(1));
}

function move(by) {
  const { unit } = state;
  choosePeriod({ unit, at: startOf(unit, frame.since, by) });
}
