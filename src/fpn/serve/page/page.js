// The page: an image comes in, the server is asked once for everything in it, and the rest happens here.

import { introduce, megabytes, tellMore } from "./about.js";
import { start as startCamera } from "./camera.js";
import { ofClass, ofLevel } from "./colours.js";
import { tinted } from "./masks.js";
import { busyAfter, hush, say } from "./notes.js";
import { $, counted, drawClasses, drawLevels, drawList, drawScores, levelName, made } from "./panel.js";
import { detect, model as askModel, useToken } from "./server.js";
import { Stage } from "./stage.js";

const state = {
  model: null,
  file: "", // its name
  size: [0, 0], // height and width of the image
  items: [], // detections, highest score first
  threshold: 0.5,
  by: "name", // what colours tell: "name" of the class, or "level"
  off: { name: new Set(), level: new Set() },
  pointed: null, // an item, or {kind, key}
  picked: null, // an item
  film: null, // the camera while it runs
  indexOf: (name) => Math.max(0, state.model?.classes?.indexOf(name) ?? 0),
  cellOf,
};
let asking = new AbortController();

const stage = new Stage($("picture"), $("boxes"), {
  onPoint: (index) => point(index === null ? null : shown()[index]),
  onPick: (index) => pick(index === null ? null : shown()[index]),
});

// From an image to detections.

async function open(file) {
  if (state.film) stopFilm();
  const signal = begin();
  if (!state.model && !(await meet(() => open(file)))) return;
  const most = state.model.limits?.bytes;
  if (most && file.size > most)
    return say(`This file has ${megabytes(file.size)}; the server takes up to ${megabytes(most)}.`, { bad: true });
  if (!file.size) return say("This file is empty.", { bad: true });
  const image = await decoded(file);
  if (signal.aborted) return;
  forget(file.name || "pasted image");
  frameFor(image?.naturalWidth, image?.naturalHeight);
  stage.show(image, image?.naturalWidth ?? 0, image?.naturalHeight ?? 0);
  busy(true);
  try {
    const result = await detect(file, state.model.score, { signal, onBusy });
    busy(false);
    show(image, result);
    hush();
    if (!image && state.items.length) say("This browser cannot show this kind of image. The boxes are right all the same.");
  } catch (error) {
    if (error.name === "AbortError") return;
    busy(false);
    if (!image) document.body.dataset.view = "welcome"; // there is nothing to look at
    refused(error, () => open(file));
  }
}

/** From here on the answer to an earlier question is of no interest. */
function begin() {
  asking.abort();
  asking = new AbortController();
  busy(false);
  return asking.signal;
}

/** What the server said goes on the screen. */
function show(image, result, options) {
  const fresh = result.detections.map((detection) => ({
    name: detection.class, score: detection.score, box: detection.box, level: detection.level ?? -1, detection, masks: {},
  }));
  state.items = fresh.sort((a, b) => b.score - a.score);
  [state.size, state.picked, state.pointed] = [[result.height, result.width], null, null];
  document.body.dataset.view = "result";
  [$("panel").hidden, $("zoom").hidden] = [false, false];
  document.body.classList.toggle("empty", !state.items.length && !state.film);
  frameFor(result.width, result.height);
  stage.show(image, result.width, result.height, options);
  $("measures").textContent = `${result.width} × ${result.height} px` +
    (result.seconds === undefined ? "" : `, ${result.seconds < 0.995 ? `${Math.round(1000 * result.seconds)} ms` : `${result.seconds.toFixed(1)} s`}`);
  draw(true);
  $("said").textContent = state.film ? "" : summary();
}

/** On a phone the image takes the height that it needs. */
function frameFor(width, height) {
  $("stage").style.setProperty("--shape", width && height ? `${width} / ${height}` : "4 / 3");
}

/** An image whose answer is still to come: nothing of the one before may be taken for its own. */
function forget(name) {
  [state.file, state.items, state.picked, state.pointed] = [name, [], null, null];
  document.body.dataset.view = "result";
  [$("panel").hidden, $("zoom").hidden] = [true, false];
  document.title = `${name} – fpn`;
  $("boxes").setAttribute("aria-label", name);
  hush();
}

