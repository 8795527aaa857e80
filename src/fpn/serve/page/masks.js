// Masks in COCO's compressed run lengths -> small pictures to lay over the image.

const SIDE = 512; // pixels: a mask is drawn no finer, so that a hundred of large objects fit the memory

/** The lengths of the runs of 0, of 1, of 0 .., column by column; see src/fpn/rle.py. */
export function runs(text) {
  const found = [];
  for (let at = 0; at < text.length; ) {
    let value = 0, groups = 0, code;
    do {
      code = text.charCodeAt(at++) - 48;
      value += (code & 31) * 32 ** groups++;
    } while (code & 32);
    if (code & 16) value -= 32 ** groups;
    if (found.length > 2) value += found[found.length - 2];
    found.push(value);
  }
  return found;
}

/** The mask in its box, as a canvas of one colour with {x, y, width, height} in pixels of the image; null if empty. */
export function tinted({ size: [height], counts }, [x1, y1, x2, y2], [red, green, blue]) {
  const left = Math.max(0, Math.floor(x1)), top = Math.max(0, Math.floor(y1));
  const width = Math.ceil(x2) - left, tall = Math.min(height, Math.ceil(y2)) - top;
  if (width < 1 || tall < 1) return null;
  const step = Math.max(1, Math.ceil(Math.max(width, tall) / SIDE));
  const canvas = new OffscreenCanvas(Math.ceil(width / step), Math.ceil(tall / step));
  const pen = canvas.getContext("2d");
  const pixels = pen.createImageData(canvas.width, canvas.height);
  let start = 0;
  runs(counts).forEach((length, index) => {
    const end = start + length;
    if (index % 2) {
      for (let column = Math.floor(start / height); column * height < end; column++) {
        const x = column - left;
        if (x < 0 || x >= width || x % step) continue;
        const from = Math.max(start - column * height, top), to = Math.min(end - column * height, top + tall);
        for (let y = Math.ceil((from - top) / step); y * step < to - top; y++)
          pixels.data.set([red, green, blue, 255], 4 * (y * canvas.width + x / step));
      }
    }
    start = end;
  });
  pen.putImageData(pixels, 0, 0);
  return { canvas, x: left, y: top, width: canvas.width * step, height: canvas.height * step };
}
