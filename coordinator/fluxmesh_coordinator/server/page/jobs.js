// What is being painted: a card for each of this browser's jobs, from its place in line to its pictures.

import { ask, drawnName, EventStream } from "./server.js";
import { $, duration, make, memory, ordinal, tell } from "./dom.js";

const SHOWN = 420; // pixels of the longer side of a picture that is painted alone, at least
const LINGER = 600; // milliseconds for which a finished card stays, so that its last picture is seen
const STREAMS = 2; // open at once: a browser has six connections to a server, for all its tabs together
const ANEW = "The server was started anew before this was finished. Paint it again.";

/** Prompts and sizes of jobs by id, so that a page that is loaded again knows its cards. */
const notes = {
  all() {
    try {
      return { ...JSON.parse(memory.get("jobs")) };
    } catch {
      return {}; // something else has written there
    }
  },
  keep(id, about) {
    memory.set("jobs", JSON.stringify({ ...this.all(), [id]: about }));
  },
  drop(id) {
    const { [id]: _, ...others } = this.all();
    memory.set("jobs", JSON.stringify(others));
  },
};

export class Jobs {
  /** `ended()` hears of each job that is over, `changed()` of those that come and go. */
  constructor({ ended, changed, view }) {
    Object.assign(this, { ended, changed, view });
    this.cards = new Map(); // by id
    this.over = new Set(); // ids: a late word of the line brings no card back
    this.line = []; // everybody's jobs, as the server told last
    this.sent = []; // requests that the server has not answered, and those whose answer was lost
    document.addEventListener("visibilitychange", () => this.#listen());
  }

  /**
   * Sends a request. One whose answer was lost goes by the same id when it is sent again, so that
   * the server takes both for one job. Throws `ApiError`.
   */
  async submit(fields) {
    const text = JSON.stringify(fields);
    let request = this.sent.find((each) => each.isLost && each.text === text);
    if (!request) {
      const { prompt, n_images, width, height, adapters, steps } = fields;
      request = { id: drawnName(), text, about: { prompt, n_images, width, height, adapters, steps } };
      this.sent.push(request);
    }
    const { id, about } = request;
    request.isLost = false;
    let accepted;
    try {
      accepted = await ask("POST", "/api/jobs", { ...fields, previews: true }, { "Idempotency-Key": id });
    } catch (error) {
      request.isLost = error.code === "offline" && !this.cards.has(id) && !this.over.has(id);
      if (!request.isLost) this.#answered(id);
      throw error;
    }
    this.#answered(id);
    if (this.over.has(id)) return; // so late is the answer
    const { place, seconds_left, seed } = accepted;
    notes.keep(id, { ...about, seed });
    this.#show(id, about);
    this.#see({ id, state: place ? "queued" : "running", place, seconds_left });
    this.#listen();
    this.changed();
  }

  /** Hears the line: goes on with this browser's jobs, those that have left it included. */
  hear(queue) {
    this.line = queue;
    const known = notes.all();
    for (const row of queue.filter(({ id, mine }) => mine && !this.over.has(id))) {
      const sent = this.sent.find(({ id }) => id === row.id);
      this.#show(row.id, known[row.id] ?? sent?.about ?? { prompt: "", n_images: row.n_images });
      this.#see(row);
      if (sent?.isLost) this.#answered(row.id); // who sends the like now wants another one
    }
    // Those that have left the line tell how they ended; a job of long ago may be known no more.
    for (const [id, about] of Object.entries(known)) {
      if (!this.over.has(id)) this.#show(id, about, { isHidden: true });
    }
    this.#listen();
  }

  /** Has a job end. Throws `ApiError`. */
  async cancel(id) {
    await ask("DELETE", `/api/jobs/${encodeURIComponent(id)}`);
    this.changed();
  }

  #answered(id) {
    this.sent = this.sent.filter((each) => each.id !== id);
  }

  /** A card for a job that has none yet; a hidden one is seen once something is heard of its job. */
  #show(id, about, { isHidden = false } = {}) {
    if (this.cards.has(id)) return;
    const card = new JobCard(about, { cancel: () => this.cancel(id), close: () => this.#remove(id), view: this.view });
    card.stream = new EventStream(id, (kind, data) => {
      card.hear(kind, data);
      if (!card.isOver) return;
      this.#finish(id);
      this.ended();
      this.changed();
    }, () => {
      if (card.element.hidden) this.#remove(id);
      else card.fail(ANEW);
      this.#finish(id);
    });
    card.element.hidden = isHidden;
    this.cards.set(id, card);
    $("work").prepend(card.element);
  }

  /** What the line says of a job; its stream says more. */
  #see(row) {
    const card = this.cards.get(row.id);
    if (!card.stream.tells) card.see(row);
  }

  /**
   * Has streams for the jobs that have something to tell: those that have left the line, and so are
   * over, before those that run. One that waits has one only where there is none of these.
   */
  #listen() {
    const followed = (id) => this.cards.has(id) && !this.over.has(id);
    const rows = this.line.filter(({ id }) => followed(id));
    const inLine = new Set(rows.map(({ id }) => id));
    const gone = [...this.cards.keys()].filter((id) => followed(id) && !inLine.has(id));
    const running = rows.filter(({ state }) => state === "running").map(({ id }) => id);
    const telling = [...gone, ...running].slice(0, STREAMS);
    if (!telling.length && rows.length) telling.push(rows[0].id);
    const open = new Set(document.hidden ? [] : telling);
    for (const [id, { stream }] of this.cards) if (!open.has(id)) stream.close();
    for (const id of open) this.cards.get(id).stream.open();
  }

  #finish(id) {
    this.over.add(id);
    notes.drop(id);
    this.#listen();
  }

  #remove(id) {
    this.cards.get(id)?.element.remove();
    this.cards.delete(id);
  }
}

