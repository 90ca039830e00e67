// Finished pictures, newest first, and the window in which one is looked at.

import { ask } from "./server.js";
import { $, arrange, counted, make, tell } from "./dom.js";

const PAGE = 50;
const ANSWERABLE = 500; // milliseconds after which a question may be answered: a double press is no answer

export class Gallery {
  /** `actions`: again, vary, edit and reuse, each given a picture; `guided(model)`: whether a model
   * reads its guidance. */
  constructor(actions, guided) {
    this.guided = guided;
    this.pictures = []; // as the server lists them: by name, newest first
    this.next = null; // where the list goes on: before this name
    this.viewed = null; // the picture in the window
    this.deleting = new Set(); // names of which the server has not answered yet
    this.deleted = new Set(); // names that a list which was asked for before may still have
    this.asked = 0; // lists, by number
    this.shown = 0; // the number of the one on the page
    this.questioned = 0; // when it was asked whether to delete
    $("show-more").addEventListener("click", () => this.#more());
    $("pictures").addEventListener("keydown", (event) => this.#move(event));
    this.#listenToViewer(actions);
  }

  /** Asks for the newest pictures; older ones that are on the page stay. Throws `ApiError`. */
  async load() {
    const number = ++this.asked;
    let { pictures, next } = await this.#ask();
    while (next && this.pictures.length && this.pictures[0].name < next) { // more are new than one answer has
      const further = await this.#ask(next);
      pictures = [...pictures, ...further.pictures];
      next = further.next;
    }
    if (number < this.shown) return; // one that was asked for later is on the page
    this.shown = number;
    const older = next ? this.pictures.filter(({ name }) => name < next) : [];
    this.pictures = [...this.#withoutDeleted(pictures), ...older];
    if (!older.length) this.next = next;
    this.#show();
    const { name } = this.viewed ?? {};
    if (!name || this.#find(name) || this.deleting.has(name)) return;
    $("viewer").close();
    tell("The picture was deleted elsewhere.");
  }

  /** Views a picture, also one that is not on the page yet. */
  async open(name) {
    try {
      if (!this.#find(name)) await this.load();
      const picture = this.#find(name);
      if (picture) this.#view(picture);
      else tell("The picture is not there any more.");
    } catch (error) {
      tell(error.message);
    }
  }

  async #more() {
    const button = $("show-more");
    const before = this.next;
    button.disabled = true;
    try {
      const { pictures, next } = await this.#ask(before);
      if (this.next !== before) return; // the list ends elsewhere by now
      const first = this.pictures.length;
      this.pictures.push(...this.#withoutDeleted(pictures));
      this.next = next;
      this.#show();
      if (isNobodyElsewhere(button)) $("pictures").children[first]?.querySelector("button").focus();
    } catch (error) {
      tell(error.message);
    } finally {
      button.disabled = false;
      if (isNobodyElsewhere(button)) button.focus(); // which it lost when it was disabled
    }
  }

  #ask(before = "") {
    return ask("GET", `/api/pictures?limit=${PAGE}${before && `&before=${encodeURIComponent(before)}`}`);
  }

  #withoutDeleted(pictures) {
    return pictures.filter(({ name }) => !this.deleted.has(name));
  }

  #find(wanted) {
    return this.pictures.find(({ name }) => name === wanted);
  }

  #show() {
    const shown = new Map([...$("pictures").children].map((item) => [item.dataset.name, item]));
    const hadFocus = $("pictures").contains(document.activeElement);
    arrange($("pictures"), this.pictures.map((picture) => shown.get(picture.name) ?? this.#item(picture)));
    const buttons = [...$("pictures").querySelectorAll("button")];
    const stop = buttons.find((button) => button === document.activeElement) ?? buttons[0];
    for (const button of buttons) button.tabIndex = button === stop ? 0 : -1; // one stop; arrows go on
    if (hadFocus) stop?.focus({ preventScroll: true });
    $("empty").hidden = this.pictures.length > 0 || Boolean(this.next);
    $("show-more").hidden = !this.next;
    $("gallery-count").textContent = this.pictures.length && !this.next ? counted(this.pictures.length, "picture") : "";
    this.#showEnds();
  }

  #item(picture) {
    const ratio = picture.width / picture.height;
    const prompt = picture.recipe.prompt ?? "";
    const image = make("img", { src: picture.thumbnail_url, alt: "", loading: "lazy", decoding: "async" });
    const button = make("button", { type: "button", aria: { label: prompt || "Picture" } }, image, make("span", { className: "caption", textContent: prompt, ariaHidden: "true" }));
    button.addEventListener("click", () => this.#view(picture));
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

  #view(picture) {
    this.viewed = picture;
    const { recipe } = picture;
    this.#showPixels(picture);
    $("viewer-prompt").textContent = recipe.prompt ?? "";
    $("viewer-recipe").replaceChildren(...rows(picture, this.guided).flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
    $("download").href = picture.url;
    $("download").download = picture.name;
    this.#showEnds();
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

  /** The small form, which the page has, until the whole one is there. Each is an element of its own:
   * one whose `src` changes shows the picture before until then. */
  async #showPixels({ url, thumbnail_url, recipe }) {
    const form = (src) => make("img", { id: "viewer-image", alt: recipe.prompt ?? "", src });
    const small = form(thumbnail_url);
    $("viewer-image").replaceWith(small);
    const whole = form(url);
    await whole.decode().catch(() => {}); // what is wrong with it is seen
    if (small.isConnected) small.replaceWith(whole);
  }

  #beside(by) {
    const at = this.pictures.findIndex(({ name }) => name === this.viewed?.name);
    return at < 0 ? undefined : this.pictures[at + by];
  }

  #showEnds() {
    for (const [button, by] of [[$("viewer-previous"), -1], [$("viewer-next"), 1]]) {
      button.disabled = !this.#beside(by);
      // Where nothing has the focus, nothing hears the keys.
      if (button.disabled && button === document.activeElement) $("viewer-prompt").focus();
    }
  }

  #listenToViewer(actions) {
    const step = (by) => {
      const picture = this.#beside(by);
      if (picture) this.#view(picture);
    };
    $("viewer-previous").addEventListener("click", () => step(-1));
    $("viewer-next").addEventListener("click", () => step(1));
    $("viewer-close").addEventListener("click", () => $("viewer").close());
    $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
    $("viewer").addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
      // A Mac calls the key Delete that sends Backspace.
      if (["Delete", "Backspace"].includes(event.key) && !event.repeat) this.#remove();
    });
    $("viewer").addEventListener("close", () => {
      const { leaves } = $("viewer").dataset;
      delete $("viewer").dataset.leaves;
      if ($("viewer").open) return; // this event came late: the window is open again
      const name = this.viewed?.name;
      this.viewed = null;
      // Who is elsewhere by now is not called back.
      const focused = document.activeElement;
      const isElsewhere = leaves || (focused !== document.body && !$("pictures").contains(focused));
      const item = [...$("pictures").children].find((each) => each.dataset.name === name);
      if (item && !isElsewhere) item.querySelector("button").focus();
    });
    for (const name of ["again", "vary", "edit", "reuse"]) {
      $(name).addEventListener("click", () => {
        const picture = this.viewed;
        $("viewer").dataset.leaves = "yes"; // the focus goes elsewhere
        $("viewer").close();
        actions[name](picture);
      });
    }
    $("delete").addEventListener("click", ({ detail }) => { if (detail < 2) this.#remove(); });
    $("delete").addEventListener("keydown", (event) => { if (event.repeat && event.key === "Enter") event.preventDefault(); });
  }

  #unsure() {
    $("delete").classList.remove("sure");
    $("delete").textContent = "Delete";
  }

