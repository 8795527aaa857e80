// What the page tells of the detector, from GET /model.

import { $, counted, levelName, made } from "./panel.js";
import { hasToken } from "./server.js";

const NAMES = {
  faster_rcnn: "Faster R-CNN", mask_rcnn: "Mask R-CNN", cascade_rcnn: "Cascade R-CNN",
  cascade_mask_rcnn: "Cascade Mask R-CNN", fast_rcnn: "Fast R-CNN", retinanet: "RetinaNet", fcos: "FCOS", atss: "ATSS",
  rpn: "RPN", mask_proposals: "Mask proposals",
};
const MOST_CLASSES = 24; // named on the first view

export const megabytes = (bytes) =>
  bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

/** In a line at the top, and the classes on the first view. */
export function introduce({ model, backbone, classes = [], file }) {
  const kinds = classes.length > 1 ? counted(classes.length, "class", "classes") : classes[0];
  $("facts").textContent = [NAMES[model] ?? model, backbone, kinds].filter(Boolean).join(" · ");
  $("facts").title = file ?? "";
  $("finds").hidden = !classes.length;
  const named = classes.slice(0, MOST_CLASSES).map((name) => made("li", { textContent: name }));
  if (classes.length > MOST_CLASSES) named.push(made("li", { textContent: `and ${classes.length - MOST_CLASSES} more` }));
  $("finds").lastElementChild.replaceChildren(...named);
}

/** All of it, in a dialog. */
export function tellMore({ model, backbone, classes, levels = [], score, short, long, file, kind, version, limits = {} }) {
  const facts = {
    File: file, Kind: kind, Model: [NAMES[model] ?? model, backbone].filter(Boolean).join(", "),
    Classes: classes?.join(", "),
    Levels: levels.length ? levels.map(levelName).join(" ") : null,
    Input: short && `shorter side ${short} px, longer at most ${long} px`,
    Scores: score === undefined ? null : `from ${score}`,
    Limits: [limits.bytes && megabytes(limits.bytes), limits.pixels && `${Math.round(limits.pixels / 1e6)} megapixels`].filter(Boolean).join(", "),
    fpn: version,
  };
  const rows = Object.entries(facts).filter(([, fact]) => fact);
  $("details").replaceChildren(...rows.map(([name, fact]) =>
    made("div", {}, made("dt", { textContent: name }), made("dd", { textContent: fact }))));
  const address = new URL("detect?threshold=0.5", location.href);
  const token = hasToken() ? " -H 'Authorization: Bearer TOKEN'" : "";
  $("curl").textContent = `curl --data-binary @image.jpg${token} '${address}'`;
  $("more").showModal();
}
