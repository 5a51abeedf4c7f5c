// What the page asks the collector, and what came.
//
// A question is one of the collector's functions with its parameters. `refresh` asks what is due;
// the answers lie in `answers`, by the question's name, until newer ones come.
//
// Exports these two. How the asking goes: `health`, `trouble`, `working`, `refreshedAt`,
// `listenToAnswers`. What may be shown for what is chosen: `channelRows`, `answerFor`,
// `answerOfPeriod`, `energyOfPeriod`, `barUnit`, `barFrame`, `runsUpToNow`, `runsMissing`,
// `asksForRunsNow`, `isCurrent`, `subject`. The URL of an answer: `address`.

import { LEFT, RIGHT, ROUND_MINUTES } from "./axes.js";
import { byId } from "./dom.js";
import { settings, TOKEN } from "./settings.js";
import { frame, frameBefore, moveFrame, state } from "./state.js";
import {
  DAY,
  MINUTE,
  dayKey,
  followServer,
  iso,
  midnight,
  now,
  startOf,
  useOffset,
  zone,
} from "./time.js";

// By name: channels, refused, power, fine (power, while zoomed), cycles, energy (of whole days, or
// months), coverage, gaps; energyPart, where the period has no whole days; energyBefore and
// coverageBefore, of the period before; cyclesNow, where the period does not hold the last 24
// hours. An answer is its question, and
//   rows      parsed; model.js turns their times into moments
//   text      as it came
//   byChannel  rows by channel, null until model.js sorts them
//   version   another one whenever the rows are others
//   at        when it came, by the server's clock
//   askedAt, took    by performance.now(), in ms
export const answers = {};

// What /health says, by name; {} if nobody answers.
export let health = null;

// Why answers are missing: an Error, with the `status` of HTTP if there was an answer at all.
export let trouble = null;

// Whether answers are on their way, and when they were last asked for, by performance.now().
export let working = false;
export let refreshedAt = 0;

// Set by main.js: `onAnswer()`, `onHealth()`, and `onLate()`, when an answer takes another try.
let listeners = null;

export function listenToAnswers(given) {
  listeners = given;
}

// ---- Answers at hand

// The channels of the chosen device, or all.
export function channelRows() {
  const rows = answers.channels ? answers.channels.rows : [];
  return rows.filter((row) => state.device === "" || row.device_id === state.device);
}

function fits(answer) {
  if (answer.device !== "" && answer.device !== state.device) return false;
  return answer.floor == null || answer.floor === state.floor;
}

// An answer that may be shown for the device and the floor that are chosen; else null. Its period
// may be another one: it stays, dimmed, until the right one comes.
export function answerFor(name) {
  const answer = answers[name];
  return answer && fits(answer) ? answer : null;
}

// The same, but null as long as it is about another period.
export function answerOfPeriod(name) {
  const answer = answerFor(name);
  return answer && answer.about === subject() ? answer : null;
}

// Of which runs and bars of days are shown; and 25 hours for a change of the clock.
const MOST_DAYS = 92;
const MOST_CHANNELS = 12;

// The energy of the period, no more and no less of it.
export function energyOfPeriod() {
  return answerOfPeriod(hasWholeDays() ? "energy" : "energyPart");
}

function hasWholeDays() {
  const { since, until, moving } = frame;
  if (barUnit() !== "day") return false;
  return since === midnight(since) && (moving || until === midnight(until));
}

// What a bar of energy stands for: a day, or a month where there would be too many.
export function barUnit() {
  return frame.until - frame.since > (MOST_DAYS + 1) * DAY ? "month" : "day";
}

// The whole days or months that the bars stand for: {since, end}, end being null where that is now.
export function barFrame() {
  const { since, until, moving } = frame;
  const unit = barUnit();
  return { since: startOf(unit, since), end: moving ? null : startOf(unit, until - 1, 1) };
}

// The runs of the last 24 hours, at least: of the period, if that holds them, or of a question of
// their own.
export function runsUpToNow() {
  return holdsLastDay() ? answerOfPeriod("cycles") : answerFor("cyclesNow");
}

function holdsLastDay() {
  return runsMissing() == null && frame.moving && frame.since <= now() - DAY;
}

// Whether runs are asked for at all, if only those of the last 24 hours: of one device, or of few
// channels.
export function asksForRunsNow() {
  const rows = channelRows();
  const isOneDevice = rows.every((row) => row.device_id === rows[0].device_id);
  return isOneDevice || rows.length <= MOST_CHANNELS;
}

