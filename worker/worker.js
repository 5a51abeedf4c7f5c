// A Cloudflare Worker between Shelly devices and the collector, which wakes the collector's host only when something
// runs:   device ── wss ──▶ passes? ─▶ deliver ── wss, opened for it if need be ──▶ collector
//
// line     one device's connection and all that is known of it, in memory, no longer than the connection lasts
// frame    one message of a device   {"src":"shellypro4pm-a1b2c3d4e5f6","method":"NotifyStatus","params":{…}}
// channel  a metered part of a device, by its key   switch:2, em1:0 (and its counter's twin, em1data:0)

// ---- Limits and patience. Times are milliseconds. ------------------------------------------------------------------
const RUN_OUT = 130_000; // a channel's frames pass for so long after its run: the next two minute frames
const IDLE_CLOSE = 600_000; // nothing ran for so long: the collector's host may sleep again
const MOST_KEPT = 1_000; // frames,
const MOST_KEPT_BYTES = 256_000; // and bytes; a frame of 2 ** 18 ends the collector's connection, so it is never kept
const RESEND = 60_000; // there is no acknowledgement, and the collector leaves a line that is silent for 50 s
const SHORTEST_PAUSE = 1_000; // between attempts, doubled after each,
const LONGEST_PAUSE = 60_000; // up to this; a connection that lasted so long proved good
const ANSWER_TIMEOUT = 30_000; // a host that wakes up may hold the request for a while
const MOST_FETCHES = 49; // one less than Cloudflare's free plan allows in one connection's life
const RENEW_AT = 40; // fetches after which a moment with nothing to send is used to begin anew
const MOST_CHANNELS = 1_000; // of a line,
const MOST_SAID = 4_000; // characters of what a component said

const KEY = /^(?:switch|pm1|cover|light|em1?(?:data)?):(\d{1,3})$/;
const POWER = /^(?:apower|(?:[abc]_)?act_power)$/;

export default {
  async fetch(request, env) {
    const settings = readSettings(env);
    const { searchParams, host } = new URL(request.url);
    const origin = request.headers.get("Origin"); // only a browser sends one, and the collector does not see it
    const refuse = (status, text) => new Response(`${text}\n`, { status });
    if (settings.wrong) console.error(settings.wrong);
    if (settings.wrong) return refuse(500, settings.wrong);
    if (!/^websocket$/i.test(request.headers.get("Upgrade"))) return refuse(426, "This is a WebSocket endpoint.");
    if (settings.token && !(await areSame(settings.token, searchParams.get("token") ?? "")))
      return refuse(401, "The URL lacks the right ?token=");
    if (!settings.token && origin !== null && origin.split("://")[1] !== host)
      return refuse(403, "No page of another site may send rows.");
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
    wrong,
  };
}

// fetch takes http(s) only, and no name and password; an error of URL would show the whole text, token included.
function readUrl(text) {
  const url = URL.parse(text.replace(/^ws(?=s?:)/i, "http"));
  return url && /^https?:$/.test(url.protocol) && !url.username && !url.password ? url.href : null;
}

// In a query + may stand for itself or for a blank, so they count as one. Hashes have one length, and tell no prefix.
async function areSame(...tokens) {
  const hash = (token) => crypto.subtle.digest("SHA-256", new TextEncoder().encode(token.replaceAll("+", " ")));
  const [right, given] = await Promise.all(tokens.map(hash));
  return crypto.subtle.timingSafeEqual(right, given);
}

// ---- Filter: which frames pass. -------------------------------------------------------------------------------------
function passes(line, data) {
  const { channels, floor } = line.settings;
  if (channels === null && floor === null) return true;
  let frame = null;
  try {
    frame = JSON.parse(data);
  } catch {} // no reading, so it should wake nobody
  const { id, method = null, params, result, error } = frame ?? {};
  const answers = method === null && (result !== undefined || error !== undefined); // a Wall Display's Notify has an id
  if (answers && id === 3) return true; // to the collector's Shelly.GetConfig: keys of channels, but no powers
  const whole = answers || method === "NotifyFullStatus";
  if (!whole && method !== "NotifyStatus") return false;
  return layOver(line, frame, answers ? result : params, whole) || whole;
}

