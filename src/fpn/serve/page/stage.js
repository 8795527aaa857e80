// The image with its boxes: two canvases, one over the other, that zoom and move together.
//
// An item is {box: [x1, y1, x2, y2] in pixels of the image, colour: [r, g, b], text, mask?}, highest score first.

import { css, ink } from "./colours.js";

const LARGEST = 16; // times: neither a small image nor the zoom is drawn larger than this
const REACH = 6; // CSS pixels around the pointer in which a box counts as pointed at
const MOVED = 5; // CSS pixels: a finger that moved less has tapped
const CROWD = 0.12; // of the canvas may lie under names; in a crowd the highest scores have theirs
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";

export class Stage {
  #lower; #upper; #image = null; #size = [1, 1]; #items = []; #focus = null; #cell = null;
  #zoom = 1; #centre = [0.5, 0.5]; // of the image that lies in the middle, as shares of its width and height
  #fingers = new Map(); #travelled = 0; #pinch = 0;

  /** onPoint: called with the index of the item under the pointer, or null; onPick: of the one that was tapped. */
  constructor(lower, upper, { onPoint, onPick }) {
    this.#lower = lower;
    this.#upper = upper;
    new ResizeObserver(() => this.#redraw()).observe(upper);
    upper.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    upper.addEventListener("pointerdown", (event) => this.#down(event));
    upper.addEventListener("pointermove", (event) => this.#move(event, onPoint));
    upper.addEventListener("pointerleave", () => onPoint(null));
    for (const kind of ["pointerup", "pointercancel"])
      upper.addEventListener(kind, (event) => this.#up(event, kind === "pointerup" ? onPick : null));
    upper.addEventListener("dblclick", (event) => this.zoom(this.#zoom > 1 ? 0 : 3, this.#place(event)));
  }

  /** Show an image, anything that a canvas can draw, or null for one that this browser cannot read. */
  show(image, width, height, { keep = false } = {}) {
    this.#image = image;
    this.#size = [width, height];
    this.#items = [];
    if (!keep) [this.#zoom, this.#centre] = [1, [0.5, 0.5]];
    this.#redraw();
  }

  /** Draw these items. focus: a set of indices, the others are pale. cell: the side of a grid's cells in pixels. */
  draw(items, focus = null, cell = null) {
    [this.#items, this.#focus, this.#cell] = [items, focus, cell];
    this.#drawBoxes();
  }

  /** Zoom by a factor, 0 to fit, around a place in CSS pixels of the canvas; around its middle where none is given. */
  zoom(factor, place = null) {
    const [x, y] = place ?? [this.#upper.clientWidth / 2, this.#upper.clientHeight / 2];
    const before = this.#view();
    const held = [(x - before.x) / before.scale, (y - before.y) / before.scale];
    const most = Math.max(1, Math.max(LARGEST, 4 * before.fit) / before.fit);
    this.#zoom = factor ? Math.min(most, Math.max(1, this.#zoom * factor)) : 1;
    const after = this.#view();
    this.#shift(held[0] * after.scale + after.x - x, held[1] * after.scale + after.y - y);
  }

  /** The image at its full size with its boxes, as a PNG file. */
  async picture() {
    const [width, height] = this.#size;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const pen = canvas.getContext("2d");
    if (!pen) throw new Error("This browser cannot make a picture of this size.");
    const unit = Math.max(1, Math.sqrt(width * height) / 900); // lines and letters grow with the picture
    pen.scale(unit, unit);
    const view = { scale: 1 / unit, x: 0, y: 0, width: width / unit, height: height / unit };
    if (this.#image) pen.drawImage(this.#image, 0, 0, view.width, view.height);
    drawItems(pen, view, this.#items, null);
    const file = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    if (!file) throw new Error("This browser cannot make a picture of this size.");
    return file;
  }

  /** How the image lies on the canvas, in CSS pixels: x, y of its corner and CSS pixels a pixel of the image. */
  #view() {
    const [width, height] = [this.#upper.clientWidth, this.#upper.clientHeight];
    const border = width < 600 ? 8 : 22; // room for boxes and names at the edge of the image
    const fit = Math.max(1e-6, Math.min((width - 2 * border) / this.#size[0], (height - 2 * border) / this.#size[1], LARGEST));
    const scale = fit * this.#zoom;
    const x = width / 2 - this.#centre[0] * this.#size[0] * scale;
    const y = height / 2 - this.#centre[1] * this.#size[1] * scale;
    return { scale, fit, x, y, width, height };
  }

  #shift(right, down) {
    const { scale, width, height } = this.#view();
    this.#centre = this.#centre.map((centre, axis) => {
      const long = this.#size[axis] * scale, room = [width, height][axis], edge = room / 2 / long;
      return long <= room ? 0.5 : Math.min(1 - edge, Math.max(edge, centre + [right, down][axis] / long));
    });
    this.#redraw();
  }

  #redraw() {
    const [width, height] = [this.#upper.clientWidth, this.#upper.clientHeight];
    const ratio = devicePixelRatio || 1;
    for (const canvas of [this.#lower, this.#upper]) {
      const [w, h] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
      if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
    }
    this.#upper.style.touchAction = this.#zoom > 1 ? "none" : "pan-y"; // an image that fits lets the page scroll
    const view = this.#view(), pen = cleared(this.#lower, ratio);
    const place = [view.x, view.y, this.#size[0] * view.scale, this.#size[1] * view.scale];
    if (!this.#image) {
      pen.fillStyle = "rgb(128 128 128 / .16)";
      pen.fillRect(...place);
    } else {
      pen.imageSmoothingQuality = "high";
      pen.imageSmoothingEnabled = view.scale * ratio < 4; // beyond that pixels are what one wants to see
      pen.drawImage(this.#image, ...place);
    }
    this.#drawBoxes();
  }

  #drawBoxes() {
    const view = this.#view(), pen = cleared(this.#upper, devicePixelRatio || 1);
    if (this.#cell) drawGrid(pen, view, this.#size, this.#cell);
    drawItems(pen, view, this.#items, this.#focus);
  }

  #place(event) {
    const frame = this.#upper.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  }

  #wheel(event) {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    this.zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0015)), this.#place(event));
  }

  #down(event) {
    this.#upper.setPointerCapture(event.pointerId);
    if (!this.#fingers.size) this.#travelled = 0;
    this.#fingers.set(event.pointerId, this.#place(event));
    this.#pinch = this.#spread();
  }

  #move(event, onPoint) {
    const now = this.#place(event), before = this.#fingers.get(event.pointerId);
    if (!before) return onPoint(this.#under(now));
    this.#fingers.set(event.pointerId, now);
    this.#travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (this.#fingers.size === 2) {
      const [a, b] = [...this.#fingers.values()], spread = this.#spread();
      if (this.#pinch > 0) this.zoom(spread / this.#pinch, [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2]);
      this.#pinch = spread;
    } else if (this.#zoom > 1) {
      this.#shift(before[0] - now[0], before[1] - now[1]);
    }
  }

  #up(event, onPick) {
    const known = this.#fingers.delete(event.pointerId);
    this.#pinch = this.#spread();
    if (onPick && known && !this.#fingers.size && this.#travelled < MOVED) onPick(this.#under(this.#place(event)));
  }

  #spread() {
    if (this.#fingers.size !== 2) return 0;
    const [a, b] = [...this.#fingers.values()];
    return Math.hypot(a[0] - b[0], a[1] - b[1]);
  }

  /** The smallest item around a place: of a box within another the inner one is meant. */
  #under([x, y]) {
    const view = this.#view();
    let best = null, smallest = Infinity;
    this.#items.forEach(({ box }, index) => {
      const [x1, y1, x2, y2] = placed(box, view);
      const area = (x2 - x1) * (y2 - y1);
      const inside = x >= x1 - REACH && x <= x2 + REACH && y >= y1 - REACH && y <= y2 + REACH;
      if (inside && area < smallest) [best, smallest] = [index, area];
    });
    return best;
  }
}

function cleared(canvas, ratio) {
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  return pen;
}

const placed = ([x1, y1, x2, y2], { scale, x, y }) => [x1 * scale + x, y1 * scale + y, x2 * scale + x, y2 * scale + y];

/** Where the cells of a level lie. Cells too small to tell apart are left out. */
function drawGrid(pen, view, [width, height], cell) {
  const side = cell * view.scale;
  if (side < 4) return;
  const [right, bottom] = [view.x + width * view.scale, view.y + height * view.scale];
  pen.beginPath();
  for (let x = view.x; x <= right; x += side) pen.moveTo(x, view.y), pen.lineTo(x, bottom);
  for (let y = view.y; y <= bottom; y += side) pen.moveTo(view.x, y), pen.lineTo(right, y);
  for (const [colour, wide] of [["rgb(0 0 0 / .22)", 1.5], ["rgb(255 255 255 / .38)", 0.75]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = wide;
    pen.stroke();
  }
}

/** The items, the highest score on top; those not in the focus are pale. */
function drawItems(pen, view, items, focus) {
  const line = items.length > 150 ? 1.5 : 2;
  const isPale = (index) => focus !== null && !focus.has(index);
  const order = items.map((_, index) => index).reverse().sort((a, b) => isPale(b) - isPale(a));
  for (const index of order) {
    const { box, colour, mask } = items[index], [x1, y1, x2, y2] = placed(box, view);
    const alpha = isPale(index) ? 0.28 : 1;
    if (mask) {
      pen.globalAlpha = 0.45 * alpha;
      const [left, top] = placed([mask.x, mask.y, 0, 0], view);
      pen.drawImage(mask.canvas, left, top, mask.width * view.scale, mask.height * view.scale);
      pen.globalAlpha = 1;
    }
    pen.lineJoin = "round";
    for (const [stroke, wide] of [[`rgb(0 0 0 / ${0.4 * alpha})`, line + 2], [css(colour, alpha), line]]) {
      pen.strokeStyle = stroke;
      pen.lineWidth = wide;
      pen.strokeRect(x1, y1, Math.max(1, x2 - x1), Math.max(1, y2 - y1));
    }
  }
  drawLabels(pen, view, items, focus);
}

/** Names where they hide no other name. Where few items are in the focus they have theirs in any case. */
function drawLabels(pen, view, items, focus) {
  const high = 18, taken = [];
  pen.font = `600 12px ${FONT}`;
  pen.textBaseline = "middle";
  const few = focus !== null && focus.size <= 3;
  let room = CROWD * view.width * view.height;
  const order = focus === null ? items.keys() : [...focus].filter((index) => items[index]);
  for (const index of order) {
    const { box, colour, text } = items[index], [x1, y1, x2, y2] = placed(box, view);
    if (room < 0 && !few) break;
    if (x2 < 0 || y2 < 0 || x1 > view.width || y1 > view.height) continue;
    const wide = pen.measureText(text).width + 10;
    const x = Math.min(Math.max(0, x1 - 1), Math.max(0, view.width - wide));
    const free = [y1 - high - 1, y2 + 1, y1 + 1]
      .map((y) => [x, Math.min(Math.max(0, y), Math.max(0, view.height - high)), wide, high])
      .find((plate) => !taken.some((other) => overlap(plate, other)));
    const plate = free ?? (few ? [x, Math.max(0, y1 - high - 1), wide, high] : null);
    if (!plate) continue;
    taken.push(plate);
    room -= wide * high;
    pen.fillStyle = css(colour);
    pen.beginPath();
    pen.roundRect(...plate, 4);
    pen.fill();
    pen.fillStyle = ink(colour);
    pen.fillText(text, plate[0] + 5, plate[1] + high / 2 + 0.5);
  }
}

const overlap = (a, b) => a[0] < b[0] + b[2] && b[0] < a[0] + a[2] && a[1] < b[1] + b[3] && b[1] < a[1] + a[3];
