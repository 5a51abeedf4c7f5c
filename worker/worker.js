// A Cloudflare Worker that stands between Shelly devices and the collector. It passes on only the
// frames of channels that run, so that the collector's host can sleep while nothing does.
//
//   device ── wss ──▶ passes? ─▶ deliver ─▶ send ── wss ──▶ collector
//
// 1. A device connects. `fetch` checks its token, and `takeDevice` starts a link for it.
// 2. `passes` decides on each of the device's frames. A frame that does not pass still updates
//    what is known of its channels, and that goes along when one of them starts to run.
// 3. `deliver` sends a frame that passes. If there is no connection to the collector, the frame
//    waits while `openCollector` makes one, and goes out with the time at which it was received.
// 4. When nothing has run for ten minutes, the Worker leaves the collector, and waits for 2.
//
// What the collector sends goes to the device as it is.
//
// link     a device's connection and all that is known of it; it lives in memory, and no longer
//          than the connection
// frame    a message of a device: {"src":"shellypro4pm-a1b2c3d4e5f6","method":"NotifyStatus",
//          "params":{"switch:2":{"apower":433.8}}}
// channel  a metered part of a device, by its key: switch:2, or em1:0 with em1data:0, its counter

// ---- Limits and times -------------------------------------------------------------------------

// After a run, a channel's frames pass for this long: two more minute frames.
const RUN_OUT_MS = 130_000;

// When nothing has run for this long, the collector's host may sleep again.
const IDLE_CLOSE_MS = 600_000;

// How much is kept while the collector is away. A frame of more than 2 ** 18 bytes ends the
// collector's connection. It must not be sent again and again, and is too large to be kept.
const MOST_FRAMES = 1_000;
const MOST_BYTES = 256_000;

// Frames that went out less than this long before a connection was lost go out once more. There is
// no acknowledgement, and the collector itself gives up a connection that is silent for 50 s.
const RESEND_MS = 60_000;

// The pause before the next attempt to reach the collector doubles, from the shortest up to the
// longest. A connection that lasted for the longest pause has proved good: the shortest is next.
const SHORTEST_PAUSE_MS = 1_000;
const LONGEST_PAUSE_MS = 60_000;

// A host that wakes up may hold the request for a while.
const ANSWER_TIMEOUT_MS = 30_000;

// Cloudflare's free plan allows 50 requests during one connection. The device's own is one of them.
const MOST_FETCHES = 49;

// After this many, the next moment with nothing to send is used to let the device connect anew.
const RENEW_AT_FETCHES = 40;

// How many channels of a link are known at once, and how many characters each component may take.
const MOST_CHANNELS = 1_000;
const MOST_COMPONENT_CHARACTERS = 4_000;

// Three refusals in a row are no hiccup: the device is told.
const MOST_REFUSALS = 3;

// The codes with which a device's connection is closed (RFC 6455, section 7.4, and IANA's list).
const CLOSE_NORMAL = 1000;
const CLOSE_ERROR = 1011;
const CLOSE_COME_BACK = 1012;
const CLOSE_TRY_LATER = 1013;

// The id of the collector's Shelly.GetConfig.
const GET_CONFIG_ID = 3;

const CHANNEL_KEY = /^(?:switch|pm1|cover|light|rgb|rgbw|cct|rgbcct|em1?(?:data)?):(\d{1,3})$/;
const POWER_FIELD = /^(?:apower|(?:[abc]_)?act_power)$/;

// ---- The door ---------------------------------------------------------------------------------

export default {
  async fetch(request, env) {
    const settings = readSettings(env);
    if (settings.problem !== "") {
      console.error(settings.problem);
      return refuse(500, settings.problem);
    }
    if (!isUpgrade(request)) {
      return refuse(426, "This is a WebSocket endpoint.");
    }
    if (settings.token !== "" && !(await hasToken(request, settings.token))) {
      return refuse(401, "The URL lacks the right ?token=");
    }
    if (settings.token === "" && isOfAnotherSite(request)) {
      return refuse(403, "No page of another site may send rows.");
    }
    const pair = new WebSocketPair();
    takeDevice(pair[1], settings);
    return new Response(null, { status: 101, webSocket: pair[0] });
  },
};

