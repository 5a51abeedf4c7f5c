// The picture of a channel: its power over time, in one strip of the page.
//
// A strip is {key, channel, plot, …}: the key of its channel or sum, that channel as model.js
// describes it, and the elements of its template (strips.js makes it). Its picture is an SVG
// of five layers, each a group that is filled anew when something changes:
//
//   grid    round values and moments, with their texts
//   gaps    hatched, where rows are missing
//   lines   mean power as a line in steps, up to its maximum as a pale band
//   runs    under the time axis, when it ran
//   over    the reader's cursor, and what he drags over
//
// `strip.plot` is what the picture shows, so that a moment of it can be looked up:
//
//   from, to                the moments at its left and right ends
//   buckets, step           rows of mean and maximum power, each for `step` ms from `row.bucket` on
//   absences, runs          where buckets are missing, and when the channel ran
//   shortGaps               where rows are missing, but no whole bucket
//   until                   the end of the answer that it is drawn from: what is later is unknown
//   range                   the lowest and the highest value, in W
//   x(moment), y(watts)     where these lie, in pixels of the picture
//   width                   of the whole picture
//   top, bottom, height     of the plot in it
//
// Exports `strips`, all that were made; `drawChart`; `readout`, what is known of a moment in words;
// `pointer` and `drawCursors`.

import {
  LEFT,
  RIGHT,
  clamp,
  label,
  levelLines,
  line,
  pixels,
  rectangle,
  valueTicks,
} from "./axes.js";
import { setAttributes, setText, svg } from "./dom.js";
import { NBSP, NONE, clock, dayClock, duration, number, span, watts } from "./format.js";
import { absences, bucketsOf, gapsOf, rowsOf } from "./model.js";
import { answerFor, answerOfPeriod } from "./questions.js";
import { settings } from "./settings.js";
import { word } from "./words.js";

// By key. A strip stays when its channel does, and with it focus, an open table and scrolling.
export const strips = new Map();

// ---- The picture

// Pixels above the plot.
const TOP = 6;
// Pixels below it, for runs and the texts of the time axis.
const BOTTOM = 30;

// Draws what is visible ({from, to}) of a strip's channel. `ticks` are those of the time axis, the
// same for all strips; `height` is the plot's.
export function drawChart(strip, visible, width, ticks, height) {
  const answer = bestAnswer(visible);
  const plot = makePlot(strip.channel, answer, visible, width, height);
  strip.plot = plot;
  setAttributes(strip.picture, {
    height: plot.bottom + BOTTOM,
    "aria-label": `${strip.channel.label}, ${word("chart")}`,
  });
  strip.grid.replaceChildren(...levelShapes(plot), ...tickShapes(plot, ticks));
  strip.gaps.replaceChildren(...gapShapes(plot));
  strip.lines.replaceChildren(...powerShapes(plot), ...shortGapShapes(plot));
  strip.runs.replaceChildren(...runShapes(plot));
}

// The answer about the part that is zoomed into, if it has come and is the finer one; else that
// about the whole period.
function bestAnswer(visible) {
  const fine = answerFor("fine");
  const whole = answerFor("power");
  if (!covers(fine, visible)) return whole;
  if (!covers(whole, visible)) return fine;
  return fine.step < whole.step ? fine : whole;
}

// Whether an answer spans what is visible, but for the row that is still being measured.
function covers(answer, visible) {
  if (!answer) return false;
  const end = Math.min(visible.to, answer.at) - settings.rowLength;
  return answer.since <= visible.from && answer.until >= end;
}

function makePlot(channel, answer, visible, width, height) {
  const { from, to } = visible;
  const buckets = bucketsOf(answer, channel);
  const missing = answer ? absences(channel, answer) : [];
  // This includes the whole period, so that the axis stays put while one zooms.
  const range = valueRange([...bucketsOf(answerFor("power"), channel), ...buckets]);
  const bottom = TOP + height;
  const plotWidth = width - RIGHT - LEFT;
  const wattsOfPlot = (range.high - range.low) * 1.04; // a little room above the highest

  function x(t) {
    return pixels(LEFT + clamp((t - from) / (to - from), 0, 1) * plotWidth);
  }

  function y(w) {
    return pixels(bottom - ((w - range.low) / wattsOfPlot) * height);
  }

  return {
    from,
    to,
    buckets,
    step: answer ? answer.step : settings.rowLength,
    absences: missing,
    shortGaps: outside(gapsOf(channel), missing),
    runs: rowsOf(answerOfPeriod("cycles"), channel),
    until: answer?.until,
    range,
    x,
    y,
    width,
    height,
    top: TOP,
    bottom,
  };
}

