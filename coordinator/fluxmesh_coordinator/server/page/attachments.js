// Pictures that a request begins from: dropped, pasted or chosen, each with what it is for.

import { $, icon, make, tell } from "./dom.js";
import { brush } from "./masking.js";

const LARGEST = 2048; // pixels of a side, above which a picture is scaled down before it is sent
const PART = 0.6; // how much of a picture changes, until somebody says otherwise
const ROLES = { references: "Reference", image: "Paint over it", control: "Outline or depth" };

const isPicture = (file) => /^image\/(png|jpeg|webp)$/.test(file.type);

/** A file as a picture, whose address holds until it is revoked. */
async function opened(blob) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
  } catch (error) {
    URL.revokeObjectURL(image.src);
    throw error;
  }
  return image;
}

/** A picture as it is sent: PNG or JPEG, upright, no larger than it need be. */
async function prepared(blob) {
  const image = await opened(blob);
  const scale = Math.min(1, LARGEST / Math.max(image.naturalWidth, image.naturalHeight));
  if (scale === 1 && blob.type === "image/png") return { blob, image };
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(image.naturalWidth * scale);
  canvas.height = Math.round(image.naturalHeight * scale);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(image.src);
  const again = await new Promise((made) => canvas.toBlob(made, blob.type === "image/png" ? "image/png" : "image/jpeg", 0.95));
  return { blob: again, image: await opened(again) };
}

/** Lets go of what the browser holds for the addresses of a picture that is shown no more. */
function release({ image, maskUrl }) {
  URL.revokeObjectURL(image.src);
  if (maskUrl) URL.revokeObjectURL(maskUrl);
}

