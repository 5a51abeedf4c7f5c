// What a reader does on a picture: pointing, dragging, keys. Dragging over a part zooms into it.
//
// Exports `listenTo`, which makes a strip's picture answer, `unzoom` and `clearCursor`.

import { LEFT, RIGHT, clamp } from "./axes.js";
import { drawCursors, pointer, readout } from "./chart.js";
import { byId, on, setText } from "./dom.js";
import { settings } from "./settings.js";
import { choose, frame, state } from "./state.js";

// ---- Zoom

// Shows a part of the period, in whole rows, at least five of them. (Nearly) all of it is no zoom.
function zoomTo(from, to) {
  const { since, until } = frame;
  const row = settings.rowLength;
  const length = clamp(to - from, 5 * row, until - since);
  if (length >= (until - since) * 0.98) {
    choose({ zoom: null });
    return;
  }
  const start = wholeRows(clamp(from, since, until - length));
  choose({ zoom: { from: start, to: start + wholeRows(length) } });
}

function wholeRows(t) {
  return Math.round(t / settings.rowLength) * settings.rowLength;
}

export function unzoom() {
  if (!state.zoom) return;
  // The bar goes away; the focus must not go with it.
  if (byId("zoombar").contains(document.activeElement)) {
    byId("strips").querySelector("svg").focus({ preventScroll: true });
  }
  choose({ zoom: null });
}

export function clearCursor() {
  pointer.drag = null;
  pointer.cursor = null;
  drawCursors();
}

// ---- Mouse and finger

const MOVED = 8; // pixels; less is a click

export function listenTo(strip) {
  const { picture } = strip;
  on(picture, "pointerdown", (event) => startDrag(strip, event));
  on(picture, "pointermove", (event) => point(strip, event));
  on(picture, "pointerup", (event) => endDrag(strip, event));
  on(picture, "pointercancel", clearCursor);
  on(picture, "pointerleave", leave);
  on(picture, "dblclick", unzoom);
  on(picture, "keydown", (event) => pressKey(strip, event));
  on(picture, "blur", () => {
    if (pointer.cursor?.byKeyboard) clearCursor();
  });
}

function timeOf(strip, event) {
  const { from, to, width } = strip.plot;
  const x = event.clientX - strip.picture.getBoundingClientRect().left;
  const share = (x - LEFT) / (width - LEFT - RIGHT);
  return clamp(from + share * (to - from), from, to);
}

function startDrag(strip, event) {
  if (event.button !== 0) return;
  const t = timeOf(strip, event);
  pointer.drag = { key: strip.key, startX: event.clientX, from: t, to: t, hasMoved: false };
  strip.picture.setPointerCapture(event.pointerId);
}

function point(strip, event) {
  const { drag } = pointer;
  const t = timeOf(strip, event);
  if (drag) {
    drag.to = t;
    if (Math.abs(event.clientX - drag.startX) > MOVED) drag.hasMoved = true;
  }
  // A finger that only moves may be scrolling.
  if (drag || event.pointerType !== "touch") pointer.cursor = { t, key: strip.key };
  drawCursors();
}

function endDrag(strip, event) {
  const { drag } = pointer;
  const t = timeOf(strip, event);
  pointer.drag = null;
  pointer.cursor = { t, key: strip.key };
  if (drag && drag.hasMoved) zoomTo(Math.min(drag.from, t), Math.max(drag.from, t));
  drawCursors();
}

// After a tap, the cursor stays until the next one; one that a key has moved, until the focus goes.
function leave(event) {
  if (pointer.drag || pointer.cursor?.byKeyboard) return;
  if (event.pointerType !== "touch") clearCursor();
}

// ---- Keys

const ZOOM_KEYS = { "+": 0.5, "=": 0.5, "-": 2 };
const ARROW_KEYS = { ArrowLeft: -1, ArrowRight: 1 };

function pressKey(strip, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (Object.hasOwn(ZOOM_KEYS, event.key)) {
    zoomBy(strip, ZOOM_KEYS[event.key]);
  } else if (Object.hasOwn(ARROW_KEYS, event.key)) {
    moveCursor(strip, ARROW_KEYS[event.key] * (event.shiftKey ? 10 : 1));
  } else {
    return;
  }
  event.preventDefault();
}

// Around the cursor, if there is one.
function zoomBy(strip, scale) {
  const { from, to } = strip.plot;
  const middle = pointer.cursor?.t ?? (from + to) / 2;
  zoomTo(middle - (middle - from) * scale, middle + (to - middle) * scale);
}

// By so many buckets. The first key puts it on the last bucket.
function moveCursor(strip, buckets) {
  const { from, to, step } = strip.plot;
  const t = pointer.cursor ? pointer.cursor.t + buckets * step : lastMoment(strip.plot);
  const middleOfBucket = Math.floor(t / step) * step + step / 2;
  pointer.cursor = { t: clamp(middleOfBucket, from, to), key: strip.key, byKeyboard: true };
  drawCursors();
  setText(byId("live"), readout(strip, pointer.cursor.t, true));
}

function lastMoment({ buckets, step, to }) {
  if (buckets.length === 0) return to;
  return Math.min(to - step / 2, buckets.at(-1).bucket + step / 2);
}
