// Energy per day, or per month in a long period: a bar for each, made up of its channels, and the
// same as a table. A click on a bar makes it the period.
//
// Exports `drawDays` and `listenToDays`.

import { LEFT, RIGHT, label, levelLines, pixels, rectangle, valueTicks } from "./axes.js";
import { byId, element, isOutdated, on, setAttributes, setText, svg } from "./dom.js";
import { dayName, energyText, formatDate, hasPrice, kwh, number } from "./format.js";
import { channels, directory, gapsOf, rowsOf, sum } from "./model.js";
import { answerOfPeriod, answers, barUnit, isCurrent } from "./questions.js";
import { choosePeriod } from "./state.js";
import { energyCells, tableHead, tableRow } from "./tables.js";
import { dayKey, startOf } from "./time.js";
import { word } from "./words.js";

// From 0 to 1. The largest channel is the darkest.
const SHADES = [1, 0.68, 0.44, 0.26, 0.12];

// The days, or months, that are drawn: {t, wh, whByChannel, hasGap}, t being when it began, and wh
// null without rows.
let days = [];
let unit = "day";

export function drawDays() {
  const box = byId("days");
  const width = box.clientWidth;
  byId("energy").classList.toggle("stale", !isCurrent("energy"));
  const answer = answerOfPeriod("energy");
  if (!answer || width === 0) return;
  unit = barUnit();
  setText(byId("energytitle"), word(unit === "day" ? "perDay" : "perMonth"));
  const lastDay = startOf(unit, answer.until - 1);
  const { signature } = directory();
  const gaps = answers.gaps?.version;
  if (!isOutdated(box, answer.version, answer.since, lastDay, width, signature, gaps)) return;

  days = readDays(answer);
  const layers = makeLayers();
  setText(byId("energyrange"), rangeText());
  drawBars(box.querySelector("svg"), layers, width);
  drawLegend(layers);
  drawDayTable();
}

export function listenToDays() {
  on(byId("daytable"), "toggle", drawDayTable);
}

// ---- Days and layers

function readDays(answer) {
  const list = [];
  const byKey = new Map();
  const gaps = channels().flatMap(gapsOf);
  for (let t = startOf(unit, answer.since); t < answer.until; t = startOf(unit, t, 1)) {
    const end = startOf(unit, t, 1);
    const hasGap = gaps.some((gap) => gap.from < end && gap.to > t);
    const day = { t, wh: null, whByChannel: new Map(), hasGap };
    list.push(day);
    byKey.set(dayKey(t), day);
  }
  for (const channel of channels()) {
    for (const row of rowsOf(answer, channel)) {
      const day = byKey.get(row[unit]);
      if (!day || row.energy_wh == null) continue;
      day.whByChannel.set(channel.key, row.energy_wh);
      day.wh = (day.wh ?? 0) + row.energy_wh;
    }
  }
  return list;
}

// What a bar is made up of, from below: [{name, keys}], keys being those of its channels. The
// largest is at the bottom. Where there are more channels than shades, the small ones share one.
function makeLayers() {
  const whOfAllDays = new Map();
  for (const channel of channels()) {
    const wh = sum(days, (day) => day.whByChannel.get(channel.key));
    whOfAllDays.set(channel.key, wh);
  }
  const ranked = [...channels()];
  ranked.sort((one, other) => whOfAllDays.get(other.key) - whOfAllDays.get(one.key));

  let singles = ranked.length;
  if (ranked.length > SHADES.length) singles = SHADES.length - 1;
  const layers = [];
  for (const channel of ranked.slice(0, singles)) {
    layers.push({ name: channel.label, keys: [channel.key] });
  }
  const others = ranked.slice(singles);
  if (others.length > 0) {
    const keys = others.map((channel) => channel.key);
    layers.push({ name: word("others", others.length), keys });
  }
  return layers;
}

function whOfLayer(day, layer) {
  return sum(layer.keys, (key) => day.whByChannel.get(key));
}

function rangeText() {
  const first = days[0];
  const last = days.at(-1);
  let period = nameOf(first);
  const whole = word(unit === "day" ? "wholeDays" : "wholeMonths");
  if (days.length > 1) period += ` – ${nameOf(last)}, ${whole}`;
  const total = energyText(sum(days, (day) => day.wh));
  return `${period} · ${word("total")} ${total}`;
}

function nameOf(day) {
  return unit === "day" ? dayName(day.t) : formatDate("long_month", day.t);
}

// ---- The picture

const BOTTOM = 140; // of the bars, in pixels,
const HIGHEST = 120; // and the height of the highest
const AXIS = 24; // room below them, for the days
const LABEL_ROOM = 52; // that a day's name takes
const VALUE_ROOM = 34; // that a value takes
const NAMED_EVERY = [1, 2, 3, 7, 14, 28, 91, 365]; // as many as there is room for

