// The section of strips: for each channel, and each sum of phases, what it does now, its picture,
// and the picture's values as a table.
//
// Exports `drawStrips`.

import { LEFT, RIGHT, timeTicks } from "./axes.js";
import { drawChart, drawCursors, readout, strips } from "./chart.js";
import { byId, element, isOutdated, on, setText } from "./dom.js";
import {
  NBSP,
  NONE,
  change,
  dayClock,
  duration,
  energyText,
  joined,
  kwh,
  moment,
  number,
  percent,
  watts,
} from "./format.js";
import { listenTo } from "./gestures.js";
import {
  coverageOf,
  directory,
  phasesOf,
  rowsOf,
  shareOf,
  stateOf,
  sum,
  wholeShareOf,
} from "./model.js";
import { nameBefore, periodName } from "./period.js";
import {
  answerOfPeriod,
  answers,
  energyOfPeriod,
  runsMissing,
  subject,
  trouble,
} from "./questions.js";
import { settings } from "./settings.js";
import { frame, state } from "./state.js";
import { tableHead, tableRow } from "./tables.js";
import { language, word } from "./words.js";

const TALL = 84; // pixels of a plot,
const LOW = 56; // and where there are many
const MANY = 8;

export function drawStrips() {
  const box = byId("strips");
  const channels = directory().shown;
  for (const channel of channels) {
    if (!strips.has(channel.key)) strips.set(channel.key, makeStrip(channel.key));
  }
  const shown = channels.map((channel) => strips.get(channel.key));
  if (isOutdated(box, ...shown.map((strip) => strip.key))) {
    box.replaceChildren(...shown.map((strip) => strip.root));
  }
  const isStale = trouble != null && answers.power?.about !== subject();
  byId("power").classList.toggle("stale", isStale);

  const width = box.clientWidth;
  if (width === 0) return;
  const visible = state.zoom || { from: frame.since, to: frame.until };
  const ticks = timeTicks(visible.from, visible.to, width - LEFT - RIGHT);
  const height = channels.length > MANY ? LOW : TALL;
  channels.forEach((channel, index) => {
    const strip = shown[index];
    strip.channel = channel;
    drawHead(strip);
    drawChart(strip, visible, width, ticks, height);
    drawValues(strip);
  });
  drawCursors();
}

// A strip and the elements in it that are filled; their classes are in index.html's template.
function makeStrip(key) {
  const root = byId("strip").content.firstElementChild.cloneNode(true);

  function part(name) {
    return root.querySelector(`.${name}`);
  }

  const strip = {
    key,
    root,
    channel: null,
    plot: null,
    name: part("name"),
    now: part("now"),
    state: part("state"),
    used: part("used"),
    compared: part("compared"),
    share: part("share"),
    picture: part("picture"),
    grid: part("grid"),
    gaps: part("gaps"),
    lines: part("lines"),
    runs: part("runs"),
    over: part("over"),
    readout: part("readout"),
    details: part("details"),
    summary: part("summary"),
    table: part("box"),
  };
  on(strip.details, "toggle", () => drawValues(strip));
  listenTo(strip);
  return strip;
}

// ---- What it does now

function drawHead(strip) {
  const { channel } = strip;
  const { kind, text } = stateOf(channel);
  strip.root.className = `strip ${kind}`;
  strip.root.classList.toggle("sum", channel.phases != null);
  strip.root.classList.toggle("phase", channel.isPhase === true);
  setText(strip.name, channel.label);
  setText(strip.now, kind === "silent" ? NONE : watts(powerNow(channel)));
  setText(strip.state, stateText(channel, text));
  setText(strip.used, usedText(channel));
  setText(strip.compared, comparedText(channel));
  setText(strip.share, shareText(channel));
}

// What was heard too long ago counts as nothing: it is off, or the strip says that it is silent.
function powerNow(channel) {
  const { at } = answers.channels;
  return sum(phasesOf(channel), (phase) => {
    return at - phase.at > settings.silentAfter ? 0 : phase.apower_w;
  });
}