function refuse(status, text) {
  return new Response(`${text}\n`, { status });
}

function isUpgrade(request) {
  const upgrade = request.headers.get("Upgrade") ?? "";
  return upgrade.toLowerCase() === "websocket";
}

async function hasToken(request, token) {
  const { searchParams } = new URL(request.url);
  const given = searchParams.get("token") ?? "";
  // Hashes have one length, and the time that it takes to compare them tells nothing of the token.
  const [tokenHash, givenHash] = await Promise.all([hashToken(token), hashToken(given)]);
  return crypto.subtle.timingSafeEqual(tokenHash, givenHash);
}

// In a query, a plus sign may stand for itself or for a blank, so the two count as the same.
function hashToken(token) {
  const text = token.replaceAll("+", " ");
  return crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
}

// Only browsers send an Origin. The collector never sees it, so it is checked here.
function isOfAnotherSite(request) {
  const origin = request.headers.get("Origin");
  if (origin === null) return false;
  const { host } = new URL(request.url);
  return origin.split("://")[1] !== host;
}

// ---- Settings: read as the collector reads its own --------------------------------------------

// `url` is null where it cannot be read, `channels` where all pass, and `floor_w` where every
// channel counts as running. `problem` names what makes no sense, in one line without secrets.
function readSettings(env) {
  const settings = {
    url: readUrl(textOf(env.COLLECTOR_URL)),
    token: textOf(env.DEVICE_TOKEN),
    channels: null,
    floor_w: null,
    problem: "",
  };
  const channels = textOf(env.CHANNELS);
  if (channels !== "") {
    const numbers = channels.split(",").map((number) => number.trim());
    settings.channels = new Set(numbers.map(Number));
    if (!numbers.every((number) => /^\d{1,3}$/.test(number))) {
      settings.problem = "CHANNELS makes no sense: it must be like 0,1,2";
    }
  }
  const floor = textOf(env.MIN_POWER_W);
  if (floor !== "") {
    settings.floor_w = Number(floor);
    if (!isPower(floor)) {
      settings.problem = "MIN_POWER_W makes no sense: it must be a number of watts, like 10";
    }
  }
  return settings;
}

// In wrangler.toml a variable may also be a number, or a list of them.
function textOf(variable) {
  return String(variable ?? "").trim();
}

function isPower(text) {
  return /^(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text) && Number(text) <= 1e9;
}

// `fetch` takes http and https only, and no name and password in the URL. URL.parse returns null
// where `new URL` would throw an error that shows the whole text, token included.
function readUrl(text) {
  const url = URL.parse(text.replace(/^ws(?=s?:)/i, "http"));
  if (url === null) return null;
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  if (url.username !== "" || url.password !== "") return null;
  return url.href;
}

// ---- The filter: which frames pass ------------------------------------------------------------

function passes(link, data) {
  const { channels, floor_w } = link.settings;
  if (channels === null && floor_w === null) return true;
  const frame = parseFrame(data);
  // It holds no reading, so it should wake nobody.
  if (frame === null) return false;
  if (isAnswer(frame)) {
    // A configuration has the keys of channels, but no powers. It says nothing of what runs.
    if (frame.id !== GET_CONFIG_ID) updateChannels(link, frame, frame.result, true);
    return true;
  }
  if (frame.method === "NotifyFullStatus") {
    updateChannels(link, frame, frame.params, true);
    return true;
  }
  if (frame.method === "NotifyStatus") {
    return updateChannels(link, frame, frame.params, false);
  }
  return false;
}

// The object that a frame is; null for what is none: binary data, no JSON, a bare value, a list.
function parseFrame(data) {
  try {
    const frame = JSON.parse(data);
    const isObject = typeof frame === "object" && !Array.isArray(frame);
    return isObject ? frame : null;
  } catch {
    return null;
  }
}

// An id alone makes no answer: a Wall Display's notifications have one, too.
function isAnswer(frame) {
  const hasMethod = frame.method !== undefined && frame.method !== null;
  return !hasMethod && (frame.result !== undefined || frame.error !== undefined);
}