// Where day number `index` stands in the picture, and how high so many Wh are.
function makeScale(width) {
  const right = width - RIGHT;
  const slot = Math.min((right - LEFT) / days.length, 96);
  const barWidth = Math.max(1.5, Math.min(slot * 0.72, 60));
  const highest = Math.max(...days.map((day) => day.wh)) || 1000;
  return {
    width,
    right,
    slot,
    barWidth,
    highest,
    left: (index) => pixels(LEFT + slot * index),
    barLeft: (index) => pixels(LEFT + slot * index) + (slot - barWidth) / 2,
    y: (wh) => pixels(BOTTOM - (wh / highest) * HIGHEST),
  };
}

function drawBars(picture, layers, width) {
  const scale = makeScale(width);
  const levels = valueTicks(0, scale.highest, 4);
  const shapes = levelLines(levels, scale.y, scale.right, (wh) => number(wh / 1000, 2));
  const every = NAMED_EVERY.find((count) => count * scale.slot >= LABEL_ROOM);
  days.forEach((day, index) => {
    shapes.push(...barShapes(day, index, layers, scale));
    // Counted from the last day, which so always has a name.
    if ((days.length - 1 - index) % every === 0) shapes.push(dayLabel(day, index, scale));
    shapes.push(hoverShape(day, index, layers, scale));
  });
  setAttributes(picture, {
    height: BOTTOM + AXIS,
    "aria-label": `${byId("energytitle").textContent}, ${byId("energyrange").textContent}`,
  });
  picture.replaceChildren(...shapes);
}

function barShapes(day, index, layers, scale) {
  const { barWidth, y } = scale;
  const x = scale.barLeft(index);
  if (day.wh == null) return [rectangle("gap", x, BOTTOM - 24, barWidth, 24)];
  const shapes = [];
  if (day.hasGap) shapes.push(rectangle("gap", x, BOTTOM + 1, barWidth, 4));
  let below = 0;
  layers.forEach((layer, shade) => {
    const wh = whOfLayer(day, layer);
    if (wh <= 0) return;
    const top = y(below + wh);
    shapes.push(barPiece(x, top, barWidth, y(below) - top, shade));
    below += wh;
  });
  if (scale.slot >= VALUE_ROOM) {
    shapes.push(label(x + barWidth / 2, y(day.wh) - 5, "middle", kwh(day.wh)));
  }
  return shapes;
}

function barPiece(x, y, width, height, shade) {
  const piece = rectangle("bar", x, y, width, pixels(height));
  piece.setAttribute("fill-opacity", SHADES[shade]);
  return piece;
}

function dayLabel(day, index, scale) {
  let style = scale.slot >= LABEL_ROOM ? "weekday" : "tick";
  if (unit === "month") style = "month";
  const middle = scale.barLeft(index) + scale.barWidth / 2;
  return label(Math.min(middle, scale.width - 22), BOTTOM + 16, "middle", formatDate(style, day.t));
}

// Over the whole height, so that a mouse on it shows the day's values.
function hoverShape(day, index, layers, scale) {
  const lines = [`${nameOf(day)} · ${day.wh == null ? word("noRows") : energyText(day.wh)}`];
  if (day.hasGap) lines.push(word("hasGap"));
  for (const layer of layers) {
    const wh = whOfLayer(day, layer);
    if (wh > 0) lines.push(`${layer.name} · ${kwh(wh)} kWh`);
  }
  const shape = rectangle("whole", scale.left(index), 0, scale.slot, BOTTOM);
  shape.append(svg("title", {}, lines.join("\n")));
  const period = { unit, at: day.t };
  on(shape, "click", () => choosePeriod(period));
  return shape;
}

function drawLegend(layers) {
  const legend = byId("legend");
  legend.hidden = layers.length < 2;
  const items = layers.map(({ name }, shade) => {
    const sample = svg("svg", { "aria-hidden": true }, barPiece(0.5, 0.5, 11, 11, shade));
    return element("li", {}, sample, name);
  });
  legend.replaceChildren(...items);
}

// ---- The table

function drawDayTable() {
  if (!byId("daytable").open) return;
  // One channel is its own total.
  const shown = channels().length > 1 ? channels() : [];
  const titles = [word(unit), `${word("total")}, kWh`];
  if (hasPrice()) titles.push(word("cost"));
  for (const channel of shown) titles.push(channel.label);

  const rows = days.map((day) => {
    const ofChannels = shown.map((channel) => kwh(day.whByChannel.get(channel.key)));
    return tableRow(nameOf(day), [...energyCells(day.wh), ...ofChannels]);
  });
  const table = element("table", {}, tableHead(titles), element("tbody", {}, ...rows));
  byId("daysbox").setAttribute("aria-label", byId("energytitle").textContent);
  byId("daysbox").replaceChildren(table);
}
