// Colours of classes and levels, as in the pictures and reports that fpn writes.

const CLASSES = [
  [30, 136, 229], [255, 112, 0], [0, 190, 90], [224, 38, 190], [255, 208, 0], [0, 205, 225],
  [240, 50, 60], [124, 77, 255], [150, 220, 30], [255, 130, 170], [0, 150, 136], [170, 120, 90],
];

const LEVELS = {
  2: [255, 208, 0], 3: [0, 200, 120], 4: [40, 140, 255], 5: [235, 60, 170], 6: [255, 120, 40], 7: [150, 100, 255],
};

export const ofClass = (index) => CLASSES[index % CLASSES.length];
export const ofLevel = (level) => LEVELS[level] ?? [160, 160, 160];
export const css = ([r, g, b], alpha = 1) => `rgb(${r} ${g} ${b} / ${alpha})`;

/** Black or white, whichever is easier to read on a colour: at a luminance of 0.2 they stand out about equally. */
export function ink([r, g, b]) {
  const light = (share) => (share / 255) ** 2.2;
  return 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b) > 0.2 ? "#000" : "#fff";
}
