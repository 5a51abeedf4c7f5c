// What the reader has chosen. It stands in the URL, so that a link or a reload shows the same.
//
// Exports `state`; `frame`, the period that follows from it; `readLanguage` and `readState`, which
// take it from the URL; `choose`, which changes it, and `onChoice`, which says what follows then.

import { settings, TOKEN } from "./settings.js";
import { DAY, dayKey, iso, now, wallClock } from "./time.js";
import { isLanguage } from "./words.js";

const given = new URLSearchParams(location.search);

export const state = {
  days: 1, // the period is the last so many days,
  from: null, // or it begins here
  to: null, // and ends here, or now
  zoom: null, // the part of it that is shown: {from, to}
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
  const moving = state.to == null || state.to >= t;
  frame = {
    since: state.from ?? t - state.days * DAY,
    until: moving ? t : state.to,
    moving,
  };
}

// ---- From the URL, and back into it

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
  const days = Number(given.get("days"));
  if (settings.presets.includes(days)) state.days = days;

  const from = readTime(given.get("from"));
  const to = readTime(given.get("to"));
  if (from && to && from < to) {
    state.from = from;
    state.to = to;
  } else if (from && !to) {
    state.from = from;
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
export function writeState() {
  const query = new URLSearchParams();
  const { days, from, to, device, floor, zoom, lang, sort, down } = state;
  if (TOKEN) query.set("token", TOKEN);
  if (from == null) query.set("days", days);
  if (from != null) query.set("from", localInput(from));
  if (to != null) query.set("to", localInput(to));
  if (device) query.set("device", device);
  if (floor !== settings.floor) query.set("floor", floor);
  if (zoom) query.set("zoom", `${isoSeconds(zoom.from)}/${isoSeconds(zoom.to)}`);
  if (given.get("lang") || languageWasChosen) query.set("lang", lang);
  if (sort !== "start" || !down) query.set("sort", down ? `-${sort}` : sort);
  history.replaceState(null, "", `?${query}`);
}

function isoSeconds(t) {
  return `${iso(t).slice(0, 19)}Z`;
}

// ---- Choices

// `action(asks)` is called after each choice; `asks` says whether it takes new answers.
export function onChoice(action) {
  afterChoice = action;
}

export function choose(change) {
  Object.assign(state, change);
  moveFrame();
  writeState();
  afterChoice(true);
}

// A choice that needs no new answers: a language, an order.
export function chooseLook(change) {
  Object.assign(state, change);
  if ("lang" in change) languageWasChosen = true;
  writeState();
  afterChoice(false);
}
