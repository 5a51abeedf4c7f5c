// Runs worker.js in Cloudflare's own runtime, for the tests: node worker_runtime.mjs '{"bindings":{…},"constants":{…}}'.
// Prints its port, then whatever the Worker and the runtime log; ends with its input. `constants` replace those at the
// top of the module, for times that no test can await.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const folder = new URL("../worker/", import.meta.url);
const { Miniflare } = await import(createRequire(new URL("package.json", folder)).resolve("miniflare"));
const { bindings, constants } = JSON.parse(process.argv[2]);
let script = readFileSync(new URL("worker.js", folder), "utf8");
for (const [name, value] of Object.entries(constants)) {
  const line = new RegExp(`^const ${name} = [0-9_]+;`, "m");
  if (!line.test(script)) throw new Error(`worker.js has no constant ${name}`);
  script = script.replace(line, `const ${name} = ${value};`);
}
const wrangler = readFileSync(new URL("wrangler.toml", folder), "utf8");
const [, compatibilityDate] = /^compatibility_date = "(.*)"/m.exec(wrangler);
const runtime = new Miniflare({
  host: "127.0.0.1",
  port: 0,
  modules: [{ type: "ESModule", path: "worker.js", contents: script }],
  compatibilityDate,
  bindings,
  handleRuntimeStdio: (stdout, stderr) => {
    stdout.pipe(process.stdout);
    stderr.pipe(process.stdout);
  },
});
console.log((await runtime.ready).port);
process.stdin.on("end", () => runtime.dispose().then(() => process.exit())).resume(); // the tests have gone
