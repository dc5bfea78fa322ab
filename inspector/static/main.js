// The page: what is chosen, what its buttons do, and which moment is shown. Text from elsewhere goes into the page as text alone.

import * as api from "./api.js";
import { setTheme } from "./colours.js";
import { number } from "./draw.js";
import { MemoryView } from "./memory.js";
import { Comparison, OtherStates } from "./others.js";
import { picture } from "./picture.js";
import { Frames, Recording } from "./recording.js";
import { TimeLine } from "./timeline.js";

const element = (id) => document.getElementById(id);

let models = [];
let recording = null;
let moment = 0;
let memoryFrames = null;
let isRunning = false;
let isPlaying = false;

const timeline = new TimeLine(element("lanes"), (wanted) => goTo(wanted));
const memory = new MemoryView({
  panel: element("memory-panel"), matrix: element("memory-matrix"), about: element("memory-about"), readout: element("memory-readout"),
  legends: element("memory-legends"), editForm: element("edit-form"), editRow: element("edit-row"), editColumn: element("edit-column"), editValue: element("edit-value"),
});
const others = new OtherStates(element("other-panel"), element("other-states"));
const comparison = new Comparison({ maps: element("compare-maps"), about: element("compare-about") });

// Problems are said at the top of the page; a handler never fails without a word.

function complain(problem) {
  if (problem instanceof api.TokenWanted) {
    element("token-form").hidden = false;
    element("page").hidden = true;
    element("token").focus();
    return;
  }
  element("alert-text").textContent = problem.message;
  element("alert").hidden = false;
}

const handled = (action) => async (event) => {
  event?.preventDefault();
  element("alert").hidden = true;
  try {
    await action(event);
  } catch (problem) {
    complain(problem);
  }
};

const on = (id, kind, action) => element(id).addEventListener(kind, handled(action));

// Models and sessions.

const model = () => models.find((one) => modelKey(one) === element("model").value);
const modelKey = (one) => `${one.name}/${one.version}`;
const recordedModel = () => models.find((one) => one.name === recording.summary.model && one.version === recording.summary.version) ?? model();

