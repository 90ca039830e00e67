// Finished pictures, newest first, and the window in which one is looked at.

import { ask } from "./server.js";
import { $, counted, make, tell } from "./dom.js";

const PAGE = 50;

export class Gallery {
  /** `actions`: again, vary, edit and reuse, each given a picture; `guided(model)`: whether a model
   * reads its guidance. */
  constructor(actions, guided) {
    this.guided = guided;
    this.pictures = []; // as the server lists them
    this.next = null; // where the list goes on
    this.at = -1; // the picture in the window
    $("show-more").addEventListener("click", () => this.#more().catch((error) => tell(error.message)));
    $("pictures").addEventListener("keydown", (event) => this.#move(event));
    this.#listenToViewer(actions);
  }

  /** Asks for the newest pictures. Throws `ApiError`. */
  async load() {
    const { pictures, next } = await ask("GET", `/api/pictures?limit=${PAGE}`);
    // Those that are on the page already keep their place.
    const open = this.pictures[this.at]?.name;
    const kept = this.pictures.length > pictures.length ? this.pictures.slice(pictures.length) : [];
    const names = new Set(pictures.map(({ name }) => name));
    this.pictures = [...pictures, ...kept.filter(({ name }) => !names.has(name) && name < (pictures.at(-1)?.name ?? ""))];
    this.next = kept.length ? this.next : next;
    this.at = open ? this.pictures.findIndex(({ name }) => name === open) : -1;
    this.#show();
  }

  async open(name) {
    if (!this.pictures.some((picture) => picture.name === name)) await this.load();
    const index = this.pictures.findIndex((picture) => picture.name === name);
    if (index >= 0) this.#view(index);
  }

  async #more() {
    const { pictures, next } = await ask("GET", `/api/pictures?limit=${PAGE}&before=${encodeURIComponent(this.next)}`);
    const first = this.pictures.length;
    this.pictures.push(...pictures);
    this.next = next;
    this.#show();
    $("pictures").children[first]?.querySelector("button").focus();
  }

  #show() {
    const shown = new Map([...$("pictures").children].map((item) => [item.dataset.name, item]));
    $("pictures").replaceChildren(...this.pictures.map((picture) => shown.get(picture.name) ?? this.#item(picture)));
    const buttons = $("pictures").querySelectorAll("button");
    buttons.forEach((button, k) => { button.tabIndex = k ? -1 : 0; }); // one stop; arrows go on
    $("empty").hidden = this.pictures.length > 0;
    $("show-more").hidden = !this.next;
    $("gallery-count").textContent = this.pictures.length && !this.next ? counted(this.pictures.length, "picture") : "";
  }

  #item(picture) {
    const ratio = picture.width / picture.height;
    const prompt = picture.recipe.prompt ?? "";
    const image = make("img", { src: picture.thumbnail_url, alt: "", loading: "lazy", decoding: "async" });
    const button = make("button", { type: "button", aria: { label: prompt || "Picture" } }, image, make("span", { className: "caption", textContent: prompt, ariaHidden: "true" }));
    button.addEventListener("click", () => this.#view(this.pictures.findIndex(({ name }) => name === picture.name)));
    return make("li", { data: { name: picture.name }, vars: { ratio: ratio.toFixed(4) } }, button);
  }

  /** Arrows go from picture to picture: left and right in order, up and down by row. */
  #move(event) {
    const buttons = [...$("pictures").querySelectorAll("button")];
    const from = buttons.indexOf(event.target);
    if (from < 0) return;
    const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: buttons.length - 1 }[event.key] ?? this.#vertical(buttons, from, event.key);
    const button = buttons[to];
    if (!button) return;
    event.preventDefault();
    buttons[from].tabIndex = -1;
    button.tabIndex = 0;
    button.focus();
  }

