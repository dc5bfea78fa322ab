// Asks the inspector's own server: JSON for small things, safetensors for arrays. The token, where one is asked for, goes in a
// header and is kept in this tab alone.

const TOKEN_KEY = "inspector-token";

export class TokenWanted extends Error {}

/** Takes the token from the address's fragment (#token), which browsers do not send, and removes it from there. */
export function takeToken() {
  if (location.hash.length > 16) {
    setToken(decodeURIComponent(location.hash.slice(1)));
    history.replaceState(null, "", location.pathname);
  }
}

export function setToken(token) {
  sessionStorage.setItem(TOKEN_KEY, token);
}

async function send(method, path, body, signal) {
  const headers = {};
  const token = sessionStorage.getItem(TOKEN_KEY);
  if (token) headers.Authorization = `Bearer ${token}`;
  const isFile = body instanceof Blob;
  if (body !== undefined && !isFile) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined || isFile ? body : JSON.stringify(body) });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Error("The inspector does not answer: start it again, and reload this page.");
  }
  if (response.ok) return response;
  let problem = `${response.status} ${response.statusText}`;
  try {
    problem = (await response.json()).error ?? problem;
  } catch { /* it was no JSON: the status has to do */ }
  throw response.status === 401 ? new TokenWanted(problem) : new Error(problem);
}

export const get = async (path) => (await send("GET", path)).json();
export const post = async (path, body = {}) => (await send("POST", path, body)).json();
export const remove = async (path) => (await send("DELETE", path)).json();
export const blob = async (path) => (await send("GET", path)).blob();
export const arrays = async (path) => readSafetensors(await (await send("GET", path)).arrayBuffer());

/** Reads an answer that goes on: a JSON object a line, each given to `onLine`, until it ends or the signal says so. */
export async function lines(path, signal, onLine) {
  const reader = (await send("GET", path, undefined, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) onLine(JSON.parse(part));
  }
}

/** The path of a session; its id goes into the address escaped. */
export const sessionPath = (sessionId, rest) => `/api/sessions/${encodeURIComponent(sessionId)}${rest ?? ""}`;

/** Arrays by name from a safetensors file: {shape, data}. */
export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const found = {};
  for (const [name, tensor] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [start, end] = tensor.data_offsets;
    found[name] = { shape: tensor.shape, data: new Float32Array(buffer.slice(8 + length + start, 8 + length + end)) };
  }
  return found;
}