function option(value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

async function loadModels() {
  const server = await api.get("/api/server");
  element("token-form").hidden = true;
  element("page").hidden = false;
  models = server.models;
  element("server-address").textContent = server.address;
  element("server-about").textContent = models.length > 0 ? models[0].provider.replace("ExecutionProvider", "") : "";
  const several = new Set(models.map((one) => one.name)).size < models.length;
  element("model").replaceChildren(...models.map((one) => option(modelKey(one), several ? modelKey(one) : one.name)));
  if (models.length === 0) throw new Error("The server has no model: put one into its models directory, and reload this page.");
  const preferred = models.find((one) => one.name === "copy") ?? models[0];
  element("model").value = modelKey(preferred);
  element("new-session").disabled = false;
  await chooseModel();
}

async function chooseModel() {
  const { task, input, output } = model();
  const shape = (tensor) => tensor.shape.join(" × ") || "one number";
  element("model-about").textContent = `${task ? `${task}: ` : ""}${shape(input)} in, ${shape(output)} out`;
  await listSessions();
}

function age(time) {
  const seconds = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

async function listSessions() {
  const chosen = model();
  const { sessions, are_more: areMore } = await api.get(`/api/sessions?${new URLSearchParams({ model: chosen.name })}`);
  const shown = sessions
    .filter((session) => Number(session.model_version) === chosen.version)
    .sort((a, b) => Date.parse(b.create_time) - Date.parse(a.create_time));
  element("sessions").replaceChildren(...shown.map(sessionItem));
  element("sessions-more").hidden = !areMore && shown.length > 0;
  element("sessions-more").textContent = areMore ? "Some of more: the first 200 by id." : "None yet.";
  const rest = shown.filter((session) => session.session_id !== recording?.summary.session_id);
  const before = element("compare-with").value;
  element("compare-with").replaceChildren(option("", "none"), ...rest.map((session) => option(session.session_id, `${session.session_id.slice(0, 12)}, ${session.next_step} steps`)));
  if (rest.some((session) => session.session_id === before)) element("compare-with").value = before;
}

function sessionItem(session) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  const id = document.createElement("code");
  id.textContent = session.session_id;
  const about = document.createElement("span");
  about.className = "faint";
  const store = session.store && session.store !== "none" ? `, ${session.store}` : "";
  const owner = session.owner ? `, ${session.owner}` : "";
  about.textContent = `${session.next_step} steps, ${age(session.create_time)} old${store}${owner}`;
  button.append(id, about);
  button.title = session.session_id;
  button.setAttribute("aria-current", String(session.session_id === recording?.summary.session_id));
  button.addEventListener("click", handled(() => open(session.session_id)));
  item.append(button);
  return item;
}

async function open(sessionId) {
  await show(await api.post(api.sessionPath(sessionId, "/open")));
}

/** Shows a session from its summary: one that was opened, made, forked or imported. */
async function show(summary, wanted = Infinity) {
  stop();
  unfollow();
  element("follow").checked = false;
  recording = new Recording(summary, complain);
  await recording.update(summary);
  element("empty").hidden = true;
  element("session").hidden = false;
  element("session-id").textContent = summary.session_id;
  const own = models.find((one) => one.name === summary.model && one.version === summary.version);
  if (own && element("model").value !== modelKey(own)) {
    element("model").value = modelKey(own);
    await chooseModel();
  }
  const memoryState = recording.ofRole("memory")[0];
  const hasAttention = recording.summary.states.some((state) => state.role.endsWith("weighting"));
  timeline.shows.other = !hasAttention;
  element("show-other").checked = timeline.shows.other;
  memoryFrames = memoryState ? new Frames(recording, memoryState, draw) : null;
  memory.show(recording, memoryFrames);
  others.show(recording, memoryState?.name, draw);
  const states = recording.summary.states.map((state) => option(state.name, state.name));
  element("compare-state").replaceChildren(...states);
  if (memoryState) element("compare-state").value = memoryState.name;
  comparison.show(recording, null);
  element("compare-about").textContent = "Choose another session of this model: both at the same number of steps where that is recorded, and their difference.";
  fillKinds();
  timeline.show(recording);
  describe();
  goTo(Math.min(wanted, recording.numSteps));
  await listSessions();
}

/** Takes over what an action made of the session that is shown. */
async function update(summary) {
  const follows = moment === recording.numSteps;
  const isOther = await recording.update(summary);
  if (isOther) {
    memoryFrames?.clear();
    others.clear();
    comparison.clear();
  }
  timeline.layout();
  describe();
  goTo(follows ? recording.numSteps : Math.min(moment, recording.numSteps));
}

function describe() {
  const { summary } = recording;
  const from = summary.first_step > 0 ? `, recorded from ${number(summary.first_step)} on` : "";
  const missing = lost > 0 ? `, ${number(lost)} messages of others were lost` : "";
  const approximate = summary.approximate ? ", recovered approximately" : "";
  element("session-about").textContent = `${summary.model}/${summary.version}, ${number(summary.first_step + summary.num_steps)} steps${from}${missing}${approximate}`;
  element("python").textContent = summary.program;
  const { sequence } = summary;
  const pending = recording.numPending;
  let text = "Load a sequence, and run it.";
  if (sequence) {
    text = `${sequence.title}: ${number(sequence.position)} of ${number(sequence.num_steps)} steps sent.`;
    const [wrong, all] = recording.wrongBits();
    if (sequence.are_bits && all > 0) text += ` ${number(wrong)} of ${number(all)} bits wrong.`;
  }
  element("sequence-about").textContent = text;
  element("run").disabled = element("one-step").disabled = pending === 0;
}

// Following what others do in the session. Updates that come while one is under way become one.

let following = null;
let lost = 0;

async function follow() {
  unfollow();
  if (!element("follow").checked) return;
  const own = recording;
  following = new AbortController();
  const { signal } = following;
  let isDue = false;
  let isUpdating = false;
  const refresh = async () => {
    isDue = true;
    if (isUpdating) return;
    isUpdating = true;
    try {
      while (isDue && recording === own) {
        isDue = false;
        await update(await api.get(api.sessionPath(own.summary.session_id)));
      }
    } catch (problem) {
      complain(problem);
    } finally {
      isUpdating = false;
    }
  };
  try {
    await api.lines(api.sessionPath(own.summary.session_id, "/follow"), signal, (line) => {
      if (line.error) throw new Error(line.error);
      lost += line.lost;
      document.documentElement.dataset.following = own.summary.session_id;
      refresh();
    });
  } catch (problem) {
    if (problem.name !== "AbortError") complain(problem);
  } finally {
    if (following?.signal === signal) {
      following = null;
      element("follow").checked = false;
    }
  }
}

function unfollow() {
  following?.abort();
  delete document.documentElement.dataset.following;
  following = null;
  lost = 0;
}

// The moment that is shown.

function goTo(wanted) {
  moment = Math.max(0, Math.min(recording.numSteps, wanted));
  draw();
}

let text = "";

function draw() {
  if (!recording) return false;
  const isWhole = [memory.draw(moment), others.draw(moment), comparison.draw(moment)].every(Boolean);
  text = momentText();
  timeline.place(moment, text);
  element("moment-text").textContent = text;
  document.documentElement.dataset.moment = moment;
  document.documentElement.dataset.drawn = isWhole ? moment : "";
  const ends = [moment === 0, moment === recording.numSteps];
  element("first").disabled = element("back").disabled = ends[0];
  element("last").disabled = element("forward").disabled = ends[1];
  return isWhole;
}

/** What the moment is, in words: how many steps, and where each head looks. */
function momentText() {
  const parts = [`After ${number(recording.summary.first_step + moment)} steps`];
  for (const [role, tone] of [["write_weighting", "write"], ["read_weighting", "read"]]) {
    for (const state of recording.ofRole(role)) {
      const { shown_rows: heads, shown_columns: rows, block_columns: block } = state.lane;
      const lane = recording.lanes.get(state.name);
      for (let head = 0; head < heads && heads <= 3; head++) {
        let best = 0;
        for (let row = 1; row < rows; row++) if (lane.at(moment, head * rows + row) > lane.at(moment, head * rows + best)) best = row;
        const name = heads > 1 ? `${tone} ${head}` : tone;
        parts.push(`${name}: row ${best * block}, ${number(Number(lane.at(moment, head * rows + best).toFixed(3)))}`);
      }
    }
  }
  return parts.join(" · ");
}

const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10 };

