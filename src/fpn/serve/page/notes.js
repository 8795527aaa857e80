// A line over the image: what went wrong, or what the page waits for.

import { $ } from "./panel.js";

let noteTimer = 0;

/** bad: something went wrong. action: [words, function] of a button. */
export function say(words, { bad = false, action = null } = {}) {
  clearTimeout(noteTimer);
  const [, text, button] = $("note").children;
  if (text.textContent !== words) text.textContent = words;
  $("note").classList.toggle("bad", bad);
  $("note").hidden = false;
  button.hidden = !action;
  if (action) [button.textContent, button.onclick] = action;
}

export function hush() {
  clearTimeout(noteTimer);
  $("note").hidden = true;
}

/** Say after so many milliseconds that the detector is at work; null: no longer. */
export function busyAfter(milliseconds, cancel) {
  clearTimeout(noteTimer);
  if (milliseconds !== null)
    noteTimer = setTimeout(() => say("Detecting …", { action: ["Cancel", cancel] }), milliseconds);
}
