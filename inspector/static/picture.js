// The picture: memory, attention and the time line of a moment as one PNG.

import { colour } from "./colours.js";

const GAP = 16;

/** Draws canvases of the page, as large as they stand there, into one. */
export async function picture(title, memoryMaps, lanes, cursor) {
  const sizeOf = (canvas) => ({ width: parseFloat(canvas.style.width), height: parseFloat(canvas.style.height) });
  const left = memoryMaps.reduce((sum, { canvas }) => sum + sizeOf(canvas).width + GAP / 2, 0);
  const laneWidth = Math.max(0, ...lanes.map(({ canvas }) => sizeOf(canvas).width));
  const nameWidth = lanes.length > 0 ? 92 : 0;
  const memoryHeight = Math.max(0, ...memoryMaps.map(({ canvas }) => sizeOf(canvas).height + 16));
  const laneHeight = lanes.reduce((sum, { canvas }) => sum + sizeOf(canvas).height + 8, 0);
  const density = 2;
  const made = document.createElement("canvas");
  const width = Math.max(360, GAP * 2 + left + nameWidth + laneWidth);
  const height = GAP * 2 + 28 + Math.max(memoryHeight, laneHeight);
  made.width = width * density;
  made.height = height * density;
  const context = made.getContext("2d");
  context.scale(density, density);
  context.imageSmoothingEnabled = false;
  context.fillStyle = colour("ground");
  context.fillRect(0, 0, width, height);
  context.fillStyle = colour("ink");
  context.font = "600 14px system-ui, sans-serif";
  context.fillText(title, GAP, GAP + 12);
  context.font = "11px system-ui, sans-serif";
  let x = GAP;
  for (const { canvas, name } of memoryMaps) {
    const { width: across, height: down } = sizeOf(canvas);
    context.fillStyle = colour("faint");
    context.fillText(name, x, GAP + 38, Math.max(across, 40));
    context.drawImage(canvas, x, GAP + 44, across, down);
    x += across + GAP / 2;
  }
  let y = GAP + 44;
  x += nameWidth;
  for (const { canvas, name } of lanes) {
    const { width: across, height: down } = sizeOf(canvas);
    context.fillStyle = colour("faint");
    context.textAlign = "right";
    context.fillText(name, x - 8, y + 11, nameWidth - 10);
    context.textAlign = "left";
    context.drawImage(canvas, x, y, across, down);
    y += down + 8;
  }
  if (lanes.length > 0) {
    context.strokeStyle = colour("ink");
    context.lineWidth = 1.5;
    context.strokeRect(x + cursor.left, GAP + 42, cursor.width, y - GAP - 46);
  }
  return new Promise((resolve) => made.toBlob(resolve, "image/png"));
}