class JobCard {
  constructor(about, { cancel, close, view }) {
    Object.assign(this, { about, close, view, steps: 0 });
    const count = about.n_images ?? 1;
    this.tiles = Array.from({ length: count }, () => new PictureTile(about));
    const grid = make("div", { className: "job-tiles", data: { count }, vars: { alone: `${alone(about)}px` } }, ...this.tiles.map(({ element }) => element));
    this.state = make("p", { className: "job-state", textContent: "Sent" });
    this.button = make("button", { type: "button", className: "quiet", textContent: "Cancel" });
    this.button.addEventListener("click", async () => {
      if (this.isOver) return this.close();
      this.button.disabled = true;
      await cancel().catch((error) => {
        this.state.textContent = error.message;
        this.button.disabled = false;
      });
    });
    const words = make("div", { className: "job-words" }, make("p", { className: "job-prompt", textContent: about.prompt, title: about.prompt }), this.state);
    this.element = make("article", { className: "job", aria: { label: `Painting: ${about.prompt}` } }, grid, make("div", { className: "job-foot" }, words, this.button));
  }

  /** What the line says of it. */
  see({ state, place, seconds_left, progress = 0 }) {
    if (this.isOver) return;
    this.element.hidden = false;
    const time = duration(seconds_left);
    this.element.classList.toggle("in-line", state === "queued"); // without places for its pictures yet
    if (state === "queued") {
      this.state.textContent = `${ordinal(place)} in line${time ? `, about ${time}` : ""}`;
      if (place !== this.place) tell(`${this.state.textContent}.`);
      this.place = place;
    } else {
      this.state.textContent = progress ? `${Math.round(progress * 100)} % painted${time ? `, ${time} left` : ""}` : "Begins now";
    }
  }

  /** What its stream says of it. */
  hear(kind, data) {
    this.element.hidden = false;
    if (kind !== "note") this.element.classList.remove("in-line");
    const heard = this[`on_${kind}`];
    if (heard) heard.call(this, data);
  }

  on_planned({ seconds, notice }) {
    const time = duration(seconds);
    this.state.textContent = notice || (time ? `Begins now, about ${time}` : "Begins now");
  }

  on_model({ text }) {
    this.state.textContent = text;
  }

  on_note({ text }) {
    this.note = text;
    this.state.textContent = text;
  }

  on_host({ text }) {
    this.state.textContent = `${text} The others go on.`;
  }

  on_step({ image, step, steps, seconds_left }) {
    this.tiles[image]?.progress(step / steps);
    const which = this.tiles.length > 1 ? `Picture ${image + 1} of ${this.tiles.length}, step` : "Step";
    const time = duration(seconds_left);
    this.state.textContent = step === steps && this.tiles.length === 1 ? "Developing" : `${which} ${step} of ${steps}${time ? `, ${time} left` : ""}`;
  }

  on_preview({ image, data }) {
    this.tiles[image]?.preview(`data:image/jpeg;base64,${data}`);
  }

  on_picture({ image, url, name, width, height }) {
    this.tiles[image]?.finish(url, width / height, () => this.view(name));
  }

  on_done() {
    this.isOver = true;
    tell(this.tiles.length > 1 ? "All pictures are finished." : "The picture is finished.");
    setTimeout(this.close, LINGER);
  }

  on_cancelled() {
    this.isOver = true;
    tell("Cancelled.");
    this.close();
  }

  on_error({ message, code }) {
    this.fail(code === "lost" ? ANEW : message);
  }

  fail(message) {
    this.isOver = true;
    this.element.classList.remove("in-line");
    this.state.textContent = message.replace(/`(\w+)`/g, "$1");
    this.state.setAttribute("role", "alert");
    this.element.classList.add("failed");
    this.button.textContent = "Close";
    this.button.disabled = false;
  }
}

/** How wide a picture that is painted alone is shown. */
function alone({ width = 1, height = 1 }) {
  const longer = Math.max(width, height, SHOWN) > 700 ? 640 : SHOWN;
  return Math.round(longer * Math.min(1, width / height));
}

class PictureTile {
  constructor({ width = 1, height = 1 }) {
    this.bar = make("span", { className: "done-part" });
    this.element = make("button", { type: "button", className: "tile", disabled: true, aria: { label: "Not begun yet" } }, make("span", { className: "waiting" }), this.bar);
    this.element.style.aspectRatio = String(width / height);
  }

  progress(share) {
    this.bar.style.width = `${Math.round(share * 100)}%`;
    this.element.setAttribute("aria-label", `${Math.round(share * 100)} % painted`);
  }

  #image() {
    let image = this.element.querySelector("img");
    if (!image) {
      image = make("img", { alt: "" });
      this.element.querySelector(".waiting").remove();
      this.element.prepend(image);
    }
    return image;
  }

  preview(url) {
    const image = this.#image();
    image.className = "preview";
    image.src = url;
  }

  async finish(url, ratio, view) {
    const whole = make("img", { alt: "", src: url });
    await whole.decode().catch(() => {});
    this.#image().replaceWith(whole);
    this.element.style.aspectRatio = String(ratio);
    this.element.classList.add("finished");
    this.element.disabled = false;
    this.element.setAttribute("aria-label", "Open the finished picture");
    this.element.addEventListener("click", view);
  }
}
