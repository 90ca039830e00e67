// The hosts, their links and the line: a word at the top, more for who asks.

import { ask } from "./server.js";
import { $, arrange, bytes, counted, duration, make, ordinal } from "./dom.js";

const OFTEN = 2000; // milliseconds between two looks
const SELDOM = 6000; // with nothing to do
const WORDS = { idle: "ready", loading: "reading weights" }; // other states are words themselves
const KINDS = { idle: "good", ready: "good", failed: "bad", gone: "bad" };

export class MeshView {
  /** `heard(status)` hears of each look; `cancel(id)` ends a job. */
  constructor({ heard, cancel }) {
    Object.assign(this, { heard, cancel, timer: 0 });
    this.rows = new Map(); // of the line, by the id of the job
    $("mesh-open").addEventListener("click", () => {
      $("mesh").showModal();
      this.look();
    });
    $("mesh-close").addEventListener("click", () => $("mesh").close());
    $("mesh").addEventListener("click", (event) => { if (event.target === $("mesh")) $("mesh").close(); });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.look(); });
  }

  /** Looks now, and again and again for as long as the page can be seen. */
  async look() {
    clearTimeout(this.timer);
    let wait = SELDOM;
    try {
      const status = await ask("GET", "/api/status");
      this.#show(status);
      this.heard(status);
      if (status.queue.length || $("mesh").open) wait = OFTEN;
    } catch {
      $("mesh-words").textContent = "No answer";
      $("mesh-dot").className = "dot bad";
      wait = OFTEN;
    }
    if (!document.hidden) this.timer = setTimeout(() => this.look(), wait);
  }

  #show({ hosts, links, notes, queue, version }) {
    const gone = hosts.filter(({ state }) => state === "gone").length;
    const running = queue.filter(({ state }) => state === "running").length;
    const waiting = queue.length - running;
    const parts = [hosts.length ? counted(hosts.length - gone, "host") : "No host"];
    if (gone) parts.push(`${gone} gone`);
    if (running) parts.push("painting");
    if (waiting) parts.push(`${waiting} waiting`);
    $("mesh-words").textContent = parts.join(" · ");
    $("mesh-dot").className = `dot ${gone || !hosts.length ? "bad" : running ? "busy" : "good"}`;
    this.#line(queue);
    $("placement-field").hidden = hosts.length < 2; // one host has nothing to spread over
    if (hosts.length < 2) $("placement").value = "";
    if (!$("mesh").open) return;
    $("hosts").replaceChildren(...hosts.map(host));
    $("mesh-notes").textContent = notes.join(" ");
    $("links-part").hidden = !links.length;
    const names = new Map(hosts.map(({ rank, name }) => [rank, name]));
    $("links").replaceChildren(...links.map((link) => make("li", {},
      make("span", { textContent: `${names.get(link.from) ?? link.from} → ${names.get(link.to) ?? link.to}` }),
      make("span", { textContent: `${bytes(link.bytes_per_second)}/s` }))));
    this.#queue(queue);
    $("version").textContent = `fluxmesh ${version}`;
  }

  /** Under the form: who is before a request that would be sent now. */
  #line(queue) {
    const others = queue.filter(({ mine }) => !mine);
    const longest = Math.max(0, ...queue.map(({ seconds_left }) => seconds_left));
    $("line").hidden = !others.length;
    const time = duration(longest);
    $("line").textContent = others.length ? `${counted(others.length, "job")} of others before you${time ? `, about ${time}` : ""}.` : "";
  }

  /** Rows stay the same elements, so that a look takes no focus from a button. */
  #queue(queue) {
    this.rows = new Map(queue.map((row) => [row.id, this.rows.get(row.id) ?? this.#row(row)]));
    for (const { id, state, place, seconds_left, progress } of queue) {
      const where = state === "running" ? `${Math.round(progress * 100)} %` : ordinal(place);
      const time = duration(seconds_left);
      this.rows.get(id).querySelector(".where").textContent = `${where}${time ? `, ${time}` : ""}`;
    }
    const had = $("queue").contains(document.activeElement);
    arrange($("queue"), queue.length ? [...this.rows.values()] : [make("li", {}, make("span", { className: "nobody", textContent: "Nobody waits." }))]);
    if (had && !$("queue").contains(document.activeElement)) $("mesh-close").focus(); // its job is over
  }

  #row({ id, mine, n_images, model }) {
    const item = make("li", {},
      make("span", { className: mine ? "mine" : "", textContent: `${mine ? "Yours" : "Somebody’s"}: ${counted(n_images, "picture")}, ${model}` }),
      make("span", { className: "where" }));
    if (mine) {
      const button = make("button", { type: "button", className: "quiet", textContent: "Cancel" });
      button.addEventListener("click", () => this.cancel(id));
      item.append(button);
    }
    return item;
  }
}

function host({ name, chip, state, models, memory_bytes, memory_used_bytes, reason }) {
  const used = make("i");
  used.style.width = `${memory_bytes ? Math.round((memory_used_bytes / memory_bytes) * 100) : 0}%`;
  const about = [chip, models.join(", "), memory_bytes ? `${bytes(memory_used_bytes)} of ${bytes(memory_bytes)}` : "", reason ?? ""];
  const kind = KINDS[state] ?? "busy";
  const isOwn = name === "127.0.0.1" || name === "localhost";
  return make("li", { className: "host" },
    make("span", { className: `dot ${kind}`, ariaHidden: "true" }),
    make("span", { className: "host-name", textContent: isOwn ? "The server’s own machine" : name }),
    make("span", { className: "host-state", textContent: WORDS[state] ?? state }),
    make("span", { className: "host-about", textContent: about.filter(Boolean).join(" · ") }),
    make("span", { className: "meter", ariaHidden: "true" }, used));
}