// Lay components over what their channels said before; whether one of the kept channels runs, or ran lately.
function layOver(line, { src, received }, components, whole) {
  if (typeof src !== "string" || src.length > 100) return false; // the collector passes over it
  const at = typeof received === "number" ? received * 1000 : Date.now(); // it may be of the past
  const { channels } = line.settings;
  const found = []; // [channel, key, component]
  for (const [key, component] of Object.entries(components ?? {})) {
    const number = KEY.exec(key)?.[1];
    if (number === undefined || (channels && !channels.has(Number(number)))) continue;
    const meter = key.replace("data", "");
    const channel = channelOf(line, `${src} ${meter}`);
    const laid = { ...(whole ? null : channel.said[key]), ...component };
    if (runs(line, channel.said[meter]) || runs(line, laid)) {
      channel.ranAt = Math.max(channel.ranAt, at); // it ran until now, as far as is known: a stop is a frame, too
      closeWhenIdle(line);
    }
    found.push([channel, key, laid]);
  }
  const passing = whole || found.some(([channel]) => at - channel.ranAt < RUN_OUT);
  for (const [channel, key, laid] of found) {
    if (passing && !whole && channel.heldAt !== null) release(line, src, channel);
    channel.heldAt = passing ? null : at;
    const kept = Object.entries(laid).filter(([field]) => !passing || POWER.test(field)); // the rest has passed
    channel.said[key] = JSON.stringify(kept).length < MOST_SAID ? Object.fromEntries(kept) : {};
  }
  return passing;
}

function channelOf(line, name) {
  const channel = line.channels.get(name) ?? { said: {}, heldAt: null, ranAt: -Infinity };
  line.channels.delete(name); // and to the end: the first one is the one that was silent for longest
  line.channels.set(name, channel);
  if (line.channels.size > MOST_CHANNELS) line.channels.delete(line.channels.keys().next().value);
  return channel;
}

function runs(line, component) {
  const { floor } = line.settings;
  if (floor === null) return true;
  return Object.entries(component ?? {}).some(([field, value]) => POWER.test(field) && Math.abs(value) > floor);
}

// A run begins with a delta of power and current, and its first row takes voltage and counter from the minute before,
// which did not pass. Without them they would be those of the run before, perhaps of last week.
function release(line, src, { heldAt, said }) {
  deliver(line, JSON.stringify({ src, dst: "ws", method: "NotifyStatus", received: heldAt / 1000, params: said }));
}

// ---- Frames on their way. -------------------------------------------------------------------------------------------
function takeDevice(device, settings) {
  const line = {
    settings,
    device,
    collector: null, // its socket, while it is open
    openedAt: 0, // when it opened
    isOpening: false, // or waits for the next attempt,
    notBefore: 0, // which may be made then
    pause: SHORTEST_PAUSE, // from the next loss or failure to the attempt after it
    fetches: 0,
    idleTimer: null,
    frames: [], // oldest first: those that went out lately or, while there is no collector, those that wait for it
    bytes: 0, // of these
    channels: new Map(), // by device and key: { said: components by key, heldAt: when one did not pass, ranAt }
    ended: false,
  };
  accept(device);
  device.addEventListener("message", ({ data }) => {
    if (!line.ended && passes(line, data)) deliver(line, data);
  });
  device.addEventListener("close", () => end(line, 1000));
  device.addEventListener("error", () => end(line, 1011));
}

// From compatibility date 2026-04-07 the runtime answers a close by itself, at once, and gives binary as a Blob, which
// can be read only later, out of order.
function accept(socket) {
  socket.accept({ allowHalfOpen: true });
  socket.binaryType = "arraybuffer";
}

function deliver(line, data) {
  const bytes = data.byteLength ?? new TextEncoder().encode(data).length;
  const frame = { data, receivedAt: Date.now(), bytes, sentAt: Infinity }; // the clock stands still since it came
  line.frames.push(frame);
  line.bytes += bytes;
  if (line.collector) send(line, frame, data);
  dropOldest(line);
  openCollector(line);
}