timeline.layer.addEventListener("keydown", (event) => {
  if (!recording || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in moves) goTo(moment + moves[event.key]);
  else if (event.key === "Home") goTo(0);
  else if (event.key === "End") goTo(recording.numSteps);
  else if (event.key === " ") play(!isPlaying);
  else return;
  event.preventDefault();
});

// Playing what is recorded, at a rate; a frame counts when everything of it was there and is drawn.

const drawnAt = [];

function play(wanted) {
  isPlaying = wanted && recording !== null && recording.numSteps > 0;
  element("play").textContent = isPlaying ? "Pause" : "Play";
  element("rate-seen").textContent = "";
  drawnAt.length = 0;
  if (!isPlaying) return;
  if (moment === recording.numSteps) goTo(0);
  let due = performance.now();
  const tick = (now) => {
    if (!isPlaying) return;
    requestAnimationFrame(tick);
    if (now < due) return;
    const spacing = 1000 / Number(element("rate").value);
    if (moment === recording.numSteps) {
      play(false);
      return;
    }
    memoryFrames?.prefetch(moment);
    // One that is still on its way is waited for: no moment is left out.
    const next = moment + 1;
    if (memoryFrames && !memoryFrames.at(next)) return;
    due = Math.max(due + spacing, now - spacing);
    goTo(next);
    drawnAt.push(now);
    while (drawnAt.length > 0 && now - drawnAt[0] > 1000) drawnAt.shift();
    element("rate-seen").textContent = `${drawnAt.length} drawn in the last second`;
    document.documentElement.dataset.framesPerSecond = drawnAt.length;
  };
  requestAnimationFrame(tick);
}

