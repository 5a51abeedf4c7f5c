// The page from its start on: asks for the settings, then for answers, and draws them; the controls
// in its head; the clock. Names and ids that come from a device are only ever texts.
//
// From bottom to top, no module knows a later one:
//   time, words, settings, state   what is given and what is chosen
//   dom, format, period, axes      how things are written and drawn
//   questions, model               what is asked, and what the answers mean
//   chart, gestures, tables, strips, days, gaps, empty   the sections of the page

import { clearCursor, unzoom } from "./gestures.js";
import { pointer } from "./chart.js";
import { drawDays, listenToDays } from "./days.js";
import { byId, element, isOutdated, on, setText } from "./dom.js";
import { drawEmpty, listenToCopy } from "./empty.js";
import { NBSP, clock, joined, moment, span } from "./format.js";
import { drawGaps, listenToGaps } from "./gaps.js";
import { channels, directory, silentChannels, silentSince } from "./model.js";
import { drawArrows, listenToArrows, periodTitle } from "./period.js";
import {
  address,
  answers,
  barFrame,
  barUnit,
  health,
  listenToAnswers,
  refresh,
  refreshedAt,
  trouble,
  working,
} from "./questions.js";
import { loadSettings, settings } from "./settings.js";
import {
  UNITS,
  choose,
  chooseLook,
  choosePeriod,
  frame,
  localInput,
  onChoice,
  readLanguage,
  readState,
  readTime,
  state,
  writeState,
} from "./state.js";
import { drawStrips } from "./strips.js";
import { drawCoverage, drawRuns, makeTables } from "./tables.js";
import { iso, now, zone } from "./time.js";
import { useLanguage, word } from "./words.js";

const SECTIONS = ["power", "energy", "runs", "coverage"];

start();

async function start() {
  readLanguage();
  speak();
  const loaded = await loadSettings((reason) => say(word(reason)));
  if (!loaded) {
    say(word("token"));
    byId("main").setAttribute("aria-busy", false);
    return;
  }
  readState();
  makePeriods();
  makeTables();
  listenToControls();
  listenToDays();
  listenToAnswers({ onAnswer: draw, onHealth: drawHealth, onLate: () => say(word("busy")) });
  onChoice((asks) => {
    draw();
    if (asks) refresh();
  });
  translate();
  byId("header").hidden = false;
  setText(byId("version"), `Shelly collector ${settings.version}`);
  writeState();
  draw();
  refresh();
  keepUpToDate();
}

// ---- Drawing

let isDrawing = false;

// Draws everything, once per frame of the screen; what has not changed is left alone.
function draw() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    drawNow();
  });
}

function drawNow() {
  byId("main").setAttribute("aria-busy", working);
  drawHeader();
  drawHealth();
  const hasRows = answers.channels != null && answers.channels.rows.length > 0;
  byId("empty").hidden = !answers.channels || hasRows;
  for (const id of SECTIONS) byId(id).hidden = !hasRows;
  if (!hasRows) {
    drawEmpty();
    return;
  }
  drawStrips();
  drawDays();
  drawRuns();
  drawGaps();
  drawCoverage();
  drawLinks();
}

// A line above everything else; an empty text takes it away.
function say(text) {
  setText(byId("notice"), text);
  byId("notice").hidden = text === "";
}

function drawHeader() {
  const { devices } = directory();
  const name = nameOfWhatIsShown(devices);
  const hasSeveral = devices.length > 1;
  setText(byId("title"), name);
  byId("title").classList.toggle("hidden", hasSeveral);
  byId("device").hidden = !hasSeveral;
  drawDevices(devices);
  let chosen = state.unit;
  if (chosen === "" && state.from == null) chosen = String(state.days);
  for (const button of byId("periods").children) {
    button.setAttribute("aria-pressed", button.value === chosen);
  }
  drawArrows();
  for (const button of byId("languages").children) {
    button.setAttribute("aria-pressed", button.value === state.lang);
  }
  setField("from", localInput(state.from));
  setField("to", localInput(state.to));
  setField("floor", state.floor);

  const title = periodTitle();
  const range = span(frame.since, frame.until);
  setText(byId("periodname"), title);
  setText(byId("period"), title);
  setText(byId("range"), title === range ? "" : range);
  setText(byId("runsrange"), title);
  document.title = `${title} · ${name}`;

  byId("zoombar").hidden = !state.zoom;
  if (state.zoom) {
    const zoomed = span(state.zoom.from, state.zoom.to);
    setText(byId("zoomtext"), `${word("zoom")} · ${zoomed}`);
  }
  say(troubleText());
}

function nameOfWhatIsShown(devices) {
  const chosen = devices.find((device) => device.id === state.device);
  if (chosen) return chosen.name;
  if (devices.length > 1) return word("all");
  return devices.length === 1 ? devices[0].name : "Shelly";
}

function drawDevices(devices) {
  const select = byId("device");
  const choices = [{ id: "", name: word("all") }, ...devices];
  const texts = choices.map(({ id, name }) => `${id}\n${name}`);
  if (isOutdated(select, ...texts)) {
    const options = choices.map(({ id, name }) => element("option", { value: id }, name));
    select.replaceChildren(...options);
  }
  select.value = state.device;
}

// Nobody is interrupted while he writes.
function setField(id, value) {
  if (document.activeElement !== byId(id)) byId(id).value = value;
}

// Why answers are missing, and of when those are that are shown.
function troubleText() {
  if (!trouble) return "";
  if (trouble.status === 401) return word("token");
  let text = "";
  if (trouble.status) text += `${trouble.message}; `;
  if (answers.channels) text += word("shown", clock(answers.channels.at));
  return text;
}

const USUALLY_WAITING = 1000; // rows; so many are only just on their way

