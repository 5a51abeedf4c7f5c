// Moments and days. A moment is a number of milliseconds, as Date.now() gives it; days are those of
// the reader's clock.
//
// Exports MINUTE, DAY, `zone`, `useOffset`, `now`, `followServer`, and what calendars need:
// `midnight`, `startOf`, `dayKey`, `wallClock`, `iso`.

export const MINUTE = 60_000;
export const DAY = 86_400_000;

// The reader's zone. A browser that does not know it shows UTC.
export let zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
if (zone === "Etc/Unknown") zone = "UTC";

// For a database that does not know the zone: UTC-5:30 has the hours of India, since such a name
// counts westwards.
export function useOffset() {
  const west = new Date().getTimezoneOffset();
  const sign = west < 0 ? "-" : "+";
  const minutes = Math.abs(west);
  zone = `UTC${sign}${Math.floor(minutes / 60)}:${minutes % 60}`;
}

// The server's clock decides what "now" is, unless the reader's is as good as the same.
const SAME_CLOCK = 20_000;
let serverIsAhead = 0;

export function followServer(serverTime) {
  const ahead = serverTime - Date.now();
  serverIsAhead = Math.abs(ahead) > SAME_CLOCK ? ahead : 0;
}

export function now() {
  return Date.now() + serverIsAhead;
}

// The midnight at which the day of `t` began, or the one that is so many days later. Days of 23 and
// 25 hours are the calendar's business.
export function midnight(t, daysLater = 0) {
  const date = new Date(t);
  const day = date.getDate() + daysLater;
  return new Date(date.getFullYear(), date.getMonth(), day).getTime();
}

// When the day, week, month or year of `t` began, or the one that is so many later.
export function startOf(unit, t, later = 0) {
  const date = new Date(t);
  const year = date.getFullYear();
  if (unit === "year") return new Date(year + later, 0).getTime();
  if (unit === "month") return new Date(year, date.getMonth() + later).getTime();
  if (unit === "day") return midnight(t, later);
  const daysSinceMonday = (date.getDay() + 6) % 7;
  return midnight(t, 7 * later - daysSinceMonday);
}

function twoDigits(n) {
  return String(n).padStart(2, "0");
}

// "2026-11-28": the day as the collector's answers write it.
export function dayKey(t) {
  const date = new Date(t);
  return `${date.getFullYear()}-${twoDigits(date.getMonth() + 1)}-${twoDigits(date.getDate())}`;
}

// "07:05"
export function wallClock(t) {
  const date = new Date(t);
  return `${twoDigits(date.getHours())}:${twoDigits(date.getMinutes())}`;
}

export function iso(t) {
  return new Date(t).toISOString();
}