/** The image as the browser shows it, turned as the camera noted; null where it cannot be read here. */
async function decoded(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
    return image.naturalWidth ? image : null;
  } catch {
    return null;
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

async function film() {
  if (state.film) return stopFilm();
  const signal = begin();
  hush();
  if (!state.model && !(await meet(film))) return;
  const self = (state.film = { stop() {} });
  busy(true);
  const ended = () => state.film === self && (stopFilm(), say("The camera has stopped.", { bad: true }));
  try {
    const eye = await startCamera($("video"), ended);
    if (signal.aborted || state.film !== self) return eye.stop();
    self.stop = eye.stop;
    filming(true);
    await frames(eye, self, signal);
  } catch (error) {
    if (error.name === "AbortError" || state.film !== self) return;
    stopFilm();
    if (error.status === undefined) say(error.message, { bad: true });
    else refused(error, film);
  }
}

/** Frame by frame: what is drawn is the frame that the detector saw, and the next one is taken after that. */
async function frames(eye, self, signal) {
  let before = performance.now(), rate = 0;
  while (state.film === self) {
    const file = document.hidden ? null : await eye.frame();
    if (!file) {
      await new Promise((resolve) => setTimeout(resolve, 200));
      continue;
    }
    const [image, result] = await Promise.all([createImageBitmap(file), detect(file, state.model.score, { signal, onBusy })]);
    if (state.film !== self) return;
    busy(false);
    state.file = `camera ${new Date().toISOString().slice(0, 19).replaceAll(":", ".")}`;
    show(image, result, { keep: true });
    const now = performance.now();
    rate = 0.8 * (rate || 1000 / (now - before)) + 0.2 * (1000 / (now - before));
    before = now;
    hush();
    $("measures").textContent = `${rate < 9.5 ? rate.toFixed(1) : Math.round(rate)} frames a second`;
    await new Promise(requestAnimationFrame); // the screen has its turn, however fast the server is
  }
}

function stopFilm() {
  asking.abort();
  state.film?.stop();
  state.film = null;
  filming(false);
  busy(false);
  hush();
  if (state.items.length) draw(true);
  else if ($("panel").hidden) document.body.dataset.view = "welcome"; // stopped before the first frame
}

function filming(on) {
  $("camera").setAttribute("aria-pressed", on);
  $("camera").querySelector("span").textContent = on ? "Stop camera" : "Camera";
  document.body.classList.toggle("filming", on);
  if (on) forget("camera");
}

// What is on the screen.

let waiting = 0;

/** Bring the screen up to date before it is shown next. fresh: the detections are others than before. */
function draw(fresh = false) {
  if (fresh) return paint(true);
  waiting ||= requestAnimationFrame(() => paint(false));
}

function paint(fresh) {
  cancelAnimationFrame(waiting);
  waiting = 0;
  for (const item of state.items) item.colour = state.by === "level" ? ofLevel(item.level) : ofClass(state.indexOf(item.name));
  const items = shown();
  const { kind, key } = state.pointed ?? {};
  stage.draw(items.map(drawing), focus(items), kind === "level" && !state.off.level.has(key) ? cellOf(key) : null);
  drawScores(state.items, lowest(), state.threshold);
  drawClasses(state, on);
  drawLevels(state, on);
  if (!state.film) drawList(state, items, fresh || $("list").children.length !== state.items.length, on);
  $("count").textContent = items.length;
  $("objects").textContent = items.length === 1 ? "object" : "objects";
  $("chosen").textContent = state.threshold.toFixed(2);
  $("threshold").setAttribute("aria-valuetext", `${state.threshold.toFixed(2)}, ${counted(items.length, "object")}`);
  $("boxes").setAttribute("aria-label", `${state.file}: ${summary()}`);
  tellHidden();
  tellNone(items);
  for (const id of ["copy", "download", "save"]) $(id).disabled = state.film !== null;
}

/** An item as the stage draws it; the one that is pointed at says all that is known of it. */
function drawing(item) {
  const [x1, y1, x2, y2] = item.box;
  const more = item === state.pointed || item === state.picked;
  const size = `${Math.round(x2 - x1)} × ${Math.round(y2 - y1)} px`;
  const tag = state.by === "level" ? levelName(item.level) : item.name;
  const text = more ? `${item.name} ${item.score.toFixed(2)}, ${levelName(item.level)}, ${size}` : `${tag} ${item.score.toFixed(2)}`;
  const { segmentation } = item.detection;
  if (segmentation) item.masks[state.by] ??= { tint: tinted(segmentation, item.box, item.colour) };
  return { box: item.box, colour: item.colour, text, mask: item.masks[state.by]?.tint ?? null };
}

const lowest = () => Math.floor(100 * (state.model?.score ?? 0)) / 100;

const passes = ({ score, name, level }) =>
  score >= state.threshold && !state.off.name.has(name) && !state.off.level.has(level);

const shown = () => state.items.filter(passes);

/** The places of the items that are pointed at, among those shown; null where all are equal. */
function focus(items) {
  const { pointed, picked } = state;
  const wanted = pointed?.kind ? (item) => item[pointed.kind] === pointed.key : (item) => item === (pointed ?? picked);
  if ((!pointed && !picked) || (pointed?.kind && state.off[pointed.kind].has(pointed.key))) return null;
  const found = new Set(items.flatMap((item, index) => (wanted(item) ? [index] : [])));
  return found.size || pointed?.kind ? found : null;
}

function summary() {
  const counts = new Map();
  for (const { name } of shown()) counts.set(name, (counts.get(name) ?? 0) + 1);
  const parts = [...counts].sort((a, b) => b[1] - a[1]).map(([name, number]) => `${number} ${name}`);
  return parts.length ? `${counted(shown().length, "object")}: ${parts.join(", ")}` : "no objects";
}

function tellHidden() {
  const hidden = [...state.off.name].filter((name) => state.items.some((item) => item.name === name)).length;
  const levels = [...state.off.level].filter((level) => state.items.some((item) => item.level === level)).length;
  const parts = [hidden && counted(hidden, "class", "classes"), levels && counted(levels, "level")].filter(Boolean);
  $("filtered").hidden = !parts.length;
  $("filtered").firstElementChild.textContent = `${parts.join(" and ")} hidden.`;
}

/** Why the list is empty, and the way out. */
function tellNone(items) {
  const place = $("none"), best = state.items.find((item) => !state.off.name.has(item.name) && !state.off.level.has(item.level));
  place.hidden = items.length > 0;
  if (items.length) return;
  if (!state.items.length) return place.replaceChildren(`Nothing found: no detection scores ${lowest().toFixed(2)} or more.`);
  if (!best) return place.replaceChildren("All that was found is hidden.");
  const start = Math.floor(100 * best.score) / 100;
  const button = made("button", { type: "button", className: "link", textContent: `Show from ${start.toFixed(2)}` });
  button.addEventListener("click", () => setThreshold(start));
  place.replaceChildren(`No score reaches ${state.threshold.toFixed(2)}; the highest is ${best.score.toFixed(2)}. `, button);
}

/** The side of a cell of a level in pixels of the image: 2 ** level pixels of the image as it was resized. */
function cellOf(level) {
  const { short, long, tile } = state.model ?? {}, smaller = Math.min(...state.size), larger = Math.max(...state.size);
  if (!short || !long || tile || level < 1 || !smaller) return null;
  return 2 ** level / Math.min(short / smaller, long / larger);
}

// What the user does.

const on = {
  pick,
  point,
  toggle(kind, key) {
    if (!state.off[kind].delete(key)) state.off[kind].add(key);
    draw();
  },
  only(kind, key) {
    state.off[kind] = new Set(state.items.map((item) => item[kind]).filter((other) => other !== key));
    draw();
  },
  pointKind(kind, key) {
    state.pointed = key === null ? null : { kind, key };
    draw();
  },
};

function point(item) {
  if (state.pointed === (item ?? null)) return;
  state.pointed = item ?? null;
  draw();
}

function pick(item) {
  state.picked = item === state.picked ? null : (item ?? null);
  state.pointed = null;
  draw();
  const row = state.picked && $("list").children[state.items.indexOf(state.picked)];
  row?.scrollIntoView({ block: "nearest" });
}

function setThreshold(value) {
  state.threshold = Math.min(1, Math.max(lowest(), Math.round(100 * value) / 100));
  $("threshold").value = state.threshold;
  draw();
}

function colourBy(kind) {
  state.by = kind;
  const byLevel = kind === "level";
  for (const [tab, panel, isOn] of [["by-class", "classes", !byLevel], ["by-level", "levels", byLevel]]) {
    $(tab).setAttribute("aria-selected", isOn);
    $(tab).tabIndex = isOn ? 0 : -1;
    $(panel).hidden = !isOn;
  }
  draw();
}

function step(direction) {
  const items = shown(), at = items.indexOf(state.picked);
  if (!items.length) return;
  state.picked = null;
  pick(items[at < 0 ? (direction > 0 ? 0 : items.length - 1) : (at + direction + items.length) % items.length]);
}

function asJson() {
  const detections = shown().map((item) => item.detection);
  const [height, width] = state.size;
  return JSON.stringify({ file: state.file, height, width, threshold: state.threshold, detections }, null, 2);
}

async function copy() {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(asJson());
    else copyByHand(asJson()); // on http that is not localhost there is no clipboard
    flash("copy", "Copied");
  } catch {
    say("This browser does not let the page copy; the JSON file holds the same.", { bad: true });
  }
}

