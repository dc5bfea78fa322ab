// Draws arrays into canvases, one canvas pixel for each number; the style sheet makes them larger.

/** A heat map: rows × columns numbers from `offset` on. */
export function paint(canvas, data, offset, rows, columns, scale) {
  if (canvas.width !== columns || canvas.height !== rows) {
    canvas.width = columns;
    canvas.height = rows;
  }
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = scale.pixel(data[offset + i]);
  context.putImageData(image, 0, 0);
}

export function setSize(canvas, width, height) {
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
}

/**
 * A lane of the time line: a column for each step, or for several where there are more steps than pixels, shown by the number in
 * them that is farthest from 0. `cells(step, row)` gives a number, NaN for none.
 */
export function paintLane(canvas, numSteps, rows, stepsPerColumn, rowsPerLine, cells, scale, decorate) {
  const width = Math.max(1, Math.ceil(numSteps / stepsPerColumn));
  const height = Math.ceil(rows / rowsPerLine);
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let column = 0; column < width; column++) {
    for (let line = 0; line < height; line++) {
      let farthest = NaN;
      let at = 0;
      const lastStep = Math.min(numSteps, (column + 1) * stepsPerColumn);
      const lastRow = Math.min(rows, (line + 1) * rowsPerLine);
      for (let step = column * stepsPerColumn; step < lastStep; step++) {
        for (let row = line * rowsPerLine; row < lastRow; row++) {
          const value = cells(step, row);
          if (!(Math.abs(value) <= Math.abs(farthest))) [farthest, at] = Number.isNaN(value) ? [farthest, at] : [value, step];
        }
      }
      if (Number.isNaN(farthest)) continue;
      const pixel = scale.pixel(farthest);
      pixels[line * width + column] = decorate ? decorate(pixel, at, line) : pixel;
    }
  }
  context.putImageData(image, 0, 0);
}

/** Curves, for signals of one to three numbers: a line for each, and faint dots for targets. */
export function paintCurves(canvas, width, height, numSteps, rows, cells, low, high, colours) {
  const density = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * density));
  canvas.height = Math.round(height * density);
  setSize(canvas, width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.scale(density, density);
  context.clearRect(0, 0, width, height);
  const span = high - low || 1;
  const y = (value) => height - 4 - ((value - low) / span) * (height - 8);
  context.strokeStyle = colours.axis;
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(0, y(Math.min(high, Math.max(low, 0))) + 0.5);
  context.lineTo(width, y(Math.min(high, Math.max(low, 0))) + 0.5);
  context.stroke();
  for (let row = 0; row < rows; row++) {
    context.strokeStyle = colours.lines[row % colours.lines.length];
    context.lineWidth = 1.5;
    context.beginPath();
    let isDown = false;
    for (let step = 0; step < numSteps; step++) {
      const value = cells(step, row);
      if (Number.isNaN(value)) {
        isDown = false;
        continue;
      }
      const x = ((step + 0.5) / numSteps) * width;
      if (isDown) context.lineTo(x, y(value));
      else context.moveTo(x, y(value));
      isDown = true;
    }
    context.stroke();
  }
}

/** A legend: the colours of a scale with its two ends. */
export function legend(text, scale) {
  const holder = document.createElement("div");
  holder.className = "legend";
  const canvas = document.createElement("canvas");
  canvas.setAttribute("aria-hidden", "true");
  const values = Float32Array.from({ length: 96 }, (_, i) => scale.low + (i / 95) * (scale.high - scale.low));
  paint(canvas, values, 0, 1, 96, scale);
  holder.append(`${text} ${number(scale.low)}`, canvas, number(scale.high));
  return holder;
}

/** A number for people: four significant digits. */
export function number(value) {
  if (!Number.isFinite(value)) return String(value);
  if (Number.isInteger(value)) return String(value).replace("-", "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}