function stateText(channel, text) {
  if (!channel.phases) return text;
  return joined([word("phases", channel.phases.length), text]);
}

// The energy of the period, what was given back, and runs. Of a sum, runs are not computed.
function usedText(channel) {
  const name = word("colon", periodName());
  const energy = energyOfPeriod();
  if (!energy) return `${name} …`;
  const texts = [`${name} ${energyText(drawnWh(channel, energy))}`];
  const givenBack = sum(energyRows(channel, energy), (row) => row.energy_returned_wh);
  if (givenBack >= 0.5) texts.push(word("givenBack", `${kwh(givenBack)}${NBSP}kWh`));
  if (!channel.phases && runsMissing() == null) texts.push(runsText(channel));
  return joined(texts);
}

function energyRows(channel, energy) {
  return phasesOf(channel).flatMap((phase) => rowsOf(energy, phase));
}

function drawnWh(channel, energy) {
  return sum(energyRows(channel, energy), (row) => row.energy_wh);
}

function runsText(channel) {
  const answer = answerOfPeriod("cycles");
  if (!answer) return "…";
  const runs = rowsOf(answer, channel);
  const count = word("runCount", runs.length);
  if (runs.length === 0) return count;
  const time = sum(runs, (run) => run.ended_at - run.started_at);
  return `${count}, ${duration(time)}`;
}

const COMPARABLE = 0.98; // of the minutes, at least, in both periods

function comparedText(channel) {
  const energy = energyOfPeriod();
  const before = answerOfPeriod("energyBefore");
  const coverages = [answerOfPeriod("coverage"), answerOfPeriod("coverageBefore")];
  if (!energy || !before || !coverages.every(Boolean)) return "";
  if (coverages.some((answer) => wholeShareOf(channel, answer) < COMPARABLE)) return "";
  const text = change(drawnWh(channel, energy), drawnWh(channel, before));
  return text == null ? "" : `${text} ${word("on", nameBefore())}`;
}

// Which share of the minutes is there.
function shareText(channel) {
  const coverage = coverageOf(channel);
  if (coverage && coverage.rows) {
    return word("share", percent(shareOf(coverage))) + sinceText(channel);
  }
  return answers.coverage ? word("noRows") : "";
}

// Since when, if its rows begin later than the period. Where rows are kept only while it runs, that
// would mean nothing.
function sinceText(channel) {
  if (settings.keptAbove != null || !answers.coverage) return "";
  const firstRows = phasesOf(channel).map((phase) => coverageOf(phase)?.first_row);
  const first = Math.max(...firstRows);
  if (first - answers.coverage.since > settings.silentAfter) {
    return ` ${word("since", moment(first))}`;
  }
  return "";
}

// ---- The values of the picture

function drawValues(strip) {
  const { channel, details, plot, summary, table } = strip;
  setText(summary, word("values"));
  if (!details.open) return;
  const { from, to, step, until } = plot;
  if (!isOutdated(table, until, from, to, step, plot.buckets.length, language)) return;

  const lines = [];
  for (const bucket of plot.buckets) {
    if (bucket.bucket + step <= from || bucket.bucket >= to) continue;
    const values = [watts(bucket.mean_w), watts(bucket.max_w), number(bucket.rows)];
    lines.push({ t: bucket.bucket, row: tableRow(dayClock(bucket.bucket), values) });
  }
  for (const gap of plot.absences) {
    if (gap.to <= from || gap.from >= to) continue;
    lines.push({ t: gap.from, row: gapRow(strip, gap) });
  }
  lines.sort((one, other) => one.t - other.t);

  const titles = [word("time"), word("mean"), word("maximum"), word("rows")];
  const rows = lines.map((line) => line.row);
  table.setAttribute("aria-label", `${channel.label}, ${word("values")}`);
  table.replaceChildren(element("table", {}, tableHead(titles), element("tbody", {}, ...rows)));
}

function gapRow(strip, gap) {
  const text = readout(strip, gap.from, false);
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, dayClock(gap.from)),
    element("td", { colspan: 3, class: "dim" }, text),
  );
}