function base64(blob) {
  return new Promise((read, failed) => {
    const reader = new FileReader();
    reader.onload = () => read(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}

export class Attachments {
  /** `changed()` is called when there are others; `failed(sentence)` for a file that is none. */
  constructor(changed, failed) {
    Object.assign(this, { changed, failed, list: [], takes: [], most: 0 });
    $("attach").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => {
      this.addFiles($("file").files);
      $("file").value = "";
    });
    $("strength").addEventListener("input", () => this.#setStrength($("strength").value));
    this.#listenToPage();
  }

  /** What the model takes, and how many references; pictures that it does not take stay, unused. */
  allow(takes, mostReferences) {
    this.takes = takes;
    this.most = mostReferences;
    for (const each of this.list) if (!this.roles.includes(each.role)) each.role = this.#free();
    $("attach").hidden = !this.roles.length;
    this.#show();
  }

  get roles() {
    return Object.keys(ROLES).filter((role) => this.takes.includes(role));
  }

  get hasImage() {
    return this.list.some(({ role }) => role === "image");
  }

  async addFiles(files, role = null) {
    const pictures = [...files].filter(isPicture);
    if (files.length && !pictures.length) this.failed("That is no picture that can be used: PNG, JPEG and WebP can.");
    for (const file of pictures) await this.add(file, role);
  }

  async add(blob, role = null) {
    if (!this.roles.length) {
      this.failed("This model begins from words alone; choose another one for pictures.");
      return;
    }
    const wanted = role && this.roles.includes(role) ? role : this.#free() ?? this.roles[0];
    const references = this.list.filter((each) => each.role === "references").length;
    if (wanted === "references" && this.most && references >= this.most) {
      this.failed(`This model takes ${this.most} reference${this.most === 1 ? "" : "s"} at most.`);
      return;
    }
    let picture;
    try {
      picture = await prepared(blob);
    } catch {
      this.failed("That picture can't be read.");
      return;
    }
    if (wanted !== "references") this.#drop((each) => each.role === wanted);
    this.list.push({ ...picture, role: wanted, mask: null, strokes: [] });
    tell("Picture added.");
    this.#show();
  }

  /** Whether a picture is there to be painted over as a whole. */
  get isPaintedOver() {
    return this.list.some(({ role, mask }) => role === "image" && !mask);
  }

  /** What was to be painted over is shown to the model instead. */
  refer() {
    for (const each of this.list) if (each.role === "image" && !each.mask) each.role = "references";
    this.#show();
  }

  clear() {
    this.#drop(() => true);
    this.#show();
  }

  /** Fields of the request. */
  async fields() {
    const fields = {};
    for (const { blob, role, mask } of this.list) {
      if (!role) continue;
      const data = await base64(blob);
      if (role === "references") (fields.references ??= []).push(data);
      else fields[role] = data;
      if (role === "image") {
        fields.strength = Number($("strength").value);
        if (mask) fields.mask = await base64(mask);
      }
    }
    return fields;
  }

  /** Takes pictures out of the list. */
  #drop(isOut) {
    this.list.filter(isOut).forEach(release);
    this.list = this.list.filter((each) => !isOut(each));
  }

  /** Gives a picture a role; another one that has it, and can't have it too, takes its place. */
  #assign(each, role) {
    const other = role !== "references" && this.list.find((known) => known !== each && known.role === role);
    if (other) other.role = each.role;
    each.role = role;
  }

  /** What a further picture may be for; null: each role that the model has is taken. */
  #free() {
    return this.roles.find((role) => role === "references" || !this.list.some((each) => each.role === role)) ?? null;
  }

  #setStrength(strength) {
    $("strength").value = strength;
    $("strength-value").textContent = `${Math.round(strength * 100)} %`;
  }

  #show() {
    $("attached").hidden = !this.list.length;
    $("attached").replaceChildren(...this.list.map((each, k) => this.#item(each, this.list.length > 1 ? `picture ${k + 1}` : "this picture")));
    $("strength-row").hidden = !this.hasImage;
    if (!this.hasImage) this.#setStrength(PART);
    this.changed();
  }

  /** `name` tells it apart from the others where nobody sees them. */
  #item(each, name) {
    const shown = make("span", { className: "picture" }, make("img", { src: each.image.src, alt: "" }));
    if (each.mask) shown.append(make("img", { src: each.maskUrl, alt: "Its mask" }));
    const tools = make("span", { className: "attachment-tools" });
    const unused = !this.roles.includes(each.role);
    if (unused) tools.append("Not taken by this model");
    else if (this.roles.length > 1) {
      const choices = this.roles.map((role) => make("option", { value: role, textContent: ROLES[role], selected: role === each.role }));
      const select = make("select", { aria: { label: `What ${name} is for` } }, ...choices);
      select.addEventListener("change", () => {
        this.#assign(each, select.value);
        this.#show();
      });
      tools.append(select);
    }
    if (each.role === "image" && this.takes.includes("mask")) {
      const button = make("button", { type: "button", className: "quiet" }, icon("brush"), each.mask ? "Change mask" : "Brush a mask");
      button.addEventListener("click", () => this.#brush(each));
      tools.append(button);
    }
    const remove = make("button", { type: "button", className: "quiet icon", title: `Remove ${name}`, aria: { label: `Remove ${name}` } }, icon("close"));
    remove.addEventListener("click", () => {
      this.#drop((other) => other === each);
      this.#show();
      $("prompt").focus();
    });
    tools.append(remove);
    return make("li", { className: "attachment" }, shown, tools);
  }

  async #brush(each) {
    const made = await brush(each.image, each.strokes);
    if (!made || !this.list.includes(each)) return;
    if (!each.mask) this.#setStrength(1); // what is brushed over goes; the rest stays anyway
    if (each.maskUrl) URL.revokeObjectURL(each.maskUrl);
    each.mask = made.blob;
    each.maskUrl = URL.createObjectURL(made.blob);
    each.strokes = made.strokes;
    tell("The mask is set.");
    this.#show();
  }

  #listenToPage() {
    let depth = 0; // dragenter and dragleave come for every element on the way
    const carries = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    const mark = () => $("drop").classList.toggle("over-page", depth > 0);
    addEventListener("dragenter", (event) => { if (carries(event)) { depth += 1; mark(); } });
    addEventListener("dragleave", (event) => { if (carries(event)) { depth -= 1; mark(); } });
    addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
    addEventListener("drop", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      depth = 0;
      mark();
      this.addFiles(event.dataTransfer.files);
    });
    addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])].filter(isPicture);
      if (!files.length) return;
      event.preventDefault();
      this.addFiles(files);
    });
  }
}