function overlap(one, other) {
  return one.from < other.to && other.from < one.to;
}

// The gaps that overlap no absence. Both are in order.
function outside(gaps, missing) {
  let next = 0;
  return gaps.filter((gap) => {
    while (next < missing.length && missing[next].to <= gap.from) next += 1;
    return next === missing.length || !overlap(gap, missing[next]);
  });
}

// From 0, or from below where power flows back.
function valueRange(buckets) {
  let low = 0;
  let high = 0;
  for (const row of buckets) {
    const highest = row.max_w ?? row.mean_w;
    low = Math.min(low, row.mean_w, highest);
    high = Math.max(high, row.mean_w, highest);
  }
  // At least 10 W, so that a load near zero is not drawn as a mountain.
  if (high - low < 10) high = low + 10;
  return { low, high };
}

// ---- Its layers

function levelShapes(plot) {
  const { low, high } = plot.range;
  const count = plot.height > 60 ? 4 : 2.5;
  const levels = valueTicks(low, high, count);
  const inKilowatts = Math.max(high, -low) >= 1000;
  const unit = inKilowatts ? "kW" : "W";

  // The unit stands at the highest only.
  function textOf(level) {
    const value = inKilowatts ? number(level / 1000, 2) : number(level, 1);
    return level === levels.at(-1) ? value + NBSP + unit : value;
  }

  return levelLines(levels, plot.y, plot.width - RIGHT, textOf);
}

function tickShapes(plot, ticks) {
  const shapes = [];
  const textY = plot.bottom + BOTTOM - 5;
  // A text that would overlap the last one is left out, as when a clock change repeats an hour.
  let freeFrom = 0;
  for (const tick of ticks) {
    const x = plot.x(tick.t);
    const halfText = tick.text.length * 3.1;
    const kind = tick.isMidnight ? "midnight" : "gridline";
    shapes.push(line(kind, x, plot.top, x, plot.bottom));
    if (x < LEFT || x - halfText < freeFrom) continue;
    shapes.push(label(Math.min(x, plot.width - halfText), textY, "middle", tick.text));
    freeFrom = x + halfText + 6;
  }
  return shapes;
}

function gapShapes(plot) {
  const shapes = [];
  for (const gap of plot.absences) {
    if (gap.isOff || gap.to <= plot.from || gap.from >= plot.to) continue;
    const x = plot.x(gap.from);
    const width = Math.max(1, pixels(plot.x(gap.to) - x));
    shapes.push(rectangle("gap", x, plot.top, width, plot.height));
  }
  return shapes;
}

const NARROWEST = 3; // pixels

// Gaps that no bucket shows, since it has other rows. They stand before the line.
function shortGapShapes(plot) {
  const shapes = [];
  let drawnTo = 0;
  for (const gap of plot.shortGaps) {
    if (!overlap(gap, plot)) continue;
    const x = plot.x(gap.from);
    const width = Math.max(NARROWEST, pixels(plot.x(gap.to) - x));
    // Thousands of gaps have the same few pixels.
    if (x + width <= drawnTo) continue;
    drawnTo = x + width;
    shapes.push(rectangle("blank", x, plot.top, width, plot.height));
    shapes.push(rectangle("gap", x, plot.top, width, plot.height));
  }
  return shapes;
}

// The paths are in SVG's language: M moves to a point, H and V draw to an x and a y, Z closes.
function powerShapes(plot) {
  let mean = "";
  let band = "";
  let endOfLine = null;
  const end = Math.min(plot.to, plot.until ?? plot.to);
  for (const row of plot.buckets) {
    const from = row.bucket;
    const to = Math.min(from + plot.step, end);
    if (to <= plot.from || from >= plot.to) continue;
    const x = plot.x(from);
    const right = plot.x(to);
    const y = plot.y(row.mean_w);
    // After a gap, a new line begins.
    mean += from === endOfLine ? `V${y}` : `M${x} ${y}`;
    mean += `H${right}`;
    endOfLine = from + plot.step;
    if (row.max_w != null) {
      const highest = plot.y(Math.max(row.max_w, row.mean_w));
      band += `M${x} ${y}V${highest}H${right}V${y}Z`;
    }
  }
  return [svg("path", { class: "band", d: band }), svg("path", { class: "mean", d: mean })];
}

