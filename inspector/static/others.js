// The states that are neither the memory nor attention, as heat maps of the moment; and the comparison of two sessions.

import { Scale, scaleFor } from "./colours.js";
import { legend, number, paint, setSize } from "./draw.js";
import { Frames } from "./recording.js";

function heatMap(title, about, frame, mostWidth, mostHeight) {
  const map = document.createElement("div");
  map.className = "map";
  const name = document.createElement("h3");
  name.textContent = title;
  const text = document.createElement("p");
  text.className = "faint small";
  text.textContent = about;
  const hold = document.createElement("div");
  hold.className = "hold";
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${title}: ${about}`);
  hold.append(canvas);
  map.append(name, text, hold);
  const across = Math.max(1, Math.min(14, Math.floor(mostWidth / frame.shown_columns)));
  const down = frame.shown_rows === 1 ? 18 : Math.max(1, Math.min(14, Math.floor(mostHeight / frame.shown_rows)));
  setSize(canvas, frame.shown_columns * across, frame.shown_rows * down);
  return { map, canvas, text };
}

function blocks(frame) {
  return frame.block_rows * frame.block_columns === 1 ? "" : `, ${frame.block_rows} × ${frame.block_columns} numbers in a cell`;
}

/** A vector is folded into lines that fit the panel. */
function folded(state) {
  const { shown_rows: rows, shown_columns: columns } = state.frame;
  if (rows > 1 || columns <= 64) return state.frame;
  const across = [64, 60, 50, 48, 40, 32].find((width) => columns % width === 0) ?? 50;
  return { ...state.frame, shown_rows: Math.ceil(columns / across), shown_columns: across };
}

export class OtherStates {
  constructor(panel, root) {
    this.panel = panel;
    this.root = root;
  }

  show(recording, memoryName, onArrival) {
    this.recording = recording;
    const states = recording.summary.states.filter((state) => state.name !== memoryName && !state.role.endsWith("weighting"));
    this.panel.hidden = states.length === 0;
    this.views = states.map((state) => {
      const frame = folded(state);
      const shape = state.shape.join(" × ") || "one number";
      const isFolded = frame !== state.frame ? `, in lines of ${frame.shown_columns}` : "";
      const about = `${state.role.replace("_", " ")}, ${shape}${isFolded}${blocks(state.frame)}`;
      const view = heatMap(state.name, about, frame, 256, 260);
      view.canvas.dataset.state = state.name;
      return { ...view, about, name: state.name, frame, frames: recording.lanes.has(state.name) ? null : new Frames(recording, state, onArrival) };
    });
    this.root.replaceChildren(...this.views.map((view) => view.map));
  }

  clear() {
    for (const { frames } of this.views ?? []) frames?.clear();
  }

  draw(moment) {
    let isWhole = true;
    for (const { canvas, name, frame, frames, text, about } of this.views ?? []) {
      const state = this.recording.state(name);
      const column = this.recording.lanes.get(name);
      const found = frames ? frames.at(moment) : { data: column.data, offset: moment * column.width };
      if (!found) {
        isWhole = false;
        continue;
      }
      const size = frame.shown_rows * frame.shown_columns;
      const count = Math.min(size, state.frame.shown_rows * state.frame.shown_columns);
      const values = new Float32Array(size).fill(NaN);
      values.set(found.data.subarray(found.offset, found.offset + count));
      paint(canvas, values, 0, frame.shown_rows, frame.shown_columns, scaleFor(state.least, state.most));
      text.textContent = count === 1 ? `${about}: ${number(values[0])}` : `${about}; ${number(state.least)} to ${number(state.most)}`;
    }
    return isWhole;
  }
}

/** Two sessions' states of the same name, and what the second differs by. */
export class Comparison {
  constructor(parts) {
    Object.assign(this, parts);
    this.other = null;
  }

  show(recording, other, stateName, onArrival) {
    this.recording = recording;
    this.other = other;
    this.maps.hidden = other === null;
    if (other === null) return;
    const [mine, theirs] = [recording.state(stateName), other.state(stateName)];
    this.name = stateName;
    this.frames = [new Frames(recording, mine, onArrival), new Frames(other, theirs, onArrival)];
    this.views = ["This session", "The other", "Other minus this"].map((title, i) => {
      const view = heatMap(title, "", mine.frame, 280, 420);
      view.canvas.dataset.compare = ["this", "other", "difference"][i];
      const key = document.createElement("div");
      view.map.append(key);
      return { ...view, key };
    });
    this.maps.replaceChildren(...this.views.map((view) => view.map));
  }

  clear() {
    if (this.other) for (const frames of this.frames) frames.clear();
  }

  draw(moment) {
    if (!this.other) return true;
    const steps = this.recording.summary.first_step + moment;
    const wanted = steps - this.other.summary.first_step;
    const isThere = wanted >= 0 && wanted <= this.other.numSteps;
    const theirMoment = isThere ? wanted : this.other.numSteps;
    const found = [this.frames[0].at(moment), this.frames[1].at(theirMoment)];
    if (!found[0] || !found[1]) return false;
    const [mine, theirs] = [this.recording.state(this.name), this.other.state(this.name)];
    const { shown_rows: rows, shown_columns: columns } = mine.frame;
    const difference = new Float32Array(rows * columns);
    let most = 0;
    let count = 0;
    for (let i = 0; i < difference.length; i++) {
      difference[i] = found[1].data[found[1].offset + i] - found[0].data[found[0].offset + i];
      if (Math.abs(difference[i]) > most) most = Math.abs(difference[i]);
      if (difference[i] !== 0) count++;
    }
    const scale = scaleFor(Math.min(mine.least, theirs.least), Math.max(mine.most, theirs.most));
    const apart = new Scale("difference", -most, most);
    const theirSteps = this.other.summary.first_step + theirMoment;
    const values = [[found[0].data, found[0].offset, scale], [found[1].data, found[1].offset, scale], [difference, 0, apart]];
    const texts = [`after ${steps} steps`, `after ${theirSteps} steps`, count === 0 ? "the same, every number" : `${count} of ${difference.length} numbers differ, by ${number(most)} at most`];
    this.views.forEach(({ canvas, text, key }, i) => {
      const [data, offset, shade] = values[i];
      paint(canvas, data, offset, rows, columns, shade);
      text.textContent = texts[i];
      key.replaceChildren(legend("", shade));
    });
    this.about.textContent = isThere
      ? `Both after ${steps} steps: ${texts[2]}.`
      : `The other session is not recorded after ${steps} steps: it is shown after ${theirSteps}.`;
    return true;
  }
}
