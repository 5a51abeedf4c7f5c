// Energy per day: a bar for each day, made up of its channels, and the same as a table.
//
// Exports `drawDays` and `listenToDays`.

import { LEFT, RIGHT, label, levelLines, pixels, rectangle, valueTicks } from "./axes.js";
import { byId, element, isOutdated, on, setAttributes, setText, svg } from "./dom.js";
import { dayName, energyText, formatDate, hasPrice, kwh, number } from "./format.js";
import { channels, directory, rowsOf, sum } from "./model.js";
import { answerFor, isCurrent } from "./questions.js";
import { energyCells, tableHead, tableRow } from "./tables.js";
import { dayKey, midnight } from "./time.js";
import { word } from "./words.js";

// From 0 to 1. The largest channel is the darkest.
const SHADES = [1, 0.68, 0.44, 0.26, 0.12];

// The days that are drawn: {t, wh, whByChannel}, t being the midnight, and wh null without rows.
let days = [];

export function drawDays() {
  const box = byId("days");
  const width = box.clientWidth;
  byId("energy").classList.toggle("stale", !isCurrent("energy"));
  const answer = answerFor("energy");
  if (!answer || width === 0) return;
  const lastDay = midnight(answer.until - 1);
  const { signature } = directory();
  if (!isOutdated(box, answer.version, answer.since, lastDay, width, signature)) return;

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
  for (let t = midnight(answer.since); t < answer.until; t = midnight(t, 1)) {
    const day = { t, wh: null, whByChannel: new Map() };
    list.push(day);
    byKey.set(dayKey(t), day);
  }
  for (const channel of channels()) {
    for (const row of rowsOf(answer, channel)) {
      const day = byKey.get(row.day);
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
  let period = dayName(first.t);
  if (days.length > 1) period += ` – ${dayName(last.t)}, ${word("wholeDays")}`;
  const total = energyText(sum(days, (day) => day.wh));
  return `${period} · ${word("total")} ${total}`;
}

// ---- The picture

const BOTTOM = 140; // of the bars, in pixels,
const HIGHEST = 120; // and the height of the highest
const AXIS = 24; // room below them, for the days
const LABEL_ROOM = 52; // that a day's name takes
const VALUE_ROOM = 34; // that a value takes
const NAMED_EVERY = [1, 2, 7, 14, 28, 91, 365]; // days, as many as there is room for

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
    "aria-label": `${word("perDay")}, ${byId("energyrange").textContent}`,
  });
  picture.replaceChildren(...shapes);
}

function barShapes(day, index, layers, scale) {
  const { barWidth, y } = scale;
  const x = scale.barLeft(index);
  if (day.wh == null) return [rectangle("gap", x, BOTTOM - 24, barWidth, 24)];
  const shapes = [];
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
  const style = scale.slot >= LABEL_ROOM ? "weekday" : "tick";
  const middle = scale.barLeft(index) + scale.barWidth / 2;
  return label(Math.min(middle, scale.width - 22), BOTTOM + 16, "middle", formatDate(style, day.t));
}

// Over the whole height, so that a mouse on it shows the day's values.
function hoverShape(day, index, layers, scale) {
  const lines = [`${dayName(day.t)} · ${day.wh == null ? word("noRows") : energyText(day.wh)}`];
  for (const layer of layers) {
    const wh = whOfLayer(day, layer);
    if (wh > 0) lines.push(`${layer.name} · ${kwh(wh)} kWh`);
  }
  const shape = rectangle("whole", scale.left(index), 0, scale.slot, BOTTOM);
  shape.append(svg("title", {}, lines.join("\n")));
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
  const titles = [word("day"), `${word("total")}, kWh`];
  if (hasPrice()) titles.push(word("cost"));
  for (const channel of shown) titles.push(channel.label);

  const rows = days.map((day) => {
    const ofChannels = shown.map((channel) => kwh(day.whByChannel.get(channel.key)));
    return tableRow(dayName(day.t), [...energyCells(day.wh), ...ofChannels]);
  });
  const table = element("table", {}, tableHead(titles), element("tbody", {}, ...rows));
  byId("daysbox").replaceChildren(table);
}
