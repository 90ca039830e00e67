// The server, as this page asks it. Errors are its own sentences.

import { $, memory, showError } from "./dom.js";

const RETRY = 2000; // milliseconds until an event stream that was refused is asked for again
const LAST = new Set(["done", "error", "cancelled"]);
const KINDS = [
  "queued", "planned", "model", "step", "preview", "picture", "note", "host", ...LAST,
];

export class ApiError extends Error {
  constructor(message, { setting = null, code = "", status = 0 } = {}) {
    super(message);
    Object.assign(this, { setting, code, status });
  }
}

/** A name that tells this browser's jobs from others'; it is no secret, and opens nothing. */
function client() {
  let name = memory.get("client");
  if (!name) {
    name = [...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join("");
    memory.set("client", name);
  }
  return name;
}

/** JSON in, JSON out; null for an answer without a body. Throws `ApiError`. */
export async function ask(method, path, body = undefined) {
  const headers = { "X-Fluxmesh-Client": client() };
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
    return ask(method, path, body);
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
    const refuse = (event) => event.preventDefault(); // without the key there is nothing behind it
    dialog.addEventListener("cancel", refuse);
    $("key-form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await ask("POST", "/api/session", { key: $("key").value.trim() });
      } catch (error) {
        showError($("key-error"), error.message);
        $("key").select();
        return;
      }
      dialog.removeEventListener("cancel", refuse);
      dialog.close();
      $("key").value = "";
      showError($("key-error"), "");
      unlocking = null;
      opened();
    };
    if (!dialog.open) dialog.showModal();
  });
  return unlocking;
}

/**
 * A job's events, to the last one, however often the connection breaks.
 * `hear(kind, data)` is called for each, once; `lost()` where the server knows the job no more.
 */
export function follow(id, hear, lost) {
  let next = 0;
  const listen = () => {
    const source = new EventSource(`/api/jobs/${encodeURIComponent(id)}/events`);
    const take = (event) => {
      // A connection that breaks is an `error` too, but one without data.
      if (!(event instanceof MessageEvent)) return;
      const number = Number(event.lastEventId);
      if (number < next) return;
      next = number + 1;
      $("offline").hidden = true;
      if (LAST.has(event.type)) source.close();
      hear(event.type, JSON.parse(event.data));
    };
    for (const kind of KINDS) source.addEventListener(kind, take);
    source.addEventListener("error", async (event) => {
      if (event instanceof MessageEvent) return;
      if (source.readyState !== EventSource.CLOSED) return; // it tries again by itself
      const status = await fetch(`/api/jobs/${encodeURIComponent(id)}/events`, { method: "GET", headers: { "Last-Event-ID": String(2 ** 29) } })
        .then(async (response) => { await response.body?.cancel(); return response.status; })
        .catch(() => 0);
      if (status === 404) lost();
      else if (status === 401) unlock().then(listen);
      else setTimeout(listen, RETRY);
    });
  };
  listen();
}