function drawHealth() {
  if (!health) return;
  const isAway = health.database !== "connected";
  const dropped = Number(health["rows dropped"]) || 0;
  let waiting = Number(health["rows waiting"]) || 0;
  if (!isAway && waiting <= USUALLY_WAITING) waiting = 0;

  const texts = [];
  if (!health.database) texts.push(word("noAnswer"));
  else if (isAway) texts.push(word("away"));
  else if (waiting === 0) texts.push(...sendingTexts());
  if (waiting > 0) texts.push(word("waiting", waiting));
  if (dropped > 0) texts.push(word("dropped", dropped));
  const isSilent = answers.channels != null && silentChannels().length > 0;
  byId("health").className = isAway || waiting > 0 || isSilent ? "away" : "";
  setText(byId("health"), joined(texts));
}

// How many channels send, or which do not.
function sendingTexts() {
  const all = channels().length;
  if (all === 0) return [];
  const silent = silentChannels();
  const at = clock(answers.channels.at);
  if (silent.length === 0) return [word("send", `${all} ${word("outOf")} ${all}`), at];
  const count = word("areSilent", `${silent.length} ${word("outOf")} ${all}`);
  const since = Math.min(...silent.map(silentSince));
  return [`${count}, ${word("since", moment(since))}`, at];
}

// The CSV files are those of what is chosen.
function drawLinks() {
  const since = iso(frame.since);
  const until = iso(frame.until);
  const runs = { since, until, min_power_w: state.floor };
  byId("runscsv").href = address("cycles.csv", runs);
  byId("runsexcel").href = address("cycles.csv", { ...runs, excel: 1, zone });
  const bars = { since: iso(barFrame().since), until, zone };
  byId("energycsv").href = address(barUnit() === "day" ? "energy.csv" : "months.csv", bars);
}

// ---- Words

function speak() {
  useLanguage(state.lang);
  document.documentElement.lang = state.lang;
}

// The texts of index.html: `data-t` for an element's text, `data-label` for a screen reader's,
// `data-word` for the title of a column.
function translate() {
  speak();
  for (const target of document.querySelectorAll("[data-t]")) {
    setText(target, word(target.dataset.t));
  }
  for (const target of document.querySelectorAll("[data-label]")) {
    target.setAttribute("aria-label", word(target.dataset.label));
  }
  for (const cell of document.querySelectorAll("[data-word]")) {
    setText(cell.querySelector("button") || cell, word(cell.dataset.word));
  }
  for (const button of byId("periods").children) setText(button, periodLabel(button.value));
}

function periodLabel(value) {
  if (UNITS.includes(value)) return word(value);
  return value === "1" ? `24${NBSP}h` : word("days", Number(value));
}

// ---- Controls

function makePeriods() {
  for (const unit of UNITS) addPeriod(unit, { unit });
  for (const days of new Set([1, settings.defaultDays])) addPeriod(days, { days });
}

function addPeriod(value, period) {
  const button = element("button", { value });
  on(button, "click", () => choosePeriod(period));
  byId("periods").append(button);
}

function listenToControls() {
  on(byId("device"), "change", (event) => choose({ device: event.target.value }));
  on(byId("from"), "change", () => whenTyped(chooseRange));
  on(byId("to"), "change", () => whenTyped(chooseRange));
  on(byId("floor"), "input", () => whenTyped(chooseFloor));
  on(byId("languages"), "click", chooseLanguage);
  on(byId("whole"), "click", unzoom);
  on(document, "keydown", (event) => {
    if (event.key !== "Escape") return;
    if (!pointer.drag) unzoom();
    clearCursor();
  });
  on(document, "pointerdown", (event) => {
    if (!event.target.closest(".chart")) clearCursor();
  });
  on(window, "resize", draw);
  on(window, "popstate", () => {
    readState();
    draw();
    refresh();
  });
  listenToArrows();
  listenToCopy();
  listenToGaps();
}

let typing = 0;

// A date comes digit by digit.
function whenTyped(action) {
  clearTimeout(typing);
  typing = setTimeout(action, 700);
}

const EARLIEST = 9e11; // 1998: a year that is not yet typed to its end comes before

function chooseRange() {
  const from = readTime(byId("from").value);
  const to = readTime(byId("to").value);
  if (from == null) {
    // An end alone is no period yet; without both, the free period is left.
    if (to == null && state.from != null) choosePeriod({});
    return;
  }
  if (from < EARLIEST || from >= (to ?? now())) {
    say(word("order"));
    return;
  }
  if (from !== state.from || to !== state.to) choosePeriod({ from, to });
}

// An empty field stands for the floor that the settings say.
function chooseFloor() {
  const { value, validity } = byId("floor");
  const floor = value === "" ? settings.floor : Number(value);
  if (validity.valid && floor !== state.floor) choose({ floor });
}

function chooseLanguage(event) {
  const button = event.target.closest("button");
  if (!button) return;
  chooseLook({ lang: button.value });
  translate();
}

// ---- The clock

const PAUSE = 60_000;
const PAUSE_BEFORE_FIRST_ROW = 10_000;
const PAUSE_AFTER_RETURN = 5_000; // to a page that was hidden

function keepUpToDate() {
  setInterval(() => {
    const isEmpty = answers.channels?.rows.length === 0;
    const pause = isEmpty ? PAUSE_BEFORE_FIRST_ROW : PAUSE;
    if (document.hidden || working || pointer.drag) return;
    if (performance.now() - refreshedAt >= pause) refresh();
  }, 1000);
  on(document, "visibilitychange", () => {
    if (document.hidden) return;
    if (performance.now() - refreshedAt > PAUSE_AFTER_RETURN) refresh(true);
  });
}
