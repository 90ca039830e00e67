// The server, as this page asks it. Errors are its own sentences.

import { $, memory, showError } from "./dom.js";

const RETRY = 2000; // milliseconds until an event stream that was refused is asked for again
const LAST = new Set(["done", "error", "cancelled"]);
// Where a job stands in line is the line's to tell (`/api/status`), of all jobs at once.
const KINDS = ["planned", "model", "step", "preview", "picture", "note", "host", ...LAST];

export class ApiError extends Error {
  constructor(message, { setting = null, code = "", status = 0 } = {}) {
    super(message);
    Object.assign(this, { setting, code, status });
  }
}

/** A name that nothing else has: 24 letters and digits. */
export function drawnName() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((b) => b.toString(16).padStart(2, "0")).join("");
}

let ownName = "";

/** A name that tells this browser's jobs from others'; it is no secret, and opens nothing. */
function client() {
  if (!ownName) { // drawn once, also where nothing is remembered
    ownName = memory.get("client") || drawnName();
    memory.set("client", ownName);
  }
  return ownName;
}

/** JSON in, JSON out, with `more` headers; null for an answer without a body. Throws `ApiError`. */
export async function ask(method, path, body = undefined, more = {}) {
  const headers = { "X-Fluxmesh-Client": client(), ...more };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    $("offline").hidden = false;
    throw new ApiError("The server does not answer.", { code: "offline" });
  }
  $("offline").hidden = true;
  if (response.status === 401 && path !== "/api/session") {
    await unlock();
    return ask(method, path, body, more);
  }
  const isJson = (response.headers.get("Content-Type") ?? "").startsWith("application/json");
  const answer = isJson ? await response.json().catch(() => null) : null;
  if (response.ok) return answer;
  const { message, setting, code } = answer?.error ?? {};
  throw new ApiError(message ?? `The server answered ${response.status}.`, { setting, code, status: response.status });
}

let unlocking = null;

/** Asks for the server's key, once however many requests lack it. */
function unlock() {
  unlocking ??= new Promise((opened) => {
    const dialog = $("locked");
    // Without the key there is nothing behind it. That it is closed can't always be prevented.
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => { if (unlocking) dialog.showModal(); };
    $("key-form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await ask("POST", "/api/session", { key: $("key").value.trim() });
      } catch (error) {
        showError($("key-error"), error.message);
        $("key").select();
        return;
      }
      unlocking = null;
      dialog.close();
      $("key").value = "";
      showError($("key-error"), "");
      opened();
    };
    if (!dialog.open) dialog.showModal();
  });
  return unlocking;
}

/**
 * A job's events, to the last one, however often the connection breaks. It may be closed and opened
 * again: each event is heard once.
 */
export class EventStream {
  /** `hear(kind, data)` is called for each event; `lost()` where the server knows the job no more. */
  constructor(id, hear, lost) {
    Object.assign(this, { path: `/api/jobs/${encodeURIComponent(id)}/events`, hear, lost, next: 0, source: null, timer: 0 });
  }

  /** Whether it tells of its job now, so that nobody else need. */
  get tells() {
    return this.source !== null && this.next > 0;
  }

  open() {
    if (this.source) return;
    const source = this.source = new EventSource(this.path);
    for (const kind of KINDS) source.addEventListener(kind, (event) => this.#take(event));
    source.addEventListener("error", (event) => {
      // An event of that name is about the job; a connection that breaks is one without data.
      if (event instanceof MessageEvent || source.readyState !== EventSource.CLOSED) return; // it tries again by itself
      this.#refused(source);
    });
  }

  close() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }

  #take(event) {
    if (!(event instanceof MessageEvent)) return;
    const number = Number(event.lastEventId);
    if (number < this.next) return;
    this.next = number + 1;
    $("offline").hidden = true;
    if (LAST.has(event.type)) this.close();
    this.hear(event.type, JSON.parse(event.data));
  }

  async #refused(source) {
    const status = await fetch(this.path, { headers: { "Last-Event-ID": String(this.next) } })
      .then(async (response) => { await response.body?.cancel(); return response.status; })
      .catch(() => 0);
    if (status === 401) await unlock();
    if (this.source !== source) return; // it was closed meanwhile
    if (status === 404) {
      this.close();
      this.lost();
      return;
    }
    this.timer = setTimeout(() => {
      this.close();
      this.open();
    }, status === 401 ? 0 : RETRY);
  }
}
