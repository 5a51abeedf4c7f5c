// A Cloudflare Worker between Shelly devices and the collector, which wakes the collector's host only when something
// runs. The path of a frame:
//
//   device ── wss ──▶ takeFrame ─▶ passes? ─▶ is the collector there? ─ yes ─▶ send ── wss ──▶ collector
//                                                         └─ no ─▶ keep ─▶ openCollector ─▶ takeCollector
//
// line     one device's connection and all that is known of it; it lives in memory, and no longer than the connection
// frame    one message of a device   {"src":"shellypro4pm-a1b2c3d4e5f6","method":"NotifyStatus","params":{…}}
// channel  a metered part of a device, by its key   switch:2, em1:0 (and its counter's twin, em1data:0)
// kept     frames that wait for the collector       sent   frames that went out in the last seconds

// ---- Limits and patience. Times are milliseconds. ------------------------------------------------------------------
const RUN_OUT = 130_000; // a channel's frames pass for so long after its run: the next two minute frames
const IDLE_CLOSE = 600_000; // nothing ran for so long: the collector's host may sleep again
const MOST_KEPT = 1_000; // frames,
const MOST_KEPT_BYTES = 256_000; // and bytes; a frame of 2 ** 18 ends the collector's connection, so it is never kept
const RESEND = 60_000; // there is no acknowledgement, and the collector leaves a line that is silent for 50 s
const SHORTEST_PAUSE = 1_000; // between attempts, doubled after each,
const LONGEST_PAUSE = 60_000; // up to this; a connection that lasted so long proved good
const ANSWER_TIMEOUT = 30_000; // a host that wakes up may hold the request for a while
const MOST_FETCHES = 50; // that Cloudflare's free plan allows in one connection's life
const RENEW_AT = 40; // fetches after which a moment with nothing to send is used to begin anew
const MOST_REFUSALS = 3; // in a row
const MOST_CHANNELS = 1_000; // of a line,
const MOST_WITHHELD = 4_000; // characters of what a component said that did not pass

// Key of a component: kind, kind of a twin, number; and which fields of a kind are its power.
const KEY = /^(?:(switch|pm1|cover|light|em1|em)|(em1|em)data):(\d{1,3})$/;
const APOWER = ["apower"];
const PHASES = ["a_act_power", "b_act_power", "c_act_power"];
const POWERS = { switch: APOWER, pm1: APOWER, cover: APOWER, light: APOWER, em1: ["act_power"], em: PHASES };
const ID_OF_CONFIG = 3; // of the collector's Shelly.GetConfig, whose answer has the keys of channels, but no powers

export default {
  async fetch(request, env) {
    const isUpgrade = (request.headers.get("Upgrade") ?? "").toLowerCase() === "websocket";
    const settings = readSettings(env);
    if (settings.wrong) console.error(settings.wrong);
    if (settings.wrong) return new Response(`${settings.wrong}\n`, { status: 500 });
    if (!isUpgrade) return new Response("This is a WebSocket endpoint.\n", { status: 426 });
    const { search, host } = new URL(request.url);
    const origin = request.headers.get("Origin"); // only a browser sends one, and the collector does not see it
    if (settings.token && !(await opens(search, settings.token)))
      return new Response("The URL lacks the right ?token=\n", { status: 401 });
    if (!settings.token && origin !== null && origin.split("://")[1] !== host)
      return new Response("No page of another site may send rows.\n", { status: 403 });
    const { 0: client, 1: device } = new WebSocketPair();
    takeDevice(device, settings);
    return new Response(null, { status: 101, webSocket: client });
  },
};