function runShapes(plot) {
  const shapes = [];
  for (const run of plot.runs) {
    if (run.ended_at <= plot.from || run.started_at >= plot.to) continue;
    const x = plot.x(run.started_at);
    // Half a pixel less, so that adjacent runs stay apart.
    const width = pixels(plot.x(run.ended_at) - x - 0.5);
    shapes.push(rectangle("run", x, plot.bottom + 5, Math.max(1.5, width), 5));
  }
  return shapes;
}

// ---- A moment in words

function bucketAt(plot, t) {
  return plot.buckets.find((row) => row.bucket <= t && t < row.bucket + plot.step);
}

// What is known of a moment: in full with its time and its run, else the value alone.
export function readout(strip, t, inFull) {
  const { channel, plot } = strip;
  const row = bucketAt(plot, t);
  const absence = plot.absences.find((gap) => gap.from <= t && t < gap.to);
  let value = "…";
  let when = dayClock(t);
  if (row) {
    value = inFull ? powerText(row) + shortGapText(row, plot) : watts(row.mean_w);
    when = bucketTime(row, plot);
  } else if (absence) {
    value = absenceText(absence, channel, plot);
    when = span(absence.from, absence.to);
  }
  if (!inFull) return value;
  return `${when} · ${value}${runText(plot, t)}`;
}

function powerText(row) {
  const text = `${word("mean")} ${watts(row.mean_w)}`;
  if (row.max_w == null) return text;
  return `${text} · ${word("maximum")} ${watts(row.max_w)}`;
}

// "no data for 5 min" somewhere in the bucket.
function shortGapText(row, plot) {
  const bucket = { from: row.bucket, to: row.bucket + plot.step };
  const gap = plot.shortGaps.find((one) => overlap(one, bucket));
  return gap ? ` · ${word("noData", duration(gap.to - gap.from))}` : "";
}

function bucketTime(row, plot) {
  if (plot.step === settings.rowLength) return dayClock(row.bucket);
  return span(row.bucket, row.bucket + plot.step);
}

function absenceText(absence, channel, plot) {
  // Of a sum, some phases may be off and others not: there is nothing to be said.
  if (absence.isOff) return channel.phases ? NONE : word("offKept");
  const length = duration(absence.to - absence.from);
  if (plot.step === settings.rowLength) return word("noData", length);
  // Coarse buckets do not tell when exactly it began and ended.
  return word("noData", `≈ ${length}`);
}

function runText(plot, t) {
  const run = plot.runs.find((run) => run.started_at <= t && t < run.ended_at);
  if (!run) return "";
  const length = duration(run.ended_at - run.started_at);
  return ` · ${word("run")} ${clock(run.started_at)} – ${clock(run.ended_at)}, ${length}`;
}

// ---- The cursor

// Where the reader points, and what he drags over; gestures.js sets it.
//   cursor   null, or {t, key, byKeyboard}: it is shown in every strip, in full in that one
//   drag     null, or {key, startX, from, to, hasMoved}, from and to being moments
export const pointer = { cursor: null, drag: null };

export function drawCursors() {
  for (const strip of strips.values()) {
    if (strip.plot) drawCursor(strip);
  }
}

function drawCursor(strip) {
  const { plot } = strip;
  const { cursor, drag } = pointer;
  const isDragging = drag != null && drag.hasMoved;
  const isInside = cursor != null && cursor.t >= plot.from && cursor.t <= plot.to;
  const shapes = [];
  let text = "";
  if (isDragging) shapes.push(selectionShape(plot, drag));
  if (isInside) {
    shapes.push(...cursorShapes(plot, cursor.t));
    text = readout(strip, cursor.t, cursor.key === strip.key);
    // The text keeps out of the cursor's way.
    strip.readout.classList.toggle("left", plot.x(cursor.t) > plot.width / 2);
  }
  if (isDragging && drag.key === strip.key) {
    text = span(Math.min(drag.from, drag.to), Math.max(drag.from, drag.to));
  }
  strip.over.replaceChildren(...shapes);
  setText(strip.readout, text);
}

function selectionShape(plot, drag) {
  const x = plot.x(Math.min(drag.from, drag.to));
  const right = plot.x(Math.max(drag.from, drag.to));
  return rectangle("select", x, 1, pixels(right - x), plot.bottom - 1);
}

function cursorShapes(plot, t) {
  const x = plot.x(t);
  const shapes = [line("cursor", x, 2, x, plot.bottom)];
  const row = bucketAt(plot, t);
  if (row) {
    shapes.push(svg("circle", { class: "dot", cx: x, cy: plot.y(row.mean_w), r: 3.5 }));
  }
  return shapes;
}
