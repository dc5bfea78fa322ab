// The time line: attention, inputs, outputs and other state, a column for each step, with the moment marked. It is a slider: by
// mouse, by touch and by keys.

import { Scale, colour, scaleFor } from "./colours.js";
import { number, paintCurves, paintLane, setSize } from "./draw.js";

const ATTENTION_HEIGHT = 400;
const MOST_LINES = 128;
// Attention of less than this at every step leaves a row out, where only rows in use are shown.
const IN_USE = 0.1;
const MOST_STEP_WIDTH = 18;

export class TimeLine {
  constructor(root, onMove) {
    this.root = root;
    this.onMove = onMove;
    this.recording = null;
    this.moment = 0;
    this.shows = { attention: true, used: true, signals: true, other: false };
    this.layer = document.createElement("div");
    this.layer.className = "cursor-layer";
    this.layer.id = "scrub";
    this.layer.tabIndex = 0;
    this.layer.setAttribute("role", "slider");
    this.layer.setAttribute("aria-label", "Moment");
    this.cursor = document.createElement("div");
    this.cursor.className = "cursor";
    this.layer.append(this.cursor);
    this.layer.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.layer.setPointerCapture(event.pointerId);
      this.layer.focus({ preventScroll: true });
      this.scrub(event);
    });
    this.layer.addEventListener("pointermove", (event) => {
      if (this.layer.hasPointerCapture(event.pointerId)) this.scrub(event);
    });
    new ResizeObserver(() => this.layout()).observe(root);
  }

  show(recording) {
    this.recording = recording;
    this.layout();
  }

  scrub(event) {
    if (!this.recording) return;
    const x = event.clientX - this.layer.getBoundingClientRect().left;
    const last = this.recording.numSteps;
    this.onMove(Math.max(0, Math.min(last, Math.floor(x / this.stepWidth) + 1)));
  }

  /** Lays the lanes out for the width there is, and draws them. */
  layout() {
    if (!this.recording) return;
    const { recording } = this;
    const isNarrow = window.matchMedia("(max-width: 760px)").matches;
    const available = Math.max(40, this.root.clientWidth - (isNarrow ? 0 : 92));
    this.total = Math.max(1, recording.numSteps + recording.numPending);
    this.stepsPerColumn = Math.ceil(this.total / available);
    const columns = Math.ceil(this.total / this.stepsPerColumn);
    const columnWidth = Math.min(MOST_STEP_WIDTH, Math.floor(available / columns)) || 1;
    this.stepWidth = columnWidth / this.stepsPerColumn;
    this.width = columns * columnWidth;

    const items = [];
    const lanes = this.lanes();
    const numAttention = lanes.filter((lane) => lane.kind === "attention").length;
    for (const lane of lanes) {
      const name = document.createElement("div");
      name.className = `lane-name ${lane.tone ?? ""}`;
      const strong = document.createElement("b");
      strong.textContent = lane.name;
      const about = document.createElement("span");
      about.textContent = ` ${lane.about}`;
      if (lane.order) name.title = `rows ${lane.order.join(", ")}`;
      name.append(strong, about);
      const hold = document.createElement("div");
      hold.className = "lane-hold";
      const canvas = document.createElement("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${lane.name} by steps: ${lane.about}`);
      canvas.dataset.lane = lane.id;
      if (lane.order) canvas.dataset.rows = lane.order.join(" ");
      this.paint(canvas, lane, numAttention);
      hold.append(canvas);
      items.push(name, hold);
    }
    const corner = document.createElement("div");
    corner.className = "lane-name";
    corner.textContent = "steps";
    items.push(corner, this.axis());
    this.root.replaceChildren(...items, this.layer);
    this.layer.style.width = `${this.width}px`;
    for (const old of this.layer.querySelectorAll(".reset-mark")) old.remove();
    for (const reset of recording.summary.resets) {
      const mark = document.createElement("div");
      mark.className = "reset-mark";
      mark.style.left = `${reset * this.stepWidth}px`;
      this.layer.append(mark);
    }
    this.layer.setAttribute("aria-valuemin", recording.summary.first_step);
    this.layer.setAttribute("aria-valuemax", recording.summary.first_step + recording.numSteps);
    this.place(this.moment);
  }

  /** Marks a moment; the lanes stay as they are. */
  place(moment, text) {
    this.moment = moment;
    if (!this.recording) return;
    const width = Math.max(3, this.stepWidth);
    const left = moment === 0 ? -1.5 : Math.min(this.width, moment * this.stepWidth) - width;
    this.cursor.style.left = `${left}px`;
    this.cursor.style.width = `${width}px`;
    this.layer.setAttribute("aria-valuenow", this.recording.summary.first_step + moment);
    if (text) this.layer.setAttribute("aria-valuetext", text);
  }

  lanes() {
    const { recording } = this;
    const { summary } = recording;
    const lanes = [];
    if (this.shows.attention) {
      for (const [role, tone] of [["write_weighting", "write"], ["read_weighting", "read"]]) {
        for (const state of recording.ofRole(role)) {
          for (let head = 0; head < state.lane.shown_rows; head++) {
            const rows = state.lane.shown_columns;
            const column = recording.lanes.get(state.name);
            const heads = state.lane.shown_rows > 1 ? ` ${head}` : "";
            const block = state.lane.block_columns;
            const order = this.shows.used ? this.inUse(column, head * rows, rows) : null;
            const taken = block > 1 ? `, ${block} taken together` : "";
            const top = order && state.lane.shown_rows <= 2 ? `, ${order[0] * block} on top` : "";
            const span = order ? `${order.length * block} of ${state.lane.columns}${top}` : `${state.lane.columns} rows`;
            lanes.push({
              id: `${state.name}.${head}`, kind: "attention", name: `${tone}${heads}`, tone, rows: order?.length ?? rows, order,
              about: `${span}${taken}`, scale: new Scale(tone, 0, 1),
              cells: (step, row) => (step < recording.numSteps ? column.at(step + 1, head * rows + (order ? order[row] : row)) : NaN),
            });
          }
        }
      }
    }
    if (this.shows.signals) {
      lanes.push(this.signal("inputs", recording.inputs, summary.input, recording.pending));
      lanes.push(this.signal("outputs", recording.outputs, summary.output));
      if (recording.targets.data.some((value) => !Number.isNaN(value) && value !== undefined) && recording.wrongBits()[1] > 0) {
        lanes.push(this.signal("targets", recording.targets, summary.output));
      }
    }
    if (this.shows.other) {
      for (const state of summary.states) {
        const column = recording.lanes.get(state.name);
        if (!column || state.role.endsWith("weighting")) continue;
        lanes.push({
          id: state.name, kind: "other", name: state.name.replaceAll("_", " "), rows: column.width, about: state.shape.join(" × ") || "1",
          scale: scaleFor(state.least, state.most), low: state.least, high: state.most,
          cells: (step, row) => (step < recording.numSteps ? column.at(step + 1, row) : NaN),
        });
      }
    }
    return lanes;
  }

  /**
   * The rows that a head has attended to, in their order around the circle that shifts move on, beginning after the widest gap; null
   * when that would leave none out.
   */
  inUse(column, offset, rows) {
    const used = [];
    for (let row = 0; row < rows; row++) {
      for (let moment = 1; moment < column.count; moment++) {
        if (column.at(moment, offset + row) >= IN_USE) {
          used.push(row);
          break;
        }
      }
    }
    if (used.length === 0 || used.length > rows / 2) return null;
    let start = 0;
    let widest = 0;
    used.forEach((row, i) => {
      const gap = (row - used[(i + used.length - 1) % used.length] + rows) % rows;
      if (gap > widest) [widest, start] = [gap, i];
    });
    return [...used.slice(start), ...used.slice(0, start)];
  }

  signal(name, column, tensor, pending = null) {
    const { recording } = this;
    let least = 0;
    let most = 0;
    for (const part of [column, pending]) {
      for (let i = 0; part && i < part.count * part.width; i++) {
        const value = part.data[i];
        if (value < least) least = value;
        if (value > most) most = value;
      }
    }
    const areBits = recording.summary.sequence?.are_bits;
    return {
      id: name, kind: "signal", name, rows: column.width, about: tensor.shape.join(" × ") || "1", low: least, high: Math.max(most, least + 1e-9),
      scale: scaleFor(least, areBits && least >= 0 ? Math.max(1, most) : most),
      cells: (step, row) => {
        if (step < recording.numSteps) return column.at(step, row);
        return pending && step - recording.numSteps < pending.count ? pending.at(step - recording.numSteps, row) : NaN;
      },
      decorate: (pixel, step, row) => {
        if (step >= recording.numSteps) return ((pixel & 0x00ffffff) | 0x59000000) >>> 0;
        if (name !== "outputs" || !areBits) return pixel;
        const target = recording.targets.at(step, row);
        if (Number.isNaN(target) || target > 0.5 === column.at(step, row) > 0.5) return pixel;
        return 0xff2626dc;
      },
    };
  }

  paint(canvas, lane, numAttention) {
    if (lane.kind !== "attention" && lane.rows <= 3) {
      const colours = { axis: colour("value")[1], lines: [colour("ink"), colour("read")[2], colour("write")[2]] };
      const height = 56;
      paintCurves(canvas, this.width, height, this.total, lane.rows, lane.cells, lane.low, lane.high, colours);
      return;
    }
    const isAttention = lane.kind === "attention";
    const mostLines = isAttention ? Math.max(56, Math.floor(ATTENTION_HEIGHT / numAttention)) : MOST_LINES;
    const rowsPerLine = Math.ceil(lane.rows / mostLines);
    const lines = Math.ceil(lane.rows / rowsPerLine);
    const lineHeight = Math.max(1, Math.min(isAttention ? 14 : 8, Math.round(mostLines / lines)));
    const isSingle = rowsPerLine === 1 && this.stepsPerColumn === 1;
    paintLane(canvas, this.total, lane.rows, this.stepsPerColumn, rowsPerLine, lane.cells, lane.scale, isSingle ? lane.decorate : undefined);
    setSize(canvas, this.width, lines * lineHeight);
  }

  axis() {
    const axis = document.createElement("div");
    axis.className = "axis";
    const first = this.recording.summary.first_step;
    const spacing = 44 / this.stepWidth;
    const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].find((step) => step >= spacing) ?? 20000;
    for (let step = Math.ceil((first + 1) / every) * every; step <= first + this.total; step += every) {
      const tick = document.createElement("span");
      tick.textContent = number(step);
      tick.style.left = `${(step - first - 0.5) * this.stepWidth}px`;
      axis.append(tick);
    }
    return axis;
  }
}