  #vertical(buttons, from, key) {
    const direction = { ArrowDown: 1, ArrowUp: -1 }[key];
    if (!direction) return -1;
    const middle = (button) => {
      const box = button.getBoundingClientRect();
      return [box.left + box.width / 2, box.top + box.height / 2];
    };
    const [x, y] = middle(buttons[from]);
    const others = buttons.map((button, k) => [k, ...middle(button)]).filter(([, , top]) => (top - y) * direction > 20);
    others.sort((a, b) => Math.abs(a[2] - y) - Math.abs(b[2] - y) || Math.abs(a[1] - x) - Math.abs(b[1] - x));
    return others[0]?.[0] ?? -1;
  }

  // The window

  #view(index) {
    const picture = this.pictures[index];
    if (!picture) return;
    this.at = index;
    const { recipe } = picture;
    $("viewer-image").src = picture.url;
    $("viewer-image").alt = recipe.prompt ?? "";
    $("viewer-prompt").textContent = recipe.prompt ?? "";
    $("viewer-recipe").replaceChildren(...rows(picture, this.guided).flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
    $("download").href = picture.url;
    $("download").download = picture.name;
    $("viewer-previous").disabled = index === 0;
    $("viewer-next").disabled = index === this.pictures.length - 1;
    // What began from another picture can't begin so again: that one is not kept.
    const began = Boolean(recipe.from_picture || recipe.references || recipe.control);
    $("again").disabled = !recipe.prompt || began;
    $("again").title = began ? "It began from a picture that is not kept" : "The same settings, another seed";
    $("vary").disabled = $("reuse").disabled = !recipe.prompt;
    this.#unsure();
    if (!$("viewer").open) {
      $("viewer").showModal();
      $("viewer-close").focus();
    }
  }

  #listenToViewer(actions) {
    const step = (by) => this.#view(this.at + by);
    $("viewer-previous").addEventListener("click", () => step(-1));
    $("viewer-next").addEventListener("click", () => step(1));
    $("viewer-close").addEventListener("click", () => $("viewer").close());
    $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
    $("viewer").addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
      if (event.key === "Delete") this.#remove();
    });
    $("viewer").addEventListener("close", () => {
      const { leaves } = $("viewer").dataset;
      delete $("viewer").dataset.leaves;
      if ($("viewer").open) return; // this event came late: the window is open again
      const name = this.pictures[this.at]?.name;
      this.at = -1;
      // Who is elsewhere by now is not called back.
      const focused = document.activeElement;
      const isElsewhere = leaves || (focused !== document.body && !$("pictures").contains(focused));
      const item = [...$("pictures").children].find((each) => each.dataset.name === name);
      if (item && !isElsewhere) item.querySelector("button").focus();
    });
    for (const name of ["again", "vary", "edit", "reuse"]) {
      $(name).addEventListener("click", () => {
        const picture = this.pictures[this.at];
        $("viewer").dataset.leaves = "yes"; // the focus goes elsewhere
        $("viewer").close();
        actions[name](picture);
      });
    }
    $("delete").addEventListener("click", () => this.#remove());
  }

  #unsure() {
    $("delete").classList.remove("sure");
    $("delete").textContent = "Delete";
  }

  /** The first time asks, the second time does. */
  async #remove() {
    if (!$("delete").classList.contains("sure")) {
      $("delete").classList.add("sure");
      $("delete").textContent = "Delete for good?";
      tell("Delete for good? Press Delete once more.");
      return;
    }
    const index = this.at;
    this.#unsure(); // a third press is not a second deletion
    try {
      await ask("DELETE", `/api/pictures/${encodeURIComponent(this.pictures[index].name)}`);
    } catch (error) {
      $("delete").textContent = error.message;
      return;
    }
    this.pictures.splice(index, 1);
    tell("Deleted.");
    this.#show();
    if (this.pictures.length) this.#view(Math.min(index, this.pictures.length - 1));
    else $("viewer").close();
  }
}

/** What a recipe says, in lines. */
function rows({ recipe, width, height, created }, guided) {
  const lines = [
    ["Model", recipe.model],
    ["Size", `${width} × ${height}`],
    ["Seed", recipe.seed],
    ["Steps", recipe.steps],
    ["Guidance", guided(recipe.model) ? recipe.guidance : ""],
    ["LoRA", (recipe.adapters ?? []).map(({ name, strength }) => `${name} ${strength}`).join(", ")],
    ["Began from", recipe.from_picture ? `a picture, ${Math.round((recipe.strength ?? 1) * 100)} % changed` : ""],
    ["References", recipe.references ? counted(recipe.references, "picture") : ""],
    ["Follows", recipe.control ? "a map" : ""],
    ["Should not show", recipe.negative_prompt],
    ["Hosts", { data: "", tensor: "together, by weights", sequence: "together, by tokens", mixed: "mixed" }[recipe.placement] ?? ""],
    ["Painted", new Date(created).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })],
  ];
  return lines.filter(([, value]) => value !== "" && value !== null && value !== undefined);
}
