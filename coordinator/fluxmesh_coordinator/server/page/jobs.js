// What is being painted: a card for each of this browser's jobs, from its place in line to its pictures.

import { ask, follow } from "./server.js";
import { $, duration, make, memory, ordinal, tell } from "./dom.js";

const SHOWN = 420; // pixels of the longer side of a picture that is painted alone, at least
const LINGER = 600; // milliseconds for which a finished card stays, so that its last picture is seen

/** Prompts and sizes of jobs by id, so that a page that is loaded again knows its cards. */
const notes = {
  all: () => JSON.parse(memory.get("jobs") ?? "{}"),
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
    Object.assign(this, { ended, changed, view, cards: new Map() });
  }

  /** Sends a request. Throws `ApiError`. */
  async submit(fields) {
    const accepted = await ask("POST", "/api/jobs", { ...fields, previews: true });
    const { prompt, n_images, width, height, adapters, steps } = fields;
    const about = { prompt, n_images, width, height, adapters, steps, seed: accepted.seed };
    notes.keep(accepted.id, about);
    this.#show(accepted.id, about);
    this.changed();
    return accepted.id;
  }

  /** Goes on with this browser's jobs that the server still has. */
  resume(queue) {
    const known = notes.all();
    for (const row of queue.filter((each) => each.mine)) {
      const isNew = !this.cards.has(row.id);
      if (isNew) this.#show(row.id, known[row.id] ?? { prompt: "", n_images: row.n_images });
    }
    for (const id of Object.keys(known)) if (!this.cards.has(id)) notes.drop(id);
  }

  async cancel(id) {
    await ask("DELETE", `/api/jobs/${encodeURIComponent(id)}`);
  }

  #show(id, about) {
    const card = new JobCard(about, { cancel: () => this.cancel(id), close: () => this.#end(id), view: this.view });
    this.cards.set(id, card);
    $("work").prepend(card.element);
    follow(id, (kind, data) => {
      card.hear(kind, data);
      if (["done", "error", "cancelled"].includes(kind)) {
        notes.drop(id);
        this.ended();
        this.changed();
      }
    }, () => {
      notes.drop(id);
      card.fail("The server was started anew and knows this job no more. Paint it again.");
    });
  }

  #end(id) {
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
      await cancel().catch((error) => { this.state.textContent = error.message; });
    });
    const words = make("div", { className: "job-words" }, make("p", { className: "job-prompt", textContent: about.prompt, title: about.prompt }), this.state);
    this.element = make("article", { className: "job", aria: { label: `Painting: ${about.prompt}` } }, grid, make("div", { className: "job-foot" }, words, this.button));
  }

  hear(kind, data) {
    const heard = this[`on_${kind}`];
    if (heard) heard.call(this, data);
  }

  on_queued({ place, seconds_left }) {
    const time = duration(seconds_left);
    this.state.textContent = place === 0 ? "Next" : `${ordinal(place)} in line${time ? `, about ${time}` : ""}`;
    tell(`${this.state.textContent}.`);
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

  on_error({ message }) {
    this.fail(message);
  }

  fail(message) {
    this.isOver = true;
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
