// What is missing, one by one: when there was no data, and when a counter was reset. What concerns
// several channels at the same time is one line.
//
// Exports `drawGaps` and `listenToGaps`.

import { byId, element, isOutdated, on, setText } from "./dom.js";
import { dayClock, duration, joined, span } from "./format.js";
import { channels, directory, rowsOf } from "./model.js";
import { answerOfPeriod, isCurrent } from "./questions.js";
import { word } from "./words.js";

const MOST_LINES = 12; // until the reader asks for all
const MOST_NAMES = 3;
let showsAll = false;

export function listenToGaps() {
  on(byId("allgaps"), "click", () => {
    showsAll = true;
    drawGaps();
  });
}

export function drawGaps() {
  const box = byId("gaps");
  box.classList.toggle("stale", !isCurrent("gaps"));
  const answer = answerOfPeriod("gaps");
  if (!answer || !isOutdated(box, answer.version, directory().signature, showsAll)) return;
  const gaps = sortedGaps(answer);
  const shown = showsAll ? gaps : gaps.slice(0, MOST_LINES);
  let lines = shown.map((gap) => element("li", {}, gapText(gap)));
  if (gaps.length === 0) lines = [element("li", { class: "dim" }, word("noGaps"))];
  box.replaceChildren(...lines);
  byId("allgaps").hidden = shown.length === gaps.length;
  setText(byId("allgaps"), word("showAll", gaps.length));
}

// The newest first: {kind, from, to, names}.
function sortedGaps(answer) {
  const gaps = new Map();
  for (const channel of channels()) {
    for (const row of rowsOf(answer, channel)) {
      const key = `${row.kind} ${row.began_at} ${row.ended_at}`;
      if (!gaps.has(key)) {
        gaps.set(key, { kind: row.kind, from: row.began_at, to: row.ended_at, names: [] });
      }
      gaps.get(key).names.push(channel.label);
    }
  }
  return [...gaps.values()].sort((one, other) => other.from - one.from);
}

function gapText({ kind, from, to, names }) {
  const who = whoText(names);
  if (kind === "reset") return joined([dayClock(from), word("reset"), who]);
  return joined([span(from, to), word("noData", duration(to - from)), who]);
}

function whoText(names) {
  if (channels().length === 1) return "";
  if (names.length === channels().length) return word("allChannels");
  if (names.length > MOST_NAMES) return word("channelCount", names.length);
  return names.join(", ");
}
