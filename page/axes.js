// Axes and shapes, for every picture of the page.
//
// Exports LEFT and RIGHT, the room beside a picture's plot; `timeTicks` and `valueTicks`, the round
// moments and values that an axis names; `levelLines`; `rectangle`, `line` and `label`; `pixels`,
// `clamp`; ROUND_MINUTES.

import { NBSP, clock, formatDate } from "./format.js";
import { svg } from "./dom.js";
import { DAY, MINUTE, dayKey, midnight } from "./time.js";
import { language } from "./words.js";

// In pixels. The values of an axis stand to the left.
export const LEFT = 50;
export const RIGHT = 10;

// A tick has at least so many pixels for its text.
const TICK_ROOM = 56;

// Parts of a day that people count in.
export const ROUND_MINUTES = [1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720];

// Distances of ticks from a day up: how many days a step has at least, and which days get a tick.
const DAY_STEPS = [
  { days: 1, hasTick: () => true },
  { days: 2, hasTick: (date) => daysSinceMonday(date) % 2 === 0 },
  { days: 7, hasTick: (date) => daysSinceMonday(date) % 7 === 0 },
  { days: 14, hasTick: (date) => daysSinceMonday(date) % 14 === 0 },
  { days: 28, hasTick: (date) => date.getDate() === 1 },
  { days: 84, hasTick: (date) => date.getDate() === 1 && date.getMonth() % 3 === 0 },
  { days: 336, hasTick: (date) => date.getDate() === 1 && date.getMonth() === 0 },
];

// Days since a Monday of 1969.
function daysSinceMonday(date) {
  return Date.parse(dayKey(date)) / DAY + 3;
}

export function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}

// A tenth of a pixel is as fine as anybody sees.
export function pixels(value) {
  return Math.round(value * 10) / 10;
}

// ---- Round moments

// The ticks of a time axis that is so many pixels wide: [{t, text, isMidnight}]. They are round by
// the reader's wall clock, on the days of 23 and 25 hours, too.
export function timeTicks(from, to, width) {
  const pixelsPerMs = width / (to - from);
  for (const minutes of ROUND_MINUTES) {
    if (minutes * MINUTE * pixelsPerMs >= TICK_ROOM) return minuteTicks(from, to, minutes);
  }
  for (const step of DAY_STEPS) {
    if (step.days * DAY * pixelsPerMs >= TICK_ROOM) return dayTicks(from, to, step);
  }
  return dayTicks(from, to, DAY_STEPS.at(-1));
}

function minuteTicks(from, to, minutes) {
  const ticks = [];
  // Zones differ, and clocks are changed, by multiples of 5 minutes: so each of these is looked at.
  const stride = Math.min(minutes, 5) * MINUTE;
  for (let t = Math.ceil(from / stride) * stride; t <= to; t += stride) {
    const date = new Date(t);
    const minuteOfDay = date.getHours() * 60 + date.getMinutes();
    if (minuteOfDay % minutes !== 0) continue;
    const isMidnight = minuteOfDay === 0;
    ticks.push({ t, isMidnight, text: minuteTickText(t, isMidnight, minutes) });
  }
  return ticks;
}

function minuteTickText(t, isMidnight, minutes) {
  if (isMidnight) return formatDate("tick", t);
  // French writes full hours as "7 h".
  if (minutes >= 60 && language === "fr") return `${new Date(t).getHours()}${NBSP}h`;
  return clock(t);
}

function dayTicks(from, to, step) {
  let style = "tick";
  if (step.days >= 28) style = "month";
  if (step.days === 1 && to - from < 15 * DAY) style = "weekday";
  const ticks = [];
  for (let t = midnight(from); t <= to; t = midnight(t, 1)) {
    if (t >= from && step.hasTick(new Date(t))) {
      ticks.push({ t, isMidnight: true, text: formatDate(style, t) });
    }
  }
  return ticks;
}

// ---- Round values

const ROUND_FACTORS = [1, 2, 2.5, 5, 10];

// About `count` round values from low to high.
export function valueTicks(low, high, count) {
  const wanted = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(wanted));
  const factor = ROUND_FACTORS.find((factor) => factor * power >= wanted * 0.95);
  const step = factor * power;
  // The small number takes in a value that floating point puts just beyond the end.
  const first = Math.ceil(low / step - 1e-9);
  const last = high / step + 1e-9;
  const ticks = [];
  for (let n = first; n <= last; n++) {
    ticks.push(n === 0 ? 0 : n * step); // never -0
  }
  return ticks;
}

// ---- Shapes. `kind` is a class of the style sheet.

export function rectangle(kind, x, y, width, height) {
  return svg("rect", { class: kind, x, y, width, height });
}

export function line(kind, x1, y1, x2, y2) {
  return svg("line", { class: kind, x1, y1, x2, y2 });
}

export function label(x, y, anchor, text) {
  return svg("text", { x, y, "text-anchor": anchor }, text);
}

// A line across the plot for each value, with its text to the left. `y` makes a height of a value.
export function levelLines(values, y, right, textOf) {
  const shapes = [];
  for (const value of values) {
    const kind = value === 0 ? "zero" : "gridline";
    shapes.push(line(kind, LEFT, y(value), right, y(value)));
    shapes.push(label(LEFT - 6, y(value) + 4, "end", textOf(value)));
  }
  return shapes;
}
