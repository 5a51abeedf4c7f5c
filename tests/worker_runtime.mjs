// Runs worker.js in Cloudflare's own runtime, for the tests:
//
//   node worker_runtime.mjs '{"bindings":{"MIN_POWER_W":"10"},"constants":{"RESEND_MS":1}}'
//
// Prints its port, then whatever the Worker and the runtime log, and ends with its input. `bindings`
// are the Worker's variables. `constants` replace those at the top of worker.js, for times that no
// test can wait for.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const folder = new URL("../worker/", import.meta.url);
const workerRequire = createRequire(new URL("package.json", folder));
const { Miniflare } = await import(workerRequire.resolve("miniflare"));

function readWorker(constants) {
  let script = readFileSync(new URL("worker.js", folder), "utf8");
  for (const [name, value] of Object.entries(constants)) {
    const line = new RegExp(`^const ${name} = [0-9_]+;`, "m");
    if (!line.test(script)) throw new Error(`worker.js has no constant ${name}`);
    script = script.replace(line, `const ${name} = ${value};`);
  }
  return script;
}

function readCompatibilityDate() {
  const wrangler = readFileSync(new URL("wrangler.toml", folder), "utf8");
  const [, date] = /^compatibility_date = "(.*)"/m.exec(wrangler);
  return date;
}

const { bindings, constants } = JSON.parse(process.argv[2]);
const runtime = new Miniflare({
  host: "127.0.0.1",
  port: 0,
  modules: [{ type: "ESModule", path: "worker.js", contents: readWorker(constants) }],
  compatibilityDate: readCompatibilityDate(),
  bindings,
  handleRuntimeStdio: (stdout, stderr) => {
    stdout.pipe(process.stdout);
    stderr.pipe(process.stdout);
  },
});
const url = await runtime.ready;
console.log(url.port);

// The input ends when the tests do, however they end.
process.stdin.on("end", async () => {
  await runtime.dispose();
  process.exit();
});
process.stdin.resume();