// Why runs are not asked for, as the key of a word and its value; else null. The database reads
// each row for them.
export function runsMissing() {
  if (!asksForRunsNow()) return { key: "runsOfOne" };
  return barUnit() === "day" ? null : { key: "runsOfDays", value: MOST_DAYS };
}

// Whether the answer at hand is to the very question that would be asked now.
export function isCurrent(name) {
  return questions().some((question) => question.name === name && isAnswered(question));
}

function isAnswered(question) {
  return answers[question.name]?.key === question.key;
}

// ---- Questions

// What all questions are about: a period, and a device.
export function subject() {
  let period = `${state.from}/${state.to}`;
  if (state.unit !== "") period = `${state.unit}/${frame.since}`;
  else if (state.from == null) period = state.days;
  return `${period}|${state.device}`;
}

// Two questions of one name and the same `key` differ by nothing but the clock. A question without
// an end is open: its period goes on to now.
function makeQuestion(name, since, end, key, more) {
  const params = { since: iso(since), ...more.params };
  if (end != null) params.until = iso(end);
  return {
    name,
    path: more.path ?? name,
    device: state.device,
    about: subject(),
    key: `${subject()}|${key}`,
    since,
    until: end ?? now(),
    isOpen: end == null,
    step: more.step,
    floor: more.floor,
    params,
  };
}

function powerQuestion(name, since, end, step, key) {
  const firstBucket = Math.floor(since / step) * step;
  const params = { step: step / 1000 };
  return makeQuestion(name, firstBucket, end, `${key}|${step}`, { path: "power", step, params });
}

function runsQuestion(name, since, end, key) {
  const { floor } = state;
  const params = { min_power_w: floor };
  return makeQuestion(name, since, end, `${floor}|${key}`, { path: "cycles", floor, params });
}

function energyQuestion(name, since, end, path = "energy") {
  const params = { zone };
  const key = `${path}|${dayKey(since)}|${dayKey(now())}`;
  return makeQuestion(name, since, end, key, { path, params });
}

// All that the page needs to know for what is chosen.
function questions() {
  const { since, until, moving } = frame;
  const { zoom } = state;
  const end = moving ? null : until;
  const today = midnight(now());
  const list = [];
  if (zoom) {
    const step = stepFor(zoom.from, zoom.to);
    list.push(powerQuestion("fine", zoom.from, zoom.to, step, `${zoom.from},${zoom.to}`));
  }
  if (!zoom) {
    list.push(powerQuestion("power", since, end, stepFor(since, until), ""));
  } else if (answers.power?.about !== subject()) {
    // While zoomed, the whole period only scales the axes: ask once, coarsely.
    list.push(powerQuestion("power", since, end, coarseStep(since, until), ""));
  }
  const bars = barFrame();
  const path = barUnit() === "day" ? "energy" : "months";
  list.push(energyQuestion("energy", bars.since, bars.end, path));
  if (!hasWholeDays()) list.push(energyQuestion("energyPart", since, end));
  list.push(makeQuestion("coverage", since, end, "", {}));
  list.push(makeQuestion("gaps", since, end, "", {}));

  const before = frameBefore();
  list.push(energyQuestion("energyBefore", before.since, before.until));
  const { since: first, until: last } = before;
  list.push(makeQuestion("coverageBefore", first, last, "", { path: "coverage" }));

  // Runs come last, as they take longest.
  if (asksForRunsNow() && !holdsLastDay()) {
    const lastDay = Math.min(today, now() - DAY);
    list.push(runsQuestion("cyclesNow", lastDay, null, dayKey(today)));
  }
  if (runsMissing() == null) list.push(runsQuestion("cycles", since, end, ""));
  return list;
}

// Lengths of a bucket: whole multiples of a row.
function steps() {
  const row = settings.rowLength;
  const lengths = [...ROUND_MINUTES.map((minutes) => minutes * MINUTE), DAY];
  return [row, ...lengths.filter((length) => length > row && length % row === 0)];
}

// About one bucket for 1.5 pixels; half as fine where many strips are drawn.
function stepFor(since, until) {
  const plotWidth = Math.max(200, byId("main").clientWidth - 80 - LEFT - RIGHT);
  const bucketWidth = channelRows().length > 6 ? 3 : 1.5;
  const wanted = (until - since) / (plotWidth / bucketWidth);
  return steps().find((step) => step >= wanted) || Math.ceil(wanted / DAY) * DAY;
}

// A hundred buckets, or one a day if that is more.
function coarseStep(since, until) {
  const coarse = steps().find((step) => step >= (until - since) / 100) || DAY;
  return Math.max(stepFor(since, until), coarse);
}