// Lay a frame's components over what is known of their channels. Returns whether the frame should
// pass: whether one of the channels that are kept runs, or has run lately. A whole status takes the
// place of what was known, and always passes.
function updateChannels(link, frame, components, isWhole) {
  // The collector passes over a frame without a proper sender.
  if (typeof frame.src !== "string" || frame.src.length > 100) return false;
  const now = timeOf(frame);
  const updates = findUpdates(link, frame.src, components, isWhole);
  for (const update of updates) {
    if (isRun(link, update)) {
      // As far as is known, the channel ran until now: that it stops is told by a frame, too.
      update.channel.ranAt = Math.max(update.channel.ranAt, now);
      restartIdleTimer(link);
    }
  }
  const passing = isWhole || updates.some(({ channel }) => now - channel.ranAt < RUN_OUT_MS);
  for (const update of updates) {
    if (passing && !isWhole) releaseHeldBack(link, frame.src, update.channel);
    remember(update, passing, now);
  }
  return passing;
}

// The time of a frame in milliseconds. Another filter in front may have kept it for a while.
function timeOf(frame) {
  if (typeof frame.received === "number") return frame.received * 1000;
  return Date.now();
}

// What a frame changes, one update for each component of a channel that is kept. `status` is the
// component's new status, and `meterKey` the key under which its channel's power is known.
function findUpdates(link, src, components, isWhole) {
  const updates = [];
  for (const [key, component] of Object.entries(components ?? {})) {
    if (!isKept(link, key)) continue;
    const meterKey = key.replace("data", "");
    const channel = channelOf(link, `${src} ${meterKey}`);
    const before = isWhole ? {} : channel.known[key];
    updates.push({ channel, key, meterKey, status: { ...before, ...component } });
  }
  return updates;
}

function isKept(link, key) {
  const match = CHANNEL_KEY.exec(key);
  if (match === null) return false;
  const { channels } = link.settings;
  return channels === null || channels.has(Number(match[1]));
}

// The channel of that name, new if need be. A Map keeps the order in which its entries were set, so
// the first is the channel that has been silent for longest, and the first to be forgotten.
function channelOf(link, name) {
  const { channels } = link;
  const channel = channels.get(name) ?? { known: {}, heldBackAt: null, ranAt: -Infinity };
  channels.delete(name);
  channels.set(name, channel);
  if (channels.size > MOST_CHANNELS) {
    const [longestSilent] = channels.keys();
    channels.delete(longestSilent);
  }
  return channel;
}

// Whether a channel ran until this update, or runs after it.
function isRun(link, { channel, meterKey, status }) {
  return isRunning(link, channel.known[meterKey]) || isRunning(link, status);
}

function isRunning(link, status) {
  const { floor_w } = link.settings;
  if (floor_w === null) return true;
  return Object.entries(status ?? {}).some(
    ([field, value]) => POWER_FIELD.test(field) && Math.abs(value) > floor_w,
  );
}

// A run begins with a delta of power and current. Its first row takes voltage and counter from the
// minute before, which did not pass. So that minute goes along now: without it, the row would have
// the values of the run before, perhaps of last week.
function releaseHeldBack(link, src, channel) {
  if (channel.heldBackAt === null) return;
  const frame = {
    src,
    dst: "ws",
    method: "NotifyStatus",
    received: channel.heldBackAt / 1000,
    params: channel.known,
  };
  deliver(link, JSON.stringify(frame));
}

// Of a status that passes, only the power needs to be known from here on: the collector knows the
// rest. One that does not pass is held back as a whole.
function remember({ channel, key, status }, passing, now) {
  let fields = Object.entries(status);
  if (passing) fields = fields.filter(([field]) => POWER_FIELD.test(field));
  if (JSON.stringify(fields).length >= MOST_COMPONENT_CHARACTERS) fields = [];
  channel.known[key] = Object.fromEntries(fields);
  channel.heldBackAt = passing ? null : now;
}

// ---- Frames on their way ----------------------------------------------------------------------

