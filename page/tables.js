// Tables: how they are made, the runs, and what is missing.
//
// Exports `tableHead`, `tableRow`, `energyCells` for every table of the page; `makeTables`,
// `drawRuns` and `drawCoverage`.

import { byId, element, isOutdated, on, setText } from "./dom.js";
import {
  NONE,
  clock,
  compareNames,
  cost,
  dayClock,
  duration,
  hasPrice,
  joined,
  kwh,
  number,
} from "./format.js";
import { channels, directory, rowsOf, stateOf, sum } from "./model.js";
import { answerFor, isCurrent, runsMissing } from "./questions.js";
import { settings } from "./settings.js";
import { chooseLook, state } from "./state.js";
import { MINUTE, midnight } from "./time.js";
import { word } from "./words.js";

// ---- How tables are made

export function tableHead(titles) {
  const cells = titles.map((title) => element("th", { scope: "col" }, title));
  return element("thead", {}, element("tr", {}, ...cells));
}

// A cell is a text, or a list of texts and elements.
export function tableRow(title, contents) {
  return element("tr", {}, element("th", { scope: "row" }, title), ...makeCells(contents));
}

function makeCells(contents) {
  return contents.map((content) => element("td", {}, ...[content].flat()));
}

// kWh, and the cost where there is a price.
export function energyCells(wh) {
  return hasPrice() ? [kwh(wh), cost(wh)] : [kwh(wh)];
}

// Their columns do not change; main.js writes their titles by `data-word`, in the language chosen.
export function makeTables() {
  for (const { name } of runColumns()) {
    const button = element("button", {});
    on(button, "click", () => sortBy(name));
    addColumn("runs", name, button);
  }
  for (const name of coverageColumns()) {
    addColumn("coverage", name);
  }
  on(byId("all"), "click", () => {
    showsAllRuns = true;
    drawRuns();
  });
}

function addColumn(section, name, ...content) {
  const row = byId(section).querySelector("thead tr");
  row.append(element("th", { scope: "col", "data-word": name }, ...content));
}

// ---- Runs

const MOST_RUNS = 200; // until the reader asks for all
let showsAllRuns = false;

// `value` is the field by which a run is sorted.
const RUN_COLUMNS = [
  { name: "channel", value: "label" },
  { name: "start", value: "started_at" },
  { name: "end", value: "ended_at" },
  { name: "duration", value: "duration" },
  { name: "kWh", value: "energy_wh" },
  { name: "cost", value: "energy_wh" },
  { name: "meanW", value: "mean_w" },
  { name: "maxW", value: "max_w" },
  { name: "A", value: "mean_a" },
  { name: "V", value: "median_v" },
];

function runColumns() {
  return RUN_COLUMNS.filter((column) => hasPrice() || column.name !== "cost");
}

// Names from A to Z first, numbers and times from the largest; a second click turns it round.
function sortBy(name) {
  if (state.sort === name) {
    chooseLook({ down: !state.down });
  } else {
    chooseLook({ sort: name, down: name !== "channel" });
  }
}

export function drawRuns() {
  const box = byId("runsbox");
  const missing = runsMissing();
  box.hidden = missing != null;
  byId("runslinks").hidden = missing != null;
  setText(byId("runsmissing"), missing ? word(missing.key, missing.value) : "");
  byId("runs").classList.toggle("stale", !missing && !isCurrent("cycles"));
  markSortedColumn(box);
  const answer = answerFor("cycles");
  if (missing || !answer) return;
  const runningNow = new Set();
  for (const channel of channels()) {
    if (stateOf(channel).kind === "running") runningNow.add(channel.key);
  }
  const chosen = [answer.since, state.sort, state.down, showsAllRuns];
  if (!isOutdated(box, answer.version, directory().signature, ...chosen, ...runningNow)) return;

  const runs = sortedRuns(answer, runningNow);
  const shown = showsAllRuns ? runs : runs.slice(0, MOST_RUNS);
  let rows = shown.map((run) => runRow(run, answer));
  if (runs.length === 0) rows = [emptyRow()];
  box.querySelector("tbody").replaceChildren(...rows);
  box.querySelector("tfoot").replaceChildren(...totalRows(runs));
  byId("all").hidden = shown.length === runs.length;
  setText(byId("all"), word("showAll", runs.length));
}

