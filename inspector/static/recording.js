// What the page knows of one recording: the small arrays of all its moments, and of large states the frames that were looked at.

import * as api from "./api.js";

const BLOCK_BYTES = 2 ** 20;
const CACHE_BYTES = 2 ** 27;
const MOST_WAITING = 2;

/** One array that grows by rows. */
class Column {
  constructor(width) {
    this.width = width;
    this.data = new Float32Array(0);
    this.count = 0;
  }

  append(rows) {
    const end = this.count * this.width + rows.length;
    if (end > this.data.length) {
      const grown = new Float32Array(Math.max(end, 2 * this.data.length));
      grown.set(this.data.subarray(0, this.count * this.width));
      this.data = grown;
    }
    this.data.set(rows, this.count * this.width);
    this.count = end / this.width;
  }

  at(row, index) {
    return this.data[row * this.width + index];
  }
}

/** The heat maps of a large state, fetched in blocks of moments and kept while there is room. */
export class Frames {
  constructor(recording, state, onArrival) {
    this.recording = recording;
    this.state = state;
    this.onArrival = onArrival;
    this.size = state.frame.shown_rows * state.frame.shown_columns;
    this.perBlock = Math.max(1, Math.floor(BLOCK_BYTES / (4 * this.size)));
    this.maxBlocks = Math.max(4, Math.floor(CACHE_BYTES / (4 * this.size * this.perBlock)));
    this.blocks = new Map();
    this.waiting = new Set();
  }

  /** {data, offset} of a moment, or null while it is on its way. */
  at(moment) {
    const number = Math.floor(moment / this.perBlock);
    const block = this.blocks.get(number);
    const place = moment - number * this.perBlock;
    if (block === undefined || (place + 1) * this.size > block.length) {
      this.fetch(number);
      return null;
    }
    this.blocks.delete(number);
    this.blocks.set(number, block);
    return { data: block, offset: place * this.size };
  }

  /** Has the block after a moment's fetched before it is needed. */
  prefetch(moment) {
    const number = Math.floor(moment / this.perBlock) + 1;
    if (number * this.perBlock <= this.recording.summary.num_steps && !this.blocks.has(number)) this.fetch(number);
  }

  async fetch(number) {
    // Whoever scrubs asks for more than can come. Drawing after an arrival asks again for what is wanted then.
    if (this.waiting.has(number) || this.waiting.size >= MOST_WAITING) return;
    this.waiting.add(number);
    const query = new URLSearchParams({ name: this.state.name, first: number * this.perBlock, count: this.perBlock });
    try {
      const { frames } = await api.arrays(api.sessionPath(this.recording.summary.session_id, `/frames?${query}`));
      this.blocks.set(number, frames.data);
      while (this.blocks.size > this.maxBlocks) this.blocks.delete(this.blocks.keys().next().value);
    } catch (problem) {
      this.recording.onProblem(problem);
      return;
    } finally {
      this.waiting.delete(number);
    }
    this.onArrival();
  }

  clear() {
    this.blocks.clear();
  }
}

export class Recording {
  constructor(summary, onProblem) {
    this.summary = summary;
    this.onProblem = onProblem;
    this.forget();
  }

  get numSteps() {
    return this.summary.num_steps;
  }

  /** Steps of the sequence that are not sent. */
  get numPending() {
    return this.pending === null ? 0 : this.pending.count;
  }

  state(name) {
    return this.summary.states.find((state) => state.name === name);
  }

  ofRole(role) {
    return this.summary.states.filter((state) => state.role === role);
  }

  forget() {
    this.inputs = this.outputs = this.targets = this.pending = null;
    this.lanes = new Map();
    this.known = 0;
  }

  /** Takes over a newer summary, and fetches what has happened since. */
  async update(summary) {
    const isOther = summary.recording_id !== this.summary.recording_id || summary.resets.length !== this.summary.resets.length;
    this.summary = summary;
    if (isOther) this.forget();
    const since = this.known;
    const found = await api.arrays(api.sessionPath(summary.session_id, `/timeline?since=${since}`));
    for (const name of ["inputs", "outputs", "targets"]) {
      if (since === 0) this[name] = new Column(found[name].shape[1]);
      this[name].append(found[name].data);
    }
    this.pending = null;
    if (found.pending) {
      this.pending = new Column(found.pending.shape[1]);
      this.pending.append(found.pending.data);
    }
    for (const state of summary.states) {
      const rows = found[`state.${state.name}`];
      if (!rows) continue;
      if (since === 0) this.lanes.set(state.name, new Column(rows.shape[1] * rows.shape[2]));
      this.lanes.get(state.name).append(rows.data);
      this.known = this.lanes.get(state.name).count;
    }
    // A model whose states are all too large for lanes begins anew each time.
    if (this.lanes.size === 0) this.known = 0;
    return isOther;
  }

  /** Bits of the answers so far that are on the wrong side of 0.5: [wrong, all]. */
  wrongBits() {
    let wrong = 0;
    let all = 0;
    for (let i = 0; i < this.targets.count * this.targets.width; i++) {
      if (Number.isNaN(this.targets.data[i])) continue;
      all++;
      if (this.targets.data[i] > 0.5 !== this.outputs.data[i] > 0.5) wrong++;
    }
    return [wrong, all];
  }
}
