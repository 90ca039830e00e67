// The form: a prompt, and how it is to be painted.

import { ask } from "./server.js";
import { Attachments } from "./attachments.js";
import { $, bytes, icon, make, memory, showError } from "./dom.js";
import { Sizes } from "./sizes.js";

const FIELDS = { negative_prompt: "negative", n_images: "number", adapters: "adapter-add" }; // where their names differ
const UNKNOWN = "The server has not said yet what it can paint with. Try again in a moment.";

/** Whether a model is shown pictures and paints them as the prompt says. */
export function isEditor({ takes }) {
  // Redux, which takes strengths, sees pictures and changes none.
  return takes.includes("references") && !takes.includes("reference_strengths");
}

export class Composer {
  /** `submit(fields)` takes a request; what it throws is shown here. `chosen()` hears of another model. */
  constructor(submit, chosen) {
    this.submit = submit;
    this.chosen = chosen;
    this.models = [];
    this.adapters = []; // {name, strength} that are chosen
    this.sizes = new Sizes();
    this.attachments = new Attachments(() => this.#attached(), (sentence) => this.fail(sentence));
    $("paint-key").textContent = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘↵" : "Ctrl ↵";
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    addEventListener("keydown", (event) => {
      const isOver = document.querySelector("dialog[open]");
      // A key that is held sends once; on a button, or in a field, a browser presses it again and again.
      if (event.key === "Enter" && event.repeat && event.target.matches("#composer :not(textarea)")) event.preventDefault();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !isOver) {
        event.preventDefault();
        if (!event.repeat) this.send();
      } else if (event.key === "/" && !isOver && !event.target.closest("input, textarea, select")) {
        event.preventDefault();
        $("prompt").focus();
      }
    });
    $("prompt").addEventListener("input", () => {
      this.fail("");
      this.#grow();
      memory.set("prompt", $("prompt").value.slice(0, 4000));
    });
    $("more").addEventListener("click", () => this.#open($("details").hidden));
    $("model").addEventListener("change", () => {
      memory.set("model", $("model").value);
      this.#modelChosen();
    });
    $("edit-instead").addEventListener("click", () => {
      $("model").value = this.editor.name;
      $("model").dispatchEvent(new Event("change"));
      this.attachments.refer();
      $("prompt").focus();
    });
    $("adapter-add").addEventListener("change", () => {
      this.adapters.push({ name: $("adapter-add").value, strength: 1 });
      this.#showAdapters();
    });
    $("prompt").value = memory.get("prompt") ?? "";
    this.#grow();
  }

  /** Asks the server for its models and adapters; what the form says stays. Throws `ApiError`. */
  async load() {
    const [models, adapters] = await Promise.all([ask("GET", "/api/models"), ask("GET", "/api/adapters")]);
    const heard = JSON.stringify([models, adapters], (name, value) => (name === "loaded" ? undefined : value));
    if (heard === this.heard) return; // fields that are built anew lose the focus
    this.heard = heard;
    if (!this.models.length) this.fail(""); // that it can't be asked, or is yet to answer
    this.models = models.models;
    this.knownAdapters = adapters.adapters;
    const wanted = $("model").value || memory.get("model");
    const chosen = this.models.some(({ name }) => name === wanted) ? wanted : models.default;
    $("model").replaceChildren(
      ...this.models.map((model) => make("option", {
        value: model.name, textContent: model.name, selected: model.name === chosen,
        title: `${model.family}, ${bytes(model.size_bytes)}`,
      })),
    );
    this.#modelChosen();
  }

  get model() {
    return this.models.find(({ name }) => name === $("model").value);
  }

  /** A model that edits pictures: this one, or the first. */
  get editor() {
    return [this.model, ...this.models].filter(Boolean).find(isEditor);
  }

  /** Whether a model reads its guidance. */
  guided(name) {
    return this.models.some((model) => model.name === name && model.guidance !== null);
  }

  /** The form as a request. */
  async fields() {
    const number = (id) => ($(id).value.trim() === "" ? undefined : Number($(id).value.trim().replace(",", ".")));
    const takes = this.model?.takes ?? [];
    const fields = {
      prompt: $("prompt").value.trim(),
      model: $("model").value,
      n_images: Number($("number").value),
      ...this.sizes.value(),
      steps: number("steps"),
      seed: number("seed"),
      guidance: $("guidance-field").hidden ? undefined : number("guidance"),
      placement: $("placement").value || undefined,
      ...(await this.attachments.fields()),
    };
    if (takes.includes("negative_prompt") && $("negative").value.trim()) fields.negative_prompt = $("negative").value.trim();
    if (takes.includes("adapters") && this.adapters.length) fields.adapters = this.adapters;
    return fields;
  }

  async send() {
    if ($("paint").disabled) return; // one is being sent
    if (!this.models.length) {
      this.fail(UNKNOWN);
      return;
    }
    if (!$("prompt").value.trim()) {
      this.fail("Say what to paint.", "prompt");
      return;
    }
    for (const id of ["steps", "seed", "guidance", "width", "height"]) {
      if ($(id).value.trim() !== "" && !Number.isFinite(Number($(id).value.trim().replace(",", ".")))) {
        this.fail(`${$(id).closest("label").textContent.trim()} is a number.`, id);
        return;
      }
    }
    this.fail("");
    $("paint").disabled = true;
    try {
      await this.submit(await this.fields());
    } catch (error) {
      this.fail(error.message, error.setting);
    } finally {
      $("paint").disabled = false;
    }
  }

  /** Shows a sentence, and the field that it is about. */
  fail(sentence, setting = null) {
    for (const marked of $("composer").querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
    showError($("form-error"), plain(sentence));
    const field = setting && $(FIELDS[setting] ?? setting);
    if (!sentence || !field) return;
    if ($("details").contains(field)) this.#open(true);
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }

  /** Puts what made a picture into the form; without its seed, another one is drawn. */
  fill(recipe, { seed = true } = {}) {
    if (this.models.some(({ name }) => name === recipe.model)) $("model").value = recipe.model;
    this.#modelChosen();
    $("prompt").value = recipe.prompt ?? "";
    this.#grow();
    $("number").value = "1";
    $("seed").value = seed ? (recipe.seed ?? "") : "";
    $("steps").value = recipe.steps === this.model?.steps ? "" : (recipe.steps ?? "");
    $("guidance").value = recipe.guidance === this.model?.guidance ? "" : (recipe.guidance ?? "");
    $("negative").value = recipe.negative_prompt ?? "";
    this.adapters = (recipe.adapters ?? []).map((adapter) => ({ ...adapter }));
    this.#showAdapters();
    if (recipe.width) this.sizes.choose(recipe);
    this.fail("");
    const isSpecial = $("seed").value || $("steps").value || $("negative").value || this.adapters.length;
    if (isSpecial) this.#open(true);
    $("composer").scrollIntoView({ block: "start", behavior: "auto" });
    scrollTo(0, 0);
    $("prompt").focus();
  }

  #open(isOpen) {
    $("details").hidden = !isOpen;
    $("more").setAttribute("aria-expanded", String(isOpen));
  }

  #modelChosen() {
    const model = this.model;
    if (!model) return;
    $("steps").placeholder = String(model.steps);
    $("guidance-field").hidden = model.guidance === null;
    $("guidance").placeholder = String(model.guidance ?? "");
    $("negative-field").hidden = !model.takes.includes("negative_prompt");
    $("adapters-field").hidden = !model.takes.includes("adapters") || !this.knownAdapters.length;
    this.attachments.allow(model.takes, model.max_references ?? 0);
    this.sizes.show(model.size);
    this.#showAdapters();
    this.chosen();
  }