function markSortedColumn(box) {
  const way = state.down ? "descending" : "ascending";
  for (const cell of box.querySelectorAll("thead th")) {
    if (cell.dataset.word === state.sort) cell.setAttribute("aria-sort", way);
    else cell.removeAttribute("aria-sort");
  }
}

function sortedRuns(answer, runningNow) {
  const runs = [];
  for (const channel of channels()) {
    for (const run of rowsOf(answer, channel)) {
      const isOn = run.ongoing && runningNow.has(channel.key);
      runs.push({ ...run, label: channel.label, duration: run.ended_at - run.started_at, isOn });
    }
  }
  const column = runColumns().find(({ name }) => name === state.sort);
  const field = column ? column.value : "started_at";
  return runs.sort((one, other) => compareRuns(one, other, field));
}

// What has no value comes last, either way; of the same value, the latest run comes first.
function compareRuns(one, other, field) {
  const a = one[field];
  const b = other[field];
  if (a == null && b != null) return 1;
  if (a != null && b == null) return -1;
  const order = field === "label" ? compareNames(a, b) : a - b;
  if (order === 0) return other.started_at - one.started_at;
  return state.down ? -order : order;
}

function runRow(run, answer) {
  const { beganEarlier, goesOn } = cutOff(run, answer);
  return tableRow(run.label, [
    withNote(dayClock(run.started_at), beganEarlier && word("began")),
    withNote(endText(run), goesOn && word("goesOn")),
    duration(run.duration),
    ...energyCells(run.energy_wh),
    number(run.mean_w),
    number(run.max_w),
    number(run.mean_a, 2, 2),
    number(run.median_v),
  ]);
}

function endText(run) {
  if (run.isOn) return word("ongoing");
  const isSameDay = midnight(run.started_at) === midnight(run.ended_at);
  return isSameDay ? clock(run.ended_at) : dayClock(run.ended_at);
}

// At which ends of the period a run is cut off. The collector says that it is; not where.
function cutOff(run, answer) {
  if (run.complete) return { beganEarlier: false, goesOn: false };
  const beganEarlier = isNear(run.started_at, answer.since);
  const isCutAtEnd = !beganEarlier || isNear(run.ended_at, answer.until);
  return { beganEarlier, goesOn: !run.ongoing && isCutAtEnd };
}

function isNear(t, edge) {
  return Math.abs(t - edge) < 1.5 * settings.rowLength;
}

function withNote(text, note) {
  if (!note) return text;
  return [text, element("small", {}, ` (${note})`)];
}

function emptyRow() {
  const attributes = { colspan: runColumns().length, class: "dim" };
  return element("tr", {}, element("td", attributes, word("noRuns")));
}

function totalRows(runs) {
  if (runs.length === 0) return [];
  const title = joined([word("total"), word("runCount", runs.length)]);
  const time = sum(runs, (run) => run.duration);
  const energy = sum(runs, (run) => run.energy_wh);
  const cells = makeCells([duration(time), ...energyCells(energy), "", "", "", ""]);
  return [element("tr", {}, element("th", { scope: "row", colspan: 3 }, title), ...cells)];
}

// ---- What is missing

function coverageColumns() {
  const isMinute = settings.rowLength === MINUTE;
  const missing = isMinute ? "missing_minutes" : "missing_rows";
  return ["channel", "first_row", "last_row", "rows", missing, "longest_gap", "resets"];
}

export function drawCoverage() {
  const box = byId("coveragebox");
  byId("coverage").classList.toggle("stale", !isCurrent("coverage"));
  const answer = answerFor("coverage");
  if (!answer || !isOutdated(box, answer.version, directory().signature)) return;
  const rows = channels().map((channel) => coverageRow(channel, answer));
  box.querySelector("tbody").replaceChildren(...rows);
}

function coverageRow(channel, answer) {
  const [coverage] = rowsOf(answer, channel);
  if (!coverage || !coverage.rows) {
    return tableRow(channel.label, [word("noRows"), dayClock(channel.at), "0", NONE, NONE, NONE]);
  }
  const gap = coverage.longest_gap;
  return tableRow(channel.label, [
    dayClock(coverage.first_row),
    dayClock(coverage.last_row),
    number(coverage.rows),
    number(coverage.missing),
    gap ? duration(gap * 1000) : NONE,
    number(coverage.resets),
  ]);
}
