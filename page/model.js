// What the answers mean: which channels there are, what each does now, and where its rows are
// missing.
//
// A channel is a row of the answer `channels` with `key`, `label`, `at` (its newest row), `device`
// (its device's name), `meter` (if it is a meter's phase, else null) and `isPhase` (a sum includes
// it). A sum of a meter's phases is {key, phases, at, label}.
//
// Exports `channels` and `directory`; `rowsOf` and `bucketsOf`, a channel's rows in an answer;
// `stateOf`, `silentChannels`, `silentSince`, `absences`, `gapsOf`, `coverageOf`, `shareOf`,
// `wholeShareOf`, `phasesOf`, `sum`.

import { compareNames, duration, moment, momentAt } from "./format.js";
import { answerFor, answers, asksForRunsNow, channelRows, runsUpToNow } from "./questions.js";
import { settings } from "./settings.js";
import { state } from "./state.js";
import { language, word } from "./words.js";

// A missing value counts as nothing.
export function sum(list, valueOf) {
  let total = 0;
  for (const one of list) total += valueOf(one) ?? 0;
  return total;
}

function keyOf(row) {
  return `${row.device_id}\n${row.channel}`;
}

// ---- Rows of a channel

const TIMES = ["bucket", "began_at", "started_at", "ended_at", "first_row", "last_row"];

// The rows of one channel in an answer, which may be null; their times are moments.
export function rowsOf(answer, channel) {
  if (!answer) return [];
  if (!answer.byChannel) sortOut(answer);
  return answer.byChannel.get(channel.key) || [];
}

// Once per answer.
function sortOut(answer) {
  answer.byChannel = new Map();
  for (const row of answer.rows) {
    for (const name of TIMES) {
      if (row[name] != null) row[name] = Date.parse(row[name]);
    }
    const key = keyOf(row);
    if (!answer.byChannel.has(key)) answer.byChannel.set(key, []);
    answer.byChannel.get(key).push(row);
  }
}

// The buckets of a channel or a sum in an answer of `power`.
export function bucketsOf(answer, channel) {
  const rows = rowsOf(answer, channel);
  if (!answer || !channel.phases || rows.length > 0) return rows;
  const buckets = sumOfBuckets(answer, channel.phases);
  answer.byChannel.set(channel.key, buckets);
  return buckets;
}

// A sum has a bucket where each phase has one. It has no maximum: those of its phases may be of
// different minutes. The buckets are in order, as those of the first phase are.
function sumOfBuckets(answer, phases) {
  const rowsByBucket = new Map();
  for (const phase of phases) {
    for (const row of rowsOf(answer, phase)) {
      if (!rowsByBucket.has(row.bucket)) rowsByBucket.set(row.bucket, []);
      rowsByBucket.get(row.bucket).push(row);
    }
  }
  const buckets = [];
  for (const [bucket, rows] of rowsByBucket) {
    if (rows.length < phases.length) continue;
    const rowCounts = rows.map((row) => row.rows);
    buckets.push({
      bucket,
      mean_w: sum(rows, (row) => row.mean_w),
      rows: Math.min(...rowCounts),
    });
  }
  return buckets;
}

// ---- Channels

// `shown` are the channels and the sums, in the order in which they are shown.
let known = { signature: null, all: [], shown: [], devices: [] };

// Devices and channels with their names, in the order of reading: {all, shown, devices}. Worked
// out anew only where what it stands on has changed; its `signature` tells.
export function directory() {
  const answer = answers.channels;
  if (!answer) return known;
  const signature = [answer.version, language, state.device].join();
  if (known.signature === signature) return known;

  const deviceNames = namesOfDevices(answer.rows);
  const all = channelRows().map((row) => makeChannel(row, deviceNames));
  all.sort(compareChannels);
  const devices = [...deviceNames].map(([id, name]) => ({ id, name }));
  devices.sort((one, other) => compareNames(one.name, other.name));
  known = { signature, all, shown: withSums(all, deviceNames), devices };
  return known;
}

export function channels() {
  return directory().all;
}