// Each minute again; less often what takes the database long.
function isDue(question) {
  if (!isAnswered(question)) return true;
  const { askedAt, took } = answers[question.name];
  return performance.now() - askedAt >= Math.max(50_000, 20 * took);
}

// ---- Asking

// The relative URL of an answer, such as "cycles.csv". The device that is chosen goes with it.
export function address(file, params) {
  const query = new URLSearchParams();
  if (TOKEN != null) query.set("token", TOKEN);
  if (state.device && file !== "channels.json") query.set("device", state.device);
  for (const [name, value] of Object.entries(params)) query.set(name, value);
  return `data/${file}?${query}`;
}

const BUSY = 503;
const MOST_TRIES = 5;
const FIRST_PAUSE_MS = 1_500;

// Returns the answer, or throws an Error with the status that the collector gave.
async function ask(question, signal) {
  const askedAt = performance.now();
  const { params } = question;
  let pause = FIRST_PAUSE_MS;
  for (let tries = 1; ; tries++) {
    const url = address(`${question.path}.json`, params);
    const response = await fetch(url, { signal, cache: "no-store" });
    const text = await response.text();
    if (response.ok) {
      followServer(Date.parse(response.headers.get("Date")));
      return makeAnswer(question, text, askedAt);
    }
    if (text.startsWith("zone makes no sense") && !params.zone.startsWith("UTC")) {
      useOffset();
      params.zone = zone;
      continue;
    }
    if (response.status !== BUSY || tries === MOST_TRIES) {
      const error = new Error(text.slice(0, 300));
      error.status = response.status;
      throw error;
    }
    listeners.onLate();
    await new Promise((done) => setTimeout(done, pause));
    signal.throwIfAborted();
    pause *= 2;
  }
}

let versions = 0;

// Where the text is that of the answer at hand, its rows stay, and all that was drawn from them.
function makeAnswer(question, text, askedAt) {
  const took = performance.now() - askedAt;
  const answer = { ...question, text, askedAt, took, at: now() };
  const before = answers[question.name];
  if (before && before.text === text) {
    answer.rows = before.rows;
    answer.version = before.version;
    answer.byChannel = before.byChannel;
  } else {
    versions += 1;
    answer.rows = JSON.parse(text);
    answer.version = versions;
    answer.byChannel = null; // model.js sorts it out
  }
  return answer;
}

const CHANNELS = { name: "channels", path: "channels", key: "", params: {} };
// Asked as long as there are no rows.
const REFUSED = { name: "refused", path: "refused", key: "", params: {} };
let running = new AbortController();

// Asks for what is due, or for everything. A newer refresh drops the older one.
export async function refresh(everything = false) {
  running.abort();
  running = new AbortController();
  const round = { signal: running.signal, failure: null, questions: [CHANNELS] };
  working = true;
  refreshedAt = performance.now();
  moveFrame();
  askHealth(round.signal);

  await askAll(round);
  if (!round.signal.aborted && !round.failure) {
    // An old link may name a device that no longer exists.
    if (channelRows().length === 0) state.device = "";
    round.questions = [REFUSED];
    if (channelRows().length > 0) {
      round.questions = questions().filter((question) => everything || isDue(question));
    }
    // At most two questions run at once: the collector has few connections for them.
    await Promise.all([askAll(round), askAll(round)]);
  }
  if (round.signal.aborted) return;
  working = false;
  trouble = round.failure;
  listeners.onAnswer();
}

async function askAll(round) {
  while (round.questions.length > 0 && mayGoOn(round)) {
    const question = round.questions.shift();
    try {
      const answer = await ask(question, round.signal);
      if (round.signal.aborted) return;
      answers[question.name] = answer;
      listeners.onAnswer();
    } catch (error) {
      round.failure ??= error;
    }
  }
}

// A question that makes no sense, or takes too long, stops no other. A collector that is away, or
// refuses the token, stops them all.
function mayGoOn({ signal, failure }) {
  if (signal.aborted) return false;
  return !failure || failure.status === 400 || failure.status === BUSY;
}

async function askHealth(signal) {
  let text = "";
  try {
    const response = await fetch("health", { signal, cache: "no-store" });
    text = await response.text();
  } catch {
    // An empty text says that nobody answers.
  }
  if (signal.aborted) return;
  health = {};
  for (const [, name, value] of text.matchAll(/^([a-z ]+): (.*)$/gm)) {
    health[name] = value;
  }
  listeners.onHealth();
}