// ---- Settings: as the collector reads its own. ----------------------------------------------------------------------
// `wrong`: one line that names what makes no sense, and shows no secret.
function readSettings(env) {
  const said = (name) => String(env[name] ?? "").trim(); // wrangler.toml may also hold a number, or a list of them
  const channels = said("CHANNELS") ? said("CHANNELS").split(",").map((part) => part.trim()) : null;
  const floor = said("MIN_POWER_W");
  let wrong = "";
  if (channels?.some((part) => !/^\d{1,3}$/.test(part))) wrong = "CHANNELS makes no sense: it must be like 0,1,2";
  if (floor && !(/^(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(floor) && Number(floor) <= 1e9))
    wrong = "MIN_POWER_W makes no sense: it must be a number of watts, like 10";
  return {
    url: readUrl(said("COLLECTOR_URL")), // null: after some attempts the device is told
    token: said("DEVICE_TOKEN"),
    channels: channels && new Set(channels.map(Number)), // null: all
    floor: floor ? Number(floor) : null, // W; null: every channel counts as running
    filters: channels !== null || floor !== "",
    wrong,
  };
}

// fetch takes http(s) only, and no name and password; an error of URL would show the whole text, token included.
function readUrl(text) {
  const url = URL.parse(text.replace(/^ws(?=s?:)/i, "http"));
  return url && /^https?:$/.test(url.protocol) && !url.username && !url.password ? url.href : null;
}

// Whether a query carries the token, in which a blank may be + or %20. Hashes have one length, and tell no prefix.
async function opens(search, token) {
  const given = search.slice(1).split("&").find((part) => part.startsWith("token="))?.slice(6) ?? "";
  const digest = (text) => crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  const right = await digest(token);
  let found = false;
  for (const text of [given, given.replaceAll("+", "%2B")]) {
    const way = await digest(new URLSearchParams(`token=${text}`).get("token"));
    found = crypto.subtle.timingSafeEqual(way, right) || found;
  }
  return found;
}

// ---- Filter: which frames pass. -------------------------------------------------------------------------------------
// Text that is no JSON does not: it is no reading, so it should wake nobody.
function passes(line, data, now) {
  let frame = null;
  try {
    frame = JSON.parse(data);
  } catch {}
  if (frame === null || typeof frame !== "object") return false;
  const { method = null, params, result } = frame; // a Wall Display sends an id with its method
  if (method === null) {
    if (frame.id !== ID_OF_CONFIG) layOver(line, frame, result, true, now);
    return "result" in frame || "error" in frame;
  }
  if (method === "NotifyFullStatus") layOver(line, frame, params, true, now);
  return method === "NotifyFullStatus" || (method === "NotifyStatus" && layOver(line, frame, params, false, now));
}

// Take components into the known status; whether one of the kept channels runs, or ran lately.
function layOver(line, { src, received }, components, whole, now) {
  const { channels, floor } = line.settings;
  if (typeof src !== "string" || src.length > 100) return false; // the collector passes over it
  const at = typeof received === "number" ? received * 1000 : now; // it may be of the past
  const found = []; // [channel, key, component]
  for (const [key, component] of Object.entries(components ?? {})) {
    const [, kind, twinOf, number] = KEY.exec(key) ?? [];
    if (number === undefined || (channels && !channels.has(Number(number)))) continue;
    const channel = channelOf(line, `${src} ${kind ?? twinOf}:${number}`);
    const ran = runs(channel, floor); // until now, as far as is known: a stop is a frame, too
    if (whole && kind) channel.powers = {};
    for (const field of kind ? POWERS[kind] : []) {
      const power = component?.[field];
      if (power === null || typeof power === "number") channel.powers[field] = power;
    }
    if (ran || runs(channel, floor)) {
      channel.ranAt = Math.max(channel.ranAt, at);
      closeWhenIdle(line);
    }
    found.push([channel, key, component]);
  }
  const passing = whole || found.some(([channel]) => at - channel.ranAt < RUN_OUT);
  for (const [channel, key, component] of found) {
    if (!passing) withhold(channel, key, component, src, at / 1000);
    else if (whole) channel.withheld.delete(key);
    else release(line, channel, now);
  }
  return passing;
}

function channelOf(line, name) {
  const channel = line.known.get(name) ?? { powers: {}, ranAt: -Infinity, withheld: new Map() };
  line.known.delete(name); // and to the end: the first one is the one that was silent for longest
  line.known.set(name, channel);
  if (line.known.size > MOST_CHANNELS) line.known.delete(line.known.keys().next().value);
  return channel;
}

function runs(channel, floor) {
  return floor === null || Object.values(channel.powers).some((power) => Math.abs(power) > floor);
}

// What does not pass is only put together: a run begins with a delta of power and current, and its first row takes
// voltage and counter from the minute before. Else they would be those of the run before, perhaps of last week.
function withhold(channel, key, component, src, received) {
  const old = JSON.parse(channel.withheld.get(key) ?? "{}").params?.[key];
  const params = { [key]: { ...old, ...component } };
  const text = JSON.stringify({ src, dst: "ws", method: "NotifyStatus", received, params });
  channel.withheld.set(key, text.length < MOST_WITHHELD ? text : "{}");
}

function release(line, channel, now) {
  for (const text of channel.withheld.values()) if (text !== "{}") deliver(line, text, now);
  channel.withheld.clear();
}

// ---- Frames on their way. -------------------------------------------------------------------------------------------
function takeDevice(device, settings) {
  const line = {
    settings,
    device,
    collector: null, // its socket, while it is open
    openedAt: 0, // when it opened
    attempt: null, // the fetch under way, to give it up
    known: new Map(), // channels, by device and key
    kept: { frames: [], bytes: 0 }, // oldest first; empty while the collector is there
    sent: { frames: [], bytes: 0 },
    fetches: 0,
    refusals: 0, // in a row
    pause: SHORTEST_PAUSE, // before the attempt after the next
    notBefore: 0, // when the next attempt may be
    retryTimer: null,
    idleTimer: null,
    isAway: false, // and that is in the log
    ended: false,
  };
  accept(device);
  device.addEventListener("message", ({ data }) => takeFrame(line, data));
  device.addEventListener("close", () => end(line, 1000, ""));
  device.addEventListener("error", () => end(line, 1011, ""));
}

// From compatibility date 2026-04-07 the runtime answers a close by itself, at once, and gives binary as a Blob, which
// can be read only later, out of order.
function accept(socket) {
  socket.accept({ allowHalfOpen: true });
  socket.binaryType = "arraybuffer";
}

function takeFrame(line, data) {
  const now = Date.now(); // in a Worker this is when the message came: its clock stands still while it computes
  if (!line.ended && (!line.settings.filters || passes(line, data, now))) deliver(line, data, now);
}

function deliver(line, data, receivedAt) {
  const bytes = typeof data === "string" ? new TextEncoder().encode(data).length : data.byteLength;
  const frame = { data, receivedAt, bytes, sentAt: 0 };
  if (line.collector) return send(line, frame, data);
  put(line.kept, frame);
  openCollector(line);
}

function send(line, frame, data) {
  frame.sentAt = Date.now();
  put(line.sent, frame);
  const { frames } = line.sent;
  while (frames.length && frames[0].sentAt < frame.sentAt - RESEND) line.sent.bytes -= frames.shift().bytes;
  try {
    line.collector.send(data);
  } catch {
    lose(line, line.collector); // it broke, and its event is still to come
  }
}

function put(queue, frame) {
  queue.bytes += frame.bytes;
  queue.frames.push(frame);
  while (queue.frames.length > MOST_KEPT || queue.bytes > MOST_KEPT_BYTES) queue.bytes -= queue.frames.shift().bytes;
}

// Its text with the time that it came, for the collector to put it into that minute. The rest stays as it was written.
function late({ data, receivedAt }) {
  try {
    const frame = JSON.parse(data);
    if ("received" in frame || Array.isArray(frame)) return data;
    return data.replace("{", `{"received":${receivedAt / 1000}${Object.keys(frame).length ? "," : ""}`);
  } catch {
    return data; // binary, or no frame: the collector passes over it
  }
}

// ---- The collector: it comes, goes and comes back. ------------------------------------------------------------------
function openCollector(line) {
  if (line.ended || line.collector || line.attempt || line.retryTimer) return;
  const wait = line.notBefore - Date.now();
  if (wait > 0) {
    line.retryTimer = setTimeout(() => {
      line.retryTimer = null;
      openCollector(line);
    }, wait);
  } else if (line.fetches === MOST_FETCHES - 1) {
    end(line, 1012, "this Worker has used up its requests: come back");
  } else {
    line.attempt = new AbortController();
    connect(line, line.attempt);
  }
}

async function connect(line, attempt) {
  const timer = setTimeout(() => attempt.abort(), ANSWER_TIMEOUT); // a silent host hangs
  const request = { headers: { Upgrade: "websocket" }, redirect: "manual", signal: attempt.signal };
  let response = null;
  try {
    line.fetches += 1;
    if (line.settings.url !== null) response = await fetch(line.settings.url, request);
    if (!response.webSocket) await response.body?.cancel(); // a refusal is a status without a socket
  } catch {} // its message may show the URL
  clearTimeout(timer);
  line.attempt = null;
  const socket = response?.webSocket;
  if (socket) accept(socket);
  if (socket && line.ended) hangUp(socket, 1000, ""); // the device left meanwhile
  else if (socket) takeCollector(line, socket);
  else if (!line.ended) stayAway(line, response?.status);
}

// Sleeping hosts answer 404, 502, 503, or not at all. Only a refusal is something that the owner should see.
function stayAway(line, status) {
  let refused = status === 401 || status === 403 ? `the collector refuses: status ${status}` : "";
  if (line.settings.url === null) refused = "COLLECTOR_URL cannot be read: it must be like wss://host/ws?token=...";
  line.refusals = refused ? line.refusals + 1 : 0;
  if (!line.isAway) console.warn(`the collector is away, frames are kept: ${refused || (status ?? "no answer")}`);
  line.isAway = true;
  if (line.refusals === MOST_REFUSALS) return end(line, 1013, refused);
  waitLonger(line);
  openCollector(line);
}

function takeCollector(line, socket) {
  socket.addEventListener("message", ({ data }) => {
    try {
      line.device.send(data);
    } catch {} // the device is going
  });
  socket.addEventListener("close", () => lose(line, socket));
  socket.addEventListener("error", () => lose(line, socket));
  Object.assign(line, { collector: socket, openedAt: Date.now(), refusals: 0 });
  if (line.isAway) console.log(`the collector is back, ${line.kept.frames.length} frames go out late`);
  line.isAway = false;
  closeWhenIdle(line);
  const { frames } = line.kept;
  line.kept = { frames: [], bytes: 0 };
  for (const frame of frames) {
    if (line.collector === socket) send(line, frame, late(frame));
    else put(line.kept, frame); // it broke at once
  }
}

// The collector is gone. What went out in the last seconds may have been in no row yet, so it goes out once more; what
// was in one already meets the table's rule.
function lose(line, socket) {
  hangUp(socket, 1000, "");
  if (line.collector !== socket) return; // closed by us, or known already by its error
  line.collector = null;
  clearTimeout(line.idleTimer);
  const now = Date.now();
  if (now - line.openedAt >= LONGEST_PAUSE) line.pause = SHORTEST_PAUSE; // not earlier: it may drop at once, for ever
  waitLonger(line);
  for (const frame of line.sent.frames) if (frame.sentAt >= now - RESEND) put(line.kept, frame);
  line.sent = { frames: [], bytes: 0 };
  if (line.kept.frames.length) openCollector(line);
  else renew(line);
}

function waitLonger(line) {
  line.notBefore = Date.now() + line.pause;
  line.pause = Math.min(2 * line.pause, LONGEST_PAUSE);
}

// Begin to count the time without a run.
function closeWhenIdle(line) {
  clearTimeout(line.idleTimer);
  if (line.settings.floor === null || line.collector === null) return;
  line.idleTimer = setTimeout(() => {
    const socket = line.collector;
    line.collector = null;
    line.sent = { frames: [], bytes: 0 };
    hangUp(socket, 1000, "nothing runs");
    renew(line);
  }, IDLE_CLOSE);
}

// Nothing is to be sent: if few fetches are left, the device comes back now and not in the midst of a run.
function renew(line) {
  if (line.fetches >= RENEW_AT) end(line, 1012, "this Worker has used up most of its requests: come back");
}

function end(line, code, reason) {
  if (line.ended) return;
  line.ended = true;
  if (reason) console.warn(`the device is closed with ${code}: ${reason}`);
  clearTimeout(line.retryTimer);
  clearTimeout(line.idleTimer);
  line.attempt?.abort(); // as the runtime does by itself where the device has gone
  if (line.collector) hangUp(line.collector, 1000, "");
  hangUp(line.device, code, reason);
}

function hangUp(socket, code, reason) {
  try {
    socket.close(code, reason);
  } catch {} // it is closed already
}