// By id. Two houses may have one name: then it is followed by the id.
function namesOfDevices(rows) {
  const names = new Map();
  for (const row of rows) names.set(row.device_id, row.device_name || row.device_id);
  const given = [...names.values()];
  for (const [id, name] of names) {
    if (given.indexOf(name) !== given.lastIndexOf(name)) names.set(id, `${name} (${id})`);
  }
  return names;
}

function makeChannel(row, deviceNames) {
  const device = deviceNames.get(row.device_id);
  // "em:0:a" is a phase of the meter "em:0".
  const phase = row.channel.match(/^(em:\d+):[a-z]$/);
  return {
    ...row,
    key: keyOf(row),
    device,
    meter: phase ? phase[1] : null,
    at: Date.parse(row.timestamp),
    label: labelOf(row.name || row.channel, device, deviceNames),
  };
}

// The device is named, too, where there are several to be told from each other.
function labelOf(name, device, deviceNames) {
  const isClear = deviceNames.size === 1 || state.device !== "" || name === device;
  return isClear ? name : `${device} · ${name}`;
}

function compareChannels(one, other) {
  return (
    compareNames(one.device, other.device) ||
    compareNames(one.device_id, other.device_id) ||
    compareNames(one.channel, other.channel)
  );
}

// The sum of a meter's phases em:0:a, em:0:b, em:0:c has a strip above theirs. No table or total
// counts it.
function withSums(all, deviceNames) {
  const shown = [];
  for (const channel of all) {
    const phases = all.filter((other) => isPhaseOfSameMeter(other, channel));
    channel.isPhase = phases.length > 1;
    if (channel.isPhase && channel === phases[0]) {
      shown.push(makeSum(channel, phases, deviceNames));
    }
    shown.push(channel);
  }
  return shown;
}

function isPhaseOfSameMeter(other, channel) {
  if (channel.meter == null) return false;
  return other.meter === channel.meter && other.device_id === channel.device_id;
}

function makeSum(first, phases, deviceNames) {
  const name = commonName(phases) || first.device_name || first.meter;
  return {
    key: phases.map((phase) => phase.key).join(),
    phases,
    at: Math.min(...phases.map((phase) => phase.at)),
    label: labelOf(name, first.device, deviceNames),
  };
}

// "House", where the phases are called "House A", "House B", "House C"; else "".
function commonName(phases) {
  const name = (phases[0].name || "").slice(0, -2);
  for (const phase of phases) {
    const letter = phase.channel.at(-1).toUpperCase();
    if (phase.name !== `${name} ${letter}`) return "";
  }
  return name;
}

export function phasesOf(channel) {
  return channel.phases || [channel];
}

// ---- What is there of a channel

// The row of `coverage`, if there is one; of a sum, that of the phase with the smallest share.
export function coverageOf(channel) {
  const rows = phasesOf(channel).map((phase) => rowsOf(answerFor("coverage"), phase)[0]);
  let worst = rows[0];
  for (const row of rows) {
    if (shareOf(row) < shareOf(worst)) worst = row;
  }
  return worst;
}

// Which share of the minutes between its first and its last row is there.
export function shareOf(coverage) {
  if (!coverage || !coverage.rows) return 0;
  return coverage.rows / (coverage.rows + coverage.missing);
}

// Which share of the minutes of a whole period is there, by an answer of coverage. Where rows are
// kept only while something runs, none before the first one or after the last one is no gap.
export function wholeShareOf(channel, answer) {
  const shares = phasesOf(channel).map((phase) => {
    const [coverage] = rowsOf(answer, phase);
    if (!coverage || !coverage.rows) return 0;
    let lost = coverage.missing * settings.rowLength;
    if (settings.keptAbove == null) {
      lost += Math.max(0, coverage.first_row - answer.since);
      // The newest rows may still be on their way.
      lost += Math.max(0, answer.until - coverage.last_row - settings.silentAfter);
    }
    return 1 - lost / (answer.until - answer.since);
  });
  return Math.min(...shares);
}

// The times without data of a channel, or of a phase of a sum: [{from, to}], in order.
export function gapsOf(channel) {
  const gaps = [];
  for (const row of phasesOf(channel).flatMap((phase) => rowsOf(answerFor("gaps"), phase))) {
    if (row.kind === "no data") gaps.push({ from: row.began_at, to: row.ended_at });
  }
  return gaps.sort((one, other) => one.from - other.from);
}

