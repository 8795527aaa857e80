// The panel beside the image: scores, classes, levels and the list of detections, from what `page.js` holds.

import { css, ink, ofClass, ofLevel } from "./colours.js";

const BINS = 46;

export const $ = (id) => document.getElementById(id);
export const counted = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
export const levelName = (level) => (level > 0 ? `P${level}` : "–");

/** An element with properties, attributes (where a name has a dash, or is role) and children. */
export function made(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** How many detections have which score, above the slider; those below the threshold are pale. */
export function drawScores(items, lowest, threshold) {
  const bins = Array(BINS).fill(0), width = (1 - lowest) / BINS || 1;
  for (const { score } of items) bins[Math.min(BINS - 1, Math.max(0, Math.floor((score - lowest) / width)))]++;
  const most = Math.max(1, ...bins), place = $("scores");
  while (place.children.length < BINS) place.append(made("i"));
  bins.forEach((count, index) => {
    const bar = place.children[index];
    bar.style.height = count ? `${Math.max(8, 100 * Math.sqrt(count / most))}%` : "0";
    bar.classList.toggle("below", lowest + (index + 0.5) * width < threshold);
  });
}

/** The classes of the image, most frequent first, each a switch. */
export function drawClasses(state, on) {
  const counts = count(state, "name", "level");
  const names = [...new Set(state.items.map(({ name }) => name))];
  const total = count({ ...state, threshold: 0, off: { name: new Set(), level: new Set() } }, "name", "level");
  names.sort((a, b) => total.get(b) - total.get(a) || state.indexOf(a) - state.indexOf(b));
  sync($("classes").firstElementChild, names, (name) => {
    const button = toggle("name", name, on);
    button.append(made("i", { className: "tick" }), made("span", { className: "name", textContent: name, title: name }),
      made("span", { className: "number" }));
    return made("li", {}, button, only("name", name, on));
  }, (row, name) => {
    const colour = ofClass(state.indexOf(name));
    row.firstElementChild.style.setProperty("--colour", css(colour));
    row.firstElementChild.style.setProperty("--ink", ink(colour));
    fill(row, counts.get(name) ?? 0, !state.off.name.has(name));
  });
}

/** The pyramid, coarse levels at the top: what each has found, and how large that is. */
export function drawLevels(state, on) {
  const counts = count(state, "level", "name"), most = Math.max(1, ...counts.values());
  const levels = [...new Set([...(state.model?.levels ?? []), ...state.items.map(({ level }) => level)])];
  levels.sort((a, b) => b - a);
  sync($("levels").lastElementChild, levels, (level) => {
    const button = toggle("level", level, on);
    const words = made("span", { className: "words" }, made("b", { textContent: levelName(level) }),
      made("small"), made("span", { className: "bar" }, made("i")));
    button.append(made("span", { className: "plate" }, made("i")), words, made("span", { className: "number" }));
    return made("li", {}, button, only("level", level, on));
  }, (row, level) => {
    const found = counts.get(level) ?? 0, plate = row.querySelector(".plate i");
    row.firstElementChild.style.setProperty("--colour", css(ofLevel(level)));
    plate.style.width = `${100 * 0.8 ** levels.toReversed().indexOf(level)}%`;
    row.querySelector(".bar i").style.width = `${(100 * found) / most}%`;
    row.querySelector("small").textContent = describe(state, level);
    row.classList.toggle("idle", !found);
    fill(row, found, !state.off.level.has(level));
  });
}

function describe(state, level) {
  const sides = state.items
    .filter((item) => item.level === level && item.score >= state.threshold && !state.off.name.has(item.name))
    .map(({ box: [x1, y1, x2, y2] }) => Math.sqrt(Math.max(0, (x2 - x1) * (y2 - y1))))
    .sort((a, b) => a - b);
  const cell = state.cellOf(level), words = [];
  if (sides.length) words.push(`objects ~${Math.round(sides[Math.floor(sides.length / 2)])} px`);
  if (cell) words.push(`cells ${Number(cell.toFixed(cell < 10 ? 1 : 0))} px`);
  return words.join(", ");
}

/** Every detection has a row, and those not shown are hidden; the rows are made anew with `fresh`. */
export function drawList(state, shown, fresh, on) {
  const place = $("list");
  if (fresh) place.replaceChildren(...state.items.map((item) => rowOf(item, on)));
  const visible = new Set(shown);
  state.items.forEach((item, index) => {
    const row = place.children[index];
    const isHidden = !visible.has(item), isPicked = item === state.picked;
    if (row.hidden !== isHidden) row.hidden = isHidden; // there may be a thousand, and the slider is moving
    if (row.colour !== item.colour) row.firstElementChild.style.setProperty("--colour", css((row.colour = item.colour)));
    if (row.picked !== isPicked) row.firstElementChild.setAttribute("aria-current", (row.picked = isPicked));
  });
}

function rowOf(item, on) {
  const [x1, y1, x2, y2] = item.box;
  const button = made("button", { type: "button", title: `${Math.round(x2 - x1)} × ${Math.round(y2 - y1)} px` },
    made("i", { className: "swatch" }), made("span", { className: "name", textContent: item.name }),
    made("span", { className: "level", textContent: levelName(item.level) }),
    made("span", { className: "number", textContent: item.score.toFixed(2) }));
  button.addEventListener("click", () => on.pick(item));
  button.addEventListener("focus", () => on.point(item));
  button.addEventListener("blur", () => on.point(null));
  button.addEventListener("pointerenter", () => on.point(item));
  button.addEventListener("pointerleave", () => on.point(null));
  return made("li", {}, button);
}

/** How many detections of each class (or level) the threshold and the switches of the other kind let through. */
function count({ items, threshold, off }, kind, other) {
  const counts = new Map();
  for (const item of items)
    if (item.score >= threshold && !off[other].has(item[other])) counts.set(item[kind], (counts.get(item[kind]) ?? 0) + 1);
  return counts;
}

function toggle(kind, key, on) {
  const button = made("button", { type: "button", className: "switch" });
  button.addEventListener("click", () => on.toggle(kind, key));
  for (const [event, value] of [["pointerenter", key], ["pointerleave", null], ["focus", key], ["blur", null]])
    button.addEventListener(event, () => on.pointKind(kind, value));
  return button;
}

function only(kind, key, on) {
  const words = kind === "level" ? levelName(key) : key;
  const button = made("button", { type: "button", className: "only", textContent: "only", "aria-label": `Only ${words}` });
  button.addEventListener("click", () => on.only(kind, key));
  return button;
}

function fill(row, number, isOn) {
  row.firstElementChild.setAttribute("aria-pressed", isOn);
  row.querySelector(".number").textContent = number;
}

/** Make the children of `place` stand for these keys, with those that are there already: they may have the focus. */
function sync(place, keys, make, update) {
  const known = new Map([...place.children].map((row) => [row.key, row]));
  keys.forEach((key, index) => {
    const row = known.get(key) ?? Object.assign(make(key), { key });
    known.delete(key);
    if (place.children[index] !== row) place.insertBefore(row, place.children[index] ?? null);
    update(row, key);
  });
  for (const row of known.values()) row.remove();
}