// Sending.

function stop() {
  isRunning = false;
  if (isPlaying) play(false);
  element("run").hidden = false;
  element("pause").hidden = true;
}

async function advance(steps) {
  await update(await api.post(api.sessionPath(recording.summary.session_id, "/advance"), { steps }));
}

async function run() {
  if (isPlaying) play(false);
  isRunning = true;
  goTo(recording.numSteps);
  element("run").hidden = true;
  element("pause").hidden = false;
  element("pause").focus();
  const own = recording;
  try {
    while (isRunning && recording === own && recording.numPending > 0) {
      const perSecond = Number(element("speed").value);
      const start = performance.now();
      await advance(perSecond > 0 ? 1 : 10000);
      if (perSecond > 0) await new Promise((resolve) => setTimeout(resolve, Math.max(0, 1000 / perSecond - (performance.now() - start))));
    }
  } finally {
    const hadFocus = document.activeElement === element("pause");
    if (recording === own) stop();
    if (hadFocus) (recording.numPending > 0 ? element("run") : element("load")).focus();
  }
  await listSessions();
}

function fillKinds() {
  const { input, kinds } = recordedModel();
  const kept = element("kind").value;
  const more = [["paste", "Paste numbers"], ["upload", "Upload a file"], ["hand", "One step by hand"]];
  element("kind").replaceChildren(...kinds.map((kind) => option(kind.name, kind.title)), ...more.map(([value, title]) => option(value, title)));
  if ([...element("kind").options].some((one) => one.value === kept)) element("kind").value = kept;
  const size = input.shape.reduce((product, length) => product * length, 1);
  element("hand-label").textContent = `${size} numbers${input.description ? `: ${input.description}` : ""}`;
  if (element("hand").value.trim().split(/\s+/).length !== size) element("hand").value = Array(Math.min(size, 4096)).fill(0).join(" ");
  chooseKind();
}

function chooseKind() {
  const name = element("kind").value;
  const kind = recordedModel().kinds.find((one) => one.name === name);
  element("paste-field").hidden = name !== "paste";
  element("upload-field").hidden = name !== "upload";
  element("hand-field").hidden = name !== "hand";
  element("parameters").replaceChildren(...(kind?.parameters ?? []).map((parameter) => {
    const field = document.createElement("div");
    field.className = "field parameter";
    const label = document.createElement("label");
    label.textContent = parameter.label;
    label.htmlFor = `parameter-${parameter.name}`;
    const input = document.createElement("input");
    Object.assign(input, { id: label.htmlFor, type: "number", min: parameter.least, max: parameter.most, value: parameter.default, required: true });
    input.dataset.parameter = parameter.name;
    field.append(label, input);
    return field;
  }));
}

const numbersIn = (typed) => typed.trim().split(/[\s,;]+/).map(Number);

async function load() {
  const path = (rest) => api.sessionPath(recording.summary.session_id, rest);
  const kind = element("kind").value;
  if (kind === "hand") {
    const values = numbersIn(element("hand").value);
    if (values.some(Number.isNaN)) throw new Error("A step by hand takes numbers with spaces between.");
    await update(await api.post(path("/sequence"), { values }));
    await advance(1);
  } else if (kind === "paste" || kind === "upload") {
    const file = kind === "paste" ? new Blob([element("paste").value]) : element("upload").files[0];
    if (!file) throw new Error("Choose a file first.");
    const name = kind === "paste" ? "inputs.csv" : file.name;
    await update(await api.post(path(`/upload?${new URLSearchParams({ name })}`), file));
  } else {
    const parameters = {};
    for (const input of element("parameters").querySelectorAll("input")) parameters[input.dataset.parameter] = Number(input.value);
    await update(await api.post(path("/sequence"), { kind, parameters }));
  }
}