// Whether a row of so many watts says that a run has ended, so that no row follows until the next.
function isClosing(w) {
  return settings.keptAbove != null && Math.abs(w) <= settings.keptAbove;
}

// Where a channel has no buckets: [{from, to, isOff}]. It is off where a closing row came before,
// and a sum may be; elsewhere, rows are missing.
export function absences(channel, answer) {
  const found = [];
  let before = null;
  let expected = answer.since;
  for (const row of bucketsOf(answer, channel)) {
    if (row.bucket > expected)
      found.push(makeAbsence(channel, answer, before, expected, row.bucket));
    expected = row.bucket + answer.step;
    before = row;
  }
  // The newest rows may still be on their way.
  const endsNow = answer.until > answer.at - settings.silentAfter;
  const isOverdue = answer.at - channel.at > settings.silentAfter;
  if (expected < answer.until && (!endsNow || isOverdue)) {
    found.push(makeAbsence(channel, answer, before, expected, answer.until));
  }
  return found;
}

function makeAbsence(channel, answer, before, from, to) {
  return { from, to, isOff: wasOff(channel, answer, before, from, to) };
}

function wasOff(channel, answer, before, from, to) {
  if (settings.keptAbove == null) return false;
  // Of a sum, some phases may be off and others not.
  if (channel.phases) return true;
  const isAfterNewestRow = channel.at <= from;
  if (isAfterNewestRow) return isClosing(channel.apower_w);
  if (before && answer.step === settings.rowLength) return isClosing(before.mean_w);
  // A coarse bucket hides the closing row. But no gap is longer than longest_gap, so a longer hole
  // is "off".
  const coverage = coverageOf(channel);
  const longestGap = (coverage?.longest_gap ?? 0) * 1000;
  return to - from > longestGap;
}

// ---- What a channel does now

// {kind, text}: kind is "running", "off", "silent", or "" for a sum. The newest row says whether it
// runs; the runs say since when.
export function stateOf(channel) {
  const { at } = answers.channels;
  const silent = phasesOf(channel).filter((phase) => isSilent(phase, at));
  if (silent.length > 0) {
    const since = Math.min(...silent.map(silentSince));
    return { kind: "silent", text: word("silent", moment(since)) };
  }
  if (channel.phases) return { kind: "", text: "" };
  if (Math.abs(channel.apower_w) > state.floor) {
    return { kind: "running", text: sinceWhenItRuns(channel, at) };
  }
  return { kind: "off", text: sinceWhenItIsOff(channel, at) };
}

export function silentChannels() {
  return channels().filter((channel) => isSilent(channel, answers.channels.at));
}

// The end of the newest row.
export function silentSince(channel) {
  return channel.at + settings.rowLength;
}

function isSilent(channel, at) {
  return at - channel.at > settings.silentAfter && !isClosing(channel.apower_w);
}

function sinceWhenItRuns(channel, at) {
  if (!asksForRunsNow()) return word("isRunning");
  const runs = runsUpToNow();
  const run = rowsOf(runs, channel).at(-1);
  // The answer on runs may be a little older than the newest row.
  if (!run || run.ended_at < channel.at - settings.silentAfter) return word("running", "…");
  const length = duration(Math.max(at - run.started_at, settings.rowLength));
  // It may have begun before what was asked for.
  const beganWithin = run.started_at - runs.since > 1.5 * settings.rowLength;
  const key = beganWithin ? "running" : "runningMore";
  return word(key, length);
}

function sinceWhenItIsOff(channel, at) {
  if (!asksForRunsNow()) return word("isOff");
  const runs = runsUpToNow();
  const run = rowsOf(runs, channel).at(-1);
  if (run) return word("off", momentAt(run.ended_at));
  if (isClosing(channel.apower_w)) return word("off", momentAt(channel.at));
  if (!runs) return word("off", "…");
  const coverage = coverageOf(channel);
  const seenSince = Math.max(runs.since, coverage?.first_row ?? 0);
  return word("offMore", duration(at - seenSince));
}