function send(line, frame, data) {
  frame.sentAt = Date.now();
  line.collector.send(data); // to a broken connection, too: its event is still to come
}

function dropOldest(line) {
  const { frames } = line;
  const isTooMuch = () => frames.length > MOST_KEPT || line.bytes > MOST_KEPT_BYTES;
  while (isTooMuch() || frames[0]?.sentAt < Date.now() - RESEND) line.bytes -= frames.shift().bytes;
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
async function openCollector(line) {
  if (line.ended || line.collector || line.isOpening) return;
  line.isOpening = true;
  let refusals = 0; // in a row
  for (let attempts = 1; ; attempts += 1) {
    const wait = line.notBefore - Date.now();
    if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait));
    if (line.ended) return;
    if (line.fetches === MOST_FETCHES) return end(line, 1012, "this Worker has used up its requests: come back");
    line.fetches += 1;
    const { webSocket, status } = await ask(line.settings.url);
    if (webSocket && attempts > 1) console.log(`the collector is back, ${line.frames.length} frames go out late`);
    if (webSocket) return takeCollector(line, webSocket);
    const refusal = refusalOf(line.settings, status);
    if (attempts === 1) console.warn(`the collector is away, frames are kept: ${refusal || status}`);
    refusals = refusal ? refusals + 1 : 0;
    if (refusals === 3) return end(line, 1013, refusal);
    waitLonger(line);
  }
}

// The collector's answer to the attempt to connect: a connection as `webSocket`, or the status of a refusal.
async function ask(url) {
  const attempt = new AbortController();
  const timer = setTimeout(() => attempt.abort(), ANSWER_TIMEOUT); // a silent host hangs
  try {
    const headers = { Upgrade: "websocket" };
    const answer = await fetch(url, { headers, redirect: "manual", signal: attempt.signal });
    await answer.body?.cancel();
    return answer;
  } catch {
    return { status: "no answer" }; // and no message, which may show the URL
  } finally {
    clearTimeout(timer); // else it would end the connection, too
  }
}

// Sleeping hosts answer 404, 502, 503, or not at all. Only a refusal is something that the owner should see.
function refusalOf({ url }, status) {
  if (url === null) return "COLLECTOR_URL cannot be read: it must be like wss://host/ws?token=...";
  return status === 401 || status === 403 ? `the collector refuses: status ${status}` : "";
}

function takeCollector(line, socket) {
  accept(socket);
  if (line.ended) return socket.close(1000); // the device left meanwhile
  socket.addEventListener("message", ({ data }) => line.ended || line.device.send(data));
  socket.addEventListener("close", () => lose(line, socket));
  socket.addEventListener("error", () => lose(line, socket));
  Object.assign(line, { collector: socket, openedAt: Date.now(), isOpening: false });
  closeWhenIdle(line);
  for (const frame of line.frames) send(line, frame, late(frame));
}

// The collector is gone. What went out in the last seconds may have been in no row yet, so it goes out once more; what
// was in one already meets the table's rule.
function lose(line, socket, reason) {
  socket.close(1000, reason);
  if (line.collector !== socket) return; // closed by us, or known already by its error
  line.collector = null;
  clearTimeout(line.idleTimer);
  if (Date.now() - line.openedAt >= LONGEST_PAUSE) line.pause = SHORTEST_PAUSE; // else it may drop at once, for ever
  waitLonger(line);
  dropOldest(line);
  for (const frame of line.frames) frame.sentAt = Infinity;
  if (line.frames.length) openCollector(line);
  // Nothing is to be sent: if few fetches are left, the device comes back now and not in the midst of a run.
  else if (line.fetches >= RENEW_AT) end(line, 1012, "this Worker has used up most of its requests: come back");
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
    Object.assign(line, { frames: [], bytes: 0 });
    lose(line, line.collector, "nothing runs");
  }, IDLE_CLOSE);
}

function end(line, code, reason) {
  if (line.ended) return;
  line.ended = true;
  if (reason) console.warn(`the device is closed with ${code}: ${reason}`);
  clearTimeout(line.idleTimer);
  line.collector?.close(1000);
  line.device.close(code, reason);
}
