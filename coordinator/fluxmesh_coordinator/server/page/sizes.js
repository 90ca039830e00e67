// Shapes of a picture: buttons for the usual ones, each of about the model's own number of pixels.

import { $, make } from "./dom.js";

const STEP = 16; // pixels: sides are multiples of it
const SHAPES = [
  { name: "Square", ratio: 1 },
  { name: "Portrait", ratio: 3 / 4 },
  { name: "Landscape", ratio: 4 / 3 },
  { name: "Tall", ratio: 9 / 16 },
  { name: "Wide", ratio: 16 / 9 },
];
const ICON = 18; // pixels of an icon's longer side

const rounded = (side) => Math.max(STEP, Math.round(side / STEP) * STEP);

/** Width and height of a shape with the pixels of `own`. */
function sized(ratio, own) {
  const area = own.width * own.height;
  return { width: rounded(Math.sqrt(area * ratio)), height: rounded(Math.sqrt(area / ratio)) };
}

export class Sizes {
  constructor() {
    this.own = { width: 1024, height: 1024 };
    this.hasPicture = false;
    $("sizes").addEventListener("change", () => {
      $("width").value = $("height").value = "";
      this.describe();
    });
    for (const name of ["width", "height"]) $(name).addEventListener("input", () => this.describe());
  }

  /** For a model of that size; keeps the shape that was chosen. */
  show(own) {
    const chosen = this.shape;
    this.own = own;
    const shapes = [...(this.hasPicture ? [{ name: "As the picture" }] : []), ...SHAPES];
    const kept = shapes.some(({ name }) => name === chosen) ? chosen : shapes[0].name;
    const buttons = shapes.map(({ name, ratio }) => {
      const size = ratio && sized(ratio, own);
      const label = size ? `${name}, ${size.width} × ${size.height}` : name;
      const radio = make("input", { type: "radio", name: "shape", value: name, checked: name === kept, aria: { label } });
      const figure = make("i");
      figure.style.width = `${Math.round(ratio ? ICON * Math.min(1, ratio) : ICON)}px`;
      figure.style.height = `${Math.round(ratio ? ICON * Math.min(1, 1 / ratio) : ICON - 4)}px`;
      if (!ratio) figure.style.borderStyle = "dotted";
      return make("label", { className: "size", title: label }, radio, figure);
    });
    this.words = make("span", { className: "size-name", aria: { hidden: "true" } });
    $("sizes").replaceChildren(...buttons, this.words);
    this.describe();
  }

  get shape() {
    return $("sizes").querySelector(":checked")?.value ?? "Square";
  }

  describe() {
    const size = this.value();
    this.words.textContent = size.width ? `${size.width} × ${size.height}` : "as the picture";
    const preset = this.#preset();
    $("width").placeholder = preset.width ?? "as the picture";
    $("height").placeholder = preset.height ?? "as the picture";
  }

  #preset() {
    const shape = SHAPES.find(({ name }) => name === this.shape);
    return shape ? sized(shape.ratio, this.own) : {};
  }

  /** {width, height} in pixels, or {} where it is the picture's. */
  value() {
    const preset = this.#preset();
    const width = Number($("width").value) || preset.width;
    const height = Number($("height").value) || preset.height;
    return width && height ? { width, height } : {};
  }

  /** Chooses that size: by its shape where there is one, else by numbers. */
  choose({ width, height }) {
    const shape = SHAPES.find(({ ratio }) => {
      const size = sized(ratio, this.own);
      return size.width === width && size.height === height;
    });
    for (const radio of $("sizes").querySelectorAll("input")) radio.checked = radio.value === (shape?.name ?? "Square");
    $("width").value = shape ? "" : width;
    $("height").value = shape ? "" : height;
    this.describe();
  }
}
