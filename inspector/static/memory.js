// The memory of a moment as a heat map, with the attention of every head beside it, row by row.

import { Scale } from "./colours.js";
import { legend, number, paint, setSize } from "./draw.js";

const HEIGHT = 520;
const WIDTH = 300;

export class MemoryView {
  constructor(parts) {
    Object.assign(this, parts);
    this.cell = { row: 0, column: 0 };
    this.frames = null;
    this.recording = null;
  }

  /** Shows a recording from now on; `frames` are those of its memory, null where the model has none. */
  show(recording, frames) {
    this.recording = recording;
    this.frames = frames;
    this.panel.hidden = frames === null;
    this.panel.parentElement.classList.toggle("no-memory", frames === null);
    if (frames !== null) this.build();
  }

  get state() {
    return this.recording.state(this.frames.state.name);
  }

  build() {
    const { frame } = this.state;
    this.rowHeight = Math.max(1, Math.min(14, Math.floor(HEIGHT / frame.shown_rows)));
    this.columnWidth = Math.max(1, Math.min(14, Math.floor(WIDTH / frame.shown_columns)));
    if (frame.shown_rows * frame.shown_columns > 4096) this.columnWidth = Math.min(this.columnWidth, Math.max(1, this.rowHeight));
    this.canvas = document.createElement("canvas");
    this.canvas.id = "memory";
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "heat map");
    this.canvas.setAttribute("aria-label", `Memory, ${frame.rows} rows by ${frame.columns} columns; arrow keys choose a cell`);
    this.canvas.setAttribute("aria-describedby", "memory-readout");
    this.canvas.addEventListener("pointermove", (event) => this.point(event, false));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event, true));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.mark = document.createElement("div");
    this.mark.className = "cell";
    this.mark.hidden = true;
    const maps = [this.map(`${frame.rows} × ${frame.columns}`, "", this.canvas, this.mark)];
    setSize(this.canvas, frame.shown_columns * this.columnWidth, frame.shown_rows * this.rowHeight);

    this.heads = [];
    for (const [role, tone] of [["write_weighting", "write"], ["read_weighting", "read"]]) {
      for (const state of this.recording.ofRole(role)) {
        // Attention goes over the rows of the memory; other models may mean something else by it.
        if (state.lane.columns !== frame.rows) continue;
        for (let head = 0; head < state.lane.shown_rows; head++) {
          const canvas = document.createElement("canvas");
          canvas.setAttribute("role", "img");
          canvas.dataset.head = `${state.name}.${head}`;
          const title = state.lane.shown_rows > 1 ? `${tone[0]}${head}` : tone;
          canvas.setAttribute("aria-label", `Attention of ${tone} head ${head} over the rows`);
          setSize(canvas, state.lane.shown_rows > 2 ? 12 : 20, frame.shown_rows * this.rowHeight);
          maps.push(this.map(title, tone, canvas));
          this.heads.push({ canvas, state, head, scale: () => new Scale(tone, 0, 1), tone });
        }
      }
    }
    this.matrix.replaceChildren(...maps);
    this.panel.style.setProperty("--matrix-width", `${Math.min(520, Math.max(320, this.matrix.scrollWidth))}px`);
    const whole = frame.block_rows * frame.block_columns === 1;
    this.about.textContent = whole ? "" : `one cell shows ${frame.block_rows} × ${frame.block_columns} numbers, by the one farthest from 0`;
    this.editForm.hidden = false;
    this.choose(Math.min(this.cell.row, frame.rows - 1), Math.min(this.cell.column, frame.columns - 1), false);
    this.drawLegends();
  }

  drawLegends() {
    this.scale = new Scale("signed", this.state.least, this.state.most);
    const legends = [legend("memory", this.scale)];
    for (const tone of new Set(this.heads.map((head) => head.tone))) legends.push(legend(tone, new Scale(tone, 0, 1)));
    this.legends.replaceChildren(...legends);
  }

  map(title, tone, canvas, mark) {
    const map = document.createElement("div");
    map.className = "map";
    const name = document.createElement("div");
    name.className = `name ${tone}`;
    name.textContent = title;
    const hold = document.createElement("div");
    hold.className = "hold";
    hold.append(canvas);
    if (mark) hold.append(mark);
    map.append(name, hold);
    return map;
  }

  /** Draws a moment; false while its memory is on its way. */
  draw(moment) {
    if (!this.frames) return true;
    const found = this.frames.at(moment);
    for (const { canvas, state, head, scale } of this.heads) {
      const rows = state.lane.shown_columns;
      const column = this.recording.lanes.get(state.name);
      paint(canvas, column.data, moment * column.width + head * rows, rows, 1, scale());
    }
    if (!found) return false;
    const { least, most } = this.state;
    if (Math.max(Math.abs(least), Math.abs(most)) !== this.scale.high) this.drawLegends();
    const { frame } = this.state;
    paint(this.canvas, found.data, found.offset, frame.shown_rows, frame.shown_columns, this.scale);
    this.canvas.dataset.moment = moment;
    this.shown = { ...found, moment };
    this.read();
    return true;
  }

  /** The number that a cell of the tensor is shown by. */
  value(row, column) {
    const { frame } = this.state;
    const at = Math.floor(row / frame.block_rows) * frame.shown_columns + Math.floor(column / frame.block_columns);
    return this.shown ? this.shown.data[this.shown.offset + at] : NaN;
  }

  point(event, isChoice) {
    const { frame } = this.state;
    const row = Math.min(frame.rows - 1, Math.max(0, Math.floor(event.offsetY / this.rowHeight) * frame.block_rows));
    const column = Math.min(frame.columns - 1, Math.max(0, Math.floor(event.offsetX / this.columnWidth) * frame.block_columns));
    if (isChoice) this.choose(row, column, true);
    else this.read(row, column);
  }

  key(event) {
    const { frame } = this.state;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -frame.columns], End: [0, frame.columns] };
    const move = moves[event.key];
    if (event.key === "Enter") {
      this.editValue.focus();
      this.editValue.select();
      event.preventDefault();
    }
    if (!move) return;
    event.preventDefault();
    const clamp = (value, most) => Math.min(most - 1, Math.max(0, value));
    const row = clamp(this.cell.row + move[0] * frame.block_rows, frame.rows);
    this.choose(row, clamp(this.cell.column + move[1] * frame.block_columns, frame.columns), true);
  }

  /** Makes a cell the one that is edited. */
  choose(row, column, isByHand) {
    this.cell = { row, column };
    const { frame } = this.state;
    this.mark.hidden = this.mark.hidden && !isByHand;
    this.mark.style.left = `${Math.floor(column / frame.block_columns) * this.columnWidth}px`;
    this.mark.style.top = `${Math.floor(row / frame.block_rows) * this.rowHeight}px`;
    this.mark.style.width = `${this.columnWidth}px`;
    this.mark.style.height = `${this.rowHeight}px`;
    this.editRow.max = frame.rows - 1;
    this.editColumn.max = frame.columns - 1;
    if (isByHand) {
      this.editRow.value = row;
      this.editColumn.value = column;
      const value = this.value(row, column);
      if (!Number.isNaN(value)) this.editValue.value = Number(value.toPrecision(6));
    }
    this.read();
  }

  read(row = this.cell.row, column = this.cell.column) {
    if (!this.shown) return;
    const parts = [`row ${row}, column ${column}: ${number(this.value(row, column))}`];
    for (const { state, head, tone } of this.heads) {
      const lane = this.recording.lanes.get(state.name);
      const at = Math.floor(row / state.lane.block_columns);
      const weight = lane.at(Math.min(this.shown.moment, lane.count - 1), head * state.lane.shown_columns + at);
      if (this.heads.length <= 4) parts.push(`${tone} ${number(weight)}`);
    }
    this.readout.textContent = parts.join(" · ");
  }
}
