// How numbers, costs, times and periods are written, in the reader's language and by his clock.
//
// Exports a function for each kind of thing: `number`, `watts`, `kwh`, `cost`, `energyText`,
// `percent`, `change`; `clock`, `dayName`, `dayClock`, `moment`, `momentAt`, `span`, `duration`,
// `formatDate`, `formatDates`; `joined`, `compareNames`. A value that is not there (null) is
// written as NONE.

import { settings } from "./settings.js";
import { midnight, now, wallClock } from "./time.js";
import { locale, word } from "./words.js";

export const NONE = "–";
export const NBSP = "\u00a0";

// Making a formatter costs far more than using it, so each is made once per locale.
const formatters = new Map();

function formatter(name, make) {
  const key = `${locale} ${name}`;
  if (!formatters.has(key)) formatters.set(key, make());
  return formatters.get(key);
}

// ---- Numbers

export function number(value, mostDecimals = 0, leastDecimals = 0) {
  if (value == null) return NONE;
  const format = formatter(`number ${mostDecimals} ${leastDecimals}`, () => {
    return new Intl.NumberFormat(locale, {
      minimumFractionDigits: leastDecimals,
      maximumFractionDigits: mostDecimals,
    });
  });
  return format.format(value);
}

export function watts(w) {
  if (w == null) return NONE;
  const size = Math.abs(w);
  if (size >= 100_000) return number(w / 1000, 1) + NBSP + "kW";
  if (size >= 999.5) return number(w / 1000, 2) + NBSP + "kW";
  if (size >= 9.95) return number(w) + NBSP + "W";
  return number(w, 1) + NBSP + "W";
}

// Energy as a bare number of kWh. Less than 0.1, which one decimal cannot tell from nothing, gets
// three.
export function kwh(wh) {
  if (wh == null) return NONE;
  const value = wh / 1000;
  const size = Math.abs(value);
  if (size < 0.095) return number(value, 3);
  if (size < 99.95) return number(value, 1, 1);
  return number(value);
}

export function hasPrice() {
  return settings.price != null;
}

export function cost(wh) {
  if (wh == null) return NONE;
  const amount = (wh / 1000) * settings.price;
  if (/^[a-z]{3}$/i.test(settings.currency)) {
    const money = formatter("money", () => {
      return new Intl.NumberFormat(locale, { style: "currency", currency: settings.currency });
    });
    return money.format(amount);
  }
  // Not the code of a currency, but a text such as "Rp." or "€".
  return `${number(amount, 2, 2)}${NBSP}${settings.currency}`.trim();
}

// "3.2 kWh", with what it cost where a price is set.
export function energyText(wh) {
  const text = kwh(wh) + NBSP + "kWh";
  if (!hasPrice() || wh == null) return text;
  return `${text} (${cost(wh)})`;
}

// Always rounded down, as 99.98 is not 100.
export function percent(share) {
  const value = share * 100;
  if (value >= 100) return "100";
  if (value > 99) return number(Math.floor(value * 10) / 10, 1);
  return number(Math.floor(value));
}

// "▲ 12 %": how many more Wh than before, or fewer. Null where there was nothing but noise.
export function change(value, before) {
  if (value == null || !(before >= 1)) return null;
  const share = Math.round((value / before - 1) * 100);
  const mark = share > 0 ? "▲ " : "▼ ";
  return `${share === 0 ? "" : mark}${number(Math.abs(share))}${NBSP}%`;
}

// ---- Times

const DATE_STYLES = {
  weekday: { weekday: "short", day: "numeric" },
  day: { weekday: "short", day: "numeric", month: "short" },
  dayYear: { day: "numeric", month: "short", year: "numeric" },
  tick: { day: "numeric", month: "short" },
  month: { month: "short", year: "2-digit" },
  month_alone: { month: "long" },
  long_month: { month: "long", year: "numeric" },
  long_year: { year: "numeric" },
};

function dateFormatter(style) {
  return formatter(style, () => new Intl.DateTimeFormat(locale, DATE_STYLES[style]));
}

export function formatDate(style, t) {
  return dateFormatter(style).format(t);
}

// "23 – 29 Nov 2026"
export function formatDates(style, first, last) {
  return dateFormatter(style).formatRange(first, last);
}

// "07:05" in French, too: "7 h 05" is a duration.
export function clock(t) {
  return wallClock(t);
}

export function dayName(t) {
  const isThisYear = new Date(t).getFullYear() === new Date(now()).getFullYear();
  return formatDate(isThisYear ? "day" : "dayYear", t);
}

export function dayClock(t) {
  return `${dayName(t)}, ${clock(t)}`;
}

export function span(from, to) {
  const end = midnight(from) === midnight(to) ? clock(to) : dayClock(to);
  return `${dayClock(from)} – ${end}`;
}

// A moment of the past, with no more of its day than is needed.
export function moment(t) {
  if (t >= midnight(now())) return clock(t);
  if (t >= midnight(now(), -1)) return `${word("yesterday")} ${clock(t)}`;
  return `${dayName(t)} ${clock(t)}`;
}

// The same after a word such as "off": "hier à 21:15" in French.
export function momentAt(t) {
  const time = word("atClock", clock(t));
  if (t >= midnight(now())) return time;
  if (t >= midnight(now(), -1)) return `${word("yesterday")} ${time}`;
  return `${word("onDay", dayName(t))} ${time}`;
}

export function duration(ms) {
  const seconds = Math.round(ms / 1000);
  const minutes = Math.round(seconds / 60);
  const hours = Math.round(minutes / 60);
  if (seconds < 60) return `${seconds}${NBSP}s`;
  if (minutes < 60) return `${minutes}${NBSP}min`;
  if (minutes < 48 * 60) {
    const rest = String(minutes % 60).padStart(2, "0");
    return `${Math.floor(minutes / 60)}${NBSP}h${NBSP}${rest}`;
  }
  const days = word("days", Math.floor(hours / 24)).replace(" ", NBSP);
  return `${days}${NBSP}${hours % 24}${NBSP}h`;
}

// ---- Texts

// What is there of these texts, with a dot between them.
export function joined(texts) {
  return texts.filter(Boolean).join(" · ");
}

// The order of names: "switch:2" before "switch:10".
export function compareNames(one, other) {
  const collator = formatter("names", () => new Intl.Collator(locale, { numeric: true }));
  return collator.compare(one, other);
}
