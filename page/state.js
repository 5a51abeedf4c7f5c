// What the reader has chosen. It stands in the URL, so that a link or a reload shows the same.
//
// Exports `state`; `frame`, the period that follows from it, and `frameBefore`; `readLanguage` and
// `readState`, which take it from the URL; `choose`, which changes it, and `onChoice`, which says
// what follows then.

import { settings, TOKEN } from "./settings.js";
import { DAY, dayKey, iso, midnight, now, startOf, wallClock } from "./time.js";
import { isLanguage } from "./words.js";

export const UNITS = ["day", "week", "month", "year"];

const LAST_DAY = {
  unit: "", // the period is a day, week, month or year: the one of now,
  at: null, // or the one that holds this moment;
  days: 1, // or it is the last so many days;
  from: null, // or it begins here
  to: null, // and ends here, or now
  zoom: null, // the part of it that is shown: {from, to}
};

export const state = {
  ...LAST_DAY,
  device: "", // only this one
  floor: 10, // W above which a channel runs
  sort: "start", // the column by which runs are sorted,
  down: true, // the largest first
  lang: "en",
};

let languageWasChosen = false;
let afterChoice = null;

// The period in moments. It is `moving` where its end is now.
export let frame = { since: 0, until: 0, moving: true };

export function moveFrame() {
  const t = now();
  if (state.at != null && startOf(state.unit, state.at, 1) > t) state.at = null;
  const { since, end } = limits(t);
  const moving = end == null || end > t;
  frame = { since, until: moving ? t : end, moving };
}

function limits(t) {
  if (state.unit !== "") {
    const within = state.at ?? t;
    return { since: startOf(state.unit, within), end: startOf(state.unit, within, 1) };
  }
  return { since: state.from ?? t - state.days * DAY, end: state.to };
}

// The period before, in moments. Of one that goes on, it is the same stretch: until the same hour
// of its day.
export function frameBefore() {
  const { since, until, moving } = frame;
  if (state.unit === "") return { since: since - (until - since), until: since };
  const before = startOf(state.unit, since, -1);
  if (!moving) return { since: before, until: since };
  const wholeDays = Math.round((midnight(until) - since) / DAY);
  const end = new Date(midnight(before, wholeDays));
  const wall = new Date(until);
  end.setHours(wall.getHours(), wall.getMinutes(), wall.getSeconds());
  return { since: before, until: Math.min(end.getTime(), since) };
}

// ---- From the URL, and back into it

let given = new URLSearchParams(location.search);

// Null where it is no time.
export function readTime(text) {
  return Date.parse(text) || null;
}

// The one of the link, or the reader's first that there are words for.
export function readLanguage() {
  const wanted = [given.get("lang") || ""];
  for (const preferred of navigator.languages) {
    wanted.push(preferred.slice(0, 2).toLowerCase());
  }
  state.lang = wanted.find(isLanguage) || "en";
}

// Whatever makes no sense is left as it is.
export function readState() {
  given = new URLSearchParams(location.search);
  Object.assign(state, LAST_DAY);
  const days = Number(given.get("days"));
  if (settings.presets.includes(days)) state.days = days;

  const unit = given.get("period");
  if (UNITS.includes(unit)) {
    state.unit = unit;
    state.at = readTime(`${given.get("at")}T00:00`);
  }

  const from = readTime(given.get("from"));
  const to = readTime(given.get("to"));
  if (from && (!to || from < to)) {
    state.unit = "";
    state.from = from;
    state.to = to;
  }

  const [zoomFrom, zoomTo] = (given.get("zoom") || "").split("/").map(readTime);
  if (zoomFrom && zoomFrom < zoomTo) state.zoom = { from: zoomFrom, to: zoomTo };

  const floor = parseFloat(given.get("floor"));
  state.floor = floor >= 0 ? floor : settings.floor;
  state.device = given.get("device") || "";

  // "-start": the latest start first.
  const sort = given.get("sort") || "-start";
  state.down = sort.startsWith("-");
  state.sort = sort.replace("-", "");
  moveFrame();
}

// "2026-11-28T07:05", as an input field for a local time has it.
export function localInput(t) {
  if (t == null) return "";
  return `${dayKey(t)}T${wallClock(t)}`;
}

// What is as it would be anyway stays out of the URL.
export function writeState(isNewPage = false) {
  const query = new URLSearchParams();
  const { unit, at, days, from, to, device, floor, zoom, lang, sort, down } = state;
  if (TOKEN) query.set("token", TOKEN);
  if (unit !== "") query.set("period", unit);
  else if (from == null) query.set("days", days);
  if (at != null) query.set("at", dayKey(at));
  if (from != null) query.set("from", localInput(from));
  if (to != null) query.set("to", localInput(to));
  if (device) query.set("device", device);
  if (floor !== settings.floor) query.set("floor", floor);
  if (zoom) query.set("zoom", `${isoSeconds(zoom.from)}/${isoSeconds(zoom.to)}`);
  if (given.get("lang") || languageWasChosen) query.set("lang", lang);
  if (sort !== "start" || !down) query.set("sort", down ? `-${sort}` : sort);
  if (isNewPage) history.pushState(null, "", `?${query}`);
  else history.replaceState(null, "", `?${query}`);
}

function isoSeconds(t) {
  return `${iso(t).slice(0, 19)}Z`;
}

// ---- Choices

// `action(asks)` is called after each choice; `asks` says whether it takes new answers.
export function onChoice(action) {
  afterChoice = action;
}

// "Back" undoes it.
export function choose(change) {
  Object.assign(state, change);
  moveFrame();
  writeState(true);
  afterChoice(true);
}

// A period, in place of the one that is chosen: {unit, at}, {days} or {from, to}.
export function choosePeriod(period) {
  choose({ ...LAST_DAY, ...period });
}

// A choice that needs no new answers: a language, an order.
export function chooseLook(change) {
  Object.assign(state, change);
  if ("lang" in change) languageWasChosen = true;
  writeState();
  afterChoice(false);
}
