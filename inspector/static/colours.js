// From numbers to colours. The colours themselves stand in colours.json, which the animation takes them from too.

import COLOURS from "./colours.json" with { type: "json" };

let theme = "light";
const made = new Map();

export function setTheme(name) {
  theme = name;
}

export const colour = (name) => COLOURS[theme][name];

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** As many colours between the stops, evenly, as canvas pixels (ABGR). */
export function ramp(stops, count) {
  const points = stops.map(channels);
  return Uint32Array.from({ length: count }, (_, number) => {
    const place = (number / (count - 1)) * (points.length - 1);
    const before = Math.min(points.length - 2, Math.floor(place));
    const part = place - before;
    const [red, green, blue] = points[before].map((value, i) => Math.round(value + part * (points[before + 1][i] - value)));
    return (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0;
  });
}

const SIGNED = new Set(["signed", "difference"]);

/** A colour map with its range: `pixel(value)` is the colour of a number. A signed one has 0 in its middle. */
export class Scale {
  constructor(name, low, high) {
    this.name = name;
    this.isSigned = SIGNED.has(name);
    const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
    this.low = this.isSigned ? -most : low;
    this.high = this.isSigned ? most : high > low ? high : low + 1;
    // An odd number of colours gives 0 one of its own.
    const key = `${theme} ${name}`;
    if (!made.has(key)) made.set(key, ramp(COLOURS[theme][name], this.isSigned ? 255 : 256));
    this.pixels = made.get(key);
    this.factor = (this.pixels.length - 1) / (this.high - this.low);
  }

  pixel(value) {
    const last = this.pixels.length - 1;
    const index = Math.round((value - this.low) * this.factor);
    return this.pixels[index < 0 ? 0 : index > last ? last : index];
  }

  css(value) {
    const pixel = this.pixel(value);
    return `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;
  }
}

/** The scale for numbers of any kind: grey from 0 up, or two colours around 0. */
export const scaleFor = (least, most) => (least < 0 ? new Scale("signed", least, most) : new Scale("value", 0, most || 1));