function save(file, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function savePicture() {
  const { summary } = recording;
  const maps = [...element("memory-matrix").querySelectorAll(".map")].map((map) => ({ canvas: map.querySelector("canvas"), name: map.querySelector(".name").textContent }));
  const lanes = [...element("lanes").querySelectorAll("canvas")].map((canvas) => ({ canvas, name: canvas.parentElement.previousElementSibling.textContent }));
  const cursor = { left: parseFloat(timeline.cursor.style.left), width: parseFloat(timeline.cursor.style.width) };
  const steps = summary.first_step + moment;
  save(await picture(`${summary.model}/${summary.version}, after ${steps} steps`, memoryFrames ? maps : [], lanes, cursor), `${summary.model}-${steps}.png`);
}

async function compare() {
  const sessionId = element("compare-with").value;
  if (sessionId === "") {
    comparison.show(recording, null);
    return;
  }
  const summary = await api.post(api.sessionPath(sessionId, "/open"));
  const other = new Recording(summary, complain);
  comparison.show(recording, other, element("compare-state").value, draw);
  draw();
}

function chooseTheme(name) {
  document.documentElement.dataset.theme = name;
  element("theme").setAttribute("aria-pressed", String(name === "dark"));
  setTheme(name);
  if (!recording) return;
  memory.show(recording, memoryFrames);
  timeline.layout();
  draw();
}

on("model", "change", chooseModel);
on("refresh", "click", listSessions);
on("new-session", "click", async () => show(await api.post("/api/sessions", { model: model().name, version: model().version })));
on("import-file", "change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) await show(await api.post("/api/import", file));
});
on("kind", "change", chooseKind);
on("sequence-form", "submit", load);
on("run", "click", run);
on("pause", "click", () => { isRunning = false; });
on("one-step", "click", () => advance(1));
element("follow").addEventListener("change", () => follow());
on("reset", "click", async () => update(await api.post(api.sessionPath(recording.summary.session_id, "/reset"))));
on("fork", "click", async () => show(await api.post(api.sessionPath(recording.summary.session_id, "/fork"), { moment })));
on("export", "click", async () => save(await api.blob(api.sessionPath(recording.summary.session_id, `/export?moment=${moment}`)), `${recording.summary.session_id}.safetensors`));
on("animation", "click", async () => save(await api.blob(api.sessionPath(recording.summary.session_id, `/animation?theme=${document.documentElement.dataset.theme}`)), `${recording.summary.model}.gif`));
on("picture", "click", savePicture);
on("delete", "click", async () => {
  if (!window.confirm("End this session on the server? Nothing brings it back.")) return;
  stop();
  await api.remove(api.sessionPath(recording.summary.session_id));
  recording = null;
  element("session").hidden = true;
  element("empty").hidden = false;
  await listSessions();
});
on("edit-form", "submit", async () => {
  const { shape } = memory.state;
  let at = Number(element("edit-row").value);
  const index = [];
  for (const length of shape.slice(0, -1).reverse()) {
    index.unshift(at % length);
    at = Math.floor(at / length);
  }
  index.push(Number(element("edit-column").value));
  const body = { moment, name: memory.state.name, index, value: Number(element("edit-value").value) };
  await show(await api.post(api.sessionPath(recording.summary.session_id, "/edit"), body));
});
on("first", "click", () => goTo(0));
on("back", "click", () => goTo(moment - 1));
on("forward", "click", () => goTo(moment + 1));
on("last", "click", () => goTo(recording.numSteps));
on("play", "click", () => play(!isPlaying));
for (const name of ["attention", "used", "signals", "other"]) {
  on(`show-${name}`, "change", (event) => {
    timeline.shows[name] = event.target.checked;
    timeline.layout();
  });
}
on("compare-with", "change", compare);
on("compare-state", "change", compare);
on("copy-python", "click", async () => {
  await navigator.clipboard.writeText(element("python").textContent);
  element("copy-python").textContent = "Copied";
  setTimeout(() => { element("copy-python").textContent = "Copy"; }, 1500);
});
on("alert-close", "click", () => { element("alert").hidden = true; });
on("theme", "click", () => chooseTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
on("token-form", "submit", async () => {
  api.setToken(element("token").value.trim());
  await loadModels();
});

chooseTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
api.takeToken();
handled(loadModels)();
