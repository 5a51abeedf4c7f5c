// Elements: finding, making, filling them. Whatever comes from a device or its owner gets into the
// page as a text or an attribute here, never as HTML.
//
// Exports `byId`, `on`, `element`, `svg`, `setAttributes`, `setText`, `isOutdated`.

const SVG = "http://www.w3.org/2000/svg";

export function byId(id) {
  return document.getElementById(id);
}

export function on(target, event, action) {
  target.addEventListener(event, action);
}

export function setAttributes(target, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    target.setAttribute(name, value);
  }
}

export function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  setAttributes(made, attributes);
  made.append(...children);
  return made;
}

export function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  setAttributes(made, attributes);
  made.append(...children);
  return made;
}

// An element whose text is the same is left alone, so that what a reader has marked in it stays.
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// What each box was last made from.
const madeFrom = new WeakMap();

// Whether a box is to be made anew, as something that it is made from has changed; the caller then
// does it. Not while someone marks text in it to copy.
export function isOutdated(box, ...sources) {
  const signature = sources.join();
  if (madeFrom.get(box) === signature) return false;
  const marked = getSelection();
  if (!marked.isCollapsed && box.contains(marked.anchorNode)) return false;
  madeFrom.set(box, signature);
  return true;
}