  /** The first time asks, the second time does. */
  async #remove() {
    const button = $("delete");
    if (!button.classList.contains("sure")) {
      button.classList.add("sure");
      button.textContent = "Delete for good?";
      tell("Delete for good? Press Delete once more.");
      this.questioned = performance.now();
      return;
    }
    if (performance.now() - this.questioned < ANSWERABLE) return;
    const { name } = this.viewed;
    const isViewed = () => $("viewer").open && this.viewed.name === name;
    this.#unsure(); // a third press is not a second deletion
    this.deleting.add(name);
    try {
      await ask("DELETE", `/api/pictures/${encodeURIComponent(name)}`);
    } catch (error) {
      if (error.status !== 404) { // else it was deleted elsewhere
        tell(error.message);
        if (!isViewed()) return;
        this.#unsure();
        button.textContent = error.message;
        return;
      }
    } finally {
      this.deleting.delete(name);
    }
    this.deleted.add(name);
    this.pictures = this.#withoutDeleted(this.pictures);
    tell("Deleted.");
    this.#show();
    if (!isViewed()) return;
    const beside = this.pictures.find((each) => each.name < name) ?? this.pictures.at(-1);
    if (beside) this.#view(beside);
    else $("viewer").close();
  }
}

/** Whether the focus is on this element, or nowhere: who went elsewhere is not called back. */
function isNobodyElsewhere(element) {
  return [element, document.body].includes(document.activeElement);
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