function copyByHand(text) {
  const area = made("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("not copied");
}

function keep(file, ending) {
  const link = made("a", { href: URL.createObjectURL(file), download: state.file.replace(/\.\w{1,5}$/, "") + ending });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function savePicture() {
  try {
    keep(await stage.picture(), "-detections.png");
  } catch (error) {
    say(error.message, { bad: true });
  }
}

function flash(id, words) {
  const usual = ($(id).dataset.usual ??= $(id).textContent);
  $(id).textContent = words;
  setTimeout(() => ($(id).textContent = usual), 1500);
}

function take(files) {
  if (!files.length) return say("That is no image file. Save the image first, or copy it and paste it here.", { bad: true });
  open(files[0]);
}

// What the page says.

/** Show that the server is asked, or no longer. */
function busy(isBusy) {
  $("progress").hidden = !isBusy;
  $("stage").setAttribute("aria-busy", isBusy);
  busyAfter(isBusy && !state.film ? 800 : null, stopAsking);
}

const onBusy = (seconds) => {
  const rounded = Math.max(1, Math.round(seconds));
  say(`The server is busy. Asking again in ${counted(rounded, "second")} …`, { action: ["Cancel", stopAsking] });
};

function stopAsking() {
  if (state.film) return stopFilm();
  asking.abort();
  busy(false);
  say("Stopped.");
}

function refused(error, again) {
  if (error.status === 401 || error.status === 403) return askToken(error, again);
  if (!(error.status >= 0)) console.error(error);
  const final = error.status >= 400 && error.status < 500 && error.status !== 408 && error.status !== 429;
  say(error.message, { bad: true, action: final ? null : ["Try again", again] });
}

function askToken(error, again) {
  const dialog = $("token");
  const tried = dialog.dataset.tried === "yes";
  $("token-title").textContent = tried ? "That is not this server's token" : "This server asks for a token";
  [dialog.again, dialog.returnValue] = [again, ""];
  $("secret").value = "";
  if (!dialog.open) dialog.showModal();
}

/** Learn what the server detects; false where it does not say, and `again` is what the user wanted. */
async function meet(again) {
  try {
    state.model = await askModel();
  } catch (error) {
    refused(error, again);
    return false;
  }
  introduce(state.model);
  $("threshold").min = lowest();
  setThreshold(state.threshold);
  $("token").dataset.tried = "";
  hush();
  return true;
}

// Wires.

const press = (id, action) => $(id).addEventListener("click", action);
press("open", () => $("file").click());
press("choose", () => $("file").click());
press("camera", film);
press("film", film);
press("help", () => tellMore(state.model ?? {}));
press("close", () => $("more").close());
press("copy", copy);
press("download", () => keep(new Blob([asJson()], { type: "application/json" }), ".json"));
press("save", savePicture);
press("by-class", () => colourBy("name"));
press("by-level", () => colourBy("level"));
press("later", () => $("token").close());
$("filtered").lastElementChild.addEventListener("click", () => {
  state.off = { name: new Set(), level: new Set() };
  draw();
});
for (const button of document.querySelectorAll("[data-zoom]"))
  button.addEventListener("click", () => stage.zoom(Number(button.dataset.zoom)));
$("threshold").addEventListener("input", () => setThreshold($("threshold").valueAsNumber));
$("file").addEventListener("change", () => {
  if ($("file").files.length) take($("file").files);
  $("file").value = ""; // the same file may be chosen again
});
$("token").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken($("secret").value);
  $("token").dataset.tried = "yes";
  $("token").close("given");
  $("token").again?.();
});
$("token").addEventListener("close", () => {
  if ($("token").returnValue === "given" || (state.model && !$("panel").hidden)) return;
  say("This server asks for a token.", { action: ["Enter it", () => askToken(null, $("token").again)] });
});
document.querySelector(".tabs").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  colourBy(state.by === "level" ? "name" : "level");
  document.querySelector("[aria-selected=true]").focus();
});