function takeDevice(device, settings) {
  const link = {
    settings,
    device,
    // The collector's socket while it is open, and the time at which it opened.
    collector: null,
    openedAt: 0,
    // Whether an attempt to open it is being made, or waits for its time.
    isOpening: false,
    // The next attempt may be made at this time, and the one after its failure a pause later.
    notBefore: 0,
    pause_ms: SHORTEST_PAUSE_MS,
    fetches: 0,
    idleTimer: null,
    // Oldest first: frames that went out lately or, without a collector, those that wait for it.
    frames: [],
    bytes: 0,
    // By device and key: `known`, its components by key; `heldBackAt`, the time of a last frame
    // that did not pass, otherwise null; `ranAt`, the time at which it last ran.
    channels: new Map(),
    ended: false,
  };
  acceptSocket(device);
  device.addEventListener("message", ({ data }) => {
    if (!link.ended && passes(link, data)) deliver(link, data);
  });
  device.addEventListener("close", () => end(link, CLOSE_NORMAL));
  device.addEventListener("error", () => end(link, CLOSE_ERROR));
}

// From compatibility date 2026-04-07 on, the runtime answers a close by itself, at once, and gives
// binary data as a Blob. A Blob can only be read later, when other frames have overtaken it.
function acceptSocket(socket) {
  socket.accept({ allowHalfOpen: true });
  socket.binaryType = "arraybuffer";
}

function deliver(link, data) {
  // A Worker's clock stands still while it computes, so this is when the frame came.
  const frame = { data, bytes: sizeOf(data), receivedAt: Date.now(), sentAt: Infinity };
  link.frames.push(frame);
  link.bytes += frame.bytes;
  if (link.collector !== null) send(link, frame, data);
  dropOldest(link);
  openCollector(link);
}

function sizeOf(data) {
  if (typeof data === "string") return new TextEncoder().encode(data).length;
  return data.byteLength;
}

// Sending to a broken connection does no harm: the event that says so is still to come.
function send(link, frame, data) {
  frame.sentAt = Date.now();
  link.collector.send(data);
}

function dropOldest(link) {
  while (link.frames.length > 0 && isToBeDropped(link, link.frames[0])) {
    const oldest = link.frames.shift();
    link.bytes -= oldest.bytes;
  }
}

function isToBeDropped(link, oldest) {
  const areTooMany = link.frames.length > MOST_FRAMES || link.bytes > MOST_BYTES;
  return areTooMany || oldest.sentAt < Date.now() - RESEND_MS;
}

// The frame's text with the time at which it was received, so that the collector puts it into that
// minute. The rest of the text stays as the device wrote it.
function textWithTime({ data, receivedAt }) {
  const frame = parseFrame(data);
  // The collector passes over what is no frame. Another filter in front may have set the time.
  if (frame === null || "received" in frame) return data;
  const comma = Object.keys(frame).length > 0 ? "," : "";
  return data.replace("{", `{"received":${receivedAt / 1000}${comma}`);
}

// ---- The collector: it comes, goes and comes back ---------------------------------------------

// Try until the collector takes a connection. The device is closed when that cannot be hoped for.
async function openCollector(link) {
  if (link.ended || link.collector !== null || link.isOpening) return;
  link.isOpening = true;
  let attempts = 0;
  let refusals = 0;
  while (true) {
    const wait_ms = link.notBefore - Date.now();
    if (wait_ms > 0) await sleep(wait_ms);
    if (link.ended) return;
    if (link.fetches === MOST_FETCHES) {
      end(link, CLOSE_COME_BACK, "this Worker has used up its requests: come back");
      return;
    }
    link.fetches += 1;
    attempts += 1;
    const { webSocket, status } = await askCollector(link.settings.url);
    if (webSocket) {
      if (attempts > 1) {
        console.log(`the collector is back, ${link.frames.length} frames go out late`);
      }
      takeCollector(link, webSocket);
      return;
    }
    const refusal = refusalOf(link.settings, status);
    if (attempts === 1) {
      console.warn(`the collector is away, frames are kept: ${refusal || status}`);
    }
    refusals = refusal === "" ? 0 : refusals + 1;
    if (refusals === MOST_REFUSALS) {
      end(link, CLOSE_TRY_LATER, refusal);
      return;
    }
    postponeNextAttempt(link);
  }
}

