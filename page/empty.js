// The page as long as there are no rows: what to paste into a Shelly, and which devices were
// refused.
//
// Exports `drawEmpty` and `listenToCopy`.

import { byId, element, isOutdated, on, setText } from "./dom.js";
import { moment } from "./format.js";
import { answers } from "./questions.js";
import { settings } from "./settings.js";
import { word } from "./words.js";

// A token that the owner has set is not told, so such a URL cannot be pasted.
function isWhole(url) {
  return url !== "" && !url.includes("…");
}

export function drawEmpty() {
  const canPaste = isWhole(settings.deviceUrl);
  setText(byId("emptytitle"), word(canPaste ? "empty" : "emptyCheck"));
  byId("url").parentElement.hidden = !canPaste;
  byId("url").value = settings.deviceUrl;
  drawRefused();
}

function drawRefused() {
  const rows = answers.refused ? answers.refused.rows : [];
  const texts = rows.map((row) => {
    const at = moment(Date.parse(row.refused_at));
    return `${at} · ${word("wasHere", row.address)} ${whyRefused(row)}`;
  });
  const list = byId("refused");
  if (!isOutdated(list, ...texts)) return;
  list.replaceChildren(...texts.map((text) => element("li", {}, text)));
}

function whyRefused({ reason, path }) {
  if (reason === "path" && path !== "/") return word("refused_otherPath", path);
  return word(`refused_${reason}`);
}

export function listenToCopy() {
  on(byId("url"), "focus", () => byId("url").select());
  const copy = byId("copy");
  copy.hidden = !navigator.clipboard; // there is one by HTTPS only, or on this machine
  on(copy, "click", async () => {
    await navigator.clipboard.writeText(settings.deviceUrl);
    setText(copy, "✓");
  });
}
