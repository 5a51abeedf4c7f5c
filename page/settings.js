// What the link and the collector's owner have decided: the token, and the settings in force.
//
// Exports TOKEN, `loadSettings`, and `settings`, which it fills: nothing else may be asked or drawn
// before.

import { MINUTE } from "./time.js";

export const TOKEN = new URLSearchParams(location.search).get("token");

export const settings = {
  rowLength: MINUTE, // one row stands for so many ms
  silentAfter: 3 * MINUTE, // a newest row older than this is "no data"
  keptAbove: null, // W; where it is set, rows are kept only while something runs
  floor: 10, // W above which a channel runs, unless the reader chooses another
  presets: [1, 7, 30], // "last # days", as a link may say
  defaultDays: 45, // and as a button says
  price: null, // of a kWh; without it no costs are shown
  currency: "",
  deviceUrl: "", // what to paste into a Shelly
  version: "", // the collector's
};

const FIRST_PAUSE = 1_500;
const LONGEST_PAUSE = 12_000;

// Asks for the settings until they come. Returns whether they did: with a wrong token they never
// will. `sayWhy` gets the key of a word each time that another try is needed.
export async function loadSettings(sayWhy) {
  let pause = FIRST_PAUSE;
  while (true) {
    const { status, given } = await askOnce();
    if (status === 401) return false;
    if (given) {
      useSettings(given);
      return true;
    }
    sayWhy(status === 503 ? "busy" : "noAnswer");
    await new Promise((done) => setTimeout(done, pause));
    pause = Math.min(2 * pause, LONGEST_PAUSE);
  }
}

// The status is null where nobody answers, or somebody whose answer is no JSON.
async function askOnce() {
  const query = new URLSearchParams();
  if (TOKEN != null) query.set("token", TOKEN);
  try {
    const answer = await fetch(`data/settings.json?${query}`, { cache: "no-store" });
    if (!answer.ok) return { status: answer.status, given: null };
    return { status: answer.status, given: await answer.json() };
  } catch {
    return { status: null, given: null };
  }
}

function useSettings(given) {
  const row = Math.max(MINUTE, given.throttle_interval_seconds * 1000);
  settings.rowLength = row;
  settings.silentAfter = Math.max(3 * row, given.gap_threshold_minutes * MINUTE);
  settings.keptAbove = given.min_power_w;
  settings.floor = given.min_power_w ?? 10;
  settings.deviceUrl = given.device_url || "";
  settings.version = given.version;

  const presets = new Set([1, 7, 30, given.default_days_history]);
  settings.presets = [...presets];
  settings.defaultDays = given.default_days_history;

  // "0,2516 EUR"
  const priceAndCurrency = (given.price_per_kwh || "").match(/^([\d.,]+)\s*(.*)/);
  if (priceAndCurrency) {
    settings.price = Number(priceAndCurrency[1].replace(",", "."));
    settings.currency = priceAndCurrency[2];
  }
}