let depth = 0; // dragenter and dragleave come for every element on the way
const dragging = (event) => event.dataTransfer?.types.length > 0;
addEventListener("dragenter", (event) => dragging(event) && (event.preventDefault(), depth++, ($("drop").hidden = false)));
addEventListener("dragleave", () => (depth = Math.max(0, depth - 1)) || ($("drop").hidden = true));
addEventListener("dragover", (event) => dragging(event) && event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  [depth, $("drop").hidden] = [0, true];
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const files = [...event.clipboardData.files].filter(({ type }) => type.startsWith("image/"));
  if (files.length) open(files[0]);
  else say("The clipboard holds no image.", { bad: true });
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const own = event.target.matches?.("input, [role=tab]") && event.key.startsWith("Arrow"); // the slider's own keys
  if (!act || own) return;
  event.preventDefault();
  act();
});
const KEYS = {
  o: () => $("file").click(),
  c: film,
  l: () => colourBy(state.by === "level" ? "name" : "level"),
  "[": () => setThreshold(state.threshold - 0.05),
  "]": () => setThreshold(state.threshold + 0.05),
  "+": () => stage.zoom(1.5),
  "=": () => stage.zoom(1.5),
  "-": () => stage.zoom(1 / 1.5),
  0: () => stage.zoom(0),
  "?": () => tellMore(state.model ?? {}),
  ArrowDown: () => step(1),
  ArrowUp: () => step(-1),
  Escape: () => pick(null),
};
addEventListener("pagehide", () => state.film?.stop());

const hello = () => meet(hello);
hello();
