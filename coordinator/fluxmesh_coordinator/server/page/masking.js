// The brush: strokes over a picture, which become a mask that is white where it is painted anew.

import { $ } from "./dom.js";

const TINT = "rgb(110 70 255)"; // seldom a colour of the picture
const SHOWN = 0.55; // how much of the tint lies over the picture
const ROOM = 900; // pixels: the window's width at most
const MARGIN = 32; // around the picture
const TOOLS = 220; // above and below it

class Mask {
  constructor(picture) {
    this.picture = picture;
    this.strokes = []; // {points: [[x, y], …], size, erases}: in pixels of the picture
    this.layer = document.createElement("canvas");
    this.layer.width = picture.naturalWidth;
    this.layer.height = picture.naturalHeight;
  }

  /** Paints the strokes in one colour onto the layer, from nothing. */
  draw(colour) {
    const pen = this.layer.getContext("2d");
    pen.globalCompositeOperation = "source-over";
    pen.clearRect(0, 0, this.layer.width, this.layer.height);
    pen.lineCap = pen.lineJoin = "round";
    pen.strokeStyle = pen.fillStyle = colour;
    for (const { points, size, erases } of this.strokes) {
      pen.globalCompositeOperation = erases ? "destination-out" : "source-over";
      pen.lineWidth = size;
      pen.beginPath(); // a tap is a line without length, which is not drawn: a dot is
      pen.arc(...points[0], size / 2, 0, 2 * Math.PI);
      pen.fill();
      pen.beginPath();
      for (const point of points) pen.lineTo(...point);
      pen.stroke();
    }
  }

  /** Whether anything of it is painted. */
  get isEmpty() {
    return !this.strokes.some(({ erases }) => !erases);
  }

  /** The mask as PNG: white where it is painted anew, black elsewhere. */
  async png() {
    this.draw("#fff");
    const whole = document.createElement("canvas");
    whole.width = this.layer.width;
    whole.height = this.layer.height;
    const pen = whole.getContext("2d");
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, whole.width, whole.height);
    pen.drawImage(this.layer, 0, 0);
    return new Promise((made) => whole.toBlob(made, "image/png"));
  }
}

/** Lets somebody brush over `picture` (an image element); resolves to {blob, strokes}, or null. */
export function brush(picture, strokes = []) {
  const dialog = $("masking");
  const canvas = $("mask-canvas");
  const mask = new Mask(picture);
  mask.strokes = [...strokes];
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  // As large as there is room, small pictures too, so that a finger finds its way.
  const scale = Math.min((Math.min(innerWidth, ROOM) - MARGIN) / canvas.width, (innerHeight - TOOLS) / canvas.height);
  canvas.style.width = `${Math.floor(canvas.width * scale)}px`;
  const pen = canvas.getContext("2d");
  const stops = new AbortController();
  const on = (element, kind, hear) => element.addEventListener(kind, hear, { signal: stops.signal });
  let cursor = null;
  let stroke = null;

  const size = () => (Number($("mask-size").value) / 100) * Math.min(canvas.width, canvas.height);
  const show = () => {
    mask.draw(TINT);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.globalAlpha = 1;
    pen.drawImage(picture, 0, 0);
    pen.globalAlpha = SHOWN;
    pen.drawImage(mask.layer, 0, 0);
    pen.globalAlpha = 1;
    if (cursor) {
      pen.beginPath();
      pen.arc(...cursor, size() / 2, 0, 2 * Math.PI);
      pen.lineWidth = canvas.width / Math.max(1, canvas.clientWidth) * 1.5;
      pen.strokeStyle = "#fff";
      pen.stroke();
    }
    $("mask-undo").disabled = $("mask-clear").disabled = !mask.strokes.length;
    $("mask-done").disabled = mask.isEmpty;
  };
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
  };
  const undo = () => {
    mask.strokes.pop();
    show();
  };

  on(canvas, "pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    stroke = { points: [at(event)], size: size(), erases: $("mask-erase").checked };
    mask.strokes.push(stroke);
    show();
  });
  on(canvas, "pointermove", (event) => {
    cursor = event.pointerType === "touch" ? null : at(event);
    const moves = event.getCoalescedEvents?.() ?? [];
    if (stroke) stroke.points.push(...(moves.length ? moves : [event]).map(at));
    show();
  });
  for (const kind of ["pointerup", "pointercancel"]) on(canvas, kind, () => { stroke = null; });
  on(canvas, "pointerleave", () => { cursor = null; show(); });
  on($("mask-undo"), "click", undo);
  on($("mask-clear"), "click", () => { mask.strokes = []; show(); });
  on($("mask-size"), "input", show);
  on(dialog, "keydown", (event) => {
    const resized = { "[": -2, "]": 2 }[event.key];
    if (resized) {
      $("mask-size").value = Number($("mask-size").value) + resized;
      show();
    } else if ((event.ctrlKey || event.metaKey) && event.key === "z") {
      event.preventDefault();
      undo();
    }
  });
  $("mask-erase").checked = false;
  dialog.showModal();
  canvas.focus();
  show();

  return new Promise((decided) => {
    let made = null;
    on($("mask-done"), "click", async () => {
      made = { blob: await mask.png(), strokes: mask.strokes };
      dialog.close();
    });
    on($("mask-cancel"), "click", () => dialog.close());
    on(dialog, "close", () => {
      stops.abort();
      decided(made);
    });
  });
}