function sleep(duration_ms) {
  return new Promise((resolve) => setTimeout(resolve, duration_ms));
}

// The answer to an attempt to connect: with a `webSocket`, or with the `status` of a refusal.
async function askCollector(url) {
  const attempt = new AbortController();
  const timer = setTimeout(() => attempt.abort(), ANSWER_TIMEOUT_MS);
  try {
    const answer = await fetch(url, {
      headers: { Upgrade: "websocket" },
      redirect: "manual",
      signal: attempt.signal,
    });
    await answer.body?.cancel();
    return answer;
  } catch {
    // The error's own message may show the URL, token included.
    return { status: "no answer" };
  } finally {
    // Otherwise the timer would end the connection as well.
    clearTimeout(timer);
  }
}

// What the owner should see, or "". Hosts that sleep answer 404, 502 or 503, or not at all: that
// will pass. A refusal will not.
function refusalOf(settings, status) {
  if (settings.url === null) {
    return "COLLECTOR_URL cannot be read: it must be like wss://host/ws?token=...";
  }
  if (status === 401 || status === 403) return `the collector refuses: status ${status}`;
  return "";
}

function takeCollector(link, socket) {
  acceptSocket(socket);
  // The device may have left meanwhile.
  if (link.ended) {
    socket.close(CLOSE_NORMAL);
    return;
  }
  socket.addEventListener("message", ({ data }) => {
    if (!link.ended) link.device.send(data);
  });
  socket.addEventListener("close", () => loseCollector(link, socket));
  socket.addEventListener("error", () => loseCollector(link, socket));
  link.collector = socket;
  link.openedAt = Date.now();
  link.isOpening = false;
  restartIdleTimer(link);
  for (const frame of link.frames) send(link, frame, textWithTime(frame));
}

// The connection to the collector is gone, or is given up for `reason`. What went out in the last
// seconds may be in no row yet, so it will go out once more; the table takes no row twice.
function loseCollector(link, socket, reason) {
  socket.close(CLOSE_NORMAL, reason);
  // It was given up before, or an error has been followed by a close.
  if (link.collector !== socket) return;
  link.collector = null;
  clearTimeout(link.idleTimer);
  // A collector that takes connections only to drop them is asked less and less often.
  const lasted_ms = Date.now() - link.openedAt;
  if (lasted_ms >= LONGEST_PAUSE_MS) link.pause_ms = SHORTEST_PAUSE_MS;
  postponeNextAttempt(link);
  dropOldest(link);
  for (const frame of link.frames) frame.sentAt = Infinity;
  if (link.frames.length > 0) {
    openCollector(link);
  } else if (link.fetches >= RENEW_AT_FETCHES) {
    // With nothing to send, the device had better come back now than in the midst of a run.
    end(link, CLOSE_COME_BACK, "this Worker has used up most of its requests: come back");
  }
}

function postponeNextAttempt(link) {
  link.notBefore = Date.now() + link.pause_ms;
  link.pause_ms = Math.min(2 * link.pause_ms, LONGEST_PAUSE_MS);
}

// Begin anew to count the time in which nothing runs. Without a floor, everything runs.
function restartIdleTimer(link) {
  clearTimeout(link.idleTimer);
  if (link.settings.floor_w === null || link.collector === null) return;
  link.idleTimer = setTimeout(() => leaveCollector(link), IDLE_CLOSE_MS);
}

function leaveCollector(link) {
  link.frames = [];
  link.bytes = 0;
  loseCollector(link, link.collector, "nothing runs");
}

// Close both sides, once, for good. The device will connect again by itself.
function end(link, code, reason) {
  if (link.ended) return;
  link.ended = true;
  if (reason) console.warn(`the device is closed with ${code}: ${reason}`);
  clearTimeout(link.idleTimer);
  link.collector?.close(CLOSE_NORMAL);
  link.device.close(code, reason);
}