  #attached() {
    const { editor, model } = this;
    $("editor-row").hidden = !editor || editor === model || !this.attachments.isPaintedOver;
    $("editor-words").textContent = `${model?.name} paints over it.`;
    $("edit-instead").textContent = `Edit it with ${editor?.name}`;
    const hasImage = this.attachments.hasImage;
    if (hasImage === this.sizes.hasPicture) return;
    this.sizes.hasPicture = hasImage;
    this.sizes.show(this.sizes.own);
    if (hasImage) {
      $("sizes").querySelector("input").checked = true;
      $("width").value = $("height").value = "";
      this.sizes.describe();
    }
  }

  #showAdapters() {
    const chosen = new Set(this.adapters.map(({ name }) => name));
    const left = (this.knownAdapters ?? []).filter(({ name }) => !chosen.has(name));
    $("adapter-add").replaceChildren(
      make("option", { value: "", textContent: "Add a LoRA…", selected: true, disabled: true }),
      ...left.map(({ name }) => make("option", { value: name, textContent: name })),
    );
    $("adapter-add").disabled = !left.length;
    $("adapters").replaceChildren(...this.adapters.map((adapter) => this.#adapter(adapter)));
  }

  #adapter(adapter) {
    const value = make("output", { textContent: adapter.strength.toFixed(2) });
    const slider = make("input", { type: "range", min: "0", max: "2", step: "0.05", value: String(adapter.strength), aria: { label: `Strength of ${adapter.name}` } });
    slider.addEventListener("input", () => {
      adapter.strength = Number(slider.value);
      value.textContent = adapter.strength.toFixed(2);
    });
    const remove = make("button", { type: "button", className: "quiet icon", aria: { label: `Without ${adapter.name}` } }, icon("close"));
    remove.addEventListener("click", () => {
      this.adapters = this.adapters.filter((other) => other !== adapter);
      this.#showAdapters();
    });
    return make("li", { className: "adapter" }, make("span", { className: "adapter-name", textContent: adapter.name }), slider, value, remove);
  }

  /** Browsers that can't size a text field by its text (`field-sizing`). */
  #grow() {
    if (CSS.supports("field-sizing", "content")) return;
    $("prompt").style.height = "auto";
    $("prompt").style.height = `${$("prompt").scrollHeight}px`;
  }
}

/** A sentence of the server for people: settings by their names here, without the marks of code. */
function plain(sentence) {
  const names = { n_images: "Number", negative_prompt: "What it should not show", adapters: "LoRA" };
  return sentence.replace(/`(\w+)`/g, (_, name) => names[name] ?? name.replaceAll("_", " ")).replace(/^./, (first) => first.toUpperCase());
}
